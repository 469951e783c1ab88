"""The command `seechat chat`: questions and commands from stdin, one a line."""

import argparse
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from seechat_lite.cli.options import (
    UsageError,
    add_answer_options,
    answer_options,
    load_model,
    load_options,
    picture_source,
)
from seechat_lite.cli.terminal import complain, print_stats, show
from seechat_lite.interrupts import raise_on_ctrl_c
from seechat_lite.text_lines import Bytes, LineError, text_lines
from seechat_weights.errors import ImageError, SeechatError
from seechat_weights.plain_text import one_line, spoken

if TYPE_CHECKING:
    from seechat_lite.chat import Chat
    from seechat_lite.generation import Generation
    from seechat_lite.images import ImageSource

MAX_LINE = 1 << 20  # bytes
HELP = """\
/image FILE   show a picture with the next question    给下一个问题附一张图片
/clear        forget the conversation                  清空对话
/history      show the conversation                    查看对话
/help         this list                                帮助
/exit         leave (or Ctrl-D)                        退出
Ctrl-C stops an answer.                                Ctrl-C 停止回答"""


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `chat` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "chat",
        parents=[common],
        usage="%(prog)s [options]",
        help="talk, with /image and /help",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="show a picture with the first question; may be repeated",
    )
    add_answer_options(parser)
    parser.set_defaults(run=lambda args: _chat(args, parser.error))


def _chat(args: argparse.Namespace, usage_error: UsageError) -> int:
    options = answer_options(args, usage_error)
    with load_model(args, load_options(args, usage_error)) as model:
        chat = model.chat(args.format)
        talk(chat, args.image, options, stats=args.stats, debug=args.debug)
    return 0


def talk(
    chat: "Chat", images: list[str], options: "Generation", *, stats: bool, debug: bool
) -> None:
    """Answer until stdin ends or somebody leaves.

    chat: the conversation.
    images: files shown with the first question.
    options: options of the answers.
    stats: print tokens and times after every answer.
    debug: raise errors; otherwise they are shown and the conversation goes on.
    """
    talk = _Talk(chat, options, stats=stats)
    for path in images:
        talk.image(path)
    raise_on_ctrl_c()
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        name = one_line(chat.model.manifest.name)
        print(f"{name} · /help · Ctrl-D: exit 退出", file=sys.stderr)
    for line in _lines(interactive):
        try:
            if line.split()[0] in ("/exit", "/quit"):
                break
            talk.take(line)
        except KeyboardInterrupt:
            print("(stopped 已停止)", file=sys.stderr)
        except SeechatError as e:  # the conversation goes on
            if debug:
                raise
            complain(e)


class _Talk:
    """A Chat, and the pictures of the next question."""

    def __init__(self, chat: "Chat", options: "Generation", *, stats: bool) -> None:
        self._chat = chat
        self._options = options
        self._stats = stats
        self._waiting: list[ImageSource] = []

    def take(self, line: str) -> None:
        """Carry out a command or answer a question."""
        command, _, rest = line.partition(" ")
        if command == "/image":
            for path in _paths(rest):
                self.image(path)
            print(f"🖼 × {len(self._waiting)} · ask about it 请提问", file=sys.stderr)
        elif command == "/clear":
            self._chat.clear()
            self._waiting.clear()
        elif command == "/history":
            for turn in self._chat.turns:
                pictures = "🖼 " * len(turn.images)
                said = f"> {pictures}{turn.question}\n{turn.answer}"
                print(spoken(said), file=sys.stderr)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/"):
            raise SeechatError(f"unknown command {command}; expected one of these: see /help")
        else:
            self._answer(line)

    def image(self, path: str) -> None:
        """Show a picture with the next question; say now if something is wrong with it."""
        from seechat_lite.images import load_image

        if path == "-":
            raise ImageError("stdin gives the questions here; expected a picture's file: name one")
        image = load_image(picture_source(path)).image  # read now: the file may be gone later
        # prompt() encodes it and finds out whether the conversation has room for it
        self._chat.prompt("?", [*self._waiting, image])
        self._waiting.append(image)

    def _answer(self, question: str) -> None:
        with _ctrl_c(self._chat.stop):
            show(self._chat.stream(question, self._waiting, generation=self._options))
        self._waiting.clear()
        stats = self._chat.stats
        if stats and stats.finish_reason == "cancelled":
            print("(stopped 已停止)", file=sys.stderr)
        if self._stats:
            print_stats(stats)


def _paths(text: str) -> list[str]:
    """The files named after /image: one as it is, several, or quoted as terminals paste them."""
    text = text.strip()
    home = str(Path(text).expanduser())
    with suppress(OSError, ValueError):
        if text and Path(home).exists():
            return [home]
    try:
        words = shlex.split(text, posix=os.name == "posix")
    except ValueError:  # an apostrophe in a name
        words = [text]
    if not words:
        raise SeechatError("/image without a file; expected its name: /image cat.jpg")
    return [str(Path(word.strip("'\"")).expanduser()) for word in words]


def _lines(interactive: bool) -> Iterator[str]:
    """Yield questions and commands from stdin until it ends, without blank lines."""
    from seechat_lite.conversation import trimmed

    if not interactive:
        stdin = sys.stdin.buffer if sys.stdin else io.BytesIO()  # None: started with stdin closed
        for line in text_lines(cast(Bytes, stdin), most=MAX_LINE):
            if isinstance(line, LineError):
                complain(line)
            elif line := trimmed(line):
                yield line
        return
    with suppress(ImportError):  # arrow keys and a history of lines; not on every system
        import readline  # noqa: F401
    interrupted = False
    while True:
        try:
            line = trimmed(_input())
            interrupted = False
        except (EOFError, RuntimeError):  # RuntimeError: stdin was closed meanwhile
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            print("\n(Ctrl-C again or Ctrl-D leaves · 再按一次退出)", file=sys.stderr)
            continue
        if line:
            yield line


def _input() -> str:
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # stdout is only for answers
    return input()


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
