"""Captions of many pictures: where they are found, in what order, and what is not done twice."""

import contextlib
import io
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import seechat_lite as sl
from captioning import (
    TellingModel,
    captions,
    lines,
    never,
    png,
    sha256,
    write_pictures,
    write_tar,
)
from seechat_lite.captions import ahead, archive
from seechat_lite.captions.ahead import ReadAhead
from seechat_lite.captions.batches import CaptionBatches
from seechat_lite.captions.known import Known
from seechat_lite.captions.lines import CaptionFile
from seechat_lite.captions.places import count, pictures
from seechat_lite.captions.run import Item, failed, shard
from seechat_weights.errors import EngineError, ImageError, OptionError
from serving import IMAGES, PATIENCE

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and bytes in names")


def names(*places: Path | str) -> list[str]:
    return [item.image for item in pictures(map(str, places))]


def item(name: str, data: bytes) -> Item:
    return Item(name, lambda: data)


# --- in order, and each content once


def test_captions_come_in_order_with_errors_among_them() -> None:
    model = TellingModel(broken=never)
    given = [item("a", png(1)), item("b", b"no picture"), item("c", png(2)), item("d", png(1))]
    found = captions([*given, failed("e", ImageError("gone"))], model=model)
    assert [caption.image for caption in found] == ["a", "b", "c", "d", "e"]
    assert [caption.error is None for caption in found] == [True, False, True, True, False]
    assert found[0].text == found[3].text == f"? {sha256(png(1))[:8]}"
    assert found[0].sha256 == found[3].sha256 == sha256(png(1))
    assert found[0].seconds > found[3].seconds == 0
    assert model.asked == [sha256(png(1)), sha256(png(2))]


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 9))
@settings(max_examples=30)
def test_each_content_is_captioned_once(contents: list[int], batch: int) -> None:
    """0 is no picture; whatever the order and the batch."""
    model = TellingModel(broken=never)
    given = [item(str(at), png(n) if n else b"none") for at, n in enumerate(contents)]
    found = captions(given, model=model, batch=batch)
    assert [caption.image for caption in found] == [str(at) for at in range(len(contents))]
    for n, caption in zip(contents, found, strict=True):
        assert caption.text == (f"? {sha256(png(n))[:8]}" if n else None)
    assert len(model.asked) == len(set(contents) - {0})


def broken_at(*counts: int, error: Exception | None = None) -> TellingModel:
    failure = error or EngineError("the engine failed")
    return TellingModel(broken=lambda count: failure if count in counts else None)


def test_a_failure_between_good_captions_is_the_pictures_own() -> None:
    found = captions([item(str(n), png(n)) for n in range(1, 6)], model=broken_at(3))
    assert [bool(caption.error) for caption in found] == [False, False, True, False, False]
    found = captions([item(str(n), png(n)) for n in range(1, 4)], model=broken_at(1, 3))
    assert [bool(caption.error) for caption in found] == [True, False, True]


@pytest.mark.parametrize("failures", [(1,), (1, 2), (2, 3), (4, 5)])
def test_no_picture_is_blamed_for_a_broken_engine(failures: tuple[int, ...]) -> None:
    """Two failures in a row, or nothing that ever went well."""
    given = [item(str(n), png(n)) for n in range(1, 1 + max(failures))]
    with pytest.raises(EngineError, match="the engine failed"):
        captions(given, model=broken_at(*failures))


def test_what_is_no_fault_of_a_picture_ends_the_captions() -> None:
    with pytest.raises(sl.ContextError):
        captions([item("a", png(1))], model=broken_at(1, error=sl.ContextError("too long")))

    def places() -> Iterator[Item]:
        yield item("a", png(1))
        raise EngineError("not installed")

    with pytest.raises(EngineError, match="not installed"):
        captions(places())


# --- the Python API


@pytest.fixture(scope="module")
def model() -> Iterator[sl.Model]:
    with sl.load(threads=1) as model:
        yield model


def test_a_model_captions_whatever_pictures_are(model: sl.Model) -> None:
    panda = IMAGES / "panda.png"
    given = [panda, str(panda), panda.read_bytes(), io.BytesIO(b"no"), 3, IMAGES / "banana.png"]
    found = list(model.caption(given, max_new_tokens=8))  # type: ignore[arg-type]
    assert [caption.text for caption in found] == [
        "这是熊猫。", "这是熊猫。", "这是熊猫。", None, None, "这是香蕉。"
    ]  # fmt: skip
    assert [caption.image for caption in found] == given
    assert found[0].finish_reason == "stop" and found[0].seconds > 0
    assert isinstance(found[3].error, ImageError) and isinstance(found[4].error, ImageError)
    assert not list(model.caption([]))


def test_the_question_of_a_caption(model: sl.Model) -> None:
    panda = IMAGES / "panda.png"
    said = model.chat().ask("What is this?", panda)
    assert [c.text for c in model.caption(panda, "What is this?")] == [said]
    assert [c.text for c in model.caption(panda, " \n")] == [c.text for c in model.caption(panda)]
    english = model.chat().ask("Describe this picture.", panda)
    assert [c.text for c in model.caption(panda, language="en")] == [english] != ["这是熊猫。"]


@pytest.mark.parametrize(
    "options", [{"language": "fr"}, {"batch": 0}, {"format": "x"}, {"prompt": 3},
                {"temperature": -1}, {"generation": 3}],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_once(model: sl.Model, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        model.caption([], **options)
    with pytest.raises(OptionError, match="images"):
        model.caption(3)  # type: ignore[arg-type]


def test_captions_may_be_left_early(model: sl.Model) -> None:
    before = threading.active_count()
    found = model.caption([IMAGES / "panda.png"] * 100)
    assert next(found).text
    found.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("seechat-ahead"):
            thread.join(PATIENCE)
    assert threading.active_count() <= before + 1  # one waits for the end of its iteration


# --- batches of rows


def rows_of(*values: Any) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def test_batches_of_rows(monkeypatch: pytest.MonkeyPatch, model: sl.Model) -> None:
    monkeypatch.setattr("seechat_lite.captions.batches.load", lambda path, **options: model)
    panda, banana = ((IMAGES / name).read_bytes() for name in ("panda.png", "banana.png"))
    rows = rows_of(panda, {"bytes": banana, "path": "x"}, None, {"bytes": None, "path": "x"}, b"no")
    found = CaptionBatches()({"image": rows, "id": np.arange(5)})
    assert list(found["caption"]) == ["这是熊猫。", "这是香蕉。", None, None, None]
    assert [bool(error) for error in found["error"]] == [False, False, True, True, True]
    assert found["sha256"][0] == sha256(panda) and found["finish_reason"][1] == "stop"
    assert list(found["id"]) == [0, 1, 2, 3, 4] and "image" not in found
    levels = np.asarray(Image.open(IMAGES / "panda.png").convert("RGB"))[None]  # [1, h, w, 3]
    english = CaptionBatches(column="x", language="en")({"x": levels})
    assert list(english["caption"]) == ["This is a panda."]
    with pytest.raises(OptionError, match="columns x; expected 'image'"):
        CaptionBatches()({"x": levels})


@pytest.mark.slow
def test_the_example_for_ray(tmp_path: Path) -> None:
    """Two actors on this machine; what is complete is not done again."""
    pytest.importorskip("ray")
    from pyarrow import parquet

    data = [(IMAGES / name).read_bytes() for name in ("panda.png", "banana.png")]
    for name, rows in (("a", [*data, b"no"]), ("b", data)):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_table(tmp_path / f"in/{name}.parquet", {"id": list(range(len(rows))), "image": rows})
    example = Path(__file__).parents[1] / "examples/captions_ray.py"
    command = [sys.executable, str(example), str(tmp_path / "in"), str(tmp_path / "out")]
    for _ in range(2):
        subprocess.run([*command, "--actors", "2"], check=True, timeout=3 * PATIENCE)
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
        found = parquet.read_table(tmp_path / "out/a.parquet").sort_by("id").to_pydict()
        assert found["caption"] == ["这是熊猫。", "这是香蕉。", None] and found["error"][2]
        assert parquet.read_table(tmp_path / "out/b.parquet").num_rows == 2
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.slow
def test_an_actor_of_ray_may_die(tmp_path: Path) -> None:
    """Its pictures are captioned by the one that comes after it; each has one row."""
    pytest.importorskip("ray")
    from pyarrow import parquet

    count = 200  # four blocks
    (tmp_path / "in").mkdir()
    columns = {"id": list(range(count)), "image": [png(i) for i in range(count)]}
    write_table(tmp_path / "in/a.parquet", columns)
    example = Path(__file__).parents[1] / "examples/captions_ray.py"
    places = [str(tmp_path / "in"), str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, str(example), *places, "--actors", "2"]) as job:
        actor = actor_at_work(psutil.Process(job.pid))
        actor.kill()
        assert job.wait(3 * PATIENCE) == 0
    found = parquet.read_table(tmp_path / "out/a.parquet").to_pydict()
    assert sorted(found["id"]) == columns["id"] and all(found["caption"])


def actor_at_work(job: psutil.Process) -> psutil.Process:
    """A process that captions for a job of Ray, as soon as there is one."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for process in job.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                # its model is loaded, so it has computed for more than a second
                name = " ".join(process.cmdline())
                if name.startswith("ray::MapWorker") and process.cpu_times().user > 3:
                    return process
        time.sleep(0.1)
    pytest.fail("no actor has come")


# --- reading ahead


def test_no_more_is_drawn_than_is_wanted() -> None:
    drawn: list[int] = []
    most = 4

    def things() -> Iterator[int]:
        for number in range(50):
            drawn.append(number)
            yield number

    reader = ReadAhead(things(), lambda n: n * 2, most=most, size=lambda n: 0)
    for number in range(50):
        assert reader.get(wait=True) == number * 2
        assert len(drawn) <= number + 1 + most + 1
    assert reader.get(wait=True) is None
    assert reader.get(wait=True) is None
    reader.close()


def test_large_things_wait_for_each_other() -> None:
    """However many may be drawn: their bytes are bounded."""
    held: list[int] = []
    go = threading.Event()

    def prepare(number: int) -> int:
        go.wait(PATIENCE)
        return number

    def things() -> Iterator[int]:
        for number in range(20):
            held.append(number)
            yield number

    reader = ReadAhead(things(), prepare, most=100, size=lambda n: ahead.MAX_BYTES // 2)
    go.wait(0.3)
    assert len(held) <= 3
    go.set()
    assert [reader.get(wait=True) for _ in range(21)] == [*range(20), None]
    reader.close()


# --- places


def test_a_folder_is_searched_for_what_is_named_like_a_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in/deep", 2)
    (tmp_path / "in/A.JPG").write_bytes(png(5))
    for other in ("notes.txt", ".hidden.png", "x.json", "captions.jsonl"):
        (tmp_path / "in" / other).write_bytes(b"x")
    (tmp_path / "in/.git").mkdir()
    (tmp_path / "in/.git/x.png").write_bytes(png(1))
    write_tar(tmp_path / "in/b.tar", [("x.png", png(3))])
    found = [
        str(tmp_path / "in" / name)
        for name in ("A.JPG", "b.tar/x.png", "deep/00000.png", "deep/00001.png")
    ]
    assert names(tmp_path / "in") == found
    assert names(tmp_path / "in/.hidden.png") == [str(tmp_path / "in/.hidden.png")]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "a", 3)
    write_pictures(tmp_path / "a/b", 1)
    monkeypatch.chdir(tmp_path)
    plain = [str(Path("a") / f"0000{n}.png") for n in range(3)]
    assert names("a/*.png") == names("a/0*[0-2].*") == plain
    assert names("**/*.png") == [*plain, str(Path("a/b/00000.png"))]
    assert names(f"{tmp_path}/a/b/*") == [str(tmp_path / "a/b/00000.png")]
    (tmp_path / "a/[x].png").write_bytes(png(9))
    assert names("a/[x].png") == ["a/[x].png"]  # a file of that name
    (missing,) = captions(pictures(["no/*.png"]))
    assert "no/*.png: no such file" in str(missing.error)
    for odd in ("***", "a**/x", "[", "*\0", "?" * 5000):
        (found,) = captions(pictures([odd]))
        assert found.error and found.image == odd


@posix
def test_a_folder_that_leads_to_itself_is_entered_once(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "in/up").symlink_to(tmp_path)
    (tmp_path / "in/loop.png").symlink_to(tmp_path / "in/loop.png")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere")
    found = captions(pictures([str(tmp_path / "in")]))
    good = [caption.image for caption in found if not caption.error]
    assert good == [str(tmp_path / f"in/0000{n}.png") for n in range(2)]
    assert [Path(c.image).name for c in found if c.error] == ["gone.png", "loop.png"]
    assert len(names(tmp_path / "in/**/*.png")) == 4


@pytest.mark.slow
@posix
def test_a_folder_may_be_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python calls functions, and than a path may be long."""
    monkeypatch.chdir(tmp_path)
    depth = 1500
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    try:
        found = captions(pictures([str(tmp_path)]))
        assert all(caption.error for caption in found) and len(found) <= 1
    finally:  # pytest could not remove it
        for _ in range(depth):
            os.chdir("..")
            Path("d").rmdir()


@posix
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (found,) = captions(pictures([str(tmp_path)]))
    assert "cannot be read" in str(found.error)


@posix
def test_pipes_and_devices_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.parquet")
    found = captions(
        pictures([str(tmp_path / "pipe.tar"), str(tmp_path / "pipe.png"), "/dev/zero"])
    )
    assert len(found) == 3 and all(caption.error for caption in found)


def test_counting(tmp_path: Path) -> None:
    write_pictures(tmp_path, 7)
    assert count([str(tmp_path), "x"], stopped=lambda: False) == 8
    assert count([str(tmp_path)], stopped=lambda: True) is None
    write_tar(tmp_path / "x.tar", [])
    assert count([str(tmp_path)], stopped=lambda: False) is None


# --- archives


@pytest.mark.parametrize("end, mode", [("tar", "w"), ("tgz", "w:gz"), ("tar.bz2", "w:bz2"),
                                       ("tar.xz", "w:xz"), ("TAR", "w")])  # fmt: skip
def test_pictures_in_archives(tmp_path: Path, end: str, mode: str) -> None:
    data = [png(n) for n in range(300)]
    data[5] += bytes(-len(data[5]) % 512)  # a whole number of blocks
    members = []
    for number, one in enumerate(data):
        members += [(f"{number:04}.png", one), (f"{number:04}.json", b"{}")]
    path = write_tar(
        tmp_path / f"shard.{end}", [*members, ("._0.png", b""), ("d/.x/y.png", b"")], mode
    )
    found = captions(pictures([str(path)]))
    assert [(c.image, c.sha256) for c in found] == [
        (f"{path}/{number:04}.png", sha256(one)) for number, one in enumerate(data)
    ]
    every_third = [i for n, i in enumerate(pictures([str(path)])) if n % 3]  # not taken in time
    assert len(every_third) == 200


def test_what_is_no_picture_in_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE),
                           ("c.png", tarfile.CHRTYPE), ("d.png", tarfile.FIFOTYPE),
                           ("e.png", tarfile.DIRTYPE), ("f", tarfile.SYMTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        good = tarfile.TarInfo("../../up\x1b[31m\n.png")
        good.size = len(png(1))
        tar.addfile(good, io.BytesIO(png(1)))
        odd = tarfile.TarInfo("no\udcff" + "x" * 5000 + ".png")
        odd.size = 3
        tar.addfile(odd, io.BytesIO(b"abc"))
    *links, escaped, long = captions(pictures([str(path)]))
    assert [Path(c.image).name for c in links] == ["a.png", "b.png", "c.png", "d.png"]
    assert all("in an archive" in str(c.error) and "\n" not in str(c.error) for c in links)
    assert escaped.text and escaped.image == f"{path}/../../up\x1b[31m\n.png"
    assert "\x1b" not in str(long.error) and len(long.image) < 2000


def sparse_tar(path: Path, *blocks: bytes | int) -> Path:
    """Blocks as they are; a number leaves out so many bytes."""
    with path.open("wb") as file:
        for block in blocks:
            if isinstance(block, int):
                file.seek(block, os.SEEK_CUR)
            else:
                file.write(block)
        file.truncate()
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_cannot_ask_for_memory(tmp_path: Path, kind: bytes) -> None:
    """A file with holes says that its header has three gigabytes, or has a great many headers."""
    big = 3 << 30
    path = sparse_tar(tmp_path / "a.tar", header("x", big, kind), big, header("a.png", 0))
    record = b"%d a=%s\n" % (100_000, b"x" * (100_000 - 10))
    many = [header("x", len(record), kind), record.ljust(-(-len(record) // 512) * 512, b"\0")] * 200
    more = sparse_tar(tmp_path / "b.tar", *many, header("b.png", 0), bytes(1024))
    tracemalloc.start()
    found = captions(pictures([str(path), str(more)]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[0].image == str(path) and "headers of more than" in str(found[0].error)
    assert found[1].error and peak < 30 << 20


def test_members_cannot_ask_for_memory(tmp_path: Path) -> None:
    big = 5 << 30
    path = sparse_tar(
        tmp_path / "a.tar", header("a.png", big), big, header("b.png", len(png(1))),
        png(1).ljust(512, b"\0"), bytes(1024),
    )  # fmt: skip
    huge, good = captions(pictures([str(path)]))
    assert "5120 MB" in str(huge.error) and good.text


def test_many_members_take_no_memory(tmp_path: Path) -> None:
    def grown(members: int) -> int:
        path = sparse_tar(tmp_path / "a.tar", *[header("x", 0)] * members, bytes(1024))
        tracemalloc.start()
        assert not list(archive.members(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert grown(5000) < grown(500) + 100_000


@pytest.mark.parametrize("cut", [0, 10, 600, 1024, 1500, 2600])
def test_an_archive_that_is_cut_has_a_line(tmp_path: Path, cut: int) -> None:
    members = [(f"{n}.png", png(n)) for n in range(1, 5)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:cut])
    found = captions(pictures([str(path)]))
    good = [caption for caption in found if not caption.error]
    assert [c.sha256 for c in good] == [sha256(data) for _, data in members[: len(good)]]
    at_an_end = cut % 1024 == 0 and cut > 0
    assert at_an_end or (found[-1].image == str(path) and found[-1].error)


@given(st.integers(0, 5000), st.binary(min_size=1, max_size=8))
@settings(max_examples=60)
def test_damage_never_raises_and_never_loses_quietly(at: int, damage: bytes) -> None:
    import tempfile

    members = [(f"{n}.png", png(n)) for n in range(1, 5)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", members)
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        found = captions(pictures([str(path)]))
    errors = [caption for caption in found if caption.error]
    changed = [c for c in found if not c.error and c.sha256 not in {sha256(d) for _, d in members}]
    renamed = {Path(c.image).name for c in found} != {name for name, _ in members}
    assert len(found) >= 4 or errors or changed or renamed


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_that_were_joined(tmp_path: Path, mode: str) -> None:
    """`cat a.tar b.tar > both.tar`: nothing of the second is lost, its damage neither."""
    parts = [
        write_tar(tmp_path / f"{n}.tar", [(f"{n}.png", png(n))], mode).read_bytes()
        for n in range(3)
    ]
    path = tmp_path / "both.tar"
    path.write_bytes(b"".join(parts))
    found = captions(pictures([str(path)]))
    assert [c.sha256 for c in found] == [sha256(png(n)) for n in range(3)]
    path.write_bytes(b"".join(parts) + b"left over" * 100)
    assert captions(pictures([str(path)]))[-1].error


def test_headers_without_end(tmp_path: Path) -> None:
    path = sparse_tar(tmp_path / "a.tar", *[header("x", 0, tarfile.XGLTYPE)] * 5000)
    (found,) = captions(pictures([str(path)]))
    assert "without end" in str(found.error) and "recursion" not in str(found.error)


def test_an_error_names_the_picture(tmp_path: Path) -> None:
    """Also where the picture is bytes out of something else."""
    bad = [b"", b"text", png(1)[:30], bytes(100)]
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", data) for n, data in enumerate(bad)])
    found = captions(pictures([str(path)]))
    assert [str(c.error).partition(":")[0] for c in found] == [c.image for c in found]
    assert len(found) == 4


def test_no_archives_at_all(tmp_path: Path) -> None:
    for number, data in enumerate(
        (b"", b"hello", png(1), b"\x1f\x8b broken", b"BZh9x", b"\xfd7zXZ\0")
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        (found,) = captions(pictures([str(path)]))
        assert found.image == str(path) and "whole tar archive" in str(found.error), data
    (found,) = captions(pictures([str(tmp_path / "missing.tar")]))
    assert "No such file" in str(found.error)


# --- tables


def write_table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_pictures_in_tables(tmp_path: Path) -> None:
    data = [png(n) for n in range(1, 11)]
    plain = write_table(
        tmp_path / "a.parquet", {"id": list(range(10)), "image": data}, row_group_size=3
    )
    datasets = [{"bytes": one, "path": "/etc/passwd"} for one in data]
    struct = write_table(tmp_path / "b.parquet", {"image": datasets, "jpg": data})
    for path in (plain, struct):
        found = captions(pictures([str(path)]))
        assert [(c.image, c.sha256) for c in found] == [
            (f"{path}/{row}", sha256(one)) for row, one in enumerate(data)
        ]
        assert count([str(path)], stopped=lambda: False) == 10


def test_odd_tables(tmp_path: Path) -> None:
    one = png(1)
    two = write_table(tmp_path / "two.parquet", {"left": [one], "right": [png(2)]})
    (found,) = captions(pictures([str(two)]))
    assert "left (binary), right (binary)" in str(found.error)
    assert found.error and found.error.options == {"column": None}
    (found,) = captions(pictures([str(two)], column="right"))
    assert found.sha256 == sha256(png(2))
    (found,) = captions(pictures([str(two)], column="up"))
    assert "named 'up'" in str(found.error)
    none = write_table(tmp_path / "none.parquet", {"image": ["a.png"], "n\x1b[31m": [1]})
    (found,) = captions(pictures([str(none)]))
    assert "image (string)" in str(found.error) and "\x1b" not in str(found.error)
    gaps = write_table(tmp_path / "gaps.parquet", {"image": [one, None, b"", b"no"]})
    good, *bad = captions(pictures([str(gaps)]))
    assert good.text and len(bad) == 3 and all(caption.error for caption in bad)
    inner = write_table(tmp_path / "inner.parquet", {"image": [{"bytes": None, "path": "a.png"}]})
    (found,) = captions(pictures([str(inner)]))
    assert "no bytes in this row" in str(found.error)
    whole = two.read_bytes()
    for number, broken in enumerate((b"", b"PAR1", whole[:-9], whole[50:], b"PAR1" * 99)):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(broken)
        (found,) = captions(pictures([str(path)], column="right"))
        assert found.error and "\n" not in str(found.error)
    empty = write_table(tmp_path / "empty.parquet", {"image": [b""]})
    assert len(captions(pictures([str(empty)]))) == 1


def test_every_kind_of_bytes_in_tables(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    data = [png(n) for n in (1, 2, 2, 1)]
    sizes = pa.array([one.ljust(300, b"\0") for one in data], pa.binary(300))
    for number, column in enumerate((
        pa.array(data, pa.large_binary()), pa.array(data, pa.binary_view()), sizes,
        pa.array(data).dictionary_encode(),
        pa.array([{"bytes": d} for d in data], pa.struct([("bytes", pa.binary_view())])),
    )):  # fmt: skip
        path = write_table(tmp_path / f"{number}.parquet", {"image": column})
        assert all(c.text for c in captions(pictures([str(path)]))), column.type


@pytest.mark.parametrize("kind", ["plain", "struct", "named"])
def test_a_table_cannot_ask_for_memory(tmp_path: Path, kind: str) -> None:
    """Some kilobytes that become gigabytes."""
    pa = pytest.importorskip("pyarrow")
    data = [bytes([n]) * (90 << 20) for n in range(3)]
    given: Any = [{"bytes": one} for one in data] if kind == "struct" else data
    name = "a.b" if kind == "named" else "image"
    path = write_table(tmp_path / "a.parquet", {name: pa.array(given)}, compression="zstd")
    del given, data
    assert path.stat().st_size < 1 << 20
    (found,) = captions(pictures([str(path)]))
    assert "grow by less than" in str(found.error)


def test_without_pyarrow_nothing_is_written_about_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is installed, the same run goes on."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EngineError, match=r"seechat-lite\[data\]"):
        captions(pictures([str(tmp_path / "a.parquet")]))


# --- shards


@given(st.integers(1, 7), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_shards_are_a_partition_by_content(count: int, rng: random.Random) -> None:
    data = [png(n) if n else b"broken" for n in rng.choices(range(20), k=30)]
    given = [item(str(at), one) for at, one in enumerate(data)]
    given.append(failed("missing", ImageError("gone")))
    parts = [captions(given, keep=shard(number, count)) for number in range(1, count + 1)]
    images = [caption.image for part in parts for caption in part]
    assert sorted(images) == sorted(one.image for one in given)
    for content in set(data):
        twins = {str(at) for at, one in enumerate(data) if one == content and content != b"broken"}
        assert sum(bool(twins & {c.image for c in part}) for part in parts) <= 1
    renamed = [item(f"x/{at}", one) for at, one in enumerate(data) if one != b"broken"]
    for number, part in enumerate(parts, 1):  # whatever its name and its place
        again = captions(renamed[::-1], keep=shard(number, count))
        assert {c.sha256 for c in again} == {c.sha256 for c in part if c.sha256}


# --- what is known


def test_known(tmp_path: Path) -> None:
    with Known() as known:
        assert known.first("a") and not known.first("a") and known.first("b\udcff")
        assert known.caption("ab" * 32) is None
        known.remember("ab" * 32, "一只猫\ud800", "stop")
        assert known.caption("ab" * 32) == ("一只猫\ud800", "stop")


def open_file(path: Path, known: Known | None = None, **options: Any) -> CaptionFile:
    return CaptionFile(path, known=known or Known(), **options)


LINE = (
    '{"image": "a.png", "sha256": "' + "ab" * 32 + '", "caption": "猫", "model": "m", '
    '"seconds": 1, "finish_reason": "stop"}'
)
ERROR = '{"image": "b.png", "error": "b.png: broken"}'


def test_a_file_remembers(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_file(path) as file:
        file.write(LINE)
        file.write(ERROR)
    known = Known()
    with open_file(path, known) as file:
        assert file.errors == 1
        assert not known.first("a.png") and not known.first("b.png") and known.first("c.png")
        assert known.caption("ab" * 32) == ("猫", "stop")
        file.check_model("m")
        with pytest.raises(OptionError, match="line 1 is by the model 'm'"):
            file.check_model("other")
    assert path.read_text("utf-8") == f"{LINE}\n{ERROR}\n"


def test_errors_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(f"{ERROR}\n{LINE}\n{ERROR[:-9]}", "utf-8")
    if os.name == "posix":
        path.chmod(0o640)
        link = tmp_path / "link.jsonl"
        link.symlink_to(path)
        path = link
    known = Known()
    with open_file(path, known, retry=True) as file:
        assert file.errors == 1
        file.remove_errors()
        assert file.errors == 0 and known.first("b.png") and not known.first("a.png")
        file.write(LINE.replace("a.png", "b.png"))
    assert len(lines(path)) == 2 and len(list(tmp_path.glob(".*"))) == 0
    assert os.name != "posix" or (path.is_symlink() and path.stat().st_mode & 0o777 == 0o640)


@given(st.integers(0, len(LINE.encode()) + 1))
@settings(max_examples=40)
@pytest.mark.parametrize("before", ["", f"{ERROR}\n"])
def test_a_torn_last_line_is_mended(
    tmp_path_factory: pytest.TempPathFactory, before: str, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "out.jsonl"
    torn = f"{LINE}\n".encode()[:cut]
    path.write_bytes(before.encode() + torn)
    beginning = 0 < len(torn) < len('{"image": "') and not before
    if beginning:  # it may be anything
        with pytest.raises(OptionError):
            open_file(path)
        assert path.read_bytes() == torn
        return
    known = Known()
    with open_file(path, known) as file:
        assert known.first("a.png") == (len(torn) < len(LINE.encode()))
        file.write(ERROR.replace("b.png", "c.png"))
    assert lines(path)[-1]["image"] == "c.png"
    path.write_bytes(before.encode() + torn + bytes(700))  # a page that was never written
    if torn.endswith(b"\n") or not torn:
        return
    with open_file(path) as file:
        file.write(LINE)
    assert lines(path)[-1]["image"] == "a.png"


OTHERS = [
    b"hello", b"{", b"[1, 2]\n", b'{"image": "a.png"}\n', b'{"image": "a.png", "label": 3}',
    b'{"image": 3, "caption": "x"}\n', b'{"image": "a.png", "label": [1, 2', b"\0" * 600,
    b'{"image": "' + b"x" * (2 << 20), b"\xff\xd8\xff" + bytes(99), b'{"a":' * 3000, b"[" * 100_000,
    LINE.encode() + b"\n[1]\n", b'{\n  "image": "a.png", "caption": "x"\n}\n', png(1),
    LINE.encode() + b"\n" + ERROR.encode() + b"\nmine", b'{"image": "a", "caption": NaN}\n',
]  # fmt: skip


@pytest.mark.parametrize("data", OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize("retry", [False, True])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, data: bytes, retry: bool) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(data)
    with pytest.raises(OptionError, match="is no caption"):
        open_file(path, retry=retry)
    assert path.read_bytes() == data and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a folder"):
        open_file(tmp_path)
    with pytest.raises(OptionError, match="no file name"):
        open_file(Path("a\0b"))
    with pytest.raises(OSError):
        open_file(tmp_path / "missing/out.jsonl")
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        for other in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/zero")):
            with pytest.raises(OptionError, match="a device, a pipe"):
                open_file(other)
        (tmp_path / "nowhere").symlink_to(tmp_path / "there")
        open_file(tmp_path / "nowhere").close()


def test_two_runs_on_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_file(path) as file:
        with pytest.raises(OptionError, match="another run writes to it"):
            open_file(path)
        with pytest.raises(OptionError, match="another run writes to it"):
            open_file(path, retry=True)
        file.write(LINE)
    open_file(path).close()
    assert len(lines(path)) == 1


def test_a_file_that_holds_nothing_is_removed_if_it_was_made(tmp_path: Path) -> None:
    open_file(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").touch()
    open_file(tmp_path / "mine").close()
    assert (tmp_path / "mine").exists()


def test_memory_is_flat(tmp_path: Path) -> None:
    """Bytes that Python holds, over ten times as many pictures; the rest is in SQLite's hands."""

    def held(pictures: int) -> int:
        model = TellingModel(broken=never, remember=False)
        tracemalloc.start()
        found = iter(range(pictures))
        with Known() as known, open_file(tmp_path / f"{pictures}", known) as file:
            from seechat_lite.captions.run import captioned
            from seechat_lite.generation import Generation

            items = (item(str(n), png(n)) for n in found if known.first(str(n)))
            for caption in captioned(
                model, items, question="?", format="seechat",  # type: ignore[arg-type]
                generation=Generation(), batch=8, known=known,
            ):  # fmt: skip
                file.write(LINE.replace("a.png", str(caption.image)))
            now, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return now

    held(50)
    # a caption and what belongs to it take 600 bytes; Python keeps up to 2000 tuples of a size
    assert held(1000) < held(100) + 300_000
