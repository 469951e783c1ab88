"""Holds all options of an answer in one value, from the user's call to the decode loop.

An option is a field here; sampling.py, or the code that uses it, does what it says. The commands
offer the options in HELP; `seechat pipe` offers them without `stop`, and so does the plugin for
`llm`, which has an option of its own for schemas.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from seechat_weights.arguments import check_integer, check_number, check_type, refuse

TINY = sys.float_info.min


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    temperature: divides the logits; 0 always takes the likeliest token, whatever top_p and top_k
        say.
    top_p: sample only from the likeliest tokens that together reach this probability.
    top_k: sample only from this many likeliest tokens (and those tied with the last); 0 for all.
    repetition_penalty: divides the positive and multiplies the negative logits of every token that
        occurred in the prompt or the answer.
    seed: the same seed gives the same answer.

    Raises OptionError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        heat = "0 (greedy) or at least 0.001"
        check_number("temperature", self.temperature, least=0, expected=heat)
        if 0 < self.temperature < 0.001:
            refuse("temperature", self.temperature, heat)
        one = "more than 0 and at most 1 (1: no limit)"
        check_number("top_p", self.top_p, least=TINY, most=1, expected=one)
        check_integer("top_k", self.top_k, expected="0 (no limit) or a positive whole number")
        check_number(
            "repetition_penalty",
            self.repetition_penalty,
            least=0.01,
            most=100,
            expected="a number from 0.01 to 100 (1: no penalty)",
        )
        check_integer("seed", self.seed, expected="0 or a positive whole number")


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
    schema: Mapping[str, Any] | None


@dataclass(frozen=True)
class Generation(Sampling):
    """All options of one answer, from the user's call to the decode loop.

    max_new_tokens: the most tokens it may have.
    stop: texts that end it, besides the format's own; they are not part of it.
    speculate: guess tokens from what was said before and run them together. This is faster if an
        answer repeats something, and never changes the answer.
    schema: a JSON schema that the answer satisfies unless it is cut short; {"type": "object"} for
        any JSON object. It needs the extra `schema`.

    Raises OptionError for a value out of range.
    """

    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    speculate: bool = True
    schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(
            "max_new_tokens", self.max_new_tokens, least=1, expected="at least 1, a whole number"
        )
        check_type("speculate", self.speculate, bool, "True or False")
        check_type("schema", self.schema, Mapping | None, "a JSON schema, an object")
        check_type("stop", self.stop, Sequence, "a text or several")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            refuse("stop", self.stop, "texts", "leave empty ones out")
        object.__setattr__(self, "stop", stop)


# one line for people for each option, in the order they are shown
HELP = {
    "max_new_tokens": "most tokens that an answer may have",
    "temperature": "0 takes the likeliest token each time, more varies the answers",
    "top_p": "draw only from the likeliest tokens that together have this probability; 1: from all",
    "top_k": "draw only from this many of the likeliest tokens; 0: from all",
    "repetition_penalty": "above 1: avoid tokens that were read or said already",
    "seed": "answers that are drawn with the same number are the same",
    "stop": "end the answer before this text",
    "speculate": "guess tokens from what was said before; changes the speed, not the answer",
    "schema": "the answer is JSON of this JSON schema: a file, or the schema itself",
}
DEFAULTS: dict[str, Any] = {name: getattr(Generation, name) for name in HELP}
