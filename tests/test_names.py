"""Names: every tensor of a published checkpoint is used or ignored for a reason."""

from typing import Any

import pytest
import torch

from reference import data, load_json
from seechat_lite.nn.bridges import BRIDGES
from seechat_lite.nn.chatglm import ChatGLM
from seechat_weights.bundle import LMConfig
from seechat_weights.checkpoints import open_checkpoint
from seechat_weights.errors import CheckpointError
from seechat_weights.names import (
    BRIDGE_TENSORS,
    OLD_VOCABULARY,
    Shapes,
    lm_config,
    lm_shapes,
    map_bridge,
    map_clip,
    map_lm,
)

TINY = load_json("chatglm_tiny/config.json")


def manifest(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of a checkpoint at its published size."""
    published = load_json(f"manifests/{name}.json")["tensors"]
    return {key: (tuple(entry[0]), entry[1]) for key, entry in published.items()}


@pytest.fixture
def tiny() -> dict[str, Any]:
    return dict(open_checkpoint(data("chatglm_tiny")).shapes)


def test_published_configuration_is_the_default() -> None:
    assert lm_config({"model_type": "chatglm"}) == LMConfig()


def test_old_vocabulary() -> None:
    config = lm_config({"model_type": "chatglm", "vocab_size": OLD_VOCABULARY})
    assert (config.mask_id, config.gmask_id, config.pad_id) == (150000, 150001, 0)
    assert (config.bos_id, config.eos_id) == (150004, 150005)
    used, _ = map_lm(manifest("chatglm-6b-150528"), config, where="old")
    assert len(used) == 340


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
        ({"quantization_bit": 4}, "export the fp16 checkpoint"),
        ({"num_layers": "3"}, "num_layers is '3'"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 0}, "num_layers is 0"),
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
    used, ignored = map_lm(shapes, LMConfig(), where="chatglm-6b")
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
    used, _ = map_lm(tiny, lm_config(TINY), where="tied")
    assert used["lm_head.weight"] == "transformer.word_embeddings.weight"


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
    tiny[key] = ((256, 64), "int8")
    assert f"{key} is int8 instead of float16" in lm_error(tiny)


def test_vocabulary_of_the_other_release() -> None:
    message = lm_error(manifest("chatglm-6b-150528"), LMConfig())
    assert "[150528, 4096] instead of [130528, 4096]" in message


def test_prefix_and_quantized_weights_have_their_own_message(tiny: dict[str, Any]) -> None:
    prefix = {"transformer.prefix_encoder.embedding.weight": ((8, 384), "float32")}
    assert "not supported yet" in lm_error(tiny | prefix)
    scale = {"transformer.layers.0.attention.dense.weight_scale": ((64,), "float16")}
    assert "export the fp16 checkpoint" in lm_error(tiny | scale)


def test_published_clip_is_accounted_for() -> None:
    shapes = manifest("open_clip_ViT-L-14_visual")
    clip = map_clip(shapes, where="ViT-L-14")
    assert (clip.image_size, clip.patch_size, clip.width, clip.inner_size) == (224, 14, 1024, 4096)
    assert clip.layers == 24
    assert {p.key for p in clip.used.values()} | clip.ignored.keys() == shapes.keys()
    assert not any(p.key.startswith("visual.transformer.resblocks.23.") for p in clip.used.values())
    value = clip.used["encoder.layers.22.self_attn.v_proj.bias"]
    assert (value.key, value.third) == ("visual.transformer.resblocks.22.attn.in_proj_bias", 2)


def test_whole_clip_files_ignore_the_text_tower() -> None:
    open_clip = map_clip(open_checkpoint(data("vision/clip_open_clip")).shapes, where="open_clip")
    assert open_clip.ignored["token_embedding.weight"] == "belongs to the text tower"
    assert open_clip.ignored["visual.transformer.resblocks.3.ln_1.bias"]

    shapes = dict(open_checkpoint(data("vision/clip_hf")).shapes)
    alone = map_clip(shapes, where="CLIPVisionModel")
    assert alone.used.keys() == open_clip.used.keys()
    shapes |= {
        "text_model.final_layer_norm.weight": ((16,), "float32"),
        "vision_model.embeddings.position_ids": ((1, 17), "int64"),
        "visual_projection.weight": ((24, 48), "float32"),
        "text_projection.weight": ((24, 16), "float32"),
        "logit_scale": ((), "float32"),
    }
    whole = map_clip(shapes, where="CLIPModel")
    assert whole.used == alone.used
    assert whole.ignored.keys() - alone.ignored.keys() == shapes.keys() - alone.ignored.keys() - {
        p.key for p in alone.used.values()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.ln_pre.bias": None}, "1 missing (visual.ln_pre.bias)"),
        ({"visual.attnpool.weight": ((1,), "float32")}, "1 not known (visual.attnpool.weight)"),
        ({"visual.positional_embedding": ((18, 48), "float32")}, "18 position embeddings"),
        ({"visual.ln_pre.bias": ((47,), "float32")}, "ln_pre.bias is [47] instead of [48]"),
        ({"visual.conv1.weight": ((48, 588), "float32")}, "conv1.weight has shape [48, 588]"),
    ],
)
def test_clip_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    shapes = dict(open_checkpoint(data("vision/clip_open_clip")).shapes) | change
    with pytest.raises(CheckpointError) as e:
        map_clip({k: v for k, v in shapes.items() if v}, where="file")
    assert message in str(e.value)


def test_no_clip_at_all(tiny: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        map_clip(tiny, where="file")
    with pytest.raises(CheckpointError, match="0 transformer layers"):
        map_clip({"visual.layer1.0.conv1.weight": ((64, 64, 1, 1), "float32")}, where="ResNet")


def test_every_bridge_has_a_network() -> None:
    assert BRIDGES.keys() == BRIDGE_TENSORS.keys()
    for name, build in BRIDGES.items():
        assert build(6, 8).state_dict().keys() == BRIDGE_TENSORS[name].keys()


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"weight": (8, 6), "bias": (8,)}, "linear"),
        ({"mm_projector.weight": (8, 6), "mm_projector.bias": (8,)}, "linear"),
        ({"model.mm_projector.weight": (8, 6), "model.mm_projector.bias": (8,)}, "linear"),
        ({"llama_proj.weight": (8, 6), "llama_proj.bias": (8,)}, "linear"),
        (
            {
                "mm_projector.0.weight": (8, 6),
                "mm_projector.0.bias": (8,),
                "mm_projector.2.weight": (8, 8),
                "mm_projector.2.bias": (8,),
            },
            "mlp2x_gelu",
        ),
    ],
)
def test_bridge_names(keys: dict[str, tuple[int, ...]], name: str) -> None:
    bridge = map_bridge({k: (v, "float16") for k, v in keys.items()}, where="file")
    assert (bridge.name, bridge.inputs, bridge.outputs) == (name, 6, 8)
    assert set(bridge.used.values()) == keys.keys() and not bridge.ignored


def test_published_bridges() -> None:
    llava = map_bridge(manifest("llava-1.5_mm_projector"), where="llava")
    assert (llava.name, llava.inputs, llava.outputs) == ("mlp2x_gelu", 1024, 4096)
    seechat = map_bridge(open_checkpoint(data("vision/checkpoint_100.pth")).shapes, where="seechat")
    assert (seechat.name, seechat.inputs, seechat.outputs) == ("linear", 32, 64)
    assert len(seechat.ignored) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": (8, 6)}, "1 missing (bias)"),
        ({"weight": (8, 6), "bias": (7,)}, "bias is [7] instead of [8]"),
        ({"weight": (8,), "bias": (8,)}, "weight has shape [8]"),
        ({"weight": (8, 6), "bias": (8,), "scale": (1,)}, "1 not known (scale)"),
        ({"proj.a": (8, 6)}, "holds no known bridge (proj.a)"),
        ({"mm_projector.4.weight": (8, 6)}, "holds no known bridge"),
    ],
)
def test_bridge_that_does_not_fit(keys: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError) as e:
        map_bridge({k: (v, "float16") for k, v in keys.items()}, where="file")
    assert message in str(e.value)


def test_projector_of_a_q_former_is_refused() -> None:
    checkpoint = open_checkpoint(data("vision/checkpoint_trainable_qformer.pth"))
    with pytest.raises(CheckpointError, match="not known \\(query_tokens"):
        map_bridge(checkpoint.shapes, where="file")
