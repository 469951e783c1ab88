"""Bundles are hashed once, and again when anything about their files is different."""

import os
import shutil
from pathlib import Path

import pytest

import seechat_lite as sl
from seechat_lite import cache_folder
from seechat_weights.bundle.manifest import read_manifest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The folders whose files were hashed, every bundle counting as large."""
    calls: list[Path] = []
    original = cache_folder.verify_hashes

    def counted(folder: Path, *args: object) -> None:
        calls.append(folder)
        original(folder, *args)

    monkeypatch.setattr(cache_folder, "verify_hashes", counted)
    monkeypatch.setattr(cache_folder, "SMALL", 0)
    monkeypatch.setenv("SEECHAT_CACHE", str(tmp_path / "cache"))
    return calls


def test_once(text_bundle: Path, hashed: list[Path]) -> None:
    for _ in range(3):
        sl.load(text_bundle, context=64).close()
    assert hashed == [text_bundle]


@pytest.mark.parametrize("option", ["device", "vision_device"])
def test_not_for_a_device_that_is_not_there(
    text_bundle: Path, hashed: list[Path], option: str
) -> None:
    plans = []
    with pytest.raises(sl.EngineError, match="'abacus' is not in this ONNX Runtime"):
        sl.load(text_bundle, announce=plans.append, **{option: "abacus"})
    assert hashed == plans == []


def test_again_when_a_file_changes(tmp_path: Path, text_bundle: Path, hashed: list[Path]) -> None:
    folder = tmp_path / "b"
    shutil.copytree(text_bundle, folder)
    manifest = read_manifest(folder)
    for _ in range(2):
        cache_folder.verify_once(folder, manifest)
    assert len(hashed) == 1
    weights = folder / f"{manifest.decoder.graph}.data"
    status = weights.stat()
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    # as if it were untouched; a file system's clock may tick slowly
    while weights.stat().st_ctime_ns == status.st_ctime_ns:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(sl.BundleError, match="the file is damaged or was changed"):
        cache_folder.verify_once(folder, manifest)


def test_without_a_place_for_notes(
    text_bundle: Path, hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEECHAT_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        cache_folder.verify_once(text_bundle, read_manifest(text_bundle))
    assert len(hashed) == 2
    # a damaged note counts for nothing
    monkeypatch.setenv("SEECHAT_CACHE", str(tmp_path / "cache"))
    cache_folder.verify_once(text_bundle, read_manifest(text_bundle))
    (note,) = (tmp_path / "cache/verified").iterdir()
    note.write_text("{")
    cache_folder.verify_once(text_bundle, read_manifest(text_bundle))
    assert len(hashed) == 4
