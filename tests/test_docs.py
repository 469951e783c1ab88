"""Examples in the documents run as they stand."""

import argparse
import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reference import data
from seechat_lite.cli import main as cli
from seechat_lite.cli.options import add_load_options
from seechat_lite.memory import MemoryPlan
from seechat_weights.published_models import PLACES, VISUALGLM_HUB
from serving import serving

ROOT = Path(__file__).parent.parent
MEMORY = [f.name for f in dataclasses.fields(MemoryPlan)]


def examples(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("README.md", 0, "这是香蕉。\n能吃。"),
        ("README.zh-CN.md", 0, "这是香蕉。\n能吃。"),
        ("docs/embedding.md", 0, "这是熊猫。\n"),
        ("docs/embedding.md", 1, "\n"),
        ("docs/embedding.md", 2, "loading 100%\n"),
        ("docs/embedding.md", 3, ""),
        ("docs/embedding.md", 4, "这是熊猫。\n"),
    ],
)
def test_examples_run(name: str, number: int, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", examples(name)[number]],
        capture_output=True, text=True, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert expected in done.stdout


@pytest.mark.slow
def test_the_servers_example_runs() -> None:
    (example,) = examples("docs/server.md")
    with serving() as (_, url):
        done = subprocess.run(
            [sys.executable, "-c", example.replace("http://127.0.0.1:8080", url)],
            capture_output=True, text=True, encoding="utf-8", cwd=ROOT,
        )  # fmt: skip
    assert done.stdout == "这是熊猫。", done.stderr


def test_every_option_of_the_server_is_documented() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "seechat_lite", "serve", "--help"], capture_output=True, text=True
    )
    common = argparse.ArgumentParser()  # what every command has
    add_load_options(common)
    common.add_argument("--verbose", "--debug", "--format")
    options = set(re.findall(r"--[a-z-]+", done.stdout)) - set(common._option_string_actions)
    text = (ROOT / "docs/server.md").read_text("utf-8")
    assert options and not [o for o in options if o not in text]


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_one(path: Path) -> None:
    """Command lines are understood as they stand; commands amid the text have these options."""
    text = path.read_text("utf-8")
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if re.match(r"(\S+/)?seechat ", command):
                    cli._parse(shlex.split(command, comments=True)[1:])
    parsers = cli._parser([])._actions[-1].choices
    assert isinstance(parsers, dict)
    for command, options in re.findall(r"`seechat ([a-z]+)([^`]*)`", text):
        known = parsers[command]._option_string_actions
        assert not [o for o in re.findall(r"--[a-z][a-z-]+", options) if o not in known], command


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    """Links to files of this repository, and to headings in documents."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    for target, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith(("https:", "http:", "mailto:")):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name}: {target}"
        assert not fragment or fragment in anchors(file), f"{path.name}: {target}#{fragment}"


def test_where_weights_are_published() -> None:
    """The documents name the places that `seechat info` does."""
    text = (ROOT / "docs/checkpoints.md").read_text("utf-8")
    places = [place for place in PLACES.values() if place.startswith("https:")]
    assert len(places) > 4 and all(place in text for place in [*places, VISUALGLM_HUB])


@pytest.mark.parametrize(
    "path", [None, data("chatglm_tiny"), data("vision/mm_projector_linear.bin")]
)
def test_every_field_of_info_is_documented(
    path: Path | None, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/embedding.md").read_text("utf-8")
    table = text.partition("## What a path is")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    documented = {(name, what) for names, what, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert cli.main(["info", *([str(path)] if path else []), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    wanted = ("all", "bundles") if path is None else ("all",)
    assert {name for name, what in documented if what.startswith(wanted)} == report.keys()
    kinds = next(text for names, _, text in rows if "`kind`" in names)
    assert f"`{report['kind']}`" in kinds
    assert all(f"`{part}`" in table for part in ("total", "free", *MEMORY))


def test_every_kind_is_documented() -> None:
    """The kinds are the second argument of Identity, wherever one is made."""
    text = (ROOT / "docs/embedding.md").read_text("utf-8")
    modules = [
        ROOT / f"weights/seechat_weights/{name}.py" for name in ("identify", "published_models")
    ]
    made = [
        node.args[1]
        for module in modules
        for node in ast.walk(ast.parse(module.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Identity" and node.args
    ]
    kinds = {node.value for node in made if isinstance(node, ast.Constant)}
    assert len(kinds) > 8 and not [kind for kind in kinds if f"`{kind}`" not in text]


def test_no_example_is_forgotten() -> None:
    assert len(examples("docs/embedding.md")) == 5


def test_the_architecture_page_names_the_files_that_there_are() -> None:
    """Every file named there exists; every file on a package's first floor is named."""
    named = set(re.findall(r"\b(\w+\.py)\b", (ROOT / "docs/architecture.md").read_text("utf-8")))
    packages = [ROOT / f"{room}/seechat_{room}" for room in ("weights", "lite", "export")]
    files = {p.name for package in packages for p in package.rglob("*.py")}
    assert named <= files | {p.name for p in (ROOT / "tests").glob("*.py")}
    first = {p.name for package in packages for p in package.glob("*.py")}
    assert first - named <= {"__init__.py"}
