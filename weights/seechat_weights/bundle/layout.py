"""Says where each tensor of the decoder lies in a bundle's weights file, and in what form.

`seechat export` writes this file beside the decoder's graph. The tensors follow each other in the
order of the network, and each begins at the start of a page. The heads of the attention are
rearranged where a family needs it. This leaves every product as it was:
- ChatGLM's published order [head][q | k | v][head_size] becomes [q | k | v][head][head_size];
- within a head of its q and k, the quarters [a1 a2 b1 b2] become [a1 b1 a2 b2]; the
  two-dimensional rotary embedding is then one ordinary rotation with angles from two positions;
- ONNX Runtime wants head sizes that are multiples of 8; in any other head each piece (quarters, or
  LLaMA's halves) is padded with zeros.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from seechat_weights.bundle.precisions import Precision
from seechat_weights.config import LMConfig
from seechat_weights.lm.families import LM_FAMILIES, LMTensor

HEAD = "lm_head.weight"
ALIGN = 4096  # a page: lets a runtime map each tensor straight from the file


@dataclass(frozen=True)
class ArraySpan:
    """One array in the weights file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class TensorLayout:
    """One of our tensors and the arrays stored for it.

    key: our name of the tensor.
    kind: "vector" is stored as it is; "linear" is stored as the precision says.
    shape: of the tensor once its heads are rearranged; [outputs, inputs] for a linear.
    heads: the axis that runs over heads and is rearranged first: "rows" (query_key_value),
        "columns" (the attention's dense) or "" for neither.
    stored: its arrays: one, or codes and scales, or these and zeros.
    bits: size of the integers of a linear in blocks; 0 for every other tensor.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    heads: str
    stored: tuple[ArraySpan, ...]
    bits: int = 0

    @property
    def end(self) -> int:
        """Where the next tensor may begin, in bytes; for the last tensor, the size of the file."""
        return self.stored[-1].end


def head_order(config: LMConfig, axis: str, *, padded: bool = True) -> np.ndarray:
    """For each place of a bundle's attention tensor, its published place; int64, -1 for padding.

    config: the decoder's shape.
    axis: what runs over heads: "rows" of query_key_value, "columns" of the attention's dense, or
        the numbers of one "key" or "value".
    padded: whether heads have config.padded_head_size.
    """
    family = LM_FAMILIES[config.family]
    pieces = np.arange(config.head_size).reshape(len(family.turned), -1)
    if padded:
        more = config.padded_head_size // len(pieces) - pieces.shape[1]
        pieces = np.pad(pieces, ((0, 0), (0, more)), constant_values=-1)
    turned, plain = pieces[list(family.turned)].ravel(), pieces.ravel()
    if axis in ("key", "value"):
        return turned if axis == "key" else plain
    heads, kv_heads = config.num_heads, config.kv_heads
    # published heads in the order of a bundle: [q | k | v][head]
    published = np.arange(heads + 2 * kv_heads)
    if family.by_head:
        published = published.reshape(heads, 3).T.ravel()
    orders = [turned] * (heads + kv_heads) + [plain] * kv_heads
    if axis == "columns":
        published, orders = np.arange(heads), [plain] * heads
    within = np.stack(orders)
    return np.where(within < 0, -1, within + published[:, None] * config.head_size).ravel()


def reordered(array: Any, order: np.ndarray, axis: int = 0) -> Any:
    """Return `array` with its places along `axis` in another order.

    array: a numpy array or a torch tensor.
    order: the old place for each new one; -1 gives zeros.
    axis: the axis that is reordered.
    """
    if np.array_equal(order, np.arange(array.shape[axis])):
        return array
    before = (slice(None),) * (axis % array.ndim)
    moved = array[(*before, order)]
    if (order < 0).any():
        moved[(*before, order < 0)] = 0
    return moved


def inverse_order(order: np.ndarray) -> np.ndarray:
    """For each published place, its place in a bundle: this undoes `reordered`.

    order: what head_order returned.
    """
    return order.argsort(kind="stable")[(order < 0).sum() :]


def reordered_prefix(prefix: np.ndarray, config: LMConfig, *, padded: bool = True) -> np.ndarray:
    """Put a P-tuning prefix into the order in which a cache holds it.

    prefix: [layers, 2 (key, value), heads, tokens, head_size], heads as published.
    config: the decoder's shape.
    padded: whether heads get config.padded_head_size.
    """
    orders = [head_order(config, axis, padded=padded) for axis in ("key", "value")]
    return np.stack([reordered(prefix[:, i], orders[i], axis=-1) for i in (0, 1)], axis=1)


def decoder_layout(config: LMConfig, precision: Precision, block_size: int) -> list[TensorLayout]:
    """The decoder's tensors in file order, without the word embeddings.

    A linear of float weights is stored transposed, [inputs, outputs]. A linear in blocks is stored
    as codes, uint8 [outputs, blocks, block_size * bits / 8], and scales, [outputs, blocks]. Where
    blocks have zeros, these follow, uint8 [outputs, blocks * bits / 8], the earlier of two of 4
    bits in the low nibble. See ONNX Runtime's MatMulNBits.

    config: the decoder's shape.
    precision: how its linears are stored.
    block_size: inputs that share a scale.
    """
    items: list[TensorLayout] = []
    end = 0
    for tensor in _tensors(config):
        key, shape, bits = tensor.key, tensor.shape, _bits(tensor, precision)
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
            if precision.zeros and key != HEAD:
                arrays.append((f"{name}.zeros", "uint8", (outputs, -(-blocks * bits // 8))))
        stored = []
        for name, dtype, size in arrays:
            stored.append(ArraySpan(name, dtype, size, -(-end // ALIGN) * ALIGN))
            end = stored[-1].end
        items.append(TensorLayout(key, kind, shape, tensor.heads, tuple(stored), bits))
    return items


def _tensors(config: LMConfig) -> Iterator[LMTensor]:
    yield from LM_FAMILIES[config.family].layout(config)
    yield LMTensor(HEAD, (config.vocab_size, config.hidden_size))


def _bits(tensor: LMTensor, precision: Precision) -> int:
    """Bits of a tensor's integers in blocks; 0 if it is stored as floats."""
    if not precision.block or len(tensor.shape) == 1:
        return 0
    return (precision.head_bits or precision.bits) if tensor.key == HEAD else precision.bits
