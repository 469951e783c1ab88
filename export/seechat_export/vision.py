"""Vision checkpoints to one torch network: pixels to embeddings, the weights left in their files.

Each loader reads headers only; the network it returns takes its weights from the files whenever it
runs or is exported.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from seechat_export.clip_settings import clip_settings
from seechat_lite.nn.bridges import BRIDGES
from seechat_lite.nn.streamed import Streamed
from seechat_lite.nn.vision import ClipTower, Vision
from seechat_weights.accounting import Shape
from seechat_weights.bundle import VisionConfig
from seechat_weights.checkpoints import open_checkpoint
from seechat_weights.errors import CheckpointError
from seechat_weights.vision_names import Part, map_bridge, map_clip


def load_vision(
    *, clip: Path, projector: Path, activation: str | None = None
) -> tuple[Streamed, VisionConfig]:
    """A CLIP vision tower and a projector as one network, which reads its weights when it runs.

    clip: a folder or file of open_clip, Hugging Face or OpenAI; its configuration lies beside it.
    projector: a file of a linear or MLP bridge. activation: "quick_gelu" or "gelu", for a CLIP
    file without configuration. Raises CheckpointError.
    """
    checkpoint, file = open_checkpoint(Path(clip)), open_checkpoint(Path(projector))
    names = map_clip(checkpoint.shapes, where=str(clip))
    settings = clip_settings(Path(clip), names, activation)
    bridge = map_bridge(file.shapes, where=str(projector))
    if bridge.inputs != names.width:
        raise CheckpointError(
            f"{projector}: takes {bridge.inputs} numbers a token; expected {names.width}, the "
            f"width of {clip}: give --clip the tower that the projector was trained with"
        )
    with torch.device("meta"):
        tower = ClipTower(
            names,
            heads=settings.heads,
            activation=settings.activation,
            layernorm_epsilon=settings.layernorm_epsilon,
        )
        network = Vision(tower, BRIDGES[bridge.name](bridge.inputs, bridge.outputs))
    parts = [("tower.clip.", names, checkpoint.read), ("bridge.", bridge, file.read)]
    tokens = (names.image_size // names.patch_size) ** 2
    config = VisionConfig(
        graph="vision.onnx",
        tokens=tokens,
        tower="clip",
        bridge=bridge.name,
        pixels=settings.pixels,
    )
    return _streamed(network, parts), config


class _Names(Protocol):
    """Where parameters come from, by their names within a part of the network."""

    @property
    def used(self) -> Mapping[str, Part]: ...
    @property
    def sizes(self) -> Mapping[str, Shape]: ...


def _streamed(
    network: nn.Module, parts: list[tuple[str, _Names, Callable[[str], np.ndarray]]]
) -> Streamed:
    """Join a network and the checkpoints of its parts; neither may have a name to spare."""
    sources = {
        prefix + name: (part, names.sizes[name], read)
        for prefix, names, read in parts
        for name, part in names.used.items()
    }
    found = {name: tuple(p.shape) for name, p in network.named_parameters()}
    expected = {name: shape for name, (_, shape, _) in sources.items()}
    if found != expected:
        wrong = sorted(k for k in found | expected if found.get(k) != expected.get(k))
        raise CheckpointError(
            f"{type(network).__name__} has other parameters than expected ({wrong[:4]}): install a "
            "transformers version that seechat-lite was tested with"
        )

    def read(name: str) -> np.ndarray:
        part, shape, published = sources[name]
        return part.read(shape, published)

    return Streamed(network, read)
