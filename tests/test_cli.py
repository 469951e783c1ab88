"""The command line as people and scripts meet it: processes, terminals, signals, full disks."""

import contextlib
import io
import json
import logging
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reference import data
from seechat_lite.cli import ask
from seechat_lite.cli import main as cli
from seechat_lite.cli.chat import HELP
from seechat_lite.cli.hints import quoted
from seechat_lite.cli.terminal import PlainHandler, cut, say, show, width
from seechat_lite.conversation import FORMATS
from seechat_lite.engines import ENGINES
from serving import PATIENCE, slow_command, wait_until

posix = pytest.mark.skipif(os.name != "posix", reason="terminals and signals of Unix")
SEECHAT = [sys.executable, "-m", "seechat_lite"]


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([*SEECHAT, *map(str, args)], text=True, encoding="utf-8", **options)


def main(capfd: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """The same within this process: quicker, for what needs no process of its own."""
    try:
        code = cli.main([str(a) for a in args])
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


def one_line(err: str) -> str:
    assert err.startswith("seechat: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


# --- asking


def test_answers_alone_are_on_stdout(vision_bundle: Path, cat: Path) -> None:
    done = run("ask", cat, "这是什么?", "--model", vision_bundle, "--max-new-tokens", 5, "--stats")
    assert done.returncode == 0
    assert done.stdout.strip() and done.stdout.count("\n") == 1
    assert re.fullmatch(
        r"prompt \d+ tokens · first token [\d.]+ s · 5 tokens in [\d.]+ s \([\d.]+/s\) · length\n",
        done.stderr,
    )


def test_json(vision_bundle: Path, cat: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ("ask", cat, cat, "有什么?", "--model", vision_bundle, "--max-new-tokens", "4")
    _, plain, _ = main(capfd, *args)
    code, out, err = main(capfd, *args, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["answer"] == plain.rstrip("\n")
    assert report["model"] == "tiny-vision" and report["stats"]["new_tokens"] == 4


def test_options_between_the_words(
    vision_bundle: Path, cat: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-new-tokens", "3", "--model", vision_bundle)
    expected = main(capfd, "ask", cat, "这是?", *options)
    assert main(capfd, "ask", cat, *options, "这是?") == expected
    assert main(capfd, "ask", *options, cat, "这是?") == expected
    assert expected[0] == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "ask one question"),
        (["look"], "invalid choice: 'look'"),
        (["ask"], "required: QUESTION"),
        (["ask", ""], "the question is empty"),
        (["ask", " \n"], "the question is empty"),
        (["ask", "CAT"], "the question comes after the pictures"),
        (["ask", "CAT", "CAT"], "the question comes after the pictures"),
        (["ask", "你好", "--loud"], "unrecognized arguments: --loud"),
        (["ask", "你好", "--temperature", "-1"], "temperature is -1.0; expected 0"),
        (["ask", "你好", "--temperature", "nan"], "temperature is nan"),
        (["ask", "你好", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["ask", "你好", "--top-p", "0"], "--top-p is 0.0"),
        (["ask", "你好", "--top-k", "-1"], "--top-k is -1"),
        (["ask", "你好", "--seed", "-1"], "seed is -1"),
        (["ask", "你好", "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (["ask", "你好", "--context", "3"], "--context is 3; expected at least 16"),
        (["ask", "你好", "--engine", "x"], "--engine is x; expected one of auto, onnx"),
        (["ask", "你好", "--dtype", "bf16"], "--dtype bf16 goes with --engine torch"),
        (["ask", "你好", "--clip", "x", "--projector", "y"], ", …) goes with --engine torch"),
        (["serve", "--image-size", "56", "--eva", "x"], ", …) goes with --engine torch"),
        (["ask", "CAT", "CAT"], "pictures: seechat ask CAT CAT QUESTION"),
        (["ask", "what is this", "CAT"], f"pictures: seechat ask CAT {quoted('what is this')}"),
        (["ask", "CAT", "什么？", "CAT"], f"pictures: seechat ask CAT CAT {quoted('什么？')}"),
        (["ask", "missing.png", "CAT"], "pictures: seechat ask missing.png CAT QUESTION"),
        (["ask", "你好", "--format", "x"], "--format: invalid choice: 'x' (choose from "),
        (["chat", "--format", "x"], "--format: invalid choice: 'x'"),
        (["serve", "--format", "x"], "--format: invalid choice: 'x'"),
        (["pipe", "--format", "x"], "--format: invalid choice: 'x'"),
        (["info", "--context", "3"], "--context is 3"),
        (["export", "--lm", "x"], "required: --out"),
        (["export", "--lm", "x", "--out", "y", "--clip", "z", "--eva", "e"], "leave the other out"),
    ],
)
def test_wrong_usage(
    cat: Path, capfd: pytest.CaptureFixture[str], args: list[str], expected: str
) -> None:
    code, out, err = main(capfd, *[a.replace("CAT", str(cat)) for a in args])
    assert (code, out) == (2, "")
    assert expected.replace("CAT", quoted(cat)) in err and err.startswith("usage: seechat")


def test_a_long_question_is_no_file_name(
    text_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = main(capfd, "ask", "很" * 300, "--model", text_bundle, "--max-new-tokens", "2")
    assert code == 0 and out


def test_failures_are_one_line(
    text_bundle: Path, vision_bundle: Path, cat: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    see = ("--model", vision_bundle)
    for args, expected in [
        (("ask", "你好", "--model", "/nowhere"), "/nowhere: no such folder"),
        (("ask", "你好", "--model", cat), "a file; expected a bundle, which is a folder"),
        (("ask", "你好", "--device", "abacus", *see), "'abacus' is not in this ONNX Runtime"),
        (("ask", cat, "你好", "--model", text_bundle), "text-only model"),
        (("ask", "你好" * 400, "--context", "64", *see), "the context holds 64, answer included"),
        (("ask", "你好", "--context", 10**9, *see), "are free: load it with context="),
        (("ask", "nothing.png", "你好", *see), "nothing.png: no such file"),
        (("ask", "\x1b[31m\n.png", "你好", *see), r"\x1b[31m\n.png: no such file"),
        (("ask", cat.parent, "你好", *see), "not a file; expected a picture"),
        (("chat", "--image", "nothing.png", *see), "nothing.png: no such file"),
        (("info", cat.parent), "holds no seechat.json"),
        (("export", "--lm", "/nowhere", "--out", "/nowhere/out"), "/nowhere: no such file or"),
    ]:
        code, out, err = main(capfd, *args)
        assert (code, out) == (1, "")
        assert expected in one_line(err)


def test_published_weights_are_called_what_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    """And the two ways to use them are shown, by every command that loads a model."""
    tiny = data("chatglm_tiny")
    for command in (("ask", "你好"), ("chat",), ("bench",), ("pipe",), ("serve",)):
        code, out, err = main(capfd, *command, "--model", tiny)
        assert (code, out) == (1, "")
        assert f"{tiny}: published weights (ChatGLM-6B); expected a bundle: " in one_line(err)
        assert (
            "--engine torch" in err
            and f"; seechat export --lm {tiny} --precision int4 --out BUNDLE)" in err
        )
    for path, expected in [
        (data("quantized/int4"), "says what it still needs (seechat info {path})"),  # no tokenizer
        (data("vision/clip_hf"), "a CLIP vision tower; expected a bundle"),
        (data("quantized/matrices.safetensors"), "expected a bundle: export one of it"),
        (tiny.parent, f"name {tiny}"),
    ]:
        code, _, err = main(capfd, "ask", "你好", "--model", path)
        assert code == 1 and expected.format(path=path) in one_line(err)


@pytest.mark.slow
def test_debug_shows_the_traceback() -> None:
    done = run("ask", "你好", "--model", "/nowhere", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "BundleError" in done.stderr


def test_our_own_mistakes_are_one_line(
    text_bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, expected in [
        (RuntimeError("two\nlines"), r"RuntimeError: two\nlines (please report it, with --debug"),
        (MemoryError(), "out of memory: close other programs"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
    ]:

        def fail(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(ask, "load_model", fail)
        code, _, err = main(capfd, "ask", "你好", "--model", text_bundle)
        assert code == 1 and expected in one_line(err)


def png_bomb(path: Path) -> None:
    """A sound PNG of 30000 x 30000 pixels, 0.9 GB when decoded, in a hundred kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    packer = zlib.compressobj(9)
    row = bytes(1 + 30000 // 8)
    packed = b"".join(packer.compress(row) for _ in range(30000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def test_bad_pictures(
    vision_bundle: Path, cat: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = cat.read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("a cat\n" * 100)
    (tmp_path / "empty.png").touch()
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    for name, expected in {
        "cut.png": "damaged or truncated",
        "text.png": "not a picture",
        "empty.png": "empty",
        "pointer.png": "Git LFS pointer",
    }.items():
        code, out, err = main(capfd, "ask", tmp_path / name, "什么?", "--model", vision_bundle)
        assert (code, out) == (1, "")
        assert name in one_line(err) and expected in err


@posix
def test_a_picture_bomb_takes_no_memory(vision_bundle: Path, tmp_path: Path) -> None:
    png_bomb(tmp_path / "bomb.png")
    script = "import sys, hostile, seechat_lite.cli.main as cli\n"
    script += "code = cli.main(sys.argv[1:])\nprint(hostile.peak())\nsys.exit(code)"
    command = [sys.executable, "-c", script, "ask", tmp_path / "bomb.png", "什么?"]
    done = subprocess.run(
        [*command, "--model", vision_bundle],
        capture_output=True, text=True, encoding="utf-8", cwd=Path(__file__).parent,
    )  # fmt: skip
    assert "30000×30000 pixels; expected at most" in one_line(done.stderr)
    assert done.returncode == 1
    assert 0 < int(done.stdout) < 300_000_000


# --- information


def test_info_of_published_weights(capfd: pytest.CaptureFixture[str]) -> None:
    """How to use them, both ways; one way where something is still needed."""
    whole, part = data("chatglm_tiny"), data("quantized/int4")  # which has no tokenizer
    code, out, _ = main(capfd, "info", whole)
    run = f"seechat chat --engine torch --model {whole}"
    assert code == 0 and run in " ".join(out.split())
    assert json.loads(main(capfd, "info", whole / "model.safetensors", "--json")[1])["run"] == run
    code, out, _ = main(capfd, "info", part)
    assert code == 0 and "seechat export" in out and "--engine" not in out


def test_info_says_which_options_it_did_not_use(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Options of loading need a model that can be loaded, and an engine that can load it."""
    model, projector = data("chatglm_tiny"), data("vision/mm_projector_linear.bin")
    assert main(capfd, "info", model, "--context", "64", "--no-keep-vision")[0] == 0
    assert main(capfd, "info", projector, "--engine", "torch", "--device", "cpu")[0] == 0
    assert main(capfd, "info", model)[0] == main(capfd, "info", projector)[0] == 0
    assert caplog.messages == [
        "not used: --context, --keep-vision (--engine torch is what loads published weights)",
        "not used: --engine, --device (no whole model)",
    ]


@pytest.mark.torch
def test_info_plans_the_memory_of_published_weights(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    plans = []
    for context in ("64", "128"):
        args = ("info", data("chatglm_tiny"), "--engine", "torch", "--context", context)
        assert f"at a context of {context} tokens" in main(capfd, *args)[1]
        code, out, err = main(capfd, *args, "--json")
        assert (code, err) == (0, "")
        plans.append(json.loads(out)["memory"])
    assert [plan["context"] for plan in plans] == [64, 128]
    assert plans[0]["total"] < plans[1]["total"]


def test_a_context_beyond_the_training_is_told(
    text_bundle: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The default is nobody's wish; this model was trained with 256 tokens."""
    ask = ("ask", "你好", "--max-new-tokens", "2", "--model", text_bundle)
    for args in (ask, ("info", text_bundle)):
        for context, told in (("256", False), ("257", True), ("2048", False)):
            caplog.clear()
            assert main(capfd, *args, "--context", context)[0] == 0
            assert len(caplog.messages) == told
            expected = "a context of 257 tokens, but the model was trained with 256"
            assert all(expected in message for message in caplog.messages)


def test_info(vision_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = main(capfd, "info", vision_bundle)
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if str(vision_bundle) not in line]
    assert all(len(row) <= 80 for row in rows)
    assert len({re.match(r"(\S+ )*\s+", row).end() for row in rows}) == 1  # type: ignore[union-attr]
    assert "vision          clip + linear, fp32" in rows
    assert "a picture       56×56 pixels (crop), 16 tokens" in rows
    report = json.loads(main(capfd, "info", vision_bundle, "--json")[1])
    assert report["name"] == "tiny-vision" and report["memory"]["total"] > 0
    assert all(value in " ".join(out.split()) for value in report["facts"].values())


def test_help_and_version_need_no_model(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Help fits a terminal, begins with a short usage, explains every option, names choices."""
    monkeypatch.setenv("COLUMNS", "80")
    (commands,) = (a.choices for a in cli._parser([])._actions if a.dest == "command")
    assert commands and all(action.help for p in commands.values() for action in p._actions)
    for args in (["--version"], ["--help"], *([name, "--help"] for name in commands)):
        code, out, err = main(capfd, *args)
        assert (code, err) == (0, "") and out
        assert all(len(line) <= 80 for line in out.splitlines())
        assert out.partition("\n\n")[0].count("\n") < 2
        assert "--engine" not in out or all(name in out.split("--engine")[-1] for name in ENGINES)
        joined = "".join(out.partition("--format")[2].split())  # names break at hyphens
        assert "--format" not in out or all(name in joined for name in FORMATS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_command_starts_without_numpy(command: str) -> None:
    script = "import sys, seechat_lite.cli.main as cli; cli._parser([sys.argv[1]])\n"
    script += "print({'numpy', 'PIL', 'argparse'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, command], capture_output=True, text=True)
    assert done.stdout == "{'argparse'}\n"


# --- streams


@posix
def test_output_that_cannot_be_written(text_bundle: Path) -> None:
    ask = ("ask", "你好", "--model", text_bundle)
    with Path("/dev/full").open("w") as full:
        for options in ([], ["--json"]):
            done = run(*ask, *options, capture_output=False, stdout=full, stderr=subprocess.PIPE)
            assert done.returncode == 1
            assert one_line(done.stderr) == "seechat: output: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)  # as `seechat ask … | head -c 1` leaves it
    done = run(*ask, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@posix
def test_streams_that_are_closed(text_bundle: Path) -> None:
    ask = f"{' '.join(SEECHAT)} ask 你好 --max-new-tokens 2 --model"
    for redirection in ("<&-", ">&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{ask} '{text_bundle}' {redirection}"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(["sh", "-c", f"{ask} /nowhere 2>&-"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")  # no error among the answers


def chat(bundle: Path, said: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [*SEECHAT, "chat", "--model", str(bundle), "--max-new-tokens", "3", *options]
    return subprocess.run(command, input=said, capture_output=True)


def test_chat_reads_questions_from_a_file(vision_bundle: Path, cat: Path, tmp_path: Path) -> None:
    odd = tmp_path / "一只 '猫'.png"
    odd.write_bytes(cat.read_bytes())
    said = f"""
        /help
        /image
        /image {odd}
        /image "{cat}"
        /image {cat} {str(odd).replace(" ", chr(92) + " ").replace("'", chr(92) + "'")}
        这些是什么?
        /image {tmp_path}/nothing.png
        /nonsense
        然后呢?
        /history
        /clear
        /history
        /exit
        不再回答"""
    done = chat(vision_bundle, said.encode())
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0
    assert len(out.splitlines()) == 2  # two questions, nothing else
    lines = err.splitlines()
    help_lines = HELP.splitlines()
    assert lines[: len(help_lines)] == help_lines
    assert lines[len(help_lines) :] == [
        "seechat: /image without a file; expected its name: /image cat.jpg",
        *(f"🖼 × {waiting} · ask about it 请提问" for waiting in (1, 2, 4)),
        f"seechat: {tmp_path}/nothing.png: no such file; expected a picture: check the path",
        "seechat: unknown command /nonsense; expected one of these: see /help",
        "> 🖼 🖼 🖼 🖼 这些是什么?",
        out.splitlines()[0],
        "> 然后呢?",
        out.splitlines()[1],
    ]


def test_chat_keeps_a_picture_whose_file_goes(vision_bundle: Path, cat: Path) -> None:
    short_lived = cat.with_name("short-lived.png")
    short_lived.write_bytes(cat.read_bytes())
    command = [*SEECHAT, "chat", "--model", str(vision_bundle), "--max-new-tokens", "3"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(f"/image {short_lived}\n".encode())
        process.stdin.flush()
        assert "🖼 × 1" in process.stderr.readline().decode()  # so it has been read
        short_lived.unlink()
        out, err = process.communicate("这是什么?\n".encode())
    assert process.returncode == 0 and out.strip() and err == b""


@pytest.mark.parametrize("said", [b"", b"\n \n", b"/exit", b"\xff\xfe\x00\n", "你好".encode()])
def test_chat_takes_any_input(text_bundle: Path, said: bytes) -> None:
    done = chat(text_bundle, said)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@posix
def test_chat_with_stdin_closed(text_bundle: Path) -> None:
    command = f"{' '.join(SEECHAT)} chat --model '{text_bundle}' <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_chat_says_what_it_forgets(text_bundle: Path) -> None:
    done = chat(text_bundle, "一个很长很长的问题?\n".encode() * 6, "--context", "64")
    assert done.returncode == 0
    assert "seechat: the context is full: the oldest 1 turn(s) are forgotten" in (
        done.stderr.decode()
    )


# --- Ctrl-C

# runs the command line with one of its stages slowed down, which says when it is reached
SLOWED = """
import sys, time
from seechat_lite.interrupts import leave_on_ctrl_c
leave_on_ctrl_c()
def wait(*_, **__):
    print("reached", file=sys.stderr, flush=True)
    {wait}
stage = {stage!r}
if stage == "import":
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "onnxruntime": wait()
    sys.meta_path.insert(0, Finder())
else:
    import seechat_lite.engines.onnx.engine as onnx
    if stage == "load":
        onnx.OnnxEngine.__init__ = wait
    else:
        setattr(onnx.OnnxEngine, stage, wait)
from seechat_lite.cli.main import main
sys.exit(main())
"""
SLEEP = "time.sleep(10**6)"
NATIVE = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # deaf as ONNX Runtime


@posix
@pytest.mark.parametrize("stage", ["import", "load", "prefill", "step"])
@pytest.mark.parametrize("wait", [SLEEP, NATIVE], ids=["python", "native"])
def test_ctrl_c_leaves_ask_at_once(text_bundle: Path, stage: str, wait: str) -> None:
    script = SLOWED.format(stage=stage, wait=wait)
    command = [sys.executable, "-c", script, "ask", "你好", "--model", str(text_bundle)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == "reached\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
        finally:
            process.kill()
        assert process.stderr.read() == "\n"


LONG_RUNNING = {
    "ask": ["ask", "你好", "--model", "BUNDLE"],
    "chat": ["chat", "--model", "BUNDLE"],
    "pipe": ["pipe", "--model", "BUNDLE"],
    "bench": ["bench", "--model", "BUNDLE"],
    "export": ["export", "--lm", "LM", "--out", "OUT"],
}
FIRST_PROCESS = "import os; os.getpid = lambda: 1\n"  # as in a container


@posix
@pytest.mark.parametrize("command", LONG_RUNNING)
def test_sigterm_ends_every_command(text_bundle: Path, tmp_path: Path, command: str) -> None:
    """At once, amid native code and without a word; a server's own ends are tested elsewhere."""
    script = SLOWED.format(stage="load", wait=NATIVE)
    if command == "export":
        writer = '__import__("seechat_export.export").export._Writer.__init__'
        script = script.replace("onnx.OnnxEngine.__init__", writer)
    places = {"BUNDLE": str(text_bundle), "LM": data("chatglm_tiny"), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word) for word in LONG_RUNNING[command]]
    for before, code in (("", -signal.SIGTERM), (FIRST_PROCESS, 143)):
        with subprocess.Popen(
            [sys.executable, "-c", before + script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            try:
                while process.stderr.readline() not in ("reached\n", ""):
                    pass
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE) == code
            finally:
                process.kill()
            assert process.stderr.read() == ""


@posix
def test_ctrl_c_while_starting(text_bundle: Path) -> None:
    for delay in (0, 0.05, 0.1, 0.15):  # wherever that is
        command = [*SEECHAT, "ask", "你好", "--model", str(text_bundle)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            started = psutil.Process(process.pid)  # until our first lines have run, it is Python
            wait_until(lambda p=process, s=started: p.poll() is not None or s.num_threads() > 1)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        assert process.returncode in (0, 130)
        assert err in ("", "\n")


class Terminal:
    """`seechat chat` in a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        import pty

        self._leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env=os.environ | {"LC_ALL": "C.UTF-8", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(follower)
        self.screen = ""
        self._bytes = b""

    def wait_for(self, pattern: str) -> None:
        """Until what is shown matches the regular expression."""
        while not re.search(pattern, self.screen, re.DOTALL):
            assert select.select([self._leader], [], [], PATIENCE)[0], self.screen
            try:
                self._bytes += os.read(self._leader, 65536)
            except OSError:  # the other side has gone
                raise AssertionError(self.screen) from None
            self.screen = self._bytes.decode("utf-8", "replace")

    def rest(self) -> str:
        """Everything shown, once the process has ended."""
        with contextlib.suppress(OSError):
            while more := os.read(self._leader, 65536):
                self._bytes += more
        return self._bytes.decode("utf-8", "replace")

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def interrupt(self) -> None:
        # readline misses a signal in the instant between its prompt and its waiting
        process = psutil.Process(self.process.pid)
        wait_until(lambda: process.status() == psutil.STATUS_SLEEPING)
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._leader)


@pytest.fixture
def terminal(text_bundle: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*options: str, start: Sequence[str] = ("-m", "seechat_lite")) -> Terminal:
        command = [sys.executable, *start, "chat", "--model", str(text_bundle), *options]
        opened.append(Terminal(command))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


@posix
def test_ctrl_c_stops_an_answer_but_not_the_chat(terminal: Callable[..., Terminal]) -> None:
    seen = terminal("--format", "seechat", start=slow_command(0.01))
    seen.wait_for("> ")
    seen.type("你好\n")
    seen.wait_for("> 你好.*\n.")
    seen.interrupt()
    seen.wait_for("已停止.*> ")
    seen.type("/history\n")
    seen.wait_for("/history.*> .*> ")
    question, *answer = seen.screen.split("> ")[3].splitlines()
    assert question == "你好" and "".join(answer)  # the part that was said is kept
    seen.type("\x04")
    assert seen.process.wait() == 0


@posix
def test_ctrl_c_at_the_prompt(terminal: Callable[..., Terminal]) -> None:
    seen = terminal("--max-new-tokens", "2")
    seen.wait_for("> ")
    seen.interrupt()
    seen.wait_for("Ctrl-C again or Ctrl-D leaves.*> ")
    seen.type("你好\n")  # forgives the first
    seen.wait_for("你好.*> ")
    seen.interrupt()
    seen.wait_for("again.*again.*> ")
    seen.interrupt()
    assert seen.process.wait() == 130
    assert "Traceback" not in seen.rest()


@posix
def test_what_a_model_says_cannot_command_the_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    show(["\x1b]0;title\x07红", "\r\x9b2J\t色\n"])
    assert screen.getvalue() == "]0;title红2J\t色\n\n"


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(1, 30))
def test_a_stage_fits_the_terminal(text: str, columns: int) -> None:
    found = cut(text, columns)
    assert width(found) <= columns
    assert found == text or text.startswith(found.removesuffix("…"))
    assert (found == text) == (width(text) <= columns)


def test_chinese_takes_two_columns() -> None:
    assert width("读取 a.png") == 10 and cut("读取 a.png", 4) == "读…"


def test_a_stage_is_one_line_and_a_log_line_begins_its_own(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    say("a\nb" * 100)
    record = logging.LogRecord("seechat", logging.WARNING, "", 0, "careful", None, None)
    PlainHandler().emit(record)
    _, first, second = screen.getvalue().split("\r\x1b[K")
    assert "\n" not in first and len(first) == 79
    assert second == "seechat: careful\n"
