"""Takes memory straight from the system, and gives it back as soon as possible."""

import ctypes
import math
import mmap
import sys
from contextlib import suppress

import numpy as np


def untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Make an array of zeros straight from the system; a page takes memory once it is written to.

    The memory goes back to the system with the array. numpy's own zeros would ask for huge pages;
    the first token of every head touches all of those.

    shape: of the array.
    dtype: of the array.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def trim_heap() -> None:
    """Give back freed memory that the C library keeps: 0.2 GB after a long prompt (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)
