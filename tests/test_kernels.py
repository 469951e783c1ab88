"""The GPU kernels against plain torch: on a GPU, or by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretend_card import pretend_card
from seechat_lite.nn.blocks import dequantize_blocks, quantize_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


@needs_triton
@pytest.mark.timeout(900)
def test_all_with_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets: a process of its own."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("this is that process, or a GPU runs them")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


POINTERS = {
    **dict.fromkeys(("x", "branch", "bias", "result", "weight"), "*fp16"),
    **dict.fromkeys(("qkv", "keys", "values", "queries"), "*fp16"),
    **dict.fromkeys(("scales", "rotary", "parts", "sums"), "*fp32"),
    "words": "*i32",
    "length": "*i32",
    "positions": "*i64",
    **dict.fromkeys(("scale", "alpha", "eps"), "fp32"),
}
BITS_4 = {"BITS": 4, "WORDS": 16}
BITS_8 = {"BITS": 8, "WORDS": 8}
PLAIN = {"HAS_BIAS": False, "GELU": False}
WHOLE = {"HAS_BIAS": True, "GELU": True}
KERNELS = {
    "_linear": [{**WHOLE, "OUTPUTS": 8, "INPUTS": 512}],
    "_block_row": [
        {**BITS_4, **WHOLE, "GROUP": 32, "OUTPUTS": 8},
        {**BITS_8, **PLAIN, "GROUP": 64, "OUTPUTS": 8},
    ],
    "_block_rows": [
        {**BITS_4, "GROUP": 4, "OUTPUTS": 32, "ROWS": 16},
        {**BITS_8, "GROUP": 8, "OUTPUTS": 32, "ROWS": 16},
    ],
    "_sum_parts": [{**WHOLE, "SPLITS": 4, "OUTPUTS": 1024}],
    "_dequantize": [{"BITS": 4, "WORDS": 16, "GROUP": 32}, {"BITS": 8, "WORDS": 8, "GROUP": 64}],
    "_add_norm": [{"SIZE": 4096}],
    "_append": [{"QUARTER": 32, "HALF": 64}],
    "_attend": [{"HEAD": 128, "SIZE": 128, "TOKENS": 32}],
    "_weigh": [{"HEAD": 128, "SIZE": 128, "SPLITS": 16}],
}

OPTIONS = {"_block_rows": {"num_warps": 2, "num_stages": 1}, "_add_norm": {"num_warps": 8}}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 80, 86, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_a_gpu(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter runs what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from seechat_lite.nn import linear_kernels, step_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(linear_kernels, name, None) or getattr(step_kernels, name)
    for constants in KERNELS[name]:
        types = {
            argument: "constexpr" if argument in constants else POINTERS.get(argument, "i32")
            for argument in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=OPTIONS.get(name))
        assert name in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 16 << 10  # bytes: leaves room for other programs


needs_interpreter = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"


@needs_interpreter
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "block", "shared"),
    [
        (1, 256, 24, 32, False),
        (3, 200, 13, 64, False),
        (1, 4200, 9, 128, False),
        (16, 96, 5, 32, True),  # one scale a row
        (13, 1200, 40, 128, False),
    ],
)
def test_blocks(rows: int, inputs: int, outputs: int, block: int, shared: bool, bits: int) -> None:
    from seechat_lite.nn import linear_kernels as kernels

    torch.manual_seed(inputs)
    codes, scales = quantize_blocks(torch.randn(outputs, inputs), bits=bits, block_size=block)
    if shared:
        scales = scales[:, :1].expand(scales.shape)
    weight = dequantize_blocks(codes, scales, bits=bits, inputs=inputs)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    on = {name: t.to(DEVICE) for name, t in locals().items() if isinstance(t, torch.Tensor)}
    kernels.interleaved(on["codes"], bits=bits)
    for b, gelu in (("bias", True), ("none", False)):
        weights = on["codes"], on["scales"], on.get(b)
        found = kernels.block_linear(on["x"], *weights, bits=bits, gelu=gelu)
        expected = x @ weight.t() + (bias if b == "bias" else 0)
        expected = F.gelu(expected, approximate="tanh") if gelu else expected
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=2e-4)
    found = kernels.dequantized(
        on["codes"], on["scales"], bits=bits, inputs=inputs, dtype=torch.float32
    )
    torch.testing.assert_close(found.cpu(), weight, rtol=0, atol=0)


@needs_interpreter
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 5), (700, 20)])
def test_one_row_of_floats(inputs: int, outputs: int) -> None:
    from seechat_lite.nn import linear_kernels

    torch.manual_seed(inputs)
    x, weight, bias = torch.randn(1, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    there = [t.to(DEVICE) for t in (x, weight, bias)]
    found = linear_kernels.linear(*there, gelu=True)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)
    found = linear_kernels.linear(*there[:2], None)
    torch.testing.assert_close(found.cpu(), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 100)])
def test_a_sum_and_its_norm(rows: int, hidden: int) -> None:
    from seechat_lite.nn import decoder, step_kernels

    torch.manual_seed(hidden)
    norm = torch.nn.LayerNorm(hidden, 1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm, branch, x = norm.requires_grad_(False), *torch.randn(2, rows, hidden)
    expected = decoder.add_norm(branch, x, norm, alpha=7.5)
    found = step_kernels.add_norm(branch.to(DEVICE), x.to(DEVICE), norm.to(DEVICE), alpha=7.5)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize(("rows", "heads", "head", "length"), [(1, 3, 16, 0), (3, 2, 24, 45)])
def test_a_step_of_attention(rows: int, heads: int, head: int, length: int) -> None:
    from seechat_lite.nn import decoder
    from seechat_lite.nn import step_kernels as kernels

    torch.manual_seed(length)
    capacity, scale = 60, head**-0.5
    qkv = torch.randn(rows, 3, heads, head)
    rotary = torch.randn(2, 80, head // 4)
    positions = torch.tensor([[5] * rows, list(range(7, 7 + rows))])
    keys, values = torch.randn(2, heads, capacity, head)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = decoder.append(qkv, rotary, positions, length, expected_keys, expected_values)
    tensors = (t.to(DEVICE) for t in (qkv, rotary, positions))
    at = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    queries = kernels.append(*tensors, at, keys, values)
    torch.testing.assert_close(queries.cpu(), expected)
    torch.testing.assert_close(keys.cpu(), expected_keys)
    torch.testing.assert_close(values.cpu(), expected_values)
    found = kernels.attend(queries, keys, values, at, scale=scale)
    expected = decoder.attend(expected, expected_keys, expected_values, length, scale=scale)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("form", ["fp32", "int4", "published"])
def test_steps_of_the_engine(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernels and recorded, steps give the logits that plain torch gives."""
    from reference import data
    from seechat_export.export import export_bundle
    from seechat_lite.engines import EngineOptions
    from seechat_lite.engines.torch import TorchEngine
    from seechat_lite.prompt import Prompt
    from seechat_lite.published import published_manifest

    if form == "published":  # a scale a row
        folder = data("quantized/int4")
        manifest = published_manifest(folder)
    else:
        folder = tmp_path / "b"
        tiny = data("chatglm_tiny")
        manifest = export_bundle(lm=tiny, out=folder, precision=form, block_size=32)
    lm = manifest.lm
    ids = [40, 41, 42, lm.gmask_id, lm.bos_id]  # few: a long prompt takes the interpreter long

    def logits(device: str) -> list[np.ndarray]:
        options = EngineOptions(device=device, dtype="fp32")
        engine = TorchEngine(folder, manifest, context=60, options=options)
        found = []
        for turn in range(2):  # recorded steps serve the next prompt as well
            found += [engine.prefill(Prompt(ids[turn:])), engine.step(7)]
            found += [*engine.extend([9, 50, 8])]
            engine.forget(2)
            found.append(engine.step(11))
            engine.reset()
        assert (engine._recorder is not None) == (device == "cuda")
        return found

    expected = logits("cpu")
    with pretend_card(monkeypatch, triton=True) if INTERPRETED else nullcontext():
        found = logits("cuda")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_without_triton_a_log_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Here there is no GPU, or Triton is missing: plain torch it is."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    from seechat_lite.nn.linears import fused

    fused.cache_clear()
    assert not fused(torch.device("cpu"))
    assert not caplog.text
    assert not fused(torch.device("cuda:7"))
    assert "steps on cuda:7 run in plain torch" in caplog.text
