"""Reads the headers of JPEG and PNG before anything is decoded.

Most people's pictures have these formats, and both carry metadata that Pillow would interpret while
it opens them: damaged metadata raises any exception, and large metadata takes time and memory. So a
file is taken apart here, and Pillow gets only the parts that make pixels.
"""

import re
import struct
import zlib
from dataclasses import dataclass

from seechat_weights.errors import ImageError

MAX_CHUNKS = 100_000  # chunks before the pixels end; a PNG of 256 MB in chunks of 8 kB has 32 000
_FILL = re.compile(rb"\xff+")
_MAX_PROFILE = 1 << 20  # bytes of a compressed text
_MAX_LOOKS = 16  # blocks of metadata that are searched; each takes some milliseconds
_MAX_TAGS = 1000  # of an EXIF block
_ORIENTATION = 0x0112  # the EXIF tag
_PROFILES = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # names of texts in a PNG
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


@dataclass(frozen=True)
class Header:
    """What a JPEG or PNG says of itself, and its bytes without metadata."""

    size: tuple[int, int]
    parts: list[memoryview]  # the bytes from which pixels are made
    orientation: int = 1  # 1 to 8, as EXIF has it
    whole: bool = True  # one pass over the pixels: no second scan, no interlacing
    coefficients: int = 0  # bytes that a JPEG of several scans takes before it becomes pixels
    bits: int = 8  # of a sample
    channels: int = 3
    significant_bits: int | None = None  # of a grey sample

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]


def damaged(why: str) -> ImageError:
    """The error for a damaged file; callers who know its name put it before the message.

    why: what is wrong.
    """
    return ImageError(f"damaged or truncated ({why}); expected a whole picture: get the file again")


def read_jpeg(data: bytes) -> Header:
    """The header of a JPEG.

    data: the file.

    Raises ImageError if the file ends before its pixels.
    """
    view, at = memoryview(data), 2
    kept, orientation, frame, count, looks = [view[:2]], 0, b"", 0, 0
    while True:
        count += 1
        if count > MAX_CHUNKS:
            raise damaged(f"more than {MAX_CHUNKS} segments")
        if fill := _FILL.match(data, at):  # any number of 0xff may precede a marker
            at = fill.end() - 1
        if at + 4 > len(data):
            raise damaged("the JPEG ends in its header")
        if data[at] != 0xFF:  # garbage between segments, which libjpeg skips as well
            at = data.find(b"\xff", at)
            if at < 0:
                raise damaged("the JPEG ends in its header")
            continue
        marker = data[at + 1]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
            continue
        if marker == 0xD9:
            raise damaged("the JPEG has no pixels")
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : end]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = frame or bytes([marker]) + body
        if marker == 0xE1 and not orientation and looks < _MAX_LOOKS:
            if body.startswith((b"Exif\0", b"MM\0*", b"II*\0")):
                looks, orientation = looks + 1, orientation_of_exif(body) or 0
            elif b"ns.adobe.com/xap" in body[:64]:
                looks, orientation = looks + 1, orientation_of_xmp(body) or 0
        if marker == 0xDA:
            break
        if marker in (0xE0, 0xEE) or not (0xE1 <= marker <= 0xEF or marker == 0xFE):
            kept.append(view[at:end])
        at = end
    if len(frame) < 7:
        raise damaged("the JPEG has no frame")
    bits, height, width, components = struct.unpack_from(">BHHB", frame, 1)
    sampling = [frame[8 + 3 * i] for i in range(components) if 8 + 3 * i < len(frame)]
    # in entropy-coded bytes 0 or a restart marker follows 0xff; anything else ends them
    stop = data.find(b"\xff\xd9", at)
    stop = len(data) if stop < 0 else stop + 2
    scans = data.count(b"\xff\xda", at, stop)
    kept.append(view[at:] if scans > 1 else view[at:stop])
    whole = frame[0] in (0xC0, 0xC1) and scans == 1
    return Header(
        (width, height),
        kept,
        orientation or 1,
        whole=whole,
        coefficients=0 if whole else _coefficients(width, height, sampling),
        bits=bits,
        channels=components,
    )


def scans_of(data: bytes) -> int:
    """The largest number of scans that a JPEG may have.

    data: the file.
    """
    return data.count(b"\xff\xda")


def _coefficients(width: int, height: int, sampling: list[int]) -> int:
    """Bytes of the 16-bit coefficients of all components."""
    most_h = max((s >> 4 for s in sampling), default=1) or 1
    most_v = max((s & 15 for s in sampling), default=1) or 1
    area = (width + 8 * most_h) * (height + 8 * most_v)
    return sum(2 * area * (s >> 4) * (s & 15) // (most_h * most_v) for s in sampling)


def read_png(data: bytes) -> Header:
    """The header of a PNG.

    data: the file.

    Raises ImageError if the file ends before its pixels.
    """
    view, at, pieces = memoryview(data), 8, [memoryview(data)[:8]]
    head, orientation, bits, count, looks, pixels = b"", 0, None, 0, 0, False
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 12 + length
        count += 1
        if count > MAX_CHUNKS:
            raise damaged(f"more than {MAX_CHUNKS} chunks")
        if kind == b"CgBI":
            raise ImageError(
                "a PNG as Apple packs it into apps (CgBI); expected an ordinary PNG: open it on "
                "a Mac and save it again"
            )
        if kind == b"IHDR" and not head:
            head = data[at + 8 : at + 8 + length]
        elif kind == b"IDAT":
            pixels = True
        elif kind == b"sBIT" and length == 1:
            bits = data[at + 8] if at + 8 < len(data) else None
        elif (
            not orientation
            and looks < _MAX_LOOKS
            and length <= _MAX_PROFILE
            and (kind == b"eXIf" or data.startswith(_PROFILES, at + 8))
        ):
            looks += 1
            orientation = _orientation_of_chunk(kind, data[at + 8 : at + 8 + length])
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"tRNS" and not pixels):
            pieces.append(view[at:end])
        if kind == b"IEND":
            break
        at = end
    if len(head) < 13 or not pixels:
        raise damaged("the PNG ends before its pixels")
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", head)
    return Header(
        (width, height),
        pieces,
        orientation or 1,
        whole=interlace == 0,
        bits=depth,
        channels={2: 3, 4: 2, 6: 4}.get(colour, 1),
        significant_bits=bits,
    )


def _orientation_of_chunk(kind: bytes, body: bytes) -> int:
    if kind == b"eXIf":
        return orientation_of_exif(body) or 0
    if kind in (b"iTXt", b"zTXt", b"tEXt"):
        name, _, text = body.partition(b"\0")
        if name == _PROFILES[0][:-1]:
            return orientation_of_xmp(_inflated(text) if text[:1] == b"\1" else text) or 0
        if name == _PROFILES[1][:-1]:  # ImageMagick's, as hexadecimal
            text = _inflated(text[1:]) if kind == b"zTXt" else text
            try:
                profile = bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
            except ValueError:
                return 0
            return orientation_of_exif(profile) or 0
    return 0


def _inflated(text: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(text, _MAX_PROFILE)
    except zlib.error:
        return b""


def orientation_of_exif(block: bytes) -> int | None:
    """The orientation, 1 to 8, of an EXIF block, even if other parts of it are damaged.

    block: the EXIF block.
    """
    if block.startswith(b"Exif\0"):
        block = block[6:]
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return None
    found = None
    try:
        (at,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, at)
        for entry in range(at + 2, at + 2 + 12 * min(count, _MAX_TAGS), 12):
            tag, kind, number = struct.unpack_from(order + "HHI", block, entry)
            form = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}.get(kind)
            if tag == _ORIENTATION and form and number == 1:
                (value,) = struct.unpack_from(order + form, block, entry + 8)
                found = value if 1 <= value <= 8 else found
    except struct.error:  # the block ends here
        pass
    return found


def orientation_of_xmp(text: bytes) -> int | None:
    """The orientation, 1 to 8, in a text of XMP; None if it has none.

    text: the XMP.
    """
    found = _XMP.search(text)
    return int(found[1]) if found else None


def webp_size(data: bytes) -> tuple[int, int] | None:
    """The canvas of a WebP; its decoder allocates the canvas as soon as the file is opened.

    data: the file.
    """
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        width, height = int.from_bytes(body[4:7], "little"), int.from_bytes(body[7:10], "little")
        return width + 1, height + 1
    if kind == b"VP8L":
        packed = int.from_bytes(body[1:5], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None
