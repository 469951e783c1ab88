"""OUT.partial, where a bundle is written until it is complete: what of it is ours.

Whatever else is there belongs to somebody else: then nothing is written and nothing removed.

    OUT.partial/journal.json    what an export has done; says itself whose it is
    OUT.partial/export.lock     held while one writes
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
_BEGINNING = json.dumps({"format": FORMAT})[:-1].encode()  # of every journal
_MAX_JOURNAL = 1 << 20  # bytes; it has a few hundred


class Workplace:
    """The place beside `out` in which it is written.

    names: of the files that may be written into the bundle.
    """

    def __init__(self, out: Path, names: Collection[str]) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.partial")
        self.folder = self.path / BUNDLE
        self.names = set(names)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have it, empty or as an export left it, for this process alone.

        Raises BundleError where it is somebody else's or another export writes there, OSError.
        """
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            with lock:
                self._check()  # now that nobody else changes it
                yield
        except Timeout:
            raise BundleError(
                f"{self.out}: another export is writing it; expected one at a time: wait for it "
                "or choose another name"
            ) from None
        finally:
            if not (self.path / JOURNAL).exists():  # done, or never begun
                with suppress(OSError):  # another export has come to it meanwhile
                    (self.path / LOCK).unlink(missing_ok=True)
                    self.path.rmdir()

    def journal(self) -> dict[str, Any]:
        """What an export noted last; empty if none did."""
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
        """Note them; atomic, so never half a note."""
        note = {"format": FORMAT, "version": VERSION, "out": self.out.name}
        note |= {"files": sorted(self.names), **facts}
        new = self.path / NEW_JOURNAL
        new.write_text(json.dumps(note), "utf-8")
        new.replace(self.path / JOURNAL)

    def clear(self, *keep: str) -> None:
        """Remove an earlier export's files from the bundle, but for those to keep."""
        self.folder.mkdir(exist_ok=True)
        for name in self._found() - {*keep}:
            (self.folder / name).unlink()

    def deliver(self) -> None:
        """Give the bundle its name."""
        self.folder.rename(self.out)
        self._forget()

    def discard(self) -> None:
        """Remove what was written."""
        if self.folder.exists():
            self.clear()
            self.folder.rmdir()
        self._forget()

    def _forget(self) -> None:
        for name in (NEW_JOURNAL, JOURNAL):  # the lock goes when it is let go
            (self.path / name).unlink(missing_ok=True)

    def _found(self) -> set[str]:
        return {file.name for file in self.folder.iterdir()}

    def _check(self) -> None:
        """See that all that is there is an export's of the same name."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode):
            raise self._others("a file or a link")
        found = {file.name: file.lstat() for file in self.path.iterdir()}
        if LOCK in found and found[LOCK].st_size:
            raise self._others(f"with a {LOCK} that says something")
        if NEW_JOURNAL in found:  # cut short while it was written, or just before it got its name
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
        for file, status in files.items():  # a link would lead to somebody else's file
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise self._others(f"its {file.name!r:.80} is a link or no file")

    def _others(self, found: str) -> BundleError:
        return BundleError(
            f"{self.path}: not made by an export of {self.out.name} ({found}), yet that would be "
            "written there; expected nothing else: move it away or choose another name for the "
            "bundle"
        )
