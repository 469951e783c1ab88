"""Turns a request's body into its model: within bounds, checked, off the event loop if large."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from seechat_lite.allocation import trim_heap
from seechat_lite.json_structure import too_complex
from seechat_lite.server.errors import ApiError

M = TypeVar("M", bound=BaseModel)

SMALL = 64 << 10  # bytes that are parsed at once; a larger body could delay other clients
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Bodies:
    """Reads bodies; large ones one after the other, so that memory for parsing is taken once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "seechat-body")

    async def read(self, request: Request, model: type[M]) -> M:
        """The body of a request as a model.

        request: the request.
        model: the class of its body.

        Raises ApiError 400, 415 or 422; it says what is wrong and what is expected.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise _compressed(encoding)
        kind = request.headers.get("content-type", "")
        body = await _received(request)
        if len(body) <= SMALL:
            return _parse(body, model, kind)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, _parse_large, body, model, kind
        )

    def close(self) -> None:
        self._thread.shutdown(wait=False)


async def _received(request: Request) -> bytes | bytearray:
    """The whole body (see Intake). The request does not keep it, as its own body() would."""
    parts = [part async for part in request.stream() if part]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _parse_large(body: bytes | bytearray, model: type[M], kind: str) -> M:
    try:
        trim_heap()  # frees what earlier requests left, so that it does not add up
        return _parse(body, model, kind)
    finally:
        trim_heap()


def _parse(body: bytes | bytearray, model: type[M], kind: str) -> M:
    if body.startswith(b"\xef\xbb\xbf"):  # a byte order mark, which editors on Windows write
        body = body[3:]
    _check_beginning(body, kind)
    if why := too_complex(body):
        raise _invalid(f"the body is {why}")
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False, include_context=False)[0]
        if error["type"] != "json_invalid":
            raise
        raise _no_json(body, error["msg"]) from None


def _check_beginning(body: bytes | bytearray, kind: str) -> None:
    """Say what a body is that is not JSON in UTF-8, as far as its first bytes tell."""
    start = body[:4]
    if not body or body.isspace():
        raise _invalid("the body is empty; expected a JSON object")
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise _compressed(name)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise _invalid("the body is UTF-16 or UTF-32; expected JSON in UTF-8")
    form = kind.partition(";")[0].strip().lower()
    if form in ("multipart/form-data", "application/x-www-form-urlencoded") and (
        body[:1000].lstrip()[:1] not in (b"{", b"[")  # curl calls JSON a form unless told otherwise
    ):
        raise _invalid("the body is a form; expected a JSON object, pictures in it as base64")


def _no_json(body: bytes | bytearray, reason: str) -> ApiError:
    try:
        body.decode()
    except UnicodeDecodeError as e:
        return _invalid(
            f"the body is not UTF-8 (byte 0x{body[e.start]:02x} at {e.start}); expected JSON in "
            "UTF-8"
        )
    if ("surrogate" in reason or "hex escape" in reason) and _SURROGATE.search(body):
        return _invalid(
            "half a character: an escape \\ud800 to \\udfff without its other half, as when an "
            "emoji is cut in two; expected whole characters, or U+FFFD in their place"
        )
    return _invalid(f"the body is not JSON: {reason.removeprefix('Invalid JSON: ')}")


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _compressed(how: str) -> ApiError:
    how = how if how.isascii() and how.isalnum() and len(how) <= 20 else "encoded"
    return ApiError(
        415,
        f"the body is compressed ({how}); expected JSON as it is, without Content-Encoding",
        code="unsupported_encoding",
    )
