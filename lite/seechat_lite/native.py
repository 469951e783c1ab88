"""Makes native code safe to end: by close() at any time, the interpreter's exit, or a fork.

Data that native code works with must not be freed while it runs, and native code must not run when
the interpreter exits. Either would crash the process. So every object that runs native code is a
`Native`: one call at a time holds its lock, and close() ends that call, waits for it, and only then
frees.

The thread that holds the lock may take it again. So a signal handler or a finalizer, which Python
runs between two steps of a call, can close the object of that call. No native code runs in that
thread at that moment, and the call itself then ends with an EngineError.

When the interpreter exits, a thread that nobody waits for stops for good where it uses an object or
would free one. Going on, it would run native code or free what that allocated, and some libraries
end the process if they find the interpreter gone then.
"""

import atexit
import ctypes
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar

from seechat_weights.errors import EngineError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Some = TypeVar("Some", bound="Native")


class Native:
    """Base of an object that works in native code; methods that run such code are `guarded`."""

    _fork: Literal["never", "idle", "any"] = "never"  # when a forked process may go on using it
    # from the process that forked this one; freeing would wait for threads, which are not here
    _inherited = False
    _freed = False
    _lock: "threading.RLock"  # held by the running call
    _ended: str  # why it can no longer be used, else ""

    def __init_subclass__(cls) -> None:
        # Handlers run last in, first out. Libraries such as torch register some to take themselves
        # down, and whoever derives a class has imported its library: ours must come before.
        atexit.unregister(_exit)
        atexit.register(_exit)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        self = super().__new__(cls)
        self._lock = threading.RLock()
        self._ended = ""
        _living.add(self)  # first: _exit() closes the objects that exist when it begins
        if _nobody_listens():
            _stop_here()
        return self

    def __del__(self) -> None:
        """Free what native code allocated; the interpreter does not exit meanwhile."""
        with guarded_block():
            if not _exited:
                with suppress(Exception):  # an object that was never fully made
                    self.close()

    def close(self) -> None:
        """End the running call, wait for it, and free everything. Closing twice is harmless.

        May be called from any thread at any time.
        """
        self._ended = self._ended or "the model is closed: load it again"
        self.cancel()
        with self._lock:
            if not self._inherited and not self._freed:
                self._freed = True
                self._release()

    def cancel(self) -> None:
        """Make a running call end soon, if it can. May be called from any thread."""

    def _release(self) -> None:
        """Free what close() frees; no call runs now.

        If making the object failed, attributes may be missing.
        """
        raise NotImplementedError

    def check_open(self) -> None:
        """Raise EngineError if the object can no longer be used."""
        if not self._ended:
            return
        if _nobody_listens():
            _stop_here()
        raise EngineError(self._ended)


def guarded(
    method: Callable[Concatenate[Some, Arguments], Result],
) -> Callable[Concatenate[Some, Arguments], Result]:
    """Let one call at a time into the native code of a Native, and none once it is closed.

    A call that fails because the object was closed meanwhile raises the EngineError that says so.

    method: a method of a Native.
    """

    @functools.wraps(method)
    def call(self: Some, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            with _calls, self._lock:
                self.check_open()
                return method(self, *args, **options)
        except Exception:
            if _nobody_listens():
                _stop_here()
            self.check_open()
            raise

    return call


@contextmanager
def guarded_block() -> Iterator[None]:
    """Run native code that belongs to no object; the interpreter does not exit meanwhile."""
    block = object()
    _blocks.add(block)
    try:
        if _exited and _nobody_listens():
            _blocks.discard(block)
            _never.acquire()
        with _calls:
            yield
    except Exception:
        _blocks.discard(block)
        if _nobody_listens():
            _stop_here()
        raise
    finally:
        _blocks.discard(block)


class _Calls(threading.local):
    """Counts the guarded calls that a thread is in."""

    running = 0

    def __enter__(self) -> None:
        self.running += 1

    def __exit__(self, *_: object) -> None:
        self.running -= 1


_calls = _Calls()
_blocks: set[object] = set()  # guarded blocks that run; a lock would make them wait for each other
_never = threading.Lock()  # never released
_never.acquire()
_living: weakref.WeakSet[Native] = weakref.WeakSet()
_held: list[Native] = []  # idle objects, kept idle while the process forks
_exiting = False  # the interpreter's exit has begun
_exited = False  # and everything is closed


def _nobody_listens() -> bool:
    """Whether the interpreter is exiting and does not wait for this thread."""
    return _exiting and threading.current_thread().daemon


def _stop_here() -> None:
    """Let this thread, for which nobody waits, stop for good; within a call, raise EngineError.

    _exit() waits for running calls, so their locks must be released first.
    """
    if _calls.running:
        raise EngineError(
            "a thread uses a model while the process exits; expected the thread to have ended: "
            "join it before"
        )
    _never.acquire()


def _exit() -> None:
    """Close everything while threads that nobody waits for may still run."""
    global _exiting, _exited
    _exiting = True
    for native in list(_living):
        with suppress(Exception):  # an object that was never fully made
            native.close()
    _exited = True
    while _blocks:
        time.sleep(0.001)


def _before_fork() -> None:
    _held.extend(n for n in list(_living) if n._lock.acquire(blocking=False))


def _after_fork() -> None:
    for native in _held:
        native._lock.release()
    _held.clear()


def _in_child() -> None:
    """Go on with objects that were idle. One that was in a call stays as that call left it."""
    _blocks.clear()
    idle = set(map(id, _held))
    _after_fork()
    for native in list(_living):
        native._inherited = True
        # the interpreter's exit must not free it either
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
        if id(native) in idle and native._fork != "never":
            continue
        native._lock = threading.RLock()
        if native._fork == "any":
            continue
        native._ended = native._ended or (
            "this process was forked from the one that loaded the model, which cannot be used "
            "here: load it in this process, or start processes with multiprocessing's 'spawn'"
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
