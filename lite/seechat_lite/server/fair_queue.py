"""A bounded queue in which clients take turns: fair queueing by round robin.

Whoever posts sixteen requests at once waits with the second until everybody else's first was
served. A full queue makes room at the cost of the client that has the most waiting, so that nobody
can fill it alone (the rule that is known as longest queue drop).
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """limit: how many items may wait, those of all clients together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()  # those who wait, next one first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def put(self, client: str, item: T) -> T | None:
        """Add an item; if that makes one too many, return the one that has to go, maybe this."""
        self._clients.setdefault(client, deque()).append(item)
        if len(self) <= self._limit:
            return None
        most = max(self._clients, key=lambda c: (len(self._clients[c]), c == client))
        refused = self._clients[most][-1]
        self.remove(most, refused)
        return refused

    def get(self, *, after: str) -> T | None:
        """Take the next item, if there is one; the client `after` was served last."""
        if after in self._clients:
            self._clients.move_to_end(after)
        for client, items in self._clients.items():
            item = items[0]
            self.remove(client, item)
            return item
        return None

    def remove(self, client: str, item: T) -> bool:
        """Take an item out; False if it is not there."""
        items = self._clients.get(client, deque())
        if item not in items:
            return False
        items.remove(item)
        if not items:
            del self._clients[client]
        return True

    def clear(self) -> list[T]:
        """Take all items out."""
        items = [item for items in self._clients.values() for item in items]
        self._clients.clear()
        return items
