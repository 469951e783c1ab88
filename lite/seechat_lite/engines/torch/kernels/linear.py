"""Triton kernels of the decoder's linears on a GPU, for the few rows of a step.

A step reads every weight once and computes almost nothing, so it is as fast as its bytes arrive.
Weights in blocks are therefore multiplied as codes. Each kernel computes what engines.torch.linears
does in plain torch; the tests compare them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seechat_lite.engines.torch.kernels import KERNEL_ROWS

OUTPUTS = 8  # that a program computes for one row
OUTPUTS_OF_ROWS = 32  # for several rows
PROGRAMS = 512  # at the same time, for several rows; each takes a part of the inputs, if needed
CHUNK = 1 << 22  # codes that are reordered at a time


def interleaved(codes: Tensor, *, bits: int) -> Tensor:
    """Put codes into the order that the kernels read, in place.

    A 32-bit word then holds 32 / bits codes. Their distance is the number of words in a block; in a
    bundle they are neighbours. So neighbouring words meet neighbouring inputs, and a thread reads
    its inputs at once.

    codes: uint8 [outputs, blocks, bytes].
    bits: 8 or 4.
    """
    outputs, blocks, width = codes.shape
    rows = max(1, CHUNK // (blocks * width))
    for i in range(0, outputs, rows):
        numbers = codes[i : i + rows]
        if bits == 4:
            numbers = torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(-2)
        numbers = numbers.unflatten(-1, (32 // bits, -1)).transpose(-1, -2).flatten(-2)
        if bits == 4:
            numbers = numbers[..., 0::2] | numbers[..., 1::2] << 4
        codes[i : i + rows] = numbers
    return codes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """x times the transposed weight, plus bias, and its GELU (tanh).

    One row is not worth a matrix product: libraries' kernels for those do not read the weight any
        faster.

    x: [1, inputs].
    weight: [outputs, inputs].
    bias: [outputs], or None.
    gelu: whether to apply the GELU.
    """
    outputs, inputs = weight.shape
    result = x.new_empty((1, outputs))
    _linear[(triton.cdiv(outputs, OUTPUTS),)](
        x,
        weight,
        bias if bias is not None else x,
        result,
        inputs,
        outputs,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        OUTPUTS=OUTPUTS,
        INPUTS=512,
        num_warps=4,
    )
    return result


@triton.jit
def _linear(
    x,
    weight,
    bias,
    result,
    inputs,
    outputs,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,  # at a time
):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = n < outputs
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        k = first + tl.arange(0, INPUTS)
        inside = k < inputs
        value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        place = n[:, None] * inputs + k[None, :]
        w = tl.load(weight + place, mask=there[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * value[None, :]
    y = _finished(tl.sum(total, axis=1), bias, n, there, HAS_BIAS, GELU)
    tl.store(result + n, y.to(result.dtype.element_ty), mask=there)


@triton.jit
def _finished(y, bias, n, there, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """Outputs number n, of sums y."""
    if HAS_BIAS:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    if GELU:  # tanh as a sigmoid of twice its argument, without large exponents
        z = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        e = tl.exp(-tl.abs(z))
        y *= tl.where(z >= 0, 1.0, e) / (1.0 + e)
    return y


def block_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    gelu: bool = False,
) -> Tensor:
    """x times the transposed weight of codes and scales, plus bias, and its GELU (tanh).

    Sums are float32. For one row, every number is used as it is in the blocks. For more rows,
    weights are rounded to the type of x. More than KERNEL_ROWS rows: see
    engines.torch.linears.BlockLinear.

    x: [rows, inputs], at most KERNEL_ROWS rows.
    codes: interleaved, uint8 [outputs, blocks, bytes].
    scales: [outputs, blocks], or [outputs, 1].
    bias: [outputs], or None.
    bits: 8 or 4.
    gelu: whether to apply the GELU.
    """
    rows, inputs = x.shape
    outputs, blocks, width = codes.shape
    result = x.new_empty((rows, outputs))
    words = codes.view(torch.int32)  # [outputs, blocks, width / 4]
    weight = words, scales, *scales.stride(), inputs, outputs, blocks
    form = {"BITS": bits, "WORDS": width // 4}
    finish = {"HAS_BIAS": bias is not None, "GELU": gelu}
    bias = bias if bias is not None else x
    if rows == 1:
        _block_row[(triton.cdiv(outputs, OUTPUTS),)](
            x,
            *weight,
            bias,
            result,
            **form,
            **finish,
            GROUP=min(triton.next_power_of_2(blocks), 2048 // width),
            OUTPUTS=OUTPUTS,
            num_warps=4,
        )
        return result
    programs = triton.cdiv(outputs, OUTPUTS_OF_ROWS)
    splits = min(4, triton.cdiv(PROGRAMS, programs))
    parts = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
    # two warps: a third would compute the same weights for other rows. One stage: the products'
    # operands would fill the memory that more programs need
    _block_rows[(programs, splits)](
        x,
        *weight,
        rows,
        parts,
        **form,
        GROUP=256 // width,
        OUTPUTS=OUTPUTS_OF_ROWS,
        ROWS=KERNEL_ROWS,
        num_warps=2,
        num_stages=1,
    )
    _sum_parts[(rows, triton.cdiv(outputs, 1024))](
        parts, bias, result, outputs, **finish, SPLITS=splits, OUTPUTS=1024
    )
    return result


@triton.jit
def _number(packed, j: tl.constexpr, BITS: tl.constexpr):
    """Signed number j of each word, and the factor that gives its true value.

    GPUs are slow at converting a code to a float, so none is converted: the code's bits are put
        into
    the mantissa of 2**23. If they lie `shift` bits to the left of its end, the number is 2**shift
    times too large.
    """
    fit: tl.constexpr = 5 if BITS == 4 else 2  # codes that fit into a mantissa
    shift: tl.constexpr = (j % fit) * BITS
    mask: tl.constexpr = ((1 << BITS) - 1) << shift
    middle: tl.constexpr = 8388608.0 + (1 << (BITS - 1 + shift))
    mantissa = ((packed >> (j // fit * fit * BITS)) & mask) | 0x4B000000
    return mantissa.to(tl.float32, bitcast=True) - middle, 1.0 / (1 << shift)


@triton.jit
def _block_row(
    x,
    words,
    scales,
    scales_row,
    scales_block,
    inputs,
    outputs,
    blocks,
    bias,
    result,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,  # blocks at a time: all threads along a row, so that x is loaded once
    OUTPUTS: tl.constexpr,
):
    EACH: tl.constexpr = 32 // BITS  # codes in a word
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = n < outputs
    word = tl.arange(0, WORDS)
    total = tl.zeros((OUTPUTS, GROUP), tl.float32)
    for first in range(0, blocks, GROUP):
        block = first + tl.arange(0, GROUP)
        place = block[:, None] * WORDS + word[None, :]  # [GROUP, WORDS]
        packed = tl.load(
            words + n[:, None, None] * (blocks * WORDS) + place[None],
            mask=there[:, None, None] & (block < blocks)[None, :, None],
            other=0,
        )
        part = tl.zeros((OUTPUTS, GROUP, WORDS), tl.float32)
        for j in tl.static_range(EACH):
            k = (block * (EACH * WORDS))[:, None] + (j * WORDS + word)[None, :]
            value = tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)
            weight, factor = _number(packed, j, BITS)
            part += weight * (value * factor)[None]
        scale = tl.load(
            scales + n[:, None] * scales_row + block[None, :] * scales_block,
            mask=there[:, None] & (block < blocks)[None, :],
            other=0.0,
        )
        total += tl.sum(part, axis=2) * scale.to(tl.float32)
    y = _finished(tl.sum(total, axis=1), bias, n, there, HAS_BIAS, GELU)
    tl.store(result + n, y.to(result.dtype.element_ty), mask=there)


@triton.jit
def _block_rows(
    x,
    words,
    scales,
    scales_row,
    scales_block,
    inputs,
    outputs,
    blocks,
    rows,
    parts,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,  # blocks at a time
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    EACH: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = n < outputs
    row = tl.arange(0, ROWS)
    i = tl.arange(0, GROUP * WORDS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    split, splits = tl.program_id(1), tl.num_programs(1)
    for first in range(split * GROUP, blocks, splits * GROUP):
        block = first + i // WORDS
        inside = there[:, None] & (block < blocks)[None, :]
        place = n[:, None] * (blocks * WORDS) + (first * WORDS + i)[None, :]
        packed = tl.load(words + place, mask=inside, other=0)
        place = n[:, None] * scales_row + block[None, :] * scales_block
        scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(EACH):
            k = block * (EACH * WORDS) + j * WORDS + i % WORDS
            seen = (k < inputs)[:, None] & (row < rows)[None, :]
            value = tl.load(x + row[None, :] * inputs + k[:, None], mask=seen, other=0.0)
            number, factor = _number(packed, j, BITS)
            weight = (number * (scale * factor)).to(value.dtype)
            total = tl.dot(weight, value, total, input_precision="ieee")
    place = (split * rows + row)[None, :] * outputs + n[:, None]
    tl.store(parts + place, total, mask=there[:, None] & (row < rows)[None, :])


@triton.jit
def _sum_parts(
    parts,
    bias,
    result,
    outputs,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    row, rows = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = n < outputs
    total = tl.zeros((OUTPUTS,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * outputs + n, mask=there, other=0.0)
    y = _finished(total, bias, n, there, HAS_BIAS, GELU)
    tl.store(result + row * outputs + n, y.to(result.dtype.element_ty), mask=there)


def dequantized(
    codes: Tensor, scales: Tensor, *, bits: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight [outputs, inputs] of interleaved codes and scales.

    codes: uint8 [outputs, blocks, bytes].
    scales: [outputs, blocks], or [outputs, 1].
    bits: 8 or 4.
    inputs: width of the weight, without padding.
    dtype: of the weight.
    """
    outputs, blocks, width = codes.shape
    weight = torch.empty((outputs, inputs), dtype=dtype, device=codes.device)
    group = 2048 // width
    _dequantize[(outputs, triton.cdiv(blocks, group))](
        codes.view(torch.int32),
        scales,
        weight,
        inputs,
        blocks,
        *scales.stride(),
        BITS=bits,
        WORDS=width // 4,
        GROUP=group,
    )
    return weight


@triton.jit
def _dequantize(
    words,
    scales,
    weight,
    inputs,
    blocks,
    scales_row,
    scales_block,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
):
    EACH: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    word = tl.arange(0, WORDS)
    inside = (block < blocks)[:, None]
    place = block[:, None] * WORDS + word[None, :]  # [GROUP, WORDS]
    packed = tl.load(words + row * blocks * WORDS + place, mask=inside, other=0)
    scale = tl.load(scales + row * scales_row + block * scales_block, mask=block < blocks, other=0)
    scale = scale.to(tl.float32)[:, None]
    for j in tl.static_range(EACH):
        k = (block * (EACH * WORDS))[:, None] + (j * WORDS + word)[None, :]
        number, factor = _number(packed, j, BITS)
        value = (number * (scale * factor)).to(weight.dtype.element_ty)
        tl.store(weight + row * inputs + k, value, mask=inside & (k < inputs))
