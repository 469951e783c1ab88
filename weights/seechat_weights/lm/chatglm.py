"""Maps published names of the LM to ours: which tensor of a checkpoint becomes which parameter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seechat_weights.config import MAX_LAYERS, LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, Shapes, account, check_shapes
from seechat_weights.lm.names import LMNames, Part, Published

OLD_VOCABULARY = 150528  # releases before April 2023: image tokens come before the text's
OLD_IMAGE_TOKENS = 20000
_OLD_IDS = {"pad_id": 0, "mask_id": 150000, "gmask_id": 150001, "bos_id": 150004, "eos_id": 150005}
# no ChatGLM-6B has more; larger sizes would only fill the memory before they are refused
_MOST = 1 << 24
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
    """Read the decoder's shape from a ChatGLM-6B config.json; missing settings are as published.

    config: the JSON object.
    where: the file's name, for errors.

    Raises CheckpointError for other models, one-dimensional positions, and impossible values.
    """

    def refuse(found: str, expected: str, do: str) -> CheckpointError:
        return CheckpointError(f"{where}: {found}; expected {expected}: {do}")

    model_type = config.get("model_type")
    if model_type != "chatglm":
        raise refuse(
            f"model_type is {model_type!r:.80}", "'chatglm'", "name a ChatGLM-6B checkpoint"
        )
    later = next((name for name in _LATER_GENERATIONS if name in config), None)
    if later:
        raise refuse(
            f"has {later}, so this is ChatGLM2, ChatGLM3 or GLM-4",
            "ChatGLM-6B of the first generation, another network under the same name",
            "name a checkpoint of THUDM/chatglm-6b",
        )
    if config.get("position_encoding_2d", True) is not True:
        raise refuse(
            "position_encoding_2d is off",
            "ChatGLM-6B's two-dimensional positions",
            "this variant is not supported",
        )
    old = config.get("vocab_size") == OLD_VOCABULARY
    values: dict[str, Any] = dict(_OLD_IDS) if old else {}
    for ours, published in _LM_FIELDS.items():
        if config.get(published) is None:
            continue
        value = values[ours] = config[published]
        is_float = ours == "layernorm_epsilon"
        if isinstance(value, bool) or not isinstance(value, int | float if is_float else int):
            raise refuse(f"{published} is {value!r:.80}", "a number", "download the file again")
        if value < 0 or (value == 0 and not ours.endswith("_id")):
            raise refuse(f"{published} is {value}", "more than 0", "download the file again")
        limit = MAX_LAYERS if ours == "num_layers" else _MOST
        if value > limit:
            raise refuse(f"{published} is {value}", f"at most {limit}", "download the file again")
    lm = LMConfig(**values)
    # a head has two halves, whose numbers rotate in pairs
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
    """Our parameters of the decoder and their shapes: published names without "transformer."."""
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


@dataclass(frozen=True)
class Form:
    """How a family of checkpoints names our layers.N.*, word_embeddings and other parameters."""

    body: str  # the prefix of those names
    head: str  # lm_head.weight
    partial: bool = False  # it may hold any subset of the tensors, laid over a base


FORMS = {
    "huggingface": Form("transformer.", "lm_head.weight"),
    "sat": Form("transformer.", "mixins.chatglm-final.lm_head.weight"),  # VisualGLM's own
    "seechat": Form("llama_model.transformer.", "llama_model.lm_head.weight", partial=True),
}
_REASONS = (
    (r"(.*\.)?rotary_emb\.inv_freq", "computed from the head size"),
    (r"transformer\.position_embeddings\.weight", "ChatGLM-6B's positions are rotary"),
)
# a linear that SAT trained with LoRA: its weights, and a pair of matrices for each part of its rows
_SAT_LORA = re.compile(r"transformer\.(layers\..*)\.matrix_([AB])\.(\d+)")


def chatglm_parts(config: LMConfig) -> dict[str, tuple[Part, ...]]:
    """Our parameters of the decoder, each with the one tensor of Hugging Face's that it is.

    config: the decoder's shape.
    """
    row = FORMS["huggingface"]
    return {
        ours: (Part(row.head if ours == "lm_head.weight" else row.body + ours, shape),)
        for ours, shape in lm_shapes(config).items()
    }


def map_lm(shapes: Shapes, config: LMConfig, *, where: str, form: str = "huggingface") -> LMNames:
    """Find ChatGLM-6B in a checkpoint of one of the FORMS.

    A missing lm_head means that the word embeddings serve as it (tied).

    shapes: the tensors of its LM.
    config: the shape that it must have.
    where: its path, for errors.
    form: a key of FORMS.

    Raises CheckpointError; it names missing, surplus and misshapen tensors.
    """
    row, expected = FORMS[form], lm_shapes(config)

    def published(ours: str) -> str:
        key = row.head if ours == "lm_head.weight" else row.body + ours
        module, _, kind = key.rpartition(".")
        original = f"{module}.original.{kind}"
        return original if form == "sat" and original in shapes else key

    keys = {ours: published(ours) for ours in expected}
    if row.partial:
        keys = {ours: key for ours, key in keys.items() if key in shapes}
    elif keys["lm_head.weight"] not in shapes:
        keys["lm_head.weight"] = keys["word_embeddings.weight"]
    used: dict[str, Published] = {}
    floats: dict[str, Shape] = {}
    integers: dict[str, Shape] = {}
    for ours, key in keys.items():
        shape = expected[ours]
        found, dtype = shapes.get(key, (shape, ""))
        if dtype == "int8" and len(shape) == 2:
            # half as many columns: a byte holds two
            bits = 4 if len(found) == 2 and found[1] * 2 == shape[1] else 8
            used[ours] = Published(key, f"{key}_scale", bits)
            floats[used[ours].scale] = shape[:1]
            integers[key] = (shape[0], shape[1] * bits // 8)
        else:
            used[ours] = Published(key)
            floats[key] = shape
    encoder = f"{row.body}prefix_encoder."
    prefix = {k.removeprefix(encoder): k for k in shapes if k.startswith(encoder)}
    if form == "sat":
        prefix = {k: k for k in shapes if k.startswith("mixins.ptuning.prefix.")}
    loras = _sat_loras(shapes, expected, where) if form == "sat" else {}
    pairs = [key for parts in loras.values() for pair in parts for key in pair]
    ignored = account(shapes, [*floats, *integers, *prefix.values(), *pairs], _REASONS, where)
    # only used to notice another number of heads
    frequencies = {k: (config.head_size // 4,) for k in ignored if k.endswith("inv_freq")}
    check_shapes(shapes, floats | frequencies, where)
    check_shapes(shapes, integers, where, dtypes=("int8",))
    return LMNames({ours: (found,) for ours, found in used.items()}, prefix, loras, ignored)


def _sat_loras(
    shapes: Shapes, expected: Mapping[str, Shape], where: str
) -> dict[str, list[tuple[str, str]]]:
    parts: dict[str, set[int]] = {}
    for key in shapes:
        if found := _SAT_LORA.fullmatch(key):
            parts.setdefault(f"{found[1]}.weight", set()).add(int(found[3]))
    loras = {}
    for ours, numbers in parts.items():
        count = len(numbers)
        if ours not in expected or numbers != set(range(count)):
            raise CheckpointError(
                f"{where}: holds LoRA matrices {sorted(numbers)} of {ours}, expected those of a "
                "linear of the LM, counted from 0: download the checkpoint again"
            )
        module = f"transformer.{ours.removesuffix('.weight')}"
        loras[ours] = [(f"{module}.matrix_A.{i}", f"{module}.matrix_B.{i}") for i in range(count)]
    return loras
