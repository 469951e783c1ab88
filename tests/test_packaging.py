"""What is shipped and what the README promises: import rule, quick start, wheel."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import seechat_lite

ROOT = Path(__file__).parent.parent
ROOMS = ["seechat_weights", "seechat_lite", "seechat_export"]  # each imports only from its left
FOLDERS = {"seechat_weights": "weights", "seechat_lite": "lite", "seechat_export": "export"}
# modules that may import torch when they are imported: nothing of the runtime imports these
TORCH_ROOMS = ("lite/seechat_lite/nn", "lite/seechat_lite/engines/torch", "export/")

RUNTIME_ONLY = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "tqdm", "seechat_export"):
    sys.modules[name] = None  # importing it raises ImportError
import seechat_lite as sl
from seechat_lite.cli.main import main
with sl.load() as model:
    assert model.chat().ask("你好")
code = main(["ask", sys.argv[1], "这是什么？"])
assert "torch" not in {m.partition(".")[0] for m, v in sys.modules.items() if v is not None}
raise SystemExit(code)
"""


def quick_start(readme: str) -> list[str]:
    return re.findall(r"^python3 -m venv .*$", (ROOT / readme).read_text("utf-8"), re.MULTILINE)


@pytest.mark.filterwarnings("ignore:EyeFiles is now")
def test_the_public_api_is_what_all_lists() -> None:
    """Names are imported when first used; each is there, documented, and no other is defined."""
    assert sorted(seechat_lite.__all__) == seechat_lite.__all__
    for name in seechat_lite.__all__:
        # a union of types has none: docs/embedding.md describes it
        assert getattr(seechat_lite, name).__doc__ or name == "ImageSource", name
    defined = {n for n, v in vars(seechat_lite).items() if v.__class__ is type and n[0] != "_"}
    assert defined <= {*seechat_lite.__all__, "Any"}


def test_the_runtime_answers_without_torch_and_export() -> None:
    picture = next(iter(sorted((ROOT / "docs/images").glob("*.png"))))
    run = subprocess.run(
        [sys.executable, "-c", RUNTIME_ONLY, picture], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def module_files() -> list[Path]:
    return [p for room, top in FOLDERS.items() for p in (ROOT / top / room).rglob("*.py")]


def imported(file: Path) -> dict[str, bool]:
    """Top-level packages a file imports: whether it does so when it is itself imported."""
    tree = ast.parse(file.read_text("utf-8"))
    at_import: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            at_import[top] = at_import.get(top, False) or node in tree.body
    return at_import


@pytest.mark.parametrize("file", module_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_from_their_left(file: Path) -> None:
    relative = file.relative_to(ROOT).as_posix()
    room = next(r for r in ROOMS if f"/{r}/" in f"/{relative}")
    packages = imported(file)
    right = ROOMS[ROOMS.index(room) + 1 :]
    assert not packages.keys() & set(right)
    if not relative.startswith(TORCH_ROOMS):
        eager = {name for name, at_import in packages.items() if at_import}
        assert not eager & {"torch", "transformers", "onnx", "onnx_ir", "onnxscript"}


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    reasons = (ROOT / "docs/dependencies.md").read_text("utf-8")
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(r for extra in extras for r in extra)]
    for requirement in listed:
        name = re.split(r"[\[<>=~! ;]", requirement)[0]
        if name != "seechat-lite":
            assert f"`{name}`" in reasons, f"docs/dependencies.md does not mention {name}"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_quick_start_is_what_it_says(readme: str) -> None:
    """Two commands with all their set-up; the first gives the answer printed below it."""
    ask, test = quick_start(readme)
    assert (ask, test) == tuple(quick_start("README.md"))
    assert test.endswith("-m pytest -q")
    arguments = re.search(r'seechat (ask) (\S+) "([^"]+)"', ask)
    assert arguments
    run = subprocess.run(
        [sys.executable, "-m", "seechat_lite", *arguments.groups()],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    text = (ROOT / readme).read_text("utf-8")
    assert f"\n{run.stdout.strip()}\n" in text, f"{readme} shows another answer: {run.stdout}"


@pytest.mark.slow
def test_the_pictures_of_the_readme_are_answered_as_it_says() -> None:
    """The table of pictures in docs/images/README.md: file, question, answer."""
    text = (ROOT / "docs/images/README.md").read_text("utf-8")
    row = r"^\| \[([^]]+\.(?:png|jpg))\]\S* \| ([^|]+?) \| ([^|]+?) \|"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 10
    with seechat_lite.load() as model:
        for file, question, answer in rows:
            assert model.chat().ask(question, ROOT / "docs/images" / file) == answer, file


def test_the_wheel_is_small_and_whole(tmp_path: Path) -> None:
    page = ROOT / "lite/seechat_lite/server/page"
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 15e6
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "seechat_weights/builtin/bundle/seechat.json",
        "seechat_lite/py.typed",
        *(
            f"seechat_lite/server/page/{p.relative_to(page).as_posix()}"
            for p in page.rglob("*.*")
            if p.suffix != ".pyc"
        ),
    ):
        assert needed in names
    assert any(n.endswith("licenses/NOTICE") for n in names)
    assert not [n for n in names if n.startswith(("tests", "recipes", "docs"))]


@pytest.mark.slow
def test_the_tree_is_formatted_and_typed() -> None:
    """The same checks an editor runs; pyright looks after the three packages."""
    offline = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # nor looks for a newer one
    for command in (
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["pyright", "--project", str(ROOT), "--pythonpath", sys.executable],
    ):
        run = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, env=offline
        )
        assert run.returncode == 0, run.stdout + run.stderr
