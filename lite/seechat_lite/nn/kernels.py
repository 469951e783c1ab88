"""Triton kernels of the decoder on a GPU: everything in a one-token step that torch is slow at.

A step reads every weight once and computes almost nothing, so it is as fast as its bytes come in:
weights in blocks are multiplied as codes, and the cache is read no further than its tokens reach.
Lengths and positions are read on the device, so that a recorded CUDA graph serves every step. What
each kernel computes is what nn.decoder and nn.linears do in plain torch, which judges it in the
tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 16  # parts of the cache that are attended to at the same time
FEW = 16  # rows up to which block_linear is the faster product
OUTPUTS = 8  # numbers that a program of block_linear computes
CHUNK = 1 << 22  # codes that are put into order at a time


def interleaved(codes: Tensor, *, bits: int) -> Tensor:
    """Put codes uint8 [outputs, blocks, bytes] into the order that the kernels read, in place.

    A 32-bit word holds 32 / bits codes that are as many words apart as a block has, where in a
    bundle they are neighbours: so neighbouring words meet neighbouring inputs, and the inputs of a
    thread are read at once.
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


def block_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *, bits: int
) -> Tensor:
    """x [rows, inputs] times the weight of interleaved codes [outputs, blocks, bytes] and scales.

    At most FEW rows; else as nn.linears.BlockLinear has them. Sums are float32.
    """
    rows, inputs = x.shape
    outputs, blocks, width = codes.shape
    result = x.new_empty((rows, outputs))
    # the rows of x are next to each other in the grid: all but the first find the weights cached
    _block_linear[(rows, triton.cdiv(outputs, OUTPUTS))](
        x,
        codes.view(torch.int32),  # [outputs, blocks, width / 4]
        scales,
        bias if bias is not None else x,
        result,
        inputs,
        outputs,
        blocks,
        *scales.stride(),
        HAS_BIAS=bias is not None,
        BITS=bits,
        WORDS=width // 4,
        GROUP=min(triton.next_power_of_2(blocks), 2048 // width),
        OUTPUTS=OUTPUTS,
        num_warps=4,
    )
    return result


@triton.jit
def _number(packed, j: tl.constexpr, BITS: tl.constexpr):
    """Signed number j of each word, and the factor that makes it what it stands for.

    A code becomes a float without a conversion, which GPUs are slow at: its bits are laid into the
    mantissa of 2**23. Where they lie `shift` bits to the left of its end, the number is 2**shift
    times too large.
    """
    fit: tl.constexpr = 5 if BITS == 4 else 2  # codes within a mantissa
    shift: tl.constexpr = (j % fit) * BITS
    mask: tl.constexpr = ((1 << BITS) - 1) << shift
    middle: tl.constexpr = 8388608.0 + (1 << (BITS - 1 + shift))
    mantissa = ((packed >> (j // fit * fit * BITS)) & mask) | 0x4B000000
    return mantissa.to(tl.float32, bitcast=True) - middle, 1.0 / (1 << shift)


@triton.jit
def _block_linear(
    x,
    words,
    scales,
    bias,
    result,
    inputs,
    outputs,
    blocks,
    scales_row,
    scales_block,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,  # blocks at a time: all threads along a row, so that x is loaded once
    OUTPUTS: tl.constexpr,
):
    EACH: tl.constexpr = 32 // BITS  # codes in a word
    row = tl.program_id(0)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
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
            value = tl.load(x + row * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
            weight, factor = _number(packed, j, BITS)
            part += weight * (value * factor)[None]
        scale = tl.load(
            scales + n[:, None] * scales_row + block[None, :] * scales_block,
            mask=there[:, None] & (block < blocks)[None, :],
            other=0.0,
        )
        total += tl.sum(part, axis=2) * scale.to(tl.float32)
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(result + row * outputs + n, y.to(result.dtype.element_ty), mask=there)


def dequantized(
    codes: Tensor, scales: Tensor, *, bits: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight [outputs, inputs] of interleaved codes [outputs, blocks, bytes] and scales."""
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


def append(
    qkv: Tensor, rotary: Tensor, positions: Tensor, length: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, and put keys and values into the cache behind `length` tokens.

    qkv: [rows, 3, heads, head]; rotary: float32 [2 (cos, sin), positions, head / 4]; positions:
    int64 [2, rows]; length: int32 [1]; keys, values: [heads, capacity, head], changed in place.
    Returns the rotated queries, [rows, heads, head].
    """
    rows, _, heads, head = qkv.shape
    queries = torch.empty((rows, heads, head), dtype=qkv.dtype, device=qkv.device)
    _append[(rows, heads)](
        qkv,
        rotary,
        positions,
        length,
        keys,
        values,
        queries,
        heads,
        keys.shape[1],
        rotary.shape[1],
        QUARTER=head // 4,
        HALF=triton.next_power_of_2(head // 2),
        num_warps=1,
    )
    return queries


@triton.jit
def _append(
    qkv,
    rotary,
    positions,
    length,
    keys,
    values,
    queries,
    heads,
    capacity,
    table,
    QUARTER: tl.constexpr,
    HALF: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    size: tl.constexpr = 4 * QUARTER
    i = tl.arange(0, HALF)
    inside = i < 2 * QUARTER
    first = i < QUARTER  # turns by the position in the context, the rest by that in the answer
    at = tl.load(positions + tl.where(first, 0, tl.num_programs(0)) + row, mask=inside, other=0)
    angle = at * QUARTER + tl.where(first, i, i - QUARTER)
    cos = tl.load(rotary + angle, mask=inside, other=0.0)
    sin = tl.load(rotary + table * QUARTER + angle, mask=inside, other=0.0)
    source = qkv + (row * 3 * heads + head) * size + i
    place = (head * capacity + tl.load(length) + row).to(tl.int64) * size + i
    for part in tl.static_range(3):
        a = tl.load(source + part * heads * size, mask=inside, other=0.0)
        b = tl.load(source + part * heads * size + 2 * QUARTER, mask=inside, other=0.0)
        if part < 2:
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a = (wide_a * cos - wide_b * sin).to(a.dtype)
            b = (wide_b * cos + wide_a * sin).to(b.dtype)
        if part == 0:
            target = queries + (row * heads + head) * size + i
        elif part == 1:
            target = keys + place
        else:
            target = values + place
        tl.store(target, a, mask=inside)
        tl.store(target + 2 * QUARTER, b, mask=inside)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, scale: float
) -> Tensor:
    """Causal attention of new tokens over the cache, which holds them behind `length` others.

    queries: [rows, heads, head]; keys, values: [heads, capacity, head]; length: int32 [1]. Returns
    [rows, heads, head]. The cache is read in SPLITS parts at once, whose results are then weighed.
    """
    rows, heads, head = queries.shape
    device, size = queries.device, triton.next_power_of_2(head)
    parts = torch.empty((rows, heads, SPLITS, head), dtype=torch.float32, device=device)
    sums = torch.empty((2, rows, heads, SPLITS), dtype=torch.float32, device=device)
    _attend[(rows, heads, SPLITS)](
        queries,
        keys,
        values,
        length,
        parts,
        sums,
        keys.shape[1],
        scale,
        HEAD=head,
        SIZE=size,
        TOKENS=32,
        num_warps=4,
    )
    result = torch.empty_like(queries)
    _weigh[(rows, heads)](parts, sums, result, HEAD=head, SIZE=size, SPLITS=SPLITS, num_warps=1)
    return result


@triton.jit
def _attend(
    queries,
    keys,
    values,
    length,
    parts,
    sums,
    capacity,
    scale,
    HEAD: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, splits = tl.num_programs(1), tl.num_programs(2)
    end = tl.load(length) + row + 1
    each = tl.cdiv(tl.cdiv(end, splits), TOKENS) * TOKENS
    start = split * each
    stop = tl.minimum(start + each, end)
    i = tl.arange(0, SIZE)
    inside = i < HEAD
    query = tl.load(queries + (row * heads + head) * HEAD + i, mask=inside, other=0.0)
    query = query.to(tl.float32) * scale
    # finite, so that a part without tokens weighs nothing and is no NaN
    most = tl.full((), -1e30, tl.float32)
    weight = tl.full((), 0.0, tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for first in range(start, stop, TOKENS):
        t = first + tl.arange(0, TOKENS)
        place = (head * capacity + t).to(tl.int64)[:, None] * HEAD + i[None, :]
        seen = (t < stop)[:, None] & inside[None, :]
        key = tl.load(keys + place, mask=seen, other=0.0).to(tl.float32)
        score = tl.where(t < stop, tl.sum(key * query[None, :], axis=1), -1e30)
        now = tl.maximum(most, tl.max(score, axis=0))
        share = tl.where(t < stop, tl.exp(score - now), 0.0)
        fade = tl.exp(most - now)
        value = tl.load(values + place, mask=seen, other=0.0).to(tl.float32)
        total = total * fade + tl.sum(value * share[:, None], axis=0)
        weight = weight * fade + tl.sum(share, axis=0)
        most = now
    place = (row * heads + head) * splits + split
    tl.store(parts + place * HEAD + i, total, mask=inside)
    tl.store(sums + place, most)
    tl.store(sums + tl.num_programs(0) * heads * splits + place, weight)


@triton.jit
def _weigh(parts, sums, result, HEAD: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    rows, heads = tl.num_programs(0), tl.num_programs(1)
    split = tl.arange(0, SPLITS)
    i = tl.arange(0, SIZE)
    at = (row * heads + head) * SPLITS + split
    most = tl.load(sums + at)
    weight = tl.load(sums + rows * heads * SPLITS + at)
    share = tl.exp(most - tl.max(most, axis=0))
    part = tl.load(parts + at[:, None] * HEAD + i[None, :], mask=(i < HEAD)[None, :], other=0.0)
    total = tl.sum(part * share[:, None], axis=0) / tl.sum(weight * share, axis=0)
    target = result + (row * heads + head) * HEAD + i
    tl.store(target, total.to(result.dtype.element_ty), mask=i < HEAD)
