"""Maps published names of CLIP vision towers to ours: which tensor becomes which parameter."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from seechat_weights.config import VisionNetwork
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import (
    Shape,
    Shapes,
    account,
    check_shapes,
    count_layers,
    patches_a_side,
    sizes_of,
)
from seechat_weights.vision.network import clip_parameters
from seechat_weights.vision.part import TensorMapping


@dataclass(frozen=True)
class ClipNames:
    """A CLIP vision tower found in a checkpoint; its sizes come from the tensors."""

    form: str  # "openai" (their own file), "open_clip" or "huggingface"
    image_size: int
    layers: int  # as published
    network: (
        VisionNetwork  # as it runs, up to the selected layer; the tensors do not tell its heads
    )
    used: dict[str, TensorMapping]  # our parameter -> where it comes from
    sizes: dict[str, Shape]  # our parameter -> its shape
    ignored: dict[str, str]  # published tensor -> reason


_TEXT = "belongs to the text tower"
_LAST = "the patches are taken before this layer"
# bert.* and text.* are the text towers of Chinese-CLIP and of newer open_clip models
_OPEN_CLIP_REASONS = (
    (r"visual\.(proj|ln_post\.(weight|bias))", _LAST),
    (r"(transformer|token_embedding|ln_final|text|bert)\..*", _TEXT),
    (r"positional_embedding|text_projection|context_length|vocab_size", _TEXT),
    (r"logit_scale|logit_bias", "compares pictures with texts"),
    (r"input_resolution", "follows from the position embeddings"),
)
_HUGGING_FACE_REASONS = (
    (r"(vision_model\.)?post_layernorm\.(weight|bias)|visual_projection\.weight", _LAST),
    (r"text_model\..*|text_projection\.weight", _TEXT),
    (r"logit_scale", "compares pictures with texts"),
    (r"(vision_model\.)?embeddings\.position_ids", "counts from 0"),
)


class ClipForm(NamedTuple):
    """How a library names the tensors of a CLIP vision tower."""

    name: str
    prefix: str
    layers: str  # after the prefix, as are the next fields
    patches: str  # the patch embedding
    ignored: Sequence[tuple[str, str]]  # patterns of names, and why

    @property
    def layer(self) -> str:
        """A pattern that finds the number of a layer."""
        return re.escape(self.prefix + self.layers) + r"(\d+)\."


_HUGGING_FACE = ("encoder.layers.", "embeddings.patch_embedding.weight", _HUGGING_FACE_REASONS)
CLIP_FORMS = (
    ClipForm("open_clip", "visual.", "transformer.resblocks.", "conv1.weight", _OPEN_CLIP_REASONS),
    ClipForm("huggingface", "vision_model.", *_HUGGING_FACE),
    ClipForm("huggingface", "", *_HUGGING_FACE),  # a CLIPVisionModel by transformers 5
)


def clip_library(form: ClipForm, shapes: Shapes) -> str:
    """The library's name; OpenAI's own file differs from open_clip's in one tensor only.

    form: the form of the names.
    shapes: the file's tensors.
    """
    return "openai" if form.name == "open_clip" and "input_resolution" in shapes else form.name


_OPEN_CLIP_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def map_clip(shapes: Shapes, *, where: str, select_layer: int = -2) -> ClipNames:
    """Find the vision tower in an open_clip or Hugging Face CLIP checkpoint.

    Our parameters have Hugging Face's names without "vision_model.", and end with the layer whose
    output is selected.

    shapes: the file's tensors.
    where: its path, for errors.
    select_layer: which of the hidden states is taken, as transformers counts them: 0 is the input
        of the first layer, -1 the output of the last one.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    found = (f for f in CLIP_FORMS if any(k.startswith(f.prefix or "embeddings.") for k in shapes))
    form = next(found, None)
    if form is None:
        raise CheckpointError(
            f"{where}: holds no vision tower; expected tensors visual.* (open_clip) or "
            "vision_model.* (Hugging Face): name a CLIP ViT checkpoint as clip",
            options={"clip": None},
        )
    layers = count_layers(shapes, form.layer, where=where)
    if layers < 2:
        raise CheckpointError(
            f"{where}: the vision tower has {layers} transformer layers; expected a CLIP ViT with "
            "two or more: other vision towers (ResNet, timm) are not supported"
        )
    run = select_layer if select_layer >= 0 else layers + 1 + select_layer
    if not 0 < run <= layers:
        raise CheckpointError(
            f"{where}: the vision tower has {layers} layers, and the hidden state {select_layer} "
            "is to be taken; expected one of a layer's outputs: name the tower that the projector "
            "was trained with as clip",
            options={"clip": None},
        )
    after = "|".join(map(str, range(run, layers)))
    last = re.escape(form.prefix + form.layers) + f"({after})\\."
    unknown = VisionNetwork(patch_size=1, width=1, inner_size=1, layers=run, heads=0)
    used = {k: _clip_part(k, form) for k in clip_parameters(unknown, 1)}
    ignored = account(
        shapes,
        [name for part in used.values() for name in part.names],
        ((last + ".*", _LAST), *form.ignored),
        where,
    )

    def shape(ours: str, rank: int) -> Shape:
        (key,) = used[ours].names
        advice = "name a CLIP ViT checkpoint as clip"
        return sizes_of(shapes, key, rank, where=where, advice=advice)

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    positions, _ = shape("embeddings.position_embedding.weight", 2)
    inner, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
    side = patches_a_side(positions, where=where, advice="other vision towers are not supported")
    network = dataclasses.replace(unknown, patch_size=patch, width=width, inner_size=inner)
    sizes = clip_parameters(network, side * patch)
    expected = {n: used[k].published_shape(s) for k, s in sizes.items() for n in used[k].names}
    check_shapes(shapes, expected, where)
    library = clip_library(form, shapes)
    return ClipNames(library, side * patch, layers, network, used, sizes, ignored)


def _clip_part(ours: str, form: ClipForm) -> TensorMapping:
    if form.name == "huggingface":
        return TensorMapping((form.prefix + ours,))
    name = ours
    for old, new in _OPEN_CLIP_NAMES.items():
        name = name.replace(old, new)
    fused = re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name)
    if fused:
        key = f"{form.prefix}{fused[1]}attn.in_proj_{fused[3]}"
        return TensorMapping((key,), share="qkv".index(fused[2]), shares=3)
    return TensorMapping((form.prefix + name,))
