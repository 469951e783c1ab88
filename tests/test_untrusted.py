"""Files are opened in one place, which neither waits nor reads without end."""

import ast
import os
import socket
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import seechat_export
import seechat_lite
import seechat_weights
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.errors import SeechatError
from seechat_weights.files.untrusted import open_file, read_file
from seechat_weights.identify import identify

READING = {"open", "read_bytes", "read_text", "memmap", "fromfile", "copyfile", "loadtxt"}
# other places that open files, each for a reason: (file, how) -> how often
ALLOWED = {
    ("untrusted.py", "open"): 1,  # this is where
    # the system's own, whose names we choose
    ("terminal.py", "open"): 1,
    ("pictures/worker.py", "open"): 2,
    ("benchmark.py", "read_text"): 1,
    ("processor.py", "read_text"): 1,
    ("memory.py", "read_text"): 2,
    ("cli/eval.py", "open"): 1,  # new files that it writes
    # our own package
    ("page/__init__.py", "read_bytes"): 1,
    # pictures: opened without waiting, as a regular file, there
    ("server/image_urls.py", "open"): 1,
    ("lite/seechat_lite/images.py", "open"): 1,
    ("cli/options.py", "open"): 1,  # a pipe, whose bytes are the picture
    # arrays of files that open_file opened
    ("bundle/arrays.py", "memmap"): 2,
    ("bundle/arrays.py", "fromfile"): 1,
    # what captions are written to, after a look at what it is
    ("captions/lines.py", "open"): 2,
    # what an export writes, and reads back
    ("export/seechat_export/cli.py", "read_text"): 1,
    ("vision_graph.py", "open"): 1,
    ("synthetic.py", "open"): 2,
    ("export/seechat_export/export.py", "open"): 3,
    ("plan.py", "open"): 1,
    # no files
    ("request_limits.py", "open"): 1,
    ("app.py", "open"): 1,
}


def openings(file: Path) -> Counter[str]:
    """Calls in a source file that may open a file, by their last name."""
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func
            name = getattr(called, "attr", getattr(called, "id", ""))
            ours = isinstance(called, ast.Attribute) and ast.unparse(called.value) in OBJECTS
            if name in READING and not ours:
                found[name] += 1
    return found


OBJECTS = {"files", "checkpoint"}  # our methods


def test_nothing_else_opens_files() -> None:
    unknown = []
    for package in (seechat_weights, seechat_lite, seechat_export):
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            for name, count in openings(file).items():
                place = file.as_posix()
                allowed = sum(n for (end, how), n in ALLOWED.items()
                              if how == name and place.endswith("/" + end))  # fmt: skip
                if count > allowed:
                    unknown.append((place, name, count))
    assert not unknown, "use seechat_weights.files.untrusted, or say here why not"


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_file(file, limit=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_file(file, limit=4)
    with open_file(str(file)) as f:
        assert f.read(2) == b"12"
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "b")
    with pytest.raises(OSError, match="a folder, not a file"):
        open_file(tmp_path)
    with pytest.raises(OSError, match="no file name"):
        open_file("a\0b")


@pytest.mark.skipif(sys.platform != "linux", reason="its /proc")
def test_a_file_without_an_honest_size() -> None:
    """It says that it has no bytes, and has some."""
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_file("/proc/self/status", limit=10)


@pytest.mark.skipif(sys.platform != "linux", reason="its /proc")
def test_an_error_amid_a_file_says_which() -> None:
    for read in (lambda f: f.read(9), lambda f: f.readall(), lambda f: f.readinto(bytearray(9))):
        with open_file("/proc/self/mem") as file, pytest.raises(OSError) as e:
            read(file)
        assert e.value.filename == "/proc/self/mem"


@pytest.mark.skipif(os.name != "posix", reason="pipes, devices and sockets with names")
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "loop", "folder"])
@pytest.mark.parametrize(
    "name", ["seechat.json", "config.json", "model.safetensors", "ice_text.model",
             "pytorch_model.bin.index.json", "adapter_config.json"],
)  # fmt: skip
def test_what_is_no_file(tmp_path: Path, kind: str, name: str) -> None:
    """Whatever of a model it is called: an error at once, of ours."""
    place = tmp_path / name
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:  # its name stays
            s.bind(str(place))
    elif kind == "loop":
        place.symlink_to(place)
    else:
        place.mkdir()
    done: list[BaseException] = []

    def look() -> None:
        for read in (identify, read_manifest):
            try:
                read(tmp_path)
            except BaseException as e:
                done.append(e)
        try:
            identify(place)
        except BaseException as e:
            done.append(e)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits"
    assert done and all(isinstance(e, SeechatError) for e in done), done
