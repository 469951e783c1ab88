"""Checks what a caller passes: a wrong argument is an OptionError that says what is expected."""

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, NoReturn

from seechat_weights.errors import OptionError

MAX_INTEGER = 2**63 - 1


def refuse(name: str, value: object, expected: str, do: str | None = None) -> NoReturn:
    """Raise OptionError for an argument.

    name: the argument.
    value: what was passed.
    expected: what was expected, in words.
    do: what to do; None for the usual advice.
    """
    do = do or "pass that, or leave it out for the default"
    raise OptionError(f"{name} is {_shown(value)}; expected {expected}: {do}", options={name: None})


def check_integer(
    name: str, value: Any, *, least: int = 0, most: int = MAX_INTEGER, expected: str
) -> None:
    """Check that an argument is a whole number; 1.0 is not one.

    name: the argument.
    value: what was passed.
    least, most: the smallest and the largest allowed.
    expected: what was expected, in words.

    Raises OptionError.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        refuse(name, value, expected)


def check_number(
    name: str, value: object, *, least: float = -math.inf, most: float = math.inf, expected: str
) -> None:
    """Check that an argument is a finite number.

    name: the argument.
    value: what was passed.
    least, most: the smallest and the largest allowed.
    expected: what was expected, in words.

    Raises OptionError.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond what a float holds
            number = math.inf
        if math.isfinite(number) and least <= number <= most:
            return
    refuse(name, value, expected)


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Check that an argument is one of some texts.

    name: the argument.
    value: what was passed.
    known: the texts.

    Raises OptionError.
    """
    known = list(known)
    if not (isinstance(value, str) and value in known):
        refuse(name, value, f"one of {', '.join(known)}", "pass one of these names")


def check_type(name: str, value: object, kind: Any, expected: str) -> None:
    """Check the type of an argument.

    name: the argument.
    value: what was passed.
    kind: a type or a union of types.
    expected: what was expected, in words.

    Raises OptionError.
    """
    if not isinstance(value, kind):
        refuse(name, value, expected)


def _shown(value: object) -> str:
    """A value for an error, always short."""
    try:
        text = repr(value)
    except Exception:  # an integer of very many digits, or an object that cannot say what it is
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:79]}…"
