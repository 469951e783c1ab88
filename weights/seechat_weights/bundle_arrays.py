"""A bundle's arrays where they lie: what both engines, the check of an export and tools map."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from seechat_weights.bundle import Manifest
from seechat_weights.errors import BundleError
from seechat_weights.layout import Item, decoder_layout
from seechat_weights.precisions import stored_precision
from seechat_weights.untrusted import open_file


@dataclass(frozen=True)
class BundleArrays:
    """The embeddings, the prefix and the decoder's weights of the bundle in `folder`."""

    folder: Path
    manifest: Manifest

    @cached_property
    def embeddings(self) -> np.ndarray:
        """The mapped table [vocab, hidden], in the type it is stored in."""
        lm, decoder = self.manifest.lm, self.manifest.decoder
        shape = (lm.vocab_size, lm.hidden_size)
        with open_file(self.folder / decoder.embeddings) as f:
            return np.memmap(f, decoder.embeddings_dtype, "r", shape=shape)

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
    def items(self) -> Sequence[Item]:
        """The decoder's tensors in file order."""
        decoder = self.manifest.decoder
        precision = stored_precision(decoder.precision, head_bits=decoder.head_bits)
        return decoder_layout(self.manifest.lm, precision, decoder.block_size)

    def stored(self, item: Item) -> list[np.ndarray]:
        """The mapped arrays of a tensor: private copies, of which nothing reaches the file."""
        return [self._weights[s.offset : s.end].view(s.dtype).reshape(s.shape) for s in item.stored]

    @cached_property
    def _weights(self) -> np.ndarray:
        """The decoder's weights file, uint8. Raises BundleError for one that is too short."""
        path = self.folder / f"{self.manifest.decoder.graph}.data"
        with open_file(path) as f:
            data = np.memmap(f, np.uint8, "c")  # torch wants arrays that could be written
        if data.size < self.items[-1].end:
            raise BundleError(
                f"{path}: {data.size} bytes; expected {self.items[-1].end} for the sizes in "
                "the manifest: export the bundle again"
            )
        return data
