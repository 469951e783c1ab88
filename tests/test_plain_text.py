"""What files say of themselves is shown, and commands no terminal: over all commands."""

import contextlib
import io
import json
import logging
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from reference import data
from seechat_lite.cli.main import main
from seechat_lite.cli.terminal import PlainFormatter
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import MANIFEST
from seechat_weights.errors import SeechatError
from seechat_weights.plain_text import many_lines, one_line, safe_json, spoken

EVIL = "x\x1b]0;title\x07\x1b[2J\x9b31my\r\nseechat: forged line\u202egpj.exe\u2028seechat: forged"
# said by no command here of itself
COMMANDS = [c for c in map(chr, range(0x3000)) if unicodedata.category(c) in ("Cc", "Zl", "Zp")]
COMMANDS += [chr(c) for c in (0x61C, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def check(shown: str) -> None:
    """Nothing commands a terminal, and nobody but us begins a line."""
    harmful = {c for c in shown if c in COMMANDS} - {"\n", "\t"}
    assert not harmful, [hex(ord(c)) for c in harmful]
    assert not any(line.startswith("seechat: forged") for line in shown.splitlines())


@given(st.text() | st.just(EVIL))
def test_properties(text: str) -> None:
    assert not set(one_line(text)) & set(COMMANDS)
    assert not set(many_lines(text)) & (set(COMMANDS) - {"\n", "\t"})
    assert not set(spoken(text)) & (set(COMMANDS) - {"\n", "\t"})
    written = safe_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(written) == text
    assert not set(written) & set(COMMANDS)
    assert str(SeechatError(text)) == one_line(text)
    if not set(text) & set(COMMANDS) and "\u200e" not in text and "\u200f" not in text:
        assert one_line(text) == many_lines(text) == spoken(text) == text


def test_text_of_any_script_stays() -> None:
    text = "看图　对话 👨‍👩‍👧 é ไทย नमस्ते עברית"
    assert one_line(text) == spoken(text) == text


@pytest.fixture(scope="module")
def evil_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model under another name, with a provenance to match."""
    folder = tmp_path_factory.mktemp("bundles") / "evil"
    shutil.copytree(BUILTIN, folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["name"] = EVIL
    manifest["vision"]["tower"] = manifest["vision"]["bridge"] = EVIL
    manifest["provenance"] = {
        "license": EVIL, "lm": {EVIL: {}}, "downloads": {EVIL: {EVIL: EVIL}},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """So that a command sets up its log as it does in a process of its own."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:], root.level = before, level


def run(*arguments: object, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    logging.getLogger().handlers[:] = []  # pytest's; then a command sets up its own
    with contextlib.suppress(SystemExit):
        main([str(a) for a in arguments])
    shown = "".join(capfd.readouterr())
    check(shown)
    return shown


def object_in(shown: str) -> dict[str, object]:
    return next(json.loads(line) for line in shown.splitlines() if line.startswith("{"))


FLAGS = [(), ("-v",), ("--debug",), ("-v", "--debug")]


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS, ids="".join)
def test_a_bundle_full_of_escapes(
    evil_bundle: Path, flags: tuple[str, ...], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = ("--model", evil_bundle, *flags)
    few = ("--max-new-tokens", 2)
    shown = run("ask", "hi", *few, *model, capfd=capfd)
    assert ("forged" in shown) == ("-v" in flags)
    shown = run("ask", "hi", "--json", *few, *model, capfd=capfd)
    assert object_in(shown)["model"] == EVIL
    assert "forged" in run("ask", "hi", "--max-memory", "1MB", *model, capfd=capfd)
    run("ask", "hi", "--format", EVIL, *model, capfd=capfd)
    assert "forged" in run("info", evil_bundle, *flags, capfd=capfd)
    shown = run("info", evil_bundle, "--json", *flags, capfd=capfd)
    assert object_in(shown)["name"] == EVIL
    question = json.dumps({"id": EVIL, "question": EVIL, "max_new_tokens": 2, EVIL: EVIL})
    for line in (f"{question}\n", "hi\n/history\n/image \x1b[2J\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode()), "utf-8"))
        run("pipe" if line[0] == "{" else "chat", *model, capfd=capfd)
    run("ask", evil_bundle / EVIL.replace("/", ""), "hi", *model, capfd=capfd)


@pytest.mark.skipif(sys.platform == "win32", reason="such names are not allowed there")
@pytest.mark.parametrize("flags", FLAGS, ids="".join)
def test_files_full_of_escapes(
    tmp_path: Path, flags: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """In a checkpoint's folder, files, tensors, configuration, and where none is."""
    folder = tmp_path / EVIL
    shutil.copytree(data("chatglm_tiny"), folder)
    (folder / "ice_text.model").chmod(0o644)
    run("info", folder, *flags, capfd=capfd)
    export = ("export", "--lm", folder, "--out", tmp_path / f"{EVIL}.out", *flags)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for changes in ({"model_type": EVIL}, {"num_layers": EVIL}, {EVIL: EVIL}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        run("info", folder, *flags, capfd=capfd)
        if EVIL not in changes:
            run(*export, capfd=capfd)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {EVIL: tensors["lm_head.weight"]}, folder / "model.safetensors")
    assert "forged" in run("info", folder, *flags, capfd=capfd)
    run(*export, capfd=capfd)
    (folder / "model.safetensors").write_bytes(b"\x1b[2J")
    run("info", folder, *flags, capfd=capfd)
    run("info", folder / f"{EVIL}nothing", *flags, capfd=capfd)
    run("bench", "--model", folder / f"{EVIL}nothing", *flags, capfd=capfd)
    run("serve", "--model", folder / f"{EVIL}nothing", *flags, capfd=capfd)
    run("info", EVIL, EVIL, *flags, capfd=capfd)
    run(EVIL, *flags, capfd=capfd)


def test_log_lines() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter())
    log = logging.Logger("x")
    log.addHandler(handler)
    try:
        raise ValueError("a\x1b[2Jb\u2028")
    except ValueError:
        log.exception("%s", EVIL)
    check(stream.getvalue())
    assert "ValueError" in stream.getvalue()
