"""Names of vision towers and bridges: every tensor is used or ignored for a reason."""

from typing import Any

import pytest

from reference import data, manifest
from seechat_lite.nn.bridges import BRIDGES
from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.vision.bridge_names import map_bridge
from seechat_weights.vision.clip_names import map_clip
from seechat_weights.vision.network import BRIDGE_TENSORS, PUBLISHED_VISION
from seechat_weights.vision.part import TensorMapping


@pytest.fixture
def tiny() -> dict[str, Any]:
    return dict(open_checkpoint(data("chatglm_tiny")).shapes)


def test_published_clip_is_accounted_for() -> None:
    shapes = manifest("open_clip_ViT-L-14_visual")
    clip = map_clip(shapes, where="ViT-L-14")
    network = clip.network
    assert (clip.image_size, network.patch_size) == (224, 14)
    assert (network.width, network.inner_size, network.layers) == (1024, 4096, 23)  # of 24
    table = PUBLISHED_VISION["clip"]
    assert table.network and table.pixels.image_size == clip.image_size
    assert table.tokens == (clip.image_size // network.patch_size) ** 2
    for field in ("patch_size", "width", "inner_size"):
        assert getattr(table.network, field) == getattr(network, field)
    assert table.network.layers == network.layers
    keys = {name for part in clip.used.values() for name in part.names}
    assert keys | clip.ignored.keys() == shapes.keys()
    assert not any(name.startswith("visual.transformer.resblocks.23.") for name in keys)
    value = clip.used["encoder.layers.22.self_attn.v_proj.bias"]
    fused = "visual.transformer.resblocks.22.attn.in_proj_bias"
    assert value == TensorMapping((fused,), share=2, shares=3)


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
        name for part in alone.used.values() for name in part.names
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.ln_pre.bias": None}, "1 missing (visual.ln_pre.bias)"),
        ({"visual.attnpool.weight": ((1,), "float32")}, "1 not known (visual.attnpool.weight)"),
        ({"visual.positional_embedding": ((18, 48), "float32")}, "18 position embeddings"),
        ({"visual.ln_pre.bias": ((47,), "float32")}, "ln_pre.bias is [47] instead of [48]"),
        ({"visual.conv1.weight": ((48, 588), "float32")}, "conv1.weight has shape [48, 588]"),
        # numbers made to be counted up to
        ({"visual.transformer.resblocks.9999999999.ln_1.bias": ((48,), "float32")}, "not known"),
        (
            {f"visual.transformer.resblocks.{i}.x": ((1,), "float32") for i in range(2000)},
            "has 2000 layers",
        ),
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
    assert {part.names[0] for part in bridge.used.values()} == keys.keys() and not bridge.ignored


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
