"""Text on its way in and out: blanks around it, and encodings that lack Chinese."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

import seechat_lite as sl
from seechat_lite.cli import terminal
from seechat_lite.conversation import FORMATS, Turn, render, trimmed
from serving import IMAGES, asking, data_url, running

QUESTION = "这是什么？"
PANDA = IMAGES / "panda.png"
AROUND = [
    "\n",
    "\r\n",
    " ",
    "\t",
    "\u3000",
    "\ufeff",
    "\u200b",
    "\u200e",
    "\xa0",
    "\x00",
    " \u3000\n\ufeff",
]


# --- blanks around a question


def test_all_that_is_blank_is_trimmed() -> None:
    for c in map(chr, range(0x30000)):
        blank = c.isspace() or unicodedata.category(c) in ("Cc", "Zs", "Zl", "Zp")
        if blank:
            assert trimmed(c) == "", hex(ord(c))
        elif unicodedata.category(c)[0] in "LNPS":
            fillers = "\u115f\u1160\u2800\u3164\uffa0"  # letters that show nothing
            assert trimmed(c) == c or c in fillers, hex(ord(c))
    assert trimmed(" a \n b\u3000") == "a \n b"
    assert trimmed("👨\u200d👩\u200d👧") == "👨\u200d👩\u200d👧"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_only_formats_of_our_own_trim(format: str) -> None:
    """The published codes leave blanks in, and what they would send is sent."""
    form = FORMATS[format]
    plain = [Turn("a", "b"), Turn("c")]
    blank = [Turn("a\n", "\u3000b "), Turn("\ufeffc\r\n")]
    if form.demo:
        plain, blank = [[Turn("x", "y", ("picture",)), *turns[1:]] for turns in (plain, blank)]
    assert (render(form, plain) == render(form, blank)) == form.trim
    if format in ("chatglm", "seechat-compat", "visualglm"):
        assert not form.trim


@pytest.fixture(scope="module")
def model() -> Any:
    with sl.load() as model:
        yield model


@pytest.mark.parametrize("around", AROUND)
def test_blanks_change_no_answer(model: sl.Model, around: str) -> None:
    assert model.chat().ask(f"{around}{QUESTION}{around}", PANDA) == "这是熊猫。"
    chat = model.chat()
    chat.append(f"{QUESTION}{around}", f"这是熊猫。{around}", PANDA)
    plain = model.chat()
    plain.append(QUESTION, "这是熊猫。", PANDA)
    assert chat.prompt("它能吃吗？").ids == plain.prompt(f"它能吃吗？{around}").ids


@pytest.mark.parametrize("around", AROUND)
def test_blanks_alone_are_no_question(model: sl.Model, around: str) -> None:
    with pytest.raises(sl.ContextError, match="empty"):
        model.chat().ask(around * 3)


def test_blanks_change_no_answer_of_the_server() -> None:
    with running() as server:
        for around in AROUND:
            done = server.post(asking(f"{around}{QUESTION}{around}", data_url()))
            assert done["choices"][0]["message"]["content"] == "这是熊猫。"
            assert server.post(asking(around))["error"]["code"] == "invalid_messages"
            assert server.post({"prompt": around}, "/")["status"] == 422


def seechat(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    options["env"] = environment | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "seechat_lite", *map(str, args)],
        capture_output=True,
        check=False,
        **options,
    )


@pytest.mark.slow
def test_chat_reads_lines_of_any_encoding() -> None:
    """Also the first of a file with a byte order mark; what is no text is said, and no more."""
    lines = f"/image {PANDA}\r\n{QUESTION}\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        done = seechat("chat", input=lines.encode(encoding))
        assert done.stdout.decode().splitlines() == ["这是熊猫。"]
    done = seechat("chat", input="你好\n".encode("gbk") + lines.encode())
    assert done.stdout.decode().splitlines() == ["这是熊猫。"]
    assert b"seechat: not UTF-8 (byte 0xc4 at 0)" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes on Unix alone")
def test_a_question_of_no_text() -> None:
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"seechat_lite", b"ask", "你好".encode("gbk")],
        capture_output=True,
    )
    assert done.returncode == 2 and b"no text in utf-8" in done.stderr


# --- an output that lacks Chinese

ASK = ("ask", PANDA, QUESTION)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp936", "utf-16", "utf-8"])
def test_json_can_be_read_whatever_the_encoding(encoding: str) -> None:
    done = seechat(*ASK, "--json", env={"PYTHONIOENCODING": encoding})
    text = done.stdout.decode("utf-16" if encoding == "utf-16" else "utf-8")
    assert done.returncode == 0 and json.loads(text)["answer"] == "这是熊猫。"
    assert b"lacks" not in done.stderr


@pytest.mark.slow
def test_text_that_cannot_be_written_is_said() -> None:
    done = seechat(*ASK, env={"PYTHONIOENCODING": "cp1252"})
    assert done.stdout.split() == [b"?????"] and done.returncode == 0
    assert b"encoding, cp1252, lacks characters of the answer" in done.stderr
    done = seechat(*ASK, env={"PYTHONIOENCODING": "gbk"})
    assert done.stdout.decode("gbk").split() == ["这是熊猫。"] and done.stderr == b""


@pytest.mark.parametrize(
    ("encoding", "terminal_", "chosen", "expected"),
    [
        ("cp1252", False, "", "utf-8"),  # Windows, redirected
        ("cp936", False, "", "cp936"),  # Chinese Windows, which has the characters
        ("cp1252", True, "", "cp1252"),
        ("cp1252", False, "cp1252", "cp1252"),
        ("utf-8", False, "", "utf-8"),
    ],
)
def test_what_is_redirected_can_hold_chinese(
    monkeypatch: pytest.MonkeyPatch, encoding: str, terminal_: bool, chosen: str, expected: str
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(out, "isatty", lambda: terminal_, raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("PYTHONIOENCODING", chosen)
    terminal.prepare_streams()
    assert out.encoding == expected
    print("熊猫😀")  # raises nothing
    out.flush()


def test_file_names_in_errors_can_be_told_apart() -> None:
    done = seechat("ask", "熊.png", "x", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and b"\\u718a.png" in done.stderr


def test_the_demos_format_says_when_it_cannot_remember(
    vision_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sl.load(vision_bundle, context=100) as model:
        chat = model.chat("seechat-compat")
        chat.append("看", "好的" * 20, PANDA)
        for i in range(5):
            chat.append(f"问题{i}", "回答" * 10)
        chat.ask("最后?", max_new_tokens=2)
    assert "published demo would remember them" in caplog.text and "4096 tokens" in caplog.text
