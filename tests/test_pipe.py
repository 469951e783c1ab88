"""`seechat pipe`: another program's child process."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

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


def test_what_cannot_be_loaded() -> None:
    child = Child(["-m", "seechat_lite"], "--model", "/no/such/bundle")
    out, err = child.process.communicate()
    assert child.process.returncode == 1 and not out and "no such folder" in err
