"""Turns pictures, in whatever form people pass them, into the pixels a vision tower expects.

The first bytes of a file tell its format, and only the formats of pictures/formats.py are opened. A
picture that is certain to cost little is decoded here. Every other picture is decoded in a process
of its own, which has bounds on memory and time and ends if nobody waits (pictures/pool.py).
"""

import hashlib
import inspect
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageFile

from seechat_lite.pictures import decode, headers, pool
from seechat_lite.pictures.decode import Opened
from seechat_lite.pictures.formats import HEAD, identify
from seechat_lite.pictures.reduce import (
    BAND_PIXELS,
    FILTERS,
    MAX_PIXELS,
    check_size,
    reduce,
)
from seechat_lite.pictures.reduce import thumbnail as reduced
from seechat_lite.pictures.written import from_base64, from_data_url, is_data_url, looks_like_base64
from seechat_weights.config import RESIZES, PixelSpec
from seechat_weights.errors import BundleError, EngineError, ImageError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ImageSource", "load_image", "pixels", "several", "thumbnail"]

MAX_BYTES = 256 << 20  # of a picture's file

Stopped = Callable[[], bool]


def _never() -> bool:
    return False


@dataclass(frozen=True)
class EncodedImage:
    """A picture's file. It is decoded when its pixels are asked for."""

    data: bytes
    name: str  # for messages
    format: str  # as formats.identify says

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, before turning it upright. Raises ImageError."""
        return self._about[1]

    @property
    def mode(self) -> str:
        """Pillow's name of the colour mode. Raises ImageError."""
        return self._about[0]

    @cached_property
    def _about(self) -> tuple[str, tuple[int, int]]:
        found = _decoded(self, {"do": "describe", "spec": None}, _never)
        return found.mode, found.size


@dataclass(frozen=True)
class Picture:
    """A picture with a key of its content: the same content has the same key."""

    image: Image.Image | EncodedImage
    key: str  # sha256, hexadecimal: of the file's bytes, or of a PIL image's pixels and palette


@dataclass(frozen=True)
class PreparedImage:
    """A picture whose pixels were made ahead, for one model; see Model.prepare_image."""

    key: str
    spec: PixelSpec
    # its levels, uint8 [image_size, image_size, 3]; or itself, if the model remembers it
    content: np.ndarray | Image.Image | EncodedImage


# One picture: the path of a file or the text of a data: URL; the bytes of a file; an open binary
# file, read from its beginning where it can be; a PIL image; levels, [height, width] or
# [height, width, 1 | 3 | 4], RGB.
ImageSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | np.ndarray
    | EncodedImage
    | Picture
    | PreparedImage
)


def several(image: Any) -> Iterator[ImageSource]:
    """Yield one picture or several, as the methods of Chat take them.

    image: a picture, or an iterable of pictures.

    Raises ImageError for anything else.
    """
    if image is None:
        return
    if is_one(image):
        yield image
        return
    if not isinstance(image, Iterable) or isinstance(image, dict):
        raise _wrong_type(image)
    for one in image:
        if not is_one(one):
            raise _wrong_type(one)
        yield one


def message_picture(given: Any) -> ImageSource:
    """A picture of a message, given as other pictures are, or in base64.

    given: the picture.

    Raises ImageError.
    """
    if isinstance(given, str) and looks_like_base64(given) and not _exists(given):
        return from_base64(given, limit=MAX_BYTES)
    if not is_one(given):
        raise _wrong_type(given)
    return given


def load_image(source: ImageSource, *, name: str = "image bytes") -> Picture:
    """Read a picture's file and find its format; it is decoded when its pixels are asked for.

    source: the picture.
    name: what errors call it if it is bytes.

    Raises ImageError: missing, empty, too large, of a wrong type, or not a picture.
    """
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        array = np.asarray(source)
        if array.ndim != 1 or array.dtype != np.uint8:
            return _from_pil(_from_array(array))
        source = array.tobytes()  # a file's bytes, as cv2.imencode returns them
    if isinstance(source, Image.Image):
        return _from_opened(source)
    if isinstance(source, Picture):
        return source
    if isinstance(source, EncodedImage):
        return Picture(source, hashlib.sha256(source.data).hexdigest())
    if isinstance(source, PreparedImage):
        raise ImageError("a prepared picture; expected one that is not: pass it to its model")
    if isinstance(source, str):
        if is_data_url(source):
            return _from_bytes(from_data_url(source, limit=MAX_BYTES), "data: URL")
        return _from_path(_path(source))
    if isinstance(source, os.PathLike):
        return _from_path(_fspath(source))
    if hasattr(source, "read"):
        return _from_file(source)
    try:
        view = memoryview(source)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise _wrong_type(source) from None
    if view.nbytes > MAX_BYTES:
        raise too_many_bytes(name, view.nbytes)
    return _from_bytes(view.tobytes(), name)


def pixels(
    image: Image.Image | EncodedImage, spec: PixelSpec, *, stopped: Stopped = _never
) -> np.ndarray:
    """A vision graph's input, float32 [3, image_size, image_size].

    image: the picture.
    spec: how pictures become pixels.
    stopped: asked while the picture is decoded, which may take seconds; True ends it.

    Raises ImageError (damaged, takes too much, a colour space that Pillow cannot convert),
    BundleError (unknown resize or interpolation), Cancelled.
    """
    return normalized(levels(image, spec, stopped=stopped), spec)


def levels(
    image: Image.Image | EncodedImage, spec: PixelSpec, *, stopped: Stopped = _never
) -> np.ndarray:
    """The pixels before they are normalized, uint8 [image_size, image_size, 3].

    image, spec, stopped: as for pixels().

    Raises the errors of pixels().
    """
    if spec.resize not in RESIZES or spec.interpolation not in FILTERS:
        raise BundleError(
            f"pixels: resize {spec.resize!r} with {spec.interpolation!r}; expected one of "
            f"{', '.join(RESIZES)} with one of {', '.join(FILTERS)}: export the model again"
        )
    if isinstance(image, Image.Image):
        try:
            small = reduce(image, spec, orientation=_orientation(image))
        except (ImageError, MemoryError):
            raise
        except Exception as e:  # the owner's own changes may raise anything
            raise decode.undecodable(e) from None
        return np.asarray(small)
    settings = {f.name: getattr(spec, f.name) for f in fields(spec)}
    found = _decoded(image, {"do": "levels", "spec": settings}, stopped, spec)
    size = spec.image_size
    return np.frombuffer(found.data, np.uint8).reshape(size, size, 3)


def normalized(levels: np.ndarray, spec: PixelSpec) -> np.ndarray:
    """Normalize levels; returns float32 [3, size, size].

    levels: uint8 [size, size, 3].
    spec: has mean and standard deviation.
    """
    scaled = levels.astype(np.float32) / np.float32(255)
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def thumbnail(source: ImageSource, size: tuple[int, int] = (320, 320)) -> Image.Image:
    """A small picture to show: upright, opaque RGB.

    It is decoded within the same bounds, and from the same formats, as the pictures that a model
    sees.

    source: the picture.
    size: the largest width and height, in pixels.

    Raises ImageError.
    """
    if len(size) != 2 or not all(isinstance(n, int) and 0 < n <= 4096 for n in size):
        raise ImageError(
            f"a size of {size!r:.40}; expected width and height, 1 to 4096 each: take such a size"
        )
    image = load_image(source).image
    if isinstance(image, Image.Image):
        return reduced(image, size, orientation=_orientation(image))
    found = _decoded(image, {"do": "thumbnail", "spec": None, "size": size}, _never)
    return Image.frombytes(found.mode, found.size, found.data)


def _decoded(
    image: EncodedImage, request: dict[str, Any], stopped: Stopped, spec: PixelSpec | None = None
) -> pool.Answer:
    """Decode here if it costs little, else in a process of its own."""
    try:
        header = decode.read_header(image.data, image.format)
        if header:
            check_size(header.size, "RGB")
        easy = decode.is_easy(header)
        if not easy:
            try:
                return pool.ask(request | {"format": image.format}, image.data, stopped=stopped)
            except pool.NoWorker:
                pass  # the header alone gives its bounds
        opened = decode.open_picture(image.data, image.format, header=header)
        if request["do"] == "describe":
            return pool.Answer(opened.image.mode, opened.image.size, b"")
        small = _made(opened, request, spec)
        return pool.Answer(small.mode, small.size, small.tobytes())
    except ImageError as e:
        raise ImageError(f"{image.name}: {e}") from None


def _made(opened: Opened, request: dict[str, Any], spec: PixelSpec | None) -> Image.Image:
    image = decode.load(opened)
    try:
        if spec is None:
            return reduced(
                image, request["size"], orientation=opened.orientation, white=opened.white
            )
        return reduce(image, spec, orientation=opened.orientation, white=opened.white)
    except (ImageError, MemoryError):
        raise
    except Exception as e:  # damage that shows only in the conversion
        raise decode.undecodable(e) from None


# --- one or several


def is_one(image: object) -> bool:
    """Whether this is one picture, not several.

    image: anything.
    """
    kinds = str | os.PathLike | bytes | bytearray | memoryview | Image.Image
    kinds = kinds | EncodedImage | Picture | PreparedImage
    return isinstance(image, kinds) or hasattr(image, "read") or hasattr(image, "__array__")


def _wrong_type(given: object) -> ImageError:
    return ImageError(
        f"a picture given as {type(given).__name__}; expected a path, the bytes of a file, an open "
        "binary file, a PIL image, a numpy array [height, width, 3], or a list of these: pass one"
    )


# --- files


def _path(text: str) -> str:
    """The path in a text. Raises ImageError for an address."""
    scheme = text.partition(":")[0].lower()
    if scheme in ("http", "https", "ftp"):
        raise ImageError(
            f"{text[:200]}: an address; expected a file, for nothing is fetched here: download "
            "the picture and name its file"
        )
    if scheme == "file" and text[5:7] == "//":
        parts = urlsplit(text)
        return url2pathname(parts.path)
    return text


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name
        return False


def _fspath(source: os.PathLike[str]) -> str:
    try:
        path = os.fspath(source)
        return os.fsdecode(path)
    except Exception as e:  # of a class that is not ours
        raise ImageError(f"a path that cannot be read ({e}); expected a text: check it") from None


def _from_path(path: str) -> Picture:
    shown = path if len(path) <= 300 else f"{path[:40]}… ({len(path)} characters)"
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{shown}: not a file; expected a picture: name one picture file")
        if status.st_size > MAX_BYTES:
            raise too_many_bytes(shown, status.st_size)
        with Path(path).open("rb") as f:
            # the format is found first: a file that is not a picture is not read to its end
            head = f.read(HEAD)
            f.seek(max(0, status.st_size - 32))
            _identify(head, f.read(32), shown)
            f.seek(0)
            data = f.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError(f"{shown}: no such file; expected a picture: {_advice(path)}") from None
    except (OSError, ValueError) as e:  # ValueError: a null character in the path
        why = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise ImageError(
            f"{shown}: cannot be read ({why}); expected a picture: {_advice(path)}"
        ) from None
    return _from_bytes(data, shown)


def _advice(path: str) -> str:
    """What somebody may have meant by a path that does not exist."""
    if len(path) > 300 or path.startswith(("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")):
        return "if it is the text of base64, decode it and pass the bytes"
    return "check the path"


def _from_file(file: Any) -> Picture:
    """Read an open file from its beginning, if it can seek, and leave it where it was."""
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) and name else "an open file"
    try:
        at = file.tell() if file.seekable() else None
    except Exception:  # a reader may have only read()
        at = None
    data = bytearray()  # a reader may return a byte at a time
    try:
        if at is not None:
            file.seek(0)
        while part := file.read(min(MAX_BYTES + 1 - len(data), 1 << 24)):
            if inspect.iscoroutine(part):
                part.close()
            if not isinstance(part, bytes | bytearray | memoryview):
                kind = "text" if isinstance(part, str) else type(part).__name__
                raise ImageError(
                    f"{name}: gives {kind}; expected bytes: open it as a binary file, as "
                    'open(path, "rb") does'
                )
            data += part
            if len(data) > MAX_BYTES:
                raise too_many_bytes(name, len(data))
        if at is not None:
            file.seek(at)
    except (ImageError, MemoryError):
        raise
    except Exception as e:  # of a class that is not ours
        raise ImageError(
            f"{name}: cannot be read ({str(e).strip() or type(e).__name__}); expected an open "
            "binary file: check it"
        ) from None
    return _from_bytes(bytes(data), name)


def _from_bytes(data: bytes, name: str) -> Picture:
    if len(data) > MAX_BYTES:
        raise too_many_bytes(name, len(data))
    found = _identify(data[:HEAD], data[-32:], name)
    return Picture(EncodedImage(data, name, found), hashlib.sha256(data).hexdigest())


def _identify(head: bytes, end: bytes, name: str) -> str:
    try:
        return identify(head, end)
    except ImageError as e:
        unfinished = name.endswith((".part", ".crdownload", ".download", ".partial", ".aria2"))
        more = " (a download that has not been finished)" if unfinished else ""
        raise ImageError(f"{name}: {e}{more}") from None


def too_many_bytes(name: str, size: int) -> ImageError:
    """The error of a picture's file that is too large.

    name: the file's.
    size: its bytes.
    """
    return ImageError(
        f"{name}: {size >> 20} MB; expected a picture of at most {MAX_BYTES >> 20} MB: "
        "make it smaller"
    )


# --- what is decoded already


def _from_opened(image: Image.Image) -> Picture:
    """A PIL image; if it was opened and not loaded, its file is read instead."""
    opened = isinstance(image, ImageFile.ImageFile)
    if opened and (getattr(image, "tile", None) or getattr(image, "_im", None) is None):
        try:
            decode.check_opened(image)
            file = getattr(image, "fp", None)
            if file is not None and image.tell() == 0:
                return _from_file(file)
        except ImageError as e:
            raise ImageError(f"PIL image: {e}") from None
        except Exception as e:
            raise ImageError(f"PIL image: {decode.undecodable(e)}") from None
    return _from_pil(image)


def _from_pil(image: Image.Image) -> Picture:
    try:
        check_size(image.size, image.mode)
        if image.width * image.height <= BAND_PIXELS:
            image = image.copy()  # the caller may go on drawing on the original
        else:
            image.load()
        palette = image.getpalette("RGB") if image.mode in ("P", "PA") else None
        transparency = image.info.get("transparency")
        meaning = (image.mode, image.size, palette, transparency, _orientation(image))
        digest = hashlib.sha256(repr(meaning).encode())
        rows = max(1, (1 << 22) // image.width)
        for top in range(0, image.height, rows):
            bottom = min(top + rows, image.height)
            digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    except ImageError as e:
        raise ImageError(f"PIL image: {e}") from None
    except Exception as e:
        raise ImageError(f"PIL image: {decode.undecodable(e)}") from None
    return Picture(image, digest.hexdigest())


def _orientation(image: Image.Image) -> int:
    """The orientation in a PIL image's metadata, even if other metadata is damaged."""
    try:
        found = image.getexif().get(0x0112, 1)
        return found if isinstance(found, int) and 1 <= found <= 8 else 1
    except Exception:
        block = image.info.get("exif")
        found = headers.orientation_of_exif(block) if isinstance(block, bytes) else None
        return found or 1


def _from_array(array: np.ndarray) -> Image.Image:
    """Levels as a picture: [height, width] or [height, width, 1 | 2 | 3 | 4]. Raises ImageError."""
    said = f"array: {array.dtype} {list(array.shape)}"
    expected = "expected [height, width] or [height, width, 1, 3 or 4]"
    if array.ndim == 4:
        raise ImageError(f"{said}; {expected}: pass the pictures of a batch as a list")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or not 1 <= channels <= 4:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        advice = "transpose(1, 2, 0) puts the channels last" if first else "check its shape"
        raise ImageError(f"{said}; {expected}: {advice}")
    check_size((array.shape[1], array.shape[0]), "RGB")
    if array.dtype.kind not in "buif":
        raise ImageError(f"{said}; expected numbers, best uint8 of 0 to 255: check its values")
    if array.dtype != np.uint8:
        array = _to_uint8(array, said)
    if array.ndim == 3 and channels == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_uint8(array: np.ndarray, said: str) -> np.ndarray:
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    low, high = (float(f(array)) for f in (np.min, np.max))
    if not low >= 0 or not np.isfinite(high):
        raise ImageError(
            f"{said}, values {low:.4g} to {high:.4g}; expected 0 to 255, or 0 to 1: scale them"
        )
    if array.dtype.kind == "f":
        whites: tuple[float, ...] = (1, 255, 65535)
    else:
        whites = (255, 1023, 4095, 16383, 65535)
    white = next((w for w in whites if high <= w), None)
    if white is None:
        raise ImageError(f"{said}, values up to {high:.4g}; expected 0 to 255: scale them")
    return (array.astype(np.float32) * np.float32(255 / white)).round().astype(np.uint8)


def prepared_pixels(
    image: PreparedImage, spec: PixelSpec, *, stopped: Stopped = _never
) -> np.ndarray:
    """The pixels of a prepared picture, as pixels() makes them.

    image: the picture.
    spec: how pictures become pixels.
    stopped: as for pixels().

    Raises EngineError for a picture that was prepared for another model, and the errors of
    pixels().
    """
    if image.spec != spec:
        raise EngineError("a picture prepared for another model; expected its own: prepare anew")
    if isinstance(image.content, np.ndarray):
        return normalized(image.content, spec)
    return pixels(image.content, spec, stopped=stopped)
