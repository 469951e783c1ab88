"""Decides what a path given for a model stands for: a bundle, or one of two published forms.

The decision is made here, once, by the names of files. No weights are read.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seechat_weights.bundle.manifest import MANIFEST
from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import Checkpoint, open_checkpoint
from seechat_weights.files.reading import first_bytes, local_path

CONFIG, TOKENIZER = "config.json", "ice_text.model"
SAT_FILE, SAT_CONFIG = "mp_rank_00_model_states.pt", "model_config.json"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a published language model.

    form: how its tensors are named.
    weights: what open_checkpoint opens.
    config: the file of its settings, or None if there is none.
    folders: where its tokenizer may lie, the first choice first.
    """

    form: Literal["huggingface", "sat"]
    weights: Path
    config: Path | None
    folders: tuple[Path, ...]

    def tokenizer(self, *names: str) -> Path:
        """The tokenizer's file; if it is missing, the path where it should be.

        names: how it may be called, the first choice first.
        """
        places = [folder / name for name in names or (TOKENIZER,) for folder in self.folders]
        return next((place for place in places if place.exists()), places[0])


class Openings:
    """Opens checkpoints for one command. Each file is read once, however often it is asked for."""

    def __init__(self) -> None:
        self._opened: dict[str, Checkpoint] = {}

    def __call__(self, path: Path) -> Checkpoint:
        """Open a checkpoint with open_checkpoint, or return the one opened before.

        path: a folder or file.

        Raises CheckpointError as open_checkpoint.
        """
        key = os.path.realpath(path)
        if key not in self._opened:
            found = open_checkpoint(path)
            self._opened[key] = found
            files = {found.source(name) for name in found.shapes}
            if len(files) == 1:  # of a folder; the file itself may be asked for next
                self._opened.setdefault(os.path.realpath(files.pop()), found)
        return self._opened[key]


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder that an export wrote, whatever its state now."""
    return (path / MANIFEST).exists()


def find_model(path: str | Path) -> ModelFiles:
    """Find the files of a published language model.

    path: a Hugging Face folder, or SAT's file or a folder that holds it.

    Raises CheckpointError.
    """
    path = local_path(path)
    if path.is_dir() and (path / CONFIG).exists():
        return ModelFiles("huggingface", path, path / CONFIG, sat_folders(path))
    file = _sat_file(path)
    folders = sat_folders(file if file.is_dir() else file.parent)
    if configs := [f / CONFIG for f in folders if (f / CONFIG).exists()]:
        # a step of a training run; it shares the settings of the model above it
        return ModelFiles("huggingface", file, configs[0], folders)
    config = next((f / SAT_CONFIG for f in folders if (f / SAT_CONFIG).exists()), None)
    if config:  # the model's own folder; its weights may be one level below
        folders = (config.parent, *(f for f in folders if f != config.parent))
    return ModelFiles("sat", file, config, folders)


def model_place(path: Path) -> Path:
    """What find_model takes for a published model.

    path: the model's folder, or one file of it.
    """
    whole = path.is_file() and (path.parent / CONFIG).is_file()
    return path.parent if whole else path


def sat_folders(folder: Path) -> tuple[Path, Path]:
    """Where the settings and the tokenizer of SAT's file may lie: in its folder, or above.

    folder: the folder of SAT's file.
    """
    return folder, folder.resolve().parent  # "." has no parent in its name


def sat_files(folder: Path) -> list[Path]:
    """SAT's files in a folder: [N/]mp_rank_00_model_states.pt; N is an iteration.

    folder: where to look.
    """
    return [p for p in (folder / SAT_FILE, *sorted(folder.glob(f"*/{SAT_FILE}"))) if p.is_file()]


def _sat_file(path: Path) -> Path:
    """SAT's one file, given itself or a folder that holds it."""
    if path.is_file() or (path.is_dir() and (path.parent / CONFIG).exists()):
        return path
    found = sat_files(path)
    if len(found) > 1 and (path / "latest").is_file():  # this file names the iteration to take
        latest = first_bytes(path / "latest", 64).decode("utf-8", "replace").strip()
        found = [p for p in found if p.parent.name == latest] or found
    if len(found) == 1:
        if list(found[0].parent.glob("mp_rank_01_*")):
            raise CheckpointError(
                f"{found[0].parent}: the model is split over several files (mp_rank_01_...); "
                "expected one: save it with SAT in one process (model_parallel_size 1)"
            )
        return found[0]
    what = f"holds {f'{len(found)} {SAT_FILE} and ' if found else ''}no {CONFIG}"
    raise CheckpointError(
        f"{path}: {what if path.exists() else 'no such folder'}; expected a folder with {CONFIG}, "
        f"weights and their tokenizer, or with one {SAT_FILE}: name such a folder, or download "
        "what it lacks (identify() says from where)",
        calls={"identify": {"path": path}},
    )
