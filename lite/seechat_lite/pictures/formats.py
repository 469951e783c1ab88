"""Finds a file's format by its first bytes: one that is read, or the name of what it is instead.

Only the formats listed here are opened. Pillow knows some forty formats. Of the others, some open
further formats inside themselves or start programs (IPTC, EPS, WMF, FPX, MIC and the stubs), some
are rare outside of games and observatories, and the decoders of some are no longer maintained.
"""

import struct
from pathlib import PurePosixPath

from seechat_weights.errors import ImageError

# format -> the module of Pillow that reads it
PLUGINS = {
    "AVIF": "AvifImagePlugin",
    "BMP": "BmpImagePlugin",
    "CUR": "CurImagePlugin",
    "DIB": "BmpImagePlugin",
    "GIF": "GifImagePlugin",
    "ICNS": "IcnsImagePlugin",
    "ICO": "IcoImagePlugin",
    "JPEG": "JpegImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "PCX": "PcxImagePlugin",
    "PNG": "PngImagePlugin",
    "PPM": "PpmImagePlugin",
    "QOI": "QoiImagePlugin",
    "TGA": "TgaImagePlugin",
    "TIFF": "TiffImagePlugin",
    "WEBP": "WebPImagePlugin",
}
HEIF = "HEIF"  # read if the package pillow-heif is installed
# names that Pillow gives to pictures of these formats
ALIASES = {"MPO": "JPEG"}
# endings of names; a file that is named itself needs none of them
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "cur", "dib", "gif", "heic", "heif", "icns", "ico", "j2k", "jfif"),
        *("jp2", "jpe", "jpeg", "jpf", "jpg", "jpx", "mpo", "pbm", "pcx", "pgm", "png", "pnm"),
        *("ppm", "qoi", "tga", "tif", "tiff", "webp"),
    )
)
EXPECTED = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or the like"
HEAD = 4096  # bytes of a file that identify() reads, besides its end

_HEIC = (
    "a HEIC photo, as iPhones take them",
    "save it as JPEG (iPhone: Settings, Camera, Formats, Most Compatible) or install pillow-heif",
)
_VIDEO = ("a video", "save one picture of it as PNG or JPEG")
_RAW = ("a camera's raw file", "develop it, or save its preview, as JPEG")
_ARCHIVE = ("an archive", "unpack it and name the picture in it")
_VECTOR = ("a vector drawing", "save it as PNG")
_OTHER_PROGRAM = "open it with the program it belongs to and save it as PNG"
_SAVE = "save it as PNG or JPEG"

_STARTS: list[tuple[bytes, str]] = [
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"icns", "ICNS"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"qoif", "QOI"),
]
# what a file is, and what to do about it
_FOREIGN: list[tuple[int, bytes, tuple[str, str]]] = [
    (0, b"%PDF", ("a PDF document", "save the page, or the picture in it, as PNG")),
    (0, b"%!", (_VECTOR[0] + " (PostScript)", _VECTOR[1])),
    (0, b"\xc5\xd0\xd3\xc6", (_VECTOR[0] + " (EPS)", _VECTOR[1])),
    (0, b"\xd7\xcd\xc6\x9a", (_VECTOR[0] + " (WMF)", _VECTOR[1])),
    (0, b"\x01\0\x09\0\0\x03", (_VECTOR[0] + " (WMF)", _VECTOR[1])),
    (40, b" EMF", (_VECTOR[0] + " (EMF)", _VECTOR[1])),
    (0, b"8BPS", ("a Photoshop document", "save it as PNG or JPEG")),
    (0, b"gimp xcf", ("a GIMP document", "export it as PNG or JPEG")),
    (0, b"DDS ", ("a DDS texture", _SAVE)),
    (0, b"\x76\x2f\x31\x01", ("an OpenEXR picture", _SAVE)),
    (0, b"#?RADIANCE", ("a Radiance HDR picture", _SAVE)),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", ("a JPEG XL picture", _SAVE)),
    (0, b"\xff\x0a", ("a JPEG XL picture", _SAVE)),
    (0, b"\x57\x4d\x50\x48\x4f\x54\x4f", ("a JPEG XR picture", _SAVE)),
    (0, b"II\xbc\x01", ("a JPEG XR picture", _SAVE)),
    (0, b"BPG\xfb", ("a BPG picture", _SAVE)),
    (0, b"AT&TFORM", ("a DjVu document", "save the page as PNG")),
    (0, b"SIMPLE  =", ("a FITS file", _SAVE)),
    (0, b"\x89HDF", ("an HDF5 file", _SAVE)),
    (0, b"GRIB", ("a GRIB file", _SAVE)),
    (0, b"BUFR", ("a BUFR file", _SAVE)),
    (128, b"DICM", ("a DICOM file", "export the picture in it as PNG")),
    (0, b"IIRO", _RAW),
    (0, b"IIRS", _RAW),
    (0, b"MMOR", _RAW),
    (0, b"IIU\0", _RAW),
    (0, b"FUJIFILMCCD-RAW", _RAW),
    (0, b"FOVb", _RAW),
    (0, b"PK\x03\x04", ("a zip archive or an Office document", _ARCHIVE[1])),
    (0, b"PK\x05\x06", ("an empty zip archive", _ARCHIVE[1])),
    (0, b"\x1f\x8b", _ARCHIVE),
    (0, b"7z\xbc\xaf'\x1c", _ARCHIVE),
    (0, b"Rar!", _ARCHIVE),
    (0, b"BZh", _ARCHIVE),
    (0, b"\xfd7zXZ", _ARCHIVE),
    (0, b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (257, b"ustar", _ARCHIVE),
    (0, b"\xd0\xcf\x11\xe0", ("an Office document of old, or thumbnails", _OTHER_PROGRAM)),
    (
        0,
        b"\0\x05\x16\x07",
        ("a macOS companion file (._name)", "name the picture that it belongs to"),
    ),
    (0, b"\0\x05\x16\0", ("a macOS companion file", "name the picture that it belongs to")),
    (0, b"\x1a\x45\xdf\xa3", _VIDEO),
    (0, b"FLV\x01", _VIDEO),
    (0, b"\0\0\x01\xba", _VIDEO),
    (0, b"\0\0\x01\xb3", _VIDEO),
    (0, b"OggS", ("a sound or a video", _VIDEO[1])),
    (0, b"ID3", ("a sound", "name a picture")),
    (0, b"fLaC", ("a sound", "name a picture")),
    (0, b"bplist0", ("a macOS property list", "name the picture itself")),
    (0, b"\x7fELF", ("a program", "name a picture")),
    (0, b"MZ", ("a program", "name a picture")),
    (0, b"\x1c\x03", ("an IPTC record", _SAVE)),
    (0, b"\x1c\x01", ("an IPTC record", _SAVE)),
    (0, b"\x1c\x02", ("an IPTC record", _SAVE)),
    (0, b"P7", ("a PAM picture", _SAVE)),
    (0, b"PF", ("a PFM picture in colour", _SAVE)),
    (
        0,
        b"version https://git-lfs",
        ("a Git LFS pointer, which stands for the file", "run `git lfs pull`"),
    ),
]
_DIB_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes
_DNG_VERSION, _SUBFILE_TYPE, _SUB_IFDS = 50706, 254, 330  # TIFF tags


def is_picture_name(name: str) -> bool:
    """Whether a file is named like a picture.

    name: the file's name or path.
    """
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def identify(head: bytes, end: bytes = b"") -> str:
    """The format of a file: a key of PLUGINS, or HEIF.

    head: its first HEAD bytes.
    end: its last bytes, where TGA has its mark.

    Raises ImageError without the file's name: empty, or another format, which it names.
    """
    if not head:
        raise ImageError("empty; expected a picture: check the file")
    if found := _identify(head, end):
        return found
    what, advice = _name(head)
    raise ImageError(f"{what}, not a picture; expected {EXPECTED}: {advice}")


def _identify(head: bytes, end: bytes) -> str | None:
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _from_brands(head)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*"):
        return None if _is_raw(head) else "TIFF"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (*_DIB_HEADERS, 16):
        return "BMP"
    kind, count = head[:4], int.from_bytes(head[4:6], "little")
    if count and kind in (b"\0\0\1\0", b"\0\0\2\0"):
        return "ICO" if kind[2] == 1 else "CUR"
    if head[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf") and head[2:3] in (
        *(b" ", b"\t", b"\r", b"\n", b"#"),
    ):
        return "PPM"
    if head[:1] == b"\n" and len(head) > 128 and head[1] in (0, 2, 3, 4, 5) and head[2] == 1:
        return "PCX"
    if len(head) > 16 and int.from_bytes(head[:4], "little") in _DIB_HEADERS:
        planes = head[8:10] if head[0] == 12 else head[12:14]
        if planes == b"\1\0":
            return "DIB"
    return "TGA" if _is_tga(head, end) else None


def _from_brands(head: bytes) -> str | None:
    """The format of a file of the MP4 family, from its box `ftyp`."""
    length = min(int.from_bytes(head[:4], "big"), len(head), 512)
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, length - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}:
        return HEIF
    return None


def _is_raw(head: bytes) -> bool:
    """Whether a TIFF is a camera's raw file, whose first picture is a thumbnail."""
    if head[8:10] == b"CR":
        return True
    order = "<" if head[:2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(order + "I", head, 4)
        (count,) = struct.unpack_from(order + "H", head, at)
        tags = {}
        for i in range(min(count, 512)):
            tag, _, _, value = struct.unpack_from(order + "HHII", head, at + 2 + 12 * i)
            tags[tag] = value
    except struct.error:  # the directory is further on, which no camera does
        return False
    return _DNG_VERSION in tags or (_SUB_IFDS in tags and tags.get(_SUBFILE_TYPE) == 1)


def _is_tga(head: bytes, end: bytes) -> bool:
    """Whether this is a TGA: without a mark at its beginning, and only newer files end in one."""
    if len(head) < 19 or head[1] > 1 or head[2] not in (1, 2, 3, 9, 10, 11):
        return False
    width, height = struct.unpack_from("<HH", head, 12)
    if not width or not height or head[16] not in (1, 8, 16, 24, 32):
        return False
    if end.endswith(b"TRUEVISION-XFILE.\0"):
        return True
    mapped = head[2] in (1, 9)
    return mapped == bool(head[1]) and (mapped or head[3:8] == bytes(5)) and head[17] & 0xC0 == 0


def _name(head: bytes) -> tuple[str, str]:
    """What a file is that cannot be read, and what to do about it."""
    for at, mark, name in _FOREIGN:
        if head[at : at + len(mark)] == mark:
            return name
    if head[4:8] == b"ftyp":
        return _RAW if head[8:12] == b"crx " else _VIDEO
    if head[:4] == b"RIFF":
        return _VIDEO if head[8:12] == b"AVI " else ("a sound or a video", _VIDEO[1])
    if head[:4] in (b"II*\0", b"MM\0*"):
        return _RAW
    if not any(head):
        return "nothing but zeros", "the download is not complete: get the file again"
    text = _as_text(head)
    if text is None:
        return "unknown data", "check the file or convert it"
    start = text.lstrip("\ufeff \t\r\n").lower()
    if "<svg" in start:
        return _VECTOR[0] + " (SVG)", _VECTOR[1]
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in start:
        return "a web page", "save the picture in it, not the page"
    if start.startswith("<"):
        return "an XML document", "an address may have answered with an error: open it as text"
    if start.startswith(("{", "[")):
        return "JSON", "an address may have answered with an error: open it as text"
    if start.startswith("data:"):
        return "the text of a data: URL", "pass the text itself, or decode it"
    if start.startswith(("/9j/", "ivborw0kgg", "r0lgod", "uklgr")):
        return "the text of base64", "decode it"
    return "text", "check the file"


def _as_text(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return head.decode("utf-16", "replace")
    for cut in range(4):  # the head may end inside a character
        try:
            text = head[: len(head) - cut].decode()
        except UnicodeDecodeError:
            continue
        return None if any(c < " " and c not in "\t\r\n\f\x1b" for c in text) else text
    return None


def heif_missing() -> ImageError:
    """The error for a HEIF picture if pillow-heif is not installed."""
    return ImageError(f"{_HEIC[0]}; expected {EXPECTED}: {_HEIC[1]}")
