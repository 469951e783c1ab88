"""Finds a scorer's weights in a Chinese-CLIP as it was published; only headers are read."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seechat_weights.config import PixelSpec
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape
from seechat_weights.files.audit import Place, check_gains, check_vision
from seechat_weights.files.checkpoint import Checkpoint, Opener, open_checkpoint, read_json
from seechat_weights.files.reading import local_path, shown
from seechat_weights.scorer.names import IMAGE, TEXT, Parameter, ScorerNames, map_scorer, sources
from seechat_weights.scorer.network import (
    CONTEXT,
    PUBLISHED,
    TEXT_HEAD,
    ImageSizes,
    PublishedSize,
    ResNetSizes,
    TextSizes,
)
from seechat_weights.vision.clip_config import clip_settings
from seechat_weights.wordpiece import CHINESE_CLIP_PLACE, FILE, read_vocabulary

CONFIG = "config.json"
_SIZES = "RN50, ViT-B-16, ViT-L-14, ViT-L-14-336 and ViT-H-14"


@dataclass(frozen=True)
class Tower:
    """One tower's parameters, in their files.

    sizes: its parameters and their shapes.
    read: returns a parameter by its name, in any float dtype.
    """

    sizes: dict[str, Shape]
    read: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class ScorerWeights:
    """A published Chinese-CLIP.

    path: the file or folder.
    size: the name of the published size; "" for another one.
    image, text: sizes of the towers.
    pixels: how a picture becomes the image tower's input.
    features: numbers that each tower makes.
    logit_scale: the logarithm of the factor that cosines were multiplied with in training.
    image_tower, text_tower: the weights.
    vocabulary: the file of word pieces.
    halves: whether all matrices are float16 as published, so that float16 loses nothing.
    ignored: tensors that are not used, each with the reason.
    files: the files that the weights come from.
    """

    path: Path
    size: str
    image: ImageSizes
    text: TextSizes
    pixels: PixelSpec
    features: int
    logit_scale: float
    image_tower: Tower
    text_tower: Tower
    vocabulary: Path
    halves: bool
    ignored: Mapping[str, str]
    files: tuple[Path, ...]


def open_scorer(
    path: str | Path, *, vocabulary: str | Path | None = None, opener: Opener = open_checkpoint
) -> ScorerWeights:
    """Open a Chinese-CLIP.

    path: the authors' file (clip_cn_*.pt), or a folder from Hugging Face.
    vocabulary: the vocab.txt, or its folder, if it is not beside the weights.
    opener: opens checkpoints.

    Raises CheckpointError.
    """
    path = local_path(path)
    checkpoint = opener(path)
    names = map_scorer(checkpoint.shapes, where=str(path))
    if names.form == "original":
        size, image, text, pixels = _original(path, names)
    else:
        size, image, text, pixels = _hugging_face(path, names)
    if text.positions < CONTEXT:
        raise CheckpointError(
            f"{path}: a text tower for {text.positions} tokens; expected {CONTEXT} or more, which "
            "texts are cut to: name a Chinese-CLIP"
        )
    folder = path if path.is_dir() else path.parent
    words = local_path(vocabulary) if vocabulary else folder / FILE
    if words.is_dir():
        words /= FILE
    if not vocabulary and not words.exists():
        raise CheckpointError(
            f"{folder}: holds no {FILE}; expected Chinese-CLIP's word pieces beside the weights: "
            f"get them from {CHINESE_CLIP_PLACE}, or name the file as tokenizer",
            options={"tokenizer": None},
        )
    read_vocabulary(words, text.vocab_size, place=CHINESE_CLIP_PLACE)
    scale = float(checkpoint.read("logit_scale").reshape(()))
    if not math.isfinite(scale) or abs(scale) > 20:
        raise CheckpointError(
            f"{path}: logit_scale is {scale}; expected about 4.6: download the file again"
        )
    keys = {key for p in names.parameters.values() for key in p.expected}
    shapes = checkpoint.shapes
    folds = isinstance(image, ResNetSizes)  # makes other numbers of the published ones
    return ScorerWeights(
        path=path,
        size=size,
        image=image,
        text=text,
        pixels=pixels,
        features=names.features,
        logit_scale=scale,
        image_tower=_tower(checkpoint, sources(names.parameters, IMAGE)),
        text_tower=_tower(checkpoint, sources(names.parameters, TEXT)),
        vocabulary=words,
        halves=not folds
        and all(shapes[k].dtype == "float16" for k in keys if len(shapes[k].shape) > 1),
        ignored=names.ignored,
        files=tuple(sorted({checkpoint.source(k) for k in keys})),
    )


def _tower(checkpoint: Checkpoint, parameters: dict[str, Parameter]) -> Tower:
    audited: set[str] = set()

    def read_audited(key: str) -> np.ndarray:
        array = checkpoint.read(key)
        if key not in audited:
            place = Place(checkpoint.source(key), key)
            check_vision(array, place)
            if key.endswith("running_var"):
                check_gains(array, place)
            audited.add(key)
        return array

    def read(name: str) -> np.ndarray:
        return parameters[name].make(read_audited)

    return Tower({name: p.shape for name, p in parameters.items()}, read)


# --- what the tensors do not tell


def _original(path: Path, names: ScorerNames) -> tuple[str, ImageSizes, TextSizes, PixelSpec]:
    """The authors' file: its settings are in their code, for the five sizes that there are.

    A file of another size needs them beside it: NAME.config.json with the fields of cn_clip's
    model_configs, in one object or in two called vision and text.
    """
    image, text = names.image, names.text
    found, file = _published(names), path.with_name(f"{path.stem}.config.json")
    if file.exists() and path.is_file():
        heads, text_heads = _given_heads(file, names)
    elif found:
        heads, text_heads = found.heads, text.width // TEXT_HEAD
    else:
        raise CheckpointError(
            f"{path}: towers {names.image.width} and {text.width} wide, {names.image_size} pixels; "
            f"expected one of {_SIZES}, or to be told their heads: put cn_clip's settings of this "
            f"size beside it, as {file.name}"
        )
    if not isinstance(image, ResNetSizes):
        image = dataclasses.replace(
            image, heads=heads, activation="quick_gelu", layernorm_epsilon=1e-5, class_token=True
        )
    pixels = PixelSpec(image_size=names.image_size, exact=True)
    return found.name if found else "", image, dataclasses.replace(text, heads=text_heads), pixels


def _given_heads(file: Path, names: ScorerNames) -> tuple[int, int]:
    """The heads of both towers by a file beside the weights."""
    given = read_json(file)
    vision, text = (_section(given, name) for name in ("vision", "text"))
    image, width = names.image, names.text.width
    _agree(file, vision, {"embed_dim": names.features, "image_resolution": names.image_size})
    _agree(file, text, {
        "vocab_size": names.text.vocab_size,
        "text_hidden_size": width,
        "text_num_hidden_layers": names.text.layers,
        "text_intermediate_size": names.text.inner_size,
        "text_hidden_act": "gelu",
    })  # fmt: skip
    heads = 0
    if not isinstance(image, ResNetSizes):
        _agree(file, vision, {
            "vision_width": image.width,
            "vision_layers": image.layers,
            "vision_patch_size": image.patch_size,
        })  # fmt: skip
        size = _number(file, vision, "vision_head_width", 64)
        if size < 1 or image.width % size:
            raise _wrong(file, "vision_head_width", size, f"a number that divides {image.width}")
        heads = image.width // size
    return heads, _heads(file, _number(file, text, "text_num_attention_heads", width // 64), width)


def _hugging_face(path: Path, names: ScorerNames) -> tuple[str, ImageSizes, TextSizes, PixelSpec]:
    folder = path if path.is_dir() else path.parent
    file = folder / CONFIG
    if not file.exists():
        raise CheckpointError(
            f"{folder}: holds no {CONFIG}; expected the folder of a Chinese-CLIP as Hugging Face "
            "has it: download the file into it"
        )
    assert names.clip and not isinstance(names.image, ResNetSizes)
    settings = clip_settings(path, names.clip, None)
    image = dataclasses.replace(
        names.image,
        heads=settings.heads,
        activation=settings.activation,
        layernorm_epsilon=settings.layernorm_epsilon,
        class_token=True,
    )
    given, text = _section(read_json(file), "text_config"), names.text
    _agree(file, given, {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "intermediate_size": text.inner_size,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    })  # fmt: skip
    heads = _heads(file, _number(file, given, "num_attention_heads", 12), text.width)
    epsilon = given.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise _wrong(file, "layer_norm_eps", epsilon, "between 0 and 1")
    text = dataclasses.replace(text, heads=heads, layernorm_epsilon=epsilon)
    pixels = dataclasses.replace(settings.pixels, exact=True)
    found = _published(names)
    return found.name if found else "", image, text, pixels


def _published(names: ScorerNames) -> PublishedSize | None:
    """The published size that has these towers."""
    image, text = names.image, names.text
    if isinstance(image, ResNetSizes):
        tower = (image.width, sum(image.stages), 0, names.image_size)
    else:
        tower = (image.width, image.layers, image.patch_size, names.image_size)
    both = (tower, (text.width, text.layers))
    return next((size for size in PUBLISHED if (size.tower, size.text) == both), None)


def _section(given: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within another one, or that other one, if it is not divided."""
    found = given.get(name)
    return found if isinstance(found, dict) else given


def _agree(file: Path, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if given.get(name, value) != value:
            raise _wrong(file, name, given[name], f"{value}, as in the weights")


def _number(file: Path, given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if type(value) is not int:
        raise _wrong(file, name, value, "a number")
    return value


def _heads(file: Path, heads: int, width: int) -> int:
    if heads < 1 or width % heads:
        raise _wrong(file, "the number of heads", heads, f"one that divides {width}")
    return heads


def _wrong(file: Path, name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name} is {shown(value)}; expected {expected}: put the file there that belongs "
        "to the weights"
    )
