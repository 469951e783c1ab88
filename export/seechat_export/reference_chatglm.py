"""ChatGLM-6B (first generation) in torch, as published; an export is checked against it.

It is written apart from the runtime's networks, so that their agreement means something.

Parameter names are the published keys without their leading "transformer.", so that a checkpoint
and this module can be compared side by side. This decoder differs from others:

- The residual of both halves of a block starts from the layer-normed input, scaled by ALPHA.
- Rotary positions are two-dimensional: the first half of a head rotates by the position in the
  context, the second half by the position in the answer.
- The context is bidirectional, the answer causal. A single prompt needs no mask at all: the context
  is one full-attention forward, and every answer token is a one-token forward over the cache.
- The published code divides queries by (layer + 1) and multiplies the scores by it again. The two
  cancel, so neither is done here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seechat_lite.rotary import rotary_tables
from seechat_weights.config import ALPHA, LMConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the two-dimensional rotary embedding; returns a tensor like x.

    x: [batch, length, heads, head_size].
    cos, sin: [batch, length, 2, head_size / 4]; the last axes are (which half, frequency).
    """
    halves = x.unflatten(-1, (2, 2, -1))  # [batch, length, heads, half, pair member, frequency]
    a, b = halves[..., 0, :], halves[..., 1, :]
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3)


def angles(tables: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one sequence as Block takes them, each [1, length, 2, head_size / 4].

    tables: float32 [2, length, head_size / 4].
    positions: int64 [2, tokens].
    """
    cos, sin = tables[:, positions].transpose(1, 2)[:, None]
    return cos, sin


def final_norm(config: LMConfig) -> nn.Module:
    """The norm before the head, without its weights.

    config: the decoder's shape.
    """
    return nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)


@dataclass
class KVCache:
    """Keys and values of each layer, [batch, heads, capacity, head_size]; `length` are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @classmethod
    def empty(cls, model: "ChatGLM", capacity: int, batch: int = 1) -> "KVCache":
        """A cache with no tokens.

        model: whose cache it is.
        capacity: tokens that it has room for.
        batch: sequences.
        """
        c, weight = model.config, model.word_embeddings.weight
        shape = (batch, c.num_heads, capacity, c.head_size)
        make = lambda: [weight.new_zeros(shape) for _ in range(c.num_layers)]  # noqa: E731
        return cls(make(), make())


class Attention(nn.Module):
    """Self-attention with the two-dimensional rotary embedding; see Block for the shapes."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        # rows of the published weight are ordered [head][q | k | v][head_size]
        qkv = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1))
        q, k, v = qkv.unbind(-2)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)  # all three [batch, heads, length, head_size]
        if cache is not None:
            end = start + x.shape[1]
            cache[0][:, :, start:end], cache[1][:, :, start:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dense(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_size)
        self.dense_4h_to_h = nn.Linear(config.inner_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention and MLP, each on the layer-normed input with a scaled residual."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int,
    ) -> Tensor:
        x = self.input_layernorm(x)
        x = x * ALPHA + self.attention(x, cos, sin, mask, cache, start)
        x = self.post_attention_layernorm(x)
        return x * ALPHA + self.mlp(x)


class ChatGLM(nn.Module):
    """The decoder. `forward` takes embeddings, so that pictures can stand among the words.

    config: its shape.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tables = rotary_tables(config.head_size, config.max_sequence_length)
        self.rotary: Tensor  # float32 [2, max_sequence_length, head_size / 4]
        self.register_buffer("rotary", torch.from_numpy(tables), persistent=False)

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> list[Tensor]:
        """The input of every layer and, last, the output of the final layer norm.

        inputs_embeds: [batch, length, hidden].
        position_ids: int64 [batch, 2, length] (position in the context, position in the answer).
        mask: bool [batch, 1, length, past + length], True where a token may look; None for
            everywhere.
        cache: where keys and values are appended.
        """
        # [batch, length, 2, head_size / 4]
        cos, sin = (t[position_ids].transpose(1, 2) for t in self.rotary)
        start = cache.length if cache else 0
        x, states = inputs_embeds, []
        for i, layer in enumerate(self.layers):
            states.append(x)
            x = layer(x, cos, sin, mask, (cache.keys[i], cache.values[i]) if cache else None, start)
        if cache:
            cache.length += inputs_embeds.shape[1]
        return [*states, self.final_layernorm(x)]

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, [batch, length, vocab].

        inputs_embeds, position_ids, mask, cache: see hidden_states.
        """
        return self.lm_head(
            self.hidden_states(inputs_embeds, position_ids, mask=mask, cache=cache)[-1]
        )


def prefix_mask(context_lengths: Tensor, length: int) -> Tensor:
    """Mask for whole sequences at once (training, batches): bidirectional context, causal answer.

    Rows padded on the right need no other mask: nothing before the padding can see it.

    context_lengths: int64 [batch], the index of <sop> in each row.
    length: of the sequences.

    Returns bool [batch, 1, length, length], True where row i may look at column j.
    """
    index = torch.arange(length, device=context_lengths.device)
    causal = index[None, :] <= index[:, None]
    context = index[None, None, :] < context_lengths[:, None, None]
    return (causal | context)[:, None]
