"""Shows how far long work is, on one line of a terminal, with its rate and the time left."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from seechat_lite.cli.terminal import say

_EVERY = 0.2  # seconds between two showings
_WINDOW = 60  # seconds over which the rate is taken


class Progress:
    """Counts things, and shows the count if stderr is a terminal; a context manager.

    step() may be called from several threads.

    done: how many things are done.
    errors: how many of them failed.
    visible: whether the count is shown.
    """

    def __init__(
        self,
        what: str,
        count: Callable[[Callable[[], bool]], int | None],
        *,
        visible: bool = True,
    ) -> None:
        """Show nothing yet.

        what: the things.
        count: returns how many there will be, or None; called in another thread, with what says
            that nobody wants to know any more.
        visible: False counts without showing anything.
        """
        self.done = self.errors = 0
        self._what, self._total = what, 0
        self._start = time.monotonic()
        self._worked = 0  # of the done ones, those that took work
        self._past = deque([(self._start, 0)])  # moments, and how many had been worked on
        self._shown = 0.0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.visible = visible and sys.stderr.isatty()
        if self.visible:
            threading.Thread(target=self._count, args=(count,), daemon=True).start()

    def step(self, *, skipped: bool = False, failed: bool = False) -> None:
        """One more is done.

        skipped: it took no work.
        failed: it failed.
        """
        with self._lock:
            self.done += 1
            self._worked += not skipped
            self.errors += failed
            now = time.monotonic()
            if not self.visible or now - self._shown < _EVERY:
                return
            self._shown = now
            if now - self._past[-1][0] >= 1:
                self._past.append((now, self._worked))
            while len(self._past) > 1 and now - self._past[0][0] > _WINDOW:
                self._past.popleft()
            say(self.line(now))

    def line(self, now: float) -> str:
        """What is shown.

        now: the moment, in seconds.
        """
        then, before = self._past[0]
        rate = (self._worked - before) / max(now - then, 1e-3)
        of = f" of {self._total:,}" if self._total else ""
        parts = [f"{self.done:,}{of} {self._what}"]
        if rate:
            parts.append(f"{rate:.1f}/s" if rate >= 0.1 else f"{rate * 3600:.0f} an hour")
            if self._total > self.done:
                parts.append(f"{duration((self._total - self.done) / rate)} left")
        if self.errors:
            parts.append(f"errors: {self.errors:,}")
        return " · ".join(parts)

    def summary(self) -> str:
        """What was done in all the time."""
        took = time.monotonic() - self._start
        parts = [f"{self.done:,} {self._what}"]
        if before := self.done - self._worked:
            parts.append(f"{before:,} of them done before")
        parts.append(duration(took))
        if self._worked:
            parts.append(f"{self._worked / max(took, 1e-3):.2f}/s")
        if self.errors:
            parts.append(f"errors: {self.errors:,}")
        return " · ".join(parts)

    def _count(self, count: Callable[[Callable[[], bool]], int | None]) -> None:
        self._total = count(self._closed.is_set) or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self.visible:
            say("")


def duration(seconds: float) -> str:
    """A time in words, to two units.

    seconds: the time.
    """
    whole = max(round(seconds), 1)
    for unit, name, smaller, less in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {less}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
