"""Lists what differs between the decoders that can be read, one row a family.

A new family needs a row here with a file of its names, a graph in seechat_export, its prompt in
seechat_lite, and the contract tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from seechat_weights.config import LMConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LMTensor:
    """One of our tensors of a decoder, as a bundle stores it.

    key: our name of the tensor.
    shape: [outputs, inputs] of a linear, or [size]; heads are padded.
    heads: the axis that runs over heads: "rows" (query_key_value), "columns" (the attention's
        dense) or "" for neither.
    """

    key: str
    shape: Shape
    heads: str = ""


class Layout(Protocol):
    def __call__(self, config: LMConfig) -> Iterator[LMTensor]: ...


@dataclass(frozen=True)
class LMFamily:
    """How a family's decoder lies in a bundle.

    layout: its tensors in file order, without word embeddings and lm_head.
    turned: the order in a bundle of the pieces of a head of q and k whose numbers rotate together.
        If the rotary embedding takes pairs from the two halves, nothing moves.
    by_head: whether query_key_value is published as [head][q | k | v], not [q | k | v][head].
    """

    layout: Layout
    turned: tuple[int, ...]
    by_head: bool


def _chatglm_layout(config: LMConfig) -> Iterator[LMTensor]:
    hidden, inner = config.hidden_size, config.inner_size
    width = config.num_heads * config.padded_head_size
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        yield LMTensor(f"{layer}.input_layernorm.weight", (hidden,))
        yield LMTensor(f"{layer}.input_layernorm.bias", (hidden,))
        yield LMTensor(f"{layer}.attention.query_key_value.weight", (3 * width, hidden), "rows")
        yield LMTensor(f"{layer}.attention.query_key_value.bias", (3 * width,), "rows")
        yield LMTensor(f"{layer}.attention.dense.weight", (hidden, width), "columns")
        yield LMTensor(f"{layer}.attention.dense.bias", (hidden,))
        yield LMTensor(f"{layer}.post_attention_layernorm.weight", (hidden,))
        yield LMTensor(f"{layer}.post_attention_layernorm.bias", (hidden,))
        yield LMTensor(f"{layer}.mlp.dense_h_to_4h.weight", (inner, hidden))
        yield LMTensor(f"{layer}.mlp.dense_h_to_4h.bias", (inner,))
        yield LMTensor(f"{layer}.mlp.dense_4h_to_h.weight", (hidden, inner))
        yield LMTensor(f"{layer}.mlp.dense_4h_to_h.bias", (hidden,))
    yield LMTensor("final_layernorm.weight", (hidden,))
    yield LMTensor("final_layernorm.bias", (hidden,))


def _llama_layout(config: LMConfig) -> Iterator[LMTensor]:
    hidden, inner = config.hidden_size, config.inner_size
    queries = config.num_heads * config.padded_head_size
    fused = queries + 2 * config.kv_heads * config.padded_head_size
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        yield LMTensor(f"{layer}.input_layernorm.weight", (hidden,))
        yield LMTensor(f"{layer}.attention.query_key_value.weight", (fused, hidden), "rows")
        yield LMTensor(f"{layer}.attention.dense.weight", (hidden, queries), "columns")
        yield LMTensor(f"{layer}.post_attention_layernorm.weight", (hidden,))
        yield LMTensor(f"{layer}.mlp.gate_up.weight", (2 * inner, hidden))
        yield LMTensor(f"{layer}.mlp.down.weight", (hidden, inner))
    yield LMTensor("final_layernorm.weight", (hidden,))


LM_FAMILIES = {
    # two-dimensional positions: the quarters [a1 a2 b1 b2] become [a1 b1 a2 b2]
    "chatglm": LMFamily(_chatglm_layout, turned=(0, 2, 1, 3), by_head=True),
    "llama": LMFamily(_llama_layout, turned=(0, 1), by_head=False),
}
