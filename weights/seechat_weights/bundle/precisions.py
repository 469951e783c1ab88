"""Lists the precisions that a bundle's LM and vision network can be exported at, one row each.

A new precision of the LM needs a row here, a function in seechat_lite/nn/block_quantization.py and
golden integers in a test.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Precision:
    """How the LM's linear weights are stored.

    name: what the export's option and the manifest call it.
    bits: bits of one weight.
    block: whether every `block_size` inputs of an output row share a scale (weight-only
        quantization); if not, the weights are stored as `dtype`.
    dtype: the numpy name of the stored float weights, or of the scales.
    tolerance: how far the graph may be from the torch network, in standard deviations of its
        result. fp16 rounds what the cache holds; products of integers round their inputs to 8 bits
        a block.
    head_bits: bits of lm_head, if an export gives it more than the other weights.
    zeros: whether each block has an integer of its own that stands for 0, except in lm_head.
    """

    name: str
    bits: int
    block: bool
    dtype: str  # numpy name of the stored float weights, or of the scales
    tolerance: float
    head_bits: int = 0  # of lm_head, where an export gives it more than the other weights
    zeros: bool = False  # each block has its own integer for 0

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded: weights and cache are float32."""
        return self.dtype == "float32" and not self.block

    @property
    def cache_dtype(self) -> str:
        """The type in which the cache holds keys and values."""
        return "float32" if self.exact else "float16"

    @property
    def widening(self) -> int:
        """How many times its stored size a weight takes on the CPU, which computes in float32."""
        return 2 if self.dtype == "float16" else 1

    @property
    def in_bytes(self) -> bool:
        """Whether some weights are integers of 8 bits."""
        return self.block and 8 in (self.bits, self.head_bits)


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", 32, block=False, dtype="float32", tolerance=2e-3),
        Precision("fp16", 16, block=False, dtype="float16", tolerance=1e-2),
        Precision("int8", 8, block=True, dtype="float32", tolerance=0.5),
        Precision("int4", 4, block=True, dtype="float32", tolerance=0.5),
    )
}

DTYPES = ("fp16", "bf16", "fp32")  # what engines compute with
# quantize float weights while they are loaded: see engines.torch.linears
QUANTIZATIONS = ("int4", "nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128)


def stored_precision(name: str, *, head_bits: int, zeros: bool = False) -> Precision:
    """The precision of a bundle's decoder.

    name: the manifest's name for it.
    head_bits: the manifest's bits of lm_head.
    zeros: whether, by the manifest, each block has its own integer for 0.
    """
    return replace(PRECISIONS[name], head_bits=head_bits, zeros=zeros)


def smaller_precisions(name: str) -> list[Precision]:
    """The precisions that take less memory than `name`, the next smaller one first."""
    rows = list(PRECISIONS.values())
    return rows[rows.index(PRECISIONS[name]) + 1 :]


@dataclass(frozen=True)
class VisionPrecision:
    """How the matrices of a vision network are stored. Everything else is float32.

    bits: bits of one number, with its share of the block's scale.
    integers: whether the matrices are integers in blocks; the runtime prepares those for its
        kernels and cannot run them as written.
    tolerance: see Precision.
    """

    name: str
    bits: int
    tolerance: float
    integers: bool = False

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.name == "fp32"

    @property
    def widening(self) -> int:
        """See Precision: float16 becomes float32, integers become codes and sums for kernels."""
        return 1 if self.exact else 2


VISION_PRECISIONS: dict[str, VisionPrecision] = {
    p.name: p
    for p in (
        VisionPrecision("fp32", 32, tolerance=2e-3),
        VisionPrecision("fp16", 16, tolerance=5e-2),
        VisionPrecision("int8", 9, tolerance=0.5, integers=True),
    )
}
