"""Somebody changes the files of a loaded model: an error that names the file, never a dead process.

A mapped file that is cut short would end this process with SIGBUS.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import seechat_lite as sl
from seechat_lite.engines import ENGINES
from seechat_weights.builtin import BUILTIN

ROOT = Path(__file__).parent.parent
PANDA = ROOT / "docs/images/panda.png"

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="a mapped file cannot be cut short or replaced there"
)


def cut(file: Path) -> None:
    os.truncate(file, 0)


def overwrite(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.write(os.urandom(size))


def copied(bundle: Path, to: Path) -> Path:
    shutil.copytree(bundle, to)
    return to


@pytest.mark.parametrize("change", [cut, overwrite])
@pytest.mark.parametrize("name", ["decoder.onnx.data", "embeddings.bin", "vision.onnx.data"])
@pytest.mark.parametrize("which", ["built-in", "onnx", "torch"])
def test_a_changed_file(
    which: str, name: str, change: Callable[[Path], None], vision_bundle: Path, tmp_path: Path
) -> None:
    folder = copied(BUILTIN if which == "built-in" else vision_bundle, tmp_path / "bundle")
    engine = "auto" if which == "built-in" else which
    if not (folder / name).exists():  # a small graph holds its own weights
        name = name.removesuffix(".data")
    with sl.load(folder, engine=engine) as model:
        stream = model.chat().stream("hi " * 20, PANDA, max_new_tokens=100, temperature=1.0)
        next(stream)
        change(folder / name)
        expected = "shorter than" if change is cut else "not the same as"
        for ask in (
            lambda: list(stream),
            lambda: model.chat().ask("hi"),
            lambda: model.chat().ask("hi", ROOT / "docs/images/owl.png"),
        ):
            with pytest.raises(sl.BundleError, match=f"{name}: {expected} when it was loaded"):
                ask()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_bundle_replaced_by_renaming(
    engine: str, keep: bool, vision_bundle: Path, tmp_path: Path
) -> None:
    """The loaded model goes on with its files; what it would have to open again is refused."""
    folder = copied(vision_bundle, tmp_path / "bundle")
    new = copied(vision_bundle, tmp_path / "new")
    with sl.load(folder, engine=engine, keep_vision=keep, image_cache=0) as model:
        before = model.chat().ask("hi", PANDA, max_new_tokens=4)
        folder.rename(tmp_path / "old")
        new.rename(folder)
        assert model.chat().ask("hi", max_new_tokens=4)
        if keep:
            assert model.chat().ask("hi", PANDA, max_new_tokens=4) == before
        else:
            with pytest.raises(sl.BundleError, match="not the file that was loaded"):
                model.chat().ask("hi", PANDA)


def test_what_changes_nothing(vision_bundle: Path, tmp_path: Path) -> None:
    """Being read, renamed or given other permissions."""
    folder = copied(vision_bundle, tmp_path / "bundle")
    with sl.load(folder) as model:
        for file in folder.iterdir():
            file.read_bytes()
            file.chmod(0o600)
            os.utime(file, ns=(0, file.stat().st_mtime_ns))
        assert model.chat().ask("hi", PANDA, max_new_tokens=2)


@pytest.mark.slow
def test_published_weights(tmp_path: Path) -> None:
    folder = copied(ROOT / "tests/data/chatglm_tiny", tmp_path / "weights")
    with sl.load(folder, engine="torch") as model:
        stream = model.chat().stream("hi", max_new_tokens=100)
        next(stream)
        for file in folder.glob("*.safetensors"):
            cut(file)
        with pytest.raises(sl.CheckpointError, match="shorter than when it was loaded"):
            list(stream)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="lists open files by /proc")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_closed_model_holds_no_file(engine: str, vision_bundle: Path, tmp_path: Path) -> None:
    folder = copied(vision_bundle, tmp_path / "bundle")
    model = sl.load(folder, engine=engine)
    model.chat().ask("hi", PANDA, max_new_tokens=2)
    model.close()
    held = [os.path.realpath(f) for f in Path("/proc/self/fd").iterdir()]
    assert not [path for path in held if path.startswith(str(folder))]
