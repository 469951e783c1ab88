"""The command `seechat`. Answers go to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed (one readable line says why), 2 wrong usage, 130 Ctrl-C. Commands of
other packages are found as entry points of the group `seechat.commands`: a function that adds its
parser to the subparsers it is given and sets `run`, called with the parsed arguments.
"""

import argparse
import dataclasses
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_lite.interrupts import EXIT_CODE, raise_on_ctrl_c
from seechat_weights.errors import SeechatError

if TYPE_CHECKING:
    from seechat_lite.chat import Model, Stats

HELP = """\
/image FILE   show a picture with the next question    给下一个问题附一张图片
/clear        forget the conversation                  清空对话
/history      show the conversation                    查看对话
/help         this list                                帮助
/exit         leave (or Ctrl-D)                        退出
Ctrl-C stops an answer.                                Ctrl-C 停止回答"""

# a model may say anything: control characters, escape sequences among them, stay off the terminal
CONTROL = {i: None for i in [*range(32), 127, *range(128, 160)] if chr(i) not in "\n\t"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse exits by itself with 2)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    _prepare_streams()
    args = None
    try:
        args = _parse(argv)
        logging.basicConfig(
            format="seechat: %(message)s",
            level=logging.INFO if args.verbose else logging.WARNING,
            stream=sys.stderr,
        )
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        return 1
    except Exception as e:
        if args and args.debug:
            raise
        _complain(e)
        return 1
    finally:
        _forget_unwritable_output()


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed; print() would take the other one
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Chinese shows the rest
            stream.reconfigure(errors="replace")


def _forget_unwritable_output() -> None:
    """Spare the interpreter's own last flush an output that cannot be written (full, closed)."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception) -> None:
    """Say in one line what went wrong."""
    if isinstance(error, SeechatError):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = "out of memory: close other programs, or choose a smaller --context or picture"
    elif isinstance(error, OSError):
        where = "output" if error.filename is None else error.filename
        message = f"{where}: {error.strerror or error}"
    else:  # our mistake
        message = f"{type(error).__name__}: {error} (please report it, with --debug's output)"
    # file names may hold anything, line breaks and escape sequences too
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    print(f"seechat: {line}", file=sys.stderr)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "ask" and not any(r.startswith("-") for r in rest):
        args.words += rest  # argparse stops taking words at the first option between them
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", type=Path, metavar="DIR", help="a bundle; default: built in")
    model.add_argument("--engine", default="auto", help="what executes it (default: %(default)s)")
    model.add_argument("--device", default="auto", help="cpu, cuda, dml, coreml … or a provider")
    model.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens of prompt and answer (2048)"
    )
    model.add_argument(
        "--format", metavar="NAME", help="conversation format; default: the bundle's"
    )
    model.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="(512)")
    model.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest (0)"
    )
    model.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(1)")
    model.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (0)")
    model.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="(1)")
    model.add_argument("--seed", type=int, default=0, metavar="S", help="(0)")
    model.add_argument("--stats", action="store_true", help="tokens and times, on stderr")

    parser = argparse.ArgumentParser(
        prog="seechat", description="Ask about pictures, in Chinese or English · 看图对话"
    )
    parser.add_argument(
        "--version", action="version", version=f"seechat-lite {version('seechat-lite')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser(
        "ask",
        parents=[model, common],
        usage="%(prog)s [IMAGE ...] QUESTION [options]",
        help="ask one question, about pictures or without",
    )
    ask.add_argument(
        "words", nargs="+", metavar="QUESTION", help="the question, after its pictures if any"
    )
    ask.add_argument("--json", action="store_true", help="print one JSON object at the end")
    ask.set_defaults(run=lambda args: _ask(args, ask.error))

    chat = commands.add_parser("chat", parents=[model, common], help="talk, with /image and /help")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="begin with a picture"
    )
    chat.set_defaults(run=lambda args: _chat(args, chat.error))

    info = commands.add_parser("info", parents=[common], help="what a bundle is and will take")
    info.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="default: built in")
    info.add_argument(
        "--context", type=int, default=2048, metavar="N", help="count the memory for N (2048)"
    )
    info.add_argument("--json", action="store_true", help="print the manifest and the sums")
    info.set_defaults(run=lambda args: _info(args, info.error))

    if not argv or argv[0] not in commands.choices:  # others' commands cost time to look for
        for entry in entry_points(group="seechat.commands"):
            entry.load()(commands, common)
    return parser


def _ask(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    *images, question = args.words
    with suppress(OSError):  # questions make file names of any length
        if Path(question).is_file():
            usage_error(f"{question} is a file; the question comes after the pictures")
    if not question.strip():
        usage_error("the question is empty")
    options = _options(args, usage_error)
    with _load(args) as model:
        chat = model.chat(args.format)
        pieces = chat.stream(question, images or None, **options)
        if args.json:
            answer = "".join(pieces)
            report = {"answer": answer, "model": model.manifest.name, "stats": _stats(chat.stats)}
            print(json.dumps(report, ensure_ascii=False))
        else:
            _show(pieces)
        if args.stats:
            _print_stats(chat.stats)
    return 0


def _chat(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    options = _options(args, usage_error)
    with _load(args) as model:
        talk = _Talk(model, args, options)
        for path in args.image:
            talk.image(path)
        raise_on_ctrl_c()
        interactive = sys.stdin is not None and sys.stdin.isatty()
        if interactive:
            name = model.manifest.name.translate(CONTROL)
            print(f"{name} · /help · Ctrl-D: exit 退出", file=sys.stderr)
        for line in _lines(interactive):
            try:
                if line.split()[0] in ("/exit", "/quit"):
                    break
                talk.take(line)
            except KeyboardInterrupt:
                print("(stopped 已停止)", file=sys.stderr)
            except SeechatError as e:  # the conversation goes on
                if args.debug:
                    raise
                _complain(e)
    return 0


class _Talk:
    """The conversation of `seechat chat`: a Chat, and the pictures of the question to come."""

    def __init__(self, model: "Model", args: argparse.Namespace, options: dict[str, Any]) -> None:
        self._chat = model.chat(args.format)
        self._options = options
        self._stats = args.stats
        self._waiting: list[bytes] = []

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
                print(said.translate(CONTROL), file=sys.stderr)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/"):
            raise SeechatError(f"unknown command {command}; see /help")
        else:
            self._answer(line)

    def image(self, path: str) -> None:
        """Show a picture with the next question; what is wrong with it is said now."""
        # prompt() reads and encodes it, and finds out whether the conversation has a place for it
        self._chat.prompt("?", [*self._waiting, path])
        self._waiting.append(Path(path).read_bytes())  # the file may be gone when it is asked about

    def _answer(self, question: str) -> None:
        with _ctrl_c(self._chat.stop):
            _show(self._chat.stream(question, self._waiting, **self._options))
        self._waiting.clear()
        stats = self._chat.stats
        if stats and stats.finish_reason == "cancelled":
            print("(stopped 已停止)", file=sys.stderr)
        if self._stats:
            _print_stats(stats)


def _paths(text: str) -> list[str]:
    """The files named after /image: one as it is, or several, or quoted as terminals paste them."""
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
        raise SeechatError("/image needs a file: /image cat.jpg")
    return [str(Path(word.strip("'\"")).expanduser()) for word in words]


def _info(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    from seechat_lite.memory import available_memory, human, plan
    from seechat_weights.builtin import BUILTIN
    from seechat_weights.bundle import read_manifest, verify_hashes

    _check_context(args, usage_error)
    folder = args.model or BUILTIN
    manifest = read_manifest(folder)
    verify_hashes(folder, manifest)
    needed = plan(manifest, context=args.context)
    if args.json:
        report = dataclasses.asdict(manifest)
        report["memory"] = dataclasses.asdict(needed) | {"total": needed.total}
        print(json.dumps(report, ensure_ascii=False))
        return 0
    lm, decoder, vision = manifest.lm, manifest.decoder, manifest.vision
    blocks = f", blocks of {decoder.block_size}" if decoder.block_size else ""
    size = sum(f.bytes for f in manifest.files.values())
    seeing = "none"
    if vision:
        side = vision.pixels.image_size
        seeing = (
            f"{vision.tower} + {vision.bridge}, {vision.precision}: "
            f"{side}×{side} pixels to {vision.tokens} tokens"
        )
    rows = {
        "name": manifest.name,
        "folder": str(folder),
        "files": f"{len(manifest.files)}, {human(size)}, all hashes right",
        "language model": f"{lm.num_layers} layers, hidden {lm.hidden_size}, {lm.vocab_size} ids",
        "precision": f"{decoder.precision}{blocks}",
        "vision": seeing,
        "conversation": manifest.conversation,
        "memory": f"{human(needed.total)} at a context of {needed.context} tokens",
        "": needed.parts,
        "free now": human(available_memory()),
    }
    if "license" in manifest.provenance:
        rows["license"] = str(manifest.provenance["license"])
    width = max(map(len, rows)) + 2
    columns = shutil.get_terminal_size().columns
    for name, value in rows.items():
        lines = textwrap.wrap(
            value.translate(CONTROL), max(columns - width, 40), break_long_words=False
        ) or [""]
        print(f"{name:<{width}}" + ("\n" + " " * width).join(lines))
    return 0


def _load(args: argparse.Namespace) -> "Model":
    from seechat_lite.chat import load

    return load(args.model, engine=args.engine, device=args.device, context=args.context)


def _options(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> dict[str, Any]:
    """Options of Chat.stream; a value that no model would take is wrong usage."""
    from seechat_lite.conversation import FORMATS
    from seechat_lite.engines import ENGINES
    from seechat_lite.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    options = {name: getattr(args, name) for name in names}
    try:
        Sampling(**options)
    except SeechatError as e:
        usage_error(str(e))
    if args.max_new_tokens < 1:
        usage_error(f"--max-new-tokens is {args.max_new_tokens}; expected at least 1")
    if args.engine not in ("auto", *ENGINES):
        usage_error(f"--engine is {args.engine}; expected one of auto, {', '.join(ENGINES)}")
    if args.format not in (None, *FORMATS):
        usage_error(f"--format is {args.format}; expected one of {', '.join(FORMATS)}")
    _check_context(args, usage_error)
    return {**options, "max_new_tokens": args.max_new_tokens}


def _check_context(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> None:
    from seechat_lite.memory import MIN_CONTEXT

    if args.context < MIN_CONTEXT:
        usage_error(f"--context is {args.context}; expected at least {MIN_CONTEXT}")


def _lines(interactive: bool) -> Iterator[str]:
    """Questions and commands from stdin until its end, blank lines left out."""
    if interactive:
        with suppress(ImportError):  # arrow keys and a history of lines; not on every system
            import readline  # noqa: F401
    interrupted = False
    while True:
        try:
            line = _input(interactive).strip()
            interrupted = False
        except (EOFError, RuntimeError):  # RuntimeError: started with stdin closed
            if interactive:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupted or not interactive:
                raise
            interrupted = True
            print("\n(Ctrl-C again or Ctrl-D leaves · 再按一次退出)", file=sys.stderr)
            continue
        if line:
            yield line


def _input(interactive: bool) -> str:
    if not interactive or sys.stdout.isatty():
        return input("> " if interactive else "")
    print("> ", end="", file=sys.stderr, flush=True)  # stdout is for answers alone
    return input()


def _show(pieces: Iterable[str]) -> None:
    terminal, said = sys.stdout.isatty(), False
    try:
        for piece in pieces:
            print(piece.translate(CONTROL) if terminal else piece, end="", flush=True)
            said = True
    except SeechatError:
        if said:
            print(flush=True)  # the error has its own line
        raise
    print(flush=True)


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(stats: "Stats | None") -> dict[str, Any]:
    if stats is None:
        return {}
    return dataclasses.asdict(stats) | {"tokens_per_second": round(stats.tokens_per_second, 2)}


def _print_stats(stats: "Stats | None") -> None:
    if stats:
        print(
            f"prompt {stats.prompt_tokens} tokens · first token {stats.first_token_seconds:.2f} s"
            f" · {stats.new_tokens} tokens in {stats.seconds:.2f} s"
            f" ({stats.tokens_per_second:.1f}/s) · {stats.finish_reason}",
            file=sys.stderr,
        )
