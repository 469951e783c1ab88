"""The command `seechat caption`: a line of JSON for every picture of files, folders, archives."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

from seechat_lite.cli.hints import told
from seechat_lite.cli.options import (
    UsageError,
    add_answer_options,
    answer_options,
    check_text,
    load_model,
    load_options,
)
from seechat_lite.cli.progress import Progress
from seechat_lite.cli.terminal import print_json
from seechat_lite.interrupts import last_words
from seechat_lite.text_lines import LineError, text_lines
from seechat_weights.errors import ImageError
from seechat_weights.plain_text import json_line

if TYPE_CHECKING:
    from seechat_lite.captions.known import Known
    from seechat_lite.captions.lines import CaptionFile
    from seechat_lite.captions.run import Caption, Item

MAX_PATH = 1 << 16  # bytes of a line of a list
STDIN = "-"


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `caption` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "caption",
        parents=[common],
        usage="%(prog)s PLACE ... [-o FILE] [options]",
        help="describe many pictures: a line of JSON for each",
        description="Describe many pictures: a line of JSON for each. docs/captions.md says more.",
    )
    add = parser.add_argument
    add(
        "places",
        nargs="*",
        default=[],
        metavar="PLACE",
        help="a picture, a folder of pictures, a tar archive (webdataset), a Parquet file or a "
        "pattern; - reads paths from stdin, one a line",
    )
    add(
        "-o",
        "--output",
        metavar="FILE",
        help="the file for the lines; what it has already is not done again; default: stdout",
    )
    asking = parser.add_mutually_exclusive_group()
    asking.add_argument("--prompt", metavar="TEXT", help="what is asked about each picture")
    asking.add_argument(
        "--language", choices=("zh", "en"), default="zh", help="of a description (%(default)s)"
    )
    add(
        "--shard",
        metavar="I/N",
        help="only part I of N, from 1/N to N/N; which pictures these are depends on their content "
        "alone",
    )
    add(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="pictures that are in work at once (%(default)s)",
    )
    add("--column", metavar="NAME", help="the column of Parquet files that holds pictures")
    add(
        "--retry-errors",
        action="store_true",
        help="try pictures again whose lines in the file are errors",
    )
    add("-0", "--null", action="store_true", help="paths on stdin end with a zero byte, not a line")
    add_answer_options(parser, stats="print on stderr how many pictures and seconds it took")
    parser.set_defaults(run=lambda args: _caption(args, parser.error))


def _caption(args: argparse.Namespace, usage_error: UsageError) -> int:
    from seechat_lite.captions.known import Known
    from seechat_lite.captions.lines import CaptionFile
    from seechat_lite.captions.places import pictures
    from seechat_lite.captions.run import captioned, question

    keep = _check(args, usage_error)
    generation = answer_options(args, usage_error)
    options = load_options(args, usage_error) | {"image_cache": 0}  # each picture is seen once
    with ExitStack() as stack:
        known = stack.enter_context(Known())
        file = None
        if args.output is not None:  # before the model, which takes time
            file = CaptionFile(args.output, known=known, retry=args.retry_errors)
            stack.enter_context(file)
        model = stack.enter_context(load_model(args, options))
        if file:
            file.check_model(model.manifest.name)
            if args.retry_errors:
                file.remove_errors()
        visible = file is not None or not sys.stdout.isatty()
        progress = Progress("pictures", partial(_count, args), visible=visible)
        wanted = _Wanted(pictures(_places(args), column=args.column), known, progress)
        name = args.format or model.manifest.conversation
        captions = captioned(
            model,
            wanted,
            question=question(args.prompt, name, args.language),
            format=name,
            generation=generation,
            batch=args.batch,
            known=known,
            keep=keep,
        )
        if file:
            stack.enter_context(last_words(partial(_ended, progress)))
        with progress, closing(captions):
            for caption in captions:
                _write(_line(caption, model.manifest.name, args), file)
                progress.step(failed=caption.error is not None)
    if not wanted.found:
        raise ImageError(
            f"{', '.join(args.places)[:200]}: no pictures; expected files that are named like "
            "pictures: check the place"
        )
    if args.stats or progress.visible:
        print(progress.summary(), file=sys.stderr)
    errors = progress.errors + (file.errors if file else 0)
    if errors:
        print(f"seechat: {errors} without a caption: their lines say why", file=sys.stderr)
    return 1 if errors else 0


def _ended(progress: Progress) -> str:
    return f"ended after {progress.done:,} pictures; the same command goes on with the others"


def _check(args: argparse.Namespace, usage_error: UsageError) -> Callable[[str], bool] | None:
    """Check our own options; returns what chooses the shard's pictures, if there is one."""
    from seechat_lite.captions.run import EXPECTED_BATCH, MAX_BATCH, shard

    if not args.places:
        usage_error("no pictures are named; expected files, folders or archives, or - for a list")
    if STDIN in args.places and (sys.stdin is None or sys.stdin.isatty()):
        usage_error("stdin is no list; expected paths, one a line: … - < list.txt")
    if args.prompt is not None:
        check_text("--prompt", args.prompt, usage_error)
    if not 1 <= args.batch <= MAX_BATCH:
        usage_error(f"--batch is {args.batch}; expected {EXPECTED_BATCH}")
    if args.retry_errors and args.output is None:
        usage_error("--retry-errors goes with -o FILE, whose errors they are")
    if args.shard is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", args.shard, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        usage_error(f"--shard is {args.shard}; expected I/N, such as 1/4 for the first of four")
    return shard(int(found[1]), int(found[2]))


class _Wanted:
    """Those pictures that have no line yet.

    found: how many there were, with those that have one.
    """

    def __init__(self, items: "Iterable[Item]", known: "Known", progress: Progress) -> None:
        self._items, self._known, self._progress = items, known, progress
        self.found = 0

    def __iter__(self) -> "Iterator[Item]":
        for item in self._items:
            self.found += 1
            if self._known.first(item.image):
                yield item
            else:
                self._progress.step(skipped=True)


def _places(args: argparse.Namespace) -> Iterator[str]:
    """The places on the command line, and those on stdin as they come."""
    for place in args.places:
        if place == STDIN:
            yield from _listed(b"\0" if args.null else b"\n")
        else:
            yield place


def _listed(end: bytes) -> Iterator[str]:
    lines = text_lines(_Stdin(), most=MAX_PATH, end=end, paths=True)
    for number, line in enumerate(lines, 1):
        if isinstance(line, LineError):
            yield _unreadable(number, line)
        elif line:
            yield line


def _unreadable(number: int, e: LineError) -> str:
    from seechat_lite.captions.places import Unreadable

    return Unreadable(f"stdin:{number}", ImageError(f"line {number} of the list: {e}"))


class _Stdin:
    """Reads what there is, without a lock that this process would wait for when it ends."""

    def read1(self, size: int, /) -> bytes:
        return os.read(sys.stdin.fileno(), size)


def _count(args: argparse.Namespace, stopped: Callable[[], bool]) -> int | None:
    """About how many pictures there will be, if that is quickly known."""
    if STDIN in args.places:
        return None
    from seechat_lite.captions.places import count

    total = count(args.places, stopped=stopped)
    return total and total // int(args.shard.partition("/")[2] if args.shard else 1)


def _line(caption: "Caption", model: str, args: argparse.Namespace) -> dict[str, Any]:
    if caption.error is not None:
        return {"image": caption.image, "error": told(caption.error, vars(args))}
    return {
        "image": caption.image,
        "sha256": caption.sha256,
        "caption": caption.text,
        "model": model,
        "seconds": round(caption.seconds, 3),
        "finish_reason": caption.finish_reason,
    }


def _write(line: dict[str, Any], file: "CaptionFile | None") -> None:
    if file:
        file.write(json_line(line))
    else:
        print_json(line)
        sys.stdout.flush()
