"""Weights in blocks of 8 or 4 bits, as a bundle stores them.

The layout is that of ONNX Runtime's MatMulNBits: every run of `block_size` inputs of an output row
shares one scale; a weight is scale * (code - 2**(bits-1)); two 4-bit codes share a byte, the
earlier one in the low nibble; inputs are padded with zeros to whole blocks.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

# weights quantized at a time: on the CPU their copies stay in a core's second-level cache; on a GPU
# they are as many as keep it busy, and take 0.1 GB
CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 22

# Scales tried for each block, as fractions of the one that maps the largest weight to the end of
# the range that has one more step. Less clips the largest weights and gives all others finer steps;
# more can meet the other weights better; below zero, the largest weight goes to the other end.
FRACTIONS = {
    8: (1.003, 1.0015, 1.0, 0.997, 0.993),
    4: tuple(1.07 - 0.035 * i for i in range(11)) + tuple(-1.14 + 0.06 * i for i in range(6)),
}


def quantize_blocks(
    weight: Tensor, *, bits: int, block_size: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric weight-only quantization of [outputs, inputs].

    Returns the packed values, uint8 [outputs, blocks, block_size * bits / 8], and the scales,
    float32 [outputs, blocks], on `device`, by default the weight's. Each block takes the scale of
    least squared error that FRACTIONS lead to. A few rows at a time, so that the full model's
    weights need no float32 copy; on the CPU each core works on rows of its own, because threads
    that meet after every small operation lose most of their time on a busy machine.
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


def dequantize_blocks(codes: Tensor, scales: Tensor, *, bits: int, inputs: int) -> Tensor:
    """The weight [outputs, inputs], float32, that quantize_blocks stored: its inverse."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    values = codes.float().sub_(2 ** (bits - 1)).mul_(scales[..., None])
    return values.flatten(1)[:, :inputs]
