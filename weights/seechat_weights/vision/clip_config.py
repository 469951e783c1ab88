"""Reads what a CLIP checkpoint's tensors do not tell: heads, activation, how to prepare pictures.

It reads the configuration files that a publisher puts beside the weights, and checks them against
the tensors.
"""

import dataclasses
from pathlib import Path
from typing import Any

from seechat_weights.config import RESIZES, PixelSpec
from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import read_json
from seechat_weights.vision.clip_names import ClipNames
from seechat_weights.vision.network import ACTIVATIONS

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}  # open_clip's names

# a setting missing in a Hugging Face configuration has the transformers library's default
_HUGGING_FACE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
    "image_size": 224,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What configuration files say of a CLIP tower."""

    file: str  # the configuration's path, for errors
    heads: int
    activation: str  # empty if the file does not tell
    layernorm_epsilon: float
    pixels: PixelSpec


def clip_settings(path: Path, names: ClipNames, activation: str | None) -> Settings:
    """What is known of a CLIP checkpoint beside its tensors.

    path: the checkpoint.
    names: its tensors.
    activation: "quick_gelu" or "gelu", if nothing beside the weights tells.

    Raises CheckpointError.
    """
    folder = path if path.is_dir() else path.parent
    if names.form == "openai":  # published as one file, with its settings in code
        pixels = PixelSpec(image_size=names.image_size, resize="crop", rgb_first=False)
        settings = Settings(path.name, names.network.width // 64, "quick_gelu", 1e-5, pixels)
    elif names.form == "open_clip":
        settings = _open_clip_settings(folder, names)
    else:
        settings = _hugging_face_settings(folder, names)
    activation = activation or settings.activation
    if not activation:
        raise CheckpointError(
            f"{path}: no {settings.file} beside it, and the weights do not tell their activation; "
            "expected to know it: put the file there, or pass clip_activation: quick_gelu "
            "(OpenAI's weights) or gelu (LAION's)",
            options={"clip_activation": None},
        )
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{settings.file}: activation {activation!r:.80}; expected {' or '.join(ACTIVATIONS)}: "
            "name a CLIP ViT checkpoint as clip",
            options={"clip": None},
        )
    if settings.heads < 1 or names.network.width % settings.heads:
        raise CheckpointError(
            f"{path}: width {names.network.width} in {settings.heads} attention heads; expected a "
            f"multiple: put the {settings.file} beside it that belongs to it"
        )
    return dataclasses.replace(settings, activation=activation)


def _open_clip_settings(folder: Path, names: ClipNames) -> Settings:
    file = folder / "open_clip_config.json"
    config = read_json(file) if file.exists() else {}
    model = config.get("model_cfg", config)
    vision = model.get("vision_cfg", {})
    sizes = ("width", "layers", "patch_size", "image_size")
    _must_agree(file, names, *(vision.get(k) for k in sizes))
    if not config:
        activation = ""
    elif vision.get("act_kwargs"):  # another kind of GELU
        activation = f"gelu {vision['act_kwargs']}"
    else:
        quick = vision.get("quick_gelu", model.get("quick_gelu", False))
        activation = "quick_gelu" if quick else "gelu"
    given = config.get("preprocess_cfg", {})
    mode = given.get("resize_mode", "shortest")
    pixels = _pixel_spec(
        file,
        names,
        mean=given.get("mean"),
        std=given.get("std"),
        interpolation=given.get("interpolation", "bicubic"),
        resize=_RESIZE_MODES.get(mode, mode),
        rgb_first=False,
    )
    if mode == "longest":
        pixels = dataclasses.replace(pixels, background=(given.get("fill_color", 0),) * 3)
    return Settings(
        file=file.name,
        heads=names.network.width // (vision.get("head_width") or 64),
        activation=activation,
        layernorm_epsilon=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        pixels=pixels,
    )


def _hugging_face_settings(folder: Path, names: ClipNames) -> Settings:
    file = folder / "config.json"
    pixels = _hugging_face_pixels(folder / "preprocessor_config.json", names)
    if not file.exists():
        return Settings(file.name, names.network.width // 64, "", 1e-5, pixels)
    given = read_json(file)
    given = given.get("vision_config", given)
    config = _HUGGING_FACE_DEFAULTS | given if isinstance(given, dict) else {}
    for name, default in _HUGGING_FACE_DEFAULTS.items():
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, type(default)):
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}; expected the configuration of a CLIP model, "
                f"such as {default!r}: download the file again"
            )
    heads = config["num_attention_heads"]
    if heads < 1 or config["hidden_size"] % heads:
        raise CheckpointError(
            f"{file}: num_attention_heads is {heads}; expected the configuration of a CLIP model, "
            f"whose heads divide its {config['hidden_size']} numbers: download the file again"
        )
    sizes = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    _must_agree(file, names, *(config[name] for name in sizes))
    return Settings(
        file=file.name,
        heads=heads,
        activation=config["hidden_act"],
        layernorm_epsilon=config["layer_norm_eps"],
        pixels=pixels,
    )


def _hugging_face_pixels(file: Path, names: ClipNames) -> PixelSpec:
    given = read_json(file) if file.exists() else {}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(step, True) is not True:
            raise CheckpointError(
                f"{file}: {step} is {given[step]!r:.80}; expected true, as CLIP was trained: "
                "download the file again"
            )
    size = given.get("size", {"shortest_edge": names.image_size})
    crops = given.get("do_center_crop", True) and "height" not in _edges(size)
    target = _edges(given["crop_size"] if crops and "crop_size" in given else size)
    for found in (*_edges(size).values(), *target.values()):
        if found != names.image_size:
            raise CheckpointError(
                f"{file}: pictures of {found} pixels a side; expected {names.image_size}, for "
                "which the weights have positions: download the file that belongs to them"
            )
    resample = given.get("resample", 3)
    return _pixel_spec(
        file,
        names,
        mean=given.get("image_mean"),
        std=given.get("image_std"),
        interpolation=_RESAMPLE.get(resample, resample),
        resize="crop_floor" if crops else "squash",
        rgb_first=True,
    )


def _edges(size: Any) -> dict[str, Any]:
    return size if isinstance(size, dict) else {"shortest_edge": size}


def _pixel_spec(
    file: Path,
    names: ClipNames,
    *,
    mean: Any,
    std: Any,
    interpolation: Any,
    resize: Any,
    rgb_first: bool,
) -> PixelSpec:
    """Check what a configuration says of pictures; missing settings are CLIP's own."""
    clip = PixelSpec()
    mean, std = mean or clip.mean, std or clip.std
    numbers = all(
        isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(x, int | float) for x in v)
        for v in (mean, std)
    )
    if not numbers or 0 in std or interpolation not in _RESAMPLE.values():
        raise CheckpointError(
            f"{file}: mean {mean!r:.80}, std {std!r:.80}, interpolation {interpolation!r:.80}; "
            f"expected three numbers each and {', '.join(_RESAMPLE.values())}: download the file "
            "again"
        )
    if resize not in RESIZES:
        raise CheckpointError(
            f"{file}: resize mode {resize!r:.80}; expected {', '.join(_RESIZE_MODES)}: "
            "download the file again"
        )
    return PixelSpec(
        image_size=names.image_size,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        resize=resize,
        interpolation=interpolation,
        rgb_first=rgb_first,
    )


def _must_agree(
    file: Path, names: ClipNames, width: Any, layers: Any, patch_size: Any, image_size: Any
) -> None:
    """Refuse a configuration of another model: its heads and activation would be wrong too.

    The inner size is not compared: the tensors tell it, and open_clip states a rounded ratio.
    """
    found = (width, layers, patch_size, image_size)
    network = names.network
    expected = (network.width, names.layers, network.patch_size, names.image_size)
    for what, a, b in zip(("width", "layers", "patch", "image"), found, expected, strict=True):
        if a not in (None, b, [b, b], (b, b)):
            raise CheckpointError(
                f"{file}: {what} is {a}, but {b} in the weights; expected both of one model: "
                "put the configuration there that belongs to the weights"
            )
