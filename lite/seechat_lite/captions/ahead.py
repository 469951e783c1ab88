"""Draws things in one thread and prepares them in others, ahead of whoever needs them."""

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Drawn = TypeVar("Drawn")
Ready = TypeVar("Ready")

THREADS = 2  # as many as there are processes for pictures that are hard to decode
MAX_BYTES = 64 << 20  # of what was drawn and is not prepared yet; one larger thing is let in alone
_POLL = 0.2  # seconds; Windows heeds Ctrl-C only between two waits


class ReadAhead(Generic[Drawn, Ready]):
    """Hands on what was prepared, in the order in which it was drawn.

    What fails while it is drawn is raised once all before it has been handed on.
    """

    def __init__(
        self,
        things: Iterable[Drawn],
        prepare: Callable[[Drawn], Ready],
        *,
        most: int,
        size: Callable[[Drawn], int],
    ) -> None:
        """Begin to draw.

        things: is iterated over in a thread of its own.
        prepare: called in other threads; what it raises is raised by get().
        most: how many things are drawn at most before they are handed on.
        size: the bytes that a thing holds until it is prepared.
        """
        self._prepare, self._most, self._size = prepare, most, size
        self._ready: queue.SimpleQueue[Future[Ready] | BaseException | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the next three
        self._drawn = self._bytes = 0  # not handed on; not prepared
        self.closed = False
        self._ended = False
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="seechat-ahead")
        threading.Thread(target=self._draw, args=(things,), daemon=True).start()

    def get(self, *, wait: bool) -> Ready | None:
        """The next thing; None at the end.

        wait: wait for it; else None too if nothing has been drawn.
        """
        found = None if self._ended else self._next(wait)
        if isinstance(found, Future):
            with self._changed:
                self._drawn -= 1
                self._changed.notify_all()
            return found.result()
        if isinstance(found, BaseException):
            self._ended = True
            raise found
        return None

    def close(self) -> None:
        """Draw nothing more, and let go of what was drawn."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _next(self, wait: bool) -> "Future[Ready] | BaseException | None":
        while True:
            try:
                found = self._ready.get(block=wait, timeout=_POLL if wait else None)
            except queue.Empty:
                if not wait:
                    return None
                continue
            self._ended = found is None
            return found

    def _draw(self, things: Iterable[Drawn]) -> None:
        try:
            for thing in things:
                size = self._size(thing)
                with self._changed:
                    self._drawn += 1
                    self._bytes += size
                self._ready.put(self._threads.submit(self._prepared, thing, size))
                del thing
                with self._changed:
                    self._changed.wait_for(self._has_room)
                if self.closed:
                    return
            self._ready.put(None)
        except BaseException as e:
            if not self.closed:  # else nobody waits, and submit() refuses
                self._ready.put(e)

    def _has_room(self) -> bool:
        return self.closed or (self._drawn < self._most and self._bytes < MAX_BYTES)

    def _prepared(self, thing: Drawn, size: int) -> Ready:
        try:
            return self._prepare(thing)
        finally:
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()
