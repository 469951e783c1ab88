"""Checks of what a caller passes: a wrong argument is an OptionError that says what is expected."""

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, NoReturn

from seechat_weights.errors import OptionError

MAX_INTEGER = 2**63 - 1


def refuse(name: str, value: object, expected: str, do: str | None = None) -> NoReturn:
    """Raise OptionError: the argument `name` is `value`, which is not what is `expected`."""
    do = do or "pass that, or leave it out for the default"
    raise OptionError(f"{name} is {_shown(value)}; expected {expected}: {do}", options={name: None})


def check_integer(
    name: str, value: Any, *, least: int = 0, most: int = MAX_INTEGER, expected: str
) -> None:
    """Raise OptionError unless `value` is a whole number of `least` to `most`; 1.0 is none."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        refuse(name, value, expected)


def check_number(
    name: str, value: object, *, least: float = -math.inf, most: float = math.inf, expected: str
) -> None:
    """Raise OptionError unless `value` is a finite number of `least` to `most`."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond what a float holds
            number = math.inf
        if math.isfinite(number) and least <= number <= most:
            return
    refuse(name, value, expected)


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise OptionError unless `value` is one of the texts that are known."""
    known = list(known)
    if not (isinstance(value, str) and value in known):
        refuse(name, value, f"one of {', '.join(known)}", "pass one of these names")


def check_type(name: str, value: object, kind: Any, expected: str) -> None:
    """Raise OptionError unless `value` is of this kind, a type or a union of types."""
    if not isinstance(value, kind):
        refuse(name, value, expected)


def _shown(value: object) -> str:
    """A value for an error: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of very many digits, or an object that cannot say what it is
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:79]}…"
