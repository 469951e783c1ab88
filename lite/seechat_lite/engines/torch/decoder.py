"""ChatGLM-6B as the torch engine runs it: one prompt, one answer, a cache of fixed size.

The heads have a bundle's order (see seechat_weights.bundle.layout), so a bundle's weights are used
as they lie. No size changes from step to step. On a GPU, steps run the kernels of
engines.torch.kernels; `add_norm`, `append` and `attend` do the same in plain torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.engines.torch import kernels
from seechat_lite.engines.torch.linears import Linear, with_gelu
from seechat_weights.config import ALPHA, LMConfig


@dataclass
class Cache:
    """Keys and values of each layer, [heads, capacity, head]."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(
        cls, config: LMConfig, head: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> "Cache":
        """A cache of zeros.

        config: the decoder's shape.
        head: size of a head of the weights.
        capacity: tokens that it has room for.
        dtype, device: of the buffers.
        """
        shape = (config.num_heads, capacity, head)
        layers = range(config.num_layers)
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        return cls(keys, [torch.zeros_like(k) for k in keys])


class StepOps(Protocol):
    """How new tokens go through a layer, between its linears."""

    def add_norm(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor: ...
    def append(self, qkv: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class TorchOps:
    """Plain torch behind `length` tokens; the first `context` new ones see each other both ways."""

    positions: Tensor  # int64 [2, rows]
    length: int
    context: int = 0

    def add_norm(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return add_norm(branch, x, norm, alpha=ALPHA)

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

    positions: Tensor  # int64 [2, rows]
    length: Tensor

    def add_norm(self, branch: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return kernels.attention.add_norm(branch, x, norm, alpha=ALPHA)

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


class Layer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: LMConfig, head: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.num_heads * head
        norm = lambda: nn.LayerNorm(hidden, config.layernorm_epsilon)  # noqa: E731
        self.split = (3, config.num_heads, head)
        self.scale = config.head_size**-0.5
        self.input_layernorm = norm()
        self.attention = nn.ModuleDict(
            {
                "query_key_value": Linear(hidden, 3 * width),
                "dense": Linear(width, hidden),
            }
        )
        self.post_attention_layernorm = norm()
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": Linear(hidden, config.inner_size),
                "dense_4h_to_h": Linear(config.inner_size, hidden),
            }
        )

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        ops: StepOps,
        keys: Tensor,
        values: Tensor,
        next_norm: nn.LayerNorm,
    ) -> Tensor:
        """Return the normed input of what follows; it has the norm `next_norm`."""
        branch = self.attention["dense"](self._attended(x, rotary, ops, keys, values))
        x = ops.add_norm(branch, x, self.post_attention_layernorm)
        wide = with_gelu(self.mlp["dense_h_to_4h"], x)
        return ops.add_norm(self.mlp["dense_4h_to_h"](wide), x, next_norm)

    def _attended(
        self, x: Tensor, rotary: Tensor, ops: StepOps, keys: Tensor, values: Tensor
    ) -> Tensor:
        # a method of its own, so that nothing of a long prompt's attention is held during its MLP
        qkv = self.attention["query_key_value"](x).unflatten(-1, self.split)
        queries = ops.append(qkv, rotary, keys, values)
        del qkv
        return ops.attend(queries, keys, values, self.scale).flatten(1)


class Decoder(nn.Module):
    """Turns embeddings of new tokens into logits. Parameters are named as in bundle.layout."""

    def __init__(self, config: LMConfig, head: int, rotary: Tensor) -> None:
        """Build the network.

        config: its shape.
        head: size of a head of the weights.
        rotary: float32 [2, positions, head / 4].
        """
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, head) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary: Tensor
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(
        self,
        embeds: Tensor,
        ops: StepOps,
        cache: Cache,
        *,
        logit_rows: int = 1,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """Append tokens; returns the logits of the last ones, float32 [logit_rows, vocab].

        embeds: [rows, hidden].
        ops: how tokens go through a layer.
        cache: keys and values; it is changed.
        logit_rows: how many of the last tokens get logits.
        between_layers: called before every layer; an exception that it raises ends the call.
        """
        norms = [*(layer.input_layernorm for layer in self.layers[1:]), self.final_layernorm]
        x = self.get_submodule("layers.0.input_layernorm")(embeds)
        for layer, keys, values, norm in zip(
            self.layers, cache.keys, cache.values, norms, strict=True
        ):
            if between_layers:
                between_layers()
            x = layer(x, self.rotary, ops, keys, values, norm)
        return self.lm_head(x[-logit_rows:]).float()


def add_norm(branch: Tensor, x: Tensor, norm: nn.LayerNorm, *, alpha: float) -> Tensor:
    """The layer norm of branch + alpha * x.

    branch: [rows, hidden].
    x: [rows, hidden].
    norm: the norm's parameters.
    alpha: scale of x.
    """
    return norm(torch.add(branch, x, alpha=alpha))


def append(
    qkv: Tensor, rotary: Tensor, positions: Tensor, length: int, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, and put keys and values into the cache; returns the rotated queries.

    qkv: [rows, 3, heads, head].
    rotary: float32 [2 (cos, sin), positions, head / 4].
    positions: int64 [2, rows].
    length: tokens in the cache before.
    keys, values: [heads, capacity, head]; changed in place.

    Returns [rows, heads, head].
    """
    # [2, 2, rows, head / 4] to [rows, 1, head / 2]: the first half rotates by the first position
    cos, sin = rotary[:, positions].transpose(1, 2).flatten(2)[:, :, None]

    def rotated(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    queries, new_keys, new_values = qkv.unbind(1)
    new = slice(length, length + len(qkv))
    keys[:, new], values[:, new] = rotated(new_keys).transpose(0, 1), new_values.transpose(0, 1)
    return rotated(queries)


def attend(queries: Tensor, keys: Tensor, values: Tensor, length: int, *, scale: float) -> Tensor:
    """Causal attention of new tokens over the cache; returns [rows, heads, head].

    queries: [rows, heads, head].
    keys, values: [heads, capacity, head]; the new tokens are already there, after `length` others.
    length: tokens in the cache before.
    scale: factor of the scores.
    """
    rows = len(queries)
    end, mask = length + rows, None
    if rows > 1:
        mask = torch.ones((rows, end), dtype=torch.bool, device=queries.device).tril(length)
    return _attention(queries, keys[:, :end], values[:, :end], mask, scale)


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    q, k, v = queries.transpose(0, 1)[None], keys[None], values[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)
