"""Weights as a precision stores them: rearranged, transposed, or in blocks of 8 or 4 bits.

Blocks, and how a weight becomes codes and scales of them, are in seechat_lite.nn.blocks.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seechat_lite.nn.blocks import dequantize_blocks, quantize_blocks
from seechat_weights.bundle import LMConfig
from seechat_weights.layout import Item
from seechat_weights.precisions import Precision
from seechat_weights.quantized import Quantized, pack

ALL = slice(None)


def rearrange_heads(tensor: Tensor, config: LMConfig, axis: str) -> Tensor:
    """An attention tensor in the graph's order of heads (see decoder_graph).

    axis "rows": query_key_value, weight [3 * hidden, hidden] or bias [3 * hidden], from
    [head][q | k | v][head_size] to [q | k | v][head][head_size], the quarters a1 a2 b1 b2 of each
    head of q and k to a1 b1 a2 b2, every quarter padded to the graph's head size.
    axis "columns": the attention's dense [hidden, hidden], its inputs padded to match v.
    """
    quarter, padding = config.head_size // 4, (config.padded_head_size - config.head_size) // 4

    def pad(halves: Tensor) -> Tensor:  # [..., 2, 2, quarter, columns]
        return F.pad(halves, (0, 0, 0, padding))

    if axis == "columns":
        halves = tensor.t().unflatten(0, (config.num_heads, 2, 2, quarter))
        return pad(halves).flatten(0, 3).t()
    rows = tensor if tensor.ndim == 2 else tensor[:, None]
    q, k, v = pad(rows.unflatten(0, (config.num_heads, 3, 2, 2, quarter))).unbind(1)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return torch.stack([q, k, v]).flatten(0, 4).reshape(-1, *tensor.shape[1:])


def rearrange_prefix(prefix: Tensor, config: LMConfig) -> Tensor:
    """A P-tuning prefix [layers, 2 (key, value), heads, tokens, head_size] as the cache holds it.

    Keys have the quarters of a head in the graph's order, and all quarters are padded.
    """
    padding = (config.padded_head_size - config.head_size) // 4
    halves = F.pad(prefix.unflatten(-1, (2, 2, -1)), (0, padding))
    keys, values = halves.unbind(1)
    return torch.stack([keys.transpose(-3, -2), values], 1).flatten(-3)


def _published_blocks(
    item: Item, weight: Quantized, config: LMConfig, block_size: int
) -> list[Tensor]:
    """What quantize_blocks gives, from published integers and their rows' scales, nothing lost."""
    scales = torch.from_numpy(weight.scales)
    if item.bits > weight.bits:
        weight = Quantized(weight.codes, weight.scales, item.bits)
    if item.heads:
        codes = rearrange_heads(torch.from_numpy(weight.codes), config, item.heads).numpy()
        weight = replace(weight, stored=pack(codes, bits=item.bits))
    if item.heads == "rows":
        scales = rearrange_heads(scales, config, "rows")
    codes = torch.from_numpy(weight.blocks(block_size))
    return [codes, scales[:, None].expand(codes.shape[:2])]


def stored_arrays(
    item: Item,
    tensor: Tensor | Quantized,
    config: LMConfig,
    precision: Precision,
    block_size: int,
) -> list[Tensor]:
    """The arrays to write for `item`, in the order of item.stored, from its tensor as published.

    A weight that its authors quantized, to no more bits than the item has, is stored as it is.
    """
    if isinstance(tensor, Quantized):
        return _published_blocks(item, tensor, config, block_size)
    if item.heads:
        tensor = rearrange_heads(tensor, config, item.heads)
    if item.kind == "vector":
        return [tensor.float()]
    if item.bits:
        return list(quantize_blocks(tensor, bits=item.bits, block_size=block_size))
    # copied into place: transposing and converting one after the other would take twice the memory
    turned = torch.empty(tensor.shape[::-1], dtype=getattr(torch, precision.dtype))
    return [turned.copy_(tensor.t())]


def restored_tensor(
    item: Item, data: np.ndarray, config: LMConfig, precision: Precision, *, rows: slice = ALL
) -> Tensor:
    """Our tensor of `item`, float32, from a weights file's bytes: the inverse of stored_arrays.

    rows: only these rows of a linear weight whose heads are in the published order.
    """
    stored = [
        data[s.offset : s.offset + s.nbytes].view(s.dtype).reshape(s.shape) for s in item.stored
    ]
    transposed = item.kind == "linear" and not item.bits
    arrays = [torch.from_numpy((a[:, rows] if transposed else a[rows]).copy()) for a in stored]
    if item.kind == "vector":
        tensor = arrays[0]
    elif item.bits:
        tensor = dequantize_blocks(*arrays, bits=item.bits, inputs=item.shape[1])
    else:
        tensor = arrays[0].float().t()
    if not item.heads:
        return tensor
    # rearranging the published elements' numbers, counted from 1, tells where each one went
    axis = 0 if item.heads == "rows" else 1
    numbers = torch.arange(1, config.hidden_size * (3 if axis == 0 else 1) + 1)
    order = rearrange_heads(numbers if axis == 0 else numbers[None], config, item.heads).flatten()
    (places,) = order.nonzero(as_tuple=True)  # zeros are padding
    return tensor.index_select(axis, places[order[places].argsort()])
