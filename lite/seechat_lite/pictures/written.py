"""Reads pictures written as text: base64 and data: URLs, in all the ways that programs write them.

Letters may be standard or URL-safe, with padding or without, broken into lines or percent-encoded,
with any media type or none: the bytes themselves tell what they are. A long text is copied as
seldom as possible.
"""

import binascii
from urllib.parse import unquote_to_bytes

from seechat_weights.errors import ImageError

MAX_HEAD = 1000  # characters before the data in a data: URL
MAX_PERCENT = 4 << 20  # characters of a data: URL with %XX, as these cost far more than base64

_BLANKS = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_ESCAPES = {b"2b": b"+", b"2f": b"/", b"3d": b"=", b"0a": b"", b"0d": b"", b"20": b"", b"09": b""}
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=%\r\n")
_SHORTEST = 64  # characters; no picture is shorter, and many paths are


def is_data_url(text: str) -> bool:
    """Whether a text is a data: URL.

    text: the text.
    """
    return text[:16].lstrip()[:5].lower() == "data:"


def looks_like_base64(text: str) -> bool:
    """Whether a text is a picture's base64 rather than a path or an address, by both its ends.

    text: the text.
    """
    ends = text[:_SHORTEST] + text[-_SHORTEST:]
    return len(text) >= _SHORTEST and _LETTERS.issuperset(ends)


def from_data_url(url: str, *, limit: int) -> bytes:
    """The bytes in a data: URL.

    url: the URL.
    limit: bytes that it may have at most.

    Raises ImageError: damaged, or more than `limit` bytes.
    """
    comma = url.find(",", 0, MAX_HEAD)
    if comma < 0:
        raise ImageError("data: URL: no comma; expected data:image/png;base64,…: check it")
    options = [o.strip() for o in url[:comma].partition(":")[2].lower().split(";")]
    if "base64" in options:
        return from_base64(url, limit=limit, name="data: URL", start=comma + 1)
    if len(url) > MAX_PERCENT:
        raise ImageError(
            f"data: URL: {len(url)} characters that are not base64; expected "
            "data:image/png;base64,…: encode it so"
        )
    if not url.isascii():
        raise _damaged("data: URL")
    return _within(unquote_to_bytes(url[comma + 1 :]), limit, "data: URL")


def from_base64(text: str, *, limit: int, name: str = "base64", start: int = 0) -> bytes:
    """Decode base64.

    text: the text.
    limit: bytes that it may have at most.
    name: what it is called in messages.
    start: the character to begin with.

    Raises ImageError as from_data_url().
    """
    if not text.isascii():
        raise _damaged(name)
    data = text[start:].encode("ascii") if start else text.encode("ascii")
    if b"%" in data:
        for code, letter in _ESCAPES.items():
            for escape in {b"%" + code, b"%" + code.upper(), b"%" + code.title()}:
                data = data.replace(escape, letter)
    if any(letter in data for letter in _BLANKS + b"-_"):
        data = data.translate(_STANDARD, _BLANKS)
    end = len(data)
    while end and data[end - 1] == ord("=") and len(data) - end < 4:
        end -= 1
    if end % 4 == 1:
        raise _damaged(name)
    padded = end + -end % 4
    if padded != len(data):
        data = data[:end] + b"=" * (padded - end)
    try:
        return _within(binascii.a2b_base64(data, strict_mode=True), limit, name)
    except (binascii.Error, ValueError):
        raise _damaged(name) from None


def _within(data: bytes, limit: int, name: str) -> bytes:
    if len(data) > limit:
        raise ImageError(
            f"{name}: a picture is larger than {limit} bytes; expected a smaller one: scale it down"
        )
    return data


def _damaged(name: str) -> ImageError:
    return ImageError(
        f"{name}: its base64 is damaged; expected the bytes of a picture as base64, or "
        "data:image/png;base64,…: encode them again"
    )
