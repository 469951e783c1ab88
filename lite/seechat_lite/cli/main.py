"""Finds and runs the command, and reports its errors. Answers go to stdout, the rest to stderr.

Exit codes: 0 done, 1 failed (one readable line says why), 2 wrong usage, 130 Ctrl-C, 141 nobody
reads the output. A command is a module with `add_command`. That function adds the command's parser
to the subparsers it is given and sets `run`, which is called with the parsed arguments. Commands of
other packages are found as entry points of the group `seechat.commands`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points, version

from seechat_lite.cli.terminal import (
    Parser,
    PlainHandler,
    complain,
    forget_unwritable_output,
    prepare_streams,
    show_traceback,
    tell_what_was_lost,
)
from seechat_lite.interrupts import EXIT_CODE, OUTPUT_GONE

COMMANDS = {
    "ask": "seechat_lite.cli.ask",
    "caption": "seechat_lite.cli.caption",
    "chat": "seechat_lite.cli.chat",
    "info": "seechat_lite.cli.info",
    "bench": "seechat_lite.cli.bench",
    "pipe": "seechat_lite.cli.pipe",
    "serve": "seechat_lite.cli.serve",
    "eval": "seechat_lite.cli.eval",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse exits by itself with 2).

    argv: the arguments; None for those of this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    prepare_streams()
    args = None
    try:
        args = _parse(argv)
        level = logging.INFO if args.verbose else logging.WARNING
        logging.basicConfig(handlers=[PlainHandler()], level=level)
        code = args.run(args) or 0
        sys.stdout.flush()
        tell_what_was_lost()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:  # the reader of our output has gone, so there is nobody to tell
        return OUTPUT_GONE
    except Exception as e:
        if args and args.debug:
            show_traceback()
        else:
            complain(e, vars(args) if args else ())
        return 1
    finally:
        forget_unwritable_output()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser(argv)
    if not argv:  # somebody wants to know what there is
        parser.print_help(sys.stderr)
        parser.exit(2)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "ask" and not any(r.startswith("-") for r in rest):
        # argparse stops taking words at the first option between them
        *args.images, args.question = *args.images, args.question, *rest
    elif rest and args.command == "caption" and not any(r.startswith("-") for r in rest):
        args.places += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that `argv` begins with; of all commands if it begins with none."""
    common = Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser = Parser(
        prog="seechat",
        description="Ask about pictures, in Chinese or English · 看图对话",
        epilog='Begin with: seechat ask cat.jpg "What is this?"',
    )
    parser.add_argument(
        "-V", "--version", action="version", version=f"seechat-lite {version('seechat-lite')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    meant = {argv[0]} if argv and argv[0] in COMMANDS else set(COMMANDS)
    for name in (name for name in COMMANDS if name in meant):
        import_module(COMMANDS[name]).add_command(commands, common)
    if len(meant) > 1:  # looking for other packages' commands takes time
        for entry in entry_points(group="seechat.commands"):
            if entry.name not in COMMANDS:  # other packages cannot take our names
                entry.load()(commands, common)
    return parser
