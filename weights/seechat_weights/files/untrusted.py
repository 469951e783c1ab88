"""Opening what somebody else put there: a regular file, or an error; never a wait, never no end.

Every file that is read by weights, lite and export is opened here (tests/test_untrusted.py keeps
it so). A pipe would be waited for, a device read without end, and some devices act when they are
opened: so a path is looked at first, opened without waiting, and looked at again once it is open.
"""

import errno
import os
import stat
from io import FileIO
from pathlib import Path

# Windows has neither O_NONBLOCK nor O_NOCTTY; elsewhere there is no O_BINARY
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
)


def open_file(path: Path | str, *, limit: int | None = None) -> FileIO:
    """A regular file, open for reading bytes.

    limit: bytes that it may have at most.
    Raises OSError, whose `strerror` says what is there instead: nothing, a folder, a pipe, a
    device, a loop of links, more than `limit` bytes, something that may not be read.
    """
    try:
        _check(os.stat(path), path, limit)  # noqa: PTH116  Path takes a str's "" for "."
        file = os.open(path, _FLAGS)
    except ValueError as e:  # a null character
        raise OSError(errno.EINVAL, f"no file name: {e}", str(path)) from None
    try:
        _check(os.fstat(file), path, limit)
        return FileIO(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read_file(path: Path | str, *, limit: int) -> bytes:
    """All bytes of a regular file. Raises OSError as `open_file`, also where it grows beyond
    `limit` bytes meanwhile or never had an honest size."""
    parts, left = [], limit + 1
    with open_file(path, limit=limit) as file:
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise _too_large(path, limit)
    return b"".join(parts)


def _check(status: os.stat_result, path: Path | str, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        folder = stat.S_ISDIR(status.st_mode)
        kind = "a folder" if folder else "a device, pipe or socket"
        raise OSError(errno.EISDIR if folder else errno.EINVAL, f"{kind}, not a file", str(path))
    if limit is not None and status.st_size > limit:
        raise _too_large(path, limit)


def _too_large(path: Path | str, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
