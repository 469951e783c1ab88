"""bench/gpu.py: all stages without a GPU, and what becomes of those that fail or hang."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.torch]

WITHOUT = """
import runpy, sys
for name in ("sentencepiece", "psutil", "bitsandbytes", "onnx_ir", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path("bench/gpu.py", run_name="__main__")
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )


def found(report: dict[str, Any], stage: str) -> dict[str, Any]:
    assert report["stages"][stage]["end"] == "done"
    return report["stages"][stage]["found"]


def test_all_stages(tmp_path: Path) -> None:
    done = run("bench/gpu.py", "--tiny", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text("utf-8"))
    correctness = found(report, "correctness")["correctness"]
    assert len(correctness) > 8 and all(row["ok"] for row in correctness), correctness
    for stage in ("int4", "fp16", "int8"):
        speeds = found(report, stage)["models"][stage]
        assert len(speeds["decode"]) == len(speeds["prefill"]) == 2 and speeds["tokens at once"]
    assert len(found(report, "vision")["vision"]) == 2
    assert found(report, "onnx")["bundle"].keys() == {"onnx", "torch"}
    assert "memory" in found(report, "budgets")["skipped"]["budgets"]
    skipped = {k: v for s in report["stages"].values() for k, v in s["found"]["skipped"].items()}
    assert not [why for why in skipped.values() if "Error" in why], skipped
    shown = (tmp_path / "gpu-cpu-tiny.md").read_text("utf-8")
    assert "| int4 |" in shown and shown in done.stdout


def test_what_is_not_installed_is_said(tmp_path: Path) -> None:
    """The engines need no tokenizer, and the program no package but torch and numpy."""
    options = ("--tiny", "--here", "--out", tmp_path, "--stage", "correctness", "int4", "onnx")
    done = run("-c", WITHOUT, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text("utf-8"))
    rows = [row["what"] for row in found(report, "correctness")["correctness"]]
    assert {"fp32", "fp16", "int4 fp16"} <= set(rows)
    assert "int4" in found(report, "int4")["models"]
    skipped = found(report, "onnx")["skipped"]
    assert "sentencepiece" in skipped["bundles of random weights"], skipped


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/gpu.py, not run."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "bench/gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


STAGE = """
import json, os, sys, time
stage, file = sys.argv[2], sys.argv[4]
rows = [{"what": stage, "error": 0.0, "bar": 1, "ok": True}]
with open(file, "w") as f:
    json.dump({"machine": {"device": "none"}, "found": {"correctness": rows}}, f)
if stage == "int4":
    os._exit(3)
if stage == "fp16":
    time.sleep(1000)
"""


def test_a_stage_that_fails_or_hangs_costs_no_other(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had found is kept; another run of one stage keeps what the others found."""
    (tmp_path / "stage.py").write_text(STAGE, "utf-8")
    monkeypatch.setattr(program, "__file__", str(tmp_path / "stage.py"))
    short = {name: program.Stage(1, 5, "") for name in ("int4", "fp16", "int8")}
    monkeypatch.setattr(program, "STAGES", short)
    with pytest.raises(SystemExit, match="not done: int4, fp16"):
        program.run_all(list(short), tiny=True, out=tmp_path, here=False)
    report = json.loads((tmp_path / "gpu-none-tiny.json").read_text("utf-8"))
    ends = {name: stage["end"] for name, stage in report["stages"].items()}
    assert ends == {"int4": "failed with exit code 3", "fp16": "ended after 5 s", "int8": "done"}
    assert all(stage["found"]["correctness"] for stage in report["stages"].values())
    program.run_all(["int8"], tiny=True, out=tmp_path, here=False)
    report = json.loads((tmp_path / "gpu-none-tiny.json").read_text("utf-8"))
    assert list(report["stages"]) == ["int4", "fp16", "int8"]
    assert "| fp16 | 5 | ended after 5 s |" in (tmp_path / "gpu-none-tiny.md").read_text("utf-8")


def test_the_plan_fits(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    program.show_plan(list(program.STAGES))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*program.STAGES, "all"]
    stages = program.STAGES.values()
    assert all(stage.expected < stage.limit <= 90 for stage in stages)
    assert sum(stage.limit + program.ENDING for stage in stages) <= 9 * 60
