"""Texts of prompts that know whose words they hold, so that nobody's become control tokens."""

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Self


class Names(IntEnum):
    """Which names of special tokens in a text, such as "</s>", become those tokens."""

    NONE = 0  # all are spelled out: what people write is text
    ALL = 1  # what a conversation format writes itself
    SAID = 2  # those that models say and their published code shows: an answer read again


class Text(str):
    """A text of a prompt, a str, with `parts`: it in order, each part with the names in it.

    parts: texts, each with what becomes of names of special tokens in it.
    """

    parts: tuple[tuple[str, Names], ...]

    def __new__(cls, parts: Iterable[tuple[str, Names]]) -> Self:
        parts = tuple(parts)
        text = super().__new__(cls, "".join(part for part, _ in parts))
        text.parts = parts
        return text

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[tuple[str, Names], ...]]]:
        return type(self), (self.parts,)


def split_names(
    parts: Iterable[tuple[str, int]], patterns: Sequence[re.Pattern[str] | None]
) -> list[str]:
    """One text of several parts as text, name, text, name, …, text; names end no part of a text.

    parts: texts, each with a number of Names; False and True are NONE and ALL.
    patterns: for each number a pattern of one group that finds the names in such a part; None finds
        none.
    """
    pieces = [""]
    for text, names in parts:
        pattern = patterns[names]
        first, *rest = pattern.split(text) if pattern else [text]
        pieces[-1] += first
        pieces += rest
    return pieces
