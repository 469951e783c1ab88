"""Opens a bundle's arrays where they lie. Both engines, the export's check and tools use it."""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np

from seechat_weights.bundle.layout import TensorLayout, decoder_layout
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.bundle.precisions import stored_precision
from seechat_weights.errors import BundleError
from seechat_weights.files.untrusted import open_file


@dataclass(frozen=True)
class BundleArrays:
    """The embeddings, the prefix and the decoder's weights of one bundle.

    folder: the bundle's folder.
    manifest: its manifest, as read_manifest gives it.
    """

    folder: Path
    manifest: Manifest

    @cached_property
    def embeddings(self) -> np.ndarray:
        """The mapped table of word embeddings, [vocab, hidden], in the type it is stored in."""
        lm, decoder = self.manifest.lm, self.manifest.decoder
        shape = (lm.vocab_size, lm.hidden_size)
        with open_file(self.folder / decoder.embeddings) as f:
            return np.memmap(f, decoder.embeddings_dtype, "r", shape=shape)

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Read some rows of the embeddings; returns [tokens, hidden].

        The rows are read and not mapped. If somebody has cut the file short, reading raises an
        error; touching a mapping of that file would end the process.

        ids: token ids, one a row.

        Raises BundleError for a file that was cut short, IndexError for ids beyond the table.
        """
        if not hasattr(os, "pread"):  # on Windows a mapped file cannot be cut short
            return self.embeddings[ids]
        lm, decoder = self.manifest.lm, self.manifest.decoder
        rows = np.empty((len(ids), lm.hidden_size), decoder.embeddings_dtype)
        size = rows.itemsize * lm.hidden_size  # of a row, in bytes
        for row, i in zip(rows, ids, strict=True):
            if not 0 <= i < lm.vocab_size:
                raise IndexError(f"token id {i}: expected 0 to {lm.vocab_size - 1}")
            stored = os.pread(self._table.fileno(), size, int(i) * size)
            if len(stored) != size:
                raise BundleError(
                    f"{self.folder / decoder.embeddings}: shorter than when it was loaded; "
                    f"expected {lm.vocab_size * size} bytes: load the model again, and replace a "
                    "bundle that is in use by renaming, never in place"
                )
            row[:] = np.frombuffer(stored, row.dtype)
        return rows

    @cached_property
    def _table(self) -> FileIO:
        """The embeddings' file; it stays open as long as this object lives."""
        file = open_file(self.folder / self.manifest.decoder.embeddings)
        # Not while the process exits: a daemon thread may be reading.
        weakref.finalize(self, file.close).atexit = False
        return file

    @property
    def prefix(self) -> np.ndarray | None:
        """A P-tuning prefix [layers, 2 (key, value), heads, tokens, padded head], if there is one.

        Heads are in the bundle's order (see layout).
        """
        lm, decoder = self.manifest.lm, self.manifest.decoder
        if not decoder.prefix:
            return None
        shape = (lm.num_layers, 2, lm.num_heads, decoder.prefix_tokens, lm.padded_head_size)
        with open_file(self.folder / decoder.prefix) as f:
            return np.fromfile(f, decoder.embeddings_dtype).reshape(shape)

    @cached_property
    def items(self) -> Sequence[TensorLayout]:
        """The decoder's tensors in file order."""
        decoder = self.manifest.decoder
        precision = stored_precision(
            decoder.precision, head_bits=decoder.head_bits, zeros=decoder.zeros
        )
        return decoder_layout(self.manifest.lm, precision, decoder.block_size)

    def stored(self, item: TensorLayout) -> list[np.ndarray]:
        """The mapped arrays of a tensor. They are private copies: a change never reaches the file.

        item: one of `items`.
        """
        return [self._weights[s.offset : s.end].view(s.dtype).reshape(s.shape) for s in item.stored]

    @cached_property
    def _weights(self) -> np.ndarray:
        """The decoder's weights file, uint8. Raises BundleError if it is too short."""
        path = self.folder / f"{self.manifest.decoder.graph}.data"
        with open_file(path) as f:
            data = np.memmap(f, np.uint8, "c")  # torch wants arrays that could be written
        if data.size < self.items[-1].end:
            raise BundleError(
                f"{path}: {data.size} bytes; expected {self.items[-1].end} for the sizes in "
                "the manifest: export the bundle again"
            )
        return data
