"""LLaMA whose linears GPTQ or AWQ packed: the integers are found, and kept where a bundle can."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reference import data, lm_error
from seechat_export import plan
from seechat_export.export import Source, export_bundle
from seechat_export.quantize import restored_tensor
from seechat_lite.engines import EngineOptions, create
from seechat_lite.engines.torch import kernels
from seechat_lite.engines.torch.linears import BlockLinear
from seechat_lite.nn.block_quantization import dequantize_blocks, pack_zeros, unpack_zeros
from seechat_lite.prompt import Prompt
from seechat_lite.source import open_source
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.layout import HEAD, decoder_layout
from seechat_weights.bundle.precisions import PRECISIONS
from seechat_weights.lm.checkpoint import open_lm

HIDDEN, INNER, VOCAB, GROUP = 64, 96, 760, 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_along(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers of the last axis, several to an int32, the first in the lowest bits."""
    each = 32 // bits
    groups = values.reshape(*values.shape[:-1], -1, each).astype(np.uint32)
    packed = np.zeros(groups.shape[:-1], np.uint32)
    for i in range(each):
        packed |= groups[..., order[i] if order else i] << np.uint32(bits * i)
    return packed.view(np.int32)


def make(folder: Path, form: str, bits: int = 4) -> dict[str, np.ndarray]:
    """Write a packed LLaMA; returns the weights [outputs, inputs] that its linears stand for."""
    rng = np.random.default_rng(bits)
    state: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype("f2"),
        "model.norm.weight": np.ones(HIDDEN, "f2"),
        "lm_head.weight": (rng.standard_normal((VOCAB, HIDDEN)) / 8).astype("f2"),
    }
    truth = {}
    for name, (outputs, inputs) in LINEARS.items():
        middle, groups = 1 << (bits - 1), inputs // GROUP
        codes = rng.integers(0, 1 << bits, (outputs, inputs))
        zeros = np.full((groups, outputs), middle)
        if form in ("awq", "gptq-asymmetric"):
            zeros = rng.integers(1, 1 << bits, zeros.shape)
        scales = (rng.uniform(0.5, 1.5, (groups, outputs)) / (middle * 5)).astype("f2")
        order = np.arange(inputs) // GROUP
        if form == "gptq-act-order":
            order = rng.permutation(order)
        truth[name] = scales.astype("f4").T[:, order] * (codes - zeros.T[:, order])
        at = f"model.layers.0.{name}"
        if form == "awq":
            state[f"{at}.qweight"] = packed_along(codes.T, bits, AWQ)
            state[f"{at}.qzeros"] = packed_along(zeros, bits, AWQ)
        else:
            less = 0 if form == "gptq_v2" else 1
            state[f"{at}.qweight"] = np.ascontiguousarray(packed_along(codes, bits).T)
            state[f"{at}.qzeros"] = packed_along(zeros - less, bits)
            state[f"{at}.g_idx"] = order.astype(np.int32)
            state[f"{at}.bias"] = np.zeros(outputs, "f2")
        state[f"{at}.scales"] = scales
    for norm in ("input_layernorm", "post_attention_layernorm"):
        state[f"model.layers.0.{norm}.weight"] = np.ones(HIDDEN, "f2")
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "quantization_config": {"bits": bits, "group_size": GROUP},
    }
    if form == "gptq_v2":
        config["quantization_config"]["checkpoint_format"] = form
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer.model").write_bytes(data("llama/tokenizer.model").read_bytes())
    return truth


FORMS = ("gptq", "gptq_v2", "gptq-asymmetric", "gptq-act-order", "awq")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_are_found(form: str, bits: int, tmp_path: Path) -> None:
    if form == "awq" and bits == 8:
        pytest.skip("AWQ packs 4 bits")
    truth = make(tmp_path / "m", form, bits)
    lm = open_lm(tmp_path / "m")
    fused = [truth[f"self_attn.{x}_proj"] for x in "qkv"]
    expected = {
        "attention.query_key_value": np.concatenate(fused),
        "attention.dense": truth["self_attn.o_proj"],
        "mlp.gate_up": np.concatenate([truth["mlp.gate_proj"], truth["mlp.up_proj"]]),
        "mlp.down": truth["mlp.down_proj"],
    }
    for name, weight in expected.items():
        key = f"layers.0.{name}.weight"
        lm.audit(key)
        np.testing.assert_allclose(lm.read(key), weight, rtol=0, atol=1e-6)
        np.testing.assert_allclose(lm.read(key, slice(3, 50)), weight[3:50], rtol=0, atol=1e-6)
        assert lm.bits(key) == (0 if form == "gptq-act-order" else bits)
        if lm.bits(key):
            assert lm.has_zeros(key) == (form in ("awq", "gptq-asymmetric"))
        if lm.bits(key):
            np.testing.assert_array_equal(lm.quantized(key).dequantized(), lm.read(key))
    assert lm.bits("lm_head.weight") == 0


KEPT = [("gptq", 4), ("gptq", 8), ("gptq-asymmetric", 4), ("gptq-asymmetric", 8), ("awq", 4)]


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize(("form", "bits"), KEPT)
def test_an_export_keeps_the_integers(form: str, bits: int, precision: str, tmp_path: Path) -> None:
    """A bundle of as many bits, or more, loses nothing: its weights are the published ones."""
    if bits == 8 and precision == "int4":
        pytest.skip("4 bits cannot hold 8")
    make(tmp_path / "m", form, bits)
    lm = open_lm(tmp_path / "m")
    manifest = export_bundle(
        lm=tmp_path / "m", out=tmp_path / "b", precision=precision, block_size=32
    )
    assert manifest.decoder.head_bits == (8 if precision == "int4" else 0)
    assert manifest.decoder.zeros == (form in ("awq", "gptq-asymmetric"))
    arrays = BundleArrays(tmp_path / "b", manifest)
    for item in arrays.items:
        if not item.bits or item.key == "lm_head.weight":
            continue
        stored = arrays.stored(item)
        published = lm.quantized(item.key)
        if published.bits == item.bits:
            np.testing.assert_array_equal(stored[0], published.blocks(32))
            np.testing.assert_array_equal(stored[1], published.block_scales(32))
        restored = restored_tensor(item, stored, manifest.lm).numpy()
        np.testing.assert_array_equal(restored, lm.read(item.key))
    options = EngineOptions(device="cpu")
    found = [
        create(engine, open_source(path), context=32, options=options).prefill(Prompt([1, 40, 9]))
        for engine, path in (
            ("onnx", tmp_path / "b"), ("torch", tmp_path / "b"), ("torch", tmp_path / "m"),
        )
    ]  # fmt: skip
    # ONNX Runtime's integer products also round what they multiply the weights by
    assert np.corrcoef(found)[0].min() > 0.999
    np.testing.assert_allclose(found[1], found[2], rtol=0, atol=0.2)  # the head has fewer bits


def test_an_export_is_planned_with_zeros(tmp_path: Path) -> None:
    make(tmp_path / "m", "awq")
    source = Source(open_lm(tmp_path / "m"))
    form = source.form(PRECISIONS["int4"])
    items = [i for i in decoder_layout(source.config, form, 32) if i.key != HEAD]
    speed = plan._measure(source, items, tmp_path, form, 32, 1 << 20)
    assert min(speed.convert, speed.check) > 0


def test_groups_of_another_order_are_rounded_again_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "m", "gptq-act-order")
    manifest = export_bundle(lm=tmp_path / "m", out=tmp_path / "b", precision="int4", block_size=32)
    assert not manifest.decoder.zeros
    assert "layers.0.mlp.down.weight: its groups have an order of their own" in caplog.text
    assert "rounded again" in caplog.text


def test_other_blocks_round_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "m", "gptq")
    export_bundle(lm=tmp_path / "m", out=tmp_path / "b", precision="int4", block_size=64)
    assert "in groups of 32, and blocks of 64 cannot hold them" in caplog.text


def test_refused(tmp_path: Path) -> None:
    make(tmp_path / "m", "gptq")
    from safetensors.numpy import load_file

    state = load_file(tmp_path / "m/model.safetensors")
    name = "model.layers.0.mlp.down_proj"

    def error(**changes: np.ndarray) -> str:
        changed = {**state, **{f"{name}.{k}": v for k, v in changes.items()}}
        (tmp_path / "m/model.safetensors").unlink()
        save_file(changed, tmp_path / "m/model.safetensors")
        return lm_error(tmp_path / "m")

    assert "integers of 4 or 8 bits" in error(qweight=np.zeros((9, 64), np.int32))
    assert "integers of 4 or 8 bits" in error(scales=np.zeros((7, 64), "f2"))
    assert "integers of 4 or 8 bits" in error(qzeros=np.zeros((3, 8), "f4"))
    assert "integers of 4 or 8 bits" in error(g_idx=np.zeros(5, np.int32))


def test_the_kernels_product_is_mended_where_blocks_have_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels take the middle for 0; both ways of multiplying give the weights' product."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs, block = 24, 80, 32  # the last block is half padding
    codes = torch.randint(0, 256, (outputs, 3, block // 2), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, (outputs, 3), generator=generator).to(torch.uint8)
    scales = torch.rand(outputs, 3, generator=generator)
    weight = dequantize_blocks(codes, scales, bits=4, inputs=inputs, zeros=zeros)
    packed = pack_zeros(zeros, bits=4)
    assert packed.shape == (outputs, 2)
    assert torch.equal(unpack_zeros(packed, bits=4, blocks=3), zeros)

    def kernel(
        x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *, bits: int, gelu: bool
    ) -> Tensor:
        assert not gelu
        return F.linear(x, dequantize_blocks(codes, scales, bits=bits, inputs=inputs), bias)

    monkeypatch.setitem(vars(kernels), "linear", SimpleNamespace(block_linear=kernel))
    linear = BlockLinear(codes, scales, inputs=inputs, bits=4, zeros=zeros)
    linear.bias = nn.Parameter(torch.rand(outputs, generator=generator))
    for rows in (1, 3):
        x = torch.randn(rows, inputs, generator=generator)
        for gelu in (False, True):
            expected = F.linear(x, weight, linear.bias)
            expected = F.gelu(expected, approximate="tanh") if gelu else expected
            for fused in (False, True):
                linear.fused = fused
                torch.testing.assert_close(linear(x, gelu=gelu), expected, rtol=1e-4, atol=1e-4)
