"""The fast lane: markers that tests get from their imports, and collecting without torch."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import lanes

ROOT = Path(__file__).parent.parent
FAST = "not slow and not browser and not clients and not export and not torch"  # as in noxfile.py

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"):
    sys.modules[name] = None  # importing it raises ImportError, finding it finds nothing
import pytest
raise SystemExit(pytest.main(sys.argv[1:]))
"""


def needs(tmp_path: Path, text: str) -> set[str]:
    file = tmp_path / "test_it.py"
    file.write_text(text, "utf-8")
    return set(lanes.needs_of_file(file))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import numpy, seechat_lite as sl", set()),
        ("from seechat_lite.chat import Chat", set()),
        ("from reference import data", set()),
        ("import torch.nn as nn", {"torch"}),
        ("from safetensors.torch import save_file", {"torch"}),
        ("from safetensors.numpy import save_file", set()),
        ("from networks import load_chatglm", {"export", "torch"}),
        ("from seechat_lite.nn import block_quantization", {"torch"}),
        ("from seechat_export.export import export_bundle", {"export", "torch"}),
        ("def test_it():\n    import torch", set()),
    ],
)
def test_what_a_file_needs(tmp_path: Path, line: str, expected: set[str]) -> None:
    assert needs(tmp_path, line) == expected


@pytest.mark.parametrize(
    ("line", "expected"), [("golden.module_outputs()", {"torch"}), ("golden.LLAVA", set())]
)
def test_what_a_helper_of_the_tests_imports(tmp_path: Path, line: str, expected: set[str]) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(f"import llama_reference as golden\n\ndef test_it():\n    {line}\n", "utf-8")
    item = SimpleNamespace(path=file, name="test_it", get_closest_marker=lambda name: None)
    assert lanes.needs_of_item(cast(pytest.Item, item)) == expected


@pytest.mark.parametrize(
    ("having", "expression", "expected"),
    [
        ({"torch"}, "", True),
        ({"torch"}, "not torch", False),
        ({"torch"}, "not slow", True),
        ({"export", "torch"}, FAST, False),
        (set(), FAST, True),
        (set(), "torch", True),  # perhaps one test of the file
        ({"torch"}, "torch and not export", True),
        ({"torch"}, "another(word=1) or not torch", True),  # pytest decides
    ],
)
def test_which_files_may_be_wanted(having: set[str], expression: str, expected: bool) -> None:
    assert lanes.may_be_wanted(having, expression) is expected


def test_the_markers_are_registered() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    registered = {
        line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]
    }
    assert f'FAST = "{FAST}"' in (ROOT / "noxfile.py").read_text("utf-8")
    assert registered == set(lanes.MARKERS) and lanes.REQUIRES.keys() < registered


@pytest.mark.slow
def test_fast_tests_are_collected_without_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "--collect-only", "-qq", "-m", FAST],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "test_prompt.py" in run.stdout and "test_kernels.py" not in run.stdout
