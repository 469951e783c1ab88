"""Quantizes weights to blocks of 8 or 4 bits, as a bundle stores them, and back.

The layout is that of ONNX Runtime's MatMulNBits. Every run of `block_size` inputs of an output row
shares one scale. A weight is scale * (code - zero), where the zero is 2**(bits-1) except in weights
of others that say one for each block. Two 4-bit codes share a byte; the
earlier one is in the low nibble. Zeros pad the inputs to whole blocks.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

# weights quantized at a time: on the CPU their copies stay in a core's second-level cache; on a GPU
# they are enough to keep it busy, and take 0.1 GB
CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 22

# Scales tried for each block, as fractions of the one that maps the largest weight to the end of
# the range with one more step. A smaller one clips the largest weights and gives all others finer
# steps; a larger one can fit them better; a negative one puts the largest at the other end.
FRACTIONS = {
    8: (1.003, 1.0015, 1.0, 0.997, 0.993),
    4: tuple(1.07 - 0.035 * i for i in range(11)) + tuple(-1.14 + 0.06 * i for i in range(6)),
}


def quantize_blocks(
    weight: Tensor, *, bits: int, block_size: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize a weight symmetrically, in blocks.

    Each block takes the scale of least squared error that FRACTIONS lead to. A few rows are done at
    a time, so that the full model's weights need no float32 copy. On the CPU each core works on
    rows of its own: threads that meet after every small operation lose most of their time on a busy
    machine.

    weight: [outputs, inputs].
    bits: 8 or 4.
    block_size: inputs that share a scale.
    device: where the result goes; None for the weight's device.

    Returns the packed values, uint8 [outputs, blocks, block_size * bits / 8], and the scales,
    float32 [outputs, blocks].
    """
    device = device or weight.device
    outputs, inputs = weight.shape
    blocks, width = -(-inputs // block_size), block_size * bits // 8
    codes = torch.empty((outputs, blocks, width), dtype=torch.uint8, device=device)
    scales = torch.empty((outputs, blocks), device=device)
    rows = max(1, (CHUNK if device.type == "cpu" else DEVICE_CHUNK) // inputs)

    def quantize(i: int) -> None:
        chunk = F.pad(weight[i : i + rows].to(device).float(), (0, -inputs % block_size))
        codes[i : i + rows], scales[i : i + rows] = _quantize_chunk(
            chunk.unflatten(1, (-1, block_size)), bits
        )

    if device.type != "cpu":
        for i in range(0, outputs, rows):
            quantize(i)
        return codes, scales
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        deque(pool.map(quantize, range(0, outputs, rows)), maxlen=0)
    torch.set_num_threads(threads)
    return codes, scales


def _quantize_chunk(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of whole blocks, float32 [rows, blocks, block_size]."""
    middle = 2 ** (bits - 1)
    best = block_scales(blocks, bits=bits)
    values = (blocks / best).round_().clamp_(-middle, middle - 1)
    return block_codes(values, bits=bits), best.squeeze(-1)


def block_scales(blocks: Tensor, *, bits: int, weights: Tensor | None = None) -> Tensor:
    """The scale of least squared error for each block, [rows, blocks, 1].

    blocks: float32 [rows, blocks, block_size].
    bits: 8 or 4.
    weights: what the squared error of each place counts, [block_size]; None for the same.
    """
    middle = 2 ** (bits - 1)
    full = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -middle
    full = torch.where(full == 0, 1, full)
    best, most = full, torch.zeros_like(full)
    weighted = blocks if weights is None else blocks * weights
    for fraction in FRACTIONS[bits]:
        values = (blocks / (full * fraction)).round_().clamp_(-middle, middle - 1)
        # weights w as these values q: the best scale is wq / qq, its squared error ww - wq² / qq
        wq = (values * weighted).sum(-1, keepdim=True)
        if weights is None:
            qq = values.square_().sum(-1, keepdim=True).clamp_min_(1)
        else:
            qq = (values.square_() * weights).sum(-1, keepdim=True).clamp_min_(1e-30)
        scale = wq / qq
        gain = wq * scale
        better = gain > most
        best, most = torch.where(better, scale, best), torch.where(better, gain, most)
    return best


def block_codes(values: Tensor, *, bits: int) -> Tensor:
    """Packed codes, uint8 [..., block_size * bits / 8], of rounded values.

    values: whole numbers, [..., block_size].
    bits: 8 or 4.
    """
    codes = (values + 2 ** (bits - 1)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes


def dequantize_blocks(
    codes: Tensor, scales: Tensor, *, bits: int, inputs: int, zeros: Tensor | None = None
) -> Tensor:
    """The weight, float32 [outputs, inputs], from what quantize_blocks returned: its inverse.

    codes: uint8 [outputs, blocks, block_size * bits / 8].
    scales: float32 [outputs, blocks].
    bits: 8 or 4.
    inputs: width of the weight, without padding.
    zeros: uint8 [outputs, blocks], the code for 0; None for the middle of the range.
    """
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    middle = 2 ** (bits - 1) if zeros is None else zeros.float()[..., None]
    values = codes.float().sub_(middle).mul_(scales[..., None])
    return values.flatten(1)[:, :inputs]


def pack_zeros(zeros: Tensor, *, bits: int) -> Tensor:
    """Zeros as a bundle stores them, uint8 [outputs, blocks * bits / 8, rounded up].

    zeros: uint8 [outputs, blocks].
    bits: 8 or 4.
    """
    if bits == 8:
        return zeros
    pairs = F.pad(zeros, (0, zeros.shape[1] % 2))
    return pairs[:, 0::2] | pairs[:, 1::2] << 4


def unpack_zeros(stored: Tensor, *, bits: int, blocks: int) -> Tensor:
    """The inverse of pack_zeros, uint8 [outputs, blocks].

    stored: what it returned.
    bits: 8 or 4.
    blocks: of an output.
    """
    if bits == 8:
        return stored
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)[:, :blocks]
