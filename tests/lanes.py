"""Which tests need torch or the export package, told from imports, so that nobody must mark them.

A test needs what its file imports at the top, what it imports itself, and what the functions and
fixtures of its file, of conftest.py and of the tests' own modules import that it names; imports of
our own modules are followed. What only a subprocess imports cannot be seen: such tests are marked
by hand. A file that needs what is not installed, or of which the markers asked for want nothing, is
not even imported.
"""

import ast
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ROOMS = {"seechat_weights": "weights", "seechat_lite": "lite", "seechat_export": "export"}
MARKERS = ("slow", "browser", "clients", "export", "torch")  # as pyproject.toml registers them
# what must be installed for tests with this marker
REQUIRES = {
    "export": ("filelock", "onnx", "onnx_ir", "onnxscript", "torch", "tqdm", "transformers"),
    "torch": ("torch", "transformers"),
}
TELLING = {"torch": "torch", "transformers": "torch", "seechat_export": "export"}
TELLING |= dict.fromkeys(("onnx", "onnx_ir", "onnxscript"), "export")


def is_test_file(path: Path) -> bool:
    return path.name.startswith("test_") and path.suffix == ".py"


def needs_of_item(item: pytest.Item) -> frozenset[str]:
    """The markers among REQUIRES that a collected test gets."""
    needs = set(needs_of_file(item.path))
    needs |= {name for name in REQUIRES if item.get_closest_marker(name)}
    functions = _functions(TESTS / "conftest.py")
    for file in (*_helpers(item.path), item.path):
        functions = functions | _functions(file)
    names = [getattr(item, "originalname", item.name), *getattr(item, "fixturenames", ())]
    seen: set[str] = set()
    while names:
        name = names.pop()
        if name in functions and name not in seen:
            seen.add(name)
            used, imported = functions[name]
            names += used
            needs |= imported
    return _whole(needs)


@cache
def needs_of_file(path: Path) -> frozenset[str]:
    """The markers of all tests of a file: what importing it imports."""
    return _needs(_imported(_parsed(path).body))


def may_be_wanted(needs: Iterable[str], expression: str) -> bool:
    """Whether the option -m can want a test that has these markers and perhaps others."""
    if not expression:
        return True
    others = [name for name in MARKERS if name not in set(needs)]
    for chosen in itertools.product((False, True), repeat=len(others)):
        values = dict.fromkeys(needs, True) | dict(zip(others, chosen, strict=True))
        try:
            if eval(expression, {"__builtins__": {}}, values):  # pytest's words are Python's
                return True
        except Exception:  # another marker, or one with arguments: pytest decides
            return True
    return False


def lacks(needs: Iterable[str]) -> list[str]:
    """Those markers of which something required is not installed."""
    return [n for n in sorted(needs) if not all(_installed(name) for name in REQUIRES[n])]


@cache
def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a test took it away
        return False


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def _helpers(path: Path) -> tuple[Path, ...]:
    """The modules of the tests that a file imports anywhere."""
    files = map(_ours, _imported(ast.walk(_parsed(path))))
    return tuple(dict.fromkeys(f for f in files if f and f.parent == TESTS))


@cache
def _functions(path: Path) -> dict[str, tuple[list[str], frozenset[str]]]:
    """Of each function of a file, methods included: the names it uses, the needs it imports."""
    found = {}
    tree = _parsed(path)
    aliases = (a for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names)
    modules = {a.asname or a.name for a in aliases if _ours(a.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = list(ast.walk(node))
            names = [n.id for n in inner if isinstance(n, ast.Name)]
            names += [  # of a module: helper.function
                n.attr
                for n in inner
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                if n.value.id in modules
            ]
            found[node.name] = names, _needs(_imported(inner))
    return found


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Full names of the modules that import statements import, and of what they take of them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _needs(names: Iterable[str]) -> frozenset[str]:
    """The needs of importing these modules, through our own ones."""
    needs: set[str] = set()
    left, seen = list(names), set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        top = name.partition(".")[0]
        if name.startswith("safetensors.torch"):
            top = "torch"
        if top in TELLING:
            needs.add(TELLING[top])
        if file := _ours(name):
            left += _imported(_parsed(file).body)
        if "." in name:
            left.append(name.rpartition(".")[0])
    return _whole(needs)


def _whole(needs: set[str]) -> frozenset[str]:
    """The export needs torch."""
    return frozenset(needs | ({"torch"} if "export" in needs else set()))


def _ours(name: str) -> Path | None:
    """The file of a module of ours, of a helper of the tests or of a benchmark."""
    top = name.partition(".")[0]
    folders = [ROOT / ROOMS[top]] if top in ROOMS else [TESTS, ROOT / "bench"]
    bases = [folder / name.replace(".", "/") for folder in folders]
    files = (file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py"))
    return next((file for file in files if file.is_file()), None)
