"""Makes weights as a precision stores them: rearranged, transposed, or in blocks of 8 or 4 bits.

seechat_lite.nn.block_quantization turns a weight into codes and scales of blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seechat_lite.nn.block_quantization import (
    dequantize_blocks,
    pack_zeros,
    quantize_blocks,
    unpack_zeros,
)
from seechat_weights.bundle.layout import TensorLayout, head_order, inverse_order, reordered
from seechat_weights.bundle.precisions import Precision
from seechat_weights.config import LMConfig
from seechat_weights.lm.quantized import Quantized, pack

ALL = slice(None)


def _published_blocks(
    item: TensorLayout, weight: Quantized, config: LMConfig, block_size: int
) -> list[Tensor]:
    """What quantize_blocks would return, without loss from published integers and scales."""
    scales = weight.block_scales(block_size)
    made = _zeros(item, weight, config, block_size) if len(item.stored) > 2 else []
    if item.bits > weight.bits:
        weight = replace(weight, stored=weight.codes, bits=item.bits)
    if item.heads:
        codes = _reordered(weight.codes, item, config)
        weight = replace(weight, stored=pack(codes, bits=item.bits))
    if item.heads == "rows":
        scales = _reordered(scales, item, config)
    codes = torch.from_numpy(weight.blocks(block_size))
    return [codes, torch.from_numpy(np.ascontiguousarray(scales)).expand(codes.shape[:2]), *made]


def _zeros(
    item: TensorLayout, weight: Quantized, config: LMConfig, block_size: int
) -> list[Tensor]:
    """The zeros of an item's blocks as they are stored."""
    zeros = weight.block_zeros(block_size)
    # integers keep their distance from the middle of a wider range
    zeros += np.uint8((1 << item.bits - 1) - (1 << weight.bits - 1))
    more = item.stored[1].shape[1] - zeros.shape[1]  # a block of padding has any zero
    zeros = np.pad(zeros, ((0, 0), (0, more)), constant_values=1 << item.bits - 1)
    if item.heads == "rows":
        zeros = _reordered(zeros, item, config)
    return [pack_zeros(torch.from_numpy(np.ascontiguousarray(zeros)), bits=item.bits)]


def _reordered(array: Any, item: TensorLayout, config: LMConfig) -> Any:
    """A published array of `item` with its axis of heads in a bundle's order."""
    order = head_order(config, item.heads)
    return reordered(array, order, axis=1 if item.heads == "columns" else 0)


def stored_arrays(
    item: TensorLayout,
    tensor: Tensor | Quantized,
    config: LMConfig,
    precision: Precision,
    block_size: int,
) -> list[Tensor]:
    """The arrays to write for an item, in the order of item.stored.

    A weight that its authors quantized, to no more bits than the item has, is stored as it is.

    item: says how it is stored.
    tensor: the tensor as published.
    config: the decoder's shape.
    precision: how weights are stored.
    block_size: inputs that share a scale.
    """
    if isinstance(tensor, Quantized):
        return _published_blocks(item, tensor, config, block_size)
    weight: Tensor = _reordered(tensor, item, config) if item.heads else tensor
    if item.kind == "vector":
        return [weight.float()]
    if item.bits:
        codes, scales = quantize_blocks(weight, bits=item.bits, block_size=block_size)
        if len(item.stored) < 3:
            return [codes, scales]
        middle = torch.full(scales.shape, 1 << item.bits - 1, dtype=torch.uint8)
        return [codes, scales, pack_zeros(middle, bits=item.bits)]
    # copied into place: transposing first and converting then would take twice the memory
    turned = torch.empty(weight.shape[::-1], dtype=getattr(torch, precision.dtype))
    return [turned.copy_(weight.t())]


def restored_tensor(
    item: TensorLayout, stored: Sequence[np.ndarray], config: LMConfig, *, rows: slice = ALL
) -> Tensor:
    """Our tensor, float32, from its arrays in a bundle: the inverse of stored_arrays.

    item: says how it is stored.
    stored: its arrays.
    config: the decoder's shape.
    rows: only these rows of a linear weight, which must have its heads in the published order.
    """
    transposed = item.kind == "linear" and not item.bits
    arrays = [torch.from_numpy((a[:, rows] if transposed else a[rows]).copy()) for a in stored]
    if item.kind == "vector":
        tensor = arrays[0]
    elif item.bits:
        codes, scales, *zeros = arrays
        zero = unpack_zeros(zeros[0], bits=item.bits, blocks=codes.shape[1]) if zeros else None
        inputs = item.shape[1]
        tensor = dequantize_blocks(codes, scales, bits=item.bits, inputs=inputs, zeros=zero)
    else:
        tensor = arrays[0].float().t()
    if not item.heads:
        return tensor
    order = inverse_order(head_order(config, item.heads))
    return reordered(tensor, order, axis=1 if item.heads == "columns" else 0)
