"""Holds linears as their authors quantized them; decodes those of ChatGLM-6B (int8, int4, int4-qe).

A linear [outputs, inputs] is stored as `weight`, int8 [outputs, inputs * bits / 8], and
`weight_scale` [outputs]. A weight is its integer times the scale of its row. A byte holds two 4-bit
integers; the earlier one is in the high nibble, and both are signed (quantization_kernels.c of
THUDM/chatglm-6b-int4).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quantized:
    """A linear as its authors quantized it: each integer times the scale of its row or group."""

    stored: np.ndarray  # int8 [outputs, inputs * bits / 8]; may be a view of the mapped file
    scales: np.ndarray  # float32 [outputs], or [outputs, groups]
    bits: int  # 8 or 4
    group: int = 0  # inputs that share a scale; 0: all of a row
    zeros: np.ndarray | None = None  # int16 [outputs, groups], the integers for 0; None: they are 0

    @property
    def codes(self) -> np.ndarray:
        """The signed integers, int8 [outputs, inputs]."""
        return unpack(self.stored, bits=self.bits)

    def dequantized(self) -> np.ndarray:
        """The weights, float32 [outputs, inputs]; exact, as products of at most 8 and 11 bits."""
        codes = self.codes.astype(np.float32)
        if self.zeros is not None:
            codes -= self.zeros.repeat(self.group, axis=1)[:, : codes.shape[1]]
        if self.group:
            return codes * self.scales.repeat(self.group, axis=1)[:, : codes.shape[1]]
        return codes * self.scales[:, None]

    def block_scales(self, block_size: int) -> np.ndarray:
        """The scale of each block, float32 [outputs, 1] or [outputs, blocks].

        block_size: integers in a block; a group must be a whole number of blocks.
        """
        if not self.group:
            return self.scales[:, None]
        return self.scales.repeat(self.group // block_size, axis=1)

    def block_zeros(self, block_size: int) -> np.ndarray:
        """What stands for 0 in each block, as `blocks` gives integers: uint8 [outputs, blocks].

        block_size: integers in a block; a group must be a whole number of blocks.
        """
        middle = 1 << (self.bits - 1)
        if self.zeros is None:
            blocks = self.codes.shape[1] // block_size
            return np.full((len(self.stored), blocks), middle, np.uint8)
        return (self.zeros + middle).astype(np.uint8).repeat(self.group // block_size, axis=1)

    def blocks(self, block_size: int) -> np.ndarray:
        """The integers as a bundle holds them: uint8 [outputs, blocks, block_size * bits / 8].

        There, half its range is added to each integer, which flips its sign bit. The earlier
        integer of a byte is in the low nibble. Zeros fill the last block.

        block_size: integers in a block.
        """
        stored, size = self.stored.view(np.uint8), block_size * self.bits // 8
        outputs, width = stored.shape
        packed = np.zeros((outputs, -(-width // size) * size), np.uint8)
        packed[:, :width] = stored
        if self.bits == 4:
            halves = packed >> 4
            packed <<= 4
            packed |= halves
        packed ^= 0x80 if self.bits == 8 else 0x88
        return packed.reshape(outputs, -1, size)


def unpack(stored: np.ndarray, *, bits: int) -> np.ndarray:
    """Signed integers, int8 [outputs, inputs].

    stored: int8 [outputs, inputs * bits / 8].
    bits: 8 or 4.
    """
    if bits == 8:
        return stored
    codes = np.empty((*stored.shape[:-1], 2 * stored.shape[-1]), np.int8)
    codes[..., 0::2] = stored >> 4
    codes[..., 1::2] = stored << 4 >> 4  # int8: the shift back extends the sign
    return codes


def pack(codes: np.ndarray, *, bits: int) -> np.ndarray:
    """The inverse of `unpack`.

    codes: signed integers, int8 [outputs, inputs].
    bits: 8 or 4.
    """
    return codes if bits == 8 else codes[..., 0::2] << 4 | codes[..., 1::2] & 15
