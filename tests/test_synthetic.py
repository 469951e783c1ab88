"""Synthetic checkpoints have the published layout."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import seechat_lite as sl
from seechat_export import synthetic
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.config import LMConfig, PixelSpec, VisionNetwork
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.families import LM_FAMILIES
from seechat_weights.vision.network import PUBLISHED_VISION
from seechat_weights.vision.weights import load_clip


def test_the_shards_are_cut_where_the_published_ones_are() -> None:
    """First tensors of the eight published files."""
    firsts = [
        "word_embeddings.weight",
        "layers.1.mlp.dense_4h_to_h.weight",
        "layers.6.mlp.dense_h_to_4h.weight",
        "layers.11.attention.dense.weight",
        "layers.16.attention.query_key_value.weight",
        "layers.20.mlp.dense_4h_to_h.weight",
        "layers.25.mlp.dense_h_to_4h.weight",
        "lm_head.weight",
    ]
    assert [keys[0] for keys in synthetic._shards(LMConfig())] == firsts


def test_the_tokenizer_has_the_published_ids(tmp_path: Path) -> None:
    synthetic.write_tokenizer(tmp_path / "ice_text.model")
    tokenizer = Tokenizer(tmp_path / "ice_text.model")
    config = LMConfig()
    for name in ("pad_id", "mask_id", "gmask_id", "bos_id", "eos_id"):
        assert getattr(tokenizer, name) == getattr(config, name)
    assert tokenizer.vocab_size == 130344
    text = "详细描述这张图片，hello\n\t  world 🐱"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert {4, 130008, 130009} <= set(ids)  # <n>, <|tab|>, <|blank_2|>


def test_a_small_one_reads_back(tmp_path: Path) -> None:
    """Written in shards, read and accounted for; the head is the embeddings; scales are sound."""
    config = LMConfig(vocab_size=200_000, hidden_size=8, num_layers=2, num_heads=2, inner_size=32)
    (tmp_path / "config.json").write_text(json.dumps(synthetic._published_config(config)))
    generator = torch.Generator().manual_seed(3)
    synthetic._write_shards(tmp_path, config, generator, lambda stage, done, total: None)
    lm = open_lm(tmp_path)
    assert lm.config == config
    assert len(lm.ignored["lm"]) == config.num_layers  # the rotary buffers that are published too
    head = lm.read("lm_head.weight")
    assert (head == lm.read("word_embeddings.weight")).all()
    assert head.dtype == "float16"
    assert abs(head.astype("float32").std() * 8**0.5 - 2) < 0.05
    norm = lm.read("layers.1.input_layernorm.weight")
    assert norm.dtype == "float32"
    assert (norm == 1).all()


def test_vision_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are read as what they were made from, here something smaller than published."""
    small = replace(
        PUBLISHED_VISION["clip"],
        tokens=16,
        pixels=PixelSpec(image_size=56),
        network=VisionNetwork(14, 64, 128, 2, 2, "quick_gelu", 1e-5),
    )
    monkeypatch.setitem(PUBLISHED_VISION, "clip", small)
    synthetic._write_vision(tmp_path, 32, torch.Generator().manual_seed(3))
    tower, projector = tmp_path / "clip-vit-large-patch14", tmp_path / "mm_projector.bin"
    vision = load_clip(clip=tower, projector=projector)
    assert vision.config.pixels.image_size == 56 and vision.outputs == 32
    assert replace(vision.config, graph="", pixels=small.pixels) == small


SMALL = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "inner_size": 96, "num_layers": 2}


@pytest.mark.parametrize("name", ["llava-1.5-7b", "minigpt4-7b"])
def test_a_small_llama_with_vision_answers(name: str, tmp_path: Path) -> None:
    """Its kinds of layers and bridges are the published ones; its numbers stay near unit scale."""
    model = synthetic.MODELS[name]
    assert model.vision and model.vision.network
    widths = {"width": 32, "inner_size": 48, "heads": 2, "layers": 2}
    if model.vision.network.query_layers:
        widths |= {"query_width": 32, "query_inner_size": 48, "query_layers": 2, "query_heads": 2}
    vision = replace(model.vision, network=replace(model.vision.network, **widths))
    small = replace(model, lm=replace(model.lm, **SMALL), vision=vision)
    synthetic.write_synthetic_bundle(tmp_path / "b", model=small, precision="int4")
    with sl.load(tmp_path / "b", context=700) as loaded:
        chat = loaded.chat()
        chat.ask("What is this?", Image.new("RGB", (40, 30), "red"), max_new_tokens=3)
        assert chat.stats.prompt_tokens > model.vision.tokens
        logits = loaded.engine.prefill(chat.prompt("And now?", max_new_tokens=3))
        assert loaded.engine.held_tokens > model.vision.tokens
        assert 0.3 < logits.std() < 8
        assert len(loaded.tokenizer.encode("What is this?")) < 10


def test_the_published_sizes_of_a_llama() -> None:
    lm = synthetic.MODELS["llava-1.5-7b"].lm
    assert sum(math.prod(s) for s in LM_FAMILIES["llama"].shapes(lm).values()) == 6_738_415_616
