"""Maps published names of BLIP-2's vision half to ours: EVA ViT-g, ln_vision, Q-Former, projector.

Two families publish it. SEEChat has three files: eva_vit_g.pth, BLIP-2's Q-Former and a checkpoint
of its own. VisualGLM-6B has it inside its own checkpoint, under the names of SwissArmyTransformer
(SAT). Our names are those of the transformers library, as seechat_lite.nn.blip builds the networks.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seechat_weights.config import VisionNetwork
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import (
    Shape,
    Shapes,
    account,
    check_shapes,
    count_layers,
    few,
    part,
    patches_a_side,
    sizes_of,
)
from seechat_weights.files.checkpoint import Checkpoint
from seechat_weights.vision.network import (
    JOINED,
    JOINED_PATCHES,
    QFORMER,
    QUESTION_QFORMER,
    blip_parameters,
)
from seechat_weights.vision.part import Constant, TensorMapping

# VisualGLM-6B's vision half in its Hugging Face folder and in its SAT file
SAT_PREFIXES = ("image_encoder.", "mixins.eva.model.")
INSTRUCTBLIP_PREFIX = "language_projection."  # its Hugging Face form has this, and more
# SEEChat, like LAVIS, builds its ViT with 39 blocks; eva_vit_g.pth may hold more
BLOCKS = 39


@dataclass(frozen=True)
class BlipSettings:
    """Settings that the tensors do not tell; the defaults are those of the published models."""

    blocks: int | None = None  # of the ViT; None: as many as the file has
    heads: int = 16
    query_heads: int = 12


@dataclass(frozen=True)
class BlipNames:
    """EVA ViT, Q-Former and projector found in a checkpoint; the sizes come from the tensors."""

    image_size: int
    bridge: str  # one of network.NETWORKS["eva"]
    queries: int  # embeddings of a picture
    outputs: int  # the LM's hidden size
    network: VisionNetwork  # the tensors do not tell its heads
    used: dict[str, TensorMapping]  # our parameter -> where it comes from
    sizes: dict[str, Shape]  # our parameter -> its shape
    ignored: dict[str, str]  # published tensor -> reason


class _Layer(NamedTuple):
    checkpoint: Checkpoint
    prefix: str  # put before its names in the overlay
    shapes: Shapes  # under its own names


class Overlay:
    """Several checkpoints read as one: a tensor of a later one replaces that of an earlier one."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers = layers
        self._holder = {layer.prefix + k: layer for layer in layers for k in layer.shapes}
        self.shapes = {layer.prefix + k: v for layer in layers for k, v in layer.shapes.items()}
        self.where = " + ".join(str(layer.checkpoint.path) for layer in layers)

    def read(self, key: str) -> np.ndarray:
        """Read one tensor as stored. Raises CheckpointError.

        key: its name in the overlay.
        """
        layer = self._holder[key]
        return layer.checkpoint.read(key.removeprefix(layer.prefix))

    def source(self, key: str) -> Path:
        """The file that holds the tensor `key`."""
        layer = self._holder[key]
        return layer.checkpoint.source(key.removeprefix(layer.prefix))

    def count(self, layers: str) -> int:
        """How many layers have such names; at least 1, so that a missing one is noticed.

        layers: a pattern of the names, its group the number.
        """
        return max(count_layers(self.shapes, layers, where=self.where), 1)

    def account(self, needed: Iterable[str], reasons: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Check that no tensor is missing in all files together, and none surplus in any file.

        needed: names that must be there.
        reasons: pairs of a pattern of names and why such tensors are ignored.

        Raises CheckpointError.
        """
        needed, reasons = list(dict.fromkeys(needed)), list(reasons)
        missing = [key for key in needed if key not in self.shapes]
        if missing:
            argument, do = _remedy(missing[0])
            raise CheckpointError(
                f"{self.where}: tensors are {len(missing)} missing ({few(missing)}); expected all "
                f"of EVA ViT and its bridge: {do}",
                options={argument: None} if argument else {},
            )
        ignored = {}
        for layer in self._layers:
            names = {key.removeprefix(layer.prefix) for key in needed}
            own = [(p.removeprefix(re.escape(layer.prefix)), why) for p, why in reasons]
            here = [k for k in layer.shapes if k in names]
            ignored |= account(layer.shapes, here, own, str(layer.checkpoint.path))
            for key in here:
                if self._holder[layer.prefix + key] is not layer:
                    file = self.source(layer.prefix + key).name
                    ignored[key] = f"replaced by the one in {file}"
        return ignored

    def check_shapes(self, expected: Mapping[str, Shape]) -> None:
        """Compare shapes and dtypes; an error names the file that a tensor is taken from.

        expected: what each tensor should measure.

        Raises CheckpointError.
        """
        for layer in self._layers:
            here = {
                k.removeprefix(layer.prefix): shape
                for k, shape in expected.items()
                if self._holder[k] is layer
            }
            check_shapes(layer.shapes, here, str(layer.checkpoint.path))


def _remedy(missing: str) -> tuple[str | None, str]:
    """The argument that names the file with a missing tensor, if any, and what to do."""
    if missing.startswith("visual_encoder."):
        return "eva", "name eva_vit_g.pth as eva"
    if missing.startswith(("llama_proj.", "llm_proj.")):
        what = "SEEChat's (checkpoint_100.pth), MiniGPT-4's or InstructBLIP's"
        return "checkpoint", f"name the checkpoint that was trained, {what}, as checkpoint"
    if missing.startswith(("Qformer.", "query_tokens", "ln_vision.")):
        return "qformer", "name blip2_pretrained_flant5xxl.pth as qformer"
    return None, "download the checkpoint again"


def seechat_overlay(
    *, eva: Checkpoint | None, qformer: Checkpoint | None, checkpoint: Checkpoint | None
) -> Overlay:
    """SEEChat's files in the order in which it loads them; of the last, only the vision half.

    eva: eva_vit_g.pth.
    qformer: BLIP-2's Q-Former file.
    checkpoint: SEEChat's checkpoint_N.pth, or MiniGPT-4's or InstructBLIP's.

    Raises CheckpointError for a checkpoint that holds neither SEEChat's LM nor its vision.
    """
    layers = []
    if eva:
        layers.append(_Layer(eva, "visual_encoder.", eva.shapes))
    if qformer:
        layers.append(_Layer(qformer, "", qformer.shapes))
    if checkpoint:
        own = part(checkpoint.shapes, "vision", where=str(checkpoint.path))
        layers.append(_Layer(checkpoint, "", own))
    return Overlay(layers)


def visualglm_overlay(checkpoint: Checkpoint) -> Overlay | None:
    """The vision half of a VisualGLM-6B or InstructBLIP checkpoint, or None if it has none."""
    prefixes = (*SAT_PREFIXES, INSTRUCTBLIP_PREFIX)
    if not any(k.startswith(prefixes) for k in checkpoint.shapes):
        return None
    own = part(checkpoint.shapes, "vision", where=str(checkpoint.path))
    return Overlay([_Layer(checkpoint, "", own)])


_TEXT = "belongs to the Q-Former's text branch"
_OTHER_LM = "leads to another language model"
_SEECHAT_REASONS = (
    (r"visual_encoder\.(norm|fc_norm|head)\..*", "the patches are taken before the final norm"),
    (r"Qformer\.bert\.embeddings\.position_ids", "counts from 0"),
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", _TEXT),
    (r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*", _TEXT),
    (r"Qformer\.cls\..*", _TEXT),
    (r"(t5|opt)_proj\..*", _OTHER_LM),
    (r"(vision|text)_proj\..*|itm_head\..*|temp", "compares pictures with texts"),
)


def map_seechat(source: Overlay, *, blocks: int | None = None) -> BlipNames:
    """Find SEEChat's vision half, or MiniGPT-4's or InstructBLIP's, which have the same names.

    source: its files.
    blocks: of the ViT; None for the 39 that all of them build.

    Raises CheckpointError; it names missing, surplus and misshapen tensors and their file.
    """
    blocks = BLOCKS if blocks is None else blocks
    layers = source.count(r"Qformer\.bert\.encoder\.layer\.(\d+)\.")
    found = source.count(r"visual_encoder\.blocks\.(\d+)\.")
    reasons = [
        (rf"visual_encoder\.blocks\.{i}\..*", f"the ViT has {blocks} blocks")
        for i in range(blocks, found)
    ]
    bridge = _bridge(source)
    if bridge == QUESTION_QFORMER:
        find = _instructblip_part
        reasons += [row for row in _SEECHAT_REASONS if row[1] != _TEXT]
        reasons += [(r"Qformer\.cls\..*", _TEXT), (r"llama_proj\..*", _OTHER_LM)]
    else:
        find = _seechat_part
        reasons += _SEECHAT_REASONS
    if bridge == JOINED:
        plain = not any(k.startswith("ln_vision.") for k in source.shapes)
        find = _joined_part if plain else find
        reasons.append((r"Qformer\..*|query_tokens", "this bridge has no Q-Former"))
    return _map(source, find, reasons, blocks, layers, bridge)


def map_instructblip(source: Overlay) -> BlipNames:
    """Find the vision half of an InstructBLIP in its Hugging Face form.

    source: its files.

    Raises CheckpointError as map_seechat.
    """
    blocks = source.count(r"vision_model\.encoder\.layers\.(\d+)\.")
    layers = source.count(r"qformer\.encoder\.layer\.(\d+)\.")
    reasons = [(r"(qformer|vision_model)\.embeddings\.position_ids", "counts from 0")]
    return _map(source, _hugging_face_part, reasons, blocks, layers, QUESTION_QFORMER)


def _bridge(source: Overlay) -> str:
    """The bridge of SEEChat, MiniGPT-4 or InstructBLIP, by the projector and what it takes."""
    if "llm_proj.weight" in source.shapes:
        return QUESTION_QFORMER
    projector, patches, queries = (
        source.shapes.get(name, ((), ""))[0]
        for name in ("llama_proj.weight", "visual_encoder.patch_embed.proj.weight", "query_tokens")
    )
    inputs, width = projector[-1:], patches[:1]
    joined = width and inputs == (JOINED_PATCHES * width[0],) and inputs != queries[-1:]
    return JOINED if joined else QFORMER


def map_visualglm(source: Overlay) -> BlipNames:
    """Find VisualGLM-6B's vision half. Raises CheckpointError as map_seechat.

    source: its file.
    """
    prefix = next(p for p in SAT_PREFIXES if any(k.startswith(p) for k in source.shapes))
    at = re.escape(prefix)
    blocks = source.count(at + r"vit\.transformer\.layers\.(\d+)\.")
    layers = source.count(at + r"qformer\.transformer\.layers\.(\d+)\.")
    return _map(source, lambda ours: _sat_part(ours, prefix, layers), (), blocks, layers, QFORMER)


def _map(
    source: Overlay,
    find: Callable[[str], TensorMapping],
    reasons: Iterable[tuple[str, str]],
    blocks: int,
    layers: int,
    bridge: str,
) -> BlipNames:
    unknown = VisionNetwork(
        patch_size=1, width=1, inner_size=1, layers=blocks, heads=0, query_layers=layers
    )
    used = {ours: find(ours) for ours in blip_parameters(unknown, 1, bridge, 1, 1)}
    ignored = source.account([name for p in used.values() for name in p.names], reasons)

    advice = "give the files of BLIP-2, SEEChat, MiniGPT-4, InstructBLIP or VisualGLM-6B"

    def size(ours: str, rank: int) -> Shape:
        key = used[ours].names[0]
        return sizes_of(source.shapes, key, rank, where=source.where, advice=advice)

    width, _, patch, _ = size("tower.vit.embeddings.patch_embedding.weight", 4)
    inner, _ = size("tower.vit.encoder.layers.0.mlp.fc1.weight", 2)
    positions = "tower.vit.embeddings.position_embedding"
    count = size(positions, used[positions].rank or 3)[-2]
    outputs, _ = size("bridge.projection.weight", 2)
    side = patches_a_side(count, where=source.where, advice=advice)
    network = dataclasses.replace(unknown, patch_size=patch, width=width, inner_size=inner)
    if bridge == JOINED:
        network = dataclasses.replace(network, query_layers=0)
        queries = side * side // JOINED_PATCHES
        if side * side % JOINED_PATCHES:
            raise CheckpointError(
                f"{source.where}: {side * side} patches a picture, of which {JOINED_PATCHES} are "
                f"joined to one; expected a multiple: {advice}"
            )
    else:
        queries = size("bridge.query_tokens", used["bridge.query_tokens"].rank or 3)[-2]
        query_inner, query_width = size(
            "bridge.qformer.encoder.layer.0.intermediate_query.dense.weight", 2
        )
        network = dataclasses.replace(
            network, query_width=query_width, query_inner_size=query_inner
        )
    if bridge == QUESTION_QFORMER:
        at = "bridge.qformer.embeddings"
        words, _ = size(f"{at}.word_embeddings.weight", 2)
        longest, _ = size(f"{at}.position_embeddings.weight", 2)
        network = dataclasses.replace(network, query_words=words, query_positions=longest)
    sizes = blip_parameters(network, side * patch, bridge, queries, outputs)
    source.check_shapes(
        {n: used[k].published_shape(s) for k, s in sizes.items() for n in used[k].names}
    )
    return BlipNames(side * patch, bridge, queries, outputs, network, used, sizes, ignored)


_SEECHAT_NAMES = {
    "tower.vit.embeddings.class_embedding": "visual_encoder.cls_token",
    "tower.vit.embeddings.position_embedding": "visual_encoder.pos_embed",
    "tower.vit.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "tower.vit.encoder.layers": "visual_encoder.blocks",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "layer_norm": "norm",
    "tower.vit.post_layernorm": "ln_vision",
    "bridge.query_tokens": "query_tokens",
    "bridge.qformer.layernorm": "Qformer.bert.embeddings.LayerNorm",
    "bridge.qformer": "Qformer.bert",
    "attention.attention": "attention.self",
    "bridge.projection": "llama_proj",
}


def _seechat_part(ours: str) -> TensorMapping:
    name = ours
    for old, new in _SEECHAT_NAMES.items():
        name = name.replace(old, new)
    if name.endswith("attn.qkv.bias"):  # the key's bias is zero and is not published
        at = name.removesuffix("qkv.bias")
        return TensorMapping((f"{at}q_bias", None, f"{at}v_bias"))
    return TensorMapping((name,))


def _joined_part(ours: str) -> TensorMapping:
    """MiniGPT-4 for Llama 2 never trains or loads ln_vision, so it keeps what it begins with."""
    if ours.startswith("tower.vit.post_layernorm."):
        return Constant(value=1.0 if ours.endswith("weight") else 0.0)
    return _seechat_part(ours)


def _instructblip_part(ours: str) -> TensorMapping:
    part = _seechat_part(ours.replace("qformer.embeddings.layernorm", "qformer.layernorm"))
    keys = tuple(k and k.replace("llama_proj", "llm_proj") for k in part.keys)
    return dataclasses.replace(part, keys=keys)


_HUGGING_FACE_NAMES = {
    "tower.vit.": "vision_model.",
    "bridge.query_tokens": "query_tokens",
    "bridge.qformer.": "qformer.",
    "bridge.projection.": "language_projection.",
}


def _hugging_face_part(ours: str) -> TensorMapping:
    old = next(old for old in _HUGGING_FACE_NAMES if ours.startswith(old))
    return TensorMapping((_HUGGING_FACE_NAMES[old] + ours.removeprefix(old),))


_SAT_VIT = {
    "embeddings.patch_embedding": "mixins.patch_embedding.proj",
    "post_layernorm": "mixins.cls.ln_vision",
    "encoder.layers": "transformer.layers",
    "self_attn.qkv": "attention.query_key_value",
    "self_attn.projection": "attention.dense",
    "layer_norm1": "input_layernorm",
    "layer_norm2": "post_attention_layernorm",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
}
_SAT_QFORMER = {
    "crossattention.output.dense": "cross_attention.dense",
    "crossattention.output.LayerNorm": "post_cross_attention_layernorm",
    "crossattention.attention.query": "cross_attention.query",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "post_attention_layernorm",
    "intermediate_query.dense": "mlp.dense_h_to_4h",
    "output_query.dense": "mlp.dense_4h_to_h",
}


def _sat_part(ours: str, prefix: str, layers: int) -> TensorMapping:
    """SAT's names: q, k and v are one fused tensor, and each layer norm is one place further on.

    A post-norm layer of SAT begins with the norm that ends the layer before in BERT.
    """
    vit, qformer = f"{prefix}vit.", f"{prefix}qformer.transformer."
    if ours == "tower.vit.embeddings.class_embedding":
        return TensorMapping((f"{vit}transformer.word_embeddings.weight",), rank=2)
    if ours == "tower.vit.embeddings.position_embedding":
        return TensorMapping((f"{vit}transformer.position_embeddings.weight",), rank=2)
    if ours == "bridge.query_tokens":
        return TensorMapping((f"{qformer}word_embeddings.weight",), rank=2)
    if ours.startswith("bridge.projection."):
        return TensorMapping((ours.replace("bridge.projection", f"{prefix}glm_proj"),))
    name = ours.removeprefix("tower.vit.")
    if name != ours:
        for old, new in _SAT_VIT.items():
            name = name.replace(old, new)
        return TensorMapping((vit + name,))
    name, kind = ours.removeprefix("bridge.qformer.").rsplit(".", 1)
    if name == "layernorm":
        return TensorMapping((f"{qformer}layers.0.input_layernorm.{kind}",))
    _, _, number, name = name.split(".", 3)
    if name == "output_query.LayerNorm":
        i = int(number) + 1
        at = f"layers.{i}.input_layernorm" if i < layers else "final_layernorm"
        return TensorMapping((f"{qformer}{at}.{kind}",))
    at = f"{qformer}layers.{number}."
    fused = re.fullmatch(r"(cross)?attention\.attention\.(query|key|value)", name)
    if fused and not fused[1]:
        share = ("query", "key", "value").index(fused[2])
        return TensorMapping((f"{at}attention.query_key_value.{kind}",), share=share, shares=3)
    if fused and fused[2] != "query":
        share = ("key", "value").index(fused[2])
        return TensorMapping((f"{at}cross_attention.key_value.{kind}",), share=share, shares=2)
    for old, new in _SAT_QFORMER.items():
        name = name.replace(old, new)
    return TensorMapping((f"{at}{name}.{kind}",))
