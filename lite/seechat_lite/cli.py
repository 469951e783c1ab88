"""The command `seechat`. Answers go to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed (one readable line says why), 2 wrong usage, 130 Ctrl-C, 141 nobody
reads the output. Commands of other packages are found as entry points of the group
`seechat.commands`: a function that adds its parser to the subparsers it is given and sets `run`,
called with the parsed arguments.
"""

import argparse
import dataclasses
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_lite.folders import cache_folder
from seechat_lite.generation import DEFAULTS, HELP, Generation
from seechat_lite.interrupts import EXIT_CODE, OUTPUT_GONE
from seechat_lite.options import (
    add_engine_options,
    add_load_options,
    add_memory_options,
    add_model_option,
    check_context,
    check_engine,
    load_options,
    picture_source,
)
from seechat_lite.terminal import (
    Parser,
    PlainFormatter,
    complain,
    forget_unwritable_output,
    prepare_streams,
    print_json,
    print_stats,
    say,
    show,
    show_traceback,
    tell_what_was_lost,
)
from seechat_weights.errors import SeechatError
from seechat_weights.plain_text import one_line
from seechat_weights.precisions import PRECISIONS

if TYPE_CHECKING:
    from seechat_lite.chat import Model, Stats
    from seechat_lite.memory import MemoryPlan

LAYOUT = 2  # of the bundles that an export writes; synthetic ones are kept by it
WORTH_A_PLAN = 1_000_000_000  # bytes a model takes before people are told the sums


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse exits by itself with 2)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    prepare_streams()
    args = None
    try:
        args = _parse(argv)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PlainFormatter())
        logging.basicConfig(
            handlers=[handler], level=logging.INFO if args.verbose else logging.WARNING
        )
        code = args.run(args) or 0
        sys.stdout.flush()
        tell_what_was_lost()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        return OUTPUT_GONE
    except Exception as e:
        if args and args.debug:
            show_traceback()
        else:
            complain(e)
        return 1
    finally:
        forget_unwritable_output()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser(argv)
    if not argv:  # somebody who wants to know what there is
        parser.print_help(sys.stderr)
        parser.exit(2)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "ask" and not any(r.startswith("-") for r in rest):
        args.words += rest  # argparse stops taking words at the first option between them
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    model = Parser(add_help=False)
    add_model_option(model)
    model.add_argument("--stats", action="store_true", help="tokens and times, on stderr")
    add = model.add_argument_group("answering").add_argument
    add("--format", metavar="NAME", help="conversation format; default: the bundle's")
    for name, default in DEFAULTS.items():
        flag, words = f"--{name.replace('_', '-')}", HELP[name]
        if isinstance(default, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=default, help=words)
        elif isinstance(default, tuple):
            add(flag, action="append", default=[], metavar="TEXT", help=words)
        else:
            kind, letter = type(default), name[0].upper()
            add(flag, type=kind, default=default, metavar=letter, help=f"{words} (%(default)g)")
    add_load_options(model)

    parser = Parser(
        prog="seechat", description="Ask about pictures, in Chinese or English · 看图对话"
    )
    parser.add_argument(
        "-V", "--version", action="version", version=f"seechat-lite {version('seechat-lite')}"
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
    ask.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture, as if it came before the question; - is stdin",
    )
    ask.add_argument("--json", action="store_true", help="print one JSON object at the end")
    ask.set_defaults(run=lambda args: _ask(args, ask.error))

    chat = commands.add_parser(
        "chat",
        parents=[model, common],
        usage="%(prog)s [options]",
        help="talk, with /image and /help",
    )
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="begin with a picture"
    )
    chat.set_defaults(run=lambda args: _chat(args, chat.error))

    info = commands.add_parser(
        "info",
        parents=[common],
        usage="%(prog)s [PATH] [options]",
        help="what a bundle or a checkpoint is",
    )
    info.add_argument(
        "model", nargs="?", type=Path, metavar="PATH", help="a bundle, or published weights"
    )
    add_engine_options(info)
    add_memory_options(info)
    info.add_argument("--json", action="store_true", help="print the manifest and the sums")
    info.set_defaults(run=lambda args: _info(args, info.error))

    bench = commands.add_parser(
        "bench",
        parents=[common],
        usage="%(prog)s [--model DIR | --synthetic chatglm-6b] [options]",
        help="how fast a model is here, and what memory it takes",
    )
    which = bench.add_mutually_exclusive_group()
    add_model_option(which)
    which.add_argument(
        "--synthetic",
        choices=("chatglm-6b",),
        help="a model of this shape with random weights, written once and kept in the cache folder",
    )
    bench.add_argument(
        "--precision", choices=PRECISIONS, default="int4", help="of --synthetic (%(default)s)"
    )
    bench.add_argument("--layers", type=int, default=28, metavar="N", help="of --synthetic (28)")
    bench.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each (3)")
    bench.add_argument(
        "--turns", type=int, default=0, metavar="N", help="a dialogue of N turns as well (0)"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    add_load_options(bench)
    bench.set_defaults(run=lambda args: _bench(args, bench.error))

    if not argv or argv[0] not in commands.choices:  # others' commands cost time to look for
        for entry in entry_points(group="seechat.commands"):
            entry.load()(commands, common)
    return parser


def _ask(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    from seechat_lite.conversation import trimmed

    *places, question = args.words
    with suppress(OSError):  # questions make file names of any length
        if Path(question).is_file():
            usage_error(f"{question} is a file; the question comes after the pictures")
    if not trimmed(question):
        usage_error("the question is empty")
    if any("\ud800" <= c <= "\udfff" for c in question):  # what Python makes of undecodable bytes
        usage_error(f"the question has bytes that are no text in {sys.getfilesystemencoding()}")
    options = _options(args, usage_error)
    images = [picture_source(place) for place in (*args.image, *places)]
    with _load(args, load_options(args, usage_error)) as model:
        chat = model.chat(args.format)
        pieces = chat.stream(question, images or None, generation=options)
        if args.json:
            answer = "".join(pieces)
            report = {"answer": answer, "model": model.manifest.name, "stats": _stats(chat.stats)}
            print_json(report)
        else:
            show(pieces)
        if args.stats:
            print_stats(chat.stats)
    return 0


def _chat(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    options = _options(args, usage_error)
    with _load(args, load_options(args, usage_error)) as model:
        from seechat_lite.talk import talk

        chat = model.chat(args.format)
        talk(chat, args.image, options, stats=args.stats, debug=args.debug)
    return 0


def _info(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    from seechat_lite.engines import EngineOptions, engine_class
    from seechat_lite.memory import available_memory, human
    from seechat_lite.source import open_source
    from seechat_weights.bundle import verify_hashes
    from seechat_weights.files import local_path
    from seechat_weights.identify import describe_bundle
    from seechat_weights.model_files import is_bundle
    from seechat_weights.onnx_graph import check_graphs

    check_context(args, usage_error)
    check_engine(args, usage_error)
    path = local_path(args.model) if args.model else None
    if path and not is_bundle(path):
        return _identify(path, as_json=args.json)
    source = open_source(path)
    folder, manifest = source.path, source.manifest
    verify_hashes(folder, manifest)
    check_graphs(folder, manifest)
    options = EngineOptions(device=args.device, keep_vision=args.keep_vision, dtype=args.dtype)
    needed = engine_class(args.engine).plan(source, context=args.context, options=options)
    found, free = describe_bundle(folder, manifest), available_memory()
    if args.json:
        report = vars(found) | {"path": str(folder)} | dataclasses.asdict(manifest)
        report["memory"] = dataclasses.asdict(needed) | {"total": needed.total, "free": free}
        print_json(report)
        return 0
    size = sum(f.bytes for f in manifest.files.values())
    rows: dict[str, str | list[str]] = {
        "what": found.title,
        "path": str(folder),
        **found.facts,
        "files": f"{len(manifest.files)}, {human(size)}, all hashes right",
        "memory": [
            f"{human(needed.total)} at a context of {needed.context} tokens",
            needed.parts,
            f"{human(free)} free now",
        ],
        "start with": str(found.command) if args.model else "seechat chat",
    }
    _print_table(rows)
    return 0


def _identify(path: Path, *, as_json: bool) -> int:
    """Say what published weights are; 1 if nothing can be made of them."""
    from seechat_weights.identify import identify

    found = identify(path)
    if as_json:
        print_json(vars(found) | {"path": str(path)})
        return 0 if found.usable else 1
    rows: dict[str, str | list[str]] = {"what": found.title, "path": str(path), **found.facts}
    if found.missing:
        rows["still needed"] = [f"{name}: {place}" for name, place in found.missing.items()]
    if found.command:
        rows["export with"] = found.command
    if found.run:
        rows["run as it is"] = found.run
    _print_table(rows)
    return 0 if found.usable else 1


def _bench(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    from seechat_lite.bench import measure, rows

    options = load_options(args, usage_error)
    if args.repeat < 1:
        usage_error(f"--repeat is {args.repeat}; expected at least 1")

    folder = _synthetic(args, say) if args.synthetic else args.model
    report = measure(folder, options=options, repeat=args.repeat, turns=args.turns, say=say)
    say("")
    if args.json:
        print_json(dataclasses.asdict(report))
    else:
        _print_table(rows(report))
    return 0


def _synthetic(args: argparse.Namespace, say: Callable[[str], None]) -> Path:
    """The bundle of random weights that --synthetic names, from the cache folder."""
    folder = cache_folder() / f"{args.synthetic}-{args.precision}-{args.layers}-v{LAYOUT}"
    if folder.is_dir():
        return folder
    entry = next(iter(entry_points(group="seechat.synthetic", name=args.synthetic)))
    try:
        write = entry.load()
    except ImportError as e:
        raise SeechatError(
            f'{e.name} is not installed; --synthetic needs it: pip install "seechat-lite[export]"'
        ) from None
    print(one_line(f"writing random weights to {folder}"), file=sys.stderr)
    write(
        folder,
        precision=args.precision,
        layers=args.layers,
        progress=lambda stage, done, total: say(f"{stage} {done / total:.0%}"),
    )
    return folder


def _print_table(rows: Mapping[str, str | list[str]]) -> None:
    """Names and values in two columns; a value's lines are wrapped to the terminal's width."""
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
                break_on_hyphens=False,  # paths and addresses are to be copied
            )
            or [""]
        ]
        print(f"{name:<{width}}" + ("\n" + " " * width).join(lines))


def _load(args: argparse.Namespace, options: dict[str, Any]) -> "Model":
    """Load the model; of a large one, say what it takes, and then how far it is."""
    from seechat_lite.loading import load

    large = False

    def announce(plan: "MemoryPlan") -> None:
        nonlocal large
        if large := plan.total >= WORTH_A_PLAN:
            print(one_line(f"memory: {plan}"), file=sys.stderr)

    def progress(stage: str, done: int, total: int) -> None:
        if large:
            say(f"{stage} {done / max(total, 1):.0%}")

    try:
        return load(args.model, **options, announce=announce, progress=progress)
    finally:
        if large:
            say("")


def _options(args: argparse.Namespace, usage_error: Callable[[str], Any]) -> Generation:
    """What is chosen for an answer; a value that no model would take is wrong usage."""
    from seechat_lite.conversation import FORMATS

    if args.format not in (None, *FORMATS):
        usage_error(f"--format is {args.format}; expected one of {', '.join(FORMATS)}")
    try:
        return Generation(**{name: getattr(args, name) for name in DEFAULTS})
    except SeechatError as e:
        return usage_error(str(e).replace("max_new_tokens", "--max-new-tokens", 1))


def _stats(stats: "Stats | None") -> dict[str, Any]:
    if stats is None:
        return {}
    return dataclasses.asdict(stats) | {"tokens_per_second": round(stats.tokens_per_second, 2)}
