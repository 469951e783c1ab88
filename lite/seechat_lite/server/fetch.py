"""Pictures from https: addresses, for a server that was told to fetch them.

A client must not reach what only the server can reach: other services of its machine, its network,
a cloud's metadata. So a name is resolved once, every address it has must be public, and the
connection goes to the very address that was checked; so does every redirect. How an address is
written (decimal, IPv6-mapped, a name) does not matter, because what is checked is where it leads.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import quote, urljoin, urlsplit

import h11

from seechat_lite.server.errors import ApiError

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[Address]]]

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16
# IPv6 networks in which an IPv4 address is hidden, which may be a private one: 6to4, Teredo, NAT64
_TUNNELS = tuple(map(IPv6Network, ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48")))


async def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a name, in the system's order."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(sockaddr[0]) for *_, sockaddr in found]


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet at large and to no tunnel into elsewhere."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if any(address in tunnel for tunnel in _TUNNELS):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class Fetcher:
    """Fetches pictures. resolve, allowed and context are there to be replaced in tests."""

    def __init__(
        self,
        *,
        seconds: float,
        resolve: Resolve = resolve,
        allowed: Callable[[Address], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._seconds = seconds
        self._resolve = resolve
        self._allowed = allowed
        self._context = context or ssl.create_default_context()

    async def fetch(self, url: str, *, limit: int) -> bytes:
        """The file at an https: URL, of at most `limit` bytes.

        Raises ApiError 400: refused, unreachable, too slow, too large, or no success.
        """
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    body, location = await self._get(url, limit)
                    if location is None:
                        return body
                    url = urljoin(url, location)
        except TimeoutError:
            raise _failed(f"did not come within {self._seconds:g} s") from None
        except (OSError, h11.RemoteProtocolError, UnicodeError) as e:
            raise _failed(f"cannot be fetched ({type(e).__name__})") from None
        raise _failed(f"was redirected more than {MAX_REDIRECTS} times")

    async def _get(self, url: str, limit: int) -> tuple[bytes, str | None]:
        """One request: the body, or where the server says it is."""
        host, port, target = _parse(url)
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._allowed, addresses)):
            raise _failed("leads to an address that is not public")
        reader, writer = await asyncio.open_connection(
            str(addresses[0]), port, ssl=self._context, server_hostname=host
        )
        try:
            return await self._talk(reader, writer, host, port, target, limit)
        finally:
            writer.transport.abort()

    async def _talk(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        port: int,
        target: str,
        limit: int,
    ) -> tuple[bytes, str | None]:
        name = f"[{host}]" if ":" in host else host
        request = h11.Request(
            method="GET",
            target=target,
            headers=[
                ("Host", name if port == 443 else f"{name}:{port}"),
                ("User-Agent", "seechat-lite"),
                ("Accept", "image/*"),
                ("Accept-Encoding", "identity"),
                ("Connection", "close"),
            ],
        )
        connection = h11.Connection(h11.CLIENT)
        writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
        await writer.drain()
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                if event.status_code in _REDIRECTS:
                    for key, value in event.headers:
                        if key == b"location":
                            return b"", value.decode("ascii")
                if event.status_code != 200:
                    raise _failed(f"was answered with status {event.status_code}")
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > limit:
                    raise _failed(f"is larger than {limit} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body), None
            elif not isinstance(event, h11.InformationalResponse):
                raise _failed("was not answered in full")


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
    """Says as little as possible of what the server can see."""
    return ApiError(400, f"the picture {why}", code="invalid_image_url", param="messages")
