"""Manages OUT.partial, where a bundle is written until it is complete; knows what in it is ours.

Anything else there belongs to somebody else; then nothing is written and nothing is removed.

    OUT.partial/journal.json    what an export has done; says itself whose it is
    OUT.partial/export.lock     held while an export writes
    OUT.partial/bundle/         becomes OUT
"""

import json
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from seechat_weights.errors import BundleError
from seechat_weights.files.untrusted import read_file

FORMAT, VERSION = "seechat-export-journal", 1
JOURNAL, NEW_JOURNAL, LOCK, BUNDLE = "journal.json", "journal.json.new", "export.lock", "bundle"
_BEGINNING = json.dumps({"format": FORMAT})[:-1].encode()  # the beginning of every journal
_MAX_JOURNAL = 1 << 20  # bytes; a journal has a few hundred


class Workplace:
    """The place beside `out` in which a bundle is written.

    out: the bundle's folder.
    names: the files that may be written into the bundle.
    """

    def __init__(self, out: Path, names: Collection[str]) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.partial")
        self.folder = self.path / BUNDLE
        self.names = set(names)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the place for this process alone, empty or as an export left it.

        Raises BundleError if it is somebody else's or another export writes there, OSError.
        """
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            with lock:
                self._check()  # again, now that nobody else changes it
                yield
        except Timeout:
            raise BundleError(
                f"{self.out}: another export is writing it; expected one at a time: wait for it "
                "or choose another name"
            ) from None
        finally:
            if not (self.path / JOURNAL).exists():  # finished, or never begun
                with suppress(OSError):  # another export may use it by now
                    (self.path / LOCK).unlink(missing_ok=True)
                    self.path.rmdir()

    def journal(self) -> dict[str, Any]:
        """What an export noted last; empty if there is no note."""
        try:
            found = json.loads(read_file(self.path / JOURNAL, limit=_MAX_JOURNAL))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            return {}
        files = found.get("files")
        ours = found.get("version") == VERSION and found.get("out") == self.out.name
        return found if ours and isinstance(files, list) else {}

    def record(self, **facts: object) -> None:
        """Note facts. The write is atomic, so there is never half a note.

        facts: what to note.
        """
        note = {"format": FORMAT, "version": VERSION, "out": self.out.name}
        note |= {"files": sorted(self.names), **facts}
        new = self.path / NEW_JOURNAL
        new.write_text(json.dumps(note), "utf-8")
        new.replace(self.path / JOURNAL)

    def clear(self, *keep: str) -> None:
        """Remove an earlier export's files from the bundle.

        keep: names of files to keep.
        """
        self.folder.mkdir(exist_ok=True)
        for name in self._found() - {*keep}:
            (self.folder / name).unlink()

    def deliver(self) -> None:
        """Give the bundle its final name."""
        self.folder.rename(self.out)
        self._forget()

    def discard(self) -> None:
        """Remove what was written."""
        if self.folder.exists():
            self.clear()
            self.folder.rmdir()
        self._forget()

    def _forget(self) -> None:
        for name in (NEW_JOURNAL, JOURNAL):  # the lock file is removed when the lock is released
            (self.path / name).unlink(missing_ok=True)

    def _found(self) -> set[str]:
        return {file.name for file in self.folder.iterdir()}

    def _check(self) -> None:
        """Check that everything there is from an export of the same name."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode):
            raise self._others("a file or a link")
        found = {file.name: file.lstat() for file in self.path.iterdir()}
        if LOCK in found and found[LOCK].st_size:
            raise self._others(f"with a {LOCK} that says something")
        # an export was interrupted while writing it, or just before renaming it
        if NEW_JOURNAL in found:
            begun = read_file(self.path / NEW_JOURNAL, limit=_MAX_JOURNAL)
            if not begun.startswith(_BEGINNING[: len(begun)]):
                raise self._others(f"with a {NEW_JOURNAL} that no export wrote")
        journal = self.journal()
        known = {LOCK, NEW_JOURNAL, *((JOURNAL, BUNDLE) if journal else ())}
        if unknown := sorted(found.keys() - known):
            raise self._others(f"it holds {unknown[0]!r:.80}")
        files = {self.path / name: s for name, s in found.items() if name != BUNDLE}
        if BUNDLE in found:
            if not stat.S_ISDIR(found[BUNDLE].st_mode):
                raise self._others(f"its {BUNDLE} is no folder")
            files |= {file: file.lstat() for file in self.folder.iterdir()}
            if unknown := sorted(self._found() - self.names - set(map(str, journal["files"]))):
                raise self._others(f"it holds {unknown[0]!r:.80}")
        for file, status in files.items():  # a link could lead to somebody else's file
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise self._others(f"its {file.name!r:.80} is a link or no file")

    def _others(self, found: str) -> BundleError:
        return BundleError(
            f"{self.path}: not made by an export of {self.out.name} ({found}), yet that would be "
            "written there; expected nothing else: move it away or choose another name for the "
            "bundle"
        )
