"""Reads published weights safely and lazily: what a checkpoint holds, and one tensor at a time.

It reads Hugging Face and open_clip folders (safetensors or torch's .bin, in one file or in shards)
and single files: safetensors, torch's zip archives, its older format without zip, and TorchScript.
The first bytes of a file tell its format. Opening a file reads its headers. A tensor is mapped when
it is read, so a 13 GB checkpoint never has to fit into memory. No code in a file ever runs, and
torch is not needed.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import (
    first_bytes,
    line,
    local_path,
    read_json,
    shown,
    unreadable,
)
from seechat_weights.files.tensor_view import (
    MAX_TENSORS,
    Block,
    TensorInfo,
    TensorView,
    open_safetensors,
    verify,
)
from seechat_weights.files.torch_save import open_torch

__all__ = [
    "STEMS",
    "Checkpoint",
    "NoWeightsError",
    "Opener",
    "TensorInfo",
    "open_checkpoint",
    "read_json",
]

# the names of a folder's weights, the first choice first: safetensors before pickles
STEMS = (
    ("model", ".safetensors"),
    ("open_clip_model", ".safetensors"),
    ("pytorch_model", ".bin"),
    ("open_clip_pytorch_model", ".bin"),
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
DEEPSPEED = "mp_rank_00_model_states.pt"  # SwissArmyTransformer's as well
# files that training keeps beside the weights
_STATES = re.compile(r"(optimizer|scheduler|rng_state|scaler|training_args|random_states|bf16_)")
# files that people take for such weights: first bytes, what the file is, what to do
_CONVERTED = "get the weights it was made from, in safetensors or .bin"
_ARCHIVE = "unpack it and name the folder"
_OTHERS = (
    (rb"GGUF", "a GGUF file, converted for llama.cpp", _CONVERTED),
    (rb"ggml", "a GGML file, converted for chatglm.cpp", _CONVERTED),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x3a\x42]", "an ONNX graph", _CONVERTED),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|\xfd7zXZ|BZh|PK", "an archive", _ARCHIVE),
    (rb"\s*<(!|\?xml|html)", "a web page", "look at it: the site may ask you to log in first"),
    (rb"\s*[\[{]", "a text in JSON", "name the file that holds the weights"),
)
_UNKNOWN = (b"", "not a checkpoint", "name the right file or download it again")


class SeveralFilesError(CheckpointError):
    """A folder holds several files of weights, and nothing says which one is meant."""


class NoWeightsError(CheckpointError):
    """A folder holds no weights under the names that libraries use."""


class Checkpoint:
    """Tensors of one or several files, under their published names. Made by `open_checkpoint`.

    path: the folder or file.
    files: the files that hold the tensors.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.shapes: dict[str, TensorInfo] = {}
        self._stored: dict[str, TensorView] = {}
        self._verified: set[tuple[Path, Block]] = set()
        for file in files:
            tensors = _open_file(file)
            if len(self._stored) + len(tensors) > MAX_TENSORS:
                raise CheckpointError(
                    f"{path}: holds more than {MAX_TENSORS} tensors in its files; expected fewer: "
                    "download it from its publisher"
                )
            for key, stored in tensors.items():
                if key in self._stored:
                    raise CheckpointError(
                        f"{path}: tensor {key} is in {self.source(key).name} and in {file.name}; "
                        "expected it once: download the checkpoint again into an empty folder"
                    )
                self._stored[key], self.shapes[key] = stored, stored.info

    def source(self, key: str) -> Path:
        """The file that holds the tensor `key`."""
        return self._stored[key].file

    def read(self, key: str) -> np.ndarray:
        """Read one tensor as stored; bfloat16, which numpy lacks, comes as float32.

        The array may be a private view of the mapped file; it is unmapped when the array goes. If
        the container has checksums, the tensor's is compared when it is first read.

        key: the tensor's published name.

        Raises CheckpointError for a dtype that numpy cannot hold, or a file that went bad.
        """
        stored = self._stored[key]
        file = stored.file
        try:
            if (file, stored.block) not in self._verified:
                verify(file, stored.block)
                self._verified.add((file, stored.block))
            return stored.read()
        except (OSError, TypeError, ValueError) as e:
            raise CheckpointError(
                f"{file}: tensor {key} ({self.shapes[key].dtype}) cannot be read ({line(e)}); "
                "expected float16, float32, bfloat16 or int8: download the file again"
            ) from None


Opener = Callable[[Path], Checkpoint]  # open_checkpoint, or something that calls it


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; this reads headers only.

    A folder that holds both safetensors and .bin is read from safetensors. The sizes stated in an
    index are not trusted; the headers of the files are.

    path: a folder or a file.

    Raises CheckpointError: nothing there, a Git LFS pointer, a truncated file, a missing shard, a
    shard that lacks a tensor that the index names, a tensor in two shards, or a pickle that would
    run code.
    """
    path = local_path(path)
    try:
        path.stat()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file or folder; expected a checkpoint folder or a "
            ".safetensors, .bin, .pth or .pt file: check the path"
        ) from None
    except (OSError, ValueError) as e:  # a loop of links; a null character
        raise unreadable(path, e) from None
    return _open_folder(path) if path.is_dir() else Checkpoint(path, [path])


def _open_folder(folder: Path) -> Checkpoint:
    for stem, suffix in STEMS:
        single, index = folder / (stem + suffix), folder / f"{stem}{suffix}.index.json"
        if os.path.lexists(single):  # a broken link is an error of its own
            return Checkpoint(folder, [single])
        if os.path.lexists(index):
            return _open_indexed(folder, index)
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            return Checkpoint(folder, _all_shards(folder, stem, suffix, shards))
    if file := _training_file(folder):
        return Checkpoint(folder, [file])
    looked_for = ", ".join(stem + suffix for stem, suffix in STEMS)
    raise NoWeightsError(
        f"{folder}: holds no weights; looked for {looked_for}, each also in shards with an "
        ".index.json: download the weights into this folder or name the file itself"
    )


def _training_file(folder: Path) -> Path | None:
    """The one file of weights that a training run left in its folder, under its own name.

    Raises CheckpointError if the weights are in parts that only the run's own library joins, or in
    several files.
    """
    deepspeed = [p for p in (folder, *sorted(folder.glob("*/"))) if (p / DEEPSPEED).is_file()]
    if len(deepspeed) > 1 and (folder / "latest").is_file():  # names the step to take
        latest = first_bytes(folder / "latest", 64).decode("utf-8", "replace").strip()
        deepspeed = [p for p in deepspeed if p.name == latest] or deepspeed
    for step in (folder, *folder.glob("global_step*/")):
        if next(step.glob("zero_pp_rank_*_mp_rank_*_model_states.pt"), None):
            raise CheckpointError(
                f"{step}: weights that DeepSpeed's ZeRO-3 split over its processes; expected whole "
                "ones: run `python zero_to_fp32.py . pytorch_model.bin` in the folder that has "
                "that script"
            )
        if next(step.glob("mp_rank_01_*"), None):
            raise CheckpointError(
                f"{step}: the model is split over several files (mp_rank_01_...); expected one: "
                "save it in one process (model_parallel_size 1)"
            )
    if next(folder.glob("**/*.distcp"), None):
        raise CheckpointError(
            f"{folder}: weights that FSDP split over its processes (*.distcp); expected whole "
            "ones: join them with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if len(deepspeed) == 1:
        return deepspeed[0] / DEEPSPEED
    files = [
        p
        for p in sorted(folder.iterdir())
        if p.suffix in WEIGHT_SUFFIXES and p.is_file() and not _STATES.match(p.name)
    ]
    files = [d / DEEPSPEED for d in deepspeed] or files
    if len(files) > 1:
        names = ", ".join(shown(str(p.relative_to(folder))) for p in files[:8])
        raise SeveralFilesError(
            f"{folder}: holds {len(files)} files of weights ({names}); expected one model: name "
            "one of the files"
        )
    return files[0] if files else None


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    sound = isinstance(weight_map, dict) and all(type(n) is str for n in weight_map.values())
    if not isinstance(weight_map, dict) or not sound or not weight_map:
        raise CheckpointError(
            f'{index}: lacks "weight_map", expected tensor names and their files: '
            "download the file again"
        )
    for name in sorted(set(weight_map.values())):
        plain = name.isprintable() and len(name) < 256 and not set(name) & set("/\\:")
        if not plain or name in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: names the file {shown(name)}, expected one in the same folder; refused: "
                "download the checkpoint from its publisher"
            )
        if not os.path.lexists(folder / name):  # lexists accepts any name, however long
            raise CheckpointError(
                f"{folder / name}: missing; {index.name} names it: download this shard"
            )
    checkpoint = Checkpoint(folder, [folder / n for n in sorted(set(weight_map.values()))])
    for key, name in weight_map.items():
        if key not in checkpoint.shapes or checkpoint.source(key).name != name:
            raise CheckpointError(
                f"{folder / name}: lacks tensor {shown(key)}; {index.name} says it holds it: "
                "download the shard and the index again"
            )
    return checkpoint


def _all_shards(folder: Path, stem: str, suffix: str, shards: list[Path]) -> list[Path]:
    """The shards of a folder without an index; they are complete if their numbers are."""
    number = re.fullmatch(r".*-of-([0-9]{1,6})", shards[0].name.removesuffix(suffix))
    total = number[1] if number else "?"
    there = set(shards)
    expected = (
        folder / f"{stem}-{i:0{len(total)}}-of-{total}{suffix}"
        for i in range(1, int(total) + 1 if number else 1)
    )
    missing = next((path for path in expected if path not in there), None)
    if number and missing is None and len(shards) == int(total):
        return shards
    missing = missing or shards[-1]
    raise CheckpointError(
        f"{missing}: missing or of another numbering; found {len(shards)} shards and no "
        f"{stem}{suffix}.index.json, expected {total}: download the checkpoint again"
    )


def _open_file(path: Path) -> dict[str, TensorView]:
    head = first_bytes(path)
    other = next((row for row in _OTHERS if re.match(row[0], head, re.IGNORECASE)), None)
    try:
        # torch.save writes a zip archive or, before 1.6, a sequence of pickles (protocol 2 on)
        if head[8:9] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
            tensors = open_torch(path, zipped=head.startswith(b"PK"))
        elif head[8:9] == b"{" or (path.suffix == ".safetensors" and not other):
            tensors = open_safetensors(path)
        else:
            _, found, do = other or _UNKNOWN
            raise CheckpointError(
                f"{path}: {found}; expected a .safetensors file, or one by torch.save "
                f"(.bin, .pth, .pt): {do}"
            )
    except OSError as e:
        raise unreadable(path, e) from None
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no tensors; expected a state dict: name the file that has the weights"
        )
    return tensors
