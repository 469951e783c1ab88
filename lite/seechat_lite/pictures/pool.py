"""Starts the processes in which pictures are decoded, and keeps them for the next picture.

There are at most two at a time, and only one large picture at a time. A process is ended as soon as
nobody waits for its picture, when it takes too long or too much memory, and when it has been idle
for a while.
"""

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from seechat_lite.engines.base import Cancelled
from seechat_lite.pictures import decode, worker
from seechat_weights.errors import ImageError

log = logging.getLogger(__name__)

WORKERS = 2
SMALL = 96_000_000  # bytes that decoding may take in each worker; one at a time may take more
IDLE_SECONDS = 30.0
CPU_SECONDS = worker.CPU_SECONDS
# on the clock: on a busy machine a picture takes longer than its CPU seconds
WALL_SECONDS = 60.0
_LOOK_EVERY = 0.05  # seconds between two checks of who waits and what it takes
_BASE = 100_000_000  # resident bytes of a worker beside its picture, generously


@dataclass(frozen=True)
class Answer:
    """What a worker made of a picture."""

    mode: str
    size: tuple[int, int]
    data: bytes  # as Image.tobytes returns it; empty if the picture was only described


class NoWorker(Exception):  # noqa: N818 (no error to those outside of this package)
    """No process can be started here."""


def ask(
    request: dict[str, Any], data: bytes, *, stopped: Callable[[], bool] = lambda: False
) -> Answer:
    """Have a picture decoded in a worker.

    request: see worker.answer.
    data: the file.
    stopped: asked twenty times a second; True ends the work.

    Raises ImageError without the file's name, Cancelled, NoWorker.
    """
    _wait_for(_slots, stopped)
    try:
        took = CPU_SECONDS / 2  # if it is not known
        request |= {"budget": SMALL, "seconds": CPU_SECONDS}
        with suppress(decode.TooMuchMemoryError):
            found = _exchange(request, data, stopped)
            if "needs" not in found[0]:
                return _answer(*found)
            took = found[0]["seconds"]
        _wait_for(_large, stopped)
        try:
            request |= {"budget": decode.BUDGET, "seconds": CPU_SECONDS - took}
            found = _exchange(request, data, stopped)
            _end(_idle)  # the memory of a large picture is not kept
            return _answer(*found)
        finally:
            _large.release()
    finally:
        _slots.release()


def _answer(head: dict[str, Any], body: bytes) -> Answer:
    return Answer(head["mode"], tuple(head["size"]), body)


def close() -> None:
    """End the processes that have nothing to do."""
    _end(_idle)


class _Worker:
    def __init__(self) -> None:
        command = _command()
        if command is None:
            raise NoWorker
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # numpy reserves memory for every thread, and few pictures need it
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except (OSError, ValueError) as e:
            log.info("no process for pictures can be started (%s)", e)
            raise NoWorker from None

    def end(self) -> None:
        """End the process and collect it."""
        process = self.process
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


_slots = threading.BoundedSemaphore(WORKERS)
_large = threading.Lock()
_lock = threading.Lock()  # guards the next two
_idle: list[_Worker] = []
_timer: threading.Timer | None = None


def _wait_for(lock: Any, stopped: Callable[[], bool]) -> None:
    while not lock.acquire(timeout=_LOOK_EVERY):
        if stopped():
            raise Cancelled("stopped while its pictures were read")


def _exchange(
    request: dict[str, Any], data: bytes, stopped: Callable[[], bool]
) -> tuple[dict[str, Any], bytes]:
    """Send a request and wait for its answer."""
    with _lock:
        used = _idle.pop() if _idle else None
    if used and used.process.poll() is not None:  # the system has ended it meanwhile
        used.end()
        used = None
    current = used or _Worker()
    line = json.dumps(request | {"full": decode.BUDGET, "bytes": len(data)}).encode() + b"\n"
    answers: list[tuple[dict[str, Any], bytes]] = []
    done = threading.Event()

    def talk() -> None:
        # the worker has ended: an error of its pipes, or of what it wrote
        with suppress(OSError, ValueError):
            _write(current.process, line)
            _write(current.process, data)
            answers.append(_read(current.process))
        done.set()

    threading.Thread(target=talk, name="seechat-picture", daemon=True).start()
    kept = False
    try:
        _watch(current, done, stopped, budget=request["budget"], seconds=request["seconds"])
        if not answers:
            raise _died(current.process)
        head, body = answers[0]
        kept = True
        if "error" in head:
            raise ImageError(head["error"])
        return head, body
    finally:
        if kept:
            _keep(current)
        else:
            current.process.kill()
            done.wait(5)  # the thread then no longer uses the pipes
            current.end()


def _watch(
    current: _Worker,
    done: threading.Event,
    stopped: Callable[[], bool],
    *,
    budget: int,
    seconds: float,
) -> None:
    """Wait until the answer is there. Raises ImageError and Cancelled."""
    start, process, spent = time.monotonic(), None, 0.0
    while not done.wait(_LOOK_EVERY):
        if stopped():
            raise Cancelled("stopped while a picture was decoded")
        try:
            if process is None:
                process = psutil.Process(current.process.pid)
                spent = _cpu_seconds(process)
            took, held = _cpu_seconds(process) - spent, process.memory_info().rss
        except psutil.Error:
            continue  # it has just ended
        if took > seconds or time.monotonic() - start > WALL_SECONDS:
            raise _too_slow()
        if held > budget + _BASE:
            raise decode.too_much_memory()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _died(process: subprocess.Popen[bytes]) -> ImageError:
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    if os.name == "posix":
        import signal

        if process.returncode == -signal.SIGXCPU:
            return _too_slow()
    log.info("the process that decoded a picture ended with %s", process.returncode)
    return ImageError(
        "the decoder broke down; expected a whole picture: get the file again, or save it as PNG"
    )


def _too_slow() -> ImageError:
    return ImageError(
        f"decoding takes more than {CPU_SECONDS} s; expected an ordinary picture: save it again, "
        "as PNG or JPEG"
    )


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    view = memoryview(data)
    while view:
        view = view[process.stdin.write(view[: 1 << 20]) :]


def _read(process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytes]:
    assert process.stdout
    line = process.stdout.readline(1 << 16)
    if not line.endswith(b"\n"):
        raise OSError("the worker has ended")
    head = json.loads(line)
    body = bytearray()
    while len(body) < head["bytes"]:
        part = process.stdout.read(min(head["bytes"] - len(body), 1 << 20))
        if not part:
            raise OSError("the worker has ended")
        body += part
    return head, bytes(body)


def _keep(current: _Worker) -> None:
    global _timer
    with _lock:
        _idle.append(current)
        if _timer:
            _timer.cancel()
        _timer = threading.Timer(IDLE_SECONDS, close)
        _timer.daemon = True
        _timer.start()


def _end(workers: list[_Worker]) -> None:
    global _timer
    with _lock:
        ended, workers[:] = list(workers), []
        if _timer and not workers:
            _timer.cancel()
            _timer = None
    for one in ended:
        one.end()


def _command() -> Sequence[str | Path] | None:
    """The command that starts a worker here; None if `sys.executable` may not be able to."""
    if getattr(sys, "frozen", False):
        return [sys.executable, worker.ARGUMENT] if worker.packed else None
    if not sys.executable or not Path(sys.executable).stem.lower().startswith(("python", "pypy")):
        return None
    import PIL

    import seechat_lite
    import seechat_weights

    places: list[str] = []
    for package in (seechat_lite, seechat_weights, PIL):
        if not package.__file__:
            return None
        place = str(Path(package.__file__).resolve().parent.parent)
        if place not in places:
            places.append(place)
    start = "import sys; sys.path += sys.argv[1:]; from seechat_lite.pictures.worker import main"
    return [sys.executable, "-I", "-S", "-c", start + "; main()", *places]


def _forget() -> None:
    """Forget the workers in a forked child: they are its parent's."""
    global _slots, _large, _lock, _timer
    _slots, _large = threading.BoundedSemaphore(WORKERS), threading.Lock()
    _lock, _timer = threading.Lock(), None
    for one in _idle:
        one.process.returncode = 0  # so that nobody waits for it here
        for pipe in (one.process.stdin, one.process.stdout):
            if pipe:
                pipe.close()
    _idle.clear()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
