"""Published names and ours, of vision towers and bridges: which tensor becomes which parameter."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from seechat_weights.accounting import (
    Shape,
    Shapes,
    account,
    check_shapes,
    count_layers,
    few,
    patches_a_side,
    sizes_of,
)
from seechat_weights.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """Where a parameter comes from: published tensors, put together row by row.

    keys: concatenated; None stands for as many zeros as its neighbour has numbers. Of the rows, the
    parameter is share number `share` of `shares` equal ones (q, k or v of a fused tensor). rank:
    the published tensor's, where it lacks leading sizes of 1 that ours has.
    """

    keys: tuple[str | None, ...]
    share: int = 0
    shares: int = 1
    rank: int | None = None

    @property
    def names(self) -> list[str]:
        return [key for key in self.keys if key is not None]

    def published_shape(self, shape: Shape) -> Shape:
        """What each of the published tensors must measure for the parameter to have `shape`."""
        if self.rank is not None:
            return shape[len(shape) - self.rank :]
        return (shape[0] * self.shares // len(self.keys), *shape[1:])

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The parameter, of `shape`; `read` gives a published tensor."""
        arrays = [None if key is None else read(key) for key in self.keys]
        like = next(a for a in arrays if a is not None)
        if len(arrays) > 1:
            like = np.concatenate([np.zeros_like(like) if a is None else a for a in arrays])
        return np.split(like, self.shares)[self.share].reshape(shape)


@dataclass(frozen=True)
class ClipNames:
    """A CLIP vision tower found in a checkpoint; its sizes are those of the tensors."""

    form: str  # "openai" (their own file), "open_clip" or "huggingface"
    image_size: int
    patch_size: int
    width: int
    inner_size: int
    layers: int  # in the checkpoint; the last one is not used
    used: dict[str, Part]  # our parameter -> where it comes from
    sizes: dict[str, Shape]  # our parameter -> its shape
    ignored: dict[str, str]  # published tensor -> reason


_TEXT = "belongs to the text tower"
_LAST = "the patches are taken before the last layer"
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
# form, prefix, layers, what is ignored; the last is a CLIPVisionModel as transformers 5 writes it
_CLIP_FORMS = (
    ("open_clip", "visual.", "transformer.resblocks.", _OPEN_CLIP_REASONS),
    ("huggingface", "vision_model.", "encoder.layers.", _HUGGING_FACE_REASONS),
    ("huggingface", "", "encoder.layers.", _HUGGING_FACE_REASONS),
)
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


def map_clip(shapes: Shapes, *, where: str) -> ClipNames:
    """Find the vision tower in an open_clip or Hugging Face CLIP checkpoint.

    Our parameters are named as Hugging Face's, less "vision_model.", and end before the last layer.
    Raises CheckpointError naming missing, surplus and misshapen tensors.
    """
    rows = (
        row for row in _CLIP_FORMS if any(k.startswith(row[1] or "embeddings.") for k in shapes)
    )
    form, prefix, stack, reasons = next(rows, (None, "", "", ()))
    if form is None:
        raise CheckpointError(
            f"{where}: holds no vision tower; expected tensors visual.* (open_clip) or "
            "vision_model.* (Hugging Face): give --clip a CLIP ViT checkpoint"
        )
    layers = count_layers(shapes, re.escape(prefix + stack) + r"(\d+)\.", where=where)
    if layers < 2:
        raise CheckpointError(
            f"{where}: the vision tower has {layers} transformer layers; expected a CLIP ViT with "
            "two or more: other vision towers (ResNet, timm) are not supported"
        )
    last = re.escape(f"{prefix}{stack}{layers - 1}.")
    names = clip_sizes(width=0, inner=0, patch=0, positions=0, layers=layers - 1)
    used = {k: _clip_part(k, form, prefix) for k in names}
    ignored = account(
        shapes,
        [name for part in used.values() for name in part.names],
        ((last + ".*", _LAST), *reasons),
        where,
    )

    def shape(ours: str, rank: int) -> Shape:
        (key,) = used[ours].names
        advice = "give --clip a CLIP ViT checkpoint"
        return sizes_of(shapes, key, rank, where=where, advice=advice)

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    positions, _ = shape("embeddings.position_embedding.weight", 2)
    inner, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
    side = patches_a_side(positions, where=where, advice="other vision towers are not supported")
    sizes = clip_sizes(
        width=width, inner=inner, patch=patch, positions=positions, layers=layers - 1
    )
    expected = {n: used[k].published_shape(s) for k, s in sizes.items() for n in used[k].names}
    check_shapes(shapes, expected, where)
    if form == "open_clip" and "input_resolution" in shapes:  # only OpenAI's own file has it
        form = "openai"
    return ClipNames(form, side * patch, patch, width, inner, layers, used, sizes, ignored)


def clip_sizes(
    *, width: int, inner: int, patch: int, positions: int, layers: int
) -> dict[str, Shape]:
    """Our parameters of a CLIP tower and their shapes. layers: those that run."""
    layer: dict[str, Shape] = {
        "layer_norm1.weight": (width,),
        "layer_norm1.bias": (width,),
        "layer_norm2.weight": (width,),
        "layer_norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer[f"self_attn.{name}.weight"] = (width, width)
        layer[f"self_attn.{name}.bias"] = (width,)
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.position_embedding.weight": (positions, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "pre_layrnorm.weight": (width,),  # the published spelling
        "pre_layrnorm.bias": (width,),
        **{f"encoder.layers.{i}.{k}": s for i in range(layers) for k, s in layer.items()},
    }


def _clip_part(ours: str, form: str, prefix: str) -> Part:
    if form == "huggingface":
        return Part((prefix + ours,))
    name = ours
    for old, new in _OPEN_CLIP_NAMES.items():
        name = name.replace(old, new)
    fused = re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name)
    if fused:
        key = f"{prefix}{fused[1]}attn.in_proj_{fused[3]}"
        return Part((key,), share="qkv".index(fused[2]), shares=3)
    return Part((prefix + name,))


# a bridge's tensors and their sizes: o(utputs), i(nputs)
BRIDGE_TENSORS = {
    "linear": {"weight": "oi", "bias": "o"},
    "mlp2x_gelu": {"0.weight": "oi", "0.bias": "o", "2.weight": "oo", "2.bias": "o"},
}
_BRIDGE_PREFIXES = ("model.mm_projector.", "mm_projector.", "llama_proj.", "")  # LLaVA, SEEChat
# buffers of frozen networks that a training run of SEEChat leaves beside its projector
_BRIDGE_REASONS = ((r".*\.(position_ids|rotary_emb\.inv_freq)", "a computed buffer"),)


@dataclass(frozen=True)
class BridgeNames:
    """A bridge between vision tower and LM found in a checkpoint."""

    name: str  # a key of BRIDGE_TENSORS
    inputs: int
    outputs: int
    used: dict[str, Part]  # our parameter -> where it comes from
    sizes: dict[str, Shape]  # our parameter -> its shape
    ignored: dict[str, str]  # published tensor -> reason


def map_bridge(shapes: Shapes, *, where: str) -> BridgeNames:
    """Find the bridge in a projector file by the names of its tensors.

    Raises CheckpointError naming missing, surplus and misshapen tensors.
    """
    prefix = next(p for p in _BRIDGE_PREFIXES if any(k.startswith(p) for k in shapes) or not p)
    found = [
        (name, tensors)
        for name, tensors in BRIDGE_TENSORS.items()
        if prefix + next(iter(tensors)) in shapes
    ]
    if not found:
        raise CheckpointError(
            f"{where}: holds no known bridge ({few(list(shapes))}); expected a projector, one of "
            f"{', '.join(BRIDGE_TENSORS)}, as mm_projector.*, llama_proj.* or plain weight and "
            "bias: give --projector the file that holds it"
        )
    name, tensors = found[0]
    keys = {k: prefix + k for k in tensors}
    ignored = account(shapes, keys.values(), _BRIDGE_REASONS, where)
    first = shapes[keys[next(iter(tensors))]][0]
    if len(first) != 2 or 0 in first:
        raise CheckpointError(
            f"{where}: {prefix}{next(iter(tensors))} has shape {list(first)}, expected "
            "[outputs, inputs]: give --projector the file that holds a projector"
        )
    outputs, inputs = first
    sizes = bridge_sizes(name, inputs, outputs)
    check_shapes(shapes, {keys[k]: shape for k, shape in sizes.items()}, where)
    used = {k: Part((key,)) for k, key in keys.items()}
    return BridgeNames(name, inputs, outputs, used, sizes, ignored)


def bridge_sizes(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    """Our parameters of a bridge of BRIDGE_TENSORS and their shapes."""
    lengths = {"o": outputs, "i": inputs}
    return {k: tuple(lengths[axis] for axis in axes) for k, axes in BRIDGE_TENSORS[name].items()}
