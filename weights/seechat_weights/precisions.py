"""The precisions a bundle can be exported at: one frozen row each.

A new precision is a row here, a function in seechat_lite/nn/blocks.py and golden integers in a
test.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """How the LM's linear weights are stored.

    bits: bits of a weight. block: whether a scale is kept for every `block_size` inputs of an
    output row (weight-only quantization); otherwise the weights are stored as `dtype`.
    """

    name: str
    bits: int
    block: bool
    dtype: str  # numpy name of the stored float weights, or of the scales
    head_bits: int = 0  # of lm_head, where an export gives it more than the other weights

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded: float32 weights, and a float32 cache."""
        return self.dtype == "float32" and not self.block


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", 32, block=False, dtype="float32"),
        Precision("fp16", 16, block=False, dtype="float16"),
        Precision("int8", 8, block=True, dtype="float32"),
        Precision("int4", 4, block=True, dtype="float32"),
    )
}

BLOCK_SIZES = (32, 64, 128)
