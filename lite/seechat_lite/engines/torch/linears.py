"""Linears over weights of few bits: a bundle's blocks, and bitsandbytes' modules."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.engines.torch import kernels
from seechat_lite.nn.block_quantization import dequantize_blocks
from seechat_weights.errors import EngineError
from seechat_weights.libraries import import_error

CHUNK = 1 << 26  # weights that exist as floats at the same time when many rows are multiplied


class Linear(nn.Linear):
    """A linear of floats. If kernels run on the device, one multiplies the single row of a step."""

    def forward(self, input: Tensor, *, gelu: bool = False) -> Tensor:
        if len(input) == 1 and kernels.fused(input.device):
            return kernels.linear.linear(input.contiguous(), self.weight, self.bias, gelu=gelu)
        y = super().forward(input)
        return F.gelu(y, approximate="tanh") if gelu else y


class BlockLinear(nn.Module):
    """A linear whose weight stays in blocks of 8 or 4 bits.

    Where the kernels run, the codes are put into the kernels' order, in place, and a few rows are
    multiplied by the codes as they are. For more rows, and elsewhere, the weight is made from the
    codes first.

    codes: uint8 [outputs, blocks, block_size * bits / 8].
    scales: [outputs, blocks], or [outputs, 1] if all blocks of a row share one: see
        nn.block_quantization.
    inputs: width of the weight, without padding.
    bits: 8 or 4.
    zeros: uint8 [outputs, blocks], the code for 0 of each block; None for the middle of the range.
        The kernels take the middle for 0; the sum of a block's inputs then mends their product.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        inputs: int,
        bits: int,
        zeros: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.bits = bits
        self.codes: Tensor
        self.scales: Tensor
        self.fused = kernels.fused(codes.device)
        if self.fused:
            codes = kernels.linear.interleaved(codes, bits=bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.expand(codes.shape[:2]))
        self.block = codes.shape[2] * 8 // bits
        self.shifts: Tensor | None  # [outputs, blocks]: what 0 in the middle makes of each weight
        shifts = None if zeros is None else (2 ** (bits - 1) - zeros.float()) * self.scales
        self.register_buffer("shifts", shifts)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """The product, plus bias, and its GELU (tanh).

        x: [rows, inputs].
        gelu: whether to apply the GELU.
        """
        if self.fused and len(x) <= kernels.KERNEL_ROWS:
            return self._by_kernel(x.contiguous(), gelu=gelu)
        parts = []
        # plain torch first makes the weight in float32, with copies of its codes
        rows = max(1, (CHUNK if self.fused else CHUNK // 8) // self.inputs)
        for i in range(0, len(self.codes), rows):
            bias = None if self.bias is None else self.bias[i : i + rows]
            parts.append(F.linear(x, self.weight(slice(i, i + rows), x.dtype), bias))
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return F.gelu(y, approximate="tanh") if gelu else y

    def _by_kernel(self, x: Tensor, *, gelu: bool) -> Tensor:
        stored = self.codes, self.scales, self.bias
        if self.shifts is None:
            return kernels.linear.block_linear(x, *stored, bits=self.bits, gelu=gelu)
        y = kernels.linear.block_linear(x, *stored, bits=self.bits, gelu=False)
        blocks = F.pad(x, (0, self.shifts.shape[1] * self.block - x.shape[1]))
        sums = blocks.unflatten(1, (-1, self.block)).float().sum(-1)  # [rows, blocks]
        y = (y + sums @ self.shifts.t()).to(x.dtype)
        return F.gelu(y, approximate="tanh") if gelu else y

    def weight(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, [rows, inputs].

        rows: which rows.
        dtype: of the result.
        """
        codes, scales = self.codes[rows], self.scales[rows]
        if self.fused:
            made = kernels.linear.dequantized(
                codes, scales, bits=self.bits, inputs=self.inputs, dtype=dtype
            )
        else:
            made = dequantize_blocks(codes, scales, bits=self.bits, inputs=self.inputs).to(dtype)
        if self.shifts is not None:
            shifts = self.shifts[rows].to(dtype)
            made += shifts.repeat_interleave(self.block, 1)[:, : self.inputs]
        return made


def with_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh) of a linear's output; a kernel that computes the linear computes the GELU too.

    linear: the linear.
    x: its input, [rows, inputs].
    """
    if isinstance(linear, Linear | BlockLinear):
        return linear(x, gelu=True)
    return F.gelu(linear(x), approximate="tanh")


BLOCK = 128  # inputs that share a scale, for weights that are put into blocks when they are loaded
# names of quantizations, and bits of a weight with its share of the scales; the first makes blocks,
# the others are bitsandbytes'
QUANTIZATIONS = {"int4": 4 + 32 / BLOCK, "nf4": 4.13, "fp4": 4.13, "int8": 8.01}


def bitsandbytes_linear(kind: str, dtype: torch.dtype) -> Callable[[Tensor], nn.Module]:
    """Return a function that makes a quantized linear of a weight [outputs, inputs].

    The weight is quantized on the device that it is on.

    kind: a name of bitsandbytes' quantizations.
    dtype: the type to compute in.

    Raises EngineError if bitsandbytes is not installed.
    """
    try:
        # its types do not describe its modules' arguments
        bnb: Any = import_module("bitsandbytes").nn
    except (ImportError, OSError) as e:
        needed = f"quantize={kind!r} needs it"
        raise import_error(EngineError, e, needed=needed, install="bitsandbytes") from None

    def make(weight: Tensor) -> nn.Module:
        (outputs, inputs), device = weight.shape, weight.device
        if kind == "int8":
            with torch.device("meta"):
                linear = bnb.Linear8bitLt(
                    inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0
                )
            # bitsandbytes quantizes only a weight that moves from the CPU to the device
            weight = weight.cpu()
            params = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            with torch.device("meta"):
                linear = bnb.Linear4bit(
                    inputs, outputs, bias=False, compute_dtype=dtype, quant_type=kind
                )
            params = bnb.Params4bit(weight, requires_grad=False, quant_type=kind)
        linear.weight = params.to(device)
        return linear

    return make
