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


def add_rms_norm(branch: Tensor, x: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """branch + x, and its RMS norm.

    branch: [rows, hidden].
    x: [rows, hidden].
    norm: the norm's parameters.
    """
    rows, hidden = x.shape
    total, result = torch.empty_like(x), torch.empty_like(x)
    _add_rms_norm[(rows,)](
        branch,
        x,
        norm.weight,
        total,
        result,
        hidden,
        norm.eps,
        SIZE=triton.next_power_of_2(hidden),
        num_warps=8,
    )
    return total, result


@triton.jit
def _add_rms_norm(branch, x, weight, total, result, hidden, eps, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    inside = i < hidden
    at = tl.program_id(0) * hidden + i
    wide = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    wide += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added = wide.to(total.dtype.element_ty)
    tl.store(total + at, added, mask=inside)
    wide = added.to(tl.float32)
    spread = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    scale = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, (wide * spread * scale).to(result.dtype.element_ty), mask=inside)


def append(
    qkv: Tensor, rotary: Tensor, positions: Tensor, length: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, and put keys and values into the cache; returns the rotated queries.

    qkv: [rows, heads + 2 kv_heads, head].
    rotary: float32 [2 (cos, sin), positions, head / 2 / n].
    positions: int64 [n, rows]; each of n equal shares of a half rotates by its own position.
    length: int32 [1], tokens in the cache before.
    keys, values: [kv_heads, capacity, head]; changed in place.

    Returns [rows, heads, head].
    """
    rows, slots, head = qkv.shape
    kv_heads = len(keys)
    heads = slots - 2 * kv_heads
    queries = torch.empty((rows, heads, head), dtype=qkv.dtype, device=qkv.device)
    _append[(rows, slots)](
        qkv,
        rotary,
        positions,
        length,
        keys,
        values,
        queries,
        heads,
        kv_heads,
        keys.shape[1],
        rotary.shape[1],
        SHARE=rotary.shape[2],
        HEAD=head,
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
    kv_heads,
    capacity,
    table,
    SHARE: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
):
    row, slot = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = HEAD // 2
    i = tl.arange(0, HALF)
    inside = i < half
    source = qkv + (row * tl.num_programs(1) + slot) * HEAD + i
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + half, mask=inside, other=0.0)
    if slot < heads + kv_heads:
        at = tl.load(positions + i // SHARE * tl.num_programs(0) + row, mask=inside, other=0)
        angle = at * SHARE + i % SHARE
        cos = tl.load(rotary + angle, mask=inside, other=0.0)
        sin = tl.load(rotary + table * SHARE + angle, mask=inside, other=0.0)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = (wide_a * cos - wide_b * sin).to(a.dtype)
        b = (wide_b * cos + wide_a * sin).to(b.dtype)
    if slot < heads:
        target = queries + (row * heads + slot) * HEAD + i
        tl.store(target, a, mask=inside)
        tl.store(target + half, b, mask=inside)
    else:
        number = slot - heads
        token = tl.load(length) + row
        if number < kv_heads:
            target = keys + (number * capacity + token).to(tl.int64) * HEAD + i
            tl.store(target, a, mask=inside)
            tl.store(target + half, b, mask=inside)
        else:
            number -= kv_heads
            target = values + (number * capacity + token).to(tl.int64) * HEAD + i
            tl.store(target, a, mask=inside)
            tl.store(target + half, b, mask=inside)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, scale: float
) -> Tensor:
    """Causal attention of new tokens over the cache; returns [rows, heads, head].

    The cache is read in SPLITS parts at the same time; their results are then weighted and summed.

    queries: [rows, heads, head].
    keys, values: [kv_heads, capacity, head]; the new tokens are already there, after `length`
        others.
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
        SHARED=heads // len(keys),
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
    SHARED: tl.constexpr,
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
        place = (head // SHARED * capacity + t).to(tl.int64)[:, None] * HEAD + i[None, :]
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
