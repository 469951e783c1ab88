"""Reads lines of text from other programs in whatever bytes; nothing that comes ends the reading.

UTF-8 may come with or without a byte order mark, and UTF-16 as PowerShell and Notepad write it. A
line that is neither is read in the system's own encoding if that is another one, such as GBK on
Chinese Windows. Otherwise the line is an error, and only this line. There is no guessing: letters
of Western code pages are valid GBK and would become other words.
"""

import codecs
import locale
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from seechat_weights.errors import SeechatError

_CHUNK = 1 << 16  # bytes
_BOM = codecs.BOM_UTF8.decode()


class Bytes(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class LineError(SeechatError):
    """A line that is not text, or is too long.

    message: what is wrong.
    guess: as much of the line as can be read, to find its id.
    """

    def __init__(self, message: str, guess: str = "") -> None:
        super().__init__(message)
        self.guess = guess


def text_lines(
    stream: Bytes, *, most: int, end: bytes = b"\n", paths: bool = False
) -> Iterator[str | LineError]:
    """Yield the lines of a stream as they come, without line ends; a bad line gives an error.

    stream: the bytes.
    most: bytes that a line may have; a longer one is dropped as it comes and gives an error.
    end: the byte that ends a line. After a zero byte, as `find -print0` writes it, UTF-16 is not
        looked for.
    paths: lines are paths; where any bytes may be one (not on Windows), none is an error.
    """
    chunks = iter(lambda: stream.read1(_CHUNK), b"")
    for line in _split(_as_utf8(chunks) if end == b"\n" else chunks, most, end):
        if line is None:
            yield LineError(
                f"a line of more than {most} bytes; expected shorter ones: send larger things as "
                "files"
            )
            continue
        try:
            yield _decode(line.removesuffix(b"\r") if end == b"\n" else line, paths=paths)
        except LineError as e:
            yield e


def _as_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks in UTF-8; the first bytes show whether they are UTF-16."""
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) >= 2:
            break
    encoding = None
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif len(start) >= 2 and (start[0] == 0) != (start[1] == 0):  # ASCII begins every JSON
        encoding = "utf-16-be" if start[0] == 0 else "utf-16-le"
    if encoding is None:
        yield start
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    yield decoder.decode(start).encode("utf-8", "replace")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "replace")
    yield decoder.decode(b"", final=True).encode("utf-8", "replace")


def _split(chunks: Iterable[bytes], most: int, end: bytes) -> Iterator[bytes | None]:
    """Yield lines; None for one that is too long."""
    line = bytearray()
    too_long = False
    for chunk in chunks:
        *ended, rest = chunk.split(end)
        for part in ended:
            line += part
            yield None if too_long or len(line) > most else bytes(line)
            line, too_long = bytearray(), False
        line += rest
        if len(line) > most:
            line, too_long = bytearray(), True
    if too_long or line:
        yield None if too_long else bytes(line)


def _decode(line: bytes, *, paths: bool) -> str:
    try:
        return line.decode().removeprefix(_BOM)
    except UnicodeDecodeError as e:
        where = e.start
    system = locale.getencoding()
    if codecs.lookup(system).name != "utf-8":
        try:
            return line.decode(system)
        except UnicodeDecodeError:
            pass
    if paths and os.name == "posix":
        return os.fsdecode(line)
    raise LineError(
        f"not UTF-8 (byte 0x{line[where]:02x} at {where}); expected UTF-8 or UTF-16: a program on "
        "Windows may write its code page, such as GBK, unless it is told",
        line.decode("utf-8", "replace"),
    )
