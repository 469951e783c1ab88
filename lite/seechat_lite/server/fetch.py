"""Fetches pictures from https: addresses, if the server was told to.

A client must not reach what only the server can reach: other services of its machine, its network,
a cloud's metadata. So a name is resolved once, every address it has must be public, and the
connection goes to the very address that was checked. Every redirect is treated the same. It does
not matter how an address is written (decimal, IPv6-mapped, a name), because the check is on where
it leads.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, cast
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from seechat_lite.server.errors import ApiError

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[Address]]]

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_HTTP_ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)
# IPv6 networks that hide an IPv4 address, which may be a private one: 6to4, Teredo, NAT64
_TUNNELS = tuple(map(IPv6Network, ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48")))


async def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a name, in the system's order.

    host: the name.
    port: the port.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(sockaddr[0]) for *_, sockaddr in found]


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet and not to a tunnel into another network.

    address: the address.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if any(address in tunnel for tunnel in _TUNNELS):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that were checked."""

    def __init__(self, resolve: Resolve, allowed: Callable[[Address], bool]) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._backend = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._allowed, addresses)):
            raise _failed("leads to an address that is not public")
        return await self._backend.connect_tcp(
            str(addresses[0]), port, timeout, local_address, socket_options
        )


class Fetcher:
    """Fetches pictures.

    seconds: the time that one picture may take.
    resolve, allowed, context: replaced in tests.
    """

    def __init__(
        self,
        *,
        seconds: float,
        resolve: Resolve = resolve,
        allowed: Callable[[Address], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._seconds = seconds
        self._backend = _CheckedBackend(resolve, allowed)
        self._context = context or ssl.create_default_context()

    async def fetch(
        self, url: str, *, limit: int, hold: Callable[[int], None] = lambda size: None
    ) -> bytes:
        """The file at an https: URL.

        url: the URL.
        limit: bytes that it may have at most.
        hold: called with the number of bytes that came, before they are kept; may raise.

        Raises ApiError 400: refused, unreachable, too slow, too large, or not successful.
        """
        try:
            async with (
                asyncio.timeout(self._seconds),
                httpcore.AsyncConnectionPool(
                    ssl_context=self._context,
                    max_keepalive_connections=0,  # a kept connection would skip the check
                    network_backend=self._backend,
                ) as pool,
            ):
                for _ in range(MAX_REDIRECTS + 1):
                    body, location = await self._get(pool, url, limit, hold)
                    if location is None:
                        return body
                    url = _follow(url, location)
        except TimeoutError:
            raise _failed(f"did not come within {self._seconds:g} s") from None
        except (OSError, UnicodeError, *_HTTP_ERRORS) as e:
            raise _failed(f"cannot be fetched ({_cause(e)})") from None
        raise _failed(f"was redirected more than {MAX_REDIRECTS} times")

    async def _get(
        self,
        pool: httpcore.AsyncConnectionPool,
        url: str,
        limit: int,
        hold: Callable[[int], None],
    ) -> tuple[bytes, bytes | None]:
        """One request: the body, or the address that the server redirects to."""
        host, port, target = _parse(url)
        name = f"[{host}]" if ":" in host else host
        headers = [
            ("Host", name if port == 443 else f"{name}:{port}"),
            ("User-Agent", "seechat-lite"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        address = httpcore.URL(
            scheme=b"https", host=host.encode("ascii"), port=port, target=target.encode("ascii")
        )
        async with pool.stream("GET", address, headers=headers) as response:
            if response.status in _REDIRECTS:
                for key, value in response.headers:
                    if key.lower() == b"location":
                        return b"", value
            if response.status != 200:
                raise _failed(f"was answered with status {response.status}")
            body = bytearray()
            async for chunk in response.aiter_stream():
                if len(body) + len(chunk) > limit:
                    raise _failed(f"is larger than {limit} bytes")
                hold(len(chunk))
                body += chunk
            return bytes(body), None


def _follow(url: str, location: bytes) -> str:
    """Where a redirect leads; it may contain any bytes."""
    try:
        return urljoin(url, location.decode("utf-8"))
    except ValueError:
        raise _failed("was redirected to an address that is none") from None


def _cause(error: BaseException) -> str:
    """The name of the error that the HTTP client has wrapped in errors of its own."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return type(error).__name__


def _parse(url: str) -> tuple[str, int, str]:
    """Host, port and the target of the request."""
    if any(c <= " " or c == "\x7f" for c in url):
        raise _failed("has blanks or control characters in its address")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError:
        raise _failed("has an address that is none") from None
    if parts.scheme != "https" or not host:
        raise _failed("is not at an https: address")
    if parts.username is not None or parts.password is not None:
        raise _failed("has a password in its address")
    path = parts.path or "/"
    target = f"{path}?{parts.query}" if parts.query else path
    return host, port, quote(target, safe="/%:=&?~+!$,;'@()*[]#")


def _failed(why: str) -> ApiError:
    """An error that says as little as possible of what the server can see."""
    return ApiError(400, f"the picture {why}", code="invalid_image_url", param="messages")
