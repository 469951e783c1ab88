"""Where each tensor of the decoder lies in a bundle's weights file, and in what form.

The file is what `seechat export` writes beside the decoder's graph: the tensors one after another,
in the order of the network, each at the start of a page. Two rearrangements happen to the
attention's heads; both leave every product as it was:
- the published order [head][q | k | v][head_size] becomes [q | k | v][head][head_size];
- within a head of q and k, the quarters [a1 a2 b1 b2] become [a1 b1 a2 b2], which makes the
  two-dimensional rotary embedding one ordinary rotation whose angles come from two positions.
A head whose size is no multiple of 8, which ONNX Runtime wants, has each quarter padded with zeros.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from seechat_weights.bundle import LMConfig
from seechat_weights.precisions import Precision

HEAD = "lm_head.weight"
ALIGN = 4096  # a page: lets a runtime map each tensor straight from the file


@dataclass(frozen=True)
class Stored:
    """One array in the weights file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Item:
    """One of our tensors and the arrays stored for it.

    kind: "vector", stored as it is, or "linear", stored as the precision says. shape: the
    tensor's, [outputs, inputs] of a linear, once its heads are rearranged. heads: which axis runs
    over heads and is rearranged first: "rows" (query_key_value), "columns" (the attention's dense)
    or "" for neither. bits: of the integers of a linear in blocks, else 0.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    heads: str
    stored: tuple[Stored, ...]
    bits: int = 0

    @property
    def end(self) -> int:
        """Where the next one may begin, bytes from the file's start; of the last, its size."""
        return self.stored[-1].end


def head_order(config: LMConfig) -> np.ndarray:
    """For each row of a bundle's query_key_value, unpadded, the published row; int64."""
    quarter = config.head_size // 4
    rows = np.arange(3 * config.hidden_size).reshape(config.num_heads, 3, 2, 2, quarter)
    q, k, v = rows.transpose(1, 0, 2, 3, 4)
    return np.stack([q.swapaxes(1, 2), k.swapaxes(1, 2), v]).ravel()


def decoder_layout(config: LMConfig, precision: Precision, block_size: int) -> list[Item]:
    """The decoder's tensors but for the word embeddings, in file order.

    A linear of float weights is stored transposed, [inputs, outputs]; one in blocks as codes, uint8
    [outputs, blocks, block_size * bits / 8], and scales [outputs, blocks] (see ONNX Runtime's
    MatMulNBits).
    """
    items: list[Item] = []
    end = 0
    for key, shape, heads, bits in _tensors(config, precision):
        kind = "linear"
        arrays: list[tuple[str, str, tuple[int, ...]]]
        arrays = [(f"{key}_t", precision.dtype, shape[::-1])]
        if len(shape) == 1:
            kind, arrays = "vector", [(key, "float32", shape)]
        elif bits:
            outputs, inputs = shape
            blocks, name = -(-inputs // block_size), key.removesuffix(".weight")
            arrays = [
                (f"{name}.quant", "uint8", (outputs, blocks, block_size * bits // 8)),
                (f"{name}.scales", precision.dtype, (outputs, blocks)),
            ]
        stored = []
        for name, dtype, size in arrays:
            stored.append(Stored(name, dtype, size, -(-end // ALIGN) * ALIGN))
            end = stored[-1].end
        items.append(Item(key, kind, shape, heads, tuple(stored), bits))
    return items


def _tensors(
    config: LMConfig, precision: Precision
) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Key, shape, heads and bits of every tensor."""
    hidden, inner = config.hidden_size, config.inner_size
    width = config.num_heads * config.padded_head_size
    bits = precision.bits if precision.block else 0
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,), "", 0
        yield f"{layer}.input_layernorm.bias", (hidden,), "", 0
        yield f"{layer}.attention.query_key_value.weight", (3 * width, hidden), "rows", bits
        yield f"{layer}.attention.query_key_value.bias", (3 * width,), "rows", 0
        yield f"{layer}.attention.dense.weight", (hidden, width), "columns", bits
        yield f"{layer}.attention.dense.bias", (hidden,), "", 0
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), "", 0
        yield f"{layer}.post_attention_layernorm.bias", (hidden,), "", 0
        yield f"{layer}.mlp.dense_h_to_4h.weight", (inner, hidden), "", bits
        yield f"{layer}.mlp.dense_h_to_4h.bias", (inner,), "", 0
        yield f"{layer}.mlp.dense_4h_to_h.weight", (hidden, inner), "", bits
        yield f"{layer}.mlp.dense_4h_to_h.bias", (hidden,), "", 0
    yield "final_layernorm.weight", (hidden,), "", 0
    yield "final_layernorm.bias", (hidden,), "", 0
    head_bits = (precision.head_bits or bits) if precision.block else 0
    yield HEAD, (config.vocab_size, hidden), "", head_bits
