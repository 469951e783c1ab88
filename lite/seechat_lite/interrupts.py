"""What Ctrl-C does to the command line. Nothing here is used by the library itself."""

import os
import signal

EXIT_CODE = 130
OUTPUT_GONE = 141  # what a shell says of programs that wrote to a pipe nobody reads (SIGPIPE)


def leave_on_ctrl_c() -> None:
    """Let Ctrl-C end this process at once and quietly, whatever it is doing.

    KeyboardInterrupt cannot: Python raises it between two bytecodes, so not while ONNX Runtime
    loads weights or reads a long prompt, and amid an import it comes out as an ImportError. Here a
    thread hears of the signal through a pipe. Export writes its files so that this is safe.
    """
    if os.name != "posix":  # wake-up pipes are not for Windows
        signal.signal(signal.SIGINT, lambda *_: _leave())
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    import threading  # after the line above: Ctrl-C is already taken care of

    heard, told = os.pipe()
    os.set_blocking(told, False)
    threading.Thread(target=lambda: os.read(heard, 1) and _leave(), daemon=True).start()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)


def raise_on_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, as for every Python program."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave() -> None:
    os.write(2, b"\n")  # after the terminal's ^C
    os._exit(EXIT_CODE)
