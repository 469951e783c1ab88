"""Finds where each tensor lies in the files of torch.save and torch.jit.save, without torch.

Since torch 1.6 a file is a zip archive of uncompressed entries: data.pkl describes the tensors, and
data/KEY holds the numbers of each storage. Before 1.6 a file was a sequence of pickles with the
storages after them. TorchScript archives also hold a folder of code; it is never read.
"""

import io
import mmap
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from seechat_weights.errors import CheckpointError
from seechat_weights.files.pickle_data import MAX_BYTES, Inert, Storage, Tensor, Window, unpickle
from seechat_weights.files.reading import line, shown
from seechat_weights.files.tensor_view import (
    ITEM_BYTES,
    MAX_NAME,
    MAX_TENSORS,
    Block,
    TensorInfo,
    TensorView,
    check_names,
)
from seechat_weights.files.untrusted import open_file

MAX_DIRECTORY = 8 << 20  # bytes of a zip's table of contents; a shard of ChatGLM-6B has 10 kB
# keys that training scripts wrap weights in; the rest (optimizer, epoch, ...) is not needed
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
# prefixes that data-parallel, compiled or sharded training puts before a model's names
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
# a Lightning module's name for the model; removed if names of this family follow it
_FAMILY = re.compile(r"model\.(transformer|lm_head|image_encoder|base_model)\.")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and the extra field
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_MAX_DEPTH = 32  # of modules in a TorchScript archive


def open_torch(path: Path, *, zipped: bool) -> dict[str, TensorView]:
    """The tensors of a file by torch.save, without a training script's wrapping.

    path: the file.
    zipped: whether it is a zip archive, else the format before torch 1.6.

    Raises CheckpointError for a truncated, damaged or hostile file.
    """
    with open_file(path) as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        loaded, blocks = _read_zip(path, data) if zipped else _read_legacy(path, data)
    tensors, state = {}, _state_dict(path, loaded)
    check_names(path, state)
    for name, tensor in state.items():
        storage = tensor.storage
        shape, strides = _sizes(tensor.shape), _sizes(tensor.strides)
        block = blocks.get(storage.key)
        if block is None or block.size != storage.count * ITEM_BYTES[storage.dtype]:
            there = "missing" if block is None else f"{block.size} bytes"
            raise _damaged(
                path,
                f"storage {shown(storage.key)} of tensor {shown(name)} is {there}, the pickle says "
                f"{storage.count} numbers of {storage.dtype}",
            )
        info = TensorInfo(shape, storage.dtype)
        tensors[name] = TensorView(path, info, block, tensor.offset, strides)
        tensors[name].check(name)
    return tensors


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, Block]]:
    blocks, entries = {}, _entries(path, data)
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        names = ", ".join(shown(entry.filename) for entry in entries[:3])
        raise CheckpointError(
            f"{path}: an archive of {names or 'nothing'}; expected a file written by torch.save: "
            "unpack it and name the folder or the file in it"
        )
    for entry in entries:
        # compressed entries are left out: torch compresses nothing that is needed here
        if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:
            blocks[entry.filename] = Block(entry.header_offset, entry.file_size, entry.CRC)
    pickles = [name for name in blocks if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _damaged(path, f"a zip archive with {len(pickles)} uncompressed data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = blocks.get(f"{root}byteorder")
    if order and data[order.start : order.start + min(order.size, 6)] != b"little":
        raise _damaged(path, "numbers in another byte order than little")
    pickle = blocks[pickles[0]]
    if pickle.size > MAX_BYTES:
        raise _damaged(path, f"a pickle of {pickle.size} bytes")
    loaded = unpickle(Window(data, pickle.start, pickle.start + pickle.size), str(path))
    prefix = f"{root}data/"
    return loaded, {n.removeprefix(prefix): b for n, b in blocks.items() if n.startswith(prefix)}


def _entries(path: Path, data: mmap.mmap) -> list[zipfile.ZipInfo]:
    """The entries of a zip, with `header_offset` moved on to their contents; none may overlap."""
    try:
        with zipfile.ZipFile(_Bounded(data)) as archive:
            entries = sorted(archive.infolist(), key=lambda e: e.header_offset)
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:
        raise _damaged(path, f"no zip archive: {line(e)}") from None
    names = {e.filename for e in entries}
    if len(names) < len(entries):
        raise _damaged(path, "a zip archive with an entry twice")
    at = 0
    for entry in entries:
        start = entry.header_offset
        header = data[start : start + _LOCAL_HEADER.size] if at <= start else b""
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise _damaged(path, f"zip entry {shown(entry.filename)} overlaps or has no header")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        entry.header_offset = start + _LOCAL_HEADER.size + name + extra
        at = entry.header_offset + entry.compress_size
        if at > end or (not entry.compress_type and entry.compress_size != entry.file_size):
            raise _damaged(path, f"zip entry {shown(entry.filename)} is larger than its place")
    return entries


class _Bounded(io.RawIOBase):
    """A mapped file for zipfile with a limit on the table of contents; zipfile has none."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(len(self._data) - self._at, 0)
        size = left if size < 0 else min(size, left)
        if size > MAX_DIRECTORY:
            raise ValueError(f"a table of contents of {size} bytes")
        part = self._data[self._at : self._at + size]
        self._at += size
        return part


def _read_legacy(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, Block]]:
    window = Window(data, 0, len(data))
    where = str(path)
    if unpickle(window, where) != _MAGIC or unpickle(window, where) != _PROTOCOL:
        raise _damaged(path, "a pickle, but none by torch.save")
    system = unpickle(window, where)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _damaged(path, "numbers in another byte order than little")
    storages: dict[str, Storage] = {}
    loaded = unpickle(window, where, storages)
    keys = unpickle(window, where)
    if not isinstance(keys, list) or not all(isinstance(k, str | int) for k in keys):
        raise _damaged(path, "no list of storages")
    at, blocks = window.tell(), {}
    for key in map(str, keys):
        count = int.from_bytes(data[at : at + 8], "little")
        if key not in storages or key in blocks or count != storages[key].count:
            raise _damaged(path, f"storage {shown(key)} is not the one described")
        blocks[key] = Block(at + 8, count * ITEM_BYTES[storages[key].dtype])
        at += 8 + blocks[key].size
        if at > len(data):
            raise _damaged(path, f"truncated in storage {shown(key)}")
    return loaded, blocks


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Names and tensors of an unpickled object: a dictionary, wrapped or not, or modules."""
    if isinstance(loaded, Inert) and loaded.name.startswith("__torch__."):
        return _of_modules(path, loaded)
    wrapped = _items(loaded) or {}
    inner = next((i for n in _WRAPPERS if (i := _items(wrapped.get(n))) is not None), wrapped)
    tensors = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
    while tensors:
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), "")
        if all(_FAMILY.match(k) for k in tensors):
            prefix = "model."
        if not prefix:
            break
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _items(value: Any) -> dict[Any, Any] | None:
    return (
        value.items
        if isinstance(value, Inert) and value.items
        else (value if isinstance(value, dict) else None)
    )


def _of_modules(path: Path, root: Inert) -> dict[str, Tensor]:
    """A TorchScript file's tensors: attributes of nested modules, their names joined by dots."""
    tensors: dict[str, Tensor] = {}
    todo: list[tuple[str, Any, int]] = [("", root, 0)]
    seen: set[int] = set()
    while todo:
        prefix, module, depth = todo.pop()
        attributes = module.state if isinstance(module.state, dict) else {}
        # modules may share a state; then each of its tensors has several names
        if len(tensors) + len(attributes) > MAX_TENSORS:
            raise _damaged(path, f"more than {MAX_TENSORS} attributes of modules")
        for name, value in attributes.items():
            if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                raise _damaged(path, "a module's attribute without a proper name")
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Inert) and depth < _MAX_DEPTH and id(value) not in seen:
                seen.add(id(value))
                todo.append((f"{prefix}{name}.", value, depth + 1))
    return tensors


def _sizes(sizes: Any) -> tuple[int, ...]:
    """A shape or strides: a tuple, or the torch.Size that newer files hold."""
    if isinstance(sizes, Inert) and sizes.name == "torch.Size" and isinstance(sizes.state, tuple):
        sizes = sizes.state[0] if len(sizes.state) == 1 else ()
    return sizes if isinstance(sizes, tuple) else (-1,)  # refused by TensorView.check


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged or truncated ({what}); expected a file written by torch.save: "
        "download it again"
    )
