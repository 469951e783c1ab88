"""Finds numbers that no trained model has, when a tensor is read; its error names tensor and file.

An unfinished download has the right size and zeros inside. Training that went wrong leaves NaN. No
header shows either; the export would keep them and the model would answer nonsense.

Errors: NaN and infinities anywhere; matrices and norms of zeros; and a run of zeros that is longer
than training leaves, as a missing piece of a download is. Only a warning: single rows of zeros,
which pruning leaves. Allowed: biases of zeros (new ones, a key's), rows of the vocabulary that no
token has, and small values.

The bits of a float without its sign are ordered as its magnitude is. So one pass over integers
finds all of this, at the speed of memory.
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seechat_weights.errors import CheckpointError
from seechat_weights.plain_text import one_line

log = logging.getLogger(__name__)

_HOLE = 1 << 16  # bytes of zeros in a row; downloads come in pieces of at least this size
_SHARE = 4  # or a 4th of a small tensor
_GRAIN = 512  # numbers looked at together
_AT_ONCE = 1 << 20  # numbers
_PADDING = 1024  # rows of a vocabulary that no token has: ChatGLM-6B has 184
_LOST_ROWS = 64  # of a vocabulary, one after another: more than a few tokens without training
_NOTHING = 1e-20  # a smaller number has no effect
# names of the files that a download keeps beside an unfinished file
_UNFINISHED = (".aria2", ".part", ".crdownload", ".download", ".incomplete", ".!qB", ".partial")


@dataclass(frozen=True)
class Place:
    """The tensor and the file that are looked at."""

    file: Path
    name: str

    def error(self, found: str, expected: str, do: str = "") -> CheckpointError:
        """The error for what was found here.

        found: what was found.
        expected: what was expected.
        do: what to do; "" for the usual advice.
        """
        beside = unfinished(self.file)
        do = do or "download the file again, or take the checkpoint of an earlier step"
        if beside:
            do = f"{beside.name} lies beside it, so let that download finish"
        return CheckpointError(
            f"{self.file}: tensor {one_line(self.name)} {found}; expected {expected}: {do}"
        )


def unfinished(file: Path) -> Path | None:
    """The file that an unfinished download keeps beside `file`, if there is one."""
    places = (file.with_name(file.name + end) for end in _UNFINISHED)
    return next((place for place in places if place.exists()), None)


def check_numbers(array: np.ndarray, place: Place) -> None:
    """Check a tensor for NaN and infinities.

    array: its numbers.
    place: where they come from, for the error.

    Raises CheckpointError.
    """
    if array.dtype.kind != "f":
        return
    largest = max((int(part.max()) for part in _magnitudes(array)), default=0)
    if largest > _bits(np.inf, array.dtype):
        raise place.error(f"holds NaN ({_where(array, np.isnan)})", "numbers")
    if largest == _bits(np.inf, array.dtype):
        raise place.error(f"holds infinities ({_where(array, np.isinf)})", "numbers")


def check_half(array: np.ndarray, place: Place) -> None:
    """Check that no number became infinite when a tensor was made float16.

    array: its numbers, float16.
    place: where they come from, for the error.

    Raises CheckpointError.
    """
    if not all(int(part.max()) < _bits(np.inf, array.dtype) for part in _magnitudes(array)):
        raise place.error(
            f"holds numbers beyond 65504 ({_where(array, np.isinf)})",
            "what float16 can hold",
            "use it as fp32, int8 or int4",
        )


def check_matrix(array: np.ndarray, place: Place) -> None:
    """Check a matrix, convolution or table for zeros everywhere, or a hole of zeros.

    array: its numbers.
    place: where they come from, for the error.

    Raises CheckpointError.
    """
    zeros, largest, at, run, longest, end = 0, 0, 0, 0, 0, 0
    for part in _magnitudes(array):
        grains = _grains(part)
        largest = max(largest, int(grains.max(initial=0)))
        for empty, length in _runs(grains == 0):
            run = run + length if empty else 0
            zeros += length if empty else 0
            at += length
            if run > longest:
                longest, end = run, at
    _refuse_nothing(array, largest, place)
    size = longest * _GRAIN
    if longest > 1 and (size * array.itemsize >= _HOLE or size * _SHARE >= array.size):
        row = (end - longest) * _GRAIN // max(array.size // len(array), 1)
        raise place.error(
            f"holds {size} zeros one after another, from row {row} of {len(array)} on",
            "weights throughout",
        )
    width = array.size // len(array)
    if width >= _GRAIN and zeros * _GRAIN >= width:
        log.warning(
            "%s: tensor %s has rows of zeros (about %d of %d): pruned, or a damaged file",
            place.file, place.name, zeros * _GRAIN // width, len(array),
        )  # fmt: skip


def check_gains(array: np.ndarray, place: Place) -> None:
    """Check the weights of a norm, or scales, for being mostly zeros.

    array: its numbers.
    place: where they come from, for the error.

    Raises CheckpointError.
    """
    parts = list(_magnitudes(array))
    _refuse_nothing(array, max((int(p.max(initial=0)) for p in parts), default=0), place)
    zeros = sum(int((part == 0).sum()) for part in parts)
    if 2 * zeros > array.size:
        raise place.error(f"holds {zeros} zeros of {array.size}", "numbers around one")


def check_table(array: np.ndarray, place: Place, *, unused: int = 0) -> None:
    """Check a vocabulary's table for a hole of zeros.

    array: [tokens, width].
    place: where it comes from, for the error.
    unused: rows at its beginning that no text has; some padding at its end may be zeros too.

    Raises CheckpointError.
    """
    parts = np.array_split(array, -(-array.size // _AT_ONCE) or 1)
    empty = np.concatenate([~(part != 0).any(-1) for part in parts])
    padding = int(empty[::-1].argmin()) if not empty.all() else len(empty)
    if padding > max(_PADDING, len(empty) // 16):
        padding = 0
    at, looked = unused, empty[unused : len(empty) - padding]
    for zero, length in _runs(looked):
        if zero and (length >= _LOST_ROWS or length * _SHARE >= len(looked)):
            raise place.error(
                f"has {length} rows of zeros, from {at} of {len(empty)} on", "a row for every token"
            )
        at += length


def check_vision(array: np.ndarray, place: Place) -> None:
    """Check a tensor of a vision network for numbers that no training leaves.

    array: its numbers.
    place: where they come from, for the error.

    Raises CheckpointError.
    """
    check_numbers(array, place)
    if array.ndim > 1:
        check_matrix(array, place)
    elif re.search(r"(norm\w*|ln_\w+)\.weight$", place.name, re.IGNORECASE):
        check_gains(array, place)


def is_nothing(array: np.ndarray) -> bool:
    """Whether all numbers of a tensor are zero or have no effect."""
    largest = max((int(part.max()) for part in _magnitudes(array)), default=0)
    return largest < _floor(array.dtype)


def _refuse_nothing(array: np.ndarray, largest: int, place: Place) -> None:
    if array.size and largest < _floor(array.dtype):
        found = "is all zeros" if largest == 0 else f"holds nothing above {_NOTHING:g}"
        raise place.error(found, "trained weights")


def _magnitudes(array: np.ndarray) -> Iterable[np.ndarray]:
    """Yield parts of an array as unsigned integers that are ordered as the numbers' magnitudes."""
    if array.dtype.kind == "b" or not array.size:
        return
    kind = np.dtype(f"u{array.itemsize}")
    mask = kind.type(2 ** (8 * array.itemsize - 1) - 1) if array.dtype.kind == "f" else None
    flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).ravel()
    flat = flat.view(kind)
    for start in range(0, flat.size, _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        yield part if mask is None else part & mask


def _grains(part: np.ndarray) -> np.ndarray:
    """The largest of every _GRAIN numbers; the last group may be shorter."""
    whole = part.size // _GRAIN * _GRAIN
    grains = part[:whole].reshape(-1, _GRAIN).max(1)
    return grains if whole == part.size else np.append(grains, part[whole:].max())


def _runs(flags: np.ndarray) -> Iterable[tuple[bool, int]]:
    """Each flag with the number of times that it comes in a row."""
    if flags.size:
        ends = np.append(np.flatnonzero(flags[1:] != flags[:-1]) + 1, flags.size)
        for start, end in zip(np.append(0, ends[:-1]).tolist(), ends.tolist(), strict=True):
            yield bool(flags[start]), end - start


def _bits(value: float, dtype: np.dtype) -> int:
    return int(np.array(value, dtype).view(f"u{dtype.itemsize}"))


def _floor(dtype: np.dtype) -> int:
    """Magnitudes below this have no effect."""
    return max(_bits(_NOTHING, dtype), 1) if dtype.kind == "f" else 1


def _where(array: np.ndarray, wrong: Callable[[np.ndarray], np.ndarray]) -> str:
    """How many numbers are wrong, and where the first one is."""
    flat, count, first = array.reshape(-1), 0, -1
    for start in range(0, flat.size, _AT_ONCE):
        part = np.flatnonzero(wrong(flat[start : start + _AT_ONCE]))
        if part.size and first < 0:
            first = start + int(part[0])
        count += part.size
    at = [int(i) for i in np.unravel_index(first, array.shape)]
    return f"{count} of {array.size}, the first at {at}"
