"""Chooses the next token from logits: greedy, or sampled with an explicitly seeded generator.

The order is Hugging Face's, which the published models use: repetition penalty, temperature, top-k,
top-p and softmax.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from seechat_lite.generation import Sampling
from seechat_weights.errors import EngineError


def scores(logits: np.ndarray, past_ids: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Logits after the repetition penalty, float32 [vocab].

    Greedy chooses their maximum.

    logits: float [vocab].
    past_ids: int [any], ids of the prompt and the answer so far, in any order; may repeat.
    sampling: the options.

    Raises EngineError if the logits are NaN or infinite (tokens masked by -inf are fine).
    """
    out = np.array(logits, np.float32)
    if sampling.repetition_penalty != 1 and len(past_ids):
        past = out[past_ids]
        penalty = np.float32(sampling.repetition_penalty)
        out[past_ids] = np.where(past < 0, past * penalty, past / penalty)
    if not np.isfinite(out.max()):  # the maximum shows both NaN and +inf
        raise EngineError(
            "the engine returned NaN or infinite logits; expected finite numbers: the weights are "
            "damaged or the precision overflows, try another engine, device or precision"
        )
    return out


def candidates(scored: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top-k and top-p leave, and their probabilities.

    scored: float32 [vocab], from scores().
    sampling: the options.

    Returns ids, int64 [n], ascending, and their probabilities, float32 [n], which sum to 1.
    """
    scaled = scored / np.float32(sampling.temperature)
    lowest = -np.inf
    if 0 < sampling.top_k < len(scaled):
        lowest = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
    ids = np.flatnonzero((scaled >= lowest) & (scaled > -np.inf))
    probabilities = _softmax(scaled[ids])
    if sampling.top_p < 1:
        # the least likely tokens are dropped while they sum up to `drop`; those below half of
        # drop / n never reach it, so most of a vocabulary need not be sorted
        drop = np.float32(1 - sampling.top_p)
        likely = probabilities > drop / len(ids) / 2
        unlikely = probabilities[~likely].sum(dtype=np.float64)
        likely = np.flatnonzero(likely)
        # ascending, equal ones from high to low id: as greedy does, ties prefer the lowest id
        order = likely[np.argsort(-scaled[ids[likely]], kind="stable")[::-1]]
        # accumulated in double and compared in single precision, as torch does
        reached = unlikely + np.cumsum(probabilities[order], dtype=np.float64)
        keep = reached.astype(np.float32) > drop
        keep[-1] = True
        ids = np.sort(ids[order[keep]])
        probabilities = _softmax(scaled[ids])
    return ids, probabilities


class Constraint(Protocol):
    """Says which tokens may come next in one answer."""

    finished: bool  # nothing may follow but the end

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, bool [vocab]; with the one that ends the answer if it may
        end."""
        ...

    def accept(self, token: int) -> None:
        """Note the next token.

        token: one that is allowed, and does not end the answer.
        """
        ...


class Sampler:
    """Chooses the tokens of one answer.

    sampling: the options.
    prompt_ids: the prompt's ids; the repetition penalty counts them as said.
    eos_ids: the tokens that end an answer.
    constraint: leaves only tokens that it allows.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        *,
        eos_ids: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._eos_ids = tuple(eos_ids)
        self._random = np.random.default_rng(sampling.seed)
        # not numpy's unique, whose C++ ends the process if the interpreter exits meanwhile
        self._past = np.array(sorted(set(map(int, prompt_ids))), np.int64)

    def next(self, logits: np.ndarray) -> int:
        """Choose the next token and remember the choice.

        logits: float [vocab].

        Raises EngineError, see scores(), and the errors of the constraint.
        """
        scored = scores(logits, self._past, self._sampling)
        if self._constraint:
            scored[~self._constraint.allowed()] = -np.inf
        if scored.max() == -np.inf:  # nothing that is allowed can come
            token = self._eos_ids[0]
        elif self._sampling.temperature == 0:
            token = int(scored.argmax())
        else:
            ids, probabilities = candidates(scored, self._sampling)
            reached = np.cumsum(probabilities, dtype=np.float64)
            chosen = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
            token = int(ids[min(chosen, len(ids) - 1)])
        if self._constraint and token not in self._eos_ids:
            self._constraint.accept(token)
        where = np.searchsorted(self._past, token)
        if where == len(self._past) or self._past[where] != token:
            self._past = np.insert(self._past, where, token)
        return token


def _softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max())
    return exp / exp.sum()
