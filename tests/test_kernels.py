"""The GPU kernels, run by Triton's interpreter on the CPU, against plain torch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from seechat_lite.nn.blocks import dequantize_blocks, quantize_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


@needs_triton
@pytest.mark.timeout(900)
def test_all_with_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets: a process of its own."""
    if INTERPRETED:
        pytest.skip("this is that process")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


POINTERS = {
    **dict.fromkeys(("x", "bias", "result", "weight", "qkv", "keys", "values", "queries"), "*fp16"),
    **dict.fromkeys(("scales", "rotary", "parts", "sums"), "*fp32"),
    "words": "*i32",
    "length": "*i32",
    "positions": "*i64",
    "scale": "fp32",
}
KERNELS = {
    "_block_linear": [
        {"HAS_BIAS": True, "BITS": 4, "WORDS": 16, "GROUP": 32, "OUTPUTS": 8},
        {"HAS_BIAS": False, "BITS": 8, "WORDS": 8, "GROUP": 64, "OUTPUTS": 8},
    ],
    "_dequantize": [{"BITS": 4, "WORDS": 16, "GROUP": 32}, {"BITS": 8, "WORDS": 8, "GROUP": 64}],
    "_append": [{"QUARTER": 32, "HALF": 64}],
    "_attend": [{"HEAD": 128, "SIZE": 128, "TOKENS": 32}],
    "_weigh": [{"HEAD": 128, "SIZE": 128, "SPLITS": 16}],
}


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

    from seechat_lite.nn import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    for constants in KERNELS[name]:
        types = {
            argument: "constexpr" if argument in constants else POINTERS.get(argument, "i32")
            for argument in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert name in compiled.asm["ptx"]


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
    ],
)
def test_blocks(rows: int, inputs: int, outputs: int, block: int, shared: bool, bits: int) -> None:
    from seechat_lite.nn import kernels

    torch.manual_seed(inputs)
    codes, scales = quantize_blocks(torch.randn(outputs, inputs), bits=bits, block_size=block)
    if shared:
        scales = scales[:, :1].expand(scales.shape)
    weight = dequantize_blocks(codes, scales, bits=bits, inputs=inputs)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    on = {name: t.to(DEVICE) for name, t in locals().items() if isinstance(t, torch.Tensor)}
    kernels.interleaved(on["codes"], bits=bits)
    for b in ("bias", "none"):
        found = kernels.block_linear(on["x"], on["codes"], on["scales"], on.get(b), bits=bits)
        expected = x @ weight.t() + (bias if b == "bias" else 0)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=2e-4)
    found = kernels.dequantized(
        on["codes"], on["scales"], bits=bits, inputs=inputs, dtype=torch.float32
    )
    torch.testing.assert_close(found.cpu(), weight, rtol=0, atol=0)


@needs_interpreter
@pytest.mark.parametrize(("rows", "heads", "head", "length"), [(1, 3, 16, 0), (3, 2, 24, 45)])
def test_a_step_of_attention(rows: int, heads: int, head: int, length: int) -> None:
    from seechat_lite.nn import decoder, kernels

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
    """Through the kernels, and on a GPU recorded, steps give the logits that plain torch gives."""
    from reference import data
    from seechat_export.export import export_bundle
    from seechat_lite.engines import EngineOptions, torch
    from seechat_lite.nn import kernels, linears
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
    runs = []
    for fused in (False, True):
        if INTERPRETED:
            monkeypatch.setattr(kernels, "OUTPUTS", 1024)  # few large programs are faster there
            monkeypatch.setattr(kernels, "SPLITS", 2)
            monkeypatch.setattr(torch, "fused", lambda _, fused=fused: fused)
            monkeypatch.setattr(linears, "fused", lambda _, fused=fused: fused)
        options = EngineOptions(device=DEVICE if fused else "cpu", dtype="fp32")
        engine = torch.TorchEngine(folder, manifest, context=60, options=options)
        engine._records &= not INTERPRETED  # which takes a GPU
        logits = []
        for turn in range(1 if INTERPRETED else 2):  # recorded steps serve the next prompt as well
            logits += [engine.prefill(Prompt(ids[turn:])), engine.step(7)]
            logits += [*engine.extend([9, 50, 8])]
            engine.forget(2)
            logits.append(engine.step(11))
            engine.reset()
        runs.append(logits)
    np.testing.assert_allclose(runs[1], runs[0], rtol=0, atol=1e-4)


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
