"""Downloads by Hub id, from a small Hub of our own on 127.0.0.1."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import seechat_lite as sl
from reference import data
from seechat_lite.cli.main import main
from seechat_lite.download import fetch
from seechat_weights.builtin import BUILTIN
from seechat_weights.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    p.name: p.read_bytes()
    for p in (*data("chatglm_bin").iterdir(), data("chatglm_tiny/ice_text.model"))
} | {"config.json": data("chatglm_tiny/config.json").read_bytes(), "README.md": b"x", "tf.h5": b"x"}
FETCH = """
import json, sys
from pathlib import Path
from seechat_lite.download import fetch
path, source = fetch(Path(sys.argv[1]))
print(json.dumps([str(path), source, sorted(p.name for p in path.iterdir())]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as huggingface_hub asks for."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(path)
        if path.startswith("/api/models/gated/"):
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/tiny/chatglm/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in FILES.items()
            ]
            return self.reply(200, json.dumps(tree).encode())
        if path.startswith("/api/models/tiny/chatglm"):
            siblings = [{"rfilename": n} for n in FILES]
            info = {"id": "tiny/chatglm", "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(info).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/tiny/chatglm/resolve/") and name in FILES:
            etag = f'"{hashlib.sha1(FILES[name]).hexdigest()}"'
            return self.reply(200, FILES[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that asks our Hub, and keeps what it gets in tmp_path."""
    Hub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
            "HF_HUB_ETAG_TIMEOUT": "300",
            "NO_PROXY": "127.0.0.1",
        }
        server.shutdown()


def run(code: str, environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_only_what_is_needed_is_downloaded(hub: dict[str, str], tmp_path: Path) -> None:
    done = run(FETCH, hub, "tiny/chatglm")
    assert done.returncode == 0, done.stderr
    path, source, files = json.loads(done.stdout)
    assert source == {"repository": "tiny/chatglm", "revision": COMMIT}
    assert Path(path).is_relative_to(tmp_path / "hf")
    assert files == sorted(FILES.keys() - {"README.md", "tf.h5"})
    assert (Path(path) / "ice_text.model").read_bytes() == FILES["ice_text.model"]
    before = len(Hub.asked)
    # now it is there: offline, nobody is asked
    done = run(FETCH, hub | {"HF_HUB_OFFLINE": "1"}, "tiny/chatglm")
    assert json.loads(done.stdout)[1:] == [source, files], done.stderr
    assert len(Hub.asked) == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tiny/nothing", "neither a path nor a repository on http://127.0.0.1"),
        ("gated/model", "is gated; expected a folder or a Hub id: accept its terms"),
        ("tiny/chatglm/absent.pth", "has no file absent.pth"),
    ],
)
def test_refused_by_the_hub(hub: dict[str, str], given: str, expected: str) -> None:
    done = run(FETCH, hub, given)
    assert expected in done.stderr.splitlines()[-1]
    assert "CheckpointError" in done.stderr.splitlines()[-1]


def test_no_network(hub: dict[str, str]) -> None:
    with socket.socket() as deaf:  # its port is taken, and nobody listens there
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        done = run(FETCH, hub | {"HF_ENDPOINT": f"http://127.0.0.1:{port}"}, "tiny/chatglm")
    assert f"http://127.0.0.1:{port} cannot be reached" in done.stderr.splitlines()[-1]


def test_offline_opens_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class NoSocket(socket.socket):
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", NoSocket)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    out = tmp_path / "out"
    assert main(["export", "--lm", "tiny/chatglm", "--offline", "--out", str(out)]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "run once online" in error
    assert list(tmp_path.iterdir()) == []


def test_paths_are_never_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for given in (tmp_path / "a/b", tmp_path / "a/typo", Path("/nowhere/x"), Path("../x")):
        assert fetch(given) == (given, None)


def test_a_typo_in_an_existing_folder_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch(Path("models/chatglm")) == (Path("models/chatglm"), None)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Exception, match=r"seechat-lite\[download\]"):
        fetch(Path("tiny/chatglm"))


def test_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        fetch(Path("tiny/chatglm"), offline=True)


# --- bundles, as sl.load takes them

LOAD = """
import sys
import seechat_lite as sl
with sl.load(sys.argv[1]) as model:
    print(model.chat().ask("这是什么？", sys.argv[2]))
"""
PANDA = str(Path(__file__).parent.parent / "docs/images/panda.png")


@pytest.fixture
def bundle_hub(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same Hub, whose repository holds the built-in bundle and more."""
    files = {p.name: p.read_bytes() for p in BUILTIN.iterdir()} | {"README.md": b"x"}
    monkeypatch.setattr(sys.modules[__name__], "FILES", files)
    return hub


@pytest.mark.slow
def test_a_bundle_is_loaded_by_its_id(bundle_hub: dict[str, str], tmp_path: Path) -> None:
    done = run(LOAD, bundle_hub, "tiny/chatglm", PANDA)
    assert (done.returncode, done.stdout.strip()) == (0, "这是熊猫。"), done.stderr
    [folder] = (tmp_path / "hf").rglob("seechat.json")
    assert "README.md" not in {p.name for p in folder.parent.iterdir()}
    before = len(Hub.asked)
    done = run(LOAD, bundle_hub | {"HF_HUB_OFFLINE": "1"}, "tiny/chatglm", PANDA)
    assert done.stdout.strip() == "这是熊猫。", done.stderr
    assert len(Hub.asked) == before


@pytest.mark.slow
def test_published_weights_are_refused_before_they_are_fetched(hub: dict[str, str]) -> None:
    done = run(LOAD, hub, "tiny/chatglm", PANDA)
    assert "holds no bundle (seechat.json); expected" in done.stderr.splitlines()[-1]
    assert not any("resolve" in path for path in Hub.asked)


@pytest.mark.slow
def test_a_manifest_from_a_stranger_fetches_nothing_else(
    bundle_hub: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = FILES["seechat.json"].decode().replace('"decoder.onnx"', '"../decoder.onnx"')
    monkeypatch.setitem(FILES, "seechat.json", text.encode())
    done = run(LOAD, bundle_hub, "tiny/chatglm", PANDA)
    assert "BundleError" in done.stderr.splitlines()[-1]
    assert not any("decoder" in path for path in Hub.asked if "resolve" in path)


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)  # asking it fails
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    shutil.copytree(BUILTIN, tmp_path / "owner" / "name")
    with sl.load("owner/name") as model:
        assert model.manifest.name == "seechat-lite-builtin"
    with pytest.raises(sl.BundleError, match="no such folder"):
        sl.load("owner/typo")


@pytest.mark.parametrize("path", ["nowhere", "/nowhere/name", "./owner/name", "a/b/../c", "~/x/y"])
def test_what_is_no_id_is_looked_for_nowhere(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    with pytest.raises(sl.SeechatError) as e:
        sl.load(path)
    assert "Hub" not in str(e.value)
