"""Who imports whom: no module round to itself, nothing from a floor above, by reading the code."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import seechat_export
import seechat_lite
import seechat_weights

FLOORS = ("seechat_weights", "seechat_lite", "seechat_export")  # each imports from its left alone
PACKAGES = (seechat_weights, seechat_lite, seechat_export)


def modules() -> Iterator[tuple[str, Path]]:
    """Names and files of all our modules."""
    for package in PACKAGES:
        folder = Path(package.__file__).parent
        for file in folder.rglob("*.py"):
            parts = (package.__name__, *file.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts).removesuffix(".__init__"), file


MODULES = dict(modules())


def imports(name: str) -> Iterator[str]:
    """The modules of ours that a module imports, in its body or in a function."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    todo: list[ast.AST] = [ast.parse(file.read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse  # types alone: nothing is imported
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            place = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                whole = f"{place}.{alias.name}"
                if found := next((m for m in (whole, place) if m in MODULES), None):
                    yield found
        todo += ast.iter_child_nodes(node)


def test_no_module_imports_itself_through_others() -> None:
    assert len(MODULES) > 80
    graph = {name: set(imports(name)) - {name} for name in MODULES}
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" <- ".join(e.args[1]))


def test_nothing_imports_from_a_floor_above() -> None:
    floor = {name: FLOORS.index(name.partition(".")[0]) for name in MODULES}
    upward = [
        (name, other) for name in MODULES for other in imports(name) if floor[other] > floor[name]
    ]
    assert not upward


def test_what_names_modules_in_strings_names_modules() -> None:
    """Lazy doors keep the order too: what they open is there."""
    assert {
        "seechat_lite.engines.torch.kernels.linear",
        "seechat_lite.engines.torch.kernels.attention",
    } <= MODULES.keys()
    for module in seechat_lite._LATER.values():
        assert module in MODULES
