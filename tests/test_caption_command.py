"""`seechat caption` as people run it: resumed, killed, twice at once, with lists and options."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from captioning import lines, png, sha256, write_pictures, write_tar
from seechat_lite.cli import caption
from seechat_lite.cli import main as cli
from seechat_lite.cli.progress import Progress, duration
from serving import IMAGES, PATIENCE

posix = pytest.mark.skipif(os.name != "posix", reason="signals and bytes in names")
TELLING = Path(__file__).with_name("captioning.py")


@pytest.fixture(autouse=True)
def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these tests, unless a test takes the real one."""
    from captioning import TellingModel, never

    monkeypatch.setattr(caption, "load_model", lambda args, options: TellingModel(broken=never))


def run(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["caption", *map(str, args)])
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


def start(
    *args: object, seconds: float = 0.0, tty: int = subprocess.PIPE, **options: Any
) -> subprocess.Popen[bytes]:
    """In a process of its own; every caption takes so many seconds."""
    return subprocess.Popen(
        [sys.executable, str(TELLING), *map(str, args)],
        stdout=subprocess.PIPE if tty == subprocess.PIPE else subprocess.DEVNULL,
        stderr=tty,
        env=os.environ | {"TELLING_SECONDS": str(seconds)},
        **options,
    )


def finish(process: subprocess.Popen[bytes], given: bytes | None = None) -> tuple[int, str, str]:
    out, err = process.communicate(given, timeout=PATIENCE)
    return process.returncode, out.decode(), err.decode()


def without_time(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


# --- lines and exit codes


def test_a_line_a_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (one, two) = write_pictures(folder, 2)
    code, out, err = run(capfd, folder)
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "image": str(one), "sha256": sha256(one.read_bytes()),
        "caption": f"描述这张图片。 {sha256(one.read_bytes())[:8]}", "model": "telling",
        "seconds": 0.1, "finish_reason": "stop",
    }  # fmt: skip
    assert list(first)[:2] == ["image", "sha256"] and second["image"] == str(two)
    code, out, err = run(capfd, folder, "-o", tmp_path / "out.jsonl", "--stats")
    assert (code, out) == (0, "") and err.startswith("2 pictures · ")
    assert lines(tmp_path / "out.jsonl") == [first, second]


def test_errors_are_lines_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (one,) = write_pictures(tmp_path / "in", 1)
    (tmp_path / "in/broken\x1b[31m.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "out.jsonl"
    code, _, err = run(capfd, tmp_path / "in", tmp_path / "missing.png", "-o", out)
    assert code == 1 and err == "seechat: 2 without a caption: their lines say why\n"
    found = lines(out)
    assert [line["image"] for line in found if "caption" in line] == [str(one)]
    assert all("\n" not in line["error"] for line in found if "error" in line)
    assert "\x1b" not in out.read_text("utf-8")
    assert run(capfd, tmp_path / "in", "-o", out)[0] == 1  # those of an earlier run count
    assert lines(out) == found
    (tmp_path / "missing.png").write_bytes(png(7))
    code, _, err = run(
        capfd, tmp_path / "in", tmp_path / "missing.png", "-o", out, "--retry-errors"
    )
    assert code == 1 and err.startswith("seechat: 1 without")
    assert len(lines(out)) == 3 and lines(out)[-1]["caption"]


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "no pictures are named"),
        (["x", "--shard", "0/4"], "--shard is 0/4"),
        (["x", "--shard", "5/4"], "first of four"),
        (["x", "--shard", "１/4"], "first of four"),
        (["x", "--batch", "0"], "--batch is 0; expected 1 to 1024"),
        (["x", "--prompt", "a", "--language", "en"], "not allowed with"),
        (["x", "--language", "fr"], "invalid choice"),
        (["x", "--retry-errors"], "goes with -o FILE"),
        (["x", "--top-p", "7"], "--top-p is 7"),
        (["x", "--prompt", "a\udcff"], "no text"),
        (["x", "--outputs", "y"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(args: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, *args)
    assert code == 2 and not out and said in err


def test_nothing_to_caption(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    code, _, err = run(capfd, tmp_path, "-o", out)
    assert code == 1 and err.count("\n") == 1 and "no pictures" in err
    assert not out.exists()
    write_pictures(tmp_path / "in", 1)
    for _ in range(2):  # the second time nothing is left to do
        assert run(capfd, tmp_path, "-o", out)[0] == 0


@pytest.mark.parametrize("kind", ["folder", "pipe", "picture", "json", "missing folder"])
def test_an_output_that_is_none(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "in", 1)
    out = tmp_path / "out.jsonl"
    if kind == "folder":
        out.mkdir()
    elif kind == "pipe":
        if os.name != "posix":
            pytest.skip("no pipes with names")
        os.mkfifo(out)
    elif kind == "missing folder":
        out = tmp_path / "missing/out.jsonl"
    else:
        out.write_bytes(png(1) if kind == "picture" else b'{"a": 1}\n')
    before = out.read_bytes() if out.is_file() else b""
    code, _, err = run(capfd, tmp_path / "in", "-o", out)
    assert code == 1 and err.count("\n") == 1 and err.startswith("seechat: ") and str(out) in err
    assert not out.is_file() or out.read_bytes() == before


def test_options_may_stand_between_places(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = write_pictures(tmp_path, 2)
    code, out, _ = run(capfd, one, "--prompt", "why", two)
    assert code == 0 and [json.loads(x)["caption"][:4] for x in out.splitlines()] == ["why "] * 2
    assert json.loads(run(capfd, one, "--language", "en")[1])["caption"].startswith("Describe this")


def test_a_column_is_named_in_advice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"x": [png(1)], "y": [png(2)]}), path)
    code, out, _ = run(capfd, path)
    assert code == 1 and "(--column)" in json.loads(out)["error"]
    code, out, _ = run(capfd, path, "--column", "y")
    assert code == 0 and json.loads(out)["sha256"] == sha256(png(2))


# --- lists


@pytest.mark.slow
def test_a_list_on_stdin(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "in", 3)
    listed = "\n".join([str(paths[2]), "", str(paths[0]), str(tmp_path / "in")]).encode()
    code, out, err = finish(start("-", stdin=subprocess.PIPE), listed + b"\r\n")
    assert (code, err) == (0, "")
    assert [json.loads(line)["image"] for line in out.splitlines()] == [
        str(paths[2]), str(paths[0]), str(paths[1])
    ]  # fmt: skip
    code, out, _ = finish(start("-", stdin=subprocess.PIPE), b"x" * 70_000 + b"\n")
    (line,) = map(json.loads, out.splitlines())
    assert code == 1 and line["image"] == "stdin:1" and "65536 bytes" in line["error"]


@pytest.mark.slow
@posix
def test_names_may_have_any_bytes(tmp_path: Path) -> None:
    (one, two) = write_pictures(tmp_path, 2)
    odd = [os.fsencode(tmp_path) + name for name in (b"/\xff\xfe.png", b"/new\nline.png", b"/\r")]
    for number, name in enumerate(odd):
        with open(name, "wb") as file:  # noqa: PTH123  a name that is no text
            file.write(png(number + 10))
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # the second time they are known
        given = b"\0".join([*odd, os.fsencode(one), b""])
        assert finish(start("-", "-0", "-o", out, stdin=subprocess.PIPE), given)[0] == 0
        assert [os.fsencode(line["image"]) for line in lines(out)] == [*odd, os.fsencode(one)]
    given = b"\n".join([odd[0], os.fsencode(two)])
    assert finish(start("-", "-o", out, stdin=subprocess.PIPE), given)[0] == 0
    assert len(lines(out)) == 5


def test_a_list_is_read_as_it_comes(tmp_path: Path) -> None:
    """A program may write a path, wait for the line, and go on."""
    process = start("-", stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    for path in write_pictures(tmp_path, 3):
        process.stdin.write(f"{path}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["image"] == str(path)
    assert finish(process)[0] == 0


# --- ended and gone on with


def kinds_of_places(folder: Path) -> list[Path]:
    """Pictures, some of them twice or broken, in a folder and in an archive."""
    write_pictures(folder / "in", 60)
    (folder / "in/00007.png").write_bytes(png(3))
    (folder / "in/00011.png").write_bytes(b"broken")
    members = [(f"{n}.png", png(n)) for n in range(50, 90)]
    return [folder / "in", write_tar(folder / "more.tar", members)]


@posix
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_and_run_again_gives_the_same_lines(tmp_path: Path, seed: int) -> None:
    places = kinds_of_places(tmp_path)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    finish(start(*places, "-o", whole))
    rng = random.Random(seed)
    ends = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    for end in rng.choices(ends, k=4):
        process = start(*places, "-o", out, seconds=0.01)
        begun = len(out.read_bytes()) if out.exists() else 0
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until:  # it has written something
            if out.exists() and out.stat().st_size > begun + rng.randrange(3000):
                break
            time.sleep(0.01)
        process.send_signal(end)
        code = finish(process)[0]
        assert code in (1, 130, -end)
        assert not out.exists() or all(json.loads(x) for x in out.read_text("utf-8").splitlines())
        if rng.random() < 0.5:  # as after a crash of the machine
            os.truncate(out, max(0, out.stat().st_size - rng.randrange(1, 60)))
    assert finish(start(*places, "-o", out))[0] == 1  # one is broken
    assert without_time(lines(out)) == without_time(lines(whole))
    assert len(lines(out)) == 100


@pytest.mark.slow
def test_two_runs_on_one_file(tmp_path: Path) -> None:
    places, out = kinds_of_places(tmp_path), tmp_path / "out.jsonl"
    first = start(*places, "-o", out, seconds=0.05)
    until = time.monotonic() + PATIENCE
    while not (out.exists() and out.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    code, _, err = finish(start(*places, "-o", out))
    assert code == 1 and err.count("\n") == 1 and "another run writes to it" in err
    assert finish(first)[0] == 1
    assert len(lines(out)) == 100


@pytest.mark.slow
def test_shards_together_are_everything(tmp_path: Path) -> None:
    places = kinds_of_places(tmp_path)
    whole = tmp_path / "whole.jsonl"
    finish(start(*places, "-o", whole))
    parts = []
    for number in (1, 2, 3):
        out = tmp_path / f"{number}.jsonl"
        finish(start(*places, "-o", out, "--shard", f"{number}/3"))
        parts += without_time(lines(out))
    assert sorted(parts, key=str) == sorted(without_time(lines(whole)), key=str)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_real_model_is_ended_in_its_work(tmp_path: Path, end: signal.Signals) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "seechat_lite", "caption", IMAGES, "-o", out, "--threads", "1"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    until = time.monotonic() + PATIENCE
    while not (out.exists() and len(out.read_bytes().splitlines()) >= 2):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(end)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, -end) and b"Traceback" not in err
    before = lines(out)
    assert all(line["caption"] for line in before)
    done = subprocess.run(list(map(str, command)), timeout=PATIENCE)
    assert done.returncode == 0
    assert lines(out)[: len(before)] == before
    pictures = [*IMAGES.glob("*.png"), *IMAGES.glob("*.jpg")]
    assert len(lines(out)) == len(pictures)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Half a line that was written is taken away again."""
    write_pictures(tmp_path / "in", 3)
    out, write, calls = tmp_path / "out.jsonl", os.write, []

    def full(file: int, data: Any) -> int:
        calls.append(data)
        if len(calls) == 2:
            return write(file, data[:30])
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("seechat_lite.captions.lines.os.write", full)
    code, _, err = run(capfd, tmp_path / "in", "-o", out)
    monkeypatch.undo()
    assert code == 1 and err == f"seechat: {out}: No space left on device\n"
    assert len(lines(out)) == 1


# --- progress


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("seechat_lite.cli.progress.time.monotonic", lambda: now[0])
    progress = Progress("pictures", lambda stopped: 1000)
    progress._count(lambda stopped: 1000)
    assert progress.line(100) == "0 of 1,000 pictures"
    for number in range(40):
        now[0] += 0.5
        progress.step(skipped=number < 20, failed=number == 30)
    assert progress.line(now[0]) == "40 of 1,000 pictures · 1.0/s · 16 min 0 s left · errors: 1"
    assert progress.summary() == "40 pictures · 20 of them done before · 20 s · 1.00/s · errors: 1"


@posix
@pytest.mark.slow
def test_in_a_terminal(tmp_path: Path) -> None:
    """A count that fits the terminal however narrow, what was done, and a word at Ctrl-C."""
    import fcntl
    import pty
    import struct
    import termios

    write_pictures(tmp_path / "in", 30)
    command = ["in", "-o", "out.jsonl"]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 16, 0, 0))
    try:
        process = start(*command, seconds=0.2, cwd=tmp_path, tty=follower)
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "out.jsonl").exists() or len(lines(tmp_path / "out.jsonl")) < 3:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        shown = os.read(leader, 1 << 16).decode()
        counts, _, words = shown.partition("seechat: ")
        assert all(len(count) < 16 for count in counts.rstrip().split("\r\x1b[K"))
        assert "of 30" in counts and words.startswith("ended after ") and "goes on" in words
        done = start(*command, cwd=tmp_path, tty=follower)
        assert done.wait(PATIENCE) == 0
        shown = os.read(leader, 1 << 16).decode()
        assert "\r\x1b[K30 pictures · " in shown and "of them done before" in shown
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "1 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min"),
     (200_000, "2 d 7 h")],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
