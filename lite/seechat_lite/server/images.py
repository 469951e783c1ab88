"""What an image_url may be: a data: URL, an https: address or a file, where the server allows."""

import base64
import binascii
import os
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from seechat_lite.server.errors import ApiError
from seechat_lite.server.fetch import Fetcher
from seechat_lite.server.settings import Settings


class Images:
    """Reads the pictures of requests within the limits of Settings."""

    def __init__(self, settings: Settings, fetcher: Fetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher

    async def read(self, urls: list[str]) -> list[bytes]:
        """The files, in order. Raises ApiError 400: refused, not there, too large, too many."""
        if len(urls) > self._settings.max_images:
            raise _refused(f"{len(urls)} pictures; expected at most {self._settings.max_images}")
        left, files = self._settings.max_body, []
        for url in urls:
            data = await self._one(url, min(self._settings.max_image, left))
            left -= len(data)
            files.append(data)
        return files

    async def _one(self, url: str, limit: int) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            data = _from_data(url)
            if len(data) > limit:
                raise _too_large(limit)
            return data
        if scheme == "https" and self._settings.https_images:
            return await self._fetcher.fetch(url, limit=limit)
        if scheme == "file" and self._settings.media_path:
            return self._from_file(url, limit)
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


def _from_data(url: str) -> bytes:
    head, comma, content = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/"):
        raise _refused("expected a URL like data:image/png;base64,…")
    if "base64" not in options:
        return unquote_to_bytes(content)
    return from_base64(content)


def from_base64(text: str) -> bytes:
    """Decode base64 strictly. Raises ApiError 400."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _refused("a picture's base64 is damaged") from None


def _too_large(limit: int) -> ApiError:
    return _refused(f"a picture is larger than {limit} bytes")


def _refused(why: str) -> ApiError:
    return ApiError(400, why, code="invalid_image_url", param="messages")
