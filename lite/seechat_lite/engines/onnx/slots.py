"""Holds the caches of answers that are written together, for engines.onnx.engine."""

from collections.abc import Sequence

import numpy as np

from seechat_lite.allocation import untouched
from seechat_lite.engines.slots import Rows
from seechat_lite.onnx_runtime import ort


class Slots(Rows):
    """The caches of all slots; their memory is taken while answers are in them.

    names: of the graph's past inputs.
    count: how many slots.
    shape: heads, tokens (those of a prefix included) and head of one cache.
    dtype: of keys and values.
    """

    def __init__(
        self, names: Sequence[str], count: int, shape: tuple[int, int, int], dtype: np.dtype
    ) -> None:
        super().__init__(count, shape[1])
        self._names, self._dtype = names, dtype
        self._shape = (len(names), count, *shape)
        self._buffers: np.ndarray | None = None  # [layers * 2, slots, heads, tokens, head]
        self._bound: dict[int, list[ort.OrtValue]] = {}  # by the number of rows

    def adopt(self, cache: np.ndarray, length: int, position: np.ndarray) -> int:
        """Copy an answer's cache into a free slot; returns the slot.

        cache: [layers * 2, 1, heads, context, head].
        length, position: as for take().

        Raises the errors of take().
        """
        slot = self.take(length, position)
        if self._buffers is None:
            self._buffers = untouched(self._shape, self._dtype)
        self._buffers[:, len(self) - 1, :, :length] = cache[:, 0, :, :length]
        return slot

    def free(self, slot: int) -> None:
        """Let an answer go.

        slot: its number.
        """
        source, target, tokens = self.drop(slot)
        if tokens:
            assert self._buffers is not None
            self._buffers[:, target, :, :tokens] = self._buffers[:, source, :, :tokens]
        if not len(self):
            self._bound.clear()
            self._buffers = None

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind the rows in use as the graph's past and present.

        binding: of the decoder.
        """
        assert self._buffers is not None
        values = self._bound.get(len(self))
        if values is None:
            rows = (buffer[: len(self)] for buffer in self._buffers)
            values = self._bound[len(self)] = [ort.OrtValue.ortvalue_from_numpy(r) for r in rows]
        for name, value in zip(self._names, values, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)
