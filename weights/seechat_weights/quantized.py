"""ChatGLM-6B's own quantized checkpoints (int8, int4, int4-qe): what their integers mean.

A linear [outputs, inputs] is stored as `weight`, int8 [outputs, inputs * bits / 8], and
`weight_scale` [outputs]; a weight is its integer times the scale of its row. Of two 4-bit integers
in a byte the earlier one is in the high nibble; both are signed (quantization_kernels.c of
THUDM/chatglm-6b-int4).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quantized:
    """A linear as its authors quantized it: weight = codes * scales[:, None]."""

    codes: np.ndarray  # int8 [outputs, inputs]
    scales: np.ndarray  # float32 [outputs]
    bits: int  # 8 or 4

    def dequantized(self) -> np.ndarray:
        """float32 [outputs, inputs], exact: a product of at most 8 and 11 significant bits."""
        return self.codes.astype(np.float32) * self.scales[:, None]


def unpack(weight: np.ndarray, *, bits: int) -> np.ndarray:
    """Signed integers, int8 [outputs, inputs], of a stored int8 [outputs, inputs * bits / 8]."""
    if bits == 8:
        return weight
    codes = np.empty((*weight.shape[:-1], 2 * weight.shape[-1]), np.int8)
    codes[..., 0::2] = weight >> 4
    codes[..., 1::2] = weight << 4 >> 4  # int8: the shift back copies the sign
    return codes
