"""Finds a vision network's weights in a bundle, or in checkpoints as they were published.

This reads only headers and needs no torch. The weights stay in their files until nn.vision's
network runs with them, or is exported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from seechat_weights.arguments import check_choice, check_integer
from seechat_weights.config import PixelSpec, QuestionConfig, VisionConfig
from seechat_weights.errors import CheckpointError, OptionError
from seechat_weights.files.accounting import Shape
from seechat_weights.files.audit import Place, check_vision
from seechat_weights.files.checkpoint import Opener, open_checkpoint, read_json
from seechat_weights.files.reading import local_path, shown
from seechat_weights.model_files import find_model
from seechat_weights.vision.blip_names import (
    INSTRUCTBLIP_PREFIX,
    BlipNames,
    BlipSettings,
    Overlay,
    map_instructblip,
    map_seechat,
    map_visualglm,
    seechat_overlay,
    visualglm_overlay,
)
from seechat_weights.vision.bridge_names import BridgeNames, map_bridge
from seechat_weights.vision.clip_config import Settings, clip_settings
from seechat_weights.vision.clip_names import ClipNames, map_clip
from seechat_weights.vision.llava import (
    NON_LORA_FILE,
    PROJECTOR_FILE,
    TOWER_PREFIXES,
    find_projector,
    find_section,
    find_tower,
    is_openai,
    llava_settings,
    published_at,
)
from seechat_weights.vision.network import (
    ACTIVATIONS,
    BRIDGE,
    JOINED,
    QFORMER,
    QUESTION_QFORMER,
    TOWER,
)
from seechat_weights.vision.part import TensorMapping, Tensors
from seechat_weights.wordpiece import BERT, BERT_HUB, FILE, read_question_vocabulary

PUBLISHED = BlipSettings()
GRAPH = "vision.onnx"
MOST_PIECES = 128  # that LAVIS lets the Q-Former read of a question
# what publishers say of their weights, by the conversation format
LICENCES = {
    "instructblip": "for research only, say its authors; LLaMA's and Vicuna's terms hold, too",
}
# the conversation format of a LLaMA behind each bridge
_BLIP_FORMATS = {
    QFORMER: "minigpt4",
    JOINED: "minigpt4_llama2",
    QUESTION_QFORMER: "instructblip",
}


@dataclass(frozen=True)
class VisionWeights:
    """A vision network's description and its weights, in their files.

    config: describes the network; it has a `network`.
    outputs: the width of its embeddings.
    sizes: its parameters and their shapes.
    read: returns a parameter by its name, in any float dtype.
    ignored: tensors of a checkpoint that no parameter comes from, each with the reason.
    files: the files that published parameters come from.
    conversation: the format that a LLaMA was trained to speak with it; "" if the LM decides.
    legacy_text: whether its code splits text as transformers did before 4.34, whatever the files of
        the LM's tokenizer say.
    vocabulary: the file of a vocabulary with which the bridge reads the question.
    """

    config: VisionConfig  # with its network
    outputs: int
    sizes: dict[str, Shape]
    read: Callable[[str], np.ndarray]
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()
    conversation: str = ""
    legacy_text: bool = False
    vocabulary: Path | None = None

    @property
    def licence(self) -> str:
        """What its publishers say of its use; "" if that is as for the language model."""
        return LICENCES.get(self.conversation, "")

    @property
    def numbers(self) -> int:
        """How many numbers its parameters have together."""
        return sum(math.prod(shape) for shape in self.sizes.values())


@dataclass(frozen=True)
class VisionFiles:
    """Published files of the vision network for a language model; all None: what the LM brings.

    clip, projector, clip_activation: see load_clip. A LLaVA brings its projector, and needs clip
        alone; a projector with LLaVA's config.json beside it names its tower there.
    eva, qformer, checkpoint, image_size: see load_seechat; the checkpoint may also hold a part of
        the language model.
    wordpiece: the vocabulary with which InstructBLIP's Q-Former reads questions (vocab.txt of
        bert-base-uncased), if it is not beside the checkpoint.

    Raises OptionError for files that do not go together.
    """

    clip: str | Path | None = None
    projector: str | Path | None = None
    clip_activation: str | None = None
    eva: str | Path | None = None
    qformer: str | Path | None = None
    checkpoint: str | Path | None = None
    image_size: int | None = None
    wordpiece: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.clip or self.projector) and (self.eva or self.qformer):
            tower = "clip" if self.clip else "projector"
            raise OptionError(
                "clip with its projector is one vision network and eva another; expected one: "
                "leave the other out",
                options={tower: None, "eva": None},
            )
        if self.image_size and not (self.eva or self.qformer):
            raise OptionError(
                "image_size goes with eva; expected both: name both, or leave image_size out",
                options={"image_size": None, "eva": None},
            )
        if self.image_size is not None:
            check_integer("image_size", self.image_size, least=1, expected="pixels a side")
        if self.clip_activation is not None:
            check_choice("clip_activation", self.clip_activation, ACTIVATIONS)

    def open(
        self,
        lm: str | Path,
        *,
        adapter: str | Path | None = None,
        opener: Opener = open_checkpoint,
    ) -> VisionWeights | None:
        """Open the vision network for a published language model; None if there is none.

        lm: the language model's path.
        adapter: the folder of a LoRA; LLaVA's holds a projector.
        opener: opens checkpoints; an Openings, if others read the same files.

        Raises CheckpointError, OptionError for a tower without a projector or the reverse.
        """
        if not (self.eva or self.qformer):
            found = load_llava(
                lm,
                clip=self.clip,
                projector=self.projector,
                adapter=adapter,
                activation=self.clip_activation,
                opener=opener,
            )
            if found:
                return found
        if self.clip and self.projector:
            return load_clip(
                clip=self.clip,
                projector=self.projector,
                activation=self.clip_activation,
                opener=opener,
            )
        if self.clip or self.projector:
            raise OptionError(
                "clip and projector go together; expected both, or a LLaVA that brings the other: "
                "name both, or neither",
                options={"clip": None, "projector": None},
            )
        if self.eva or self.qformer or self._whole(opener):
            return load_seechat(
                eva=self.eva,
                qformer=self.qformer,
                checkpoint=self.checkpoint,
                image_size=self.image_size,
                wordpiece=self.wordpiece,
                opener=opener,
            )
        return load_visualglm(lm, wordpiece=self.wordpiece, opener=opener)

    def _whole(self, opener: Opener) -> bool:
        """Whether the checkpoint holds a whole vision network, as InstructBLIP's does."""
        if not self.checkpoint:
            return False
        shapes = opener(local_path(self.checkpoint)).shapes
        return all(any(k.startswith(p) for k in shapes) for p in ("visual_encoder.", "Qformer."))


def load_clip(
    *,
    clip: str | Path,
    projector: str | Path,
    activation: str | None = None,
    opener: Opener = open_checkpoint,
) -> VisionWeights:
    """Open a CLIP vision tower and a projector.

    clip: a folder or file of open_clip, Hugging Face or OpenAI; its configuration lies beside it.
    projector: a file of a linear or MLP bridge.
    activation: "quick_gelu" or "gelu", for a CLIP file without configuration.
    opener: opens checkpoints.

    Raises CheckpointError.
    """
    clip, projector = local_path(clip), local_path(projector)
    checkpoint, file = opener(clip), opener(projector)
    names = map_clip(checkpoint.shapes, where=str(clip))
    settings = clip_settings(clip, names, activation)
    bridge = map_bridge(file.shapes, where=str(projector))
    parts = [(TOWER, names, checkpoint), (BRIDGE, bridge, file)]
    config = _clip_config(names, settings, bridge, tower=clip, projector=str(projector))
    return _published(config, bridge.outputs, parts)


def load_llava(
    lm: str | Path,
    *,
    clip: str | Path | None = None,
    projector: str | Path | None = None,
    adapter: str | Path | None = None,
    activation: str | None = None,
    opener: Opener = open_checkpoint,
) -> VisionWeights | None:
    """Open LLaVA's CLIP tower and projector; None if there is no configuration of LLaVA's.

    lm: the language model: LLaVA's folder, or the base of a projector or LoRA.
    clip: the CLIP tower's folder; None for the one that the configuration names, if it is near.
    projector: LLaVA's mm_projector.bin, with its config.json beside it, or the folder of both.
    adapter: the folder of a LoRA run.
    activation: "quick_gelu" or "gelu", for a CLIP file without configuration.
    opener: opens checkpoints.

    Raises CheckpointError.
    """
    lm = local_path(lm)
    given = local_path(projector) if projector else None
    tuned = local_path(adapter) if adapter else None
    places = [tuned, lm] if given is None else [given if given.is_dir() else given.parent]
    folders = [p if p.is_dir() else p.parent for p in places if p]
    settings = next((found for f in folders if (found := llava_settings(f))), None)
    if settings is None:
        return None
    found = find_projector(lm, projector=given, adapter=tuned, opener=opener)
    if found is None:
        raise CheckpointError(
            f"{settings.file}: LLaVA's, and no projector is there; expected mm_projector.*: name "
            f"the file that holds it ({PROJECTOR_FILE}) as projector",
            options={"projector": None},
        )
    tensors, where = found
    bridge = map_bridge(tensors.shapes, where=where)
    # only an original LLaVA names a tower outside; a Hugging Face form holds one in any case
    own = None
    if settings.tuned:
        run = tuned / NON_LORA_FILE if tuned else None
        sources = [opener(p) for p in (run if run and run.is_file() else None, lm) if p]
        own = find_section(sources, TOWER_PREFIXES)
    if own is None and not settings.tower:
        raise CheckpointError(
            f"{lm}: holds no vision tower; expected {' or '.join(TOWER_PREFIXES)}: download the "
            "checkpoint again"
        )
    tower = local_path(clip) if clip else lm
    if settings.tower and not clip:
        near = find_tower(settings)
        # OpenAI's towers are described in full by their tensors, and the checkpoint holds those
        if near is None and not (own and is_openai(settings.tower)):
            raise CheckpointError(
                f"{settings.file}: the vision tower is {shown(settings.tower)}, which is not "
                "beside it; expected its folder: name it as clip (from "
                f"{published_at(settings.tower)})",
                options={"clip": settings.tower},
            )
        tower = near or lm
    source: Tensors = own or opener(tower)
    names = map_clip(
        source.shapes, where=str(lm if own else tower), select_layer=settings.select_layer
    )
    alone = settings.tower and tower == lm
    known = dataclasses.replace(names, form="openai") if alone else names
    described = clip_settings(tower, known, activation)
    config = _clip_config(names, described, bridge, tower=tower, projector=where)
    network = config.network
    assert network
    mean = config.pixels.mean
    config = dataclasses.replace(
        config,
        tokens=config.tokens + settings.class_token,
        network=dataclasses.replace(network, class_token=settings.class_token),
        pixels=dataclasses.replace(
            config.pixels,
            resize="square" if settings.pad else "crop_floor",
            rgb_first=True,
            background=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        ),
        marks=settings.marks,
    )
    parts = [(TOWER, names, source), (BRIDGE, bridge, tensors)]
    opened = _published(config, bridge.outputs, parts)
    return dataclasses.replace(opened, conversation=settings.conversation)


def _clip_config(
    names: ClipNames, settings: Settings, bridge: BridgeNames, *, tower: Path, projector: str
) -> VisionConfig:
    if bridge.inputs != names.network.width:
        raise CheckpointError(
            f"{projector}: takes {bridge.inputs} numbers a token; expected "
            f"{names.network.width}, the width of {tower}: name the tower that the "
            "projector was trained with as clip",
            options={"clip": None},
        )
    return VisionConfig(
        graph=GRAPH,
        tokens=(names.image_size // names.network.patch_size) ** 2,
        tower="clip",
        bridge=bridge.name,
        pixels=settings.pixels,
        network=dataclasses.replace(
            names.network,
            heads=settings.heads,
            activation=settings.activation,
            layernorm_epsilon=settings.layernorm_epsilon,
        ),
    )


def load_seechat(
    *,
    eva: str | Path | None = None,
    qformer: str | Path | None = None,
    checkpoint: str | Path | None = None,
    settings: BlipSettings = PUBLISHED,
    image_size: int | None = None,
    wordpiece: str | Path | None = None,
    opener: Opener = open_checkpoint,
) -> VisionWeights:
    """Open SEEChat's vision network, MiniGPT-4's or InstructBLIP's: EVA ViT-g and its bridge.

    The bridge is ln_vision, Q-Former and projector. MiniGPT-4 for Llama 2 has no Q-Former.

    If several files hold a tensor, the file that is loaded last counts. A file may be left out if
    the others hold all of it.

    eva: eva_vit_g.pth.
    qformer: blip2_pretrained_flant5xxl.pth.
    checkpoint: checkpoint_N.pth, MiniGPT-4's or InstructBLIP's; its tensors of the language model
        are left to seechat_weights.lm.
    settings: what the tensors do not tell.
    image_size: pixels a side, if not that of the weights; position embeddings are resized for it.
    wordpiece: see VisionFiles.
    opener: opens checkpoints.

    Raises CheckpointError.
    """
    given = {"eva": eva, "qformer": qformer, "checkpoint": checkpoint}
    opened = {role: opener(local_path(p)) if p else None for role, p in given.items()}
    source = seechat_overlay(**opened)
    names = map_seechat(source, blocks=settings.blocks)
    if names.bridge == JOINED and qformer:
        raise CheckpointError(
            f"{checkpoint}: joins the ViT's patches, as MiniGPT-4 for Llama 2, and has no "
            "Q-Former; expected the ViT and this checkpoint alone: leave qformer out",
            options={"qformer": None},
        )
    places = [local_path(p) for p in (checkpoint, qformer) if p]
    return _blip(source, names, settings, image_size, wordpiece, places)


def load_visualglm(
    path: str | Path,
    *,
    settings: BlipSettings | None = None,
    wordpiece: str | Path | None = None,
    opener: Opener = open_checkpoint,
) -> VisionWeights | None:
    """Open the vision network of VisualGLM-6B or InstructBLIP; None if `path` has none.

    path: VisualGLM-6B's Hugging Face folder or SAT file; InstructBLIP's Hugging Face folder.
    settings: None for what the configuration beside the weights says.
    wordpiece: see VisionFiles.
    opener: opens checkpoints.

    Raises CheckpointError.
    """
    files = find_model(path)
    source = visualglm_overlay(opener(files.weights))
    if source is None:
        return None
    config = read_json(files.config) if files.config else {}
    if settings is None:
        settings = BlipSettings(
            heads=_heads(config, "vision" if "vision_config" in config else "eva", PUBLISHED.heads),
            query_heads=_heads(config, "qformer", PUBLISHED.query_heads),
        )
    if any(k.startswith(INSTRUCTBLIP_PREFIX) for k in source.shapes):
        places = [files.weights / "qformer_tokenizer", files.weights]
        return _blip(source, map_instructblip(source), settings, None, wordpiece, places)
    return _blip(source, map_visualglm(source), settings, None, None, [])


def _heads(config: Mapping[str, Any], part: str, published: int) -> int:
    """The heads of a part, from VisualGLM-6B's config.json or SAT's model_config.json."""
    for name in (f"{part}_config", f"{part}_args"):
        if isinstance(config.get(name), dict):
            return int(config[name].get("num_attention_heads", published))
    return published


def _blip(
    source: Overlay,
    names: BlipNames,
    settings: BlipSettings,
    image_size: int | None,
    wordpiece: str | Path | None,
    places: Sequence[Path],
) -> VisionWeights:
    """Describe the network. A vocabulary is looked for in `places`, unless it is given."""
    query_heads = 0 if names.bridge == JOINED else settings.query_heads
    for what, width, heads in (
        ("the ViT", names.network.width, settings.heads),
        ("the Q-Former", names.network.query_width, query_heads or 1),
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
        bridge=names.bridge,
        pixels=PixelSpec(image_size=names.image_size),
        network=dataclasses.replace(names.network, heads=settings.heads, query_heads=query_heads),
    )
    vocabulary = None
    if names.bridge == QUESTION_QFORMER:
        longest = min(MOST_PIECES, names.network.query_positions)
        config = dataclasses.replace(config, question=QuestionConfig(pieces=longest))
        vocabulary = find_vocabulary(wordpiece, places)
        read_question_vocabulary(vocabulary, names.network.query_words)
    return dataclasses.replace(
        _published(config, names.outputs, [("", names, source)]),
        conversation=_BLIP_FORMATS[names.bridge],
        legacy_text=True,
        vocabulary=vocabulary,
    )


def find_vocabulary(given: str | Path | None, places: Sequence[Path]) -> Path:
    """The vocabulary with which InstructBLIP's Q-Former reads questions.

    given: its file or folder, if the user named one.
    places: folders where it may be, and files beside which it may be.

    Raises CheckpointError if there is none.
    """
    folders = [place if place.is_dir() else place.parent for place in places]
    found = [folder / name for folder in folders for name in (FILE, f"{BERT}/{FILE}")]
    if given:
        path = local_path(given)
        found = [path / FILE if path.is_dir() else path]
    for file in found:
        if file.is_file():
            return file
    raise CheckpointError(
        f"{found[0] if found else FILE}: no such file; expected the WordPiece vocabulary "
        f"with which the Q-Former reads questions: name {BERT}'s {FILE} as wordpiece "
        f"(published at {BERT_HUB})",
        options={"wordpiece": None},
    )


def _resized(names: BlipNames, image_size: int) -> BlipNames:
    patch = names.network.patch_size
    if image_size < patch or image_size % patch:
        raise CheckpointError(
            f"pictures of {image_size} pixels a side; expected a multiple of {patch}, "
            "the size of the vision tower's patches: take such an image_size",
            options={"image_size": None},
        )
    key = "tower.vit.embeddings.position_embedding"
    shape = (1, 1 + (image_size // patch) ** 2, names.network.width)
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
class _ResizedPositions(TensorMapping):
    """Reads position embeddings and resizes them for another number of patches."""

    published: Shape = ()

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        positions = super().read(self.published, read).astype(np.float32)
        return resized_positions(positions, math.isqrt(shape[1] - 1))


def resized_positions(positions: np.ndarray, side: int) -> np.ndarray:
    """Resize position embeddings as LAVIS does; returns [1, 1 + side**2, width].

    The class token keeps its own. The others are a picture; it is resized bicubically as torch does
    it (interpolate, align_corners=False).

    positions: [1, 1 + old**2, width].
    side: patches a side.
    """
    first, grid = positions[:, :1], positions[0, 1:]
    old = math.isqrt(len(grid))
    weights = _bicubic(old, side)
    picture = grid.reshape(old, old, -1).astype(np.float64)
    resized = np.einsum("yi,xj,ijw->yxw", weights, weights, picture, optimize=True)
    return np.concatenate([first, resized.reshape(1, side * side, -1)], 1, dtype=np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """How much each of `old` points adds to each of `new`: cubic convolution, a = -0.75."""
    at = ((np.arange(new) + 0.5) * np.float32(old / new) - 0.5).astype(np.float32)
    start = np.floor(at)
    after = at - start
    near, far = (1.25, -2.25, 0, 1), (-0.75, 3.75, -6, 3)  # factors, the highest power first
    parts = ((1 + after, far), (after, near), (1 - after, near), (2 - after, far))
    weights = np.zeros((new, old))
    for step, (distance, factors) in enumerate(parts, -1):
        points = np.clip(start + step, 0, old - 1).astype(int)  # outside, the edge
        np.add.at(weights, (np.arange(new), points), _polynomial(distance, factors))
    return weights


def _polynomial(x: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """Compute in float32 and round each product and sum once, as torch's kernels do."""
    y = np.zeros_like(x)
    for factor in factors:
        y = (y.astype(np.float64) * x + factor).astype(np.float32)
    return y


class _Names(Protocol):
    """Where parameters come from; names are those within a part of the network."""

    @property
    def used(self) -> Mapping[str, TensorMapping]: ...
    @property
    def sizes(self) -> Mapping[str, Shape]: ...
    @property
    def ignored(self) -> Mapping[str, str]: ...


def _published(
    config: VisionConfig, outputs: int, parts: Sequence[tuple[str, _Names, Tensors]]
) -> VisionWeights:
    """Join the parts of a network; `parts` begin with the prefix of each part's names."""
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
    return VisionWeights(config, outputs, sizes, read, ignored, tuple(sorted(files)))
