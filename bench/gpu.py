"""The engines on a GPU, measured in stages: a table and JSON go to docs/benchmarks/ after each.

    python bench/gpu.py --plan           # the stages, and the seconds each is expected to take
    python bench/gpu.py                  # all of them, the most valuable first, in under 9 minutes
    python bench/gpu.py --stage int4     # one, or several; the others keep what they found before
    python bench/gpu.py --tiny           # the same code at a tiny size, also without a GPU

Runs from a fresh clone, without a network. Needs torch and numpy; with triton (comes with torch on
Linux) the engine's kernels run, with transformers the vision networks, with bitsandbytes its
precisions, with onnxruntime the default engine, on CUDA if it is onnxruntime-gpu. What is missing
is said and left out. Weights are random, made on the GPU, and written to no disk.

Each stage is a process of its own, which ends when its time is over: a fault, a crash or a GPU that
hangs costs that stage what it had not found yet, and no other anything. First, every precision is
held to the CPU on the small models in tests/data; then ChatGLM-6B's full shape is timed. Times are
medians and include what a caller waits for: embeddings going in, logits coming back. Shares are of
rates measured on the same GPU: of the copy bandwidth (a step reads all weights and the cache once),
of the fp16 matrix product.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), *(str(ROOT / r) for r in ("weights", "lite", "export"))]


@dataclass(frozen=True)
class Stage:
    expected: int  # seconds, on an H200; estimated, not measured yet
    limit: int  # seconds after which it is ended
    what: str


# the most valuable first; all limits and endings together are less than 9 minutes
STAGES = {
    "correctness": Stage(60, 85, "each precision and both engines against float32 on the CPU"),
    "int4": Stage(40, 85, "int4: speeds, memory, a first token with a picture"),
    "fp16": Stage(40, 75, "fp16, and the same weights in a loop of plain torch"),
    "int8": Stage(30, 65, "int8"),
    "vision": Stage(40, 65, "CLIP ViT-L/14 and EVA ViT-g with its Q-Former"),
    "onnx": Stage(60, 75, "an int4 bundle in memory through ONNX Runtime and torch"),
    "budgets": Stage(40, 50, "whether it runs with 6, 8, 12 and 24 GB of the memory"),
}
ENDING = 5  # seconds that a process has to go, once it is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--plan", action="store_true", help="say what would be done, and how long")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument(
        "--here", action="store_true", help="stages in this process, without limits, to debug them"
    )
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)  # of a stage's own process
    args = parser.parse_args()
    if args.plan:
        show_plan(args.stage)
    elif args.found:
        sys.exit(not run_stage(args.stage[0], tiny=args.tiny, found=args.found))
    else:
        run_all(args.stage, tiny=args.tiny, out=args.out, here=args.here)


def show_plan(names: list[str]) -> None:
    for name in names:
        stage = STAGES[name]
        print(f"{name:12} {stage.expected:4} s, at most {stage.limit:3} s: {stage.what}")
    chosen = [STAGES[name] for name in names]
    expected, limit = sum(s.expected for s in chosen), sum(s.limit for s in chosen)
    print(f"{'all':12} {expected:4} s, at most {limit:3} s")


def run_all(names: list[str], *, tiny: bool, out: Path, here: bool) -> None:
    """Run stages in turn; the report is written after each."""
    from gpu_report import merged, report_path, table, write

    report: dict[str, Any] = {"machine": None, "tiny": tiny, "stages": {}}
    path = None
    for name in [n for n in STAGES if n in names]:
        say(f"{name}: {STAGES[name].what}")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            found = Path(place) / "found.json"
            if here:
                whole = run_stage(name, tiny=tiny, found=found)
                end = "done" if whole else "failed in part"
            else:
                end = run_process(name, tiny=tiny, found=found, limit=STAGES[name].limit)
            result = json.loads(found.read_text("utf-8")) if found.exists() else {"found": {}}
        stage = {"seconds": time.perf_counter() - start, "end": end, "found": result["found"]}
        if report["machine"] is None and (machine := result.get("machine")):
            # what this machine found before stays, stage by stage
            earlier = report_path(machine, tiny, out).with_suffix(".json")
            report["stages"] = kept(earlier, machine, names) | report["stages"]
            report["machine"] = machine
        report["stages"][name] = stage
        say(f"{name}: {end} after {stage['seconds']:.0f} s")
        if report["machine"]:
            report["stages"] = {n: report["stages"][n] for n in STAGES if n in report["stages"]}
            path = write(report, out)
    if path is None:
        sys.exit("no stage found anything: see above")
    print(table(report))
    say(f"written to {path} and {path.with_suffix('.json').name}")
    wrong = [row["what"] for row in merged(report)["correctness"] if not row["ok"]]
    failed = [n for n in names if report["stages"][n]["end"] != "done"]
    if wrong or failed:
        sys.exit(f"wrong: {', '.join(wrong) or 'nothing'}; not done: {', '.join(failed) or 'none'}")


def kept(file: Path, machine: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Stages that an earlier run on this machine found, and which are not run now."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text("utf-8"))
    if earlier.get("machine") != machine:
        return {}
    return {name: s for name, s in earlier.get("stages", {}).items() if name not in names}


def run_process(name: str, *, tiny: bool, found: Path, limit: float) -> str:
    """Run one stage in a process of its own; how it ended, in words."""
    command = [sys.executable, __file__, "--stage", name, "--found", str(found)]
    process = subprocess.Popen(command + ["--tiny"] * tiny, cwd=ROOT)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:  # a driver that hangs does not let it go
            return f"ended after {limit:.0f} s, and its process is still there"
        return f"ended after {limit:.0f} s"
    return "done" if code == 0 else f"failed with exit code {code}"


def run_stage(name: str, *, tiny: bool, found: Path) -> bool:
    """Run one stage in this process; what it finds is in the file `found` after every figure.

    Returns whether no part of it failed; what is not installed is no failure.
    """
    import torch
    from gpu_measure import Measuring
    from gpu_report import machine
    from gpu_shapes import SHAPES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        sys.exit("no GPU is here: use --tiny to try the program")
    result: dict[str, Any] = {"machine": machine(device), "found": {}}

    def save() -> None:
        partial = found.with_name("partial.json")
        partial.write_text(json.dumps(result), "utf-8")
        partial.replace(found)

    save()
    measuring = Measuring(device, SHAPES[tiny], result["found"], save)
    measuring.run(name)
    save()
    return not measuring.failed


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
