"""Safe, lazy readers of published weights: what is in a checkpoint, and one tensor at a time.

Read are Hugging Face and open_clip folders (safetensors or torch's .bin, in one file or in shards)
and single files (.safetensors, .bin, .pth, .pt, torch's old format that is no zip included). Files
are memory-mapped, one at a time, so a 13 GB checkpoint never has to fit into memory. Pickles are
read by torch with `weights_only`: no code in them ever runs. torch is imported only for them and
for bfloat16.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from seechat_weights.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"

# what a folder's weights are called, first choice first: safetensors before pickles
_STEMS = (
    ("model", ".safetensors"),
    ("open_clip_model", ".safetensors"),
    ("pytorch_model", ".bin"),
    ("open_clip_pytorch_model", ".bin"),
)
# a training script's wrapping of the weights; the rest (optimizer, epoch, ...) is of no use here
_WRAPPERS = ("model", "state_dict", "module")
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str  # as stored: "float16", "float32", "bfloat16", "int8", ...


class Checkpoint:
    """Tensors of one or several files, by their published names. Made by `open_checkpoint`."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.shapes: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._mapped: _File | None = None  # at most one file is open: the last one read from
        for file in files:
            for key, info in self._open(file).shapes.items():
                if key in self._files:
                    raise CheckpointError(
                        f"{path}: tensor {key} is in {self._files[key].name} and in {file.name}; "
                        "expected it once: download the checkpoint again into an empty folder"
                    )
                self._files[key], self.shapes[key] = file, info

    def source(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._files[key]

    def read(self, key: str) -> np.ndarray:
        """One tensor as stored; bfloat16, which numpy lacks, comes as float32.

        The array may be a view of the mapped file: reading the keys file by file is fastest.
        Raises CheckpointError for a dtype that numpy cannot hold or a file that went bad.
        """
        file = self._files[key]
        try:
            return self._open(file).read(key)
        except (SafetensorError, OSError, TypeError, AttributeError, RuntimeError) as e:
            raise CheckpointError(
                f"{file}: tensor {key} ({self.shapes[key].dtype}) cannot be read ({_line(e)}); "
                "expected float16, float32, bfloat16 or int8: download the file again"
            ) from None

    def _open(self, file: Path) -> "_File":
        if self._mapped is None or self._mapped.path != file:
            self._mapped = None  # unmap the last file before the next is mapped
            self._mapped = _open_file(file)
        return self._mapped


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder or file; reads headers only (torch's old format: the whole file).

    A folder that holds safetensors and .bin is read from safetensors. Sizes stated in an index are
    not believed, the files' own headers are.
    Raises CheckpointError: nothing there, Git LFS pointer, truncated file, missing shard, a shard
    that lacks what the index names, a tensor in two shards, a pickle that is more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a checkpoint folder or a "
            ".safetensors, .bin, .pth or .pt file: check the path"
        )
    return Checkpoint(path, [path])


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON object (config, index). Raises CheckpointError."""
    _refuse_unreadable(path)
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{path}: not valid JSON ({_line(e)}); expected an object: download the file again"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: holds a JSON {type(data).__name__}; expected an object: "
            "download the file again"
        )
    return data


def _open_folder(folder: Path) -> Checkpoint:
    for stem, suffix in _STEMS:
        single, index = folder / (stem + suffix), folder / f"{stem}{suffix}.index.json"
        if single.exists():
            return Checkpoint(folder, [single])
        if index.exists():
            return _open_indexed(folder, index)
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            return Checkpoint(folder, _all_shards(folder, stem, suffix, shards))
    looked_for = ", ".join(stem + suffix for stem, suffix in _STEMS)
    raise CheckpointError(
        f"{folder}: holds no weights; looked for {looked_for}, each also in shards with an "
        ".index.json: download the weights into this folder or name the file itself"
    )


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{index}: lacks "weight_map", expected tensor names and their files: '
            "download the file again"
        )
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{index}: names the file {name!r}, expected one in the same folder; refused: "
                "download the checkpoint from its publisher"
            )
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: missing; {index.name} names it: download this shard"
            )
    checkpoint = Checkpoint(folder, [folder / n for n in sorted(set(weight_map.values()))])
    for key, name in weight_map.items():
        if key not in checkpoint.shapes or checkpoint.source(key).name != name:
            raise CheckpointError(
                f"{folder / name}: lacks tensor {key}, which {index.name} says it holds: "
                "download the shard and the index again"
            )
    return checkpoint


def _all_shards(folder: Path, stem: str, suffix: str, shards: list[Path]) -> list[Path]:
    """Shards without an index: complete if their numbers are."""
    total = shards[0].name.removesuffix(suffix).rpartition("-")[2]
    expected = [
        folder / f"{stem}-{i:0{len(total)}}-of-{total}{suffix}"
        for i in range(1, int(total) + 1 if total.isdigit() else 1)
    ]
    if shards == expected:
        return shards
    missing = next((p for p in expected if p not in shards), shards[-1])
    raise CheckpointError(
        f"{missing}: missing or of another numbering; found {len(shards)} shards and no "
        f"{stem}{suffix}.index.json, expected {total}: download the checkpoint again"
    )


class _File(NamedTuple):
    """An open, mapped file; unmapped when the last reference goes."""

    path: Path
    shapes: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]


def _open_file(path: Path) -> _File:
    head = _refuse_unreadable(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    # torch.save writes a zip archive or, before 1.6, a sequence of pickles (protocol 2 on)
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path}: not a torch file; expected a .safetensors, .bin, .pth or .pt checkpoint: "
            "name the right file or download it again"
        )
    return _open_torch(path, zipped=head.startswith(b"PK"))


def _open_safetensors(path: Path) -> _File:
    try:
        file = safe_open(path, framework="numpy")
        shapes = {}
        for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            part = file.get_slice(key)
            dtype = str(part.get_dtype())
            shapes[key] = TensorInfo(tuple(part.get_shape()), _DTYPES.get(dtype, dtype))
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(
            f"{path}: damaged or truncated ({_line(e)}); expected a safetensors file: "
            "download it again"
        ) from None

    def read(key: str) -> np.ndarray:
        if shapes[key].dtype != "bfloat16":
            return file.get_tensor(key)
        with safe_open(path, framework="pt") as torch_file:  # numpy has no bfloat16
            return torch_file.get_tensor(key).float().numpy()

    return _File(path, shapes, read)


def _open_torch(path: Path, *, zipped: bool) -> _File:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: a torch file; expected torch to read it: "
            "pip install 'seechat-lite[export]', or convert the file to safetensors"
        ) from None

    if zipped and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: truncated, the end of the zip archive is missing; expected a whole "
            "torch file: download it again"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as e:
        # torch names what it refused as "GLOBAL os.system was not an allowed global by default"
        refused = re.search(r"GLOBAL (\S+)", str(e))
        if refused:
            raise CheckpointError(
                f"{path}: unsafe pickle, it calls {refused[1]}; refused, nothing of it was run; "
                "expected tensors alone: get a safetensors file, or one that holds only the weights"
            ) from None
        raise _not_torch(path, e) from None
    # a damaged archive surfaces as almost anything from inside torch's reader
    except Exception as e:
        raise _not_torch(path, e) from None

    wrapped = loaded if isinstance(loaded, Mapping) else {}
    inner = next((wrapped[n] for n in _WRAPPERS if isinstance(wrapped.get(n), Mapping)), wrapped)
    tensors = {str(k): v.detach() for k, v in inner.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no tensors; expected a state dict: name the file that has the weights"
        )
    if all(k.startswith("module.") for k in tensors):  # written by a data-parallel training run
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    shapes = {k: TensorInfo(tuple(v.shape), str(v.dtype)[6:]) for k, v in tensors.items()}

    def read(key: str) -> np.ndarray:
        tensor = tensors[key]
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return _File(path, shapes, read)


def _not_torch(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged, truncated or no state dict ({_line(error)}); expected a file written "
        "by torch.save: download it again"
    )


def _refuse_unreadable(path: Path) -> bytes:
    """The first bytes of a file, or a CheckpointError if there is nothing in it to read."""
    try:
        with path.open("rb") as f:
            head = f.read(len(LFS_POINTER))
    except OSError as e:
        raise CheckpointError(
            f"{path}: cannot be read ({e.strerror}); expected a checkpoint file: check the path"
        ) from None
    if head == LFS_POINTER:
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file itself; expected the real file: "
            "run `git lfs pull` or download it from the model page"
        )
    if not head:
        raise CheckpointError(f"{path}: empty; expected a checkpoint file: download it again")
    return head


def _line(error: Exception) -> str:
    """An error's first line, short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
