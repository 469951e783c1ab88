"""Triton kernels of a decoder's step on a GPU, for the work between its linears: norms, the cache.

Lengths and positions are read on the device, so that one recorded CUDA graph serves every step. The
cache is read only as far as it has tokens. Each kernel computes what engines.torch.decoder does in
plain torch; the tests compare them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

SPLITS = 16  # parts of the cache that are read at the same time


def add_norm(branch: Tensor, x: Tensor, norm: nn.LayerNorm, *, alpha: float) -> Tensor:
    """The layer norm of branch + alpha * x.

    branch: [rows, hidden].
    x: [rows, hidden].
    norm: the norm's parameters.
    alpha: scale of x.
    """
    rows, hidden = x.shape
    result = torch.empty_like(x)
    _add_norm[(rows,)](
        branch,
        x,
        norm.weight,
        norm.bias,
        result,
        hidden,
        alpha,
        norm.eps,
        SIZE=triton.next_power_of_2(hidden),
        num_warps=8,
    )
    return result


@triton.jit
def _add_norm(branch, x, weight, bias, result, hidden, alpha, eps, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    inside = i < hidden
    at = tl.program_id(0) * hidden + i
    total = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    total += alpha * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    apart = tl.where(inside, total - tl.sum(total, axis=0) / hidden, 0.0)
    spread = tl.rsqrt(tl.sum(apart * apart, axis=0) / hidden + eps)
    scale = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    y = apart * spread * scale + shift
    tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


def append(
    qkv: Tensor, rotary: Tensor, positions: Tensor, length: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, and put keys and values into the cache; returns the rotated queries.

    qkv: [rows, 3, heads, head].
    rotary: float32 [2 (cos, sin), positions, head / 4].
    positions: int64 [2, rows].
    length: int32 [1], tokens in the cache before.
    keys, values: [heads, capacity, head]; changed in place.

    Returns [rows, heads, head].
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
    # these rotate by the position in the context, the rest by that in the answer
    first = i < QUARTER
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
    """Causal attention of new tokens over the cache; returns [rows, heads, head].

    The cache is read in SPLITS parts at the same time; their results are then weighted and summed.

    queries: [rows, heads, head].
    keys, values: [heads, capacity, head]; the new tokens are already there, after `length` others.
    length: int32 [1], tokens in the cache before.
    scale: factor of the scores.
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
    # finite, so that a part without tokens has no weight and is not NaN
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
