"""Lets threads wait in line for something that serves one at a time, and leave the line."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seechat_weights.errors import EngineError


class OneAtATime:
    """A lock whose waits can be ended.

    A signal handler may wake those who wait, and any thread may release it, as a finalizer does.
    """

    def __init__(self) -> None:
        # its own thread may take this lock again: finalizers and signal handlers come at any time
        self._changed = threading.Condition(threading.RLock())
        self._holder: weakref.ref[_Holder] | None = None  # dies with its holder
        _all.add(self)

    @contextmanager
    def held(self, given_up: Callable[[], None]) -> Iterator[None]:
        """Hold it, once all that came before have released it.

        given_up: asked when it is free and after every wake(); ends the wait by raising an
            exception.

        Raises EngineError if this thread already holds it: it would wait for itself.
        """
        me = _Holder(threading.get_ident())
        try:
            with self._changed:
                while True:
                    given_up()
                    holder = self._holder and self._holder()
                    if holder is None:
                        break
                    if holder.thread == me.thread:
                        raise EngineError(
                            "another answer of this model is not finished in this thread; "
                            "expected its end: read it "
                            "to its end, close() its stream or stop() its chat before asking again"
                        )
                    del holder
                    self._changed.wait()
                self._holder = weakref.ref(me)
            yield
        finally:
            with self._changed:
                if self._holder and self._holder() is me:
                    self._holder = None
                    self._changed.notify_all()

    def wake(self) -> None:
        """Make all who wait ask whether to go on waiting. May be called from anywhere."""
        with self._changed:
            self._changed.notify_all()

    def renew(self) -> None:
        """Start afresh in a forked process: threads that held it, or waited, are not there."""
        self._changed = threading.Condition(threading.RLock())
        holder = self._holder and self._holder()
        if holder is None or holder.thread != threading.get_ident():
            self._holder = None


class _Holder:
    """One hold; `thread` is the one that took it."""

    __slots__ = ("__weakref__", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread


_all: weakref.WeakSet[OneAtATime] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [each.renew() for each in list(_all)])
