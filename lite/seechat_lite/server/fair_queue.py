"""A bounded queue in which clients take turns: fair queueing by round robin.

A client that posts sixteen requests at once waits with the second until everybody else's first is
served. A full queue drops an item of the client that has the most waiting, so that nobody can fill
it alone (the rule known as longest queue drop).
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue of items, each of a client.

    limit: how many items of all clients may wait together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # clients that wait, the next one first
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def put(self, client: str, item: T) -> T | None:
        """Add an item; if that is one too many, return the one that must go, maybe this one.

        client: whose it is.
        item: the item.
        """
        self._clients.setdefault(client, deque()).append(item)
        if len(self) <= self._limit:
            return None
        most = max(self._clients, key=lambda c: (len(self._clients[c]), c == client))
        refused = self._clients[most][-1]
        self.remove(most, refused)
        return refused

    def get(self, *, after: str) -> T | None:
        """Take the next item; None if there is none.

        after: the client that was served last.
        """
        if after in self._clients:
            self._clients.move_to_end(after)
        for client, items in self._clients.items():
            item = items[0]
            self.remove(client, item)
            return item
        return None

    def remove(self, client: str, item: T) -> bool:
        """Take an item out; False if it is not there.

        client: whose it is.
        item: the item.
        """
        items = self._clients.get(client, deque())
        if item not in items:
            return False
        items.remove(item)
        if not items:
            del self._clients[client]
        return True

    def clear(self) -> list[T]:
        """Take all items out and return them."""
        items = [item for items in self._clients.values() for item in items]
        self._clients.clear()
        return items
