"""Records the torch engine's steps as CUDA graphs, one for each number of tokens; replays them."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seechat_lite.engines.torch.decoder import Decoder
from seechat_lite.engines.torch.kernels import KERNEL_ROWS
from seechat_lite.engines.torch.ops import Cache, KernelOps, SlotKernelOps

RECORDING = threading.Lock()  # CUDA records one graph at a time in a process


class Recorder:
    """Records the steps of a decoder over one cache; the graphs go on using the cache's memory.

    All graphs take their memory from one pool, and all are recorded on one stream, for which
    libraries keep their workspace. This is safe because they never run at the same time, and the
    result of a step is read before the next one runs.

    decoder: the network.
    cache: its cache; it must stay where it is.
    vocab_size: width of the logits.
    slots: whether the cache is one of slots; the steps then append a token to each.
    """

    def __init__(
        self, decoder: Decoder, cache: Cache, *, vocab_size: int, slots: bool = False
    ) -> None:
        like = cache.keys[0]
        self._decoder, self._cache, self._slots = decoder, cache, slots
        # logits of steps of any number of tokens, on the device and here
        self._logits = like.new_empty((KERNEL_ROWS, vocab_size), dtype=torch.float32)
        self._answer = torch.empty(self._logits.shape, pin_memory=True)
        self._stream = torch.cuda.Stream(like.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps: dict[int, _Step] = {}  # by the number of tokens that they append

    def has(self, rows: int) -> bool:
        """Whether a step of so many tokens is recorded.

        rows: the number of tokens.
        """
        return rows in self._steps

    def run(self, embeds: Tensor, positions: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """Append tokens; returns their logits, float32 [rows, vocab].

        embeds: [rows, hidden], at most KERNEL_ROWS rows.
        positions: int64 [1 or 2, rows].
        lengths: tokens in the cache before; of slots, one for each.
        """
        rows = len(embeds)
        step = self._steps.get(rows) or _Step(
            self._decoder, self._cache, self._logits[:rows], positions, slots=self._slots
        )
        step.take(embeds, positions, lengths)
        if rows not in self._steps:
            with RECORDING:
                step.record(self._stream, self._pool)
            self._steps[rows] = step
        step.replay()
        self._answer[:rows].copy_(self._logits[:rows])  # this waits: non_blocking is not set
        return self._answer[:rows].numpy().copy()


class _Step:
    """A step of some tokens, with the memory that it reads and writes."""

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        logits: Tensor,
        positions: np.ndarray,
        *,
        slots: bool,
    ) -> None:
        """Prepare.

        logits: float32 [rows, vocab], where the step leaves them.
        positions: as those of every step.
        slots: as for Recorder.
        """
        like, rows = cache.keys[0], len(logits)
        self._decoder, self._cache, self._logits = decoder, cache, logits
        hidden = decoder.final_layernorm.normalized_shape[0]
        self._embeds = like.new_zeros((rows, hidden))
        self._positions = torch.zeros(positions.shape, dtype=torch.int64, device=like.device)
        self._ops = SlotKernelOps if slots else KernelOps
        lengths = rows if slots else 1
        self._lengths = torch.zeros(lengths, dtype=torch.int32, device=like.device)
        self._graph = torch.cuda.CUDAGraph()

    def take(self, embeds: Tensor, positions: np.ndarray, lengths: Sequence[int]) -> None:
        self._embeds.copy_(embeds.to(self._embeds.dtype))
        self._positions.copy_(torch.from_numpy(positions))
        self._lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    def record(self, stream: torch.cuda.Stream, pool: Any) -> None:
        # once without recording: this compiles kernels and allocates what libraries keep. What
        # it writes into the cache, the step itself writes again
        now = torch.cuda.current_stream(stream.device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            self._run()
        now.wait_stream(stream)
        # other threads may use the GPU meanwhile, for another model
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self._run()

    def replay(self) -> None:
        self._graph.replay()

    def _run(self) -> None:
        place = self._ops(self._positions, self._lengths)
        rows = len(self._logits)
        self._logits.copy_(self._decoder(self._embeds, place, self._cache, logit_rows=rows))
