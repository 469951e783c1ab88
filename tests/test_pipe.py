"""`seechat pipe`: another program's child process."""

import base64
import io
import json
import locale
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seechat_lite.cli.pipe import MAX_CHATS, Pipe
from seechat_lite.generation import DEFAULTS
from seechat_lite.sampling import Sampling
from seechat_lite.text_lines import LineError, text_lines
from seechat_weights.errors import ContextError
from serving import IMAGES, PANDA, slow_command

PICTURE = str(IMAGES / "panda.png")


class Child:
    """The process; send() writes a line, read() takes the next one."""

    def __init__(self, start: list[str], *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *start, "pipe", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def send(self, **request: Any) -> None:
        self.stdin.write(json.dumps(request, ensure_ascii=False) + "\n")
        self.stdin.flush()

    def read(self) -> dict[str, Any]:
        return json.loads(self.stdout.readline())

    def answer(self, id: str | int) -> dict[str, Any]:
        """The last line of an answer, whose pieces joined are the answer."""
        pieces = []
        while "done" not in (line := self.read()) and "error" not in line:
            assert line["id"] == id
            pieces.append(line["text"])
        assert line["id"] == id
        assert "error" in line or "".join(pieces) == line["answer"]
        return line

    def ready(self) -> dict[str, Any]:
        while "progress" in (line := self.read()):
            assert 0 <= line["done"] <= line["total"]
        assert line["ready"] is True
        return line

    def end(self) -> None:
        self.process.kill()
        with self.process:  # closes the pipes
            pass


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child(["-m", "seechat_lite"])
    assert child.ready() == {
        "ready": True, "vision": True, "model": "seechat-lite-builtin", "precision": "int8"
    }  # fmt: skip
    yield child
    child.end()


@pytest.fixture
def slow() -> Iterator[Child]:
    """No answer of it ends by itself."""
    child = Child(slow_command(0.01))
    child.ready()
    yield child
    child.end()


def test_conversations(child: Child) -> None:
    """Two that do not mix, one question that belongs to none, and one that begins anew."""
    child.send(id=1, chat="a", question="这是什么？", image=PICTURE)
    assert child.answer(1)["answer"] == "这是熊猫。"
    picture = {"base64": base64.b64encode(PANDA).decode()}
    child.send(id="zwei", chat="b", question="What is it?", image=[picture])
    english = child.answer("zwei")
    assert "panda" in english["answer"] and english["stats"]["finish_reason"] == "stop"
    child.send(id=3, chat="a", question="它能吃吗？")
    followed = child.answer(3)
    child.send(id=4, question="它能吃吗？")
    alone = child.answer(4)
    assert followed["stats"]["prompt_tokens"] > alone["stats"]["prompt_tokens"] + 10
    child.send(end="a")
    child.send(id=5, chat="a", question="它能吃吗？")
    assert child.answer(5)["answer"] == alone["answer"]


def test_a_picture_without_words(child: Child) -> None:
    for id, more in ((50, {}), (51, {"question": ""})):
        child.send(id=id, image=PICTURE, **more)
        assert child.answer(id)["answer"] == "这是熊猫。"
    text = base64.urlsafe_b64encode(PANDA).decode().rstrip("=")
    child.send(id=52, image={"base64": "data:;base64," + text})
    assert child.answer(52)["answer"] == "这是熊猫。"


def test_options_and_order(child: Child) -> None:
    for n in range(5):
        child.send(id=n, question="你好", max_new_tokens=n + 1, temperature=0, seed=n, top_p=1)
    for n in range(5):
        assert child.answer(n)["stats"]["new_tokens"] == n + 1


def test_the_end_of_stdin_lets_answers_finish() -> None:
    lines = [json.dumps({"id": n, "question": "你好"}) for n in range(3)]
    done = subprocess.run(
        [sys.executable, "-m", "seechat_lite", "pipe"],
        input="\n".join(lines),
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    ends = [a for line in done.stdout.splitlines() if (a := json.loads(line)).get("done") is True]
    assert [a["id"] for a in ends if "answer" in a] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not an object"),
        ("{}", "id is None"),
        ('{"id": 1}', "question is None"),
        ('{"id": true, "question": "x"}', "id is True"),
        ('{"id": 1, "question": "x", "top": 1}', r"unknown fields"),
        ('{"id": 1, "question": "x", "image": {}}', "image is {}"),
        ('{"id": 1, "question": "x", "image": {"base64": "#"}}', "expected a path or"),
        ('{"id": 1, "question": "x", "max_new_tokens": "2"}', "max_new_tokens is '2'"),
        ('{"id": 1, "question": "x", "temperature": -1}', "temperature is -1"),
        ('{"id": 1, "question": " "}', "question is empty"),
        ('{"id": 1, "question": "x", "image": "no such file"}', "no such file"),
        ('{"id": 1, "question": "x", "image": {"base64": "AAAA"}}', "not a picture"),
    ],
)
def test_errors_end_nothing(child: Child, line: str, message: str) -> None:
    child.stdin.write(line + "\n")
    child.send(id=7, question="你好")
    assert message in child.read()["error"]
    assert child.answer(7)["answer"]


def pipe(data: bytes, *options: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "seechat_lite", "pipe", *options],
        input=data,
        capture_output=True,
        env=os.environ | environment,
    )


def ends(done: subprocess.CompletedProcess[bytes]) -> dict[Any, str]:
    """The answer or error of each id."""
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return {
        line["id"]: line.get("error") or line["answer"]
        for line in lines
        if "error" in line or ("id" in line and "done" in line)
    }


HELLO = [{"id": n, "question": "你好"} for n in range(3)]
LINES = "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in HELLO)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_of_windows(encoding: str) -> None:
    answers = ends(pipe(LINES.encode(encoding)))
    assert list(answers) == [0, 1, 2] and len(set(answers.values())) == 1
    assert answers[0].startswith("你好")


def test_bad_lines_end_nothing() -> None:
    """Each has its own error, with its id where it can be read, and the last line its answer."""
    bad = {
        1: '{"id":1,"question":"你好"}'.encode("gbk"),
        2: b'{"id":2,"question":"\xff\xfe\x00"}',
        3: b'{"id":3,"question":"x","temperature":' + b"1" * 400 + b"}",
        4: b'{"id":4,"question":"x","seed":' + b"1" * 400 + b"}",
        5: b'{"id":5,"question":"x","seed":' + b"1" * 5000 + b"}",
        6: b'{"id":6,"question":"x","temperature":NaN}',
        7: b'{"id":7,"question":"x","top_p":-Infinity}',
        8: b'{"id":8,"question":"x","image":' + b"[" * 100_000,
        9: b'{"id":9,"question":"x","image":[' + b"1," * 200_000 + b"1]}",
        10: b'{"id":10,"question":"x","image":' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}",
        11: b'{"id":11,"question":"x"',
        12: b'{"id":12,"question":["x"]}',
        13: b'{"id":13,"question":"x","temperature":1e400}',
        14: b'{"id":14,"question":"x","chat":"' + b"c" * 300 + b'"}',
        None: b'{"id":' + b"9" * 400 + b',"question":"x"}',
        "\ud83d": b'{"id":"\\ud83d","question":""}',
    }
    good = b'{"id":99,"question":"\xe4\xbd\xa0\xe5\xa5\xbd \\ud83d"}'
    done = pipe(b"\n".join([*bad.values(), good]))
    answers = ends(done)
    assert set(answers) == {*bad, 99}
    assert done.returncode == 0 and done.stderr == b""
    assert "not UTF-8 (byte 0xc4 at 20)" in answers[1]
    assert all(len(answers[id]) < 400 for id in bad)


def test_a_code_page_of_the_system_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getencoding", lambda: "cp936")
    line = '{"id": 1, "question": "你好"}'
    lines = line.encode() + b"\n" + line.encode("gbk") + b"\n\xff"
    first, second, third = text_lines(io.BytesIO(lines), most=100)
    assert first == second == line and isinstance(third, LineError)


def test_lines_without_end_are_thrown_away() -> None:
    lines = list(text_lines(io.BytesIO(b"a\n" + b"x" * 300_000 + b"\nb\n" + b"y" * 101), most=100))
    assert [str(line)[:7] for line in lines] == ["a", "a line ", "b", "a line "]


class NoModel:
    """Answers nothing, at once."""

    def chat(self, format: str | None) -> Any:
        class Chat:
            stats = None

            def stream(self, question: str, images: Any, **options: Any) -> Iterator[str]:
                Sampling(**{k: v for k, v in options.items() if k != "max_new_tokens"})
                if not question.strip():
                    raise ContextError("empty")
                return iter(())

            def stop(self) -> None:
                pass

        return Chat()


REQUESTS = st.fixed_dictionaries(
    {"id": st.integers() | st.text(max_size=3), "question": st.text(max_size=3)},
    optional={
        name: st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.lists(st.none())
        for name in (*DEFAULTS, "image", "chat", "stop", "end", "other")
    },
)


@pytest.mark.slow
@given(
    st.lists(
        st.binary(max_size=40)
        | REQUESTS.map(lambda r: json.dumps(r).encode())
        | REQUESTS.map(lambda r: json.dumps(r, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        | REQUESTS.map(lambda r: json.dumps(r, ensure_ascii=False).encode("gb18030", "replace")),
        max_size=6,
    )
)
@example([b'{"id": "NaN", "question": "", "stop": 0}'])
@example([b'{"stop": NaN}', b'{"stop": 0, "id": -Infinity}', b'{"end": "Infinity"}'])
def test_every_line_has_its_answer_or_error(lines: list[bytes]) -> None:
    """Whatever bytes come; `stop` and `end` alone are not answered."""
    data = b"\n".join(lines)
    written: list[dict[str, Any]] = []
    pipe = Pipe(NoModel(), written.append)  # pyright: ignore[reportArgumentType]
    came = list(text_lines(io.BytesIO(data), most=1000))
    pipe.talk(iter(came))
    assert not pipe.failed
    silent = sum(isinstance(line, str) and tells_nothing(line) for line in came)
    assert len([w for w in written if "done" in w or "error" in w]) == len(came) - silent
    for line in written:
        json.dumps(line)


def no_json(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity, which JSON has not


def tells_nothing(line: str) -> bool:
    with suppress(ValueError):
        match json.loads(line, parse_constant=no_json):
            case {"stop": str() | int()} | {"end": str()}:
                return True
    return not line.strip()


def test_a_mistake_of_ours_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(NoModel, "chat", lambda *_: 1 / 0)
    written: list[dict[str, Any]] = []
    pipe = Pipe(NoModel(), written.append)  # pyright: ignore[reportArgumentType]
    pipe.talk(['{"id": 1, "question": "a"}', '{"id": 2, "question": "a"}'])
    assert pipe.failed and [w["id"] for w in written] == [1, 2]
    assert "ZeroDivisionError" in written[0]["error"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Unix")
def test_a_reader_that_goes_ends_it_quietly() -> None:
    """As `seechat pipe | head -1` does, while it loads or later."""
    for lines in (0, 2, 6):
        process = subprocess.Popen(
            [sys.executable, "-m", "seechat_lite", "pipe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin and process.stdout and process.stderr
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        with suppress(OSError):
            process.stdin.write(LINES.encode())
            process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
        process.stderr.close()


def test_conversations_are_bounded() -> None:
    written: list[dict[str, Any]] = []
    pipe = Pipe(NoModel(), written.append)  # pyright: ignore[reportArgumentType]

    def lines() -> Iterator[str]:
        for n in range(MAX_CHATS + 1):
            while len(written) < n:  # not more than may wait
                time.sleep(0.001)
            yield json.dumps({"id": n, "chat": str(n), "question": "a"})

    pipe.talk(lines())
    assert "conversations are remembered" in written[-1]["error"]
    assert not [w for w in written[:-1] if "error" in w]


def test_stop(slow: Child) -> None:
    """A running answer ends; one that waits ends before it begins."""
    slow.send(id=1, chat="a", question="你好")
    slow.send(id=2, question="你好")
    slow.send(id=3, question="你好", max_new_tokens=2)
    assert "text" in slow.read()
    slow.send(stop=2)
    slow.send(stop=1)
    slow.send(stop="nobody")
    while "done" not in (line := slow.read()):
        assert line["id"] == 1
    assert line["stats"]["finish_reason"] == "cancelled"
    stopped = slow.answer(2)
    assert stopped["answer"] == "" and stopped["stats"]["new_tokens"] == 0
    assert slow.answer(3)["stats"]["new_tokens"] == 2


def test_too_many_wait(slow: Child) -> None:
    """The first is being answered and never ends; its id is taken, and so are all places."""
    for n in (*range(70), 0):
        slow.send(id=n, question="你好")
    refused = []
    while len(refused) < 7:
        if "error" in (line := slow.read()):
            assert "wait already" in line["error"]
            refused.append(line["id"])
    assert refused == [*range(64, 70), 0]


@pytest.mark.slow
def test_what_cannot_be_loaded() -> None:
    child = Child(["-m", "seechat_lite"], "--model", "/no/such/bundle")
    out, err = child.process.communicate()
    assert child.process.returncode == 1 and not out and "no such folder" in err
