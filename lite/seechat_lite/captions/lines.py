"""A file of captions as JSON lines, written by one run at a time, and continued by a later one.

Every line is written at once, when its caption is there. So a run may be ended at any moment, and
all that is lost is the line that was being written. The next run takes that away. A file that holds
anything else than captions is left as it is.
"""

import json
import logging
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, Self

from seechat_lite.captions.known import Known
from seechat_lite.json_structure import too_complex
from seechat_weights.errors import OptionError
from seechat_weights.files.untrusted import open_file

log = logging.getLogger(__name__)

MAX_LINE = 1 << 20  # bytes; a caption takes a few hundred
# how every line of ours begins
_FIRST, _SECOND = b'{"image": "', (b', "sha256": "', b', "error": "')
_NAME = re.compile(rb"""\{"image":\ " (?: [^"\\]++ | \\. )*+ (?: " | \\?\Z )""", re.VERBOSE).match
_FLAGS = (
    os.O_RDWR
    | os.O_CREAT
    | os.O_APPEND
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
)
_MAX_MODELS = 8  # that are noted
_FAR = 1 << 40  # Windows locks bytes, and those that it locks nobody else can read


class CaptionFile:
    """The file, held by this process until it is closed.

    errors: how many of its lines are errors.
    """

    def __init__(self, path: Path | str, *, known: Known, retry: bool = False) -> None:
        """Take the file, and read what an earlier run wrote.

        path: the file; made if it is not there.
        known: learns the names and captions that the file has.
        retry: do not learn the names of lines that are errors; see remove_errors().

        Raises OptionError if it is no file, is another run's, or holds anything else than
        captions; OSError.
        """
        self._path, self._known, self._retry = str(path), known, retry
        self._made = False  # whether it was not there
        self._models: dict[str, int] = {}  # names, and the first line of each
        self._file = -1
        self.errors = self._end = 0  # lines; bytes
        self._open()
        try:
            self._read()
        except BaseException:
            self._let_go()
            raise

    def check_model(self, name: str) -> None:
        """Check that the captions are of one model.

        name: the model's.

        Raises OptionError if there are another one's.
        """
        for other, number in self._models.items():
            if other != name:
                self._refuse(
                    f"its line {number} is by the model {other!r:.80}",
                    f"captions by {name!r:.80}",
                    "name another file for this model",
                )

    def remove_errors(self) -> None:
        """Remove the lines that are errors; open the file with `retry` to have them tried again.

        Raises OptionError if another run has taken the file meanwhile, OSError.
        """
        if self.errors:
            self._put_in_place()
            self._open()
            self._read()

    def write(self, line: str) -> None:
        """Append a line.

        line: one JSON object, without the line's end.

        Raises OSError; then nothing of the line is in the file.
        """
        self._append(line.encode() + b"\n")

    def close(self) -> None:
        """Let go of the file. One that was made and holds nothing is removed."""
        if self._file >= 0 and self._made and not self._end:
            with suppress(OSError):  # Windows removes no open file
                Path(self._path).unlink()
        self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- whose it is

    def _open(self) -> None:
        """Open the file and hold it."""
        if not self._path:
            self._refuse("an empty name", "a file to write captions to", "name one")
        try:
            self._file = os.open(self._path, _FLAGS | os.O_EXCL, 0o666)
            self._made = True
        except FileExistsError:  # or a link to nowhere
            self._check(self._path)
            self._file = os.open(self._path, _FLAGS, 0o666)
        except ValueError:  # a null character
            self._refuse("no file name", "a file to write captions to", "name one")
        try:
            self._check(self._file)
            self._lock()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _check(self, file: str | int) -> None:
        try:
            status = os.stat(file)  # noqa: PTH116  open files too
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
            self._refuse(kind, "a file to write captions to", "name a file")

    def _lock(self) -> None:
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError):
            self._refuse(
                "another run writes to it", "one at a time", "wait for it, or name another file"
            )
        except OSError as e:  # some network file systems know no locks
            log.warning("%s: cannot be locked (%s): start no second run on it", self._path, e)
        try:
            same = os.path.samestat(os.fstat(self._file), os.stat(self._path))  # noqa: PTH116
        except OSError:
            same = False
        if not same:  # the run that had it before has just removed it
            self._refuse("removed at this moment", "a file that stays", "try again")

    def _refuse(self, found: str, expected: str, do: str) -> NoReturn:
        raise OptionError(f"{self._path or 'output'}: {found}; expected {expected}: {do}")

    # --- what it holds

    def _read(self) -> None:
        """Learn from all lines, and mend the last one."""
        self.errors = self._end = 0
        whole = True
        for number, line in enumerate(self._lines(), 1):
            whole = line.endswith(b"\n")
            found = _caption(line)
            if found is not None:
                self._learn(found, number)
            elif not whole and self._is_torn(line):
                log.warning(
                    "%s: its last line was not written to its end; that picture comes again",
                    self._path,
                )
                os.ftruncate(self._file, self._end)
                return
            elif line.strip():
                self._refuse(
                    f"its line {number} is no caption",
                    "captions of an earlier run and nothing else",
                    "name another file",
                )
            self._end += len(line)
        if not whole:
            self._append(b"\n")

    def _lines(self) -> Iterator[bytes]:
        with open_file(self._path) as raw, BufferedReader(raw, 1 << 16) as file:
            while line := file.readline(MAX_LINE):
                yield line

    def _is_torn(self, line: bytes) -> bool:
        """Whether the last line is the beginning of one of ours."""
        begun = line.rstrip(b"\0")  # a page that was lost is read as zeros
        if _caption(begun):
            return True
        if len(line) == MAX_LINE or _is_json(begun):
            return False
        if self._end and _FIRST.startswith(begun):
            return True
        name = _NAME(begun)
        rest = begun[name.end() :] if name else b""
        return name is not None and any(
            rest.startswith(key) or key.startswith(rest) for key in _SECOND
        )

    def _put_in_place(self) -> None:
        """Put a file without the lines that are errors into the place of this one."""
        place = Path(self._path).resolve()
        file, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        try:
            with os.fdopen(file, "wb") as out:
                for line in self._lines():
                    found = _caption(line)
                    if found and "caption" in found:
                        out.write(line)
            Path(name).chmod(stat.S_IMODE(os.fstat(self._file).st_mode))
            if os.name != "posix":  # Windows replaces no open file
                self._let_go()
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._let_go()

    def _learn(self, found: dict[str, Any], number: int) -> None:
        """Note a picture that was captioned."""
        if "caption" not in found:
            self.errors += 1
            if not self._retry:
                self._known.first(found["image"])
            return
        if isinstance(model := found.get("model"), str) and len(self._models) < _MAX_MODELS:
            self._models.setdefault(model, number)
        self._known.first(found["image"])
        content, finish_reason = found.get("sha256"), found.get("finish_reason")
        if isinstance(content, str) and _SHA256(content) and isinstance(finish_reason, str):
            self._known.remember(content, found["caption"], finish_reason)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            e.filename = e.filename or self._path
            raise
        self._end += len(data)


_SHA256 = re.compile("[0-9a-f]{64}").fullmatch


def _caption(line: bytes) -> dict[str, Any] | None:
    """The object in a line that has a caption or an error; None for anything else."""
    if too_complex(line):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("image"), str):
        return None
    said = found["caption"] if "caption" in found else found.get("error")
    return found if isinstance(said, str) else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lock(file: int) -> None:
    """Lock an open file until it is closed. Raises OSError if another process has."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
