"""Reads a PNG that is too large for memory, some rows at a time.

Pillow decodes a PNG whole, at four bytes a pixel. But a few rows are a small PNG of their own, if
the row above them is put first and unfiltered. So the rows are inflated here, and Pillow undoes
their filters.
"""

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin

from seechat_lite.pictures.headers import Header, damaged

_MODES = {2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels
_COLOURS = {2: 4, 3: 2, 4: 6}  # PNG's colour type, by the number of channels


class PngBands:
    """The rows of a picture from top to bottom; they are asked for like parts of an image."""

    def __init__(self, header: Header) -> None:
        self.size = self.width, self.height = header.size
        self.mode = _MODES[header.channels]
        self._colour = _COLOURS[header.channels]
        # bytes of a row with the number of its filter
        self._stride = 1 + self.width * header.channels
        self._transparency = [c for c in header.parts if c[4:8] == b"tRNS"]
        self._chunks = _contents(header.parts)
        self._inflate = zlib.decompressobj()
        self._next = 0  # row
        self._above = b""  # the row before it, unfiltered

    @staticmethod
    def possible(header: Header) -> bool:
        """Whether single rows can be decoded.

        header: the PNG's header.
        """
        return header.whole and header.bits == 8 and header.channels in _MODES

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """The rows that follow those asked for before.

        box: left, top, right and bottom in pixels.

        Raises ImageError, and the errors of Pillow.
        """
        _, top, _, bottom = box
        assert top == self._next and box[0] == 0 and box[2] == self.width
        self._next = bottom
        rows = self._inflated((bottom - top) * self._stride)
        above = b"\0" + self._above if self._above else b""
        part = self._decoded(above + rows)
        if above:
            part = part.crop((0, 1, self.width, part.height))
        self._above = part.crop((0, part.height - 1, self.width, part.height)).tobytes()
        return part

    def _inflated(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            packed = self._inflate.unconsumed_tail or next(self._chunks, b"")
            if not packed or self._inflate.eof:
                raise damaged("the PNG's pixels end early")
            data += self._inflate.decompress(packed, size - len(data))
        return bytes(data)

    def _decoded(self, rows: bytes) -> Image.Image:
        height = len(rows) // self._stride
        head = struct.pack(">IIBBBBB", self.width, height, 8, self._colour, 0, 0, 0)
        parts = (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", head),
            *self._transparency,
            _chunk(b"IDAT", zlib.compress(rows, 0)),
            _chunk(b"IEND", b""),
        )
        image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join(parts)))
        image.load()
        return image


def _contents(chunks: list[memoryview]) -> Iterator[memoryview]:
    """The contents of the chunks of pixels."""
    for chunk in chunks:
        if chunk[4:8] == b"IDAT":
            size = int.from_bytes(chunk[:4], "big")
            if size:
                yield chunk[8 : 8 + size]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
