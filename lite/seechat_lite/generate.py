"""The one decode loop: prefill, then choose a token and step, until something ends the answer."""

import time
from collections.abc import Callable, Iterator, Sequence

from seechat_lite.engines.base import Cancelled, Engine
from seechat_lite.prompt import Prompt
from seechat_lite.prompt_lookup import PromptLookup
from seechat_lite.sampling import Constraint, Sampler, Sampling
from seechat_weights.arguments import check_integer


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
    """Yield the answer's token ids, never the eos.

    The iterator may be closed at any time: the engine's next prefill starts afresh. A call of the
        engine that engine.cancel() ends also ends the answer.

    engine: runs the model.
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
        rows = engine.prefill(prompt)[None]  # [1 + guessed, vocab]
        guess: list[int] = []  # tokens that were run before they were chosen
        while True:
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
                engine.rewind(len(guess) - right)
            guess = lookup.guess(remaining - 1) if lookup else []
            start = time.perf_counter()
            rows = engine.extend([token, *guess]) if guess else engine.step(token)[None]
            if lookup:
                lookup.cost.note(1 + len(guess), time.perf_counter() - start)
    except Cancelled:
        return
