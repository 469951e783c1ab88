"""Where a vision network's weights come from: a bundle, or checkpoints as they were published.

Only headers are read here, and torch is not needed: the weights stay in their files until the
network that nn.vision makes of them runs, or is exported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from seechat_lite.clip_settings import clip_settings
from seechat_weights.accounting import FLOATS, Shape, Shapes, account, check_shapes
from seechat_weights.audit import Place, check_vision
from seechat_weights.blip_names import (
    BlipNames,
    BlipSettings,
    Overlay,
    blip_sizes,
    map_seechat,
    map_visualglm,
    seechat_overlay,
    visualglm_overlay,
)
from seechat_weights.bundle import Manifest, PixelSpec, VisionConfig, VisionNetwork
from seechat_weights.checkpoints import Checkpoint, Opener, open_checkpoint, read_json
from seechat_weights.errors import BundleError, CheckpointError, SeechatError
from seechat_weights.files import local_path
from seechat_weights.model_files import find_model
from seechat_weights.vision_names import Part, bridge_sizes, clip_sizes, map_bridge, map_clip

PUBLISHED = BlipSettings()
GRAPH = "vision.onnx"
CLIP, BRIDGE = "tower.clip.", "bridge."  # where nn.vision has them
# what stands behind a parameter's name in a bundle: how it is stored
TRANSPOSED, HALF, CODES, SCALES = ".T", ".fp16", ".codes", ".scales"
BLOCK_SIZE = 32  # numbers that share a scale in 8 bits


@dataclass(frozen=True)
class Eyes:
    """A vision network's description and its weights, in their files.

    outputs: the width of its embeddings. sizes: its parameters and their shapes. read: a parameter
    by its name, in any float dtype. ignored: tensors of a checkpoint that no parameter comes from,
    each with the reason. files: those that published parameters come from.
    """

    config: VisionConfig  # with its network
    outputs: int
    sizes: dict[str, Shape]
    read: Callable[[str], np.ndarray]
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def numbers(self) -> int:
        """How many numbers its parameters have together."""
        return sum(math.prod(shape) for shape in self.sizes.values())


@dataclass(frozen=True)
class EyeFiles:
    """Published files that a language model is to see with; without any, with what it brings.

    clip, projector, clip_activation: see load_clip. eva, qformer, checkpoint, image_size: see
    load_seechat; the checkpoint may also hold a part of the language model. Raises SeechatError for
    files that do not go together.
    """

    clip: str | Path | None = None
    projector: str | Path | None = None
    clip_activation: str | None = None
    eva: str | Path | None = None
    qformer: str | Path | None = None
    checkpoint: str | Path | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        if bool(self.clip) != bool(self.projector):
            raise SeechatError("--clip and --projector go together: give both")
        if self.clip and (self.eva or self.qformer):
            raise SeechatError("--clip is one vision tower and --eva another: give one of them")
        if self.image_size and not (self.eva or self.qformer):
            raise SeechatError("--image-size goes with --eva: give both")

    def open(self, lm: str | Path, *, opener: Opener = open_checkpoint) -> Eyes | None:
        """Eyes for the published language model `lm`, if there are any.

        opener: opens checkpoints, such as an Openings, where others read the same files. Raises
        CheckpointError.
        """
        if self.clip and self.projector:
            return load_clip(
                clip=self.clip,
                projector=self.projector,
                activation=self.clip_activation,
                opener=opener,
            )
        if self.eva or self.qformer:
            return load_seechat(
                eva=self.eva,
                qformer=self.qformer,
                checkpoint=self.checkpoint,
                image_size=self.image_size,
                opener=opener,
            )
        return load_visualglm(lm, opener=opener)


def bundle_eyes(folder: Path, manifest: Manifest) -> Eyes | None:
    """A bundle's vision; None if it has none, or one that its graph alone describes.

    Weights in 8 bits are read as the floats that they stand for. Raises BundleError.
    """
    config = manifest.vision
    if config is None or config.network is None:
        return None
    outputs = manifest.lm.hidden_size
    sizes = vision_sizes(config, outputs)
    try:
        file = open_checkpoint(folder / config.weights)
        keys = {name: _stored_as(name, file.shapes) for name in sizes}
        expected: dict[str, Shape] = {}
        for name, (rows, *others) in sizes.items():
            key = keys[name]
            if key.endswith(CODES):
                blocks = -(-others[0] // BLOCK_SIZE)
                expected |= {key: (rows, blocks, BLOCK_SIZE), _scales(key): (rows, blocks)}
            else:
                expected[key] = (*others, rows) if TRANSPOSED in key else (rows, *others)
        account(file.shapes, expected, (), str(file.path))
        check_shapes(file.shapes, expected, str(file.path), dtypes=(*FLOATS, "uint8"))
    except CheckpointError as e:
        raise BundleError(f"{e}, or export the bundle again") from None

    def read(name: str) -> np.ndarray:
        key, found = keys[name], file.read(keys[name])
        if key.endswith(CODES):  # [outputs, blocks, block], 128 for zero
            scales = file.read(_scales(key)).astype(np.float32)
            floats = (found.astype(np.float32) - 128) * scales[..., None]
            return floats.reshape(len(floats), -1)[:, : sizes[name][1]]
        return found.T if TRANSPOSED in key else found

    return Eyes(config, outputs, sizes, read)


def _stored_as(name: str, shapes: Shapes) -> str:
    kinds = (HALF, TRANSPOSED, TRANSPOSED + HALF, TRANSPOSED + CODES)
    return next((name + kind for kind in kinds if name + kind in shapes), name)


def _scales(codes: str) -> str:
    return codes.removesuffix(CODES) + SCALES + HALF


def vision_sizes(config: VisionConfig, outputs: int) -> dict[str, Shape]:
    """The parameters that nn.vision's network has, and their shapes. config: with its network."""
    network = config.network
    assert network
    positions = 1 + (config.pixels.image_size // network.patch_size) ** 2
    if config.bridge == "qformer":
        return blip_sizes(
            network.layers,
            network.query_layers,
            network.width,
            network.inner_size,
            network.patch_size,
            positions,
            config.tokens,
            network.query_width,
            network.query_inner_size,
            outputs,
        )
    tower = clip_sizes(
        width=network.width,
        inner=network.inner_size,
        patch=network.patch_size,
        positions=positions,
        layers=network.layers,
    )
    bridge = bridge_sizes(config.bridge, network.width, outputs)
    return {CLIP + k: s for k, s in tower.items()} | {BRIDGE + k: s for k, s in bridge.items()}


def load_clip(
    *,
    clip: str | Path,
    projector: str | Path,
    activation: str | None = None,
    opener: Opener = open_checkpoint,
) -> Eyes:
    """A CLIP vision tower and a projector.

    clip: a folder or file of open_clip, Hugging Face or OpenAI; its configuration lies beside it.
    projector: a file of a linear or MLP bridge. activation: "quick_gelu" or "gelu", for a CLIP
    file without configuration. Raises CheckpointError.
    """
    clip, projector = local_path(clip), local_path(projector)
    checkpoint, file = opener(clip), opener(projector)
    names = map_clip(checkpoint.shapes, where=str(clip))
    settings = clip_settings(clip, names, activation)
    bridge = map_bridge(file.shapes, where=str(projector))
    if bridge.inputs != names.width:
        raise CheckpointError(
            f"{projector}: takes {bridge.inputs} numbers a token; expected {names.width}, the "
            f"width of {clip}: give --clip the tower that the projector was trained with"
        )
    config = VisionConfig(
        graph=GRAPH,
        tokens=(names.image_size // names.patch_size) ** 2,
        tower="clip",
        bridge=bridge.name,
        pixels=settings.pixels,
        network=VisionNetwork(
            patch_size=names.patch_size,
            width=names.width,
            inner_size=names.inner_size,
            layers=names.layers - 1,
            heads=settings.heads,
            activation=settings.activation,
            layernorm_epsilon=settings.layernorm_epsilon,
        ),
    )
    return _published(config, bridge.outputs, [(CLIP, names, checkpoint), (BRIDGE, bridge, file)])


def load_seechat(
    *,
    eva: str | Path | None = None,
    qformer: str | Path | None = None,
    checkpoint: str | Path | None = None,
    settings: BlipSettings = PUBLISHED,
    image_size: int | None = None,
    opener: Opener = open_checkpoint,
) -> Eyes:
    """SEEChat's vision: EVA ViT-g, ln_vision, Q-Former and projector, each in the file loaded last.

    eva: eva_vit_g.pth. qformer: blip2_pretrained_flant5xxl.pth. checkpoint: checkpoint_N.pth, of
    which the language model's tensors are left to seechat_weights.lm. A file may be left out where
    the others hold all of it. image_size: pixels a side, where not those of the weights; position
    embeddings are resized for it. Raises CheckpointError.
    """
    given = {"eva": eva, "qformer": qformer, "checkpoint": checkpoint}
    opened = {role: opener(local_path(p)) if p else None for role, p in given.items()}
    source = seechat_overlay(**opened)
    names = map_seechat(source, blocks=settings.blocks)
    return _blip(source, names, settings, image_size)


def load_visualglm(
    path: str | Path,
    *,
    settings: BlipSettings | None = None,
    opener: Opener = open_checkpoint,
) -> Eyes | None:
    """VisualGLM-6B's vision, from its Hugging Face folder or SAT file; None if `path` has none.

    settings: default, what the configuration beside the weights says. Raises CheckpointError.
    """
    files = find_model(path)
    source = visualglm_overlay(opener(files.weights))
    if source is None:
        return None
    config = read_json(files.config) if files.config else {}
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
) -> Eyes:
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
    config = VisionConfig(
        graph=GRAPH,
        tokens=names.queries,
        tower="eva",
        bridge="qformer",
        pixels=PixelSpec(image_size=names.image_size),
        network=VisionNetwork(
            patch_size=names.patch_size,
            width=names.width,
            inner_size=names.inner_size,
            layers=names.blocks,
            heads=settings.heads,
            query_width=names.query_width,
            query_inner_size=names.query_inner_size,
            query_layers=names.query_layers,
            query_heads=settings.query_heads,
        ),
    )
    return _published(config, names.outputs, [("", names, source)])


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


@dataclass(frozen=True)
class _ResizedPositions(Part):
    """Position embeddings for another number of patches than the published ones."""

    published: Shape = ()

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        import torch

        from seechat_lite.nn.blip import resized_positions

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


def _published(
    config: VisionConfig, outputs: int, parts: list[tuple[str, _Names, Checkpoint | Overlay]]
) -> Eyes:
    """Join what each part of the network comes from; `parts` begin with where it has them."""
    sources = {at + name: (part, c) for at, n, c in parts for name, part in n.used.items()}
    sizes = {at + name: shape for at, n, _ in parts for name, shape in n.sizes.items()}

    audited: set[str] = set()

    def read(name: str) -> np.ndarray:
        part, checkpoint = sources[name]

        def audited_read(key: str) -> np.ndarray:
            array = checkpoint.read(key)
            if key not in audited:
                check_vision(array, Place(checkpoint.source(key), key))
                audited.add(key)
            return array

        return part.read(sizes[name], audited_read)

    ignored = {key: why for _, names, _ in parts for key, why in names.ignored.items()}
    files = {checkpoint.source(k) for part, checkpoint in sources.values() for k in part.names}
    return Eyes(config, outputs, sizes, read, ignored, tuple(sorted(files)))
