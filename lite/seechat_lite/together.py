"""Writes several answers at once with one engine: they join and leave between any two steps.

Every answer is a task of its own, which runs until it needs the engine. Then the engine does one of
two things: it reads one prompt, or it appends a token to every answer in its slots. All in one
thread; only cancel() comes from others.
"""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeVar

import numpy as np

from seechat_lite.engines.base import Engine
from seechat_lite.generate import Seat
from seechat_lite.prompt import Prompt

Result = TypeVar("Result")
# a task yields whenever it waits for its seat
Work = Callable[[Seat], Generator[None, None, Result]]


class Task(Generic[Result]):
    """One answer that is being written.

    result: what the task returned, once it has ended.
    error: what it raised instead.
    """

    def __init__(self, together: "Together[Result]", work: Work[Result]) -> None:
        self.seat = _Shared(together)
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._running = work(self.seat)

    def go_on(self) -> bool:
        """Run until the task waits for its seat; returns whether it does, else it has ended."""
        try:
            next(self._running)
            return True
        except StopIteration as e:
            self.result = e.value
        except Exception as e:
            self.error = e
        return False

    def close(self) -> None:
        """End it here."""
        self._running.close()


class Together(Generic[Result]):
    """Writes the answers of tasks.

    Whoever calls advance() holds the engine's own cache meanwhile; with `alone`, until no task is
    left.

    engine: runs the model. Its slots are open, or only one task is there at a time.
    slots: how many answers may be begun at a time; further tasks wait.
    alone: leave an answer in the engine's own cache as long as no other joins. Tokens are guessed
        there.
    share: of the time, that answers which have begun are written before another prompt is read; 0
        reads every prompt at once.
    """

    def __init__(
        self, engine: Engine, slots: int, *, alone: bool = False, share: float = 0
    ) -> None:
        self.engine = engine
        self._slots, self._alone, self._share = slots, alone, share
        self._tasks: list[Task[Result]] = []
        self.lock = threading.RLock()  # held while `own` changes; a signal handler may cancel()
        self.own: _Shared | None = None  # the one whose answer is in the engine's own cache
        self._owed = 0.0  # seconds for which answers are written before the next prompt

    def __len__(self) -> int:
        return len(self._tasks)

    def join(self, work: Work[Result]) -> Task[Result]:
        """Add an answer.

        work: writes it, in the seat that it is given.
        """
        task = Task(self, work)
        self._tasks.append(task)
        return task

    def advance(self) -> list[Task[Result]]:
        """Run all tasks on, then call the engine once; returns the tasks that have ended.

        It does not call the engine if any task has ended.
        """
        ended = [task for task in self._tasks if not task.go_on()]
        if ended:
            self._tasks = [task for task in self._tasks if task not in ended]
            return ended
        writing = [task.seat for task in self._tasks if task.seat.tokens]
        waiting = [task.seat for task in self._tasks if task.seat.prompt]
        begun = sum(task.seat.begun for task in self._tasks)
        start = time.perf_counter()
        if waiting and begun < self._slots and not (writing and self._owed > 0):
            for task in self._tasks:
                if task.seat.guesses:
                    task.seat.move()
            waiting[0].read(alone=self._alone and not begun)
            self._owed = (time.perf_counter() - start) * self._share / (1 - self._share)
        elif writing:
            self._write(writing)
            self._owed -= time.perf_counter() - start
        return []

    def close(self) -> None:
        """End all tasks."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.close()

    def _write(self, seats: "Sequence[_Shared]") -> None:
        """Append a token to every answer."""
        if seats[0].guesses:
            seats[0].write()
            return
        try:
            tokens = {s.slot: s.tokens[0] for s in seats if s.slot is not None}
            found = self.engine.step_slots(tokens)
        except Exception as e:
            for seat in seats:
                seat.take(e)
        else:
            for seat in seats:
                if seat.slot is not None:
                    seat.take(found[seat.slot][None])


class _Shared:
    """A Seat beside others. What it asks for, Together runs.

    slot: the engine's slot that holds its answer.
    guesses: whether the engine's own cache holds it, instead of a slot.
    prompt, tokens: what it waits for.
    """

    def __init__(self, together: Together) -> None:
        self._together, self._engine = together, together.engine
        self.slot: int | None = None
        self.guesses = False
        self.held_tokens = 0
        self.seconds: float | None = None
        self.prompt: Prompt | None = None
        self.tokens: Sequence[int] = ()
        self._found: np.ndarray | Exception | None = None

    @property
    def begun(self) -> bool:
        """Whether the engine holds its answer."""
        return self.guesses or self.slot is not None

    # --- for the decode loop

    def prefill(self, prompt: Prompt) -> None:
        """See Seat.

        prompt: the prompt.
        """
        self.prompt = prompt

    def extend(self, token_ids: Sequence[int]) -> None:
        """See Seat.

        token_ids: the tokens.
        """
        self.tokens = token_ids

    def rows(self) -> np.ndarray | None:
        """See Seat."""
        found, self._found = self._found, None
        if isinstance(found, Exception):
            raise found
        return found

    def rewind(self, tokens: int) -> None:
        """See Seat.

        tokens: how many.
        """
        if tokens:  # then it was guessed, in the engine's own cache
            self._engine.rewind(tokens)

    def cancel(self) -> None:
        """See Seat."""
        with self._together.lock:
            if self._together.own is self:
                self._engine.cancel()

    def reset(self) -> None:
        """See Seat."""
        self.prompt, self.tokens, self._found = None, (), None
        slot, self.slot = self.slot, None
        if slot is not None:
            self._engine.free_slot(slot)
        if self.guesses:
            self._leave_own()

    # --- for Together

    def take(self, found: np.ndarray | Exception) -> None:
        """Take what the engine returned or raised.

        found: that.
        """
        self.prompt, self.tokens, self._found = None, (), found

    def read(self, *, alone: bool) -> None:
        """Read the prompt.

        alone: leave the answer in the engine's own cache.
        """
        assert self.prompt
        with self._together.lock:
            self._together.own = self
        self.guesses = True
        try:
            found = self._engine.prefill(self.prompt)[None]
            self.held_tokens = self._engine.held_tokens
        except Exception as e:
            self._leave_own()
            self.take(e)
        else:
            self.take(found)
            if not alone:
                self.move()

    def write(self) -> None:
        """Append tokens to the answer in the engine's own cache."""
        start = time.perf_counter()
        try:
            self.take(self._engine.extend(self.tokens))
            self.seconds = time.perf_counter() - start
        except Exception as e:
            self.take(e)

    def move(self) -> None:
        """Move the answer from the engine's own cache to a slot."""
        try:
            self.slot = self._engine.adopt()
        except Exception as e:
            self.take(e)
        self._leave_own()

    def _leave_own(self) -> None:
        self.guesses, self.seconds = False, None
        with self._together.lock:
            self._together.own = None
        self._engine.reset()  # it also forgets a cancel(), which has come too late for a call
