"""Captions batches of table rows: a class for Ray Data's map_batches, or for any such framework."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seechat_lite.captions.run import Caption
from seechat_lite.generation import Generation
from seechat_lite.loading import load
from seechat_weights.errors import OptionError


class CaptionBatches:
    """Holds a model, and describes the pictures of one batch after the other.

    The framework makes one object in each of its processes (in Ray Data: an actor) and calls it.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        column: str = "image",
        prompt: str | None = None,
        language: str = "zh",
        batch: int = 8,
        generation: Generation | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the model.

        model: the path of a bundle that every process can read; None for the built-in model.
        column: the column of pictures: bytes, `datasets`' struct of bytes and path, or pixels.
        prompt, language, batch, generation: as for Model.caption.
        loading: other arguments of load(), such as threads.

        Raises the errors of load().
        """
        options: dict[str, Any] = {"image_cache": 0} | dict(loading or {})
        self._model = load(model, **options)
        self._column = column
        self._asking: dict[str, Any] = {"prompt": prompt, "language": language, "batch": batch}
        self._asking |= {"generation": generation}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put captions into the place of the pictures.

        batch: columns by name, [rows] each; pixels [rows, height, width, 3].

        Returns the other columns and caption, error, sha256 and finish_reason, each text or None.

        Raises OptionError if there is no such column, and the errors of Model.caption. A picture
        that cannot be read has an error in its row instead.
        """
        if self._column not in batch:
            raise OptionError(
                f"columns {', '.join(batch)[:200]}; expected {self._column!r} among them: name the "
                "column that holds pictures",
                options={"column": None},
            )
        others = {name: values for name, values in batch.items() if name != self._column}
        pictures = map(_picture, batch[self._column])
        found = list(self._model.caption(pictures, **self._asking))
        return others | {
            "caption": _texts(caption.text for caption in found),
            "error": _texts(_error(caption) for caption in found),
            "sha256": _texts(caption.sha256 for caption in found),
            "finish_reason": _texts(caption.finish_reason for caption in found),
        }

    def close(self) -> None:
        """Free the model. A process that ends does this too."""
        self._model.close()


def _picture(value: Any) -> Any:
    """A picture as Model.caption takes it; no bytes at all are an error there."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return b"" if value is None else value


def _error(caption: Caption) -> str | None:
    return None if caption.error is None else str(caption.error)


def _texts(values: Iterator[str | None]) -> np.ndarray:
    return np.array(list(values), dtype=object)  # [rows]
