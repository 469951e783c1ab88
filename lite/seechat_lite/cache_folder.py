"""Remembers in the cache folder which bundles were found whole, so that each is hashed only once.

A note there holds the size, the times of change and the inode of every file of a bundle. While
these and the manifest's hashes stay the same, the files count as the same.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from seechat_weights.bundle.manifest import Hashed, verify_hashes
from seechat_weights.files.untrusted import read_file

log = logging.getLogger(__name__)

MAX_NOTE = 1 << 20  # bytes; a note has a few hundred
SMALL = 100_000_000  # bytes; hashed every time, in a tenth of a second


def cache_folder() -> Path:
    """SEECHAT_CACHE, or the system's place for caches."""
    if folder := os.environ.get("SEECHAT_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seechat-lite"


def verify_once(
    folder: Path, manifest: Hashed, progress: Callable[[int, int], None] | None = None
) -> None:
    """Run verify_hashes(), unless this very bundle was verified before.

    folder: the bundle's folder.
    manifest: its manifest.
    progress: called with the bytes read so far and the bytes of all files.

    Raises BundleError as verify_hashes().
    """
    if sum(entry.bytes for entry in manifest.files.values()) <= SMALL:
        verify_hashes(folder, manifest, progress)
        return
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    note, state = cache_folder() / "verified" / f"{place}.json", _state(folder, manifest)
    try:
        if json.loads(read_file(note, limit=MAX_NOTE)) == state:
            return
    except (OSError, ValueError):
        pass  # never verified, or a damaged note
    verify_hashes(folder, manifest, progress)
    if _state(folder, manifest) != state:
        return  # changed while it was read
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        partial.write_text(json.dumps(state), "utf-8")
        partial.replace(note)
    except OSError as e:  # the next load will simply hash again
        log.info("%s: cannot be written (%s)", note, e)


def _state(folder: Path, manifest: Hashed) -> dict[str, list[int | str]]:
    """For every file: its hash in the manifest, size, times of change, inode."""
    state: dict[str, list[int | str]] = {}
    for name, entry in manifest.files.items():
        s = (folder / name).stat()
        state[name] = [entry.sha256, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    return state
