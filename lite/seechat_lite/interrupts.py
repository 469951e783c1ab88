"""Defines what Ctrl-C does to the command line. The library itself does not use this.

SIGTERM ends a process by itself, whatever it is doing. The exceptions are a server, which ends its
answers first (server/listen.py), and a container's first process, which Linux spares.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 130
TERMINATED = 143  # a shell's exit code for programs that SIGTERM ended
# a shell's exit code for programs that wrote to a pipe that nobody reads (SIGPIPE)
OUTPUT_GONE = 141

_last_words: Callable[[], str] | None = None


@contextmanager
def last_words(words: Callable[[], str]) -> Iterator[None]:
    """Have Ctrl-C say something before it ends this process, while the context lasts.

    words: returns what is said, in one line; called in another thread.
    """
    global _last_words
    _last_words = words
    try:
        yield
    finally:
        _last_words = None


def leave_on_ctrl_c() -> None:
    """Let Ctrl-C end this process at once and quietly, whatever it is doing.

    KeyboardInterrupt cannot do that. Python raises it between two bytecodes, so not while ONNX
    Runtime loads weights or reads a long prompt; and during an import it comes out as an
    ImportError. Instead, a thread learns of the signal through a pipe. Export writes its files so
    that this is safe.
    """
    if os.name != "posix":  # Windows has no wake-up pipes
        signal.signal(signal.SIGINT, lambda *_: _leave())
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: None)
    import threading  # after the line above, so that Ctrl-C already works

    heard, told = os.pipe()
    os.set_blocking(told, False)
    threading.Thread(target=lambda: _leave(os.read(heard, 1)[0]), daemon=True).start()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)


def raise_on_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, as for every Python program."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: _leave(signal.SIGTERM))


def _leave(number: int = signal.SIGINT) -> None:
    if number == signal.SIGTERM:
        os._exit(TERMINATED)
    try:
        os.write(2, b"\n")  # after the terminal's ^C
        if words := _last_words:
            os.write(2, f"seechat: {words()}\n".encode())
    finally:
        os._exit(EXIT_CODE)
