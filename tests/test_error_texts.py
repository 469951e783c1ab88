"""What errors say: three parts, and below the command line nothing that only it has."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import seechat_weights.errors
from seechat_weights.errors import SeechatError

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "weights": ROOT / "weights/seechat_weights",
    "lite": ROOT / "lite/seechat_lite",
    "export": ROOT / "export/seechat_export",
}
COMMAND_LINE = ("lite/seechat_lite/cli/", "export/seechat_export/cli.py")
TYPED = re.compile(
    r"(?<![\w-])--[a-z]|seechat (ask|caption|chat|eval|export|info|bench|pipe|serve)\b"
)


def sources() -> list[Path]:
    return sorted(file for folder in PACKAGES.values() for file in folder.rglob("*.py"))


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def docstrings(tree: ast.Module) -> set[int]:
    """Of texts that stand alone."""
    expressions = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {id(node.value) for node in expressions}


def typed_words(tree: ast.Module) -> list[str]:
    """The texts of a module that name an option or a command line."""
    aside = docstrings(tree)
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in aside
        and TYPED.search(node.value)
    ]


@pytest.mark.parametrize("file", sources(), ids=place)
def test_only_the_command_line_knows_its_options(file: Path) -> None:
    if not place(file).startswith(COMMAND_LINE):
        assert not typed_words(parsed(file))


def test_command_lines_would_be_seen() -> None:
    """The test above sees what it is for, and the command line itself has such texts."""
    said = 'raise E(f"{x}: give it to --clip")\nraise E("see `seechat info`")\n"""--doc"""'
    assert len(typed_words(ast.parse(said))) == 2
    assert typed_words(parsed(PACKAGES["lite"] / "cli/hints.py"))


# --- the three parts

PARTS = re.compile(
    r"expected|; |, the \w+ (says|has|holds|expects)|newer than"
)  # between what was read and what to do
CARRIED = re.compile(r"(^|: )\{(e|said|decode\.undecodable\(e\))\}")  # another error's words
EMPTY = ("change it", "choose more", "choose one", "choose another", "fix it", "check")
OTHER_SHAPES = {
    "MessagesError": "the field first, then its words",
    "ApiError": "an answer of the server, in the shape of OpenAI's",
    "_RefusedError": "a part of a message, which open_graph completes",
    "Cancelled": "an event, which nobody is told",
    "OutputGoneError": "nobody is left to tell",
}


def error_names() -> set[str]:
    """SeechatError and all that derive from it, by name, wherever they are defined."""
    known = {
        name
        for name, value in vars(seechat_weights.errors).items()
        if isinstance(value, type) and issubclass(value, SeechatError)
    }
    classes = [n for f in sources() for n in ast.walk(parsed(f)) if isinstance(n, ast.ClassDef)]
    while (
        more := {c.name for c in classes if any(ast.unparse(b) in known for b in c.bases)} - known
    ):
        known |= more
    return known - OTHER_SHAPES.keys()


def words(node: ast.expr) -> str:
    """A text as it is written, what is filled in as {expression}."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(words(value) for value in values)
        case ast.FormattedValue(value=value):
            return "{" + ast.unparse(value) + "}"
        case ast.BinOp(left=left, right=right):
            return words(left) + words(right)
    return "{" + ast.unparse(node) + "}"


def raised(file: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of every error that a module makes of its own words."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in names and isinstance(
                node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp
            ):
                yield node.lineno, words(node.args[0])


def is_complete(text: str) -> bool:
    """Whether a message says what was expected and what to do, as far as a program can tell."""
    if CARRIED.search(text):
        return True
    said, _, advice = text.rpartition(": ")
    return bool(PARTS.search(said)) and len(advice) > 2 and advice.strip(" .") not in EMPTY


def test_every_message_has_three_parts() -> None:
    names = error_names()
    assert {"BundleError", "OptionError", "SeveralFilesError", "LineError"} <= names
    lacking = [
        f"{place(file)}:{line}: {text}"
        for file in sources()
        for line, text in raised(file, names)
        if not is_complete(text)
    ]
    assert not lacking, "\n".join(lacking)
