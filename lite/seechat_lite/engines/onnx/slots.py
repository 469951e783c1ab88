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
        self._bindings: dict[int, ort.IOBinding] = {}  # by the number of rows

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
            self._bindings.clear()
            self._buffers = None

    def binding(self, decoder: ort.InferenceSession) -> ort.IOBinding:
        """A binding with the rows in use as the graph's past and present.

        decoder: the session.
        """
        assert self._buffers is not None
        count = len(self)
        if count not in self._bindings:
            binding = self._bindings[count] = decoder.io_binding()
            for name, buffer in zip(self._names, self._buffers, strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(buffer[:count])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace("past", "present"), value)
        return self._bindings[count]
