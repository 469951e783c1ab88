"""OUT.partial: only what an export wrote is continued or removed."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import data
from seechat_export.export import export_bundle
from seechat_export.workplace import BUNDLE, FORMAT, JOURNAL, LOCK, NEW_JOURNAL, Workplace
from seechat_weights.errors import BundleError

NAMES = ("decoder.onnx", "decoder.onnx.data")


def tree(folder: Path) -> dict[str, object]:
    """Everything in a folder, by its path within: links and bytes too."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = path.readlink()
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def begun(out: Path) -> Workplace:
    """As a run that was cut short leaves it."""
    place = Workplace(out, NAMES)
    with place.held():
        place.record(done=0)
        place.clear()
        for name in NAMES:
            (place.folder / name).write_text("half")
    return place


def refused(out: Path) -> str:
    before = tree(out.parent)
    with pytest.raises(BundleError) as e, Workplace(out, NAMES).held():
        raise AssertionError("it was let in")
    assert tree(out.parent) == before
    return str(e.value)


def test_what_an_export_wrote_is_continued_and_removed(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    place = Workplace(tmp_path / "x", NAMES)
    with place.held():
        place.clear(NAMES[0])
        assert tree(place.folder) == {NAMES[0]: b"half"}
        place.discard()
    assert tree(tmp_path) == {}


def test_a_strangers_journal(tmp_path: Path) -> None:
    """The journal of some other program, and what it keeps beside it."""
    folder = tmp_path / "x.partial"
    (folder / BUNDLE).mkdir(parents=True)
    (folder / JOURNAL).write_text('{"entries": ["my diary"]}')
    for file in (folder / "thesis.txt", folder / BUNDLE / "thesis2.txt"):
        file.write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(BundleError, match="not made by an export of x"):
        export_bundle(lm=data("chatglm_tiny"), out=tmp_path / "x", precision="fp32")
    assert tree(tmp_path) == before


JOURNALS = {
    "another name": {"format": FORMAT, "version": 1, "out": "y", "files": []},
    "another version": {"format": FORMAT, "version": 2, "out": "x", "files": []},
    "another format": {"format": "diary", "version": 1, "out": "x", "files": []},
    "no files": {"format": FORMAT, "version": 1, "out": "x"},
    "a list": [FORMAT],
    "a number": 1,
}


@pytest.mark.parametrize("journal", JOURNALS.values(), ids=JOURNALS)
def test_journals_that_are_not_ours(tmp_path: Path, journal: object) -> None:
    place = begun(tmp_path / "x")
    (place.path / JOURNAL).write_text(json.dumps(journal))
    refused(tmp_path / "x")


@given(st.text("abcdefgh.onx/", min_size=1, max_size=12), st.sampled_from(["", BUNDLE]))
def test_any_other_file_beside_ours(tmp_path_factory: pytest.TempPathFactory, name: str, at: str):
    name = name.strip("/.").replace("/", "_") or "a"
    out = tmp_path_factory.mktemp("out") / "x"
    place = begun(out)
    file = place.path / at / name
    if name in (*NAMES, BUNDLE, JOURNAL, NEW_JOURNAL, LOCK):
        return
    file.write_text("mine")
    assert name in refused(out)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("link", ["symbolic", "hard", "folder", "place", "bundle"])
def test_links_lead_to_others(tmp_path: Path, link: str) -> None:
    """A link in the place of our file would have us write into somebody else's."""
    place, theirs = begun(tmp_path / "x"), tmp_path / "theirs"
    file = place.folder / NAMES[1]
    theirs.write_text("mine")
    if link in ("place", "bundle"):
        folder = place.path if link == "place" else place.folder
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        file.unlink()
        if link == "symbolic":
            file.symlink_to(theirs)
        elif link == "hard":
            file.hardlink_to(theirs)
        else:
            file.mkdir()
    refused(tmp_path / "x")


@pytest.mark.parametrize(
    "new", [b"", b'{"format": "seechat-exp', json.dumps({"format": FORMAT, "done": 1}).encode()]
)
def test_stopped_while_the_first_note_was_written(tmp_path: Path, new: bytes) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / NEW_JOURNAL).write_bytes(new)
    with Workplace(tmp_path / "x", NAMES).held() as _:
        pass


@pytest.mark.parametrize("name", [NEW_JOURNAL, LOCK, JOURNAL])
def test_a_strangers_file_under_a_name_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / name).write_text("mine")
    refused(tmp_path / "x")


def test_a_strangers_file_where_the_place_would_be(tmp_path: Path) -> None:
    (tmp_path / "x.partial").write_text("mine")
    refused(tmp_path / "x")
    (tmp_path / "y.partial.lock").write_text("mine")  # which nothing is written to
    place = begun(tmp_path / "y")
    with place.held():
        place.discard()
    assert (tmp_path / "y.partial.lock").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_broken_link_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nothing")
    with pytest.raises(BundleError, match="exists already"):
        export_bundle(lm=data("chatglm_tiny"), out=tmp_path / "x")
    assert (tmp_path / "x").is_symlink()
