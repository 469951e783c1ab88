"""Memory that comes straight from the system and goes back to it as soon as it can."""

import ctypes
import math
import mmap
import sys
from contextlib import suppress

import numpy as np


def untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros straight from the system, to which they go back: pages take memory when written to.

    numpy's own would ask for huge pages, of which the first token of every head touches all.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory: after a long prompt, 0.2 GB (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)
