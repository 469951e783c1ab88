"""Who may ask: keys, and web pages that a browser runs on somebody's behalf."""

import hashlib
import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from seechat_lite.server.errors import ApiError
from seechat_lite.server.settings import Settings

OPEN = ("/health",)  # needs no key, as monitors have none


class Guard:
    """ASGI middleware that lets in whom Settings allow.

    Host: a web page whose own name was made to point at this machine must not reach the server
    through its visitor's browser (DNS rebinding), so names have to be known; addresses are fine.
    Origin: a page of another site may make a browser send requests here even if it cannot read
    the answers. Key: compared in constant time.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, public: frozenset[str]) -> None:
        self._app = app
        self._hosts = {"localhost", *(h.lower() for h in settings.hosts)}
        self._origins = frozenset(settings.cors_origins)
        self._key = _digest(settings.api_key.encode()) if settings.api_key else None
        self._public = public.union(OPEN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _name(host)
        if name is None or not (name in self._hosts or _is_address(name)):
            return ApiError(
                403,
                "this server is not known by that name: start it with --host-name",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if (
            origin
            and origin not in self._origins
            and urlsplit(origin).netloc.lower() != host.lower()
        ):
            return ApiError(
                403,
                "web pages of other origins may not use this server: start it with --cors-origin",
                code="unknown_origin",
            )
        reading = scope["method"] in ("GET", "HEAD")
        if not self._key or (scope["path"] in self._public and reading):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = _digest(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else b""
        if hmac.compare_digest(sent, self._key):
            return None
        return ApiError(
            401,
            "expected the header Authorization: Bearer with this server's key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def client_of(request: Request) -> str:
    """Who asks, for a fair share of the answers: an address, and the key sent.

    Also a key that is not required: programs of one machine differ in nothing else.
    """
    address = request.client.host if request.client else ""
    return f"{address} {request.headers.get('authorization', '')}"


def _digest(key: bytes) -> bytes:
    """Of one length for every key, so that not even its length shows in the time."""
    return hashlib.sha256(key).digest()


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
