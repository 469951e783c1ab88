"""What must not be had from the server: other files, other hosts, all of its memory or time."""

import asyncio
import hmac
import json
import logging
import os
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme

from seechat_lite.server import listen as server_run
from seechat_lite.server import logs, request_limits
from seechat_lite.server.budget import Budget
from seechat_lite.server.errors import ApiError
from seechat_lite.server.fetch import Fetcher, is_public, resolve
from seechat_lite.server.request_limits import Intake
from seechat_lite.server.settings import Settings
from serving import PANDA, PATIENCE, Running, asking, data_url, running, wait_until

KEY = "sk-correct-horse"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, a link out of it, and a picture beside it."""
    top = tmp_path_factory.mktemp("files")
    root = top / "media"
    (root / "in side").mkdir(parents=True)
    (root / "in side/panda.png").write_bytes(PANDA)
    (top / "secret.png").write_bytes(PANDA)
    (top / "media-of-others").mkdir()
    (top / "media-of-others/panda.png").write_bytes(PANDA)
    (root / "large.png").write_bytes(PANDA + bytes(1 << 20))
    if os.name == "posix":
        (root / "link.png").symlink_to(top / "secret.png")
        (root / "folder").symlink_to(top)
        (root / "good-link.png").symlink_to(root / "in side/panda.png")
        os.mkfifo(root / "pipe.png")
    return root


@pytest.fixture(scope="module")
def server(media: Path) -> Iterator[Running]:
    settings = Settings(
        api_keys=(KEY,),
        media_path=media,
        https_images=True,
        max_body=2 << 20,
        max_bodies=5 << 20,
        max_image=1 << 20,
        cors_origins=("https://good.example",),
        hosts=("seechat.home",),
    )
    with running(settings) as server:
        yield server


def post(server: Running, body: Any, **headers: str) -> Any:
    return server.post(body, Authorization=f"Bearer {KEY}", **headers)


def refused(server: Running, url: str) -> str:
    """The message with which a picture's URL is refused."""
    done = post(server, asking("这是什么？", url))
    assert done.get("status") == 400, done
    return done["error"]["message"]


# --- keys

GUARDED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/"),
    ("POST", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
]


@pytest.mark.parametrize(
    "sent",
    ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
     "Bearer \xe9"],
)  # fmt: skip
def test_wrong_keys(server: Running, sent: str) -> None:
    headers = {"Authorization": sent} if sent else {}
    for method, path in GUARDED:
        status, answered, content = server.request(method, path, b"{}", headers)
        assert status == 401 and answered["WWW-Authenticate"] == "Bearer"
        assert json.loads(content)["error"]["type"] == "authentication_error"


def test_the_right_key(server: Running) -> None:
    assert post(server, asking("你好"))["choices"]
    for path in ("/", "/health", "/page.js"):  # the page asks for the key
        assert server.request("GET", path)[0] == 200


def test_keys_are_compared_in_constant_time(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hmac.compare_digest, on digests of one length whatever was sent."""
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(
        hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b)
    )
    for key in ("short", "x" * 500):
        server.request("GET", "/v1/models", None, {"Authorization": f"Bearer {key}"})
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)] * 2


# --- web pages of others


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost:8080", True),
        ("127.0.0.1", True),
        ("[::1]:80", True),
        ("SEECHAT.home:1", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("[::1", False),
    ],
)
def test_names_of_others_do_not_lead_here(server: Running, host: str, allowed: bool) -> None:
    """DNS rebinding: a page's own name pointed at this machine."""
    status = server.request("GET", "/health", None, {"Host": host})[0]
    assert status == (200 if allowed else 403)


def test_cors(server: Running) -> None:
    ask = {"Authorization": f"Bearer {KEY}"}
    good, bad = ({"Origin": f"https://{name}.example"} for name in ("good", "evil"))
    status, headers, _ = server.request("GET", "/v1/models", None, ask | good)
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://good.example"
    for origin in (bad, {"Origin": "null"}):
        status, headers, _ = server.request("GET", "/v1/models", None, ask | origin)
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
    preflight = {"Access-Control-Request-Method": "POST"}
    path = "/v1/chat/completions"
    assert server.request("OPTIONS", path, None, good | preflight)[0] == 200
    assert server.request("OPTIONS", path, None, bad | preflight)[0] == 400
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.request("GET", "/v1/models", None, ask | own)[0] == 200


def test_cors_is_off_by_default() -> None:
    with running() as server:
        assert server.request("GET", "/health", None, {"Origin": "https://good.example"})[0] == 403


# --- sizes and time


def test_a_body_too_large(server: Running) -> None:
    """Said by its length, and by itself where it does not say its length."""
    body = json.dumps(asking("x" * (3 << 20))).encode()
    assert post(server, body)["status"] == 413
    parts = [body[i : i + 65536] for i in range(0, len(body), 65536)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Authorization: Bearer " + KEY.encode() + b"\r\n\r\n"
    )
    assert server.raw(head + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.slow
def test_bodies_too_large_together(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients hold back the ends of their bodies; a third must not fill the memory."""
    intakes: list[Intake] = []
    read = Intake._read

    async def noticing(self: Intake, *args: Any) -> bool:
        intakes.append(self)
        return await read(self, *args)

    monkeypatch.setattr(Intake, "_read", noticing)
    held = (3 << 19) - 1
    head = (
        f"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {2 << 20}\r\n\r\n"
    ).encode()
    with (
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as one,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as two,
    ):
        for s in (one, two):
            s.sendall(head + bytes(held))
        wait_until(lambda: intakes and intakes[0].budget.held == 2 * held)
        assert post(server, asking("你好", data_url()))["status"] == 503
    wait_until(lambda: not intakes[0].budget.held)
    assert post(server, asking("你好", data_url()))["choices"]


def test_a_refused_body_is_not_held_while_it_is_drained(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else requests that are refused together keep each other out."""
    intakes: list[Intake] = []
    drain = Intake._drain

    async def noticing(self: Intake, *args: Any) -> None:
        intakes.append(self)
        await drain(self, *args)

    monkeypatch.setattr(Intake, "_drain", noticing)
    monkeypatch.setattr(request_limits, "DRAIN_SECONDS", PATIENCE)
    head = (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Authorization: Bearer " + KEY.encode() + b"\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as one:
        one.sendall(head + (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 3)
        wait_until(lambda: intakes)
        assert not intakes[0].budget.held


@pytest.mark.slow
def test_a_slow_body() -> None:
    with running(Settings(body_seconds=0.1)) as server:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        assert server.raw(head + b"slowly").startswith(b"HTTP/1.1 408 ")


def test_slow_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that dribbles its headers, or says nothing, or nothing more, is closed."""
    monkeypatch.setattr(server_run, "HEADER_SECONDS", 0.3)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running() as server:
        for begin in (b"", b"GET /health HTTP/1.1\r\nHost:", whole + b"GET /he"):
            with socket.create_connection(("127.0.0.1", server.port), 0.05) as s:
                s.sendall(begin)
                wait_until(lambda s=s, begin=begin: closed(s, dribbling=bool(begin)))


def test_silent_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_run, "MAX_CONNECTIONS", 8)
    with running() as server, ExitStack() as opened:
        for _ in range(30):
            s = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
            opened.enter_context(s)
        for _ in range(5):
            assert server.request("GET", "/health")[0] == 200
        s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the latest is still there
        assert s.recv(4096).startswith(b"HTTP/1.1 200 ")


def closed(s: socket.socket, *, dribbling: bool) -> bool:
    """Whether the other side has closed the connection; dribbling: send it another byte."""
    try:
        if dribbling:
            s.sendall(b"x")
        return not s.recv(4096)
    except TimeoutError:
        return False
    except OSError:
        return True


def test_large_headers(server: Running) -> None:
    line = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000
    try:
        answer = server.raw(line)
    except ConnectionError:  # closed while we still sent
        return
    assert answer.startswith(b"HTTP/1.1 4")


def test_pictures_too_large_or_too_many(server: Running) -> None:
    assert "larger" in refused(server, data_url(PANDA + bytes(1 << 20)))
    assert "at most 16" in post(server, asking("x", *[data_url()] * 17))["error"]["message"]


def test_a_picture_bomb(server: Running) -> None:
    """40 000 × 40 000 pixels in a few bytes: refused by its header."""
    bomb = bytearray(PANDA)
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert "pixels" in refused(server, data_url(bytes(bomb)))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "panda.png",
        "ftp://example.com/a.png",
        "http://example.com/a.png",
        "javascript:alert(1)",
        "data:",
        "data:image/png",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,####",
        "data:image/png;base64,A",
        "data:image/png,abc",
    ],
)
def test_urls_that_are_none(server: Running, url: str) -> None:
    refused(server, url)


def test_what_is_not_allowed_is_refused(media: Path) -> None:
    with running() as server:
        for url in ("https://example.com/a.png", f"file://{media}/in%20side/panda.png"):
            done = server.post(asking("x", url))
            assert done["status"] == 400 and "data: URLs" in done["error"]["message"]


# --- file: URLs


@pytest.mark.parametrize(
    "path", ["in%20side/panda.png", "in side/panda.png", "in%20side/../in%20side/panda.png"]
)
def test_files_below_the_folder(server: Running, media: Path, path: str) -> None:
    for url in (f"file://{media}/{path}", f"file://localhost{media}/{path}"):
        done = post(server, asking("这是什么？", url))
        assert done["choices"][0]["message"]["content"] == "这是熊猫。"


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of Unix")
@pytest.mark.parametrize(
    "path",
    [
        "/../secret.png",
        "/%2e%2e/secret.png",
        "/..%2fsecret.png",
        "/in%20side/../../secret.png",
        "/link.png",
        "/folder/secret.png",
        "-of-others/panda.png",
        "/../no-such-file.png",
    ],
)
def test_files_elsewhere(server: Running, media: Path, path: str) -> None:
    """Refused in the same words whether there is such a file or not."""
    assert refused(server, f"file://{media}{path}") == (
        "the file is not in the folder that this server reads pictures from"
    )


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of Unix")
def test_other_files(server: Running, media: Path) -> None:
    for url in ("file:///etc/passwd", f"file://elsewhere{media}/in%20side/panda.png"):
        assert "not in the folder" in refused(server, url)
    for name in ("no.png", "pipe.png", "in%20side", "%00.png", ""):
        assert "file" in refused(server, f"file://{media}/{name}")
    assert "larger" in refused(server, f"file://{media}/large.png")
    done = post(server, asking("这是什么？", f"file://{media}/good-link.png"))
    assert done["choices"]


# --- https: addresses

NOT_PUBLIC = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "localhost",
    "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
    "224.0.0.1", "255.255.255.255", "240.0.0.1",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[fe80::1]",
    "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]",
    "[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "[2001:db8::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", NOT_PUBLIC)
def test_addresses_that_are_not_public(server: Running, host: str) -> None:
    assert refused(server, f"https://{host}/a.png") in (
        "the picture leads to an address that is not public",
        "the picture cannot be fetched (gaierror)",  # spellings that this system does not know
    )


def test_public_addresses_are_public() -> None:
    for address in ("1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///a.png",
        "https://user:secret@example.com/",
        "https://example.com:99999/",
        "https://example.com/a\r\nX-Evil: 1",
        "https://example.com/a b",
        "https://[::1",
        "https://" + "a" * 300 + ".example/",
        "https://\u2100.example/",
    ],
)
def test_addresses_that_are_none(server: Running, url: str) -> None:
    assert refused(server, url).startswith("the picture ")


class Https:
    """A TLS server on this machine that plays a public one: `pages` by path."""

    def __init__(self, pages: dict[str, bytes]) -> None:
        self.pages = pages
        self.requests: list[bytes] = []
        self.resolved: list[str] = []
        authority = trustme.CA()
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("pictures.example").configure_cert(self._context)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def fetch(
        self,
        path: str,
        *,
        limit: int = 1 << 20,
        seconds: float = PATIENCE,
        hold: Callable[[int], None] = lambda size: None,
        **options: Any,
    ) -> bytes:
        """What a Fetcher gets for which every name is this server, and this server is public."""

        async def here(host: str, port: int) -> list[Any]:
            self.resolved.append(host)
            return [ip_address("127.0.0.1")]

        options = {"resolve": here, "allowed": lambda _: True} | options
        fetcher = Fetcher(seconds=seconds, context=self.client, **options)
        url = path if path.startswith("https:") else f"https://pictures.example:{self.port}{path}"
        return asyncio.run(fetcher.fetch(url, limit=limit, hold=hold))

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with self._context.wrap_socket(connection, server_side=True) as tls:
                request = b""
                while b"\r\n\r\n" not in request:
                    part = tls.recv(4096)
                    if not part:
                        return
                    request += part
                self.requests.append(request)
                answer = self.pages.get(request.split()[1].decode(), page(b"", "404 X"))
                tls.sendall(answer)
                if answer.endswith(b"..."):  # and says no more
                    tls.recv(1)  # until the other side goes
        except OSError:
            pass
        finally:
            connection.close()


def page(body: bytes, head: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


ODD_LOCATIONS = [
    b"https://[::1", b"//[zz]/", b"https://pictures.example:99999/", b"https://pictures.example:-1/",
    b"https://pictures.example:x/", "/\u00e9".encode(), b"/\xff\xfe", b"", b"https://",
    b"https://[fe80::1%25lo]/", b"https://0.0.0.0/", b"https://.example/", b"https://a..b/",
    b"https://" + b"a" * 70 + b".example/", b'https://pictures.exam"ple/', b"https://xn--a/",
    b"https://user@pictures.example/", b"https:/\\\\127.0.0.1/",
    b"https://pictures.example\\@127.0.0.1/",
    "https://\u2100.example/".encode(), b"https://%31%32%37.0.0.1/",
    b"javascript:1", b"/" + b"a" * 60_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def public() -> Iterator[Https]:
    there = Https(
        {
            "/panda.png": page(PANDA),
            "/chunked": b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
            "/moved": page(b"", "302 Found\r\nLocation: /panda.png"),
            "/private": page(b"", "302 Found\r\nLocation: https://127.0.0.1/admin"),
            "/named": page(b"", "307 X\r\nLocation: https://internal.example/admin"),
            "/down": page(b"", "301 X\r\nLocation: http://pictures.example/panda.png"),
            "/file": page(b"", "301 X\r\nLocation: file:///etc/passwd"),
            "/loop": page(b"", "301 X\r\nLocation: /loop"),
            "/gone": page(b"", "404 X"),
            "/cut": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
            "/stuck": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n...",
            "/nonsense": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
            "/large": page(bytes(1_000_000)),
            "/endless": b"HTTP/1.1 200 OK\r\n\r\n" + bytes(3_000_000),
            "/gzip": page(b"x", "200 OK\r\nContent-Encoding: gzip"),
            "/switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
            "/continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + page(b"ab"),
            "/empty": b"HTTP/1.1 204 X\r\n\r\n",
            "/no-location": page(b"", "302 Found"),
            "/two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
            "/long-head": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n",
            "/long-length": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nab",
            **{
                f"/to/{i}": page(b"", "302 Found\r\nLocation: ").replace(
                    b"Location: ", b"Location: " + location
                )
                for i, location in enumerate(ODD_LOCATIONS)
            },
        }
    )  # fmt: skip
    yield there
    there.close()


def test_https_pictures(public: Https) -> None:
    assert public.fetch("/panda.png") == PANDA
    assert public.fetch("/moved") == PANDA
    assert public.fetch("/chunked") == b"ab"
    assert (
        f"Host: pictures.example:{public.port}\r\n".lower().encode() in public.requests[0].lower()
    )


def test_a_name_is_resolved_once(public: Https) -> None:
    """The connection goes to the address that was checked, not to what the name is next."""
    public.resolved.clear()
    public.fetch("/panda.png")
    assert public.resolved == ["pictures.example"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/private", "not public"),
        ("/named", "not public"),
        ("/down", "not at an https: address"),
        ("/file", "not at an https: address"),
        ("/loop", "redirected more than 3"),
        ("/gone", "status 404"),
        ("/cut", "cannot be fetched"),
        ("/nonsense", "cannot be fetched"),
    ],
)
def test_what_a_public_server_may_not_do(public: Https, path: str, why: str) -> None:
    public_port = public.port

    async def names(host: str, port: int) -> list[Any]:
        """internal.example is a name that resolves to a private address."""
        if host == "pictures.example" and port == public_port:
            return [ip_address("127.0.0.1")]
        if host == "internal.example":
            return [ip_address("1.1.1.1"), ip_address("10.0.0.1")]
        return await resolve(host, port)

    seen: list[Any] = []

    def allowed(address: Any) -> bool:
        seen.append(address)
        return len(seen) == 1 or path in ("/loop",) or is_public(address)

    with pytest.raises(ApiError, match=why):
        public.fetch(path, resolve=names, allowed=allowed)


@pytest.mark.parametrize("number", range(len(ODD_LOCATIONS)))
def test_a_redirect_may_say_anything(public: Https, number: int) -> None:
    """It is the picture's fault, never the server's: an ApiError of 400 and no other exception."""

    async def names(host: str, port: int) -> list[Any]:
        return (
            [ip_address("127.0.0.1")] if host == "pictures.example" else await resolve(host, port)
        )

    def allowed(address: Any) -> bool:
        return str(address) == "127.0.0.1" or is_public(address)

    with pytest.raises(ApiError, match="the picture ") as caught:
        public.fetch(f"/to/{number}", resolve=names, allowed=allowed)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/switch", "cannot be fetched"),
        ("/empty", "status 204"),
        ("/no-location", "status 302"),
        ("/two-lengths", "cannot be fetched"),
        ("/long-head", "cannot be fetched"),
        ("/long-length", "cannot be fetched"),
        ("/endless", "larger than 1048576 bytes"),
    ],
)
def test_answers_of_any_kind(public: Https, path: str, why: str) -> None:
    with pytest.raises(ApiError, match=why) as caught:
        public.fetch(path)
    assert caught.value.status == 400


def test_informational_answers_are_passed_over(public: Https) -> None:
    assert public.fetch("/continue") == b"ab"


def test_what_is_fetched_is_held(public: Https) -> None:
    """It counts towards the same budget as bodies, piece by piece, and can be refused amid it."""
    sizes: list[int] = []
    assert len(public.fetch("/large", hold=sizes.append)) == sum(sizes) == 1_000_000
    budget = Budget(total=300_000, request=100_000)
    with pytest.raises(ApiError, match="too many large requests"):
        public.fetch("/large", hold=budget.open("a").add)
    assert 0 < budget.held <= 200_000


@pytest.mark.slow
def test_pictures_of_all_requests_are_bounded(public: Https) -> None:
    """Requests of a few bytes, each with a large picture and one that never comes."""

    async def here(host: str, port: int) -> list[Any]:
        return [ip_address("127.0.0.1")]

    fetcher = Fetcher(seconds=2, resolve=here, allowed=lambda _: True, context=public.client)
    settings = Settings(https_images=True, max_bodies=3_000_000, max_body=1_500_000)
    urls = [f"https://pictures.example:{public.port}/{name}" for name in ("large", "stuck")]
    with running(settings, fetcher=fetcher) as server, ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: server.post(asking("x", *urls)), range(8)))
        statuses = [answer["status"] for answer in done]
        assert 503 in statuses and set(statuses) <= {400, 503}
        assert server.post(asking("x", urls[1]))["status"] == 400  # all was given back


def test_a_fetch_is_bounded(public: Https) -> None:
    with pytest.raises(ApiError, match="larger than 1000 bytes"):
        public.fetch("/panda.png", limit=1000)
    with pytest.raises(ApiError, match=r"within 0\.3 s"):
        public.fetch("/stuck", seconds=0.3)


def test_a_certificate_has_to_fit(public: Https) -> None:
    with pytest.raises(ApiError, match="SSLCertVerificationError"):
        public.fetch(f"https://other.example:{public.port}/panda.png")


# --- injection


def test_what_clients_send_stays_out_of_headers(server: Running) -> None:
    evil = "x\r\nSet-Cookie: a=b"
    key = {"Authorization": f"Bearer {KEY}"}
    body = asking(evil, model=evil)
    for method, path, sent in (
        ("POST", "/v1/chat/completions", body),
        ("GET", "/v1/models/x%0d%0aSet-Cookie:%20a=b", None),
    ):
        status, headers, _ = server.request(method, path, sent, key)
        assert status == 404 and "Set-Cookie" not in headers


@pytest.mark.parametrize("as_json", [False, True])
def test_what_clients_send_forges_no_logs(as_json: bool) -> None:
    formatter = logs.formatter(as_json=as_json)
    fields = {"path": "/x\r\nseechat: \x1b[31mforged"}
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "fields": fields})
    line = formatter.format(record)
    assert "forged" in line and line.isprintable()
