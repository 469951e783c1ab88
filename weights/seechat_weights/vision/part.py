"""Describes where one of our parameters lies in a checkpoint, and a part of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from seechat_weights.files.accounting import Shape, Shapes


class Tensors(Protocol):
    """What a reader of weights needs of a checkpoint, or of several taken for one."""

    @property
    def shapes(self) -> Shapes: ...
    def read(self, key: str) -> np.ndarray: ...
    def source(self, key: str) -> Path: ...


class Section:
    """The tensors of a checkpoint whose names begin with a prefix, without that prefix.

    whole: the checkpoint.
    prefix: the prefix.
    """

    def __init__(self, whole: Tensors, prefix: str) -> None:
        self._whole, self._prefix = whole, prefix
        found = whole.shapes.items()
        self.shapes = {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}

    def read(self, key: str) -> np.ndarray:
        """Read one tensor as stored. Raises CheckpointError.

        key: its name without the prefix.
        """
        return self._whole.read(self._prefix + key)

    def source(self, key: str) -> Path:
        """The file that holds a tensor.

        key: its name without the prefix.
        """
        return self._whole.source(self._prefix + key)


@dataclass(frozen=True)
class TensorMapping:
    """Where a parameter comes from: published tensors, concatenated along their rows.

    keys: the tensors; None stands for as many zeros as its neighbour has numbers.
    share: which of `shares` equal parts of the rows the parameter is (q, k or v of a fused tensor).
    shares: how many such parts there are.
    rank: rank of the published tensor, if it lacks leading sizes of 1 that ours has.
    """

    keys: tuple[str | None, ...]
    share: int = 0
    shares: int = 1
    rank: int | None = None

    @property
    def names(self) -> list[str]:
        """The published tensors, without None."""
        return [key for key in self.keys if key is not None]

    def published_shape(self, shape: Shape) -> Shape:
        """What each of the published tensors must measure.

        shape: of our parameter.
        """
        if self.rank is not None:
            return shape[len(shape) - self.rank :]
        return (shape[0] * self.shares // len(self.keys), *shape[1:])

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Read the parameter.

        shape: of our parameter.
        read: returns a published tensor by its name.
        """
        arrays = [None if key is None else read(key) for key in self.keys]
        like = next(a for a in arrays if a is not None)
        if len(arrays) > 1:
            like = np.concatenate([np.zeros_like(like) if a is None else a for a in arrays])
        return np.split(like, self.shares)[self.share].reshape(shape)


@dataclass(frozen=True)
class Constant(TensorMapping):
    """A parameter that is published nowhere: all of its numbers are `value`."""

    keys: tuple[str | None, ...] = ()
    value: float = 0.0

    def read(self, shape: Shape, read: Callable[[str], np.ndarray]) -> np.ndarray:
        return np.full(shape, self.value, np.float32)
