"""Prints for people. A terminal may lack Chinese, be closed or full, or obey escapes."""

import argparse
import codecs
import io
import logging
import os
import shutil
import sys
import textwrap
import traceback
import unicodedata
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from seechat_lite.cli.hints import told
from seechat_weights.errors import SeechatError
from seechat_weights.libraries import import_error
from seechat_weights.plain_text import json_line, many_lines, one_line, spoken

if TYPE_CHECKING:
    from seechat_lite.chat import Stats


class PlainFormatter(logging.Formatter):
    """Formats log lines for people: one line a record, then its traceback."""

    def __init__(self) -> None:
        super().__init__("seechat: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return many_lines(super().formatException(ei))


class PlainHandler(logging.StreamHandler):
    """Writes log lines to stderr; none is joined to what say() shows there."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(PlainFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        say("")
        super().emit(record)


class Parser(argparse.ArgumentParser):
    """A parser that reports what is wrong with arguments, with file names, in one line.

    No option may be shortened: --image must not be taken for --image-size.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def show_traceback() -> None:
    """Show the exception that is being handled, and where it came from."""
    print(many_lines(traceback.format_exc()), end="", file=sys.stderr)


def print_json(report: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; in ASCII if stdout is not UTF-8, which JSON must be.

    report: the object.
    """
    utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    print(json_line(report, ascii=not utf8))


def print_table(rows: Mapping[str, str | list[str]]) -> None:
    """Print names and values in two columns; values are wrapped to the terminal's width.

    rows: name -> value, or several values.
    """
    width = max(map(len, rows)) + 2
    columns = shutil.get_terminal_size().columns
    for name, value in rows.items():
        lines = [
            part
            for text in ([value] if isinstance(value, str) else value)
            for part in textwrap.wrap(
                one_line(text),
                max(columns - width, 40),
                break_long_words=False,
                break_on_hyphens=False,  # people copy paths and addresses
            )
            or [""]
        ]
        print(f"{name:<{width}}" + ("\n" + " " * width).join(lines))


def prepare_streams() -> None:
    """Make sure that there is something to print to, and that any text can be printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed; print() would use the other one
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
    global _lost
    _lost = False  # of an earlier command in this process
    codecs.register_error(_LOSSY, _replace)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file or program reads it. Windows' own code page may lack Chinese. If somebody chose
        # an encoding, it is kept.
        chosen = sys.stdout.isatty() or os.environ.get("PYTHONIOENCODING")
        if not (chosen or _has_chinese(sys.stdout.encoding)):
            sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.reconfigure(errors=_LOSSY)
    if isinstance(sys.stderr, io.TextIOWrapper):  # escapes keep names of files distinguishable
        sys.stderr.reconfigure(errors="replace" if sys.stderr.isatty() else "backslashreplace")


_LOSSY = "seechat_lossy"
_lost = False  # whether stdout could not hold something that was printed


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    global _lost
    _lost = True
    return codecs.replace_errors(error)


def _has_chinese(encoding: str) -> bool:
    try:
        "图片？".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def tell_what_was_lost() -> None:
    """Say, if so, that question marks in the output stand for characters its encoding lacks."""
    if _lost:
        print(
            f"seechat: the output's encoding, {sys.stdout.encoding}, lacks characters of the "
            "answer, and ? stands for them: choose UTF-8 (PYTHONIOENCODING=utf-8), or --json",
            file=sys.stderr,
        )


def forget_unwritable_output() -> None:
    """Keep the interpreter's last flush from failing on an output that is full or closed."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(error: Exception, known: Container[str] = ()) -> None:
    """Say in one line what went wrong.

    error: the exception.
    known: the names of the options that the running command has.
    """
    if isinstance(error, SeechatError):
        message = told(error, known)
    elif isinstance(error, MemoryError):
        message = "out of memory: close other programs, or choose a smaller --context or picture"
    elif isinstance(error, ImportError):
        needed = "expected it for every command"
        message = str(import_error(SeechatError, error, needed=needed, install="seechat-lite"))
    elif isinstance(error, OSError):
        where = "output" if error.filename is None else error.filename
        message = f"{where}: {error.strerror or error}"
    else:  # a mistake of ours
        message = f"{type(error).__name__}: {error} (please report it, with --debug's output)"
    say("")
    print(f"seechat: {one_line(message)}", file=sys.stderr)


def show(pieces: Iterable[str]) -> None:
    """Print an answer on stdout as it comes.

    pieces: the answer.
    """
    terminal, said = sys.stdout.isatty(), False
    try:
        for piece in pieces:
            print(spoken(piece) if terminal else piece, end="", flush=True)
            said = True
    except SeechatError:
        if said:
            print(flush=True)  # the error begins on its own line
        raise
    print(flush=True)


def print_stats(stats: "Stats | None") -> None:
    """Print on stderr what an answer took.

    stats: of the answer; None prints nothing.
    """
    if stats:
        held = f" ({stats.held_tokens} known)" if stats.held_tokens else ""
        print(
            f"prompt {stats.prompt_tokens} tokens{held}"
            f" · first token {stats.first_token_seconds:.2f} s"
            f" · {stats.new_tokens} tokens in {stats.seconds:.2f} s"
            f" ({stats.tokens_per_second:.1f}/s) · {stats.finish_reason}",
            file=sys.stderr,
        )


def say(stage: str) -> None:
    """Show a stage on one line of a terminal; the next one overwrites it.

    stage: what is being done; "" clears the line.
    """
    if sys.stderr.isatty():
        # only what fits: a line that was wrapped could not be overwritten
        line = cut(one_line(stage) + " …", _columns() - 1) if stage else ""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def width(text: str) -> int:
    """How many columns of a terminal a text takes; Chinese characters take two.

    text: the text, in one line.
    """
    return sum(map(_width, text))


def cut(text: str, columns: int) -> str:
    """The text, or its beginning and an ellipsis if it is wider.

    text: the text, in one line.
    columns: of the terminal.
    """
    if width(text) <= columns:
        return text
    taken = columns - 1  # the ellipsis takes one
    for at, character in enumerate(text):
        taken -= _width(character)
        if taken < 0:
            return text[:at].rstrip() + "…"
    return text


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _columns() -> int:
    """The width of the terminal that stderr is; shutil would ask about stdout."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
