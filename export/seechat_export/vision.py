"""Vision checkpoints to one ONNX graph: CLIP and projector files -> torch -> pixels to embeddings.

What a checkpoint's tensors do not tell (heads, activation, how pictures are prepared) is read from
the configuration files that its publisher puts beside it.
"""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from seechat_lite.nn.bridges import BRIDGES
from seechat_lite.nn.vision import ClipTower, Vision
from seechat_weights.bundle import PixelSpec, VisionConfig
from seechat_weights.checkpoints import open_checkpoint, read_json
from seechat_weights.errors import CheckpointError
from seechat_weights.vision_names import ClipNames, map_bridge, map_clip

OPSET = 21  # as the decoder's; opset 23's Attention measured no faster and runs on fewer devices
EXTERNAL_DATA_BYTES = 1_900_000_000  # protobuf, so a single .onnx file, ends at 2 GiB
ACTIVATIONS = ("quick_gelu", "gelu")

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_RESIZE_MODES = {"shortest": "crop", "longest": "pad", "squash": "squash"}  # open_clip's names


def load_vision(
    *, clip: Path, projector: Path, activation: str | None = None
) -> tuple[Vision, VisionConfig]:
    """Read a CLIP vision tower and a projector into one torch module, float32, in eval mode.

    clip: a folder or file of open_clip or Hugging Face; its configuration lies beside it.
    projector: a file of a linear or MLP bridge. activation: "quick_gelu" or "gelu", for a CLIP
    file without configuration. Raises CheckpointError.
    """
    tower, names, spec = _load_clip(Path(clip), activation)
    bridge, name, inputs = _load_bridge(Path(projector))
    if inputs != names.width:
        raise CheckpointError(
            f"{projector}: takes {inputs} numbers a token; expected {names.width}, the width of "
            f"{clip}: give --clip the tower that the projector was trained with"
        )
    tokens = (names.image_size // names.patch_size) ** 2
    config = VisionConfig(
        graph="vision.onnx", tokens=tokens, tower="clip", bridge=name, pixels=spec
    )
    return Vision(tower, bridge).eval(), config


def export_vision(module: nn.Module, config: VisionConfig, path: Path, *, precision: str) -> None:
    """Write a vision module as ONNX: pixel_values [n, 3, S, S] -> image_embeds [n, tokens, hidden].

    precision: "fp32", or "fp16", where weight matrices are stored as float16 and the arithmetic
    stays float32. Weights beyond 1.9 GB go to a file beside it, named like `path` with ".data".
    """
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"vision precision is {precision!r}; expected fp32 or fp16")
    size = config.pixels.image_size
    with _quiet():
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=["image_embeds"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            verbose=False,
        )
        assert program is not None  # None only comes from the old exporter
        model = program.model
        ClearMetadataAndDocStringPass()(model)  # traces of the exporting machine's source files
        if precision == "fp16":
            _store_as_fp16(model.graph)
        values = [v.const_value for v in model.graph.initializers.values()]
        external = sum(v.nbytes for v in values if v is not None) > EXTERNAL_DATA_BYTES
        ir.save(model, path, external_data=f"{path.name}.data" if external else None)


def _load_clip(path: Path, activation: str | None) -> tuple[ClipTower, ClipNames, PixelSpec]:
    checkpoint = open_checkpoint(path)
    names = map_clip(checkpoint.shapes, where=str(path))
    folder = path if path.is_dir() else path.parent
    read = _open_clip_settings if names.form == "open_clip" else _hugging_face_settings
    settings = read(folder, names)
    activation = activation or settings.activation
    if activation is None:
        raise CheckpointError(
            f"{path}: no {settings.file} beside it, and the weights do not tell their activation; "
            "expected to know it: put the file there, or pass --clip-activation quick_gelu "
            "(OpenAI's weights) or gelu (LAION's)"
        )
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{settings.file}: activation {activation!r}; expected {' or '.join(ACTIVATIONS)}: "
            "give --clip a CLIP ViT checkpoint"
        )
    if settings.heads < 1 or names.width % settings.heads:
        raise CheckpointError(
            f"{path}: width {names.width} in {settings.heads} attention heads; expected a "
            f"multiple: put the {settings.file} beside it that belongs to it"
        )
    tower = ClipTower(
        names,
        heads=settings.heads,
        activation=activation,
        layernorm_epsilon=settings.layernorm_epsilon,
    )

    def tensor(ours: str) -> np.ndarray:
        part = names.used[ours]
        array = checkpoint.read(part.key)
        return array if part.third is None else np.split(array, 3)[part.third]

    _fill(tower.clip, names.used, tensor)
    return tower, names, settings.pixels


def _load_bridge(path: Path) -> tuple[nn.Module, str, int]:
    checkpoint = open_checkpoint(path)
    names = map_bridge(checkpoint.shapes, where=str(path))
    bridge = BRIDGES[names.name](names.inputs, names.outputs)
    _fill(bridge, names.used, lambda ours: checkpoint.read(names.used[ours]))
    return bridge, names.name, names.inputs


def _fill(module: nn.Module, names: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> None:
    """Copy a checkpoint into a module, one tensor at a time; neither may have a name to spare."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != names.keys():
        raise CheckpointError(
            f"{type(module).__name__} has other parameters than expected "
            f"({sorted(parameters.keys() ^ names.keys())[:4]}): install a transformers version "
            "that seechat-lite was tested with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(read(name))))


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What configuration files say of a CLIP tower."""

    file: str  # where, for errors
    heads: int
    activation: str | None
    layernorm_epsilon: float
    pixels: PixelSpec


def _open_clip_settings(folder: Path, names: ClipNames) -> _Settings:
    file = folder / "open_clip_config.json"
    config = read_json(file) if file.exists() else {}
    model = config.get("model_cfg", config)
    vision = model.get("vision_cfg", {})
    sizes = ("width", "layers", "patch_size", "image_size")
    _must_agree(file, names, *(vision.get(k) for k in sizes))
    if not config:
        activation = None
    elif vision.get("act_kwargs"):  # a GELU of another kind
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
    return _Settings(
        file=file.name,
        heads=names.width // (vision.get("head_width") or 64),
        activation=activation,
        layernorm_epsilon=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        pixels=pixels,
    )


def _hugging_face_settings(folder: Path, names: ClipNames) -> _Settings:
    from transformers import CLIPVisionConfig

    file = folder / "config.json"
    pixels = _hugging_face_pixels(folder / "preprocessor_config.json", names)
    if not file.exists():
        return _Settings(file.name, names.width // 64, None, 1e-5, pixels)
    given = read_json(file)
    try:
        # what a Hugging Face configuration leaves out is this class's default
        config = CLIPVisionConfig.from_dict(given.get("vision_config", given))
    except Exception as e:  # its validation raises classes of its own
        raise CheckpointError(
            f"{file}: {str(e).splitlines()[0]}; expected the configuration of a CLIP model: "
            "download the file again"
        ) from None
    _must_agree(
        file,
        names,
        config.hidden_size,
        config.num_hidden_layers,
        config.patch_size,
        config.image_size,
    )
    return _Settings(
        file=file.name,
        heads=config.num_attention_heads,
        activation=config.hidden_act,
        layernorm_epsilon=config.layer_norm_eps,
        pixels=pixels,
    )


def _hugging_face_pixels(file: Path, names: ClipNames) -> PixelSpec:
    given = read_json(file) if file.exists() else {}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(step, True) is not True:
            raise CheckpointError(
                f"{file}: {step} is {given[step]!r}; expected true, as CLIP was trained: "
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
        resize="crop" if crops else "squash",
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
    """Check what a configuration says of pictures; where it says nothing, CLIP's own values."""
    clip = PixelSpec()
    mean, std = mean or clip.mean, std or clip.std
    numbers = all(
        isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(x, int | float) for x in v)
        for v in (mean, std)
    )
    if not numbers or 0 in std or interpolation not in _RESAMPLE.values():
        raise CheckpointError(
            f"{file}: mean {mean}, std {std}, interpolation {interpolation!r}; expected three "
            f"numbers each and {', '.join(_RESAMPLE.values())}: download the file again"
        )
    if resize not in _RESIZE_MODES.values():
        raise CheckpointError(
            f"{file}: resize mode {resize!r}; expected {', '.join(_RESIZE_MODES)}: "
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
    """Refuse a configuration of another model, whose heads and activation would be wrong as well.

    The inner size is not compared: the tensors have it, while open_clip states a rounded ratio.
    """
    found = (width, layers, patch_size, image_size)
    expected = (names.width, names.layers, names.patch_size, names.image_size)
    for what, a, b in zip(("width", "layers", "patch", "image"), found, expected, strict=True):
        if a not in (None, b, [b, b], (b, b)):
            raise CheckpointError(
                f"{file}: {what} is {a}, but {b} in the weights; expected both of one model: "
                "put the configuration there that belongs to the weights"
            )


def _store_as_fp16(graph: ir.Graph) -> None:
    """Store weight matrices as float16, each cast back to float32 in front of its users.

    Vectors (biases, layer norms) stay as they are: they are small, and rounding them shows.
    """
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        half = tensor.numpy().astype(np.float16)
        if not np.isfinite(half).all():  # beyond float16's range
            continue
        stored = ir.Value(name=f"{name}.fp16", const_value=ir.tensor(half))
        stored.dtype, stored.shape = ir.DataType.FLOAT16, value.shape
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        (back,) = cast.outputs
        back.name, back.dtype, back.shape = f"{name}.fp32", ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, back)
        graph.register_initializer(stored)
        del graph.initializers[name]
        graph.insert_before(graph[0], cast)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from talking about its inner life: warnings, log lines, prints."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
