"""The GPU kernels against plain torch: on a GPU, or by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretend_gpu import KERNELS, pretend_gpu
from seechat_lite.nn.block_quantization import dequantize_blocks, quantize_blocks

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


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 80, 86, 90])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_compiles_without_a_gpu(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At full size, as they are launched: the interpreter runs what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from seechat_lite.engines.torch.kernels import attention, linear

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, launches = (vars(linear) | vars(attention))[name], []
    for module in (linear, attention):
        for other in KERNELS & vars(module).keys():
            monkeypatch.setattr(module, other, Noted(launches if other == name else []))
    run_at_full_size()
    assert launches
    for given, chosen in launches:
        arguments = dict(zip(kernel.arg_names, given, strict=False))
        launch = {k: chosen.pop(k) for k in ("num_warps", "num_stages") if k in chosen}
        ones = {k: 1 for k, v in arguments.items() if isinstance(v, int) and v == 1}
        constants = chosen | ones  # as Triton itself takes them
        types = {k: "constexpr" if k in constants else kind(v) for k, v in arguments.items()}
        types |= dict.fromkeys(chosen, "constexpr")
        even = [
            (i,)
            for i, k in enumerate(kernel.arg_names)
            if types[k][0] == "*" or (types[k] == "i32" and arguments[k] % 16 == 0)
        ]
        source = ASTSource(
            fn=kernel,
            signature=types,
            constexprs=constants,
            attrs={place: [["tt.divisibility", 16]] for place in even},
        )
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=launch)
        assert name in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 16 << 10  # bytes: leaves room for other programs


class Noted:
    """Stands for a kernel, and notes what it is launched with."""

    def __init__(self, launches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] < 1 << 31 and max(grid[1:], default=0) < 1 << 16
        return lambda *given, **chosen: self.launches.append((given, chosen))


def kind(value: torch.Tensor | int | float) -> str:
    if isinstance(value, torch.Tensor):
        names = {torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
        return "*" + (names | {torch.int64: "i64"})[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def run_at_full_size() -> None:
    """Everything that launches a kernel, with ChatGLM-6B's sizes and without numbers."""
    from seechat_lite.engines.torch.kernels import attention, linear

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bias = empty(12288)
    linear.linear(empty(1, 4096), empty(12288, 4096), bias, gelu=True)
    for bits, block in ((4, 128), (8, 32)):
        codes = empty(12288, 4096 // block, block * bits // 8, dtype=torch.uint8)
        scales = empty(12288, 4096 // block, dtype=torch.float32)
        for rows in (1, 13):
            weight = codes, scales if bits == 4 else scales[:, :1].expand(scales.shape)
            linear.block_linear(empty(rows, 4096), *weight, bias, bits=bits, gelu=True)
            linear.block_linear(empty(rows, 4096), *weight, None, bits=bits)
        linear.dequantized(codes, scales, bits=bits, inputs=4096, dtype=torch.float16)
    x, norm = empty(1, 4096), torch.nn.LayerNorm(4096, device="meta", dtype=torch.float16)
    attention.add_norm(x, x, norm, alpha=7.5)
    keys, length = empty(32, 2048, 128), empty(1, dtype=torch.int32)
    rotary, at = empty(2, 2049, 32, dtype=torch.float32), empty(2, 1, dtype=torch.int64)
    queries = attention.append(empty(1, 96, 128), rotary, at, length, keys, keys)
    attention.attend(queries, keys, keys, length, scale=0.1)
    # a LLaMA's, whose heads of keys serve four of queries each
    attention.add_rms_norm(x, x, torch.nn.RMSNorm(4096, device="meta", dtype=torch.float16))
    rotary, at = empty(2, 2049, 64, dtype=torch.float32), empty(1, 1, dtype=torch.int64)
    queries = attention.append(empty(1, 48, 128), rotary, at, length, keys[:8], keys[:8])
    attention.attend(queries, keys[:8], keys[:8], length, scale=0.1)


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
    from seechat_lite.engines.torch.kernels import linear as kernels

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
    from seechat_lite.engines.torch.kernels import linear

    torch.manual_seed(inputs)
    x, weight, bias = torch.randn(1, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    there = [t.to(DEVICE) for t in (x, weight, bias)]
    found = linear.linear(*there, gelu=True)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)
    found = linear.linear(*there[:2], None)
    torch.testing.assert_close(found.cpu(), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 100)])
def test_a_sum_and_its_norm(rows: int, hidden: int) -> None:
    from seechat_lite.engines.torch import ops
    from seechat_lite.engines.torch.kernels import attention

    torch.manual_seed(hidden)
    norm = torch.nn.LayerNorm(hidden, 1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm, branch, x = norm.requires_grad_(False), *torch.randn(2, rows, hidden)
    expected = ops.add_norm(branch, x, norm, alpha=7.5)
    found = attention.add_norm(branch.to(DEVICE), x.to(DEVICE), norm.to(DEVICE), alpha=7.5)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 100)])
def test_a_sum_and_its_rms_norm(rows: int, hidden: int) -> None:
    from seechat_lite.engines.torch import ops
    from seechat_lite.engines.torch.kernels import attention

    torch.manual_seed(hidden)
    norm = torch.nn.RMSNorm(hidden, 1e-3)
    torch.nn.init.normal_(norm.weight)
    norm, branch, x = norm.requires_grad_(False), *torch.randn(2, rows, hidden)
    expected = ops.add_rms_norm(branch, x, norm)
    found = attention.add_rms_norm(branch.to(DEVICE), x.to(DEVICE), norm.to(DEVICE))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("shares", [1, 2])  # positions of a head: LLaMA's, ChatGLM's
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head", "length"),
    [(1, 3, 3, 16, 0), (3, 2, 2, 24, 45), (2, 6, 2, 16, 9)],
)
def test_a_step_of_attention(
    rows: int, heads: int, kv_heads: int, head: int, length: int, shares: int
) -> None:
    from seechat_lite.engines.torch import ops
    from seechat_lite.engines.torch.kernels import attention as kernels

    torch.manual_seed(length)
    capacity, scale = 60, head**-0.5
    qkv = torch.randn(rows, heads + 2 * kv_heads, head)
    rotary = torch.randn(2, 80, head // 2 // shares)
    positions = torch.tensor([[5] * rows, list(range(7, 7 + rows))])[-shares:]
    keys, values = torch.randn(2, kv_heads, capacity, head)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = ops.append(qkv, rotary, positions, length, expected_keys, expected_values)
    tensors = (t.to(DEVICE) for t in (qkv, rotary, positions))
    at = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    queries = kernels.append(*tensors, at, keys, values)
    torch.testing.assert_close(queries.cpu(), expected)
    torch.testing.assert_close(keys.cpu(), expected_keys)
    torch.testing.assert_close(values.cpu(), expected_values)
    found = kernels.attend(queries, keys, values, at, scale=scale)
    expected = ops.attend(expected, expected_keys, expected_values, length, scale=scale)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize("form", ["fp32", "int4", "published"])
def test_steps_of_the_engine(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernels and recorded, steps give the logits that plain torch gives."""
    from reference import data
    from seechat_export.export import export_bundle
    from seechat_lite.engines import EngineOptions
    from seechat_lite.engines.torch.engine import TorchEngine
    from seechat_lite.prompt import Prompt
    from seechat_lite.source import open_source

    if form == "published":  # a scale a row
        folder = data("quantized/int4")
    else:
        folder = tmp_path / "b"
        tiny = data("chatglm_tiny")
        export_bundle(lm=tiny, out=folder, precision=form, block_size=32)
    source = open_source(folder)
    lm = source.manifest.lm
    ids = [40, 41, 42, lm.gmask_id, lm.bos_id]  # few: a long prompt takes the interpreter long

    def logits(device: str) -> list[np.ndarray]:
        options = EngineOptions(device=device, dtype="fp32")
        engine = TorchEngine(source, context=60, options=options)
        found = []
        for turn in range(2):  # recorded steps serve the next prompt as well
            found += [engine.prefill(Prompt(ids[turn:])), engine.step(7)]
            found += [*engine.extend([9, 50, 8])]
            engine.rewind(2)
            found.append(engine.step(11))
            engine.reset()
        assert (engine._recorder is not None) == (device == "cuda")
        assert engine.open_slots(2, tokens=40) == 2
        slots = []
        for start in (0, 2):  # answers that are written together
            engine.prefill(Prompt(ids[start:]))
            slots.append(engine.adopt())
        for used in (slots, slots[1:]):
            for token in (8, 10):
                stepped = engine.step_slots({slot: token + slot for slot in used})
                found += [stepped[slot] for slot in used]
            engine.free_slot(used[0])
        assert (engine._slot_recorder is not None) == (device == "cuda")
        return found

    expected = logits("cpu")
    with pretend_gpu(monkeypatch, triton=True) if INTERPRETED else nullcontext():
        found = logits("cuda")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_without_triton_a_log_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Here there is no GPU, or Triton is missing: plain torch it is."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    from seechat_lite.engines.torch.kernels import fused

    fused.cache_clear()
    assert not fused(torch.device("cpu"))
    assert not caplog.text
    assert not fused(torch.device("cuda:7"))
    assert "steps on cuda:7 run in plain torch" in caplog.text
