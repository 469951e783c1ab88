"""Memory that comes straight from the system and goes back to it as soon as it can."""

import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from seechat_lite.memory import RELEASES_PAGES

RELEASE_INTERVAL = 0.02  # seconds
MAPPING = threading.Lock()  # of the process, whose addresses these are

Range = tuple[int, int]  # addresses, the end exclusive


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
def new_mappings(file: Path) -> Iterator[list[Range]]:
    """Where in memory `file` is mapped when the block has ended and was not before (Linux).

    The block makes something that maps parts of the file, such as a session of ONNX Runtime; as
    long as that lives, the ranges are its own. Not the file as a whole, which numpy may have mapped
    meanwhile.
    """
    ranges: list[Range] = []
    with MAPPING:
        before = _mappings(file)
        yield ranges
        after = _mappings(file)
        size = file.stat().st_size if after else 0
        for start, end in after:
            others = any(start < b and a < end for a, b in before)
            if not others and end - start < size:
                ranges.append((start, end))


@contextmanager
def releasing(ranges: Sequence[Range]) -> Iterator[None]:
    """Give back pages of new_mappings while the block reads them, each once.

    They are the file's own: one that is needed after all is read again.
    """
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(RELEASE_INTERVAL):
            release(ranges)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def release(ranges: Sequence[Range]) -> None:
    """Give back what was read of new_mappings, whose maker must be alive.

    Elsewhere in memory this would erase: the system hands addresses on as soon as they are free.
    """
    for start, end in ranges:
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED)


def _mappings(file: Path) -> list[Range]:
    if not RELEASES_PAGES:
        return []
    name, found = str(file.resolve()), []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((start, end))
    return found


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory: after a long prompt, 0.2 GB (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)
