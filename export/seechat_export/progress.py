"""Shows progress bars for long work: one a stage, on stderr, silent if that is not a terminal."""

from types import TracebackType
from typing import Self

from tqdm import tqdm

BYTES = ("weights", "embeddings", "hash")  # stages that count bytes; the others count steps
FORMAT = "{percentage:3.0f}% {bar:30} {n_fmt:>5} of {total_fmt:<5} {elapsed}, {remaining} left"


class Bars:
    """Progress bars for export_bundle's `progress`; a context manager that closes the last bar."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._bar is None:
            self._close()
            in_bytes = stage in BYTES
            self._bar = tqdm(
                total=total,
                unit_scale=in_bytes,
                bar_format=f"{stage:<10} {FORMAT}",
                dynamic_ncols=True,
                disable=None,  # off if stderr is not a terminal
                leave=True,
            )
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
