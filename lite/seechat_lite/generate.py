"""The one decode loop: prefill, then choose a token and step, until something ends the answer.

The loop runs in a Seat: it asks for calls of the engine, and is told of their results when it goes
on. So many answers can be written together, each by a loop of its own (see together.Together).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from seechat_lite.engines.base import Cancelled, Engine
from seechat_lite.prompt import Prompt
from seechat_lite.prompt_lookup import PromptLookup
from seechat_lite.sampling import Constraint, Sampler, Sampling
from seechat_weights.arguments import check_integer


class Seat(Protocol):
    """Where one answer is read and written."""

    @property
    def guesses(self) -> bool:
        """Whether several tokens may be run at once."""
        ...

    @property
    def seconds(self) -> float | None:
        """How long the last call took; None if other answers shared it."""
        ...

    @property
    def held_tokens(self) -> int:
        """See Engine."""
        ...

    def prefill(self, prompt: Prompt) -> None:
        """Ask for a prompt to be read.

        prompt: the prompt.
        """
        ...

    def extend(self, token_ids: Sequence[int]) -> None:
        """Ask for tokens to be appended. If the seat takes no guesses now, only the first is.

        token_ids: the tokens.
        """
        ...

    def rows(self) -> np.ndarray | None:
        """The next token's logits after each token that was asked for, float32 [tokens, vocab].

        Of a prompt, only after the last. None if it has not been run yet.

        Raises the errors of the engine, Cancelled too.
        """
        ...

    def rewind(self, tokens: int) -> None:
        """Take back the last tokens.

        tokens: how many.
        """
        ...

    def cancel(self) -> None:
        """End a running call for this answer soon. May be called from any thread."""
        ...

    def reset(self) -> None:
        """Finish the answer, in whatever state it is."""
        ...


class Alone:
    """A Seat that has the engine for itself: what it asks for is run at once.

    engine: the engine.
    """

    guesses = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: np.ndarray | None = None
        self.seconds: float | None = None

    @property
    def held_tokens(self) -> int:
        """See Engine."""
        return self._engine.held_tokens

    def prefill(self, prompt: Prompt) -> None:
        """See Seat.

        prompt: the prompt.
        """
        self._rows = self._engine.prefill(prompt)[None]

    def extend(self, token_ids: Sequence[int]) -> None:
        """See Seat.

        token_ids: the tokens.
        """
        start = time.perf_counter()
        if len(token_ids) > 1:
            self._rows = self._engine.extend(token_ids)
        else:
            self._rows = self._engine.step(token_ids[0])[None]
        self.seconds = time.perf_counter() - start

    def rows(self) -> np.ndarray | None:
        """See Seat."""
        return self._rows

    def rewind(self, tokens: int) -> None:
        """See Seat.

        tokens: how many.
        """
        self._engine.rewind(tokens)

    def cancel(self) -> None:
        """See Seat."""
        self._engine.cancel()

    def reset(self) -> None:
        """See Seat."""
        self._rows = None
        self._engine.reset()


def generate(
    engine: Engine,
    prompt: Prompt,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int,
    stopped: Callable[[], bool],
    lookup: PromptLookup | None = None,
    said: Sequence[int] | None = None,
    other_eos: Sequence[int] = (),
    constraint: Constraint | None = None,
) -> Iterator[int]:
    """Yield the token ids of an answer that has the engine for itself, never the eos.

    engine: runs the model.
    prompt, sampling, max_new_tokens, eos_id, stopped, lookup, said, other_eos, constraint: see
        decode().

    Raises the errors of decode().
    """
    tokens = decode(
        Alone(engine),
        prompt,
        sampling,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        stopped=stopped,
        lookup=lookup,
        said=said,
        other_eos=other_eos,
        constraint=constraint,
    )
    return (token for token in tokens if token is not None)


def decode(
    seat: Seat,
    prompt: Prompt,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int,
    stopped: Callable[[], bool],
    lookup: PromptLookup | None = None,
    said: Sequence[int] | None = None,
    other_eos: Sequence[int] = (),
    constraint: Constraint | None = None,
) -> Iterator[int | None]:
    """Yield the answer's token ids, never the eos; and None while the seat has not run a call.

    The iterator may be closed at any time: the seat's next prefill starts afresh. A call of the
        engine that is cancelled also ends the answer.

    seat: where the model runs.
    prompt: the prompt.
    sampling: how tokens are chosen.
    max_new_tokens: the most ids to yield.
    eos_id: the token that ends the answer.
    stopped: asked before and after every call of the engine, so the answer ends within one token
        after it turns true.
    lookup: guesses tokens that are then run together; the answer stays the same.
    said: ids that the repetition penalty counts as said before the answer; None for the prompt's.
    other_eos: further tokens that end it.
    constraint: what the answer may hold; guesses are held to it like any other token.

    Raises OptionError if max_new_tokens is less than 1, EngineError if the logits are not finite
    numbers.
    """
    check_integer("max_new_tokens", max_new_tokens, least=1, expected="at least 1")
    if stopped():
        return
    ends = (eos_id, *other_eos)
    before = prompt.ids if said is None else said
    sampler = Sampler(sampling, before, eos_ids=ends, constraint=constraint)
    remaining = max_new_tokens
    try:
        seat.prefill(prompt)
        asked: list[int] = []  # tokens that are run; those behind the first are guessed
        while True:
            while (rows := seat.rows()) is None:  # rows: [1 + guessed, vocab]
                yield None
                if stopped():
                    return
            if lookup and asked and seat.seconds is not None:
                lookup.cost.note(len(asked), seat.seconds)
            guess = asked[1 : len(rows)]
            # first the logits after the last chosen token, then those after each right guess
            right = 0
            while True:
                if stopped():
                    return
                token = sampler.next(rows[right])
                if token in ends:
                    return
                yield token
                remaining -= 1
                if not remaining or stopped() or (constraint and constraint.finished):
                    return
                if lookup:
                    lookup.append(token)
                if right == len(guess) or token != guess[right]:
                    break
                right += 1
            if guess and lookup:
                lookup.learn(len(guess), right)
                seat.rewind(len(guess) - right)
            guess = lookup.guess(remaining - 1) if lookup and seat.guesses else []
            asked = [token, *guess]
            seat.extend(asked)
    except Cancelled:
        return
