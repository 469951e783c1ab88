"""The other APIs: OpenAI's responses and completions, and Ollama's, with unchanged clients."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from seechat_lite.server.settings import Settings
from serving import IMAGES, PANDA, Running, data_url, running

MODEL = "seechat-lite-builtin"
PICTURE = base64.b64encode(PANDA).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Settings(aliases=("llava",))) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def show(url: str = "", text: str = "这是什么？") -> list[Any]:
    content = [
        {"type": "input_image", "image_url": url or data_url(), "detail": "auto"},
        {"type": "input_text", "text": text},
    ]
    return [{"role": "user", "content": content}]


# --- responses


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", {"format": "json"}),
        ("text", {"format": ["json"]}),
        ("text", "json"),
        ("text", {"format": {"type": 1}}),
        ("input", [{"role": "user", "content": "x"}] * 2049),
        ("input", []),
    ],
)
def test_responses_refuses_what_it_cannot_read(server: Running, field: str, value: Any) -> None:
    body = json.dumps({"input": "x"} | {field: value}).encode()
    status, _, content = server.request("POST", "/v1/responses", body)
    assert status in (400, 422) and json.loads(content)["error"]["message"]


def test_responses(client: openai.OpenAI) -> None:
    done = client.responses.create(model=MODEL, input=show())
    assert (done.output_text, done.status) == ("这是熊猫。", "completed")
    assert done.usage and done.usage.output_tokens == 3
    short = client.responses.create(model=MODEL, input=show(), max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details
    assert short.incomplete_details.reason == "max_output_tokens"


def test_responses_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=show()) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "这是熊猫。" and final.usage
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    raw = list(client.responses.create(model=MODEL, input="你好", stream=True))
    assert [e.sequence_number for e in raw] == list(range(len(raw)))


def test_responses_go_on_with_what_was_said(client: openai.OpenAI) -> None:
    """An agent's history: earlier outputs as items, calls and their results."""
    first = client.responses.create(model=MODEL, input=show())
    history = [*show(), *(o.model_dump() for o in first.output)]
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": "21 °C"}
    for more in ([], [call, result]):
        done = client.responses.create(
            model=MODEL,
            input=[*history, *more, {"role": "user", "content": "它能吃吗？"}],  # pyright: ignore[reportArgumentType]
            instructions="",
            tools=[{"type": "function", "name": "f", "parameters": {}, "strict": False}],
        )
        assert done.output_text
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        client.responses.create(model=MODEL, input="x", tool_choice="required")


# --- completions


def test_completions(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="你好", temperature=0)
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "你好"}]
    )
    assert done.choices[0].text == chat.choices[0].message.content
    assert done.choices[0].finish_reason == "stop" and done.usage
    chunks = list(client.completions.create(model=MODEL, prompt=["你好"], stream=True))
    assert "".join(c.choices[0].text for c in chunks) == done.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="one text"):
        client.completions.create(model=MODEL, prompt=["a", "b"])


# --- Ollama


def test_ollama_client(server: Running) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=server.url)
    try:
        asked = [{"role": "user", "content": "这是什么？", "images": [PANDA]}]
        done = client.chat(model="llava", messages=asked)
        assert done.message.content == "这是熊猫。" and done.done_reason == "stop"
        pieces = list(client.chat(model="llava:latest", messages=asked, stream=True))
        assert "".join(p.message.content for p in pieces) == "这是熊猫。"
        assert pieces[-1].done and pieces[-1].eval_count == 3
        path = str(IMAGES / "panda.png")
        done = client.generate(model=MODEL, prompt="这是什么？", images=[path])
        assert done.response == "这是熊猫。"
        assert [m.model for m in client.list().models] == [MODEL, "llava"]
        assert "vision" in client.show("llava").capabilities
        with pytest.raises(ollama.ResponseError, match="no model 'other'") as e:
            client.chat(model="other", messages=asked)
        assert e.value.status_code == 404
    finally:
        client._client.close()


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def test_ollama_streams_unless_told_otherwise(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "这是什么？", "images": [PICTURE]}]}
    _, headers, content = server.request("POST", "/api/chat", body)
    assert headers["Content-Type"] == "application/x-ndjson"
    *pieces, end = lines(content)
    assert "".join(p["message"]["content"] for p in pieces) == "这是熊猫。"
    assert not any(p["done"] for p in pieces) and end["done"] and end["eval_count"] == 3
    one = server.post(body | {"stream": False}, "/api/chat")
    assert one["message"] == {"role": "assistant", "content": "这是熊猫。"} and one["done"]
    short = server.post(body | {"stream": False, "options": {"num_predict": 2}}, "/api/chat")
    assert short["done_reason"] == "length"
    asked = {"prompt": "这是什么？", "images": [PICTURE], "options": {"num_predict": -1}}
    *pieces, _ = lines(server.request("POST", "/api/generate", asked)[2])
    assert "".join(p["response"] for p in pieces) == "这是熊猫。"
    alone = server.post({"prompt": "", "images": [PICTURE], "stream": False}, "/api/generate")
    assert alone["response"] == "这是熊猫。"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_loads_ahead(server: Running, path: str) -> None:
    done = server.post({"model": "llava"}, path)
    assert done["done"] and done["done_reason"] == "load"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": [{"role": "nobody", "content": "x"}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["####"]}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}], "format": "yaml"}),
        ("/api/generate", {"prompt": "长" * 5000}),
        ("/api/generate", b"{"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_errors_are_texts(server: Running, path: str, body: Any, stream: bool) -> None:
    if isinstance(body, dict):
        body = body | {"stream": stream}
    status, _, content = server.request("POST", path, body)
    assert status == 400 and isinstance(json.loads(content)["error"], str)


def test_ollama_tells_of_itself(server: Running) -> None:
    for path in ("/api/version", "/api/tags", "/api/ps"):
        assert server.request("GET", path)[0] == 200
    (first, alias) = json.loads(server.request("GET", "/api/tags")[2])["models"]
    assert (first["name"], alias["name"]) == (MODEL, "llava") and first["size"] > 1e6
    assert "clip" in first["details"]["families"]
    shown = server.post({"model": "llava"}, "/api/show")
    assert "vision" in shown["capabilities"]
    assert shown["model_info"]["chatglm.context_length"] == 2048


# --- frameworks over these


def test_langchain(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    for responses in (False, True):
        chat = langchain.ChatOpenAI(
            base_url=f"{server.url}/v1", api_key="none", model=MODEL, use_responses_api=responses
        )
        content = [
            {"type": "image_url", "image_url": {"url": data_url()}},
            {"type": "text", "text": "这是什么？"},
        ]
        assert chat.invoke([("user", content)]).text == "这是熊猫。"
        pieces = [piece.text for piece in chat.stream([("user", content)])]
        assert "".join(pieces) == "这是熊猫。" and len(pieces) > 2
