"""Decides who may ask, by keys and by the web page that a browser asks for."""

import hashlib
import hmac
import logging
import re
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from seechat_lite.server.errors import ApiError
from seechat_lite.server.settings import Settings

log = logging.getLogger(__name__)

OPEN = ("/health",)  # needs no key: monitors have none
# What containers call the machine they run on; no web site can have these names
CONTAINER_HOSTS = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")
# Programs with a web view; no page of a web site can have such an origin
PROGRAM_ORIGINS = re.compile(
    r"(?:tauri|app|capacitor|ionic|vscode-webview|vscode-file|wails)://[A-Za-z0-9._-]{0,100}"
    r"|https?://tauri\.localhost"
)
_CLIENT = "seechat_client"  # the key under which a request's scope keeps its client
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s\x00-\x20\[\]@/\\?#:]+)(?::[0-9]{1,5})?", re.IGNORECASE)


class _Gate:
    """ASGI middleware that answers requests with the error that _refusal() has for them.

    app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        raise NotImplementedError


class Framing(_Gate):
    """Closes connections on which the end of a request is uncertain.

    A proxy before this server may have taken the other one of two lengths, and the rest of a body
    for somebody else's request. h11 itself refuses requests that are merely malformed.
    """

    def _refusal(self, scope: Scope) -> ApiError | None:
        close = {"Connection": "close"}
        if scope["http_version"] not in ("1.0", "1.1"):
            return ApiError(505, "expected version 1.1 of HTTP", code="http_version", headers=close)
        names = {name for name, _ in scope["headers"]}
        old = scope["http_version"] == "1.0"
        if b"transfer-encoding" in names and (old or b"content-length" in names):
            text = "Transfer-Encoding with Content-Length, or in HTTP/1.0; expected one length"
            return ApiError(400, text, code="ambiguous_length", headers=close)
        return None


class Guard(_Gate):
    """Lets in those whom Settings allow.

    Host: somebody may point the name of a web page at this machine. The page must not reach the
    server through its visitor's browser (DNS rebinding), so names must be known; addresses are
    fine.
    Origin: a page of another site may make a browser send requests here even if it cannot read the
    answers.
    Key: compared in constant time.

    app: the application behind it.
    settings: keys and host names.
    public: paths that need no key.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, public: frozenset[str]) -> None:
        super().__init__(app)
        self._hosts = {"localhost", *CONTAINER_HOSTS, *(h.lower() for h in settings.hosts)}
        self._origins = frozenset(settings.cors_origins)
        self._told: set[str] = set()  # of whom the log has told
        self._allow_host, self._allow_origin = settings.allow_host, settings.allow_origin
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._public = public.union(OPEN)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _name(host)
        if name is None or not (name in self._hosts or _is_address(name)):
            return ApiError(
                403,
                f"this server is not known by the name {self._tell(host)!r}: {self._allow_host}, "
                "or "
                "call it by its address",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin and not (self._allowed(origin) or _authority(origin) == host.lower()):
            return ApiError(
                403,
                f"pages and programs of the origin {self._tell(origin)!r} may not use this server: "
                f"{self._allow_origin} {self._tell(origin)}",
                code="unknown_origin",
            )
        client = _network(scope)
        scope[_CLIENT] = client
        if not self._keys:
            return None
        sent = _digest(_key(headers).encode("latin-1"))
        right = [hmac.compare_digest(sent, key) for key in self._keys]  # always all of them
        if any(right):
            scope[_CLIENT] = f"{client} key {right.index(True)}"
            return None
        if scope["path"] in self._public and scope["method"] in ("GET", "HEAD"):
            return None
        return ApiError(
            401,
            "expected the header Authorization: Bearer with this server's key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _allowed(self, origin: str) -> bool:
        known = origin in self._origins or "*" in self._origins
        return known or PROGRAM_ORIGINS.fullmatch(origin) is not None

    def _tell(self, name: str) -> str:
        """What a message may say of it; the log tells of each once, of some."""
        shown = "".join(c for c in name[:100] if c.isprintable())
        if shown not in self._told and len(self._told) < 20:
            self._told.add(shown)
            log.warning("refused: %s is neither this server's name nor an origin it lets in", shown)
        return shown


def client_of(scope: Scope) -> str:
    """Who asks, for a fair share of the answers: an address, and the key if one is required.

    Only checked facts count: a client that could make up names would count as many clients.

    scope: the request's.
    """
    return scope.get(_CLIENT) or _network(scope)


def _network(scope: Scope) -> str:
    """The client's address; for IPv6 its network of 64 bits, as one client may use all of it."""
    address = (scope.get("client") or ("",))[0]
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, IPv6Address):
        return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))
    return address


def _key(headers: Headers) -> str:
    """The key that was sent, as OpenAI's or as Anthropic's clients send it."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key", "").strip()


def _digest(key: bytes) -> bytes:
    """A digest, of one length for every key, so that not even a key's length shows in the time."""
    return hashlib.sha256(key).digest()


def _name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is malformed."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").lower() if found else None


def _authority(origin: str) -> str | None:
    """Host and port of an origin, as a Host header has them; None if it is not an origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
