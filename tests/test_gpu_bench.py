"""bench/gpu.py runs to its end without a GPU and says what it left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.torch]


def test_tiny(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "bench/gpu.py", "--tiny", "--out", tmp_path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    assert all(row["ok"] for row in report["correctness"]), report["correctness"]
    assert {"fp16", "int8", "int4"} <= report["models"].keys()
    assert "memory" in report["skipped"]["budgets"]
    assert not [why for why in report["skipped"].values() if "Error" in why], report["skipped"]
    shown = (tmp_path / "gpu-cpu-tiny.md").read_text()
    assert "| int4 |" in shown and shown in run.stdout
