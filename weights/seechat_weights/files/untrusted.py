"""Opens files that somebody else made: a regular file or an error, never an endless wait or read.

Weights, lite and export open every file here (tests/test_untrusted.py checks this). Opening a pipe
would wait, reading a device would never end, and some devices act when they are opened. So a path
is checked first, opened without waiting, and checked again once it is open.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

# Windows has neither O_NONBLOCK nor O_NOCTTY; elsewhere there is no O_BINARY
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
)


def open_file(path: Path | str, *, limit: int | None = None) -> FileIO:
    """Open a regular file for reading bytes.

    path: the file.
    limit: bytes that it may have at most; None for any number.

    Raises OSError; its `strerror` says what is there instead: nothing, a folder, a pipe, a device,
    a loop of links, more than `limit` bytes, or a file that may not be read.
    """
    try:
        _check(os.stat(path), path, limit)  # noqa: PTH116  Path takes a str's "" for "."
        file = os.open(path, _FLAGS)
    except ValueError as e:  # a null character
        raise OSError(errno.EINVAL, f"no file name: {e}", str(path)) from None
    try:
        _check(os.fstat(file), path, limit)
        return _Named(file, path)
    except BaseException:
        os.close(file)
        raise


def read_file(path: Path | str, *, limit: int) -> bytes:
    """Read all bytes of a regular file.

    path: the file.
    limit: bytes that it may have at most.

    Raises OSError as `open_file`, also if the file grows beyond `limit` bytes meanwhile or never
    had an honest size.
    """
    parts, left = [], limit + 1
    with open_file(path, limit=limit) as file:
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise _too_large(path, limit)
    return b"".join(parts)


class _Named(FileIO):
    """A file whose errors say which it is, as those of opening it do."""

    def __init__(self, file: int, path: Path | str) -> None:
        super().__init__(file, "rb")
        self._path = str(path)

    def read(self, size: int | None = -1, /) -> bytes:
        with self._naming():
            return super().read(-1 if size is None else size)

    def readall(self) -> bytes:
        with self._naming():
            return super().readall()

    def readinto(self, buffer: Any, /) -> int:
        with self._naming():
            return super().readinto(buffer)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            e.filename = e.filename or self._path
            raise


def _check(status: os.stat_result, path: Path | str, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        folder = stat.S_ISDIR(status.st_mode)
        kind = "a folder" if folder else "a device, pipe or socket"
        raise OSError(errno.EISDIR if folder else errno.EINVAL, f"{kind}, not a file", str(path))
    if limit is not None and status.st_size > limit:
        raise _too_large(path, limit)


def _too_large(path: Path | str, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
