"""The command `seechat`. Answers go to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed (one readable line says why), 2 wrong usage, 130 Ctrl-C. Commands of
other packages are found as entry points of the group `seechat.commands`: a function that adds its
parser to the subparsers it is given and sets `run`, called with the parsed arguments.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_weights.errors import SeechatError

if TYPE_CHECKING:
    from seechat_lite.chat import Chat, Model

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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Chinese still shows the rest
            stream.reconfigure(errors="replace")
    args = None
    try:
        args = _parser(argv).parse_args(argv)
        logging.basicConfig(
            format="seechat: %(message)s",
            level=logging.INFO if args.verbose else logging.WARNING,
            stream=sys.stderr,
        )
        return args.run(args) or 0
    except SeechatError as e:
        if args and args.debug:
            raise
        print(f"seechat: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
    model.add_argument("--top-p", type=float, default=1.0, metavar="P")
    model.add_argument("--top-k", type=int, default=0, metavar="K")
    model.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    model.add_argument("--seed", type=int, default=0, metavar="S")
    model.add_argument("--stats", action="store_true", help="tokens and times, on stderr")

    parser = argparse.ArgumentParser(
        prog="seechat", description="Ask about pictures, in Chinese or English · 看图对话"
    )
    parser.add_argument(
        "--version", action="version", version=f"seechat-lite {version('seechat-lite')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser(
        "ask", parents=[model, common], help="ask one question, about pictures or without"
    )
    ask.add_argument("words", nargs="+", metavar="IMAGE … QUESTION", help="the question comes last")
    ask.add_argument("--json", action="store_true", help="print one JSON object at the end")
    ask.set_defaults(run=lambda args: _ask(args, ask.error))

    chat = commands.add_parser("chat", parents=[model, common], help="talk, with /image and /help")
    chat.add_argument("--image", type=Path, action="append", default=[], metavar="FILE")
    chat.set_defaults(run=lambda args: _chat(args, chat.error))

    info = commands.add_parser("info", parents=[common], help="what a bundle is and will take")
    info.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="default: built in")
    info.add_argument("--context", type=int, default=2048, metavar="N")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)

    if not argv or argv[0] not in commands.choices:  # others' commands cost time to look for
        for entry in entry_points(group="seechat.commands"):
            entry.load()(commands, common)
    return parser


def _ask(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    *images, question = args.words
    if not images and Path(question).is_file():
        usage_error(f"{question} is a file; the question comes after the pictures")
    if not question.strip():
        usage_error("the question is empty")
    options = _sampling(args, usage_error)
    with _load(args) as model:
        chat = model.chat(args.format)
        pieces = chat.stream(question, images or None, **options)
        if args.json:
            answer = "".join(pieces)
            report = {"answer": answer, "model": model.manifest.name, "stats": _stats(chat)}
            print(json.dumps(report, ensure_ascii=False))
        else:
            _show(pieces)
        if args.stats:
            _print_stats(chat)
    return 0


def _chat(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    options = _sampling(args, usage_error)
    with _load(args) as model:
        chat = model.chat(args.format)
        waiting = [_remember(model, chat, str(path)) for path in args.image]
        interactive = sys.stdin is not None and sys.stdin.isatty()
        if interactive:
            print(f"{model.manifest.name} · /help · Ctrl-D: exit 退出", file=sys.stderr)
        for line in _lines(interactive):
            command, _, rest = line.partition(" ")
            try:
                if command == "/image":
                    waiting.append(_remember(model, chat, rest.strip().strip("'\"")))
                elif command == "/clear":
                    chat.clear()
                    waiting.clear()
                elif command == "/history":
                    for turn in chat.turns:
                        pictures = "🖼 " * len(turn.images)
                        print(f"> {pictures}{turn.question}\n{turn.answer}", file=sys.stderr)
                elif command == "/help":
                    print(HELP, file=sys.stderr)
                elif command in ("/exit", "/quit"):
                    break
                elif command.startswith("/"):
                    print(f"seechat: unknown command {command}; see /help", file=sys.stderr)
                else:
                    with _ctrl_c(chat.stop):
                        _show(chat.stream(line, waiting or None, **options))
                    waiting.clear()
                    if chat.stats and chat.stats.finish_reason == "cancelled":
                        print("(stopped 已停止)", file=sys.stderr)
                    if args.stats:
                        _print_stats(chat)
            except SeechatError as e:  # the conversation goes on
                if args.debug:
                    raise
                print(f"seechat: {e}", file=sys.stderr)
    return 0


def _info(args: argparse.Namespace) -> int:
    from seechat_lite.memory import available_memory, human, plan
    from seechat_weights.builtin import BUILTIN
    from seechat_weights.bundle import read_manifest, verify_hashes

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
    rows = [
        ("name", manifest.name),
        ("folder", f"{folder} ({human(size)}, {len(manifest.files)} files, all hashes right)"),
        ("language model", f"{lm.num_layers} layers, hidden {lm.hidden_size}, {lm.vocab_size} ids"),
        ("precision", f"{decoder.precision}{blocks}"),
        ("conversation", manifest.conversation),
        ("vision", "none"),
        ("memory", str(needed)),
        ("free now", human(available_memory())),
    ]
    if vision:
        side = vision.pixels.image_size
        described = f"{vision.tower} + {vision.bridge}, {vision.precision}, {side}×{side} pixels"
        rows[5] = ("vision", f"{described} to {vision.tokens} tokens")
    if "license" in manifest.provenance:
        rows.append(("license", str(manifest.provenance["license"])))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _load(args: argparse.Namespace) -> "Model":
    from seechat_lite.chat import load

    return load(args.model, engine=args.engine, device=args.device, context=args.context)


def _sampling(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> dict[str, Any]:
    """Options of Chat.stream; a value out of range is wrong usage."""
    from seechat_lite.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    options = {name: getattr(args, name) for name in names}
    try:
        Sampling(**options)
    except SeechatError as e:
        usage_error(str(e))
    if args.max_new_tokens < 1:
        usage_error(f"--max-new-tokens is {args.max_new_tokens}; expected at least 1")
    return {**options, "max_new_tokens": args.max_new_tokens}


def _remember(model: "Model", chat: "Chat", path: str) -> str:
    """Read and encode a picture now, so that what is wrong with it is said now."""
    model.encode_image(path, exact=chat.format.demo)
    return path


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
    terminal = sys.stdout.isatty()
    for piece in pieces:
        print(piece.translate(CONTROL) if terminal else piece, end="", flush=True)
    print()


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(chat: "Chat") -> dict[str, Any]:
    stats = chat.stats
    if stats is None:
        return {}
    return dataclasses.asdict(stats) | {"tokens_per_second": round(stats.tokens_per_second, 2)}


def _print_stats(chat: "Chat") -> None:
    if s := chat.stats:
        print(
            f"prompt {s.prompt_tokens} tokens · first token {s.first_token_seconds:.2f} s · "
            f"{s.new_tokens} tokens in {s.seconds:.2f} s ({s.tokens_per_second:.1f}/s) · "
            f"{s.finish_reason}",
            file=sys.stderr,
        )
