"""Published names and ours, of the LM: which tensor of a checkpoint becomes which parameter."""

from collections.abc import Mapping
from typing import Any

from seechat_weights.accounting import Shape, Shapes, account, check_shapes
from seechat_weights.bundle import LMConfig
from seechat_weights.errors import CheckpointError

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
    ignored = account(shapes, used.values(), reasons, where)
    check_shapes(shapes, {used[k]: s for k, s in expected.items()}, where)
    return used, ignored
