"""What an image_url may be: a data: URL, an https: address or a file, where the server allows."""

import asyncio
import binascii
import os
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from seechat_lite.server.budget import Held
from seechat_lite.server.errors import ApiError
from seechat_lite.server.fetch import Fetcher
from seechat_lite.server.settings import Settings

_BLANKS = b" \t\r\n\f\v"
_MAX_DATA_HEAD = 1000  # characters before the data in a data: URL
_MAX_PERCENT = 4 << 20  # characters of a data: URL with %XX, which cost far more than base64


class Images:
    """Reads the pictures of requests within the limits of Settings."""

    def __init__(self, settings: Settings, fetcher: Fetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._thread = ThreadPoolExecutor(1, "seechat-decode")

    async def read(self, urls: list[str], held: Held) -> list[bytes]:
        """The files, in order; held: grows by what was not in the request itself.

        Raises ApiError 400: refused, not there, too large, too many; 503: too much at once.
        """
        if len(urls) > self._settings.max_images:
            raise _refused(f"{len(urls)} pictures; expected at most {self._settings.max_images}")
        left, files = self._settings.max_body, []
        for url in urls:
            data = await self._one(url, min(self._settings.max_image, left), held)
            left -= len(data)
            files.append(data)
        return files

    async def decode(self, text: str) -> bytes:
        """A file as bare base64. Raises ApiError 400."""
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._thread, from_base64, text)
        if len(data) > self._settings.max_image:
            raise _too_large(self._settings.max_image)
        return data

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _one(self, url: str, limit: int, held: Held) -> bytes:
        scheme = url[:16].partition(":")[0].lower()
        loop = asyncio.get_running_loop()
        if scheme == "data":
            return await loop.run_in_executor(self._thread, _from_data, url, limit)
        if scheme == "https" and self._settings.https_images:
            return await self._fetcher.fetch(url, limit=limit, hold=held.add)
        if scheme == "file" and self._settings.media_path:
            data = await asyncio.to_thread(self._from_file, url, limit)
            held.add(len(data))
            return data
        allowed = ["data:"]
        allowed += ["https:"] if self._settings.https_images else []
        allowed += ["file:"] if self._settings.media_path else []
        raise _refused(
            f"pictures are read from {', '.join(allowed)} URLs here: send the picture itself as "
            "data:image/png;base64,…"
        )

    def _from_file(self, url: str, limit: int) -> bytes:
        """A file below the folder that is allowed, wherever links and dots in its path lead.

        What is elsewhere is refused in the same words, there or not.
        """
        assert self._settings.media_path
        root = self._settings.media_path.resolve()
        elsewhere = _refused("the file is not in the folder that this server reads pictures from")
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost") or not parts.path:
                raise elsewhere
            path = (root / url2pathname(parts.path)).resolve()
            if not path.is_relative_to(root):
                raise elsewhere
            if not path.is_file():  # a pipe would never end
                raise _refused("there is no such file")
            # resolved just now: what has become a link since then is not followed
            file = os.open(
                path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            )
            with os.fdopen(file, "rb") as f:
                data = f.read(limit + 1)
        except (OSError, ValueError):
            raise _refused("the file cannot be read") from None
        if len(data) > limit:
            raise _too_large(limit)
        return data


def _from_data(url: str, limit: int) -> bytes:
    """The bytes in a data: URL; what is long is copied as seldom as can be."""
    comma = url.find(",", 0, _MAX_DATA_HEAD)
    kind, *options = url[len("data:") : comma].lower().split(";")
    if comma < 0 or not kind.startswith("image/") or not url.isascii():
        raise _refused("expected a URL like data:image/png;base64,…")
    if "base64" in options:
        data = from_base64(url[comma + 1 :])
    elif len(url) > _MAX_PERCENT:
        raise _refused(f"a picture in a URL of {len(url)} characters is not base64; expected it so")
    else:
        data = unquote_to_bytes(url[comma + 1 :])
    if len(data) > limit:
        raise _too_large(limit)
    return data


def from_base64(text: str) -> bytes:
    """Decode base64 strictly, white space aside. Raises ApiError 400."""
    try:
        if not text.isascii():
            raise ValueError
        data = text.encode("ascii")
        if any(blank in data for blank in _BLANKS):
            data = data.translate(None, _BLANKS)
        return binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError):
        raise _refused("a picture's base64 is damaged") from None


def _too_large(limit: int) -> ApiError:
    return _refused(f"a picture is larger than {limit} bytes")


def _refused(why: str) -> ApiError:
    return ApiError(400, why, code="invalid_image_url", param="messages")
