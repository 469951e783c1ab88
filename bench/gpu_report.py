"""What bench/gpu.py found, as JSON and as a table in Markdown."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_shapes import BLOCK, FORMS, SHAPES

from seechat_lite.prompt_lookup import LONGEST

if TYPE_CHECKING:
    import torch


def machine(device: "torch.device") -> dict[str, str]:
    """The device, and the versions of what runs on it."""
    import torch

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "transformers", "bitsandbytes", "onnxruntime")
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        **{p: installed(p) for p in packages},
    }


def merged(report: dict[str, Any]) -> dict[str, Any]:
    """What all stages found, as one: lists are joined, and dictionaries."""
    found: dict[str, Any] = {
        "correctness": [],
        "budgets": [],
        **{key: {} for key in ("rates", "vision", "models", "bundle", "skipped")},
    }
    for stage in report["stages"].values():
        for key, value in stage["found"].items():
            if isinstance(value, list):
                found[key] += value
            elif isinstance(value, dict):
                found[key] |= value
    return found


def write(report: dict[str, Any], folder: Path) -> Path:
    """JSON and table, in `folder`; returns the table's path. Both are whole at every moment."""
    folder.mkdir(parents=True, exist_ok=True)
    path = report_path(report["machine"], report["tiny"], folder)
    for file, text in (
        (path.with_suffix(".json"), json.dumps(report, indent=1) + "\n"),
        (path, table(report)),
    ):
        partial = file.with_name(file.name + ".partial")
        partial.write_text(text, "utf-8")
        partial.replace(file)
    return path


def report_path(machine: dict[str, str], tiny: bool, folder: Path) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in machine["device"].lower())
    return folder / f"gpu-{name}{'-tiny' if tiny else ''}.md"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    shape, found = SHAPES[report["tiny"]], merged(report)
    rates, size = found["rates"], shape.config
    lines = [
        f"# The torch engine on {report['machine']['device']}",
        "",
        f"`python bench/gpu.py{' --tiny' if report['tiny'] else ''}` · "
        + " · ".join(f"{k} {v}" for k, v in report["machine"].items() if k != "device"),
        "",
        f"Random weights, {size.num_layers} layers of {size.hidden_size}, int8 and int4 in blocks "
        f"of {BLOCK}, context {shape.context}.",
        f"Measured here: {rates['GB/s']:.0f} GB/s copied, "
        f"{rates['TFLOP/s']:.1f} TFLOP/s of matrix product."
        if rates
        else "Rates of this GPU were not measured.",
        "",
        "| | "
        + " | ".join(f"prefill {n}, tokens/s (share)" for n in shape.prefills)
        + " | "
        + " | ".join(f"decode at {n}, tokens/s (share)" for n in shape.decodes)
        + f" | {1 + LONGEST} tokens at once, steps | first token, ms | peak GB (at most) "
        "| eager loop, tokens/s |",
        "|---" * (len(shape.prefills) + len(shape.decodes) + 5) + "|",
    ]
    rows = dict(found["models"])
    if "onnx" in found["bundle"]:
        rows["int4, ONNX Runtime"] = found["bundle"]["onnx"]
    for form, speeds in rows.items():
        prefill, decode = speeds.get("prefill", {}), speeds.get("decode", {})
        # JSON has made text of the numbers of tokens
        wanted = [(prefill, n) for n in shape.prefills] + [(decode, n) for n in shape.decodes]
        cells = [
            f"{row['tokens/s']:.0f} ({row['share']:.0%})" if (row := part.get(str(n))) else "–"
            for part, n in wanted
        ]
        step = decode.get(str(shape.decodes[0]))
        together = speeds.get("tokens at once")
        cells.append(f"{together / step['seconds']:.1f}" if together and step else "–")
        first = speeds.get("first token seconds")
        peak = speeds.get("peak bytes", speeds.get("bytes"))
        limit = f" ({FORMS[form][2]})" if form in FORMS else ""
        eager = speeds.get("eager loop")
        cells.append(f"{first * 1e3:.1f}" if first else "–")
        cells.append(f"{peak / 1e9:.2f}{limit}" if peak else "–")
        cells.append(f"{1 / eager['decode seconds']:.1f}" if eager else "–")
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    for name, row in found["vision"].items():
        lines += [
            "",
            f"A picture, {name}: {row['seconds'] * 1e3:.1f} ms, the first "
            f"{row['first seconds']:.2f} s, {row['bytes'] / 1e9:.2f} GB held; with nothing held "
            f"{row['released seconds'] * 1e3:.0f} ms.",
        ]
    for name, row in found["bundle"].items():
        lines += ["", f"int4 from files in memory, {name}: {row['load seconds']:.1f} s."]
    for row in found["budgets"]:
        how = f"{row['peak bytes'] / 1e9:.2f} GB" if row["runs"] else row["error"]
        lines.append(f"Budget {row['GB']} GB, {row['form']}, context {row['context']}: {how}.")
    lines += [
        "",
        "| against float32 on the CPU | largest error | bar | same token |",
        "|---|---|---|---|",
    ]
    for row in found["correctness"]:
        mark = "" if row["ok"] else " **wrong**"
        same = f"{row['same token']:.0%}" if "same token" in row else "–"
        lines.append(f"| {row['what']} | {row['error']:.2g}{mark} | {row['bar']} | {same} |")
    lines += ["", "| stage | seconds | end |", "|---|---|---|"]
    for name, stage in report["stages"].items():
        lines.append(f"| {name} | {stage['seconds']:.0f} | {stage['end']} |")
    lines += ["", *(f"Left out: {what} ({why})." for what, why in found["skipped"].items())]
    return "\n".join(lines) + "\n"
