"""Pictures: from a path, bytes or a PIL image to the pixels that a vision tower was trained on.

A picture is refused before it is decoded if its header promises too many pixels, and decoded once.
How it becomes pixels is the bundle's `PixelSpec`: either what the published code does to the last
bit, for comparisons, or the same resize of a picture that was first turned upright, laid on a
background where it is transparent, and scaled down to 8 bits where it has more.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from seechat_weights.bundle import PixelSpec
from seechat_weights.errors import BundleError, ImageError
from seechat_weights.files import LFS_POINTER

MAX_PIXELS = 112_000_000  # a 108-megapixel phone photo passes; decoded, this is 450 MB
BAND_PIXELS = 16_000_000  # larger ones become pixels some rows at a time: no second half gigabyte
MAX_BYTES = 256 << 20  # of a picture's file

_ORIENTATION = 0x0112  # the EXIF tag
_VECTOR_FORMATS = ("EPS", "WMF")  # Pillow would start another program to draw them
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Picture:
    """A decoded picture and the name of its content: the same content has the same key."""

    image: Image.Image
    key: str  # sha256, hexadecimal: of the file's bytes, or of a PIL image's pixels and palette


def load_image(source: str | Path | bytes | Image.Image) -> Picture:
    """Read and decode a picture; of an animation the first frame.

    Raises ImageError: missing, empty, truncated, no picture, or more than MAX_PIXELS pixels.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, bytes):
        return _from_bytes(source, "image bytes")
    path = Path(source)
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f"{path}: not a file; expected a picture: name one picture file")
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(
                f"{path}: {path.stat().st_size >> 20} MB; expected a picture of at most "
                f"{MAX_BYTES >> 20} MB: make it smaller"
            )
        with path.open("rb") as f:
            # the header first: a picture that is none, or too large, is not read to the end
            _open(f, str(path))
            f.seek(0)
            data = f.read()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; expected a picture: check the path") from None
    except (OSError, ValueError) as e:  # ValueError: a null character in the path
        raise ImageError(f"{path}: cannot be read ({e}); expected a picture: check it") from None
    return _from_bytes(data, str(path))


def pixels(image: Image.Image, spec: PixelSpec) -> np.ndarray:
    """A vision graph's input: float32 [3, image_size, image_size], normalized as `spec` says.

    Raises ImageError for a colour space that Pillow cannot convert, BundleError for an unknown
    resize or interpolation.
    """
    if spec.resize not in ("squash", "crop", "pad") or spec.interpolation not in _FILTERS:
        raise BundleError(
            f"pixels: resize {spec.resize!r} with {spec.interpolation!r}; expected squash, crop or "
            f"pad with one of {', '.join(_FILTERS)}: export the model again"
        )
    if spec.exact:
        if image.mode.startswith("I;16"):
            image = image.convert("I")  # from where 16 bits saturate at 255, as published
        if spec.rgb_first:
            image = _convert(image, "RGB")
    else:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if not _in_bands(image, spec):
            image = _sensible_rgb(image, spec.background)
    if spec.resize == "squash":
        image = _resize(image, (spec.image_size, spec.image_size), spec)
    elif spec.resize == "crop":
        image = _resize_and_crop(image, spec)
    else:
        image = image if _in_bands(image, spec) else _convert(image, "RGB")
        image = _resize_and_pad(image, spec)
    levels = np.asarray(_convert(image, "RGB"), dtype=np.float32) / np.float32(255)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    normal = (levels - mean) / std  # [S, S, 3]
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def _from_pil(image: Image.Image) -> Picture:
    _check_size(image, "PIL image")
    try:
        image = image.copy()  # the caller may go on drawing on its own
        content = image.tobytes()
    except Exception as e:
        raise _undecodable("PIL image", e) from None
    palette = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    meaning = (image.mode, image.size, palette, image.info.get("transparency"), _orientation(image))
    digest = hashlib.sha256(repr(meaning).encode())
    digest.update(content)
    return Picture(image, digest.hexdigest())


def _from_bytes(data: bytes, name: str) -> Picture:
    image = _open(io.BytesIO(data), name)
    try:
        image.load()
    # Pillow's decoders fail with almost any exception on damaged data
    except Exception as e:
        raise _undecodable(name, e) from None
    return Picture(image, hashlib.sha256(data).hexdigest())


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Read a picture's header and refuse what must not be decoded."""
    head = file.read(len(LFS_POINTER))
    file.seek(0)
    if not head:
        raise ImageError(f"{name}: empty; expected a picture: check the file")
    if head == LFS_POINTER:
        raise ImageError(
            f"{name}: a Git LFS pointer, not the picture itself; expected a picture: "
            "run `git lfs pull`"
        )
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not a picture; expected PNG, JPEG, WebP, BMP, GIF, TIFF or another format "
            "that Pillow reads: check the file or convert it"
        ) from None
    # the second is a warning that the host application has made an error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "too many") from None
    except Exception as e:
        raise _undecodable(name, e) from None
    _check_size(image, name)
    if image.format in _VECTOR_FORMATS:
        raise ImageError(
            f"{name}: a vector drawing ({image.format}); expected a picture made of pixels: "
            "save it as PNG"
        )
    return image


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}×{height}")
    if image.mode in ("I", "F") and width * height > BAND_PIXELS:
        raise ImageError(
            f"{name}: {width}×{height} pixels of 32 bits; expected at most "
            f"{BAND_PIXELS // 10**6} million of these: make the picture smaller"
        )
    if not width or not height:
        raise ImageError(f"{name}: {width}×{height} pixels; expected a picture: choose another")


def _too_large(name: str, size: str) -> ImageError:
    return ImageError(
        f"{name}: {size} pixels; expected at most {MAX_PIXELS // 10**6} million: "
        "make the picture smaller"
    )


def _undecodable(name: str, error: Exception) -> ImageError:
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ImageError(
        f"{name}: damaged or truncated ({why}); expected a whole picture: get the file again"
    )


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    try:
        return image.convert(mode)
    except ValueError:
        raise ImageError(
            f"a picture in colour mode {image.mode}; expected one that converts to {mode}: "
            "save it as RGB"
        ) from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the picture
        return 1


def _sensible_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """8 bits, opaque RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, _convert(image, "RGBA"))
    return _convert(image, "RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats to 8 bits.

    Integers that fit 16 bits have that range; for others, whose range no file states, black is the
    smallest and white the largest value.
    """
    grey = np.asarray(image, dtype=np.float64)  # [height, width]
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    low, high = grey.min(), grey.max()
    if image.mode != "F" and low >= 0 and high < 65536:
        low, high = 0, 65535
    scaled = (grey - low) / ((high - low) or 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    spec: PixelSpec,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Resize the part `box` of an image, the horizontal pass first.

    Pillow rounds to 8 bits between its two passes, and newer versions start with the vertical one
    for some shapes: on hard edges that is up to 10 levels off the published pixels. Two resizes
    along one axis each give the same on every version.
    """
    resample = _FILTERS[spec.interpolation]
    if _in_bands(image, spec):
        return _resize_in_bands(image, size, spec, box or (0, 0, *image.size))
    # bilevel and palette pictures cannot be averaged: Pillow takes the nearest pixel
    if image.mode in ("1", "P") or resample == Image.Resampling.NEAREST:
        return image.resize(size, Image.Resampling.NEAREST, box)
    # colours are averaged by their opacity, which Pillow does within a single resize
    premultiplied = {"RGBA": "RGBa", "LA": "La"}.get(image.mode)
    if premultiplied:
        return _resize(image.convert(premultiplied), size, spec, box).convert(image.mode)
    left, top, right, bottom = box or (0, 0, *image.size)
    if size[0] * image.height > MAX_PIXELS:  # a thread of a picture would grow without bound
        image = image.resize((image.width, size[1]), resample, (0, top, image.width, bottom))
        return image.resize(size, resample, (left, 0, right, size[1]))
    image = image.resize((size[0], image.height), resample, (left, 0, right, image.height))
    return image.resize(size, resample, (0, top, size[0], bottom))


def _in_bands(image: Image.Image, spec: PixelSpec) -> bool:
    """Whether a picture is too large for copies of it, and not so thin that bands are no help."""
    large = image.width * image.height > BAND_PIXELS
    return large and not spec.exact and spec.image_size * image.height <= MAX_PIXELS


def _resize_in_bands(
    image: Image.Image, size: tuple[int, int], spec: PixelSpec, box: tuple[float, ...]
) -> Image.Image:
    """The same for a picture whose copies would fill the memory: some rows at a time.

    The horizontal pass takes every row by itself, so that the pixels are the same.
    """
    resample = _FILTERS[spec.interpolation]
    left, top, right, bottom = box
    rows = max(1, BAND_PIXELS // 16 // image.width)
    narrow = Image.new("RGB", (size[0], image.height))
    for y in range(0, image.height, rows):
        band = image.crop((0, y, image.width, min(y + rows, image.height)))
        band = _sensible_rgb(band, spec.background)
        part = (left, 0, right, band.height)
        narrow.paste(band.resize((size[0], band.height), resample, part), (0, y))
    return narrow.resize(size, resample, (0, top, size[0], bottom))


def _resize_and_crop(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Shorter side to image_size, then the centre (torchvision's Resize and CenterCrop)."""
    size, (width, height) = spec.image_size, image.size
    short = min(width, height)
    new = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2) for side in new)
    # Resizing only what remains differs by float32 rounding of the box, and keeps a picture of
    # 1 x 5000 pixels from growing to 224 x 1120000 first
    if spec.exact and max(new) <= 64 * size:
        return _resize(image, new, spec).crop((left, top, left + size, top + size))
    x, y = width / new[0], height / new[1]  # source pixels of one new pixel
    right, bottom = min(width, (left + size) * x), min(height, (top + size) * y)
    return _resize(image, (size, size), spec, (left * x, top * y, right, bottom))


def _resize_and_pad(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Longer side to image_size, in the middle of a square of the background colour."""
    size, long = spec.image_size, max(image.size)
    new = (
        max(1, round(size * image.width / long)),
        max(1, round(size * image.height / long)),
    )
    square = Image.new("RGB", (size, size), spec.background)
    square.paste(_resize(image, new, spec), ((size - new[0]) // 2, (size - new[1]) // 2))
    return square
