"""Export of the LM's other forms: what the bundle holds is what was published."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from networks import TorchEngine, chatglm_of
from reference import check_recorded, data, greedy, load_json, random_array, tensors
from seechat_export.export import export_bundle
from seechat_export.quantize import restored_tensor, stored_arrays
from seechat_export.reference_chatglm import ChatGLM
from seechat_lite.engines import create
from seechat_lite.nn.block_quantization import dequantize_blocks
from seechat_lite.prompt import Prompt
from seechat_lite.source import open_source
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.layout import ArraySpan, TensorLayout, decoder_layout
from seechat_weights.bundle.manifest import Manifest, read_manifest
from seechat_weights.bundle.precisions import PRECISIONS
from seechat_weights.config import LMConfig
from seechat_weights.lm.chatglm import lm_config, lm_shapes
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.quantized import Quantized, pack
from seechat_weights.vision.weights import load_clip

TOLERANCE = 5e-4
TINY = data("chatglm_tiny")
TOKENIZER = TINY / "ice_text.model"


def bundle_tensor(folder: Path, manifest: Manifest, key: str) -> np.ndarray:
    """One of our tensors as a bundle holds it, float32."""
    arrays = BundleArrays(folder, manifest)
    item = next(i for i in arrays.items if i.key == key)
    return restored_tensor(item, arrays.stored(item), manifest.lm).numpy()


@pytest.mark.parametrize("form", ["int8", "int4", "int4-qe"])
def test_quantized_reference(tmp_path: Path, form: str) -> None:
    """At fp32 the bundle answers as the reference's quantized network does."""
    source = data(f"quantized/{form}")
    export_bundle(lm=source, tokenizer=TOKENIZER, out=tmp_path / "b", precision="fp32")
    engine = create("onnx", open_source(tmp_path / "b"), context=200)
    for name, recorded in load_json(f"quantized/{form}/cases.json")["cases"].items():
        case = tensors(f"quantized/{form}/case_{name}.safetensors")
        check_recorded(engine, case, recorded, atol=TOLERANCE)
    engine.close()


@pytest.mark.parametrize(
    ("form", "precision", "exact"),
    [
        ("int4", "int4", "layers"),
        ("int4", "int8", "layers"),
        ("int8", "int8", "layers"),
        ("int4-qe", "int4", "all"),
        ("int8", "int4", "nothing"),
        ("int4", "fp16", "head"),  # which is not quantized
    ],
)
def test_published_integers_are_kept(tmp_path: Path, form: str, precision: str, exact: str) -> None:
    """A bundle of as many bits or more holds the very weights; all precisions export."""
    source = data(f"quantized/{form}")
    export_bundle(
        lm=source, tokenizer=TOKENIZER, out=tmp_path / "b", precision=precision, block_size=32
    )
    lm, manifest = open_lm(source), read_manifest(tmp_path / "b")
    for key, shape in lm_shapes(lm.config).items():
        if len(shape) < 2 or key == "word_embeddings.weight":
            continue
        found, expected = bundle_tensor(tmp_path / "b", manifest, key), lm.read(key)
        same = np.array_equal(found, expected.astype(np.float32))
        part = "head" if key == "lm_head.weight" else "layers"
        assert same == (exact in ("all", part)), key
    # a head that its authors left as it was is not what a bundle of 4 bits loses most by
    assert manifest.decoder.head_bits == (8 if (form, precision) == ("int4", "int4") else 0)
    if manifest.decoder.head_bits:
        head = lm.read("lm_head.weight").astype(np.float32)
        error = np.abs(bundle_tensor(tmp_path / "b", manifest, "lm_head.weight") - head).max()
        assert error < np.abs(head).max() / 127


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(4, "int4"), (4, "int8"), (8, "int8")]),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 100).map(lambda n: 2 * n),
)
def test_published_integers_in_blocks(
    seed: int, bits: tuple[int, str], block: int, inputs: int
) -> None:
    generator, (published, precision) = np.random.default_rng(seed), bits
    middle = 2 ** (published - 1)
    codes = generator.integers(-middle, middle, (3, inputs), dtype=np.int8)
    weight = Quantized(pack(codes, bits=published), generator.random(3, np.float32), published)
    np.testing.assert_array_equal(weight.codes, codes)
    form = PRECISIONS[precision]
    item = TensorLayout(
        "a", "linear", (3, inputs), "", (ArraySpan("a", "uint8", (3,), 0),), form.bits
    )
    values, scales = stored_arrays(item, weight, LMConfig(), form, block)
    restored = dequantize_blocks(values, scales, bits=form.bits, inputs=inputs)
    np.testing.assert_array_equal(restored.numpy(), weight.dequantized())


def test_heads_of_odd_sizes_keep_their_integers(tmp_path: Path) -> None:
    """Head size 12: rows and columns of the padded quarters move with their scales."""
    config = LMConfig(hidden_size=24, num_heads=2, num_layers=1, inner_size=8, vocab_size=16)
    form = PRECISIONS["int4"]
    items = decoder_layout(config, form, 32)
    for item in items:
        if item.heads and item.kind == "linear":
            rows = lm_shapes(config)[item.key][0]
            codes = np.random.default_rng(1).integers(-8, 8, (rows, 24), dtype=np.int8)
            scales = np.linspace(1, 2, rows, dtype=np.float32)
            weight = Quantized(pack(codes, bits=4), scales, 4)
            arrays = [a.numpy() for a in stored_arrays(item, weight, config, form, 32)]
            for stored, array in zip(item.stored, arrays, strict=True):
                assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
            found = restored_tensor(item, arrays, config)
            np.testing.assert_array_equal(found.numpy(), weight.dequantized())


# --- what a bundle says of its sources ----------------------------------------------------------


def write_adapter(folder: Path, *, rank: int) -> Path:
    """A LoRA whose scaling is 1 on one linear."""
    folder.mkdir()
    module = "base_model.model.transformer.layers.0.attention.dense"
    matrices = {
        f"{module}.lora_A.weight": random_array(rank, 64),
        f"{module}.lora_B.weight": random_array(64, rank),
    }
    save_file(matrices, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_provenance_names_every_source(tmp_path: Path, base: Path) -> None:
    weights = load_file(base / "model.safetensors") | {
        "image_encoder.glm_proj.weight": random_array(64, 32)
    }
    save_file(weights, base / "model.safetensors")
    bias = {"llama_model.transformer.layers.1.attention.dense.bias": torch.zeros(64)}
    torch.save({"model": bias, "epoch": 3}, tmp_path / "checkpoint_3.pth")
    adapter = write_adapter(tmp_path / "lora", rank=2)
    manifest = export_bundle(
        lm=base,
        checkpoint=tmp_path / "checkpoint_3.pth",
        adapter=adapter,
        prefix=TINY / "ptuning_proj_pytorch_model.bin",
        out=tmp_path / "b",
        precision="fp32",
    )
    said = manifest.provenance
    assert {role: sorted(said[role]) for role in ("lm", "checkpoint", "adapter", "prefix")} == {
        "lm": ["model.safetensors"],
        "checkpoint": ["checkpoint_3.pth"],
        "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "prefix": ["ptuning_proj_pytorch_model.bin"],
    }
    ignored = said["ignored"]["lm"]
    assert ignored["transformer.layers.1.attention.dense.bias"].startswith("replaced by")
    assert ignored["transformer.layers.0.attention.rotary_emb.inv_freq"]
    assert "without" in ignored["image_encoder.glm_proj.weight"]
    assert manifest.conversation == "visualglm"
    delta = random_array(64, 2) @ random_array(2, 64)
    key = "layers.0.attention.dense.weight"
    expected = weights[f"transformer.{key}"].astype(np.float32) + delta
    found = bundle_tensor(tmp_path / "b", manifest, key)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_provenance_names_what_vision_leaves_out(tmp_path: Path) -> None:
    vision = load_clip(
        clip=data("vision/clip_open_clip"), projector=data("vision/mm_projector_linear.bin")
    )
    said = export_bundle(lm=TINY, vision=vision, out=tmp_path / "b", precision="fp32").provenance
    assert said["ignored"]["vision"]["visual.proj"]
    assert sorted(said["vision"]) == ["mm_projector_linear.bin", "open_clip_model.safetensors"]
    assert all(why for reasons in said["ignored"].values() for why in reasons.values())


class StopHere(Exception):  # noqa: N818
    pass


def test_another_prefix_or_adapter_starts_anew(tmp_path: Path) -> None:
    """An interrupted export is not continued with the tensors of another fine-tuning."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "embeddings":
            raise StopHere

    adapter = write_adapter(tmp_path / "a", rank=2)
    with pytest.raises(StopHere):
        export_bundle(lm=TINY, adapter=adapter, out=tmp_path / "b", progress=interrupt)
    manifest = export_bundle(lm=TINY, out=tmp_path / "b")
    fresh = export_bundle(lm=TINY, out=tmp_path / "fresh")
    assert manifest.files["decoder.onnx.data"] == fresh.files["decoder.onnx.data"]


def test_the_prefix_in_a_bundle(tmp_path: Path) -> None:
    """Keys with the quarters of a head in the graph's order, values as published."""
    prefix = TINY / "ptuning_embed_pytorch_model.bin"
    manifest = export_bundle(lm=TINY, prefix=prefix, out=tmp_path / "b", precision="fp32")
    assert (manifest.decoder.prefix, manifest.decoder.prefix_tokens) == ("prefix.bin", 8)
    stored = np.fromfile(tmp_path / "b/prefix.bin", manifest.decoder.embeddings_dtype)
    stored = stored.reshape(3, 2, 4, 8, 16)
    raw = open_lm(TINY, prefix=prefix).prefix
    assert raw is not None
    np.testing.assert_array_equal(stored[:, 1], raw[:, 1])
    a1, a2, b1, b2 = np.split(raw[:, 0], 4, axis=-1)
    np.testing.assert_array_equal(stored[:, 0], np.concatenate([a1, b1, a2, b2], -1))
    plain = export_bundle(lm=TINY, out=tmp_path / "plain", precision="fp32")
    assert (plain.decoder.prefix, plain.decoder.prefix_tokens) == (None, 0)


def test_the_command(tmp_path: Path) -> None:
    """An int4 checkpoint with its tokenizer elsewhere, a LoRA and a prefix, by the command line."""
    options = {
        "--lm": data("quantized/int4"),
        "--tokenizer": TOKENIZER,
        "--adapter": write_adapter(tmp_path / "a", rank=3),
        "--prefix": TINY / "ptuning_embed_pytorch_model.bin",
        "--checkpoint": data("vision/checkpoint_100.pth"),
        "--out": tmp_path / "b",
    }
    command = [sys.executable, "-m", "seechat_lite", "export"]
    command += [str(part) for option in options.items() for part in option]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = read_manifest(tmp_path / "b").provenance
    roles = {"lm", "adapter", "prefix", "tokenizer"}
    assert roles <= said.keys()
    # three rotary buffers; position_ids and the projector, for want of a vision tower
    assert len(said["ignored"]["checkpoint"]) == 6


# --- answers with a prefix ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed", "proj"])
def test_prefix_reference(tmp_path: Path, name: str) -> None:
    prefix = TINY / f"ptuning_{name}_pytorch_model.bin"
    export_bundle(lm=TINY, prefix=prefix, out=tmp_path / "b", precision="fp32")
    engine = create("onnx", open_source(tmp_path / "b"), context=200)
    case = tensors(f"chatglm_tiny/case_prefix_{name}.safetensors")
    ids = case["input_ids"][0].tolist()
    recorded = load_json("chatglm_tiny/cases.json")["cases"][f"prefix_{name}"]["greedy"]
    for _ in range(2):  # the second prompt finds the prefix as the first did
        logits = engine.prefill(Prompt(ids))
        np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=TOLERANCE)
        assert greedy(engine, ids, len(recorded)) == recorded
    engine.close()


def test_prefix_before_pictures(tmp_path: Path) -> None:
    prefix = TINY / "ptuning_embed_pytorch_model.bin"
    export_bundle(lm=TINY, prefix=prefix, out=tmp_path / "b", precision="fp32")
    engine = create("onnx", open_source(tmp_path / "b"), context=200)
    case = tensors("chatglm_tiny/case_seechat_embeds_prefix.safetensors")
    ids = case["input_ids"][0].tolist()
    start, end = ids.index(0), len(ids) - ids[::-1].index(0)
    logits = engine.prefill(Prompt(ids, [(start, case["inputs_embeds"][0, start:end])]))
    np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=TOLERANCE)
    found = []
    recorded = load_json("chatglm_tiny/cases.json")["cases"]["seechat_embeds_prefix"]["greedy"]
    for _ in recorded:
        found.append(int(logits.argmax()))
        logits = engine.step(found[-1])
    assert found == recorded
    engine.close()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.03), ("int8", 0.6), ("int4", 5)])
def test_a_prefix_at_every_precision(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Without the prefix a logit would be 11 away."""
    prefix = TINY / "ptuning_proj_pytorch_model.bin"
    export_bundle(lm=TINY, prefix=prefix, out=tmp_path / "b", precision=precision)
    engine = create("onnx", open_source(tmp_path / "b"), context=200)
    case = tensors("chatglm_tiny/case_prefix_proj.safetensors")
    logits = engine.prefill(Prompt(case["input_ids"][0].tolist()))
    np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=tolerance)
    engine.close()


def test_a_prefix_in_padded_heads(tmp_path: Path) -> None:
    """Head size 12, whose quarters the graph pads; a prefix of 3 tokens inside the checkpoint."""
    settings = load_json("chatglm_tiny/config.json") | {
        "hidden_size": 60,
        "num_attention_heads": 5,
        "num_layers": 2,
        "inner_hidden_size": 100,
        "pre_seq_len": 3,
    }
    source = tmp_path / "lm"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(5)
    state = {
        key if key == "lm_head.weight" else f"transformer.{key}": value.detach().numpy()
        for key, value in ChatGLM(lm_config(settings)).state_dict().items()
    }
    state["transformer.prefix_encoder.embedding.weight"] = random_array(3, 240)
    save_file(state, source / "model.safetensors")
    export_bundle(lm=source, tokenizer=TOKENIZER, out=tmp_path / "b", precision="fp32")
    lm = open_lm(source)
    reference = TorchEngine(chatglm_of(lm), lm.prefix)
    engine = create("onnx", open_source(tmp_path / "b"), context=60)
    prompt = Prompt([*range(40, 60), lm.config.gmask_id, lm.config.bos_id, 7, 8])
    expected = [reference.prefill(prompt), reference.step(9), reference.step(10)]
    found = [engine.prefill(prompt), engine.step(9), engine.step(10)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(TorchEngine(chatglm_of(lm)).prefill(prompt) - found[0]).max() > 20 * TOLERANCE
    engine.close()
