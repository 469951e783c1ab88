"""Limits the server's memory that requests take while they are read and answered."""

from collections import Counter

from seechat_lite.server.errors import ApiError


class Budget:
    """The bytes that the requests of all clients may hold, and those of one client.

    One client may take everything except one request's worth, so that nobody keeps everybody else
    out.

    total: bytes for all requests together.
    request: bytes for one request.
    """

    def __init__(self, *, total: int, request: int) -> None:
        self._total = total
        self._share = max(total - request, request)
        self._clients: Counter[str] = Counter()
        self.held = 0

    def open(self, client: str) -> "Held":
        """The part of a new request; it holds nothing yet.

        client: who asks.
        """
        return Held(self, client)

    def _take(self, client: str, size: int) -> None:
        if self.held + size > self._total or self._clients[client] + size > self._share:
            raise ApiError(
                503,
                "too many large requests at once: try again later",
                code="overloaded",
                headers={"Retry-After": "5"},
            )
        self.held += size
        self._clients[client] += size

    def _give_back(self, client: str, size: int) -> None:
        self.held -= size
        self._clients[client] -= size
        if not self._clients[client]:
            del self._clients[client]


class Held:
    """One request's part of a Budget: its body, and the pictures fetched for it."""

    def __init__(self, budget: Budget, client: str) -> None:
        self._budget = budget
        self._client = client
        self._size = 0

    def add(self, size: int) -> None:
        """Hold more bytes.

        size: how many.

        Raises ApiError 503 if that is too much now.
        """
        self._budget._take(self._client, size)
        self._size += size

    def release(self) -> int:
        """Hold nothing any more; returns how many bytes were held."""
        self._budget._give_back(self._client, self._size)
        size, self._size = self._size, 0
        return size
