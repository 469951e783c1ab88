"""Holds all options of an answer in one value, from the user's call to the decode loop.

An option is a field here; sampling.py, or the code that uses it, does what it says. The commands
offer the options in HELP; `seechat pipe` and the plugin for `llm` offer them without `stop`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from seechat_weights.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    temperature: divides the logits; 0 always takes the likeliest token, whatever top_p and top_k
        say.
    top_p: sample only from the likeliest tokens that together reach this probability.
    top_k: sample only from this many likeliest tokens (and those tied with the last); 0 for all.
    repetition_penalty: divides the positive and multiplies the negative logits of every token that
        occurred in the prompt or the answer.
    min_new_tokens: the answer has at least this many tokens.
    seed: the same seed gives the same answer.
    invalid_token: None makes logits that are not finite an error. The published chat() instead
        takes token 5 if any logit is not finite, including the -inf of min_new_tokens.

    Raises OptionError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int = 0
    invalid_token: int | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            (
                "temperature",
                self.temperature == 0 or 0.001 <= self.temperature < math.inf,
                "0 (greedy) or at least 0.001",
            ),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (1: no limit)"),
            ("top_k", self.top_k >= 0, "0 (no limit) or a positive whole number"),
            (
                "repetition_penalty",
                0.01 <= self.repetition_penalty <= 100,
                "a number from 0.01 to 100 (1: no penalty)",
            ),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or a positive whole number"),
            ("seed", self.seed >= 0, "0 or a positive whole number"),
        ):
            if not ok:
                raise OptionError(
                    f"{name} is {getattr(self, name)}; expected {expected}: choose such a number"
                )


class GenerationOptions(TypedDict, total=False):
    """The options that Chat.stream() and ask() take by name: fields of Generation."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    speculate: bool


@dataclass(frozen=True)
class Generation(Sampling):
    """All options of one answer, from the user's call to the decode loop.

    max_new_tokens: the most tokens it may have.
    stop: texts that end it, besides the format's own; they are not part of it.
    speculate: guess tokens from what was said before and run them together. This is faster if an
        answer repeats something, and never changes the answer.

    Raises OptionError for a value out of range.
    """

    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    speculate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise OptionError(
                f"max_new_tokens is {self.max_new_tokens}; expected at least 1: allow one token "
                "or more"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise OptionError(f"stop is {self.stop!r:.80}; expected texts: leave empty ones out")
        object.__setattr__(self, "stop", stop)


# one line for people for each option, in the order they are shown
HELP = {
    "max_new_tokens": "tokens of an answer",
    "temperature": "0: always the likeliest",
    "top_p": "choose among the likeliest that together have this probability",
    "top_k": "choose among so many; 0: all",
    "repetition_penalty": "above 1: avoid what was said already",
    "seed": "of what is drawn by chance",
    "stop": "a text that ends the answer",
    "speculate": "guess tokens from what was said before; changes the speed, not the answer",
}
DEFAULTS: dict[str, Any] = {name: getattr(Generation, name) for name in HELP}
