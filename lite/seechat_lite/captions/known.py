"""Remembers which pictures have been captioned, and with what, in bounded memory."""

import hashlib
import sqlite3
import threading
from typing import Self

_CACHE = 256  # kB of pages in memory; the rest is in a temporary file
_TABLES = """
    CREATE TABLE names (digest BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE captions (content BLOB PRIMARY KEY, text TEXT, finish TEXT) WITHOUT ROWID;
"""


class Known:
    """Names of pictures that were seen, and captions by the content of their pictures.

    It may be used from several threads. Ten million pictures would take a gigabyte of memory as
    Python's own sets and dicts.
    """

    def __init__(self) -> None:
        # a database without a name is a temporary file that SQLite writes once it must
        self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        self._base.executescript(
            f"PRAGMA cache_size = -{_CACHE}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            + _TABLES
        )

    def first(self, name: str) -> bool:
        """Whether this name is seen for the first time.

        name: the picture's.
        """
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            done = self._base.execute("INSERT OR IGNORE INTO names VALUES (?)", (digest,))
            return done.rowcount == 1

    def remember(self, content: str, text: str, finish_reason: str) -> None:
        """Remember a caption.

        content: the picture's sha256, hexadecimal.
        text: the caption.
        finish_reason: why it ended.
        """
        row = bytes.fromhex(content), text.encode("utf-8", "surrogatepass"), finish_reason
        with self._lock:
            self._base.execute("INSERT OR IGNORE INTO captions VALUES (?, ?, ?)", row)

    def caption(self, content: str) -> tuple[str, str] | None:
        """The caption of a picture of the same content, and why it ended.

        content: the picture's sha256, hexadecimal.
        """
        query = "SELECT text, finish FROM captions WHERE content = ?"
        with self._lock:
            found = self._base.execute(query, (bytes.fromhex(content),)).fetchone()
        return found and (found[0].decode("utf-8", "surrogatepass"), found[1])

    def close(self) -> None:
        """Remove the temporary file."""
        with self._lock:
            self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
