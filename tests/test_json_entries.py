"""Answers that are held to a JSON schema, as each API, command and SDK asks for them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from seechat_lite import json_schema
from seechat_lite.cli.main import main
from seechat_lite.cli.pipe import Pipe
from seechat_lite.loading import load
from serving import IMAGES, Running, asking, data_url, running

pytest.importorskip("llguidance")

MODEL = "seechat-lite-builtin"
PANDA_FILE = str(IMAGES / "panda.png")


class Animal(BaseModel):
    animal: Literal["panda", "frog"]
    legs: Literal[2, 4]


SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["panda", "frog"]}, "legs": {"enum": [2, 4]}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES: list[Any] = asking("这是什么？", data_url())["messages"]
INPUT: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(), "detail": "auto"},
            {"type": "input_text", "text": "这是什么？"},
        ],
    }
]


def test_openai_parses_into_its_classes(client: openai.OpenAI) -> None:
    """The schema as the SDK itself makes it of a class, in both APIs, whole and streamed."""
    chat = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Animal)
    answer = chat.choices[0].message.parsed
    assert isinstance(answer, Animal) and chat.choices[0].finish_reason == "stop"
    done = client.responses.parse(model=MODEL, input=INPUT, text_format=Animal)
    assert done.output_parsed == answer
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Animal
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer
    with client.responses.stream(model=MODEL, input=INPUT, text_format=Animal) as events:
        assert events.get_final_response().output_parsed == answer


def test_what_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Animal, max_tokens=3
        )
    plain: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    cut = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=plain, max_tokens=3
    )
    assert cut.choices[0].finish_reason == "length"


def test_any_object(server: Running) -> None:
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a"}}):
        done = server.post(asking("JSON", response_format=form, max_tokens=30))["choices"][0]
        assert done["message"]["content"].startswith("{")
    form = {"type": "json_object", "schema": SCHEMA}  # as llama.cpp's server has it
    done = server.post(asking("JSON", response_format=form))["choices"][0]
    assert json.loads(done["message"]["content"]).keys() == {"animal", "legs"}


def test_ollamas_format(server: Running) -> None:
    said = {"messages": [{"role": "user", "content": "这是什么？"}], "stream": False}
    chat = server.post(said | {"format": SCHEMA}, "/api/chat")
    assert json.loads(chat["message"]["content"]).keys() == {"animal", "legs"}
    assert chat["done_reason"] == "stop"
    prompt = {"prompt": "x", "stream": False, "options": {"num_predict": 20}, "format": "json"}
    assert server.post(prompt, "/api/generate")["response"].startswith("{")
    assert not server.post(prompt | {"format": ""}, "/api/generate")["response"].startswith("{")


WRONG: list[tuple[Any, str]] = [
    ({"type": "xml"}, "text, json_object or json_schema"),
    ({"type": "json_schema", "json_schema": []}, "expected an object"),
    ({"type": "json_schema", "json_schema": {"schema": 3}}, "a JSON schema, an object"),
    ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "cannot be followed"),
    ({"type": "json_schema", "json_schema": {"schema": {"title": "x" * 70000}}}, "at most 65536"),
]


@pytest.mark.parametrize(("form", "message"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_a_400(
    server: Running, form: Any, message: str, stream: bool
) -> None:
    done = server.post(asking("x", response_format=form, stream=stream))
    assert done["status"] == 400 and message in done["error"]["message"]
    if form["type"] == "json_schema":
        inside = form["json_schema"]
        form = {"type": "json_schema"} | (inside if isinstance(inside, dict) else {"schema": []})
    done = server.post({"input": "x", "text": {"format": form}, "stream": stream}, "/v1/responses")
    assert done["status"] == 400, done


@pytest.mark.parametrize("form", ["yaml", {"not": {}}])
def test_ollama_hears_of_it_in_its_own_words(server: Running, form: Any) -> None:
    for stream in (False, True):
        body = {"prompt": "x", "format": form, "stream": stream}
        done = server.post(body, "/api/generate")
        assert done["status"] == 400 and isinstance(done["error"], str)


def test_without_the_extra(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schema, "find_spec", lambda name: None)
    asked = {"type": "json_object"}
    user = [{"role": "user", "content": "x"}]
    bodies = {
        "/v1/chat/completions": asking("x", response_format=asked),
        "/v1/responses": {"input": "x", "text": {"format": asked}},
        "/api/generate": {"prompt": "x", "format": "json"},
        "/api/chat": {"messages": user, "format": "json"},
    }
    for path, body in bodies.items():
        done = server.post(body, path)
        assert done["status"] == 400 and "seechat-lite[schema]" in json.dumps(done), path
    assert "choices" in server.post(asking("你好", response_format={"type": "text"}))


def test_pipe() -> None:
    said: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = [
        {"id": 1, "question": "这是什么？", "image": PANDA_FILE, "schema": SCHEMA}
    ]
    wrong: list[Any] = [{"not": {}}, [], "x"]
    lines += [{"id": 2 + i, "question": "x", "schema": s} for i, s in enumerate(wrong)]
    with load() as model:
        Pipe(model, said.append).talk(map(json.dumps, lines))
    answered = next(line for line in said if line["id"] == 1 and "done" in line)
    assert json.loads(answered["answer"]).keys() == {"animal", "legs"}
    assert sorted(line["id"] for line in said if "error" in line) == [2, 3, 4]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(SCHEMA).encode())
    for given in (str(file), json.dumps(SCHEMA)):
        assert main(["ask", PANDA_FILE, "这是什么？", "--schema", given]) == 0
        assert json.loads(capsys.readouterr().out).keys() == {"animal", "legs"}
    assert main(["ask", "x", "--schema", '{"not": {}}']) == 1
    assert "schema cannot be followed" in capsys.readouterr().err
    file.write_text("[1]")
    for given in (str(file), str(tmp_path / "none"), str(tmp_path), "{", "{" * 70):
        with pytest.raises(SystemExit):
            main(["ask", "x", "--schema", given])
        assert "--schema" in capsys.readouterr().err
