"""Turns a decoded picture into the square of levels that a vision tower was trained on.

The bundle's `PixelSpec` says how. Either this does what the published code does, to the last bit,
for comparisons. Or it first turns the picture upright, lays it on a background where it is
transparent, and scales it to 8 bits if it has more; then it resizes in the same way.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

from PIL import Image

from seechat_lite.pictures.png_bands import PngBands
from seechat_weights.errors import ImageError

MAX_PIXELS = 112_000_000  # a 108-megapixel phone photo passes
BAND_PIXELS = 16_000_000  # larger pictures become levels some rows at a time, so no copies are made
SQUARE_PIXELS = 400_000_000  # of a picture with its bars, in "square": more take seconds
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# the operation that makes a picture upright, by its EXIF orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# the largest sample values of cameras, scanners and detectors
_WHITES = (255, 1023, 4095, 16383, 65535)

Box = tuple[float, float, float, float]


class Spec(Protocol):
    """The part of seechat_weights.config.PixelSpec that is read here."""

    @property
    def image_size(self) -> int: ...
    @property
    def resize(self) -> str: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def background(self) -> tuple[int, int, int]: ...
    @property
    def exact(self) -> bool: ...
    @property
    def rgb_first(self) -> bool: ...


def reduce(
    image: Image.Image | PngBands, spec: Spec, *, orientation: int = 1, white: float | None = None
) -> Image.Image:
    """The picture as RGB, spec.image_size a side.

    image: the picture.
    spec: how pictures become pixels.
    orientation: 1 to 8, as EXIF has it; ignored if spec.exact.
    white: the value of white in grey of more than 8 bits, if the file says so.

    Raises ImageError for a colour space that Pillow cannot convert.
    """
    check_size(image.size, image.mode)
    if isinstance(image, PngBands):
        rgb = _sensible(None, spec.background, white)
        return convert(_Resizing(spec)(_Large(image, orientation, rgb)), "RGB")
    if spec.exact:
        if image.mode.startswith("I;16"):
            image = image.convert("I")  # from this mode 16 bits saturate at 255, as published
        if spec.rgb_first:
            image = convert(image, "RGB")
        return convert(_Resizing(spec)(image), "RGB")
    sensible = _sensible(image, spec.background, white)
    if _in_bands(image, spec):
        whole: Image.Image | _Large = _Large(image, orientation, sensible)
    else:
        whole = sensible(turned(image, orientation))
    return convert(_Resizing(spec)(whole), "RGB")


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright.

    image: the image.
    orientation: 1 to 8, as EXIF has it.
    """
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def check_size(size: tuple[int, int], mode: str) -> None:
    """Check the number of pixels.

    size: width and height.
    mode: Pillow's name of the colour mode.

    Raises ImageError, without the file's name, for more pixels than are read.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise too_large(f"{width}×{height} pixels", f"{MAX_PIXELS // 10**6} million")
    if mode in ("I", "F") and width * height > BAND_PIXELS:
        raise too_large(
            f"{width}×{height} pixels of 32 bits", f"{BAND_PIXELS // 10**6} million of these"
        )
    if not width or not height:
        raise ImageError(
            f"{width}×{height} pixels; expected a picture with pixels: choose another one"
        )


def too_large(what: str, limit: str) -> ImageError:
    """The error for a picture that is too large.

    what: what is too large, in words.
    limit: how much is allowed, in words.
    """
    return ImageError(f"{what}; expected at most {limit}: make the picture smaller")


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to another colour mode.

    image: the image.
    mode: Pillow's name of the mode.

    Raises ImageError for a colour space that Pillow cannot convert.
    """
    if image.mode == mode:
        return image
    try:
        if image.mode == "LAB":
            return _from_lab(image).convert(mode)
        return image.convert(mode)
    # a palette that is missing or short raises other errors than ValueError
    except (ValueError, KeyError, AttributeError, TypeError, ImportError, OSError):
        raise ImageError(
            f"a picture in colour mode {image.mode}; expected one that converts to {mode}: "
            "save it as RGB"
        ) from None


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # not None, as this is not in place
    return converted


class _Large:
    """A picture too large to copy, seen as if it were turned upright."""

    def __init__(
        self,
        image: Image.Image | PngBands,
        orientation: int,
        sensible: Callable[[Image.Image], Image.Image],
    ) -> None:
        self._image = image
        self._orientation = orientation
        self._sensible = sensible
        width, height = image.size
        self.width, self.height = (height, width) if orientation >= 5 else (width, height)
        self.size = self.width, self.height

    def resize(self, size: tuple[int, int], resample: Image.Resampling, box: Box) -> Image.Image:
        """Resize some rows at a time: the horizontal pass treats every row by itself."""
        left, top, right, bottom = box
        step = max(1, BAND_PIXELS // 16 // self.width)
        narrow = Image.new("RGB", (size[0], self.height))
        for y in range(0, self.height, step):
            rows = self.rows(y, min(y + step, self.height))
            part = (left, 0, right, rows.height)
            narrow.paste(rows.resize((size[0], rows.height), resample, part), (0, y))
        return narrow.resize(size, resample, (0, top, size[0], bottom))

    def rows(self, top: int, bottom: int) -> Image.Image:
        """Some rows of the upright picture, RGB.

        top: the first row.
        bottom: the row after the last.
        """
        width, height = self._image.size
        box = {
            3: (0, height - bottom, width, height - top),
            4: (0, height - bottom, width, height - top),
            5: (top, 0, bottom, height),
            6: (top, 0, bottom, height),
            7: (width - bottom, 0, width - top, height),
            8: (width - bottom, 0, width - top, height),
        }.get(self._orientation, (0, top, width, bottom))
        return self._sensible(turned(self._image.crop(box), self._orientation))


def _in_bands(image: Image.Image, spec: Spec) -> bool:
    """Whether a picture is too large to copy, and not so thin that bands do not help."""
    large = image.width * image.height > BAND_PIXELS
    return large and spec.image_size * max(image.size) <= MAX_PIXELS


def _sensible(
    image: Image.Image | None, background: tuple[int, int, int], white: float | None
) -> Callable[[Image.Image], Image.Image]:
    """Return what turns a part of this image (None: one of 8 bits) into opaque RGB of 8 bits."""
    if image and (image.mode.startswith("I") or image.mode == "F"):
        low, high = _range(image, white)
        return lambda part: _to_8_bits(part, low, high).convert("RGB")

    def rgb(part: Image.Image) -> Image.Image:
        if part.has_transparency_data:
            canvas = Image.new("RGBA", part.size, (*background, 255))
            part = Image.alpha_composite(canvas, convert(part, "RGBA"))
        return convert(part, "RGB")

    return rgb


def _range(image: Image.Image, white: float | None) -> tuple[float, float]:
    """The values of black and white in grey of more than 8 bits.

    Integers that fit 16 bits have the width that the file says, else the smallest usual width that
    holds them: twelve bits are often kept in sixteen. Floats are 0 to 1 or 0 to 255 if they fill
        that
    range. For all others nothing states the range: black is the smallest value and white the
    largest.
    """
    if image.mode == "F":
        low, high = _finite_range(image)
        if white and low >= 0 and high <= white:
            return 0.0, white
        for usual in (1.0, 255.0):
            if low >= 0 and usual / 16 <= high <= usual:
                return 0.0, usual
        return low, high
    smallest, largest = image.getextrema()  # of one band
    low, high = float(smallest), float(largest)  # pyright: ignore[reportArgumentType]
    if low < 0 or high > 65535:
        return low, high
    if white and high <= white:
        return 0.0, white
    return 0.0, next(float(w) for w in _WHITES if high <= w)


def _finite_range(image: Image.Image) -> tuple[float, float]:
    """The smallest and largest of floats, without NaN and infinities."""
    import numpy as np  # getextrema() does not leave them out

    low, high = math.inf, -math.inf
    for _, part in _bands(image):
        grey = np.asarray(part)  # [rows, width]
        finite = grey[np.isfinite(grey)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def _to_8_bits(image: Image.Image, low: float, high: float) -> Image.Image:
    """Turn grey of more than 8 bits into L, some rows at a time."""
    levels = Image.new("L", image.size)
    span = (high - low) or 1
    if image.mode != "F" and low == 0 and high <= 65535:
        table = [round(min(v, high) / span * 255) for v in range(65536)]
        for top, part in _bands(image):
            levels.paste(part.convert("I").point(table, "L"), (0, top))
        return levels
    import numpy as np

    for top, part in _bands(image):
        grey = np.asarray(part, dtype=np.float64)  # [rows, width]
        grey = np.nan_to_num(grey, nan=low, posinf=high, neginf=low)
        scaled = (np.clip(grey, low, high) - low) / span * 255
        levels.paste(Image.fromarray(scaled.round().astype(np.uint8)), (0, top))
    return levels


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The parts of a picture, some rows each, and where they begin."""
    rows = max(1, BAND_PIXELS // 16 // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


class _Squared:
    """A picture in the middle of a square of the background colour, which is never made whole."""

    def __init__(self, image: "Image.Image | _Large", background: tuple[int, int, int]) -> None:
        self._image = convert(image, "RGB") if isinstance(image, Image.Image) else image
        self._background = background
        self.side = max(image.size)
        self._left = (self.side - image.width) // 2
        self._top = (self.side - image.height) // 2

    def resize(self, size: int, resample: Image.Resampling) -> Image.Image:
        """Resize to `size` a side, some rows at a time: the horizontal pass treats each by itself.

        size: pixels a side.
        resample: the filter.
        """
        narrow = Image.new("RGB", (size, self.side), self._background)
        bottom = self._top + self._image.height
        step = max(1, BAND_PIXELS // 16 // self.side)
        for y in range(self._top, bottom, step):
            end = min(y + step, bottom)
            band = Image.new("RGB", (self.side, end - y), self._background)
            band.paste(self._rows(y - self._top, end - self._top), (self._left, 0))
            narrow.paste(band.resize((size, end - y), resample), (0, y))
        return narrow.resize((size, size), resample)

    def _rows(self, top: int, bottom: int) -> Image.Image:
        if isinstance(self._image, _Large):
            return self._image.rows(top, bottom)
        return self._image.crop((0, top, self._image.width, bottom))


class _Resizing:
    """The ways to make a picture square."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    def __call__(self, image: "Image.Image | _Large") -> Image.Image:
        spec = self._spec
        if spec.resize == "squash":
            return self._resize(image, (spec.image_size, spec.image_size))
        if spec.resize in ("crop", "crop_floor"):
            return self._crop(image)
        # a thread of a picture would take its length squared: minutes
        if spec.resize == "square" and max(image.size) ** 2 <= SQUARE_PIXELS:
            resample = FILTERS[spec.interpolation]
            return _Squared(image, spec.background).resize(spec.image_size, resample)
        return self._pad(image)

    def _resize(
        self, image: "Image.Image | _Large", size: tuple[int, int], box: Box | None = None
    ) -> Image.Image:
        """Resize the part `box` of an image, the horizontal pass first.

        Pillow rounds to 8 bits between its two passes, and newer versions start with the vertical
        pass for some shapes. On hard edges the result is up to 10 levels off the published pixels.
        Two resizes along one axis each give the same result on every version.
        """
        resample = FILTERS[self._spec.interpolation]
        left, top, right, bottom = box or (0, 0, *image.size)
        if isinstance(image, _Large):
            return image.resize(size, resample, (left, top, right, bottom))
        # bilevel and palette pictures cannot be averaged: Pillow takes the nearest pixel
        if image.mode in ("1", "P") or resample == Image.Resampling.NEAREST:
            return image.resize(size, Image.Resampling.NEAREST, box)
        # colours are averaged by their opacity; Pillow does that within a single resize
        premultiplied = {"RGBA": "RGBa", "LA": "La"}.get(image.mode)
        if premultiplied:
            return self._resize(image.convert(premultiplied), size, box).convert(image.mode)
        if size[0] * image.height > MAX_PIXELS:  # a very thin picture would grow without bound
            image = image.resize((image.width, size[1]), resample, (0, top, image.width, bottom))
            return image.resize(size, resample, (left, 0, right, size[1]))
        image = image.resize((size[0], image.height), resample, (left, 0, right, image.height))
        return image.resize(size, resample, (0, top, size[0], bottom))

    def _crop(self, image: "Image.Image | _Large") -> Image.Image:
        """The shorter side to image_size, then the centre (torchvision's Resize and CenterCrop).

        transformers rounds the centre down.
        """
        size, (width, height) = self._spec.image_size, image.size
        short = min(width, height)
        new = (int(size * width / short), int(size * height / short))
        halved = math.floor if self._spec.resize == "crop_floor" else round
        left, top = (halved((side - size) / 2) for side in new)
        # Resizing only what remains differs by float32 rounding of the box, and keeps
        # a picture of 1 x 5000 pixels from growing to 224 x 1120000 first
        if self._spec.exact and max(new) <= 64 * size:
            return self._resize(image, new).crop((left, top, left + size, top + size))
        x, y = width / new[0], height / new[1]  # source pixels of one new pixel
        right, bottom = min(width, (left + size) * x), min(height, (top + size) * y)
        return self._resize(image, (size, size), (left * x, top * y, right, bottom))

    def _pad(self, image: "Image.Image | _Large") -> Image.Image:
        """The longer side to image_size, in the middle of a square of the background colour."""
        if isinstance(image, Image.Image):
            image = convert(image, "RGB")
        size, long = self._spec.image_size, max(image.size)
        new = (
            max(1, round(size * image.width / long)),
            max(1, round(size * image.height / long)),
        )
        square = Image.new("RGB", (size, size), self._spec.background)
        square.paste(self._resize(image, new), ((size - new[0]) // 2, (size - new[1]) // 2))
        return square


def thumbnail(
    image: Image.Image | PngBands,
    size: tuple[int, int],
    *,
    orientation: int = 1,
    white: float | None = None,
) -> Image.Image:
    """A small upright picture, RGB on white; never enlarged.

    image: the picture.
    size: the largest width and height.
    orientation: 1 to 8, as EXIF has it.
    white: the value of white in grey of more than 8 bits, if the file says so.
    """
    width, height = image.size
    if orientation >= 5:
        width, height = height, width
    scale = min(1.0, size[0] / width, size[1] / height)
    new = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    if orientation >= 5:
        new = new[1], new[0]
    if isinstance(image, PngBands):
        large = _Large(image, 1, _sensible(None, (255, 255, 255), white))
        box = (0, 0, image.width, image.height)
        return turned(large.resize(new, Image.Resampling.BICUBIC, box), orientation)
    reduced = _reduced(image, new)
    rgb = _sensible(reduced, (255, 255, 255), white)(reduced)
    return turned(rgb.resize(new, Image.Resampling.BICUBIC), orientation)


def _reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bring a large picture near `size` by whole factors, because what follows copies it."""
    if image.width * image.height <= BAND_PIXELS // 16:
        return image
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        factor = min(image.width // size[0], image.height // size[1]) // 2
        return image.reduce(factor) if factor > 1 else image
    near = min(image.width, 4 * size[0]), min(image.height, 4 * size[1])
    return image.resize(near, Image.Resampling.NEAREST)
