"""How new tokens go through a layer between its linears: norms, rotation, cache and attention.

No size changes from step to step. On a GPU, steps run the kernels of engines.torch.kernels;
`add_norm`, `add_rms_norm`, `append` and `attend` do the same in plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.engines.torch import kernels
from seechat_weights.config import ALPHA, LMConfig


def owned(tensor: Tensor) -> np.ndarray:
    """An array of a tensor's numbers that outlives the call: torch need not free it.

    tensor: any, on any device.
    """
    return tensor.cpu().numpy().copy()


@dataclass
class Cache:
    """Keys and values of each layer, [kv_heads, capacity, head]; of slots, with a row for each."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(
        cls,
        config: LMConfig,
        head: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        slots: int | None = None,
    ) -> "Cache":
        """A cache of zeros.

        config: the decoder's shape.
        head: size of a head of the weights.
        capacity: tokens that it has room for.
        dtype, device: of the buffers.
        slots: how many rows it has; None for a cache without rows.
        """
        shape = (*(() if slots is None else (slots,)), config.kv_heads, capacity, head)
        layers = range(config.num_layers)
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        return cls(keys, [torch.zeros_like(k) for k in keys])


class StepOps(Protocol):
    """How new tokens go through a layer, between its linears."""

    def add_norm(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor: ...
    def add_rms_norm(
        self, branch: Tensor, x: Tensor, norm: nn.RMSNorm
    ) -> tuple[Tensor, Tensor]: ...
    def append(self, qkv: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class TorchOps:
    """Plain torch behind `length` tokens; the first `context` new ones see each other both ways."""

    positions: Tensor  # int64 [1 or 2, rows]
    length: int
    context: int = 0

    def add_norm(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return add_norm(branch, x, norm, alpha=ALPHA)

    def add_rms_norm(self, branch: Tensor, x: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        return add_rms_norm(branch, x, norm)

    def append(self, qkv: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return append(qkv, rotary, self.positions, self.length, keys, values)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        split = self.context
        before = self.length + split
        parts = []
        if split:
            seen = queries[:split], keys[:, :before], values[:, :before]
            parts.append(_attention(*seen, None, scale))
        if split < len(queries):
            parts.append(attend(queries[split:], keys, values, before, scale=scale))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class KernelOps:
    """Kernels of a step: causal, behind `length` tokens; `length` is int32 [1] on the device."""

    positions: Tensor  # int64 [1 or 2, rows]
    length: Tensor

    def add_norm(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return kernels.attention.add_norm(branch, x, norm, alpha=ALPHA)

    def add_rms_norm(self, branch: Tensor, x: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        return kernels.attention.add_rms_norm(branch, x, norm)

    def append(self, qkv: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return kernels.attention.append(qkv, rotary, self.positions, self.length, keys, values)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return kernels.attention.attend(queries, keys, values, self.length, scale=scale)


@dataclass(frozen=True)
class PromptKernelOps(KernelOps):
    """Kernels of a prompt; attention runs in torch, which is made for many rows."""

    prompt: TorchOps

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return self.prompt.attend(queries, keys, values, scale)


@dataclass(frozen=True)
class SlotOps(TorchOps):
    """Plain torch for a token of each slot; `lengths` are the tokens before it.

    Keys and values are [slots, kv_heads, capacity, head]: token i belongs to row i.
    """

    lengths: Sequence[int] = ()

    def append(self, qkv: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, new_keys, new_values = rotated(qkv, rotary, self.positions, keys.shape[1])
        for i, length in enumerate(self.lengths):
            keys[i, :, length], values[i, :, length] = new_keys[i], new_values[i]
        return queries

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return torch.cat(
            [
                attend(queries[i : i + 1], keys[i], values[i], length, scale=scale)
                for i, length in enumerate(self.lengths)
            ]
        )


@dataclass(frozen=True)
class SlotKernelOps(KernelOps):
    """SlotOps with the kernels of a step; `length` is int32 [slots] on the device."""

    def append(self, qkv: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return torch.cat(
            [
                kernels.attention.append(
                    qkv[i : i + 1],
                    rotary,
                    self.positions[:, i : i + 1].contiguous(),
                    self.length[i : i + 1],
                    keys[i],
                    values[i],
                )
                for i in range(len(qkv))
            ]
        )

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return torch.cat(
            [
                kernels.attention.attend(
                    queries[i : i + 1], keys[i], values[i], self.length[i : i + 1], scale=scale
                )
                for i in range(len(queries))
            ]
        )


def add_norm(branch: Tensor, x: Tensor, norm: nn.LayerNorm, *, alpha: float) -> Tensor:
    """The layer norm of branch + alpha * x.

    branch: [rows, hidden].
    x: [rows, hidden].
    norm: the norm's parameters.
    alpha: scale of x.
    """
    return norm(torch.add(branch, x, alpha=alpha))


def add_rms_norm(branch: Tensor, x: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """branch + x, and its RMS norm.

    branch: [rows, hidden].
    x: [rows, hidden].
    norm: the norm's parameters.
    """
    total = branch + x
    return total, norm(total)


def append(
    qkv: Tensor, rotary: Tensor, positions: Tensor, length: int, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, and put keys and values into the cache; returns the rotated queries.

    qkv: [rows, heads + 2 kv_heads, head].
    rotary: float32 [2 (cos, sin), positions, head / 2 / n].
    positions: int64 [n, rows]; each of n equal shares of a half rotates by its own position.
    length: tokens in the cache before.
    keys, values: [kv_heads, capacity, head]; changed in place.

    Returns [rows, heads, head].
    """
    queries, new_keys, new_values = rotated(qkv, rotary, positions, len(keys))
    new = slice(length, length + len(qkv))
    keys[:, new], values[:, new] = new_keys.transpose(0, 1), new_values.transpose(0, 1)
    return queries


def rotated(
    qkv: Tensor, rotary: Tensor, positions: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split queries, keys and values, and rotate the first two.

    qkv, rotary, positions: as for append().
    kv_heads: heads of keys, and of values.

    Returns [rows, heads, head] and twice [rows, kv_heads, head].
    """
    # [2, n, rows, head / 2 / n] to two of [rows, 1, head / 2]
    cos, sin = rotary[:, positions].transpose(1, 2).flatten(2)[:, :, None]

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    sizes = [qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
    queries, keys, values = qkv.split(sizes, dim=1)
    return turned(queries), turned(keys), values


def attend(queries: Tensor, keys: Tensor, values: Tensor, length: int, *, scale: float) -> Tensor:
    """Causal attention of new tokens over the cache; returns [rows, heads, head].

    queries: [rows, heads, head].
    keys, values: [kv_heads, capacity, head]; the new tokens are already there, after `length`
        others.
    length: tokens in the cache before.
    scale: factor of the scores.
    """
    rows = len(queries)
    end, mask = length + rows, None
    if rows > 1 and length:
        mask = torch.ones((rows, end), dtype=torch.bool, device=queries.device).tril(length)
    causal = rows > 1 and not length
    return _attention(queries, keys[:, :end], values[:, :end], mask, scale, causal=causal)


def _attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    causal: bool = False,
) -> Tensor:
    q, k, v = queries.transpose(0, 1)[None], keys[None], values[None]
    shared = q.shape[1] != k.shape[1]  # heads of keys and values serve several of queries
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
    )
    return out[0].transpose(0, 1)
