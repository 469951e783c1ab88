"""Keeps account of the slots of an engine: which answer is in which row of its caches.

The caches of all slots are one buffer, with a row for each. A step runs the first rows, so the rows
in use are always the first: when an answer leaves, the last one moves into its row. That costs less
than running an empty row once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from seechat_lite.engines.base import check_room
from seechat_weights.errors import EngineError


@dataclass
class Row:
    """The answer in one row.

    slot: its number.
    length: tokens in the cache, those of a prefix included.
    position: of the token that comes next, int64 [rows of positions, 1].
    """

    slot: int
    length: int
    position: np.ndarray


class Rows:
    """The rows in use.

    count: slots.
    capacity: tokens that each has room for, those of a prefix included.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._count, self.capacity = count, capacity
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def used(self) -> list[int]:
        """The slots in use, in the order of their rows."""
        return [row.slot for row in self._rows]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row in use holds."""
        return [row.length for row in self._rows]

    @property
    def positions(self) -> np.ndarray:
        """The positions of the tokens that come next, int64 [rows of positions, rows in use]."""
        return np.concatenate([row.position for row in self._rows], axis=1)

    def take(self, length: int, position: np.ndarray) -> int:
        """Take the next row for an answer; returns its slot.

        length: tokens of it in the cache.
        position: of its next token, int64 [rows of positions, 1].

        Raises EngineError if no slot is free, ContextError if it is too long for one.
        """
        check_room(length, self.capacity, self.capacity)
        free = set(range(self._count)) - set(self.used)
        if not free:
            raise EngineError(
                f"{self._count} answers are in slots; expected fewer: free a slot first"
            )
        self._rows.append(Row(min(free), length, position.copy()))
        return self._rows[-1].slot

    def drop(self, slot: int) -> tuple[int, int, int]:
        """Let an answer go.

        slot: its number.

        Returns which row is to be copied, to which one, and how many of its tokens; the same row
        twice if none is.
        """
        if slot not in self.used:
            raise EngineError(f"slot {slot} is free; expected one of {self.used}: free it once")
        place, end = self.used.index(slot), len(self._rows) - 1
        self._rows[place] = self._rows[end]
        self._rows.pop()
        return end, place, self._rows[place].length if place < end else 0

    def tokens(self, token_ids: Mapping[int, int]) -> list[int]:
        """The tokens of a step in the order of the rows.

        token_ids: by slot.

        Raises EngineError unless every slot in use has one, ContextError if one is full.
        """
        if set(self.used) != set(token_ids) or not token_ids:
            raise EngineError(
                f"tokens for the slots {sorted(token_ids)}; {sorted(self.used)} are in use: give "
                "each of these a token, or free it"
            )
        for row in self._rows:
            check_room(1, self.capacity - row.length, self.capacity)
        return [token_ids[slot] for slot in self.used]

    def stepped(self) -> None:
        """Note that every row got a token."""
        for row in self._rows:
            row.length += 1
            row.position[-1] += 1
