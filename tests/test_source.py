"""What a path stands for: every way to write it, in every command; and each file is opened once."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import seechat_lite as sl
from reference import data
from seechat_export.export import export_bundle
from seechat_lite import benchmark as bench
from seechat_lite.cli.main import main
from seechat_lite.server import listen as server
from seechat_lite.source import open_source
from seechat_weights.bundle import manifest as bundles
from seechat_weights.files import checkpoint as checkpoints
from seechat_weights.lm.checkpoint import SAT_FILE, open_lm
from seechat_weights.model_files import Openings, find_model
from seechat_weights.vision import weights
from seechat_weights.vision.blip_names import BlipSettings
from seechat_weights.vision.weights import load_seechat
from test_blip import visualglm

TINY = data("chatglm_tiny")
VISION = TINY.parent / "vision"
CPU = ("--engine", "torch", "--device", "cpu", "--context", "200")
CLIP = {"clip": VISION / "clip_open_clip", "projector": VISION / "mm_projector_linear.bin"}
SEECHAT = {
    "eva": VISION / "eva_vit_tiny.pth",
    "qformer": VISION / "blip2_tiny_flant5.pth",
    "checkpoint": VISION / "checkpoint_100.pth",
}


def flags(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name}", str(path))]


# --- ways to write a path


def written(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of `folder` as somebody may write it, who works where this leaves the process."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    match way:
        case "inside":
            monkeypatch.chdir(folder)
            return "."
        case "below":
            (folder.parent / "work").mkdir(exist_ok=True)
            monkeypatch.chdir(folder.parent / "work")
            return f"../{folder.name}"
        case "link":
            # not beside it, where SAT would see one more iteration
            link = folder.parent.parent / f"link to {folder.parent.name}"
            if not link.is_symlink():
                link.symlink_to(folder, target_is_directory=True)
            return f"../{link.name}"
    return {
        "absolute": str(folder),
        "relative": folder.name,
        "slash": f"{folder.name}/",
        "dot": f"./{folder.name}/.",
        "home": f"~/{folder.name}",
    }[way]


WAYS = ("absolute", "relative", "slash", "dot", "home", "inside", "below", "link")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every form of a model, each alone in a folder's folder."""

    def place(name: str) -> Path:
        return tmp_path_factory.mktemp(name) / "chatglm-6b"

    bundle, folder = place("bundle"), place("folder")
    export_bundle(lm=TINY, out=bundle, precision="fp32")
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "ice_text.model"):
        os.link(TINY / name, folder / name)
    return {
        "bundle": bundle,
        "huggingface": folder,
        "sat": visualglm(place("sat"), "sat"),
    }


@pytest.fixture(scope="module")
def answers(models: dict[str, Path]) -> dict[str, str]:
    def ask(folder: Path) -> str:
        with sl.load(folder, engine="torch", device="cpu", context=200) as model:
            return model.chat().ask("你好", max_new_tokens=4)

    return {form: ask(folder) for form, folder in models.items()}


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[sl.Model]:
    """What `seechat serve` loads, at once and again after it was unloaded."""
    loaded = []

    def serve(load: Callable[[], sl.Model], *_: Any, **__: Any) -> int:
        loaded.extend((load(), load()))
        return 0

    monkeypatch.setattr(server, "serve", serve)
    assert main(["serve", *arguments]) == 0
    return loaded


@pytest.mark.parametrize("form", ["bundle", "huggingface", "sat"])
@pytest.mark.parametrize("way", WAYS)
def test_every_command_takes_every_way_to_write_a_path(
    form: str,
    way: str,
    models: dict[str, Path],
    answers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, expected = written(way, models[form], monkeypatch), answers[form]
    cpu, short = ["--model", path, *CPU], ["--max-new-tokens", "4"]

    assert main(["ask", "你好", *cpu, *short, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == expected
    monkeypatch.setattr("sys.stdin", stdin("你好\n"))
    assert main(["chat", *cpu, *short]) == 0
    assert capsys.readouterr().out == expected + "\n"
    question = json.dumps({"id": 1, "question": "你好", "max_new_tokens": 4})
    monkeypatch.setattr("sys.stdin", stdin(question + "\n"))
    assert main(["pipe", *cpu]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answer"] == expected
    for model in served(monkeypatch, *cpu):
        with model:
            assert model.manifest.name == "chatglm-6b"
            assert model.chat().ask("你好", max_new_tokens=4) == expected
    assert main(["info", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usable"] is True
    for given in (path, Path(path)):
        with sl.load(given, engine="torch", device="cpu", context=200) as model:
            assert model.chat().ask("你好", max_new_tokens=4) == expected


@pytest.mark.parametrize("way", WAYS)
def test_an_export_takes_every_way_to_write_a_path(
    way: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the weights and, where they are not beside them, of the tokenizer."""
    lm = written(way, models["huggingface"], monkeypatch)
    tokenizer = f"{lm}/ice_text.model"
    out = tmp_path / "b"
    assert main(["export", "--lm", lm, "--tokenizer", tokenizer, "--out", str(out)]) == 0
    assert open_source(out).manifest.lm == open_lm(lm).config


def test_what_is_written_at_home_stays_there(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = written("home", models["huggingface"], monkeypatch)
    assert main(["export", "--lm", lm, "--out", "~/bundle", "--precision", "fp32"]) == 0
    assert open_source(models["huggingface"].parent / "bundle").manifest.name == "bundle"
    assert not Path("~").exists()


def test_a_folder_that_is_called_like_a_home(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~").symlink_to(models["huggingface"].parent, target_is_directory=True)
    assert open_source("~/chatglm-6b").lm
    with pytest.raises(sl.CheckpointError, match="~nobody-at-all/x: no such folder"):
        open_source("~nobody-at-all/x")


@pytest.mark.parametrize("way", ["inside", "below", "link", "home"])
def test_the_settings_and_tokenizer_above_a_sat_file(
    way: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file lies in a folder named after its iteration, what belongs to it may lie above."""
    iteration = models["sat"] / "1"
    folder = written(way, iteration, monkeypatch)
    for path in (folder, f"{folder}/{SAT_FILE}"):
        found = find_model(path)
        assert found.config and found.config.resolve() == models["sat"] / "model_config.json"
        assert found.tokenizer("ice_text.model").resolve() == models["sat"] / "ice_text.model"
        assert open_source(path).tokenizer.is_file()


# --- openings


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened for its tensors, and each manifest read."""
    counted: Counter[str] = Counter()
    open_file, parse = checkpoints._open_file, bundles.Manifest.from_json

    def counting(path: Path) -> Any:
        counted[os.path.realpath(path)] += 1
        return open_file(path)

    def parsing(text: str, where: str) -> bundles.Manifest:
        counted[os.path.realpath(where)] += 1
        return parse(text, where)

    monkeypatch.setattr(checkpoints, "_open_file", counting)
    monkeypatch.setattr(bundles.Manifest, "from_json", parsing)
    return counted


PUBLISHED = {
    "alone": ("huggingface", {}, 1),
    "sat": ("sat", {}, 1),
    "clip": ("huggingface", CLIP, 3),
    "seechat": ("huggingface", SEECHAT, 4),
}


def stdin(text: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")


COMMANDS = ("ask", "chat", "pipe", "serve", "info")


@pytest.mark.parametrize(
    ("what", "command"),
    [
        *product([*PUBLISHED, "bundle"], COMMANDS),
        ("bundle", "bench"),
        ("clip", "bench"),
        ("sat", "export"),
        ("clip", "export"),
    ],
)
def test_each_file_is_opened_once(
    command: str,
    what: str,
    models: dict[str, Path],
    vision_bundle: Path,
    opened: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    form, files, count = PUBLISHED.get(what, ("", {}, 1))
    path = str(models[form] if form else vision_bundle)
    tiny = BlipSettings(blocks=3, heads=4, query_heads=4)
    monkeypatch.setattr(weights, "load_seechat", partial(load_seechat, settings=tiny))
    monkeypatch.setattr("sys.stdin", stdin(""))
    monkeypatch.setattr(server, "serve", lambda load, *_, **__: load().close() or 0)
    monkeypatch.setattr(bench, "PROMPTS", (8,))
    monkeypatch.setattr(bench, "TOGETHER", (2,))
    if command == "export":
        out = tmp_path / "b"
        assert main(["export", "--lm", path, *flags(files), "--out", str(out)]) == 0
        for file in [f for f in opened if Path(f).is_relative_to(out.parent)]:
            del opened[file]  # what it wrote, and reads again to be sure
    elif command == "info":
        assert main(["info", path]) == 0
        count = 1
    else:
        words = ["你好", "--max-new-tokens", "1"] if command == "ask" else []
        repeat = ["--repeat", "1"] if command == "bench" else []
        assert main([command, *words, *repeat, "--model", path, *CPU, *flags(files)]) == 0
        count += not form  # the manifest, and the file of the vision network
    assert set(opened.values()) == {1}, opened
    assert len(opened) == count


def test_openings_are_shared_by_path_and_errors_are_not_kept(tmp_path: Path) -> None:
    openings, file = Openings(), TINY / "model.safetensors"
    (tmp_path / "link.safetensors").symlink_to(file)
    assert openings(file) is openings(tmp_path / "link.safetensors")
    late = tmp_path / "late.safetensors"
    with pytest.raises(sl.CheckpointError, match="no such file"):
        openings(late)
    late.write_bytes(file.read_bytes())
    assert openings(late).shapes == openings(file).shapes
