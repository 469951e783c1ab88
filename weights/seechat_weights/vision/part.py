"""Where a parameter of ours lies in a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from seechat_weights.files.accounting import Shape


@dataclass(frozen=True)
class TensorMapping:
    """Where a parameter comes from: published tensors, put together row by row.

    keys: concatenated; None stands for as many zeros as its neighbour has numbers. Of the rows, the
    parameter is share number `share` of `shares` equal ones (q, k or v of a fused tensor). rank:
    the published tensor's, where it lacks leading sizes of 1 that ours has.
    """

    keys: tuple[str | None, ...]
    share: int = 0
    shares: int = 1
    rank: int | None = None

    @property
    def names(self) -> list[str]:
        return [key for key in self.keys if key is not None]

    def published_shape(self, shape: Shape) -> Shape:
        """What each of the published tensors must measure for the parameter to have `shape`."""
        if self.rank is not None:
            return shape[len(shape) - self.rank :]
        return (shape[0] * self.shares // len(self.keys), *shape[1:])

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The parameter, of `shape`; `read` gives a published tensor."""
        arrays = [None if key is None else read(key) for key in self.keys]
        like = next(a for a in arrays if a is not None)
        if len(arrays) > 1:
            like = np.concatenate([np.zeros_like(like) if a is None else a for a in arrays])
        return np.split(like, self.shares)[self.share].reshape(shape)
