"""A library that cannot be imported is called missing only if it is not there."""

import ast
from pathlib import Path

import pytest

import seechat_lite as sl
from seechat_lite import engines
from seechat_weights.libraries import import_error

ROOT = Path(__file__).parents[1]
# what goes another way without a library, or asks for one that has its own installer
OTHERWISE = {"memory.py", "decode.py", "worker.py"}

NUMPY = """

IMPORTANT: PLEASE READ THIS FOR ADVICE ON HOW TO SOLVE THIS ISSUE!

Importing the numpy C-extensions failed.

Original error was: libopenblas64.so: failed to map segment from shared object
"""


@pytest.mark.parametrize(
    ("error", "name", "expected"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch", "is not installed"),
        (ModuleNotFoundError("…", name="onnx.helper"), "onnx", "is not installed"),
        (ImportError(NUMPY, name="numpy.core"), "numpy", "lack of memory (Original error was: lib"),
        (OSError("libtorch.so: cannot allocate memory in static TLS block"), "a library", "memory"),
        (ImportError("DLL load failed: The paging file is too small", name="x"), "x", "memory"),
        (ImportError("libcuda.so.1: undefined symbol", name="torch._C"), "torch", "is installed"),
        (ImportError("cannot import name 'a' from 'b'", name="b"), "b", "is installed and cannot"),
        (
            ImportError("failed to map segment", name="_C", path="/v/site-packages/torch/_C.so"),
            "torch",
            "lack of memory",
        ),
        (ImportError(), "a library", "is installed and cannot be loaded"),
    ],
)
def test_what_is_said(error: Exception, name: str, expected: str) -> None:
    said = str(import_error(sl.EngineError, error, needed="expected it", install="it"))
    assert said.startswith(f"{name} ") and expected in said and "\n" not in said
    assert ("not installed" in said) == isinstance(error, ModuleNotFoundError)


def test_an_engine_whose_library_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr(engines, "import_module", fail)
    with pytest.raises(sl.EngineError, match=r"lack of memory.*expected it for the engine 'torch'"):
        sl.load(engine="torch")


def test_every_library_that_fails_is_told_of_in_one_way() -> None:
    """Whoever catches an ImportError asks libraries.import_error what to say of it."""
    asked = set()
    for package in ("weights", "lite", "export"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.ExceptHandler) or node.type is None:
                    continue
                caught = ast.unparse(node.type)
                if caught not in ("ImportError", "(ImportError, OSError)", "ModuleNotFoundError"):
                    continue
                said = ast.unparse(ast.Module(node.body, []))
                assert "import_error(" in said or file.name in OTHERWISE, f"{file}: {caught}"
                asked.add(file.name)
    assert len(asked) > 10 and asked > OTHERWISE
