"""Vision checkpoints to one torch network: pixels to embeddings, the weights left in their files.

Each loader reads headers only; the network it returns takes its weights from the files whenever it
runs or is exported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from seechat_export.clip_settings import clip_settings
from seechat_lite.nn.blip import EvaTower, QFormerBridge, resized_positions
from seechat_lite.nn.bridges import BRIDGES
from seechat_lite.nn.streamed import Streamed
from seechat_lite.nn.vision import ClipTower, Vision
from seechat_weights.accounting import Shape
from seechat_weights.blip_names import (
    BlipNames,
    BlipSettings,
    Overlay,
    map_seechat,
    map_visualglm,
    seechat_overlay,
    visualglm_overlay,
)
from seechat_weights.bundle import PixelSpec, VisionConfig
from seechat_weights.checkpoints import open_checkpoint, read_json
from seechat_weights.errors import CheckpointError
from seechat_weights.lm import SAT_CONFIG, sat_file
from seechat_weights.vision_names import Part, map_bridge, map_clip

PUBLISHED = BlipSettings()


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


def load_seechat(
    *,
    eva: Path | None = None,
    qformer: Path | None = None,
    checkpoint: Path | None = None,
    settings: BlipSettings = PUBLISHED,
    image_size: int | None = None,
) -> tuple[Streamed, VisionConfig]:
    """SEEChat's vision: EVA ViT-g, ln_vision, Q-Former and projector, each in the file loaded last.

    eva: eva_vit_g.pth. qformer: blip2_pretrained_flant5xxl.pth. checkpoint: checkpoint_N.pth, of
    which the language model's tensors are left to seechat_weights.lm. A file may be left out where
    the others hold all of it. image_size: pixels a side, where not those of the weights; position
    embeddings are resized for it. Raises CheckpointError.
    """
    given = {"eva": eva, "qformer": qformer, "checkpoint": checkpoint}
    opened = {role: open_checkpoint(Path(p)) if p else None for role, p in given.items()}
    source = seechat_overlay(**opened)
    names = map_seechat(source, blocks=settings.blocks)
    return _blip(source, names, settings, image_size)


def load_visualglm(
    path: Path, *, settings: BlipSettings | None = None
) -> tuple[Streamed, VisionConfig] | None:
    """VisualGLM-6B's vision, from its Hugging Face folder or SAT file; None if `path` has none.

    settings: default, what the configuration beside the weights says. Raises CheckpointError.
    """
    path = Path(path)
    published = path.is_dir() and (path / "config.json").exists()
    file = path if published else sat_file(path)
    source = visualglm_overlay(open_checkpoint(file))
    if source is None:
        return None
    places = [path / "config.json"] if published else [d / SAT_CONFIG for d in file.parents[:2]]
    config = next((read_json(p) for p in places if p.exists()), {})
    if settings is None:
        settings = BlipSettings(
            heads=_heads(config, "eva", PUBLISHED.heads),
            query_heads=_heads(config, "qformer", PUBLISHED.query_heads),
        )
    return _blip(source, map_visualglm(source), settings, None)


def _heads(config: Mapping[str, Any], part: str, published: int) -> int:
    """How many heads a part has, from VisualGLM-6B's config.json or SAT's model_config.json."""
    for name in (f"{part}_config", f"{part}_args"):
        if isinstance(config.get(name), dict):
            return int(config[name].get("num_attention_heads", published))
    return published


def _blip(
    source: Overlay, names: BlipNames, settings: BlipSettings, image_size: int | None
) -> tuple[Streamed, VisionConfig]:
    for what, width, heads in (
        ("the ViT", names.width, settings.heads),
        ("the Q-Former", names.query_width, settings.query_heads),
    ):
        if heads < 1 or width % heads:
            raise CheckpointError(
                f"{source.where}: width {width} of {what} in {heads} attention heads; expected a "
                "multiple: give the files of BLIP-2, SEEChat or VisualGLM-6B"
            )
    if image_size not in (None, names.image_size):
        names = _resized(names, image_size)
    with torch.device("meta"):
        tower = EvaTower(names, heads=settings.heads)
        network = Vision(tower, QFormerBridge(names, heads=settings.query_heads))
    config = VisionConfig(
        graph="vision.onnx",
        tokens=names.queries,
        tower="eva",
        bridge="qformer",
        pixels=PixelSpec(image_size=names.image_size),
    )
    return _streamed(network, [("", names, source.read)]), config


def _resized(names: BlipNames, image_size: int) -> BlipNames:
    if image_size < names.patch_size or image_size % names.patch_size:
        raise CheckpointError(
            f"pictures of {image_size} pixels a side; expected a multiple of {names.patch_size}, "
            "the size of the vision tower's patches: choose another --image-size"
        )
    key = "tower.vit.embeddings.position_embedding"
    shape = (1, 1 + (image_size // names.patch_size) ** 2, names.width)
    return dataclasses.replace(
        names,
        image_size=image_size,
        used={
            **names.used,
            key: _ResizedPositions(**vars(names.used[key]), published=names.sizes[key]),
        },
        sizes={**names.sizes, key: shape},
    )


@dataclasses.dataclass(frozen=True)
class _ResizedPositions(Part):
    """Position embeddings for another number of patches than the published ones."""

    published: Shape = ()

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        positions = torch.from_numpy(super().read(self.published, read).astype(np.float32))
        return resized_positions(positions, math.isqrt(shape[1] - 1)).numpy()


class _Names(Protocol):
    """Where parameters come from, by their names within a part of the network."""

    @property
    def used(self) -> Mapping[str, Part]: ...
    @property
    def sizes(self) -> Mapping[str, Shape]: ...
    @property
    def ignored(self) -> Mapping[str, str]: ...


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

    ignored = {key: why for _, names, _ in parts for key, why in names.ignored.items()}
    return Streamed(network, read, ignored=ignored)
