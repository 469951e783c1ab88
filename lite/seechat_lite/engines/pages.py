"""Memory that comes straight from the system and goes back to it as soon as it can."""

import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from seechat_lite.memory import RELEASES_PAGES

RELEASE_INTERVAL = 0.02  # seconds


def untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros straight from the system, to which they go back: pages take memory when written to.

    numpy's own would ask for huge pages, of which the first token of every head touches all.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


@contextmanager
def releasing_pages(file: Path) -> Iterator[None]:
    """While a mapped file is read once, give back what was read, and the rest at the end (Linux).

    The pages are the file's own: one that is needed after all is read again.
    """
    if not RELEASES_PAGES:
        yield
        return
    ended = threading.Event()

    def release() -> None:
        while not ended.wait(RELEASE_INTERVAL):
            _release_pages(file)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _release_pages(file)


def _release_pages(file: Path) -> None:
    name, libc = str(file.resolve()), ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory: after a long prompt, 0.2 GB (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)
