"""Opens and decodes a picture within bounds of memory, in this process.

worker.py calls this in a process of its own. The runtime itself calls it for pictures whose header
alone makes the cost certain, and where no process can be started.
"""

import importlib
import io
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile

from seechat_lite.pictures import headers
from seechat_lite.pictures.formats import ALIASES, EXPECTED, HEIF, PLUGINS, heif_missing
from seechat_lite.pictures.headers import Header
from seechat_lite.pictures.png_bands import PngBands
from seechat_lite.pictures.reduce import MAX_PIXELS, check_size, too_large
from seechat_weights.errors import ImageError

BUDGET = 360_000_000  # bytes that decoding one picture may take, without its file
# pixels that all scans of a JPEG pass over; 17 passes over the largest picture
MAX_SCANNED = 2_000_000_000
EASY_PIXELS = 16_000_000  # of a baseline JPEG or plain PNG: a quarter of a second, 64 MB
EASY_SIDE = 65_535  # pixels: resizing takes 32 bytes and more for each pixel of a side

# bytes a pixel that a decoder holds beside Pillow's copy, measured (docs/decisions/vision.md)
_DECODER_BYTES = {"WEBP": 13, "AVIF": 14, HEIF: 14, "QOI": 5, "ICO": 5, "CUR": 5}
_JPEG2000_BYTES = 5.5  # the same, for each component
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1}  # in Pillow's copy, by mode; I;16 takes 2, all others 4
_TILE_WIDTH, _TILE_LENGTH, _ROWS_PER_STRIP = 322, 323, 278
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _ORIENTATION = 258, 277, 274
_MAX_SAMPLE_VALUE, _PLANAR = 281, 284


class TooMuchMemoryError(ImageError):
    """There was not enough memory. Decoding found it, not a header."""


@dataclass
class Opened:
    """A picture whose header was read and found to be within bounds."""

    image: Image.Image | PngBands
    orientation: int = 1  # 1 to 8, as EXIF has it
    white: float | None = None  # the value of white, for grey of more than 8 bits
    needs: int = 0  # bytes that decoding takes


def is_easy(header: Header | None) -> bool:
    """Whether a picture is certain to cost little: a JPEG or PNG that is decoded in one pass.

    header: what read_header() returned.
    """
    return (
        header is not None
        and header.whole
        and header.pixels <= EASY_PIXELS
        and header.bits <= 16
        and min(header.size) > 0
        and max(header.size) <= EASY_SIDE
    )


def read_header(data: bytes, format: str) -> Header | None:
    """The header of a JPEG or PNG; None for other formats.

    data: the file.
    format: as formats.identify says.

    Raises ImageError.
    """
    if format == "JPEG":
        return headers.read_jpeg(data)
    return headers.read_png(data) if format == "PNG" else None


def open_picture(
    data: bytes,
    format: str,
    *,
    header: Header | None = None,
    budget: int = BUDGET,
    least: int | None = None,
) -> Opened:
    """Read a picture's header and check its bounds; the picture may then be loaded.

    data: the file.
    format: as formats.identify says.
    header: what read_header() returned, if it was called.
    budget: bytes that decoding may take.
    least: pixels a side that are enough, so that a large JPEG may be decoded at half its size or
        less; None for all pixels.

    Raises ImageError without the file's name.
    """
    header = header or read_header(data, format)
    if header:
        check_size(header.size, "RGB")
        data = b"".join(header.parts)
    if format == "PNG" and header and (large := _in_bands(header, budget, least)):
        return large
    if format == "WEBP" and (size := headers.webp_size(data)):
        check_size(size, "RGB")
        _check_needs(size, "RGBA", format, needs_to_open(data, format), budget)
    if format == "JPEG" and header and headers.scans_of(data) * header.pixels > MAX_SCANNED:
        raise ImageError(
            f"a JPEG of {headers.scans_of(data)} scans; expected a dozen: save it again"
        )
    try:
        image = _open(data, format)
    except ImageError:
        raise
    except Exception as e:  # a plugin fails with almost any exception on damaged data
        if format == "TIFF" and (str(e).isdecimal() or str(e) == "unknown pixel mode"):
            raise _unusual_tiff(e) from None
        raise undecodable(e) from None
    check_size(image.size, image.mode)
    opened = Opened(image)
    if header:
        opened.orientation = header.orientation
        if header.significant_bits and image.mode == "I;16":
            opened.white = _white(header.significant_bits, header.bits, image.mode)
    elif isinstance(block := image.info.get("exif"), bytes):
        opened.orientation = headers.orientation_of_exif(block) or 1
    if opened.orientation == 1 and isinstance(xmp := image.info.get("xmp"), bytes):
        opened.orientation = headers.orientation_of_xmp(xmp) or 1
    if format == "TIFF":
        _look_at_tiff(opened)
    if format == "JPEG" and header:
        _choose_scale(opened, header, budget=budget, least=least)
    opened.needs = max(opened.needs, _needs(image, format, header))
    _check_needs(image.size, image.mode, format, opened.needs, budget)
    return opened


def _unusual_tiff(error: Exception) -> ImageError:
    """What is sound and of a kind that Pillow does not have, which names a compression's number."""
    kind = f"compression {error}" if str(error).isdecimal() else str(error)
    return ImageError(
        f"a TIFF of a kind that is not read ({kind}); expected samples of 8 or 16 bits, compressed "
        "by LZW, Deflate or JPEG: save it again, or as PNG"
    )


def _in_bands(header: Header, budget: int, least: int | None) -> Opened | None:
    """A PNG that would not fit is opened as bands of some rows, if that is possible."""
    if header.pixels * 4 <= budget or least is None or not PngBands.possible(header):
        return None
    # not a very thin picture, and one that is at most mirrored left to right
    if max(header.size) * least > MAX_PIXELS or header.orientation > 2:
        return None
    return Opened(PngBands(header), header.orientation)


def _check_needs(size: tuple[int, int], mode: str, format: str, needs: int, budget: int) -> None:
    if needs > budget:
        raise too_large(
            f"{size[0]}×{size[1]} pixels take {needs // 10**6} MB to decode ({format}, {mode})",
            f"{budget // 10**6} MB",
        )


def needs_to_open(data: bytes, format: str) -> int:
    """About how many bytes are taken as soon as a file is opened.

    data: the file.
    format: as formats.identify says.
    """
    size = headers.webp_size(data) if format == "WEBP" else None
    return size[0] * size[1] * (4 + _DECODER_BYTES[format]) if size else 0


def load(opened: Opened) -> Image.Image | PngBands:
    """Decode a picture.

    opened: what open_picture() returned.

    Raises ImageError without the file's name.
    """
    if isinstance(opened.image, PngBands):
        return opened.image
    try:
        opened.image.load()
    except Exception as e:  # Pillow's decoders fail with almost any exception on damaged data
        raise undecodable(e) from None
    # an icon may hold a picture of another size than it says
    check_size(opened.image.size, opened.image.mode)
    return opened.image


def check_opened(image: Image.Image) -> None:
    """Refuse a picture that somebody else opened and did not load, and one that takes too much.

    image: the picture.

    Raises ImageError without the file's name.
    """
    format = ALIASES.get(image.format or "", image.format or "")
    if format not in (*PLUGINS, HEIF):
        raise ImageError(f"opened as {format or 'nothing'}; expected {EXPECTED}: save it as PNG")
    check_size(image.size, image.mode)
    opened = Opened(image)
    if format == "TIFF":
        _look_at_tiff(opened)
    needs = max(opened.needs, _needs(image, format, None))
    _check_needs(image.size, image.mode, format, needs, BUDGET)


def undecodable(error: Exception) -> ImageError:
    """The error for a decoder's exception.

    error: the exception.
    """
    if isinstance(error, MemoryError):
        return too_much_memory()
    # the second is a warning that the worker, or the host application, has turned into an error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return too_large("too many pixels", f"{MAX_PIXELS // 10**6} million")
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    if "out of memory" in why:
        return too_much_memory()
    return headers.damaged("".join(c if c.isprintable() else "?" for c in why))


def too_much_memory() -> TooMuchMemoryError:
    """The error for a picture that the memory cannot hold."""
    return TooMuchMemoryError(
        f"decoding takes more than {BUDGET // 10**6} MB; expected at most {MAX_PIXELS // 10**6} "
        "million pixels, and ordinary ones: make the picture smaller, or save it as PNG"
    )


def _open(data: bytes, format: str) -> ImageFile.ImageFile:
    file = io.BytesIO(data)
    if format == HEIF:
        return _open_heif(file)
    plugin: Any = importlib.import_module(f"PIL.{PLUGINS[format]}")
    if format == "JPEG":  # not by jpeg_factory: it looks for further pictures in the metadata
        return plugin.JpegImageFile(file, "")
    if format == "AVIF":
        if not plugin.SUPPORTED:
            raise ImageError(
                "an AVIF picture, which this Pillow was built without; expected another format: "
                "save it as PNG, or install a Pillow that reads AVIF"
            )
        plugin.DEFAULT_MAX_THREADS = 2
    if format not in Image.OPEN:
        raise ImageError(
            f"a {format} picture, which this Pillow does not read; expected another format: save "
            "it as PNG"
        )
    factory = Image.OPEN[format][0]
    return factory(file, "")  # pyright: ignore[reportReturnType]


def _open_heif(file: io.BytesIO) -> ImageFile.ImageFile:
    try:
        from pillow_heif import HeifImageFile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise heif_missing() from None
    return HeifImageFile(file, "")


def _needs(image: Image.Image, format: str, header: Header | None) -> int:
    """About how many bytes decoding takes."""
    mode = image.mode
    each = 2 if mode.startswith("I;16") else _PIXEL_BYTES.get(mode, 4)
    each += _DECODER_BYTES.get(format, 0)
    if format in ("JPEG2000", "ICNS"):
        each += _JPEG2000_BYTES * len(image.getbands())
    coefficients = header.coefficients if header else 0
    return int(image.width * image.height * each) + coefficients


def _choose_scale(opened: Opened, header: Header, *, budget: int, least: int | None) -> None:
    """Choose to decode a JPEG at a half, a quarter or an eighth, if it would not fit otherwise."""
    image = opened.image
    width, height = image.size
    if least is None or image.mode not in ("L", "RGB") or isinstance(image, PngBands):
        return
    for scale in (1, 2, 4, 8):
        small = math.ceil(width / scale), math.ceil(height / scale)
        if scale > 1 and min(small) < 2 * least:
            return
        each = _PIXEL_BYTES.get(image.mode, 4)
        if small[0] * small[1] * each + header.coefficients <= budget:
            if scale > 1:
                image.draft(image.mode, small)
            return


def _white(bits: int, depth: int, mode: str) -> float | None:
    """White of grey samples in which `bits` of `depth` bits count, as PNG's sBIT says.

    PNG requires samples to be scaled up to the full depth, so that white stays where it is. Samples
    that are found to be smaller were not scaled.
    """
    return None if bits >= depth else float(2**bits - 1)


def _look_at_tiff(opened: Opened) -> None:
    """Find the buffer of a tile or strip, which may be larger than the picture, and the white."""
    image: Any = opened.image
    tags = image.tag_v2

    def number(tag: int, default: int) -> int:
        value = tags.get(tag, default)
        if isinstance(value, tuple):
            value = max((v for v in value if isinstance(v, int)), default=default)
        return value if isinstance(value, int) else default

    width, height = image._tile_size if hasattr(image, "_tile_size") else image.size
    if _TILE_WIDTH in tags or _TILE_LENGTH in tags:
        tile = number(_TILE_WIDTH, width) * number(_TILE_LENGTH, height)
    else:
        tile = width * min(height, number(_ROWS_PER_STRIP, height))
    samples = number(_SAMPLES_PER_PIXEL, 1)
    bits = number(_BITS_PER_SAMPLE, 1)
    # a tile as it is stored, or as libtiff makes RGBA of it
    buffer = tile * max(4 if image.mode in ("RGB", "RGBA") else 1, samples * ((bits + 7) // 8))
    opened.needs = buffer + _needs(image, "TIFF", None)
    # Pillow makes an upright copy of a TIFF while it loads it
    orientation = tags.get(_ORIENTATION)
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        opened.needs += _needs(image, "TIFF", None)
    opened.orientation = 1
    if image.mode.startswith("I") or image.mode == "F":
        stated = tags.get(_MAX_SAMPLE_VALUE)
        if isinstance(stated, tuple):
            stated = stated[0] if stated else None
        if isinstance(stated, int | float) and stated > 0:
            opened.white = float(stated)
        elif image.mode.startswith("I;16") and 8 < bits < 16:
            opened.white = float(2**bits - 1)
