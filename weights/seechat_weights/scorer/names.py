"""Maps the published names of Chinese-CLIP to ours, in both forms: which tensors make a parameter.

The authors' own file (clip_cn_*.pt) has visual.* and bert.*; a Hugging Face folder has
vision_model.* and text_model.*. The tensors tell most sizes; ScorerNames holds what they tell.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

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
from seechat_weights.scorer.network import (
    STRIDE,
    ImageSizes,
    ResNetSizes,
    TextSizes,
    image_parameters,
    text_parameters,
)
from seechat_weights.vision.clip_names import ClipNames, map_clip

Read = Callable[[str], np.ndarray]  # a published tensor's name -> its numbers

BATCH_NORM_EPSILON = 1e-5
IMAGE, TEXT = "image.", "text."  # prefixes of the two towers' parameters
_ADVICE = "name a Chinese-CLIP: its clip_cn_*.pt, or its folder from Hugging Face"
_BERT = {"original": "bert.", "huggingface": "text_model."}
_COUNTED = r"(vision_model|text_model)\.embeddings\.(position_ids|token_type_ids)"
_IGNORED = (
    (_COUNTED, "counts from 0, or is 0"),
    (r"bert\.embeddings\.(position_ids|token_type_ids)", "counts from 0, or is 0"),
    (r"bert\.pooler\..*|text_model\.pooler\..*", "the first token's state is taken as it is"),
    (r"visual\..*\.num_batches_tracked", "counts steps of training"),
)


@dataclass(frozen=True)
class Parameter:
    """One of our parameters.

    shape: its shape.
    expected: the published tensors that it is made of, and their shapes.
    make: makes it; it is given a function that reads a published tensor.
    """

    shape: Shape
    expected: dict[str, Shape]
    make: Callable[[Read], np.ndarray]


@dataclass(frozen=True)
class ScorerNames:
    """A Chinese-CLIP found in a checkpoint.

    form: "original" or "huggingface".
    image, text: the towers' sizes; heads are 0 where the tensors do not tell them.
    image_size: pixels a side.
    features: numbers that each tower makes.
    parameters: ours, with the prefixes IMAGE and TEXT.
    ignored: published tensor -> reason.
    clip: a ViT's names; None for a ResNet.
    """

    form: str
    image: ImageSizes
    text: TextSizes
    image_size: int
    features: int
    parameters: dict[str, Parameter]
    ignored: dict[str, str]
    clip: ClipNames | None


def is_scorer(shapes: Shapes) -> bool:
    """Whether these may be the tensors of a Chinese-CLIP: a CLIP whose text tower is a BERT.

    shapes: the file's tensors.
    """
    both = (("visual.", "bert."), ("vision_model.", "text_model."))
    word = "embeddings.word_embeddings.weight"
    return any(
        bert + word in shapes and any(k.startswith(image) for k in shapes) for image, bert in both
    )


def map_scorer(shapes: Shapes, *, where: str) -> ScorerNames:
    """Find both towers in a checkpoint.

    shapes: the file's tensors.
    where: its path, for errors.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    if not is_scorer(shapes):
        raise CheckpointError(
            f"{where}: holds no Chinese-CLIP; expected its two towers, visual.* and bert.* (the "
            f"authors' file) or vision_model.* and text_model.* (Hugging Face): {_ADVICE}"
        )
    form = "original" if "bert.embeddings.word_embeddings.weight" in shapes else "huggingface"
    _must_have(shapes, form, where)
    size = partial(sizes_of, shapes, where=where, advice=_ADVICE)
    if form == "original":
        features = size("text_projection", 2)[1]
        projection = _turned("text_projection")
    else:
        features = size("text_projection.weight", 2)[0]
        projection = _same("text_projection.weight")
    if form == "original" and "visual.attnpool.positional_embedding" in shapes:
        image, image_size, clip = *_resnet_sizes(shapes, where), None
        found = resnet_sources(image, image_size, features)
    else:
        clip = map_clip(shapes, where=where, select_layer=-1)
        image, image_size = clip.network, clip.image_size
        found = _vit_sources(clip, image, image_size, features, form)
    text = _text_sizes(shapes, form, where)
    for name, shape in text_parameters(text, features).items():
        source = projection
        if name.startswith("bert."):
            source = _same(_BERT[form] + name.removeprefix("bert."))
        found[TEXT + name] = source(shape)
    needed = {key: shape for p in found.values() for key, shape in p.expected.items()}
    ignored = account(shapes, [*needed, "logit_scale"], _IGNORED, where, advice=_ADVICE)
    check_shapes(shapes, needed | {"logit_scale": ()}, where)
    return ScorerNames(form, image, text, image_size, features, found, ignored, clip)


def _must_have(shapes: Shapes, form: str, where: str) -> None:
    """Refuse early what the sizes are read from, so that errors name the file's own tensors."""
    names = ["logit_scale", "text_projection" + ".weight" * (form == "huggingface")]
    bert = _BERT[form]
    names += [
        f"{bert}embeddings.position_embeddings.weight",
        f"{bert}embeddings.token_type_embeddings.weight",
        f"{bert}encoder.layer.0.intermediate.dense.weight",
    ]
    if missing := [name for name in names if name not in shapes]:
        raise CheckpointError(
            f"{where}: lacks {', '.join(missing)}; expected a whole Chinese-CLIP: {_ADVICE}"
        )


def _text_sizes(shapes: Shapes, form: str, where: str) -> TextSizes:
    bert = _BERT[form]
    size = partial(sizes_of, shapes, rank=2, where=where, advice=_ADVICE)
    vocab_size, width = size(f"{bert}embeddings.word_embeddings.weight")
    positions, _ = size(f"{bert}embeddings.position_embeddings.weight")
    types, _ = size(f"{bert}embeddings.token_type_embeddings.weight")
    inner, _ = size(f"{bert}encoder.layer.0.intermediate.dense.weight")
    layers = count_layers(shapes, re.escape(f"{bert}encoder.layer.") + r"(\d+)\.", where=where)
    return TextSizes(vocab_size, width, inner, layers, 0, positions, types)


# --- where parameters come from

Source = Callable[[Shape], Parameter]  # given our parameter's shape


def _same(key: str) -> Source:
    """The published tensor itself."""
    return lambda shape: Parameter(shape, {key: shape}, lambda read: read(key))


def _turned(key: str) -> Source:
    """The published matrix, transposed."""
    return lambda shape: Parameter(shape, {key: shape[::-1]}, lambda read: read(key).T)


def _vit_sources(
    clip: ClipNames, sizes: VisionNetwork, image_size: int, features: int, form: str
) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name, shape in clip.sizes.items():
        part = clip.used[name]
        expected = {key: part.published_shape(shape) for key in part.names}
        make = partial(part.read, shape)
        found[f"{IMAGE}tower.clip.{name}"] = Parameter(shape, expected, make)
    original = form == "original"
    norm = "visual.ln_post" if original else "vision_model.post_layernorm"
    last = _turned("visual.proj") if original else _same("visual_projection.weight")
    for name, shape in image_parameters(sizes, image_size, features).items():
        if name.startswith("norm."):
            found[IMAGE + name] = _same(name.replace("norm", norm, 1))(shape)
        elif name.startswith("projection."):
            found[IMAGE + name] = last(shape)
    return found


def _resnet_sizes(shapes: Shapes, where: str) -> tuple[ResNetSizes, int]:
    size = partial(sizes_of, shapes, where=where, advice=_ADVICE)
    for key in ("visual.conv3.weight", "visual.attnpool.positional_embedding"):
        if key not in shapes:
            raise CheckpointError(
                f"{where}: lacks {key}; expected a whole ResNet of Chinese-CLIP: {_ADVICE}"
            )
    width = size("visual.conv3.weight", 4)[0]
    stages: list[int] = []
    while blocks := count_layers(shapes, rf"visual\.layer{len(stages) + 1}\.(\d+)\.", where=where):
        stages.append(blocks)
    if len(stages) != 4:
        raise CheckpointError(
            f"{where}: a ResNet of {len(stages)} stages; expected 4, as in Chinese-CLIP's RN50: "
            f"{_ADVICE}"
        )
    positions, _ = size("visual.attnpool.positional_embedding", 2)
    side = patches_a_side(positions, where=where, advice=_ADVICE)
    return ResNetSizes(width, tuple(stages)), side * STRIDE


def resnet_sources(sizes: ResNetSizes, image_size: int, features: int) -> dict[str, Parameter]:
    """Where the parameters of a ResNet come from, with the prefix IMAGE.

    A batch norm that has been trained only scales and shifts, so it goes into the convolution
    before it.

    sizes: the ResNet's sizes.
    image_size: pixels a side.
    features: numbers that it makes of a picture.
    """
    found: dict[str, Parameter] = {}
    for name, shape in image_parameters(sizes, image_size, features).items():
        if name.startswith("attnpool."):
            found[IMAGE + name] = _same(f"visual.{name}")(shape)
            continue
        at, _, kind = name.rpartition(".")
        convolution = norm = f"visual.{at}"
        if at.endswith("downsample"):
            convolution, norm = f"{norm}.0.weight", f"{norm}.1"
        else:
            convolution, norm = f"{norm}.weight", re.sub(r"conv(\d)$", r"bn\1", norm)
        vectors = {f"{norm}.{part}": (shape[0],) for part in _NORM}
        expected: dict[str, Shape] = dict(vectors)
        if kind == "weight":
            expected[convolution] = shape
        make = partial(_folded, norm, convolution if kind == "weight" else None)
        found[IMAGE + name] = Parameter(shape, expected, make)
    return found


_NORM = ("weight", "bias", "running_mean", "running_var")


def _folded(norm: str, convolution: str | None, read: Read) -> np.ndarray:
    """The weight of a convolution with its batch norm; its bias if there is no `convolution`."""
    gain, bias, mean, variance = (read(f"{norm}.{part}").astype(np.float64) for part in _NORM)
    scale = gain / np.sqrt(variance + BATCH_NORM_EPSILON)
    if convolution is None:
        return (bias - mean * scale).astype(np.float32)
    return (read(convolution).astype(np.float64) * scale[:, None, None, None]).astype(np.float32)


def sources(parameters: Mapping[str, Parameter], prefix: str) -> dict[str, Parameter]:
    """The parameters of one tower, without its prefix.

    parameters: those of both towers.
    prefix: IMAGE or TEXT.
    """
    found = parameters.items()
    return {k.removeprefix(prefix): p for k, p in found if k.startswith(prefix)}
