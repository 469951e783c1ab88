"""Nothing leaves: no command opens a socket or writes a file that nobody asked for.

Every command runs in an empty home, alone with what it was told, for the twenty seconds in which
libraries that report to their makers have been seen to begin. The system calls are watched where
strace is there; what is left in the home, everywhere.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from reference import data

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PANDA = str(ROOT / "docs/images/panda.png")
SECONDS = 20
PATIENCE = 200  # seconds; ends what hangs, and is never what a test is about
USER_NAMES = "/var/run/nscd/socket"  # where the C library asks this machine who its user is
DOOR = ROOT / "lite/seechat_lite/onnx_runtime.py"
# of this process' environment: the rest might keep a library quiet that speaks elsewhere, as
# ONNX Runtime does not where it finds the variables of a CI service
KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "LANG")
SEECHAT = (sys.executable, "-m", "seechat_lite")
WEIGHTS = (
    *("--lm", str(data("chatglm_tiny"))),
    *("--clip", str(data("vision/clip_open_clip"))),
    *("--projector", str(data("vision/mm_projector_linear.bin"))),
)
APPLICATION = f"""
import sys, seechat_lite as sl
with sl.load(engine=sys.argv[1]) as model:
    print(model.chat().ask("这是什么?", {PANDA!r}))
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Command:
    """What is run; `said`: to its stdin at once; `places`: where it may leave files."""

    argv: tuple[str, ...]
    said: str = ""
    places: tuple[str, ...] = ()
    listens: bool = False
    stays: bool = True  # until its stdin ends or it is told to


COMMANDS = {
    "ask": Command((*SEECHAT, "ask", PANDA, "这是什么?"), stays=False),
    "chat": Command((*SEECHAT, "chat", "--image", PANDA), said="这是什么?\n"),
    "info": Command((*SEECHAT, "info"), stays=False),
    "info of a checkpoint": Command((*SEECHAT, "info", str(data("chatglm_tiny"))), stays=False),
    "pipe": Command((*SEECHAT, "pipe"), said='{"id": 1, "question": "你好"}\n'),
    "serve": Command((*SEECHAT, "serve", "--port", "0"), listens=True),
    "bench": Command((*SEECHAT, "bench", "--repeat", "1"), stays=False),
    "export": Command(
        (*SEECHAT, "export", "--out", "bundle", "--precision", "int8", *WEIGHTS),
        places=("work/bundle/",),
        stays=False,
    ),
    "llm": Command(
        (sys.executable, "-m", "llm", "-m", "seechat", "-a", PANDA, "这是什么?"),
        places=("home/.config/io.datasette.llm/",),
        stays=False,
    ),
    "an application": Command((sys.executable, "-c", APPLICATION, "onnx")),
    "an application with torch": Command((sys.executable, "-c", APPLICATION, "torch")),
}


def traces() -> bool:
    """Whether strace is there and may watch a process."""
    strace = shutil.which("strace")
    return bool(strace) and subprocess.run([strace, "-o", os.devnull, "true"]).returncode == 0


def environment(root: Path) -> dict[str, str]:
    """An empty home, folders for temporary files and for work, and nothing else."""
    for name in ("home", "tmp", "work"):
        (root / name).mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    home, tmp = str(root / "home"), str(root / "tmp")
    # caches of bytecode are Python's own business
    return kept | {"HOME": home, "USERPROFILE": home, "TMPDIR": tmp, "PYTHONDONTWRITEBYTECODE": "1"}


def watch(command: Command, root: Path, trace: Path | None) -> subprocess.CompletedProcess[str]:
    """Run a command for SECONDS, or until it ends by itself."""
    argv = list(command.argv)
    if trace:
        # -D: the command is our child, which signals go to; strace ends with it
        calls = "connect,sendto,sendmsg,sendmmsg,bind,openat,open,creat,mkdir,mkdirat,rename"
        strace = ["strace", "-D", "-f", "-qq", "-s", "200", "-e", f"trace={calls}", "-o"]
        argv = [*strace, str(trace), *argv]
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment(root),
        cwd=root / "work",
    )
    with process:
        assert process.stdin
        process.stdin.write(command.said)
        process.stdin.flush()
        if command.stays:
            time.sleep(SECONDS)
            assert process.poll() is None, process.communicate()
        if command.listens:
            process.terminate()
        out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def written(trace: str) -> set[str]:
    """The paths that were opened to be written, made or renamed to."""
    opened = re.findall(r'open(?:at)?\((?:AT_FDCWD, )?"([^"]+)", [A-Z_|]*O_(?:WRONLY|RDWR)', trace)
    made = re.findall(r'(?:creat|mkdir|mkdirat)\((?:AT_FDCWD, )?"([^"]+)".*= 0', trace)
    return {*opened, *made, *re.findall(r'rename\("[^"]+", "([^"]+)"', trace)}


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, str | None, subprocess.CompletedProcess[str]]]:
    """Every command with its root, its trace where there is one, and what it said; all at once."""
    with_trace = traces()

    def run(name: str) -> tuple[Path, str | None, subprocess.CompletedProcess[str]]:
        root = tmp_path_factory.mktemp("root")
        file = root / "trace" if with_trace else None
        done = watch(COMMANDS[name], root, file)
        trace = file.read_text("utf-8", "replace") if file else None
        return root, trace, done

    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        return dict(zip(COMMANDS, pool.map(run, COMMANDS), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_leaves_nothing_and_tells_nobody(
    name: str,
    watched: dict[str, tuple[Path, str | None, subprocess.CompletedProcess[str]]],
) -> None:
    command, (root, trace, done) = COMMANDS[name], watched[name]
    assert done.returncode == 0, done.stderr
    assert not re.search("error|warn|Traceback", done.stderr, re.IGNORECASE), done.stderr
    left = [
        file.relative_to(root).as_posix()
        for folder in ("home", "tmp", "work")
        for file in (root / folder).rglob("*")
        if not file.is_dir()
    ]
    assert not [file for file in left if not file.startswith(command.places or ("none",))]
    if trace is None:
        pytest.skip("strace is not there, or may not watch: sockets were not looked at")
    reached = re.findall(r"\b(?:connect|sendto|sendmsg|sendmmsg)\(.*AF_.*", trace)
    assert not [call for call in reached if USER_NAMES not in call]
    bound = re.findall(r"\bbind\(.*AF_INET.*", trace)
    assert len(bound) == command.listens, bound
    assert all('inet_addr("127.0.0.1")' in call for call in bound)
    outside = {
        path
        for path in written(trace)
        if path.startswith("/") and not path.startswith((str(root), "/dev/", "/proc/self/"))
    }
    assert not outside


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    """A process that looks up a host and writes outside is found out."""
    if not traces():
        pytest.skip("strace is not there, or may not watch")
    code = (
        "import socket, pathlib\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('127.0.0.1', 53))\n"
        f"pathlib.Path({str(tmp_path / 'stray')!r}).write_text('x')\n"
    )
    trace = tmp_path / "trace"
    watch(Command((sys.executable, "-c", code), stays=False), tmp_path / "root", trace)
    assert re.search(r"connect\(.*AF_INET", trace.read_text())
    assert str(tmp_path / "stray") in written(trace.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("name", ["ask", "info", "bench", "llm"])
def test_a_home_that_cannot_be_written_to_is_no_news(name: str, tmp_path: Path) -> None:
    env = environment(tmp_path) | {"HOME": "/proc", "LLM_USER_PATH": str(tmp_path / "llm")}
    done = subprocess.run(COMMANDS[name].argv, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("module", ["seechat_weights", "seechat_lite", "seechat_export"])
def test_importing_any_package_switches_telemetry_off(module: str) -> None:
    """Before any dependency is there that could report; what the user has set is replaced."""
    code = (
        f"import os, sys, {module}\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])\n"
        "print(*{'onnxruntime', 'torch', 'huggingface_hub'} & set(sys.modules))\n"
    )
    env = os.environ | {"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("1 1\n\n", "")


@pytest.mark.parametrize("told", [False, True])
def test_an_application_that_loaded_onnxruntime_before_is_told(told: bool, tmp_path: Path) -> None:
    env = environment(tmp_path) | ({"ORT_DISABLE_TELEMETRY": "1"} if told else {"CI": "1"})
    code = "import onnxruntime, seechat_lite as sl; sl.load().close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0
    assert ("import seechat_lite first" in done.stderr) != told
    assert told == (done.stderr == "")


def test_onnxruntime_is_reached_by_one_door() -> None:
    """An import beside it could come before telemetry is switched off."""
    rooms = ("weights", "lite", "export", "bench", "recipes", "examples", "tests")
    importers = set()
    for file in (f for room in rooms for f in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "onnxruntime" for name in names):
                importers.add(file)
    assert importers == {DOOR}
