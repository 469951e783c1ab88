"""What chat programs, SDKs and desktop programs send, and what they need to hear."""

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import seechat_lite as sl
from reference import load_json
from seechat_lite.conversation import FORMATS
from seechat_lite.generation import Generation
from seechat_lite.server.listen import _listen, _Protocol, configure
from seechat_lite.server.scheduler import GenerationRequest
from seechat_lite.server.settings import Settings
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import Sampling, read_manifest
from serving import IMAGES, PANDA, Running, asking, data_url, running

PICTURE = base64.b64encode(PANDA).decode()
OTHER = "https://chat.example"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Settings(cors_origins=(OTHER,), aliases=("gpt-4o",))) as server:
        yield server


def said(server: Running, body: dict[str, Any]) -> str:
    done = server.post(body)
    assert "choices" in done, done
    return done["choices"][0]["message"]["content"]


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


S, U, A = "system", "user", "assistant"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
# How programs' histories look, beside questions and answers in turn
HISTORIES = {
    "NextChat: a summary as system message amid the turns": [
        message(U, "你好"),
        message(A, "你好！"),
        message(S, "This is a summary of the chat history as a recap: …"),
        message(U, "你是谁？"),
    ],
    "LobeChat: a greeting, and an empty answer that was stopped": [
        message(A, "你好，我是助手。"),
        message(U, "你好"),
        message(A, ""),
        message(U, "你是谁？"),
    ],
    "SillyTavern: character, greeting, instructions after the history": [
        message(S, "You are Ada."),
        message(A, "*waves* Hello!"),
        message(U, "你好"),
        message(S, "Stay in character."),
    ],
    "SillyTavern: a begun answer at the end": [message(U, "你好"), message(A, "Ada:")],
    "Cherry Studio: a tool's call and result": [
        message(U, "你好"),
        message(A, None, tool_calls=[CALL]),
        message("tool", "21 °C", tool_call_id="1"),
    ],
    "Continue: parts everywhere": [
        message(S, [{"type": "text", "text": "Be brief."}]),
        message(U, [{"type": "text", "text": "你好"}]),
        message(A, [{"type": "text", "text": "你好！"}]),
        message(U, [{"type": "text", "text": "你是谁？"}]),
    ],
    "Dify: an empty system prompt, functions' results": [
        message(S, ""),
        message(U, "你好"),
        message("function", "21 °C", name="weather"),
        message(U, "你是谁？"),
    ],
    "only instructions": [message(S, "你好")],
    "nothing at the end": [message(U, "你好"), message(A, "你好！"), message(U, "")],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_is_answered(server: Running, name: str) -> None:
    assert said(server, {"messages": HISTORIES[name], "max_tokens": 5})


OPEN_WEBUI = load_json("clients/open_webui.json")["requests"]


@pytest.mark.parametrize("asked", OPEN_WEBUI, ids=lambda asked: asked["name"])
def test_what_open_webui_sends(server: Running, asked: dict[str, Any]) -> None:
    """Each of its requests, with 36 tools and a list of files before the user's words."""
    body = asked["body"] and json.dumps(asked["body"]).replace("PICTURE", PICTURE).encode()
    status, headers, content = server.request(asked["method"], asked["path"], body)
    assert status == 200
    text = content.decode()
    if asked["method"] == "GET":
        assert "seechat-lite-builtin" in text
    elif "picture" in asked["name"]:
        assert "这是" in text and "熊猫" in text
    if "tools" in (asked["body"] or {}):
        assert "tools" in headers["X-Seechat-Ignored"]
        assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("joined", [True, False])
def test_a_programs_list_of_files_is_no_question(server: Running, joined: bool) -> None:
    """A model that has learnt no instructions is shown the user's own words; others see all."""
    files = '<attached_files>\n<file id="1" name="panda.png"/>\n</attached_files>\n\n'
    texts = [files + "这是什么？"] if joined else [files, "这是什么？"]
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    content = [*({"type": "text", "text": text} for text in texts), picture]
    body = {"messages": [message(U, content)]}
    assert said(server, body) == "这是熊猫。"
    assert said(server, {"messages": [message(U, [content[0], picture])]}) == "这是熊猫。"
    counted = [
        server.post(body | {"conversation_format": name})["usage"]["prompt_tokens"]
        for name in ("seechat-plain", "seechat")
    ]
    assert counted[0] + 20 < counted[1]
    assert said(server, {"messages": [message(U, files)], "max_tokens": 3})


def test_tools_are_declared_and_ignored(server: Running) -> None:
    body = asking("你好", tools=[{"type": "function", "function": {"name": "f"}}] * 36)
    more = {"tool_choice": "auto", "parallel_tool_calls": True, "frequency_penalty": 0.1}
    status, headers, content = server.request("POST", "/v1/chat/completions", body | more)
    assert status == 200
    assert headers["X-Seechat-Ignored"] == "frequency_penalty, tools"
    plain = server.post(asking("你好"))
    assert json.loads(content)["choices"] == plain["choices"]
    status, headers, _ = server.request("POST", "/v1/chat/completions", body | {"stream": True})
    assert (status, headers["X-Seechat-Ignored"]) == (200, "tools")
    assert (
        "X-Seechat-Ignored" not in server.request("POST", "/v1/chat/completions", asking("你好"))[1]
    )


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [message(U, "这是什么？", images=[PICTURE])]},
        {"messages": [message(U, "这是什么？")], "images": [PICTURE]},
        {"messages": [message(U, "这是什么？")], "image_data": [{"data": PICTURE, "id": 1}]},
        asking("这是什么？", PICTURE),
        asking("这是什么？", "data:application/octet-stream;base64," + PICTURE),
        asking("这是什么？", "data:;base64," + PICTURE.replace("+", "-").replace("/", "_")),
        {
            "messages": [
                message(
                    U,
                    [
                        {"type": "text", "text": "这是什么？"},
                        {"type": "image", "source": {"type": "base64", "data": PICTURE}},
                    ],
                )
            ]
        },
    ],
)
def test_pictures_wherever_clients_put_them(server: Running, body: dict[str, Any]) -> None:
    assert said(server, body) == "这是熊猫。"


def test_a_picture_without_words_is_described(server: Running) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    for content in ([picture], [picture, {"type": "text", "text": ""}]):
        assert said(server, {"messages": [message(U, content)]}) == "这是熊猫。"
    before = [message(U, "Hello"), message(A, "Hi!")]
    assert said(server, {"messages": [*before, message(U, [picture])]}).startswith("This is a")


def test_numbers_as_json_writers_write_them(server: Running) -> None:
    body = asking("你好", max_tokens=5.0, temperature="0.7", top_k="40", seed="7", top_p=1)
    assert said(server, body) == said(
        server, asking("你好", max_tokens=5, temperature=0.7, top_k=40, seed=7)
    )
    for wrong in ("hot", "", "0x1", "1" * 100, [1], True):
        assert server.post(asking("你好", max_tokens=wrong))["status"] == 422


def test_forgotten_turns_are_told(server: Running) -> None:
    turns = [message(U, "我的名字是小明。"), message(A, "好的。")]
    turns += [message(U, "讲个故事" + "好" * 60), message(A, "从前" + "有" * 60)] * 40
    body = {"messages": [*turns, message(U, "我叫什么名字？")], "max_tokens": 5}
    _, headers, content = server.request("POST", "/v1/chat/completions", body)
    dropped = json.loads(content)["usage"]["dropped_turns"]
    assert dropped > 0 and headers["X-Seechat-Dropped-Turns"] == str(dropped)
    _, headers, _ = server.request("POST", "/v1/chat/completions", body | {"stream": True})
    assert headers["X-Seechat-Dropped-Turns"] == str(dropped)
    short = server.post(asking("你好"))
    assert short["usage"]["dropped_turns"] == 0


@pytest.mark.parametrize("origin", [OTHER, "tauri://localhost", "http://tauri.localhost"])
def test_a_page_elsewhere_with_an_sdk(server: Running, origin: str) -> None:
    """What browsers ask first, and headers that the page may read, of refusals too."""
    wanted = "authorization,content-type,x-stainless-lang,x-stainless-os,x-title,http-referer"
    ask = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted,
    }
    status, headers, _ = server.request("OPTIONS", "/v1/chat/completions", None, ask)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, origin)
    assert headers["Access-Control-Allow-Headers"] == wanted
    for body, expected in ((asking("你好", max_tokens=1), 200), ({}, 422), (b"{", 400)):
        status, headers, _ = server.request(
            "POST", "/v1/chat/completions", body, {"Origin": origin}
        )
        assert (status, headers["Access-Control-Allow-Origin"]) == (expected, origin)
        assert "X-Request-Id" in headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_other_origins_are_named(server: Running, origin: str) -> None:
    status, headers, content = server.request("GET", "/v1/models", None, {"Origin": origin})
    assert status == 403 and "Access-Control-Allow-Origin" not in headers
    message = json.loads(content)["error"]["message"]
    assert f"the origin {origin!r}" in message and f"cors_origins {origin}" in message


def test_hosts_that_containers_use(server: Running) -> None:
    for host, expected in (("host.docker.internal:8080", 200), ("evil.example", 403)):
        status, _, content = server.request("GET", "/v1/models", None, {"Host": host})
        assert status == expected
    assert "'evil.example'" in json.loads(content)["error"]["message"]


def test_any_origin_where_that_was_asked_for() -> None:
    with running(Settings(cors_origins=("*",))) as server:
        headers = {"Origin": "https://anywhere.example"}
        status, got, _ = server.request("GET", "/v1/models", None, headers)
        assert (status, got["Access-Control-Allow-Origin"]) == (200, "*")


def test_requests_have_names(server: Running) -> None:
    for path in ("/v1/models", "/nowhere", "/health"):
        assert server.request("GET", path)[1]["X-Request-Id"].startswith("req_")
    given = server.request("GET", "/v1/models", None, {"X-Request-Id": "mine-1"})[1]
    assert given["X-Request-Id"] == "mine-1"
    forged = server.request("GET", "/v1/models", None, {"X-Request-Id": "a b"})[1]
    assert forged["X-Request-Id"] != "a b"


def test_what_the_model_can_do(server: Running) -> None:
    models = json.loads(server.request("GET", "/v1/models")[2])["data"]
    assert [m["id"] for m in models] == ["seechat-lite-builtin", "gpt-4o"]
    assert all(m["input_modalities"] == ["text", "image"] for m in models)
    assert all("vision" in m["capabilities"] for m in models)
    status, _, content = server.request("GET", "/v1")
    assert status == 200 and "/v1/chat/completions" in json.loads(content)["paths"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (asking("x") | {"messages": [message("human", "x")]}, "expected one of system, developer"),
        ({"messages": [message(U, [{"type": "input_audio"}])]}, "expected text, or image_url"),
        ({"messages": [message(U, [{"type": "file"}])]}, "expected text, or image_url"),
        (asking("x", "cat.png"), "send the picture itself as data:image/png;base64,…"),
    ],
)
def test_errors_say_what_is_taken(server: Running, body: Any, expected: str) -> None:
    done = server.post(body)
    assert done["status"] == 400 and expected in done["error"]["message"]


def test_small_events_are_sent_at_once(server: Running) -> None:
    """TCP_NODELAY is set on the listener and on what is accepted, wherever it comes from."""
    with _listen("127.0.0.1", 0) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    options: list[int] = []

    async def accept() -> None:
        loop = asyncio.get_running_loop()
        config = configure(server.app)
        config.load()

        class Watching(_Protocol):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                sock = transport.get_extra_info("socket")
                options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        from uvicorn.server import ServerState

        listener = await loop.create_server(
            lambda: Watching(config, ServerState(), {}), sock=socket.create_server(("127.0.0.1", 0))
        )
        port = listener.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        while not options:
            await asyncio.sleep(0.01)
        writer.close()
        listener.close()

    asyncio.run(accept())
    assert all(options)


def test_the_same_conversation_in_python(server: Running) -> None:
    """The server and the API read messages alike."""
    messages = HISTORIES["SillyTavern: character, greeting, instructions after the history"]
    with sl.load() as model:
        assert model.chat(messages=messages).ask() == said(server, {"messages": messages})


def test_what_the_model_is_asked_with_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each API takes the bundle's defaults and ranges, and a client's own values before them."""
    usual = Sampling(
        temperature=0.2,
        top_p=0.9,
        top_k=7,
        repetition_penalty=1.1,
        max_temperature=0.5,
        max_repetition_penalty=1.5,
    )
    manifest = replace(read_manifest(BUILTIN), sampling=usual)
    asked: list[Generation] = []
    with running(manifest=manifest) as server:
        answer = server.scheduler.answer

        def noting(ask: GenerationRequest) -> Any:
            asked.append(ask.generation)
            return answer(ask)

        monkeypatch.setattr(server.scheduler, "answer", noting)
        said = {"messages": [message(U, "x")], "stream": False, "max_tokens": 1}
        own = {"top_p": 0.8, "temperature": 0.3}
        high = {"temperature": 2, "repetition_penalty": 3}
        for path, body in (
            ("/v1/chat/completions", said),
            ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
            ("/v1/responses", {"input": "x", "max_output_tokens": 1}),
            ("/api/chat", said),
            ("/api/generate", {"prompt": "x", "stream": False}),
        ):
            below = path.startswith("/api")
            for more in ({}, own, {"temperature": 0}):
                given = {"options": {"num_predict": 1} | more} if below else more
                assert server.request("POST", path, body | given)[0] == 200
            plain, theirs, greedy = asked[-3:]
            assert (plain.temperature, plain.top_p) == (0.2, 0.9)
            assert (plain.top_k, plain.repetition_penalty) == (7, 1.1)
            assert (theirs.temperature, theirs.top_p) == (0.3, 0.8)
            assert greedy.temperature == 0
        for path, body in (
            ("/v1/chat/completions", said | high),
            ("/", {"prompt": "x", "max_length": 20} | high),
        ):
            status, headers, _ = server.request("POST", path, body)
            assert status == 200
            assert (asked[-1].temperature, asked[-1].repetition_penalty) == (0.5, 1.5)
            told = headers["X-Seechat-Ignored"]
            assert "temperature above 0.5" in told and "repetition_penalty above 1.5" in told


def test_a_conversation_in_another_format(server: Running) -> None:
    """For one request; names are listed, and unknown ones refused."""
    about = json.loads(server.request("GET", "/v1/models")[2])["data"][0]
    assert about["conversation_format"] == "seechat-plain"
    assert set(about["conversation_formats"]) == set(FORMATS)
    said_before = [message(S, "Be brief."), message(U, "你好"), message(A, "你好！")]
    body = {"messages": [*said_before, message(U, "你是谁？")], "max_tokens": 5}
    counts = {}
    for name in ("seechat", "chatglm", None, ""):
        done = server.post(body | {"conversation_format": name})
        counts[name] = done["usage"]["prompt_tokens"]
    # the built-in model's own format leaves the system's text out
    assert counts[None] == counts[""] < counts["seechat"]
    with sl.load() as model:
        chat = model.chat("chatglm", messages=body["messages"])
        assert counts["chatglm"] == chat.ask(max_new_tokens=1).stats.prompt_tokens
    refused = server.post(body | {"conversation_format": "klingon"})
    assert refused["status"] == 400 and "expected one of seechat" in refused["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/api/chat", "/"])
def test_our_own_mistakes_are_told_to_pages_elsewhere(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A page of another origin is told of nothing that lacks its headers; the log says what."""

    def broken(*_: object) -> None:
        raise RuntimeError("no more paper")

    monkeypatch.setattr(server.scheduler, "answer", broken)
    body = {"prompt": "x"} if path == "/" else {"input": "x", "stream": False} | asking("x")
    status, headers, content = server.request("POST", path, body, {"Origin": OTHER})
    assert status == 500 and headers["Access-Control-Allow-Origin"] == OTHER
    assert "X-Request-Id" in headers["Access-Control-Expose-Headers"] and headers["X-Request-Id"]
    error = json.loads(content)["error"]
    assert "paper" not in str(error) and "internal error" in str(error)
    assert isinstance(error, str) == path.startswith("/api/")
    assert "no more paper" in caplog.text


def test_refusals_below_api_are_ollamas() -> None:
    """Whoever refuses: the keys, the origins, the limits, the routes."""
    body = {"messages": [message(U, "x")]}
    key = {"Authorization": "Bearer k"}
    with running(Settings(api_keys=("k",), max_body=100)) as server:
        for method, path, sent, headers, expected in (
            ("POST", "/api/chat", body, {}, 401),
            ("GET", "/api/tags", None, {}, 401),
            ("GET", "/api/tags", None, key | {"Origin": "https://evil.example"}, 403),
            ("GET", "/api/tags", None, key | {"Host": "evil.example"}, 403),
            ("POST", "/api/chat", b" " * 200, key, 413),
            ("POST", "/api/chat", b"{", key, 400),
            ("POST", "/api/chat", {"messages": 1}, key, 422),
            ("POST", "/api/show", {"model": "other"}, key, 404),
            ("GET", "/api/nothing", None, key, 404),
            ("GET", "/api/chat", None, key, 405),
        ):
            status, _, content = server.request(method, path, sent, headers)
            assert status == expected, path
            assert isinstance(json.loads(content)["error"], str), (path, content)


SYSTEM = "You are a helpful assistant. Answer in the language of the user."


@pytest.mark.parametrize("name", ["panda", "banana", "frog", "pizza", "owl", "scissors"])
def test_a_chat_programs_habits_change_no_greedy_answer(server: Running, name: str) -> None:
    """System prompt and greeting, of which the built-in model has learnt nothing."""
    question = asking("这是什么？", data_url((IMAGES / f"{name}.png").read_bytes()))
    before = [message(S, SYSTEM), message(A, "Hi! How can I help you?")]
    more = {"messages": [*before, *question["messages"]]}
    assert said(server, more) == said(server, question)


def test_what_the_model_bears(server: Running) -> None:
    """Temperature 1, which most programs send; the header says what became of it."""
    right = 0
    for seed in range(20):
        body = asking("这是什么？", data_url(), temperature=1, seed=seed)
        _, headers, content = server.request("POST", "/v1/chat/completions", body)
        assert headers["X-Seechat-Ignored"] == "temperature above 0.3"
        right += json.loads(content)["choices"][0]["message"]["content"] == "这是熊猫。"
    assert right >= 18
