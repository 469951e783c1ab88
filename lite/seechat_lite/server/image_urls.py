"""Reads a picture from its text: a data: URL, base64, an https: address or a file, if allowed."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from seechat_lite.pictures.written import (
    from_base64,
    from_data_url,
    is_data_url,
    looks_like_base64,
)
from seechat_lite.server.budget import Held
from seechat_lite.server.errors import ApiError
from seechat_lite.server.fetch import Fetcher
from seechat_lite.server.settings import Settings
from seechat_weights.errors import ImageError


class Images:
    """Reads the pictures of requests within the limits of Settings.

    settings: the operator's.
    fetcher: fetches https: addresses.
    """

    def __init__(self, settings: Settings, fetcher: Fetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._thread = ThreadPoolExecutor(1, "seechat-decode")

    async def read(self, urls: list[str], held: Held) -> list[bytes]:
        """The files of pictures, in order.

        urls: the texts.
        held: grows by the bytes that were not in the request itself.

        Raises ApiError 400: refused, missing, too large, too many; 503: too much at once.
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
        """A file as base64 or in a data: URL.

        text: the text.

        Raises ApiError 400.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _decoded, text, self._settings.max_image)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _one(self, url: str, limit: int, held: Held) -> bytes:
        scheme = url[:16].strip().partition(":")[0].lower()
        loop = asyncio.get_running_loop()
        if is_data_url(url) or looks_like_base64(url):
            return await loop.run_in_executor(self._thread, _decoded, url, limit)
        if scheme == "https" and self._settings.https_images:
            return await self._fetcher.fetch(url, limit=limit, hold=held.add)
        if scheme == "file" and (folder := self._settings.media_path):
            data = await asyncio.to_thread(_from_file, url, folder, limit)
            held.add(len(data))
            return data
        allowed = ["data:"]
        allowed += ["https:"] if self._settings.https_images else []
        allowed += ["file:"] if self._settings.media_path else []
        raise _refused(
            f"pictures are read from {', '.join(allowed)} URLs and base64 here: send the picture "
            "itself as data:image/png;base64,…"
        )


def _from_file(url: str, folder: Path, limit: int) -> bytes:
    """A file below a folder, wherever links and dots in its path lead.

    A file elsewhere is refused in the same words, whether it exists or not.
    """
    root = folder.resolve()
    elsewhere = _refused("the file is not in the folder that this server reads pictures from")
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise elsewhere
        path = (root / url2pathname(parts.path)).resolve()
        if not path.is_relative_to(root):
            raise elsewhere
        if not path.is_file():  # reading a pipe would never end
            raise _refused("there is no such file")
        # resolved just now: a link made since then is not followed
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


def _decoded(text: str, limit: int) -> bytes:
    """The bytes in a data: URL or in base64."""
    try:
        if is_data_url(text):
            return from_data_url(text.lstrip(), limit=limit)
        return from_base64(text, limit=limit)
    except ImageError as e:
        raise _refused(str(e)) from None


def _too_large(limit: int) -> ApiError:
    return _refused(f"a picture is larger than {limit} bytes")


def _refused(why: str) -> ApiError:
    return ApiError(400, why, code="invalid_image_url", param="messages")
