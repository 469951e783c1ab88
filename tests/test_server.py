"""`seechat serve` as its clients meet it: OpenAI's client, curl, the demos' clients, monitors."""

import base64
import http.client
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import seechat_lite as sl
from seechat_lite.server.settings import Settings
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import read_manifest
from serving import (
    IMAGES,
    PANDA,
    PATIENCE,
    Running,
    asking,
    data_url,
    running,
    slow_load,
    wait_until,
)

MODEL = "seechat-lite-builtin"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Settings(aliases=("gpt-4o",))) as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """No answer of it ends by itself; two may wait."""
    with running(Settings(queue=2), load=slow_load(0.01)) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts) if len(parts) > 1 else parts[0]}


def image(data: bytes = PANDA) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), "detail": "low"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


# --- the official client


def test_openai_answers_about_a_picture(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model=MODEL, messages=[user(image(), text("这是什么？"))])
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "这是熊猫。")
    assert choice.finish_reason == "stop"
    assert done.model == MODEL and done.usage
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens == 3


def test_openai_streams(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[user(image(), text("这是什么？"))],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(filter(None, pieces)) == "这是熊猫。" and len(pieces) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.completion_tokens == 3
    assert len({c.id for c in chunks}) == 1


def test_usage_comes_only_when_it_was_asked_for(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=[user("你好")], stream=True)
    assert all(c.choices and c.usage is None for c in chunks)


def test_openai_holds_a_conversation(client: openai.OpenAI) -> None:
    """The answer to a follow-up is what a Chat gives for the same turns."""
    with sl.load() as model:
        chat = model.chat()
        first = chat.ask("这是什么？", PANDA)
        second = chat.ask("它能吃吗？")
    done = client.chat.completions.create(
        model="gpt-4o",  # an alias
        messages=[
            user(image(), text("这是什么？")),
            {"role": "assistant", "content": first},
            user("它能吃吗？"),
        ],
    )
    assert done.choices[0].message.content == second


def test_several_pictures(client: openai.OpenAI) -> None:
    banana, rocket = ((IMAGES / f"{n}.png").read_bytes() for n in ("banana", "rocket"))
    with sl.load() as model:
        expected = model.chat().ask("Which one is a fruit?", [banana, rocket])
    done = client.chat.completions.create(
        model=MODEL, messages=[user(image(banana), image(rocket), text("Which one is a fruit?"))]
    )
    assert done.choices[0].message.content == expected


def test_models(client: openai.OpenAI) -> None:
    model, alias = client.models.list().data
    assert model.id == MODEL and model.object == "model"
    assert (alias.id, alias.root) == ("gpt-4o", MODEL)  # pyright: ignore[reportAttributeAccessIssue]
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve("gpt-4o").id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


# --- options


def test_max_tokens(server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        done = server.post(asking("这是什么？", data_url(), **{name: 2}))
        assert done["choices"][0]["finish_reason"] == "length"
        assert done["usage"]["completion_tokens"] == 2


@pytest.mark.slow
def test_as_many_tokens_as_fit() -> None:
    """What LM Studio's clients send for no limit, to a model that never ends by itself."""

    def load() -> sl.Model:
        model = sl.load(context=700)
        extend, eos = model.engine.extend, model.tokenizer.eos_id

        def endless(tokens: Sequence[int]) -> np.ndarray:
            logits = extend(tokens)
            logits[:, eos] = -1e9
            return logits

        model.engine.extend = endless
        model.engine.step = lambda token: endless([token])[0]
        return model

    with running(load=load) as server:
        for name in ("max_tokens", "max_completion_tokens"):
            done = server.post(asking("你好", **{name: -1}))
            assert done["choices"][0]["finish_reason"] == "length"
            assert done["usage"]["total_tokens"] == 701  # the last one needs no place
        assert server.post(asking("你好"))["usage"]["completion_tokens"] == 512


@pytest.mark.parametrize("stop", ["熊", ["猫", "熊"], ["没有", "熊猫"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop(server: Running, stop: str | list[str], stream: bool) -> None:
    """The answer ends before the stop text, of which nothing is shown."""
    body = asking("这是什么？", data_url(), stop=stop, stream=stream)
    _, _, content = server.request("POST", "/v1/chat/completions", body)
    if not stream:
        choice = json.loads(content)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("这是", "stop")
        return
    choices = [e["choices"][0] for e in events(content)]
    assert "".join(c["delta"].get("content", "") for c in choices) == "这是"
    assert choices[-1]["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def any_model() -> Iterator[Running]:
    """As if its model had learnt instructions, and bore any temperature."""
    manifest = replace(read_manifest(BUILTIN), sampling=None)
    with running(manifest=manifest, format="seechat") as server:
        yield server


def test_a_seed_names_an_answer(any_model: Running) -> None:
    server = any_model

    def ask(**fields: Any) -> str:
        body = asking("你好", temperature=2.0, max_tokens=24, **fields)
        return server.post(body)["choices"][0]["message"]["content"]

    assert ask(seed=-5) == ask(seed=-5)
    assert len({ask(seed=s) for s in range(6)}) > 1
    assert len({ask() for _ in range(6)}) > 1
    assert len({ask(seed=-1) for _ in range(6)}) > 1  # other local servers' word for none
    assert ask(seed=1, top_k=-1) == ask(seed=1, top_k=0) == ask(seed=1)
    assert ask(seed=1, top_p=0) == ask(seed=2, top_p=0) == ask(seed=3, top_k=1)


def test_system_messages_precede_the_question(any_model: Running) -> None:
    server = any_model

    def answer(*messages: dict[str, Any]) -> dict[str, Any]:
        return server.post({"messages": messages})

    both = answer({"role": "system", "content": "你好"}, user("你是谁？"))
    one = answer(user("你好\n你是谁？"))
    assert both["choices"][0]["message"] == one["choices"][0]["message"]
    assert both["usage"] == one["usage"] == answer(user("你好"), user("你是谁？"))["usage"]


def test_null_is_as_good_as_nothing(server: Running) -> None:
    body = asking("你好", max_tokens=None, stop=None, temperature=None, tools=[], user="me", n=1)
    assert server.post(body)["choices"]


def test_fields_of_other_servers_are_ignored(server: Running) -> None:
    """What clients of Ollama, LM Studio and newer OpenAI versions send along."""
    more = {
        "model": "",  # whichever there is
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "top_logprobs": 0,
        "stop": [""],
        "functions": [],
        "response_format": {"type": "text"},
        "stream_options": None,
        "cache_prompt": True,
        "keep_alive": -1,
        "options": {"num_ctx": 4096},
        "ttl": 300,
        "min_p": 0.05,
        "store": True,
        "metadata": {},
        "tool_choice": "none",
        "logit_bias": {},
        "reasoning_effort": "low",
    }
    content = [
        {"type": "image_url", "image_url": {"url": data_url(), "detail": "original"}},
        {"type": "text", "text": "这是什么？", "cache_control": None},
    ]
    body = {"messages": [{"role": "user", "name": "me", "content": content}], **more}
    assert server.post(body)["choices"][0]["message"]["content"] == "这是熊猫。"


def test_an_answer_without_words_is_one(server: Running) -> None:
    """OpenAI allows null for what an assistant said; the turn counts all the same."""

    def answer(said: str | None) -> dict[str, Any]:
        past = [user("你好"), {"role": "assistant", "content": said}]
        return server.post({"messages": [*past, user("你是谁？")]})

    assert answer(None)["usage"] == answer("")["usage"]


def test_characters_may_be_escaped(server: Running) -> None:
    escaped = json.dumps({"messages": [user("你好😀")]}).encode()
    assert b"\\ud83d" in escaped
    plain = json.dumps({"messages": [user("你好😀")]}, ensure_ascii=False).encode()
    one, other = server.post(escaped), server.post(plain)
    assert one["choices"] == other["choices"] and one["usage"] == other["usage"]


# --- errors


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
        ([], 422, "invalid_request"),
        ({"messages": []}, 422, "invalid_request"),
        ({"messages": "你好"}, 422, "invalid_request"),
        (asking("x", temperature="hot"), 422, "invalid_request"),
        (asking("x", temperature=-1), 422, "invalid_request"),
        (b'{"messages":[{"role":"user","content":"x"}],"top_p":NaN}', 422, "invalid_request"),
        (asking("x", max_tokens=0), 422, "invalid_request"),
        (asking("x", max_tokens=-2), 422, "invalid_request"),
        (asking("x", top_k=-2), 422, "invalid_request"),
        (asking("x", seed=2**64), 422, "invalid_request"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "invalid_messages"),
        ({"messages": [user({"type": "input_audio"}, text("x"))]}, 400, "invalid_messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_messages"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_messages"),
        (asking(" "), 400, "invalid_messages"),
        (asking("长" * 5000), 400, "context_length_exceeded"),
        (asking("x", n=2), 400, "unsupported"),
        (asking("x", tools=[{}], tool_choice="required"), 400, "unsupported"),
        (asking("x", tools=[{}], tool_choice={"type": "function"}), 400, "unsupported"),
        (asking("x", functions=[{}], function_call={"name": "f"}), 400, "unsupported"),
        (asking("x", logit_bias={"5": 1}), 400, "unsupported"),
        (asking("x", logprobs=True), 400, "unsupported"),
        (asking("x", presence_penalty=1.5), 400, "unsupported"),
        (asking("x", response_format={"type": "xml"}), 400, "invalid_value"),
        (asking("x", stop="a" * 257), 400, "invalid_value"),
        (asking("x", stop=["a"] * 17), 400, "invalid_value"),
        (asking("x", model="gpt-5"), 404, "model_not_found"),
        (asking("x", "data:image/png;base64,AAAA"), 400, "invalid_image"),
        (asking("x", data_url(PANDA[:-200])), 400, "invalid_image"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(server: Running, body: Any, status: int, code: str, stream: bool) -> None:
    """Also of a stream the status tells, because nothing is sent before the first piece."""
    if isinstance(body, dict):
        body |= {"stream": stream}
    done = server.post(body)
    assert (done["status"], done["error"]["code"]) == (status, code)
    assert done["error"]["type"] == "invalid_request_error" and done["error"]["message"]


def test_the_official_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not a picture"):
        client.chat.completions.create(
            model=MODEL, messages=[user(image(b"no picture"), text("x"))], stream=True
        )
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens: expected 1 or more, or"):
        client.chat.completions.create(model=MODEL, messages=[user("x")], max_tokens=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=[user("x")])


def test_other_addresses_and_methods(server: Running) -> None:
    assert server.request("GET", "/v2")[0] == 404
    assert server.request("GET", "/v1/chat/completions")[0] == 405
    assert server.request("DELETE", "/v1/models")[0] == 405
    for path in ("/v2", "/v1/chat/completions"):
        assert "error" in json.loads(server.request("GET", path)[2])


# --- the queue


def stream_begun(server: Running) -> http.client.HTTPConnection:
    """A connection on which an answer has begun."""
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(asking("你好", stream=True)))
    response = connection.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return connection


def test_a_client_that_goes_frees_its_place(slow: Running) -> None:
    """A running answer ends, and the next one gets its turn."""
    connection = stream_begun(slow)
    connection.sock.shutdown(2)
    connection.close()
    done = slow.post(asking("你好", max_tokens=1))
    assert done["choices"]
    wait_until(lambda: slow.scheduler.idle)


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_and_goes_is_forgotten(slow: Running, stream: bool) -> None:
    first = stream_begun(slow)
    second = slow.connect()
    second.request("POST", "/v1/chat/completions", json.dumps(asking("你好", stream=stream)))
    wait_until(lambda: slow.scheduler.waiting == 1)
    second.close()
    wait_until(lambda: slow.scheduler.waiting == 0)
    assert slow.scheduler.answering
    first.close()
    wait_until(lambda: slow.scheduler.idle)


def test_a_full_queue_refuses(slow: Running) -> None:
    connections = [stream_begun(slow)]
    for waiting in (1, 2):
        connections.append(slow.connect())
        connections[-1].request("POST", "/v1/chat/completions", json.dumps(asking("你好")))
        wait_until(lambda n=waiting: slow.scheduler.waiting == n)
    status, headers, content = slow.request("POST", "/v1/chat/completions", asking("你好"))
    assert (status, json.loads(content)["error"]["code"]) == (503, "queue_full")
    assert 1 <= int(headers["Retry-After"]) <= 600  # as long as the queue will take
    for connection in connections:
        connection.close()
    wait_until(lambda: slow.scheduler.idle)


def test_first_come_first_served(slow: Running) -> None:
    first = stream_begun(slow)
    order: list[int] = []

    def ask(n: int) -> None:
        slow.post(asking("你好", max_tokens=1))
        order.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for n, thread in enumerate(threads):
        thread.start()
        wait_until(lambda n=n: slow.scheduler.waiting == n + 1)
    first.close()
    for thread in threads:
        thread.join()
    assert order == [0, 1]


def test_a_slow_reader_keeps_nobody_waiting(server: Running) -> None:
    idle = server.connect()
    idle.request("POST", "/v1/chat/completions", json.dumps(asking("你好", stream=True)))
    assert server.post(asking("这是什么？", data_url()))["choices"]
    idle.close()


def test_pictures_are_encoded_once_across_requests() -> None:
    calls = 0

    def load() -> sl.Model:
        model = sl.load()
        encode = model.engine.encode_image

        def counting(pixels: Any) -> Any:
            nonlocal calls
            calls += 1
            return encode(pixels)

        model.engine.encode_image = counting
        return model

    with running(load=load) as server:
        for _ in range(3):
            server.post(asking("这是什么？", data_url()))
    assert calls == 1


def test_an_idle_model_is_unloaded_and_comes_back() -> None:
    loads: list[sl.Model] = []

    def load() -> sl.Model:
        loads.append(sl.load())
        return loads[-1]

    with running(Settings(keep_alive=0.05), load=load) as server:
        for count in (1, 2):
            wait_until(lambda: server.scheduler.status == "unloaded")
            assert len(loads) == count
            assert server.request("GET", "/health")[0] == 200
            with pytest.raises(sl.EngineError, match="closed"):
                loads[-1].chat().ask("你好")
            assert server.post(asking("这是什么？", data_url()))["choices"]


def test_while_the_model_loads() -> None:
    """The server listens already; who asks waits for the model."""
    loaded = threading.Event()

    def load() -> sl.Model:
        loaded.wait(PATIENCE)
        return sl.load()

    with running(load=load, loading=True) as server:
        status, _, content = server.request("GET", "/health")
        assert (status, json.loads(content)["status"]) == (503, "loading")
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(server.post(asking("你好"))))
        thread.start()
        wait_until(lambda: server.scheduler.waiting == 1)
        loaded.set()
        thread.join()
        assert answers[0]["choices"] and server.request("GET", "/health")[0] == 200


def test_a_model_that_does_not_come_back_is_a_503() -> None:
    loads = 0

    def load() -> sl.Model:
        nonlocal loads
        loads += 1
        if loads == 2:
            raise sl.MemoryPlanError("too little memory")
        return sl.load()

    with running(Settings(keep_alive=0.05), load=load) as server:
        wait_until(lambda: server.scheduler.status == "unloaded")
        done = server.post(asking("你好"))
        assert (done["status"], done["error"]["code"]) == (503, "out_of_memory")
        assert server.post(asking("你好"))["choices"]


def test_a_model_whose_files_were_changed_is_loaded_again(tmp_path: Path) -> None:
    """A client learns nothing of the server's paths."""
    folder = shutil.copytree(BUILTIN, tmp_path / "bundle")
    with running(load=lambda: sl.load(folder)) as server:
        assert server.post(asking("你好"))["choices"]
        for change in range(5):
            os.utime(folder / "decoder.onnx.data", (change, change))
            done = server.post(asking("你好"))
            assert (done["status"], done["error"]["code"]) == (500, "model_files")
            assert str(tmp_path) not in json.dumps(done)
            assert server.post(asking("你好"))["choices"]


# --- the demos' shapes


def test_chatglm_clients(server: Running) -> None:
    body = {"prompt": "你好", "history": [], "top_p": 0.7, "temperature": 0, "max_length": 2048}
    done = server.post(body, "/")
    assert done["response"] and done["history"] == [["你好", done["response"]]]
    assert done["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", done["time"])
    again = server.post({"prompt": "你是谁？", "history": done["history"]}, "/")
    assert [q for q, _ in again["history"]] == ["你好", "你是谁？"]


@pytest.mark.parametrize("name", ["image", "image_prompt"])
def test_visualglm_clients(server: Running, name: str) -> None:
    """The picture belongs to the first question, however long the history has become."""
    body = {name: base64.b64encode(PANDA).decode(), "temperature": 0, "repetition_penalty": 1}
    done = server.post({**body, "text": "这是什么？", "history": []}, "/")
    assert done["result"] == "这是熊猫。"
    again = server.post({**body, "text": "它能吃吗？", "history": done["history"]}, "/")
    with sl.load() as model:
        chat = model.chat()
        chat.append("这是什么？", "这是熊猫。", PANDA)
        assert again["result"] == chat.ask("它能吃吗？")


def test_max_length_counts_the_prompt(server: Running) -> None:
    short = server.post({"prompt": "你好", "max_length": 16, "temperature": 0}, "/")
    long = server.post({"prompt": "你好", "max_length": 2048, "temperature": 0}, "/")
    assert 0 < len(short["response"]) < len(long["response"])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": " "},
        {"prompt": "a", "text": "b"},
        {"prompt": 1},
        {"prompt": "a", "history": [["b"]]},
        [],
    ],
)
def test_bad_legacy_requests(server: Running, body: Any) -> None:
    assert server.post(body, "/")["status"] == 422


# --- monitors and tools


def test_health_and_metrics(server: Running) -> None:
    status, _, content = server.request("GET", "/health")
    health = json.loads(content)
    assert status == 200 and health["status"] == "ok" and health["memory_bytes"] > 10e6
    server.post(asking("你好"))
    _, headers, content = server.request("GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    numbers = dict(
        line.rsplit(" ", 1) for line in content.decode().splitlines() if not line.startswith("#")
    )
    assert float(numbers['seechat_tokens_total{kind="completion"}']) > 0
    assert float(numbers['seechat_requests_total{method="POST",status="200"}']) > 0
    assert float(numbers["seechat_model_loaded"]) == 1


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server: Running) -> None:
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-d", "@-"]
    body = json.dumps(asking("这是什么？", data_url(), stream=True))
    run = subprocess.run(command, input=body, capture_output=True, text=True)
    assert run.stdout.endswith("data: [DONE]\n\n")
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events(run.stdout.encode())]
    assert "".join(pieces) == "这是熊猫。"


@pytest.mark.slow
def test_many_at_once(server: Running) -> None:
    """Sixteen clients with good, bad and abandoned requests: each is answered as it deserves."""

    def ask(n: int) -> None:
        if n % 5 == 4:
            connection = stream_begun(server)
            connection.close()
        elif n % 5 == 3:
            assert server.post({"messages": [n]})["status"] == 422
        else:
            done = server.post(asking("这是什么？", *[data_url()] * (n % 2)))
            assert done["choices"][0]["finish_reason"] == "stop"

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(80)))
    wait_until(lambda: server.scheduler.idle and server.scheduler.waiting == 0)


def events(content: bytes) -> list[dict[str, Any]]:
    lines = [line[6:] for line in content.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
