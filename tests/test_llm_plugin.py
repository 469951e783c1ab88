"""The program `llm` with our plugin: the real command, as people type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import llm
import pytest
from llm.parts import AttachmentPart, Message, TextPart, ToolResultPart
from PIL import Image

import seechat_lite as sl
from seechat_lite.llm_plugin import _message
from serving import IMAGES, PANDA

PANDA_FILE = str(IMAGES / "panda.png")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where `llm` keeps its settings and the conversations it logs."""
    return tmp_path


def run(home: Path, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "llm", *args],
        input=stdin,
        capture_output=True,
        env=os.environ | {"LLM_USER_PATH": str(home)},
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@pytest.mark.slow
def test_a_picture_and_a_follow_up(home: Path) -> None:
    done = run(home, "-m", "seechat", "-a", PANDA_FILE, "这是什么？")
    assert (done.stdout, done.stderr) == ("这是熊猫。\n", "")
    with sl.load() as model:
        chat = model.chat()
        chat.append("这是什么？", "这是熊猫。", PANDA)
        expected = chat.ask("它能吃吗？")
    assert run(home, "-c", "它能吃吗？").stdout == f"{expected}\n"
    logged = run(home, "logs", "--usage").stdout
    assert "3 output" in logged.replace(",", "")


@pytest.mark.slow
def test_a_picture_from_stdin_without_streaming(home: Path) -> None:
    done = run(home, "-m", "seechat", "--no-stream", "-a", "-", "What is it?", stdin=PANDA)
    assert done.stdout == "This is a panda.\n", done.stderr


@pytest.mark.slow
def test_options_and_system_prompt(home: Path) -> None:
    done = run(home, "-m", "seechat", "-o", "max_new_tokens", "1", "-a", PANDA_FILE, "这是什么？")
    assert done.stdout == "这是\n"
    with sl.load() as model:
        said = [{"role": "system", "content": "你好"}, {"role": "user", "content": "你是谁？"}]
        expected = model.chat(messages=said).ask()
    assert run(home, "-m", "seechat", "-s", "你好", "你是谁？").stdout == f"{expected}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "bundle", "/no/such"], "no such folder"),
        (["-o", "format", "klingon"], "format is 'klingon'; expected one of"),
        (["-o", "temperature", "-1"], "temperature"),
        (["-a", str(IMAGES / "README.md")], "not"),
    ],
)
def test_errors_are_one_line(home: Path, args: list[str], message: str) -> None:
    done = run(home, "-m", "seechat", *args, "x")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_picture_without_words(tmp_path: Path) -> None:
    """And one of a kind that other plugins leave out."""
    avif = tmp_path / "panda.avif"
    Image.open(PANDA_FILE).convert("RGB").save(avif)
    model = llm.get_model("seechat")
    for path in (PANDA_FILE, str(avif)):
        assert model.prompt("", attachments=[llm.Attachment(path=path)]).text() == "这是熊猫。"


@pytest.mark.slow
def test_json_of_a_schema(home: Path) -> None:
    pytest.importorskip("llguidance")
    legs = {"type": "integer", "minimum": 0, "maximum": 9}
    whole = {"type": "object", "properties": {"legs": legs}, "required": ["legs"]}
    schema = json.dumps(whole | {"additionalProperties": False})  # else there is no end of them
    done = run(home, "-m", "seechat", "--schema", schema, "-a", PANDA_FILE, "这是什么？")
    assert isinstance(json.loads(done.stdout)["legs"], int), done.stderr
    refused = run(home, "-m", "seechat", "--schema", '{"not": {}}', "x")
    assert "schema cannot be followed" in refused.stderr and "Traceback" not in refused.stderr


def test_histories_are_read_as_everywhere(home: Path) -> None:
    """A system text in the middle, a tool's result, and a picture that has no words of its own."""
    messages = [
        Message("user", [TextPart("这是什么？"), AttachmentPart(llm.Attachment(path=PANDA_FILE))]),
        Message("assistant", [TextPart("这是熊猫。")]),
        Message("system", [TextPart("Be brief.")]),
        Message("tool", [ToolResultPart(name="weather", output="21 °C")]),
        Message("user", [TextPart("它能吃吗？")]),
    ]
    assert [_message(m)["role"] for m in messages] == [m.role for m in messages]
    with sl.load() as model:
        same = [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "这是什么？"},
                    {"type": "image", "image": PANDA_FILE},
                ],
            },
            {"role": "assistant", "content": "这是熊猫。"},
            {"role": "system", "content": "Be brief."},
            {"role": "tool", "content": "21 °C"},
            {"role": "user", "content": "它能吃吗？"},
        ]
        ours = model.chat("seechat", messages=[_message(m) for m in messages])
        theirs = model.chat("seechat", messages=same)
        assert ours.turns == theirs.turns and ours.ask() == theirs.ask()


def test_from_python() -> None:
    model = llm.get_model("seechat")
    assert isinstance(model, llm.Model)
    conversation = model.conversation()
    first = conversation.prompt("这是什么？", attachments=[llm.Attachment(path=PANDA_FILE)])
    assert "".join(first) == "这是熊猫。"
    assert "熊猫" in conversation.prompt("它能吃吗？").text()
    assert "image/png" in model.attachment_types
