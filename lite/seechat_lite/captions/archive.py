"""Reads pictures from tar archives, webdataset's shards among them, one after the other.

An archive is read from its beginning to its end, once, and a member only if it is wanted. What an
archive can make us read is bounded: headers, names and pictures.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, cast

from seechat_lite.captions.run import Item, failed
from seechat_lite.images import MAX_BYTES, too_many_bytes
from seechat_lite.pictures.formats import is_picture_name
from seechat_weights.errors import ImageError
from seechat_weights.files.untrusted import open_file

SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
MAX_HEADERS = 1 << 20  # bytes of the headers before one member
MAX_NAME = 1000  # characters of a member's name that are shown
_PART = 1 << 20  # bytes read at once
_BLOCK = 512  # bytes; tar consists of such
_MAX_PADDING = 1 << 20  # bytes of zeros behind an archive; more are not looked through
_OPENERS: dict[bytes, Callable[[Any], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: cast("IO[bytes]", gzip.GzipFile(fileobj=file)),
    b"BZ": lambda file: cast("IO[bytes]", bz2.BZ2File(file)),
    b"\xfd7": lambda file: cast("IO[bytes]", lzma.LZMAFile(file)),  # noqa: SIM115  _members closes it
}


def is_one(path: str) -> bool:
    """Whether a file is named like an archive.

    path: the file.
    """
    return path.lower().endswith(SUFFIXES)


def members(path: str) -> Iterator[Item]:
    """Yield the pictures in an archive; they are named ARCHIVE/MEMBER.

    An archive that is damaged, or no archive, yields an item that says so.

    path: the archive.
    """
    try:
        with ExitStack() as files:
            yield from _members(path, files)
    except Exception as e:  # tarfile and the decompressors raise many kinds
        yield failed(path, _unreadable(path, e))


def _members(path: str, files: ExitStack) -> Iterator[Item]:
    reader = _Forward(_decompressed(path, files))
    reader.left = MAX_HEADERS
    tar: Any = tarfile.TarFile(  # Any: its `members` is no promise of the library's
        fileobj=cast(Any, reader), encoding="utf-8", errors="surrogateescape"
    )
    padding = 0
    while True:
        reader.left = MAX_HEADERS
        member = tar.next()
        tar.members.clear()  # it keeps every header
        tar.pax_headers.clear()
        if member:
            padding = 0
            if _is_wanted(member):
                yield Item(_name(path, member.name), partial(_taken, path, tar, reader, member))
            continue
        # tarfile takes a header that it cannot read for the end
        if reader.last_block.strip(b"\0"):
            raise tarfile.ReadError("damaged in its middle")
        padding += _BLOCK
        if len(reader.last_block) < _BLOCK or padding > _MAX_PADDING:
            break
        tar.offset += _BLOCK  # another archive may follow the zeros: somebody joined two


def _decompressed(path: str, files: ExitStack) -> IO[bytes]:
    raw = files.enter_context(open_file(path))
    file = files.enter_context(io.BufferedReader(raw, 1 << 16))
    opener = _OPENERS.get(file.peek(2)[:2])
    return files.enter_context(opener(file)) if opener else file


def _is_wanted(member: tarfile.TarInfo) -> bool:
    parts = PurePosixPath(member.name).parts
    hidden = any(p == "__MACOSX" or (p.startswith(".") and p != "..") for p in parts)
    return is_picture_name(member.name) and not hidden and not member.isdir()


def _name(path: str, name: str) -> str:
    if len(name) > MAX_NAME:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        name = f"{name[:MAX_NAME]}…{digest}"
    return f"{path}/{name}"


def _taken(path: str, tar: tarfile.TarFile, reader: "_Forward", member: tarfile.TarInfo) -> bytes:
    """The bytes of a member. Raises ImageError."""
    name = _name(path, member.name)
    if not member.isreg():
        kind = "a link" if member.issym() or member.islnk() else "a device or a pipe"
        raise ImageError(
            f"{name}: {kind} in an archive; expected a picture's bytes: write the archive with the "
            "file itself"
        )
    if member.size > MAX_BYTES:
        raise too_many_bytes(name, member.size)
    reader.left = MAX_BYTES + MAX_HEADERS
    try:
        file = tar.extractfile(member)
        assert file is not None  # it is a regular one
        data = bytearray()
        while len(data) < member.size and (part := file.read(min(_PART, member.size - len(data)))):
            data += part
    except Exception as e:
        raise _unreadable(name, e) from None
    return bytes(data)


def _unreadable(name: str, error: Exception) -> ImageError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, RecursionError):  # tarfile calls itself for each
        why = "headers that belong to headers, without end"
    return ImageError(
        f"{name}: cannot be read to its end ({why or type(error).__name__}); expected a whole tar "
        "archive: get it again, or write it again"
    )


class _Forward:
    """A file for tarfile, read forward only; tarfile goes back by a byte at most.

    left: how many bytes may still be read. Skipping costs none.
    last_block: the last block of a header's size that was read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0
        self._last = b""  # the byte before
        self._again = False  # whether that byte is read next
        self.left = 0
        self.last_block = b""

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._at - self._again

    def seek(self, position: int) -> int:
        """Skip forward, or go back by one byte."""
        self._again = position == self._at - 1 and bool(self._last)
        if not self._again and position != self._at:
            if position < self._at:
                raise tarfile.ReadError("its headers lead back")
            self._file.seek(position)
            self._at, self._last = position, b""
        return self.tell()

    def read(self, size: int) -> bytes:
        """Read as much as is asked for, if there is as much."""
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADERS} bytes")
        self.left -= size
        parts, self._again = [self._last if self._again and size else b""], self._again and not size
        need = size - len(parts[0])
        while need and (part := self._file.read(min(need, _PART))):
            parts.append(part)
            need -= len(part)
            self._at += len(part)
            self._last = part[-1:]
        data = b"".join(parts)
        if size == _BLOCK:
            self.last_block = data
        return data
