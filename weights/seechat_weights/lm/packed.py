"""Reads linears that GPTQ or AWQ packed: integers in groups, each with a scale and a zero.

A weight is scale * (integer - zero). Eight integers of 4 bits, or four of 8, share an int32:

    GPTQ  qweight [inputs / n, outputs], the first input in the lowest bits; zeros are stored less
          one, except in its second format; g_idx [inputs] is the group of each input
    AWQ   qweight [inputs, outputs / 8], outputs in the order _AWQ

(AutoGPTQ's qlinear and AutoAWQ's packing utilities.) Where groups follow each other, a bundle can
hold the integers as they are. GPTQ's g_idx may order groups otherwise ("act-order"): such a linear
is made into floats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, Shapes
from seechat_weights.lm.quantized import Quantized, pack

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each 4 bits of an int32 belong to
Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Packed:
    """One linear [outputs, inputs] as it is packed.

    module: the start of its tensors' names.
    shape: its own.
    bits: 4 or 8.
    group: inputs that share a scale and a zero.
    awq: whether AWQ packed it, not GPTQ.
    less: what was taken from the zeros when they were stored.
    ordered: whether g_idx may say another group for an input than its place does.
    """

    module: str
    shape: Shape
    bits: int
    group: int
    awq: bool
    less: int
    ordered: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors."""
        kinds = ("qweight", "qzeros", "scales", *(["g_idx"] if self.ordered else []))
        return tuple(f"{self.module}.{kind}" for kind in kinds)

    def kept(self, read: Read) -> bool:
        """Whether a bundle can hold the integers as they are.

        read: reads a published tensor.
        """
        # a zero of 0 that was stored less one reads as one more than the integers can be
        return bool((self._zeros(read) < 1 << self.bits).all()) and self.in_order(read)

    def centred(self, read: Read) -> bool:
        """Whether the middle of the range stands for 0 everywhere.

        read: reads a published tensor.
        """
        return bool((self._zeros(read) == 1 << (self.bits - 1)).all())

    def quantized(self, read: Read) -> Quantized:
        """The integers, where they can be kept.

        read: reads a published tensor.
        """
        middle = 1 << (self.bits - 1)
        codes = (self._codes(read).astype(np.int16) - middle).astype(np.int8)
        zeros = self._zeros(read).astype(np.int16) - middle
        return Quantized(
            pack(codes, bits=self.bits),
            self._scales(read),
            self.bits,
            self.group,
            zeros if zeros.any() else None,
        )

    def dequantized(self, read: Read) -> np.ndarray:
        """The weights, float32 [outputs, inputs].

        read: reads a published tensor.
        """
        group = np.arange(self.shape[1]) // self.group
        if self.ordered:
            group = read(f"{self.module}.g_idx").astype(np.int64)
        scales, zeros = self._scales(read), self._zeros(read)
        weights = self._codes(read).astype(np.float32)
        weights -= zeros[:, group]
        weights *= scales[:, group]
        return weights

    def in_order(self, read: Read) -> bool:
        """Whether groups follow each other, so that the place of an input says its group.

        read: reads a published tensor.
        """
        if not self.ordered:
            return True
        expected = np.arange(self.shape[1]) // self.group
        return bool((read(f"{self.module}.g_idx") == expected).all())

    def _scales(self, read: Read) -> np.ndarray:
        """Float32 [outputs, groups]."""
        return read(f"{self.module}.scales").astype(np.float32).T

    def _zeros(self, read: Read) -> np.ndarray:
        """Float32 [outputs, groups]."""
        stored = self._along_outputs(read(f"{self.module}.qzeros"))
        return (stored.astype(np.float32) + self.less).T

    def _codes(self, read: Read) -> np.ndarray:
        """The integers, uint8 [outputs, inputs]."""
        stored = read(f"{self.module}.qweight")
        if self.awq:
            return self._along_outputs(stored).T
        parts = _unpacked(stored, self.bits)  # [inputs / n, outputs, n]
        return parts.transpose(1, 0, 2).reshape(self.shape)

    def _along_outputs(self, stored: np.ndarray) -> np.ndarray:
        """Integers that are packed along the last axis, uint8 [n, outputs]."""
        parts = _unpacked(stored, self.bits)
        if self.awq:
            parts = parts[..., np.argsort(_AWQ)]
        return parts.reshape(len(stored), -1)


def find_packed(
    shapes: Shapes, module: str, shape: Shape, settings: Mapping[str, Any], where: str
) -> Packed | None:
    """The linear that is packed under a name; None if it is not.

    shapes: all tensors.
    module: the start of its names.
    shape: [outputs, inputs] that it must have.
    settings: the model's config.json.
    where: the checkpoint's path, for errors.

    Raises CheckpointError for another packing or other sizes.
    """
    if f"{module}.qweight" not in shapes:
        return None
    (outputs, inputs), found = shape, {}
    for kind in ("qweight", "qzeros", "scales"):
        found[kind] = tuple(shapes.get(f"{module}.{kind}", ((), ""))[0])
    groups = found["scales"][0] if len(found["scales"]) == 2 else 0
    awq = found["qweight"] == (inputs, outputs // 8) and outputs % 8 == 0
    bits = 4
    if not awq and len(found["qweight"]) == 2:
        bits = found["qweight"][0] * 32 // inputs
    each = 32 // bits if bits in (4, 8) else 0
    sound = bool(each and groups and inputs % groups == 0 and outputs % each == 0)
    if sound:
        expected = {
            "qweight": (inputs, outputs // 8) if awq else (inputs // each, outputs),
            "qzeros": (groups, outputs // each),
            "scales": (groups, outputs),
        }
        kinds = {"qweight": ("int32",), "qzeros": ("int32",), "scales": ("float16", "float32")}
        types = {kind: shapes.get(f"{module}.{kind}", ((), ""))[1] for kind in expected}
        sound = found == expected and all(types[k] in kinds[k] for k in expected)
    ordered = f"{module}.g_idx" in shapes
    if ordered:
        size, kind = shapes[f"{module}.g_idx"]
        sound = sound and tuple(size) == (inputs,) and kind in ("int32", "int64")
    if not sound:
        raise CheckpointError(
            f"{where}: {module}.qweight is {list(found['qweight'])} with scales "
            f"{list(found['scales'])}; expected integers of 4 or 8 bits for [{outputs}, {inputs}] "
            "as GPTQ or AWQ pack them: name the checkpoint that they were made from"
        )
    said = settings.get("quantization_config")
    second = isinstance(said, dict) and said.get("checkpoint_format") == "gptq_v2"
    less = 0 if awq or second else 1
    return Packed(module, shape, bits, inputs // groups, awq, less, ordered)


def _unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """The integers of int32s on an axis of their own behind the others, uint8."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    parts = stored.view(np.uint32)[..., None] >> shifts
    return (parts & ((1 << bits) - 1)).astype(np.uint8)
