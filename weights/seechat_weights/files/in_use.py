"""Notices that somebody changed the files of a loaded model before they are read again."""

import os
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from seechat_weights.errors import SeechatError
from seechat_weights.files.untrusted import open_file


class FilesInUse:
    """The files that a loaded model goes on reading, most of them mapped.

    Touching a part of a mapping that its file has lost ends the process, and no exception can be
    made of that. What somebody writes into a file is computed with. So check() comes before every
    call that reads the files; it takes a microsecond a file.

    A file that was replaced by renaming is still there for whoever has it open.
    """

    def __init__(self, paths: Iterable[Path], error: type[SeechatError]) -> None:
        """Open the files and note their sizes and times of change.

        paths: the files.
        error: what the checks raise.

        Raises `error` for a file that cannot be opened.
        """
        self._error = error
        self._noted: list[tuple[Path, int, os.stat_result]] = []
        with ExitStack() as opened:
            for path in paths:
                try:
                    file = opened.enter_context(open_file(path)).fileno()
                except OSError as e:
                    raise self._changed(path, f"cannot be opened ({e.strerror})") from None
                self._noted.append((path, file, os.fstat(file)))
            self.close = weakref.finalize(self, opened.pop_all().close)
            self.close.atexit = False  # a daemon thread may be in check() while the process exits

    def check(self) -> None:
        """Raise an error if an open file is shorter or was written to since."""
        for path, file, before in self._noted:
            now = os.fstat(file)
            if now.st_size != before.st_size or now.st_mtime_ns != before.st_mtime_ns:
                what = "shorter than" if now.st_size < before.st_size else "not the same as"
                raise self._changed(path, f"{what} when it was loaded")

    def check_places(self) -> None:
        """Raise an error if a file was changed, or another lies in its place.

        Call this before a file is opened again.
        """
        self.check()
        for path, _, before in self._noted:
            try:
                same = os.path.samestat(path.stat(), before)
            except OSError:
                same = False
            if not same:
                raise self._changed(path, "not the file that was loaded")

    def _changed(self, path: Path, found: str) -> SeechatError:
        return self._error(
            f"{path}: {found}; expected the files of a loaded model to stay as they were: load the "
            "model again, and replace one in use by renaming, never in place"
        )
