"""The command `seechat bench`: measures how fast a model is on this machine."""

import argparse
import dataclasses
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from seechat_lite.cli.options import (
    UsageError,
    add_load_options,
    add_model_option,
    load_options,
)
from seechat_lite.cli.progress import duration
from seechat_lite.cli.terminal import print_json, print_table, say
from seechat_weights.bundle.precisions import PRECISIONS
from seechat_weights.errors import SeechatError
from seechat_weights.libraries import import_error
from seechat_weights.plain_text import one_line

# models that can be written with random weights, and their layers
SYNTHETIC = {"chatglm-6b": 28, "llama-7b": 32, "llava-1.5-7b": 32, "minigpt4-7b": 32}
_LINE_SECONDS = 20  # between two lines in a file
LAYOUT = 2  # number of the bundles' layout; synthetic bundles are kept under it


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `bench` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        usage="%(prog)s [--model PATH | --synthetic NAME] [options]",
        help="how fast a model is here, and what memory it takes",
    )
    which = parser.add_mutually_exclusive_group()
    add_model_option(which)
    which.add_argument(
        "--synthetic",
        choices=SYNTHETIC,
        help="a model of this shape with random weights, written once and kept in the cache folder",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="int4",
        help="weights of --synthetic (%(default)s)",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of --synthetic; default: as published"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=3,
        metavar="N",
        help="runs of each measurement, if there is time (3)",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="more lengths of prompts, however long it takes"
    )
    parser.add_argument(
        "--turns", type=int, default=0, metavar="N", help="measure a dialogue of N turns too (0)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_load_options(parser)
    parser.set_defaults(run=lambda args: _bench(args, parser.error))


def _bench(args: argparse.Namespace, usage_error: UsageError) -> int:
    from seechat_lite.benchmark import measure, rows

    options = load_options(args, usage_error)
    if args.repeat < 1:
        usage_error(f"--repeat is {args.repeat}; expected at least 1")

    folder = _synthetic(args) if args.synthetic else args.model
    report = measure(
        folder,
        options=options,
        repeat=args.repeat,
        turns=args.turns,
        thorough=args.thorough,
        say=_Teller().tell,
    )
    say("")
    if args.json:
        print_json(dataclasses.asdict(report))
    else:
        print_table(rows(report))
    return 0


class _Teller:
    """Says how far a measurement is: on one line of a terminal, in a file a line now and then."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def tell(self, stage: str, left: float | None = None) -> None:
        """Say it.

        stage: what is being done.
        left: seconds until the end, if they are known.
        """
        text = stage if left is None else f"{stage} · about {duration(left)} left"
        if sys.stderr.isatty():
            say(text)
        elif time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _synthetic(args: argparse.Namespace) -> Path:
    """The bundle of random weights that the options ask for, from the cache folder."""
    from seechat_lite.cache_folder import cache_folder

    layers = args.layers or SYNTHETIC[args.synthetic]
    folder = cache_folder() / f"{args.synthetic}-{args.precision}-{layers}-v{LAYOUT}"
    if folder.is_dir():
        return folder
    entry = next(iter(entry_points(group="seechat.synthetic", name=args.synthetic)))
    try:
        write = entry.load()
    except (ImportError, OSError) as e:
        needed, install = "--synthetic needs it", '"seechat-lite[export]"'
        raise import_error(SeechatError, e, needed=needed, install=install) from None
    print(one_line(f"writing random weights to {folder}"), file=sys.stderr)
    teller, start = _Teller(), time.monotonic()

    def progress(stage: str, done: int, total: int) -> None:
        took = time.monotonic() - start
        teller.tell(f"{stage} {done / total:.0%}", took * (total - done) / done if done else None)

    write(folder, precision=args.precision, layers=layers, progress=progress)
    return folder
