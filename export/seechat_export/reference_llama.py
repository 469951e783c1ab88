"""A LLaMA-shaped decoder in torch, as published; an export is checked against it.

It is written apart from the runtime's networks, so that their agreement means something. Parameter
names are ours: q, k and v are one tensor, and so are the gate and what it multiplies.

- RMSNorm computes in float32 and multiplies by its weight afterwards.
- Rotary positions rotate the first half of a head with its second half.
- Fewer heads of keys and values each serve an equal number of query heads, in their order.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_weights.config import LMConfig


class RMSNorm(nn.Module):
    """x over the root of its mean square, times a weight."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.layernorm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding; returns a tensor like x.

    x: [batch, length, heads, head_size].
    cos, sin: [length, head_size / 2].
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = (t[None, :, None].to(x.dtype) for t in (cos, sin))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Self-attention with the rotary embedding; see Block for the shapes."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.sizes = config.num_heads, config.kv_heads, config.kv_heads
        width = sum(self.sizes) * config.head_size
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        heads, kv_heads, _ = self.sizes
        qkv = self.query_key_value(x).unflatten(-1, (sum(self.sizes), -1))
        q, k, v = qkv.split(self.sizes, dim=-2)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)  # [batch, kv_heads, length, head_size]
        if cache is not None:
            end = start + x.shape[1]
            cache[0][:, :, start:end], cache[1][:, :, start:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dense(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A linear whose output is gated by the SiLU of another one, and a linear back."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.inner_size, bias=False)
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each added to its input, which it sees normed.

    Its forward takes x [batch, length, hidden], cos and sin [length, head_size / 2], a mask, bool
    [batch, 1, length, past + length], the layer's cache [batch, kv_heads, capacity, head_size] of
    keys and of values, and how many tokens it holds.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), cos, sin, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


def angles(tables: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as Block takes them.

    tables: float32 [2, length, head_size / 2].
    positions: int64 [1, tokens].
    """
    cos, sin = tables[:, positions[0]]
    return cos, sin


def final_norm(config: LMConfig) -> nn.Module:
    """The norm before the head, without its weights.

    config: the decoder's shape.
    """
    return RMSNorm(config)
