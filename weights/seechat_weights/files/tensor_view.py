"""Describes a tensor where it lies in a file, checks its bounds, and maps it when it is read.

Also reads the safetensors format, whose header says just that
(https://github.com/huggingface/safetensors).
"""

import math
import mmap
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import MAX_JSON, parse_json, shown
from seechat_weights.files.untrusted import open_file

# bytes of a number; the float8 kinds are described but cannot be read
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "int64": 8, "int32": 4,
    "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "F8_E4M3": 1,
    "F8_E5M2": 1,
}  # fmt: skip
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F8_E4M3": "F8_E4M3", "F8_E5M2": "F8_E5M2",
}  # fmt: skip
MAX_TENSORS = 1 << 16  # of a checkpoint; published ones have up to 1500
MAX_NAME = 512  # characters of a tensor's name; published ones have up to 90
_MAX_RANK = 8  # published tensors have up to 5 dimensions
_MAX_SIZE = 2**48
_CHUNK = 1 << 20


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # as stored: "float16", "float32", "bfloat16", "int8", ...


@dataclass(frozen=True)
class Block:
    """Bytes of a file that hold one tensor, or several that share them."""

    start: int
    size: int
    crc32: int | None = None  # if the container has one


@dataclass(frozen=True)
class TensorView:
    """A tensor in a file."""

    file: Path
    info: TensorInfo
    block: Block
    offset: int  # of the first number in the block; offset and strides count numbers
    strides: tuple[int, ...]

    def check(self, name: str) -> None:
        """Check that the tensor's numbers lie in its block, and are no more than the block holds.

        name: the tensor's name, for the error.

        Raises CheckpointError.
        """
        shape, strides = self.info.shape, self.strides
        # first: many tensors may share one shape of a million sizes
        if len(shape) != len(strides) or len(shape) > _MAX_RANK:
            raise self._absurd(name, f"{len(shape)} dimensions and {len(strides)} strides")
        sizes = (self.offset, *shape, *strides)
        if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in sizes):
            raise self._absurd(name, "sizes that are no sizes")
        count, room = math.prod(shape), self.block.size // ITEM_BYTES[self.info.dtype]
        if math.prod(n for n in shape if n) >= _MAX_SIZE:  # numpy refuses it even if it is empty
            raise self._absurd(name, f"shape {list(shape)}")
        last = self.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count and (count > room or last >= room):
            raise self._absurd(
                name, f"shape {list(shape)} from number {self.offset} on in a storage of {room}"
            )

    def read(self) -> np.ndarray:
        """Read the tensor as stored, bfloat16 as float32; a view of the mapped file where possible.

        Raises OSError, and TypeError for a dtype that numpy lacks.
        """
        shape, dtype = self.info
        kind = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        if not math.prod(shape):
            return np.empty(shape, np.float32 if dtype == "bfloat16" else kind)
        last = sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True))
        start = self.block.start + self.offset * kind.itemsize
        skip = start % mmap.ALLOCATIONGRANULARITY
        size = skip + (last + 1) * kind.itemsize
        with open_file(self.file) as f:
            # private and writable: a caller's change never reaches the file
            mapped = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY, offset=start - skip)
        flat = np.frombuffer(mapped, kind, offset=skip)
        strides = [s * kind.itemsize for s in self.strides]
        array = np.lib.stride_tricks.as_strided(flat, shape, strides)
        if dtype == "bfloat16":  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.require(array, requirements=["C", "A"])

    def _absurd(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: tensor {shown(name)} has {what}; expected it to lie within its storage: "
            "the file is damaged or made to mislead, download it from its publisher"
        )


def check_names(path: Path, names: Collection[str]) -> None:
    """Check the number and the form of a checkpoint's tensor names.

    A small file can name very many tensors, and each takes memory. So this check comes before they
    are made.

    path: the file, for errors.
    names: the names.

    Raises CheckpointError for more tensors than any model has, or a malformed name.
    """
    if len(names) > MAX_TENSORS:
        raise CheckpointError(
            f"{path}: holds {len(names)} tensors; expected at most {MAX_TENSORS}: download it from "
            "its publisher"
        )
    for name in names:
        if len(name) > MAX_NAME or not name.isprintable():
            raise CheckpointError(
                f"{path}: a tensor is called {shown(name)}; expected a name of at most {MAX_NAME} "
                "printable characters: download it from its publisher"
            )


def verify(file: Path, block: Block) -> None:
    """Compare a block of a file with its checksum.

    file: the file.
    block: its block.

    Raises CheckpointError if they differ, OSError if the file cannot be read.
    """
    if block.crc32 is None:
        return
    found, left = 0, block.size
    with open_file(file) as f:
        f.seek(block.start)
        while left and (chunk := f.read(min(left, _CHUNK))):
            found = zlib.crc32(chunk, found)
            left -= len(chunk)
    if left or found != block.crc32:
        raise CheckpointError(
            f"{file}: the checksum of {block.size} bytes at {block.start} is wrong; expected "
            f"{block.crc32:08x}: the file is damaged, download it again"
        )


def open_safetensors(path: Path) -> dict[str, TensorView]:
    """The tensors of a safetensors file; reads only its header.

    path: the file.

    Raises CheckpointError for a header that does not describe exactly the bytes of the file.
    """
    with open_file(path) as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_JSON):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        text = f.read(length)
    header = parse_json(text, f"{path}: header")
    header.pop("__metadata__", None)
    check_names(path, header)
    base, tensors = 8 + length, {}
    for name, entry in header.items():
        tensors[name] = _described(path, name, entry, base)
        tensors[name].check(name)
    # the tensors follow each other to the end without a gap
    at = base
    for name, stored in sorted(tensors.items(), key=lambda t: (t[1].block.start, t[1].block.size)):
        if stored.block.start != at:
            raise _damaged(path, f"tensor {shown(name)} overlapping another, or after a gap")
        at += stored.block.size
    if at != size:
        raise _damaged(path, f"{at} bytes described in a file of {size}")
    return tensors


def _described(path: Path, name: str, entry: Any, base: int) -> TensorView:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {shown(name)} without dtype, shape and data_offsets")
    kind, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise _damaged(path, f"tensor {shown(name)} without a shape and two offsets")
    if len(shape) > _MAX_RANK:
        raise _damaged(path, f"tensor {shown(name)} of {len(shape)} dimensions")
    if not isinstance(kind, str) or kind not in _SAFETENSORS_DTYPES:
        raise _damaged(path, f"tensor {shown(name)} of dtype {shown(kind)}, which is not known")
    if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in (*shape, *span)):
        raise _damaged(path, f"tensor {shown(name)} with sizes that are no sizes")
    dtype = _SAFETENSORS_DTYPES[kind]
    count, strides = 1, []
    for n in reversed(shape):
        strides.insert(0, count)
        count *= n
        if count > _MAX_SIZE:
            break
    begin, end = span
    if end - begin != count * ITEM_BYTES[dtype]:
        raise _damaged(path, f"tensor {shown(name)} of shape {shape} in {end - begin} bytes")
    info = TensorInfo(tuple(shape), dtype)
    return TensorView(path, info, Block(base + begin, end - begin), 0, tuple(strides))


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged or truncated ({what}); expected a safetensors file: download it again"
    )
