"""Names: every tensor of a published checkpoint is used or ignored for a reason."""

from typing import Any

import pytest
import torch

from reference import data, load_json, manifest
from seechat_export.reference_chatglm import ChatGLM
from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shapes
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.lm.chatglm import (
    OLD_VOCABULARY,
    lm_config,
    lm_shapes,
    map_lm,
)

TINY = load_json("chatglm_tiny/config.json")


@pytest.fixture
def tiny() -> dict[str, Any]:
    return dict(open_checkpoint(data("chatglm_tiny")).shapes)


def test_published_configuration_is_the_default() -> None:
    assert lm_config({"model_type": "chatglm"}) == LMConfig()


def test_old_vocabulary() -> None:
    config = lm_config({"model_type": "chatglm", "vocab_size": OLD_VOCABULARY})
    assert (config.mask_id, config.gmask_id, config.pad_id) == (150000, 150001, 0)
    assert (config.bos_id, config.eos_id) == (150004, 150005)
    assert len(map_lm(manifest("chatglm-6b-150528"), config, where="old").used) == 340


def test_tiny_configuration() -> None:
    config = lm_config(TINY)
    assert (config.hidden_size, config.num_layers, config.num_heads) == (64, 3, 4)
    assert (config.gmask_id, config.bos_id, config.head_size) == (2001, 2004, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"multi_query_attention": True}, "ChatGLM2, ChatGLM3 or GLM-4"),
        ({"padded_vocab_size": 65024}, "ChatGLM2, ChatGLM3 or GLM-4"),
        ({"position_encoding_2d": False}, "position_encoding_2d is off"),
        ({"num_layers": "3"}, "num_layers is '3'"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 10**9}, "num_layers is 1000000000; expected at most 1024"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776; expected at most"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"num_attention_heads": 5}, "a multiple of 20"),
        ({"gmask_token_id": None}, "gmask_token_id is 130001 in a vocabulary of 2432"),
    ],
)
def test_refused_configuration(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as e:
        lm_config(TINY | change, where="folder/config.json")
    assert str(e.value).startswith("folder/config.json: ")
    assert "expected" in str(e.value)


def test_published_checkpoint_is_accounted_for() -> None:
    shapes = manifest("chatglm-6b")
    names = map_lm(shapes, LMConfig(), where="chatglm-6b")
    used, ignored = {ours: p.key for ours, (p,) in names.used.items()}, names.ignored
    assert (
        used["layers.27.mlp.dense_4h_to_h.bias"] == "transformer.layers.27.mlp.dense_4h_to_h.bias"
    )
    assert used["lm_head.weight"] == "lm_head.weight"
    assert set(used.values()) | ignored.keys() == shapes.keys()
    assert all(k.endswith("rotary_emb.inv_freq") for k in ignored) and len(ignored) == 28
    assert all(ignored.values())


def test_names_and_shapes_are_the_networks() -> None:
    config = lm_config(TINY)
    with torch.device("meta"):
        parameters = ChatGLM(config).state_dict()
    assert {k: tuple(v.shape) for k, v in parameters.items()} == lm_shapes(config)


def test_absent_head_is_tied(tiny: dict[str, Any]) -> None:
    del tiny["lm_head.weight"]
    used = map_lm(tiny, lm_config(TINY), where="tied").used
    assert used["lm_head.weight"][0].key == "transformer.word_embeddings.weight"


def lm_error(shapes: Shapes, config: LMConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as e:
        map_lm(shapes, config or lm_config(TINY), where="folder")
    assert str(e.value).startswith("folder: ") and "\n" not in str(e.value)
    return str(e.value)


def test_missing_and_surplus_tensors_are_named(tiny: dict[str, Any]) -> None:
    del tiny["transformer.layers.1.attention.dense.bias"]
    for i in range(9):
        tiny[f"transformer.layers.3.extra{i}"] = ((1,), "float16")
    message = lm_error(tiny)
    assert "1 missing (transformer.layers.1.attention.dense.bias)" in message
    assert "9 not known (transformer.layers.3.extra0, " in message
    assert "extra3 and 5 more)" in message


def test_other_shapes_are_named(tiny: dict[str, Any]) -> None:
    key = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    tiny[key] = ((64, 256), "float16")
    assert f"{key} is [64, 256] instead of [256, 64]" in lm_error(tiny)
    tiny[key] = ((256, 64), "int16")
    assert f"{key} is int16 instead of float16" in lm_error(tiny)
    tiny[key] = ((256, 64), "int8")  # quantized, and its scales are not there
    assert f"1 missing ({key}_scale)" in lm_error(tiny)
    tiny[f"{key}_scale"] = ((256,), "float16")
    tiny[key] = ((256, 16), "int8")
    assert f"{key} is [256, 16] instead of [256, 64]" in lm_error(tiny)


def test_another_number_of_heads_is_noticed(tiny: dict[str, Any]) -> None:
    message = lm_error(tiny, lm_config(TINY | {"num_attention_heads": 8}))
    assert "transformer.layers.0.attention.rotary_emb.inv_freq is [4] instead of [2]" in message


def test_vocabulary_of_the_other_release() -> None:
    message = lm_error(manifest("chatglm-6b-150528"), LMConfig())
    assert "[150528, 4096] instead of [130528, 4096]" in message
