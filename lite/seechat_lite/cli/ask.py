"""The command `seechat ask`: one question, one answer."""

import argparse
import dataclasses
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seechat_lite.cli.hints import quoted
from seechat_lite.cli.options import (
    UsageError,
    add_answer_options,
    answer_options,
    check_text,
    load_model,
    load_options,
    picture_source,
)
from seechat_lite.cli.terminal import print_json, print_stats, show

if TYPE_CHECKING:
    from seechat_lite.chat import Stats


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `ask` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser(
        "ask",
        parents=[common],
        usage="%(prog)s [IMAGE ...] QUESTION [options]",
        help="ask one question, about pictures or without",
    )
    parser.add_argument(
        "images", nargs="*", default=[], metavar="IMAGE", help="a picture's file; - is stdin"
    )
    parser.add_argument(
        "question", metavar="QUESTION", help='in Chinese or English; "" describes the pictures'
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture before those named as IMAGE; may be repeated",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object when the answer is complete"
    )
    add_answer_options(parser)
    parser.set_defaults(run=lambda args: _ask(args, parser.error))


def _ask(args: argparse.Namespace, usage_error: UsageError) -> int:
    from seechat_lite.conversation import trimmed

    places, question = [*args.image, *args.images], args.question
    if _is_file(question):
        asked = [w for w in args.images if not (_is_file(w) or _named_like_a_file(w))]
        pictures = [quoted(w) for w in (*args.images, question) if w not in asked]
        words = [*pictures, quoted(asked[0]) if len(asked) == 1 else "QUESTION"]
        usage_error(
            f"{question} is a file; the question comes after the pictures: "
            f"seechat ask {' '.join(words)}"
        )
    if not trimmed(question) and not places:  # a picture alone is described
        usage_error("the question is empty")
    check_text("the question", question, usage_error)
    options = answer_options(args, usage_error)
    images = [picture_source(place) for place in places]
    with load_model(args, load_options(args, usage_error)) as model:
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


def _is_file(word: str) -> bool:
    with suppress(OSError):  # a question may be too long for a file name
        return Path(word).is_file()
    return False


def _named_like_a_file(word: str) -> bool:
    return bool(re.search(r"\.\w{1,5}$", word))


def _stats(stats: "Stats | None") -> dict[str, Any]:
    if stats is None:
        return {}
    return dataclasses.asdict(stats) | {"tokens_per_second": round(stats.tokens_per_second, 2)}
