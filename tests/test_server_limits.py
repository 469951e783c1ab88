"""What any request may take: memory, the event loop's time, and the end of its connection."""

import gzip
import json
import socket
import sys
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from large_requests import FILLINGS, LARGEST, PLACES, Watched, history, request, watched
from seechat_lite import json_structure
from seechat_lite.json_structure import MAX_DEPTH, MAX_PARTS, too_complex
from seechat_lite.server.access import client_of
from seechat_lite.server.budget import Budget
from seechat_lite.server.errors import ApiError
from seechat_lite.server.settings import Settings
from serving import Running, asking, running

MEMORY = 300_000_000  # bytes that the server may take for any request
HEALTH = 5.0  # seconds; it takes 0.6 at most where nothing else runs, and took 23.7 before


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


# --- large requests


@pytest.fixture(scope="module")
def watching() -> Iterator[Watched]:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    with watched() as server:
        yield server


@pytest.mark.slow
@example(place="content", filling="ones", size=LARGEST)
@example(place="content", filling="one text with an emoji", size=LARGEST)
@example(place="content", filling="wrong parts", size=LARGEST)
@example(place="picture", filling="base64 with blanks", size=LARGEST)
@example(place="picture", filling="percent", size=LARGEST)
@example(place="past", filling="one text of Chinese", size=LARGEST)
@example(place="tools", filling="deep objects", size=LARGEST)
@example(place="logit_bias", filling="keys", size=LARGEST)
@example(place="pair", filling="one text of escapes", size=LARGEST)
@given(
    place=st.sampled_from(sorted(PLACES)),
    filling=st.sampled_from(sorted(FILLINGS)),
    size=st.sampled_from([LARGEST, LARGEST // 8, 100_000]),
)
@settings(max_examples=40)
def test_no_request_takes_much(watching: Watched, place: str, filling: str, size: int) -> None:
    path, body = request(place, filling, size)
    with watching.watching_health() as late:
        status, _ = watching.post(path, body)
    assert status in (200, 400, 404, 422)
    assert watching.took < MEMORY
    assert max(late) < HEALTH


def test_a_long_history_is_answered(watching: Watched) -> None:
    with watching.watching_health() as late:
        status, _ = watching.post("/v1/chat/completions", history(31_000_000))
    assert status == 200 and watching.took < MEMORY and max(late) < HEALTH


@pytest.mark.slow
def test_chunks_of_one_byte_keep_nobody_waiting(watching: Watched) -> None:
    host, port = watching.url.split(":")
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with watching.watching_health() as late, socket.create_connection((host, int(port))) as s:
        s.sendall(head + b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n")
        assert s.recv(100).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
    assert max(late) < HEALTH


def test_what_is_too_complex_is_said() -> None:
    assert too_complex(b"[" + b"1," * (MAX_PARTS - 2) + b"1]") is None
    assert "more than 100000 values" in (too_complex(b"1," * (MAX_PARTS + 1)) or "")
    assert "levels deep" in (too_complex(b"[" * (MAX_DEPTH + 1)) or "")
    assert too_complex(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


def parts_and_depth(value: object, depth: int = 1) -> tuple[int, int]:
    """Strings, brackets and commas of a value, and how deep it is nested."""
    match value:
        case str():
            return 1, depth - 1
        case dict() | list():
            items = list(value.items()) if isinstance(value, dict) else [(1, v) for v in value]
            inner = [parts_and_depth(v, depth + 1) for _, v in items]
            own = 2 + max(len(items) - 1, 0) + (len(items) if isinstance(value, dict) else 0)
            return own + sum(p for p, _ in inner), max([depth, *(d for _, d in inner)])
    return 0, depth - 1


@pytest.mark.slow
@given(JSON, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_parts_are_counted_whatever_is_in_texts(value: object, ascii: bool, indent: object) -> None:
    """Brackets, commas and quotes inside of texts count for nothing."""
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)  # pyright: ignore[reportArgumentType]
    parts, depth = parts_and_depth(value)
    data = text.encode("utf-8", "surrogatepass")
    bounds = [(parts, depth)]
    bounds += [(parts - 1, depth)] if parts else []
    bounds += [(parts, depth - 1)] if depth else []
    for most, deepest in bounds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_structure, "MAX_PARTS", most)
            patch.setattr(json_structure, "MAX_DEPTH", deepest)
            fine = too_complex(data) is None
        assert fine == (most >= parts and deepest >= depth)


@given(st.binary(max_size=300))
def test_any_bytes_are_looked_at(data: bytes) -> None:
    too_complex(data)


# --- bodies that are no JSON in UTF-8

GOOD = json.dumps(asking("你好", max_tokens=1), ensure_ascii=False)


def test_a_byte_order_mark_is_no_mistake(server: Running) -> None:
    assert server.post(b"\xef\xbb\xbf" + GOOD.encode())["choices"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"", {}, 400, "empty; expected a JSON object"),
        (b" \n", {}, 400, "empty"),
        (gzip.compress(GOOD.encode(), mtime=0), {}, 415, "compressed (gzip)"),
        (
            gzip.compress(GOOD.encode(), mtime=0),
            {"Content-Encoding": "gzip"},
            415,
            "compressed (gzip)",
        ),
        (GOOD.encode(), {"Content-Encoding": "br"}, 415, "compressed (br)"),
        (GOOD.encode(), {"Content-Encoding": "\xff'; x"}, 415, "compressed (encoded)"),
        (GOOD.encode("utf-16"), {}, 400, "UTF-16"),
        (GOOD.encode("utf-16-le"), {}, 400, "UTF-16"),
        (GOOD.encode("utf-32-be"), {}, 400, "UTF-16 or UTF-32"),
        (GOOD.encode("gbk"), {}, 400, "not UTF-8 (byte 0xc4 at "),
        (b'{"messages":[{"role":"user","content":"\\ud83d"}]}', {}, 400, "half a character"),
        (b'{"messages":[{"role":"user","content":"\\ude00 x"}]}', {}, 400, "half a character"),
        (b"messages=hello", {}, 400, "not JSON: "),
        (
            b"prompt=hello",
            {"Content-Type": "application/x-www-form-urlencoded"},
            400,
            "a form; expected a JSON object",
        ),
        (
            b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\nhello\r\n--x--\r\n",
            {"Content-Type": "multipart/form-data; boundary=x"},
            400,
            "a form",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/"])
def test_what_is_no_json_is_called_what_it_is(
    server: Running, path: str, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    answered, _, content = server.request("POST", path, body, headers)
    error = json.loads(content)["error"]
    assert answered == status and said in error["message"]


def test_curl_calls_json_a_form(server: Running) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert server.post(GOOD.encode(), **form)["choices"]


def test_clients_words_do_not_make_long_errors(server: Running) -> None:
    for body in (
        asking("x", model="m" * 100_000),
        {"messages": [{"role": "user", "content": [{"type": "t" * 100_000}]}]},
        {"messages": [{"role": "r" * 100_000, "content": "x"}]},
        {"messages": [{"role": "user", "content": {"k" * 100_000: 1}}]},
    ):
        _, _, content = server.request("POST", "/v1/chat/completions", body)
        assert len(content) < 1000


# --- where a request ends

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
SECOND = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        HEAD.replace(b"POST", b"OPTIONS")
        + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        HEAD + b"Content-Length: 4, 5\r\n\r\nabcde",
        HEAD + b"Content-Length: +4\r\n\r\nabcd",
        HEAD + b"Content-Length: 0x4\r\n\r\nabcd",
        HEAD + b"Content-Length: 4_0\r\n\r\nabcd",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + b"Content-Length : 4\r\n\r\nabcd",
        HEAD + b"Transfer-Encoding: identity\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\nabcd0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcdXX0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b" POST / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\n Host: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"POST /\r\n\r\n",
    ],
)
def test_an_uncertain_end_ends_the_connection(server: Running, sent: bytes) -> None:
    """One refusal, and nothing that follows is taken for a second request."""
    answer = server.raw(sent + SECOND)
    assert answer.startswith(
        (b"HTTP/1.1 400 ", b"HTTP/1.1 501 ", b"HTTP/1.1 505 ", b"HTTP/1.1 413 ")
    )
    assert answer.count(b"HTTP/1.1") == 1 and b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X: a\r\n Transfer-Encoding: chunked\r\n",  # a folded line is part of X
        HEAD + b"Content-Length: %d\r\nContent-Length: %d\r\n",  # twice the same
        HEAD.replace(b"\r\n", b"\n") + b"Content-Length: %d\n",
    ],
)
def test_what_has_one_end_is_taken(server: Running, sent: bytes) -> None:
    body = b'{"messages":1}'
    sent = sent.replace(b"%d", b"%d" % len(body))
    if b"Content-Length" not in sent:
        sent += b"Content-Length: %d\r\n" % len(body)
    answer = server.raw(sent + (b"\r\n" if sent.endswith(b"\r\n") else b"\n") + body + SECOND)
    assert answer.startswith(b"HTTP/1.1 422 ") and answer.count(b"HTTP/1.1 200 OK") == 1


def test_chunks_may_have_extensions_and_trailers(server: Running) -> None:
    body = b'e;a="b\\"c"\r\n{"messages":1}\r\n0;x\r\nX: y\r\n\r\n'
    answer = server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + SECOND)
    assert answer.startswith(b"HTTP/1.1 422 ") and answer.count(b"HTTP/1.1 200 OK") == 1


# --- headers of any kind

NAMES = [
    "Host", "Origin", "Referer", "Authorization", "x-api-key", "Content-Type", "Content-Encoding",
    "Range", "Cookie", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded",
    "Accept", "Accept-Encoding", "If-None-Match", "If-Modified-Since", "Expect", "Upgrade",
    "Access-Control-Request-Method", "Access-Control-Request-Headers", "User-Agent",
]  # fmt: skip
VALUES = [
    "http://[", "http://[::1", "http://localhost:99999", "//", "http://\u00e9", "[", "]", "@", ":",
    "localhost:", "localhost:x", "localhost@evil", "evil@localhost", "[::1%lo]", "null", "%zz",
    "bytes=0-", "bytes=-1", "bytes=9-1,,", "text/plain; charset=nonsense", "a=b; $Version=\"",
    "chunked", "Bearer", "Bearer \x80", "basic Og==", "xn--a", "a" * 3000, ",", "100-continue",
    "websocket", "h2c", "*", "\"", "Mon, 99 Foo 0000 00:00:00 GMT", "",
]  # fmt: skip
CHARACTERS = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")


@example(method="GET", path="/health", name="Origin", value="http://[")
@example(method="OPTIONS", path="/v1/models", name="Origin", value="http://]")
@given(
    method=st.sampled_from(["GET", "POST", "OPTIONS", "HEAD"]),
    path=st.sampled_from(
        ["/health", "/", "/page.js", "/v1/models", "/v1/models/%ff%00", "/v1/models/..%2f%2e%2e",
         "//evil/health", "/%", "/?%zz=%", "*", "http://[/health", "http://evil/health",
         "/health#x", "/v1/models/" + "a" * 3000, "/v1/chat/completions"]
    ),
    name=st.sampled_from(NAMES),
    value=st.sampled_from(VALUES) | st.text(CHARACTERS, max_size=30),
)  # fmt: skip
@settings(max_examples=150)
@pytest.mark.parametrize("cors", [False, True])
def test_no_header_is_the_servers_fault(
    guarded: dict[bool, Running], cors: bool, method: str, path: str, name: str, value: str
) -> None:
    lines = [f"{method} {path} HTTP/1.1", f"{name}: {value}", "Connection: close"]
    if name != "Host":
        lines.insert(1, "Host: localhost")
    if method == "POST":
        lines.append("Content-Length: 0")
    answer = guarded[cors].raw("\r\n".join([*lines, "", ""]).encode("latin-1"))
    assert not answer.startswith(b"HTTP/1.1 5"), answer


@pytest.fixture(scope="module")
def guarded() -> Iterator[dict[bool, Running]]:
    with (
        running() as plain,
        running(Settings(cors_origins=("https://good.example",), api_keys=("k",))) as cors,
    ):
        yield {False: plain, True: cors}


@pytest.mark.parametrize(
    "host",
    ["localhost@evil", "evil@localhost", "localhost/evil", "localhost:8080:80", "localhost:http",
     "[::1", "::1]", "[localhost]", "local host", "localhost?", "", "127.0.0.1.evil",
     "[fe80::1%25lo]"],
)  # fmt: skip
def test_hosts_that_are_no_host_are_refused(server: Running, host: str) -> None:
    answer = server.raw(
        b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: " + host.encode() + b"\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 403 ")


# --- who is a client


def client(address: str) -> str:
    return client_of({"type": "http", "client": (address, 1), "headers": []})


def test_a_client_is_an_address() -> None:
    assert client("192.0.2.1") != client("192.0.2.2")
    assert client("2001:db8::1") == client("2001:db8::ffff:1") != client("2001:db8:0:1::1")
    assert client("::ffff:192.0.2.1") == client("192.0.2.1")
    assert client("fe80::1%eth0") == client("fe80::2%eth0")
    assert client("") == client_of({"type": "http", "client": None})


@pytest.mark.parametrize("keys", [(), ("secret", "other")])
def test_a_key_is_one_client_however_it_is_spelled(
    keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Settings(api_keys=keys)) as server:
        clients: list[str] = []
        answer = server.scheduler.answer
        monkeypatch.setattr(
            server.scheduler, "answer", lambda ask: clients.append(ask.client) or answer(ask)
        )
        for sent in (
            "Bearer secret",
            "bearer secret",
            "BEARER    secret",
            "Bearer \t secret ",
            *(f"Bearer{' ' * n}secret" for n in range(2, 20)),
        ):
            done = server.post(asking("你好", max_tokens=1), Authorization=sent)
            assert done["choices"]
        assert server.post(asking("你好", max_tokens=1), **{"x-api-key": " secret"})["choices"]
        assert len(set(clients)) == 1
        if not keys:  # what is not asked for is not looked at
            server.post(asking("你好", max_tokens=1), Authorization="Bearer another")
            assert len(set(clients)) == 1
        else:
            server.post(asking("你好", max_tokens=1), Authorization="Bearer other")
            assert len(set(clients)) == 2


# --- memory of all requests


def test_one_client_leaves_room_for_others() -> None:
    budget = Budget(total=100, request=20)
    first = [budget.open("a") for _ in range(4)]
    for held in first:
        held.add(20)
    with pytest.raises(ApiError, match="too many large requests"):
        budget.open("a").add(1)
    other = budget.open("b")
    other.add(20)
    with pytest.raises(ApiError):
        budget.open("c").add(1)
    assert budget.held == 100
    assert first[0].release() == 20
    budget.open("c").add(20)
    assert other.release() == 20 and other.release() == 0


def test_a_budget_of_one_request_serves_it() -> None:
    held = Budget(total=20, request=20).open("a")
    held.add(20)
    with pytest.raises(ApiError):
        held.add(1)
    assert held.release() == 20
