"""Published names and ours: which tensor of a checkpoint becomes which parameter.

Every tensor of a checkpoint is either used or ignored for a stated reason; one that is missing,
surplus or of another shape than the configuration says is an error. A model loaded with a tensor
silently skipped would answer, and answer wrongly.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from seechat_weights.bundle import LMConfig
from seechat_weights.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, str]]  # a Checkpoint's `shapes`: name -> (shape, dtype)

OLD_VOCABULARY = 150528  # releases before April 2023: 20000 image tokens come first
_OLD_IDS = {"pad_id": 0, "mask_id": 150000, "gmask_id": 150001, "bos_id": 150004, "eos_id": 150005}
# settings of ChatGLM2, ChatGLM3 and GLM-4, which share the first generation's model_type
_LATER_GENERATIONS = ("padded_vocab_size", "multi_query_attention", "ffn_hidden_size", "rmsnorm")
_LM_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "inner_size": "inner_hidden_size",
    "layernorm_epsilon": "layernorm_epsilon",
    "max_sequence_length": "max_sequence_length",
    "pad_id": "pad_token_id",
    "mask_id": "mask_token_id",
    "gmask_id": "gmask_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}


def lm_config(config: Mapping[str, Any], *, where: str = "config.json") -> LMConfig:
    """The decoder's shape from a ChatGLM-6B config.json; what it does not say is as published.

    Raises CheckpointError (`where` names the file) for other models, quantized checkpoints,
    one-dimensional positions, and values that cannot be.
    """

    def refuse(found: str, expected: str, do: str) -> CheckpointError:
        return CheckpointError(f"{where}: {found}; expected {expected}: {do}")

    model_type = config.get("model_type")
    if model_type != "chatglm":
        raise refuse(
            f"model_type is {model_type!r}", "'chatglm'", "give --lm a ChatGLM-6B checkpoint"
        )
    later = next((name for name in _LATER_GENERATIONS if name in config), None)
    if later:
        raise refuse(
            f"has {later}, so this is ChatGLM2, ChatGLM3 or GLM-4",
            "ChatGLM-6B of the first generation, another network under the same name",
            "give --lm a checkpoint of THUDM/chatglm-6b",
        )
    if config.get("position_encoding_2d", True) is not True:
        raise refuse(
            "position_encoding_2d is off",
            "ChatGLM-6B's two-dimensional positions",
            "this variant is not supported",
        )
    if config.get("quantization_bit"):
        raise refuse(
            f"quantization_bit is {config['quantization_bit']}, so the weights are quantized",
            "fp16 weights",
            "export the fp16 checkpoint, with --precision int4 or int8 for the same size",
        )

    old = config.get("vocab_size") == OLD_VOCABULARY
    values: dict[str, Any] = dict(_OLD_IDS) if old else {}
    for ours, published in _LM_FIELDS.items():
        if config.get(published) is None:
            continue
        value = values[ours] = config[published]
        is_float = ours == "layernorm_epsilon"
        if isinstance(value, bool) or not isinstance(value, int | float if is_float else int):
            raise refuse(f"{published} is {value!r}", "a number", "download the file again")
        if value < 0 or (value == 0 and not ours.endswith("_id")):
            raise refuse(f"{published} is {value}", "more than 0", "download the file again")
    lm = LMConfig(**values)
    # a head is cut in two halves, whose numbers turn in pairs
    if lm.hidden_size % (4 * lm.num_heads):
        raise refuse(
            f"hidden_size {lm.hidden_size} with {lm.num_heads} attention heads",
            f"a multiple of {4 * lm.num_heads}",
            "download the file again",
        )
    for ours in _OLD_IDS:
        if getattr(lm, ours) >= lm.vocab_size:
            raise refuse(
                f"{_LM_FIELDS[ours]} is {getattr(lm, ours)} in a vocabulary of {lm.vocab_size}",
                f"less than {lm.vocab_size}",
                f"state {_LM_FIELDS[ours]} in the file",
            )
    return lm


def lm_shapes(config: LMConfig) -> dict[str, Shape]:
    """Our parameters of the decoder and their shapes: the published names less "transformer."."""
    h, inner = config.hidden_size, config.inner_size
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (h,),
        "input_layernorm.bias": (h,),
        "attention.query_key_value.weight": (3 * h, h),  # rows [head][q | k | v][head_size]
        "attention.query_key_value.bias": (3 * h,),
        "attention.dense.weight": (h, h),
        "attention.dense.bias": (h,),
        "post_attention_layernorm.weight": (h,),
        "post_attention_layernorm.bias": (h,),
        "mlp.dense_h_to_4h.weight": (inner, h),
        "mlp.dense_h_to_4h.bias": (inner,),
        "mlp.dense_4h_to_h.weight": (h, inner),
        "mlp.dense_4h_to_h.bias": (h,),
    }
    return {
        "word_embeddings.weight": (config.vocab_size, h),
        **{f"layers.{i}.{k}": s for i in range(config.num_layers) for k, s in layer.items()},
        "final_layernorm.weight": (h,),
        "final_layernorm.bias": (h,),
        "lm_head.weight": (config.vocab_size, h),
    }


def map_lm(
    shapes: Shapes, config: LMConfig, *, where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Our parameter -> published tensor, and ignored tensor -> reason, of a ChatGLM-6B checkpoint.

    shapes: the checkpoint's; where: its path, for errors. An absent lm_head is the word
    embeddings (tied). Raises CheckpointError naming missing, surplus and misshapen tensors.
    """
    if any(k.endswith(".weight_scale") for k in shapes):
        raise CheckpointError(
            f"{where}: holds quantized weights (*.weight_scale); expected fp16 weights: "
            "export the fp16 checkpoint, with --precision int4 or int8 for the same size"
        )
    if any(k.startswith("transformer.prefix_encoder.") for k in shapes):
        raise CheckpointError(
            f"{where}: holds a P-tuning prefix (transformer.prefix_encoder.*), which is not "
            "supported yet; expected ChatGLM-6B alone: give --lm the checkpoint it was tuned from"
        )
    expected = lm_shapes(config)
    used = {k: k if k == "lm_head.weight" else f"transformer.{k}" for k in expected}
    if "lm_head.weight" not in shapes:
        used["lm_head.weight"] = used["word_embeddings.weight"]
    reasons = ((r"transformer\.(.*\.)?rotary_emb\.inv_freq", "computed from the head size"),)
    ignored = _account(shapes, used.values(), reasons, where)
    _check_shapes(shapes, {used[k]: s for k, s in expected.items()}, where)
    return used, ignored


@dataclass(frozen=True)
class Part:
    """A parameter's source: a published tensor, or a third of its rows (of a fused q, k, v)."""

    key: str
    third: int | None = None


@dataclass(frozen=True)
class ClipNames:
    """A CLIP vision tower found in a checkpoint; its sizes are those of the tensors."""

    form: str  # "open_clip" or "huggingface"
    image_size: int
    patch_size: int
    width: int
    inner_size: int
    layers: int  # in the checkpoint; the last one is not used
    used: dict[str, Part]  # our parameter -> where it comes from
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
    in_layer = re.compile(re.escape(prefix + stack) + r"(\d+)\.")
    layers = 1 + max((int(m[1]) for k in shapes if (m := in_layer.match(k))), default=-1)
    if layers < 2:
        raise CheckpointError(
            f"{where}: the vision tower has {layers} transformer layers; expected a CLIP ViT with "
            "two or more: other vision towers (ResNet, timm) are not supported"
        )
    last = re.escape(f"{prefix}{stack}{layers - 1}.")
    names = _clip_shapes(width=0, inner=0, patch=0, positions=0, layers=layers - 1)
    used = {k: _clip_part(k, form, prefix) for k in names}
    ignored = _account(
        shapes, [p.key for p in used.values()], ((last + ".*", _LAST), *reasons), where
    )

    def shape(ours: str, rank: int) -> Shape:
        key = used[ours].key
        found = shapes[key][0]
        if len(found) != rank or 0 in found:
            raise CheckpointError(
                f"{where}: {key} has shape {list(found)}, expected {rank} sizes above 0: "
                "give --clip a CLIP ViT checkpoint"
            )
        return found

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    positions, _ = shape("embeddings.position_embedding.weight", 2)
    inner, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise CheckpointError(
            f"{where}: {positions} position embeddings, expected a square of patches and one more: "
            "other vision towers are not supported"
        )
    expected: dict[str, Shape] = {}
    sizes = _clip_shapes(
        width=width, inner=inner, patch=patch, positions=positions, layers=layers - 1
    )
    for ours, ours_shape in sizes.items():
        part = used[ours]
        rows = ours_shape[0] * (1 if part.third is None else 3)
        expected[part.key] = (rows, *ours_shape[1:])
    _check_shapes(shapes, expected, where)
    return ClipNames(form, side * patch, patch, width, inner, layers, used, ignored)


def _clip_shapes(
    *, width: int, inner: int, patch: int, positions: int, layers: int
) -> dict[str, Shape]:
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
        return Part(prefix + ours)
    name = ours
    for old, new in _OPEN_CLIP_NAMES.items():
        name = name.replace(old, new)
    fused = re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name)
    if fused:
        return Part(f"{prefix}{fused[1]}attn.in_proj_{fused[3]}", "qkv".index(fused[2]))
    return Part(prefix + name)


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
    used: dict[str, str]  # our parameter -> published tensor
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
            f"{where}: holds no known bridge ({_few(list(shapes))}); expected a projector, one of "
            f"{', '.join(BRIDGE_TENSORS)}, as mm_projector.*, llama_proj.* or plain weight and "
            "bias: give --projector the file that holds it"
        )
    name, tensors = found[0]
    used = {k: prefix + k for k in tensors}
    ignored = _account(shapes, used.values(), _BRIDGE_REASONS, where)
    first = shapes[used[next(iter(tensors))]][0]
    if len(first) != 2 or 0 in first:
        raise CheckpointError(
            f"{where}: {prefix}{next(iter(tensors))} has shape {list(first)}, expected "
            "[outputs, inputs]: give --projector the file that holds a projector"
        )
    outputs, inputs = first
    sizes = {"o": outputs, "i": inputs}
    expected = {used[k]: tuple(sizes[axis] for axis in axes) for k, axes in tensors.items()}
    _check_shapes(shapes, expected, where)
    return BridgeNames(name, inputs, outputs, used, ignored)


def _account(
    shapes: Shapes, needed: Iterable[str], reasons: Iterable[tuple[str, str]], where: str
) -> dict[str, str]:
    """See that every tensor is needed or has a reason (pattern, why); returns the ignored ones."""
    needed = dict.fromkeys(needed)
    missing = [k for k in needed if k not in shapes]
    ignored, surplus = {}, []
    for key in shapes:
        if key in needed:
            continue
        reason = next((why for pattern, why in reasons if re.fullmatch(pattern, key)), None)
        if reason is None:
            surplus.append(key)
        else:
            ignored[key] = reason
    found = [
        f"{len(keys)} {what} ({_few(keys)})"
        for what, keys in (("missing", missing), ("not known", surplus))
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{where}: tensors are {' and '.join(found)}; expected exactly the {len(needed)} that "
            "its configuration calls for: download the checkpoint again, or name the right one"
        )
    return ignored


def _check_shapes(shapes: Shapes, expected: Mapping[str, Shape], where: str) -> None:
    wrong = []
    for key, shape in expected.items():
        found, dtype = shapes[key]
        if tuple(found) != shape:
            wrong.append(f"{key} is {list(found)} instead of {list(shape)}")
        elif dtype not in ("float16", "bfloat16", "float32", "float64"):
            wrong.append(f"{key} is {dtype} instead of float16 or float32")
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} of {len(expected)} tensors do not fit ({_few(wrong)}); "
            "expected the sizes of its configuration: take both from the same model"
        )


def _few(items: list[str]) -> str:
    shown = ", ".join(items[:4])
    return shown if len(items) <= 4 else f"{shown} and {len(items) - 4} more"
