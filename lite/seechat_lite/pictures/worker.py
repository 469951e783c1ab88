"""The process in which pictures are decoded; it may be ended at any time; its memory is bounded.

pool.py starts it as `python -c … main()`, or in a packed application through `run_if_asked`. It
reads one request after another from stdin and writes an answer to stdout. Each is a JSON object of
one line with the number of bytes that follow it. It ends when its stdin does.
"""

import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from PIL import Image

from seechat_lite.pictures import decode, reduce
from seechat_weights.errors import ImageError

ARGUMENT = "seechat-picture-worker"  # starts a packed application as a worker
CPU_SECONDS = 8  # for one picture; after that the system ends this process
SLACK = 40 << 20  # bytes beside what a picture is said to need


packed = False  # whether this is a packed application that can start as a worker


def run_if_asked() -> None:
    """Be a worker instead of the application, if pool.py has started it as one.

    A packed application, where sys.executable is not Python, must call this first.
    """
    global packed
    packed = True
    if sys.argv[1:2] == [ARGUMENT]:
        main()
        sys.exit(0)


def main() -> None:
    """Answer requests until stdin ends."""
    with suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who asked
    requests, answers = 0, os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libtiff and others print their complaints
        os.dup2(quiet, stream)
    Image.MAX_IMAGE_PIXELS = reduce.MAX_PIXELS  # for pictures inside of other pictures, too
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    while (line := _line(requests)) is not None:
        request = json.loads(line)
        data = _read(requests, request["bytes"])
        _bound(request["budget"], request["seconds"])
        _end_with_parent(requests, True)
        start = time.process_time()
        try:
            head, body = answer(request, data)
        except Exception as e:
            # not an ImageError: a mistake of ours, or damage that shows only in the conversion
            error = e if isinstance(e, ImageError) else decode.undecodable(e)
            head, body = dict[str, Any](error=str(error)), b""
            # work on the pixels takes memory too, and no header says how much
            if isinstance(error, decode.TooMuchMemoryError) and request["budget"] < request["full"]:
                head = {"needs": request["full"]}
        _end_with_parent(requests, False)
        del data
        head["seconds"] = time.process_time() - start
        _write(answers, json.dumps(head | {"bytes": len(body)}).encode() + b"\n")
        _write(answers, body)


def answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Do what a request says; returns the head of the answer and its bytes.

    request: the object of the request's line.
    data: the file.

    Raises ImageError without the file's name.
    """
    spec, budget, full = request["spec"], request["budget"], request["full"]
    least = spec["image_size"] if spec and not spec["exact"] else None
    if request["do"] == "thumbnail":
        least = max(request["size"])
    if (needs := decode.needs_to_open(data, request["format"])) > budget and needs <= full:
        return {"needs": needs}, b""
    opened = decode.open_picture(data, request["format"], budget=full, least=least)
    image = opened.image
    about = {"mode": image.mode, "size": image.size}
    if request["do"] == "describe":
        return about, b""
    if opened.needs > budget:
        return {"needs": opened.needs}, b""
    del data
    image = decode.load(opened)
    if request["do"] == "thumbnail":
        image = reduce.thumbnail(
            image, request["size"], orientation=opened.orientation, white=opened.white
        )
    else:
        settings: Any = SimpleNamespace(**spec | {"background": tuple(spec["background"])})
        image = reduce.reduce(
            image,
            settings,
            orientation=opened.orientation,
            white=opened.white,
        )
    return {"mode": image.mode, "size": image.size}, image.tobytes()


def _line(file: int) -> bytes | None:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(file, 1)
        if not byte:
            return None
        line += byte
    return bytes(line)


def _read(file: int, size: int) -> bytes:
    data, at = bytearray(size), 0
    view = memoryview(data)
    while at < size:
        got = os.read(file, min(size - at, 1 << 20))
        if not got:
            os._exit(0)
        view[at : at + len(got)] = got
        at += len(got)
    view.release()
    return bytes(data)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(file, view[: 1 << 20]) :]
    except OSError:  # nobody reads the answer
        os._exit(0)


def _bound(budget: int, seconds: float) -> None:
    """Let the system refuse memory beyond the budget, and end this process if it takes too long.

    Where the system cannot (not Linux), pool.py watches instead.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(ValueError, OSError):
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (end, hard))
    if sys.platform != "linux":
        return
    with suppress(ValueError, OSError), open("/proc/self/status") as status:  # noqa: PTH123
        held = int(status.read().partition("VmData:")[2].split()[0]) << 10
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + budget + SLACK, hard))


def _end_with_parent(file: int, on: bool) -> None:
    """Let the system end this process when the pipe closes: nothing reads it while decoding."""
    if sys.platform == "win32":
        return
    import fcntl

    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        asynchronous = getattr(os, "O_ASYNC", 0o20000 if sys.platform == "linux" else 0x40)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | asynchronous if on else flags & ~asynchronous)
    if on:
        import select

        if sys.platform == "linux":
            poll = select.poll()
            poll.register(file, select.POLLHUP)
            if any(event & select.POLLHUP for _, event in poll.poll(0)):
                os._exit(0)
