"""Weights as a precision stores them: rearranged, transposed, or in blocks of 8 or 4 bits.

The block layout is that of ONNX Runtime's MatMulNBits: every run of `block_size` inputs of an
output row shares one scale; a weight is scale * (q - 2**(bits-1)); two 4-bit values share a byte,
the earlier one in the low nibble; inputs are padded with zeros to whole blocks.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from seechat_weights.bundle import LMConfig
from seechat_weights.layout import Item
from seechat_weights.precisions import Precision
from seechat_weights.quantized import Quantized

ALL = slice(None)
CHUNK = 1 << 17  # weights quantized at a time: their copies stay in a core's second-level cache

# Scales tried for each block, as fractions of the one that maps the largest weight to the end of
# the range that has one more step. Less clips the largest weights and gives all others finer steps;
# more can meet the other weights better; below zero, the largest weight goes to the other end.
FRACTIONS = {
    8: (1.003, 1.0015, 1.0, 0.997, 0.993),
    4: tuple(1.07 - 0.035 * i for i in range(11)) + tuple(-1.14 + 0.06 * i for i in range(6)),
}


def rearrange_heads(tensor: Tensor, config: LMConfig, axis: str) -> Tensor:
    """An attention tensor in the graph's order of heads (see graphs.py).

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


def quantize_blocks(weight: Tensor, *, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric weight-only quantization of [outputs, inputs].

    Returns the packed values, uint8 [outputs, blocks, block_size * bits / 8], and the scales,
    float32 [outputs, blocks]. Each block takes the scale of least squared error that FRACTIONS lead
    to. A few rows at a time, so that what is computed stays in the processor's cache and the
    full model's weights need no float32 copy; each core works on rows of its own, because threads
    that meet after every small operation lose most of their time on a busy machine.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // block_size)
    codes = torch.empty((outputs, blocks, block_size * bits // 8), dtype=torch.uint8)
    scales = torch.empty((outputs, blocks))
    rows = max(1, CHUNK // inputs)

    def quantize(i: int) -> None:
        chunk = F.pad(weight[i : i + rows].float(), (0, -inputs % block_size))
        codes[i : i + rows], scales[i : i + rows] = _quantize_chunk(
            chunk.unflatten(1, (-1, block_size)), bits
        )

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        deque(pool.map(quantize, range(0, outputs, rows)), maxlen=0)
    torch.set_num_threads(threads)
    return codes, scales


def _quantize_chunk(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of whole blocks, float32 [rows, blocks, block_size]."""
    middle = 2 ** (bits - 1)
    full = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -middle
    full = torch.where(full == 0, 1, full)
    best, most = full, torch.zeros_like(full)
    for fraction in FRACTIONS[bits]:
        values = (blocks / (full * fraction)).round_().clamp_(-middle, middle - 1)
        # weights w as these values q: the best scale is wq / qq, its squared error ww - wq² / qq
        wq = (values * blocks).sum(-1, keepdim=True)
        scale = wq / values.square_().sum(-1, keepdim=True).clamp_min_(1)
        gain = wq * scale
        better = gain > most
        best, most = torch.where(better, scale, best), torch.where(better, gain, most)
    codes = (blocks / best).round_().clamp_(-middle, middle - 1).add_(middle).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, best.squeeze(-1)


def _published_blocks(
    item: Item, weight: Quantized, config: LMConfig, block_size: int
) -> list[Tensor]:
    """What quantize_blocks gives, from published integers and their rows' scales, nothing lost."""
    bits = item.bits
    codes, scales = torch.from_numpy(weight.codes), torch.from_numpy(weight.scales)
    if item.heads:
        codes = rearrange_heads(codes, config, item.heads)
    if item.heads == "rows":
        scales = rearrange_heads(scales, config, "rows")
    outputs, inputs = codes.shape
    blocks = -(-inputs // block_size)
    stored = torch.empty((outputs, blocks, block_size * bits // 8), dtype=torch.uint8)
    rows = max(1, CHUNK // inputs)
    for i in range(0, outputs, rows):
        padded = F.pad(codes[i : i + rows], (0, -inputs % block_size))
        values = padded.view(torch.uint8) + 2 ** (bits - 1)  # wraps: -1 is 255
        values = values.unflatten(1, (-1, block_size))
        stored[i : i + rows] = values[..., 0::2] | values[..., 1::2] << 4 if bits == 4 else values
    return [stored, scales[:, None].expand(outputs, blocks)]


def dequantize_blocks(codes: Tensor, scales: Tensor, *, bits: int, inputs: int) -> Tensor:
    """The weight [outputs, inputs], float32, that quantize_blocks stored: its inverse."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    values = codes.float().sub_(2 ** (bits - 1)).mul_(scales[..., None])
    return values.flatten(1)[:, :inputs]


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
