"""The command `seechat eval`: compares what methods wrote."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from seechat_lite.cli.options import UsageError
from seechat_lite.cli.progress import Progress
from seechat_lite.cli.terminal import print_json, width
from seechat_weights.errors import SeechatError
from seechat_weights.files.reading import shown
from seechat_weights.plain_text import json_line, one_line

if TYPE_CHECKING:
    from seechat_lite.scoring.comparison import Comparison, Scored
    from seechat_weights.scorer.manifest import ScorerManifest


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `eval` to the subparsers of `seechat`; `common` holds the options of all commands."""
    parser = commands.add_parser("eval", help="compare what methods wrote")
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="KIND", help="what is compared"
    )
    caption = kinds.add_parser(
        "caption",
        parents=[common],
        usage="%(prog)s --images PLACE … --captions NAME=FILE … --scorer DIR [options]",
        help="which method's captions describe pictures best",
        description="Score the captions of several methods with Chinese-CLIP. A picture is won by "
        "the method with the highest score, and it counts only if all methods have a caption of "
        "it. Files of captions are JSON lines, as `seechat caption` writes them, one JSON object "
        "of pictures and captions, or lines of picture, tab, caption.",
    )
    add = caption.add_argument
    add(
        "--images",
        nargs="+",
        required=True,
        metavar="PLACE",
        help="pictures, folders, archives, Parquet files, patterns, or a text file with such a "
        "place a line",
    )
    add("--column", metavar="NAME", help="the column of Parquet files that holds pictures")
    add(
        "--captions",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=FILE",
        help="what a method wrote; may be repeated",
    )
    add(
        "--scorer",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `seechat export --scorer` made of Chinese-CLIP",
    )
    add("--json", action="store_true", help="print one JSON object: docs/captions.md")
    add("--scores", type=Path, metavar="FILE", help="write the scores of every picture, JSON lines")
    add("--chart", type=Path, metavar="FILE", help="draw the shares, as SVG")
    add("--page", type=Path, metavar="FILE", help="write an HTML page of pictures and captions")
    add("--shown", type=int, default=200, metavar="N", help="pictures on --page (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (%(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="pictures at once (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, dml, … (auto)")
    add("--threads", type=int, default=0, metavar="N", help="of the CPU; 0: one a core (0)")
    caption.set_defaults(run=lambda args: _caption(args, caption.error))


def _caption(args: argparse.Namespace, usage_error: UsageError) -> int:
    from seechat_lite.cli.hints import as_usage
    from seechat_lite.engines.base import MAX_THREADS
    from seechat_lite.scoring.captions import CaptionFile
    from seechat_lite.scoring.chart import chart
    from seechat_lite.scoring.comparison import check_options, compare
    from seechat_lite.scoring.page import page
    from seechat_lite.scoring.pictures import candidates, count
    from seechat_lite.scoring.scorer import Scorer
    from seechat_weights.errors import OptionError

    try:
        check_options(batch=args.batch, shown=args.shown, seed=args.seed)
    except OptionError as e:
        usage_error(as_usage(e))
    if not 0 <= args.threads <= MAX_THREADS:
        usage_error(f"--threads is {args.threads}; expected 0 to {MAX_THREADS}")
    named = _named(args.captions, usage_error)
    for path in filter(None, (args.scores, args.chart, args.page)):
        if path.exists() or path.is_symlink():
            usage_error(f"{path}: exists already; expected a new file: remove it or name another")
    files = [CaptionFile(name, path) for name, path in named.items()]
    with ExitStack() as stack:
        scorer = stack.enter_context(Scorer(args.scorer, device=args.device, threads=args.threads))
        tell = stack.enter_context(_Scores(args.scores, list(named))).tell if args.scores else None
        progress = stack.enter_context(Progress("pictures", partial(count, args.images)))
        result = compare(
            scorer,
            candidates(args.images, column=args.column),
            files,
            batch=args.batch,
            shown=args.shown if args.page else 0,
            seed=args.seed,
            progress=progress.step,
            **({"tell": tell} if tell else {}),
        )
        manifest = scorer.manifest
    for note in _notes(result):
        print(one_line(f"seechat: {note}"), file=sys.stderr)
    if result.table is None:
        raise SeechatError(
            f"none of {result.pictures} pictures has a caption by every method; expected some: "
            "check that the files of captions are about these pictures"
        )
    if args.chart:
        shares = dict(zip(named, result.table.wins.tolist(), strict=True))
        _write(args.chart, chart(shares, result.table.pictures))
    if args.page:
        _write(args.page, page(result, scorer=manifest.name))
    if args.json:
        print_json(_report(result, manifest))
    else:
        _print(result, manifest)
    return 0


def _named(given: Sequence[str], usage_error: UsageError) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        name = name.strip()
        if not equals or not name or not path or len(name) > 60 or not name.isprintable():
            usage_error(f"--captions {text[:200]}; expected NAME=FILE, with a short name")
        if name in named:
            usage_error(f"--captions: {name} is there twice; expected each method once")
        named[name] = Path(path)
    return named


def _notes(result: "Comparison") -> Iterator[str]:
    """What is to be said of pictures and captions that did not count."""
    for method in result.methods:
        if method.missing:
            errors = f" ({_number(method.failed, 'error')} in its file)" if method.failed else ""
            yield f"{method.name} has no caption of {_number(method.missing, 'picture')}{errors}"
        if method.unused:
            such = f", such as {shown(method.unused_name)}" if method.unused_name else ""
            yield f"{method.name} has {_number(method.unused, 'caption')} of other pictures{such}"
        if method.empty:
            yield f"{method.name} has {_number(method.empty, 'empty caption')}, counted like others"
    if result.incomplete:
        yield (
            f"{result.incomplete} of {result.pictures} pictures are left out, because not every "
            "method has a caption of them"
        )
    if result.unreadable:
        first = result.reasons[0]
        yield f"{result.unreadable} of {result.pictures} pictures cannot be read: {first}"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _print(result: "Comparison", scorer: "ScorerManifest") -> None:
    from seechat_lite.scoring import published

    table = result.table
    assert table is not None
    names = [method.name for method in result.methods]
    rows = [["", "wins %", "95 %", "100·cosine", "95 %", "cut %"]]
    for i, method in enumerate(result.methods):
        wins, means = 100 * table.wins_between[:, i], 100 * table.means_between[:, i]
        rows.append([
            method.name,
            f"{100 * table.wins[i]:.1f}",
            f"{wins[0]:.1f} to {wins[1]:.1f}",
            f"{100 * table.means[i]:.2f}",
            f"{means[0]:.2f} to {means[1]:.2f}",
            f"{100 * method.cut / table.pictures:.1f}",
        ])  # fmt: skip
    print(f"{_number(table.pictures, 'picture')}, judged by {one_line(scorer.name)}\n")
    _columns(rows)
    if len(names) > 1:
        print("\nhow often, in %, the method on the left beats the one above (95 %)\n")
        pairs = [["", *names]]
        for i, name in enumerate(names):
            cells = [
                "" if i == j
                else f"{100 * table.pairs[i, j]:.1f} "
                f"({100 * table.pairs_between[0, i, j]:.0f} to "
                f"{100 * table.pairs_between[1, i, j]:.0f})"
                for j in range(len(names))
            ]  # fmt: skip
            pairs.append([name, *cells])
        _columns(pairs)
    shares = ", ".join(f"{name} {share}" for name, share in published.SHARES.items())
    print(
        f"\npublished by SEEChat's authors, {published.PICTURES} other pictures, standard error "
        f"{published.STANDARD_ERROR}: {shares} %"
    )


def _columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first to the left; Chinese characters are two columns wide."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first + " " * (widths[0] - width(first))]
        cells += [" " * (w - width(c)) + c for w, c in zip(widths[1:], others, strict=True)]
        print("  ".join(cells).rstrip())


def _report(result: "Comparison", scorer: "ScorerManifest") -> dict[str, Any]:
    from seechat_lite.scoring import published

    table = result.table
    assert table is not None
    names = [method.name for method in result.methods]
    methods = []
    for i, method in enumerate(result.methods):
        methods.append(
            dataclasses.asdict(method)
            | {
                "wins": float(table.wins[i]),
                "wins_95": table.wins_between[:, i].tolist(),
                "cosine": float(table.means[i]),
                "cosine_95": table.means_between[:, i].tolist(),
                "cut_share": method.cut / table.pictures,
            }
        )
    pairs = {
        a: {
            b: {
                "wins": float(table.pairs[i, j]),
                "wins_95": table.pairs_between[:, i, j].tolist(),
            }
            for j, b in enumerate(names)
            if i != j
        }
        for i, a in enumerate(names)
    }
    return {
        "scorer": {"name": scorer.name, "size": scorer.size, "precision": scorer.precision},
        "pictures": {
            "given": result.pictures,
            "compared": table.pictures,
            "incomplete": result.incomplete,
            "unreadable": result.unreadable,
            "reasons": result.reasons,
        },
        "methods": methods,
        "pairs": pairs,
        "bootstrap": {"samples": table.samples, "seed": table.seed},
        "published": {
            "shares": {name: share / 100 for name, share in published.SHARES.items()},
            "pictures": published.PICTURES,
            "standard_error": published.STANDARD_ERROR / 100,
            "source": published.SOURCE,
        },
    }


class _Scores:
    """Writes the scores of every picture as JSON lines."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, names
        self._file: IO[str] | None = None

    def __enter__(self) -> "_Scores":
        self._file = _new(self._path)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def tell(self, scored: "Scored") -> None:
        """Write a line."""
        assert self._file
        cosines = dict(zip(self._names, scored.scores, strict=True))
        line = {"image": scored.name, "sha256": scored.content, "cosine": cosines}
        self._file.write(json_line(line) + "\n")


def _new(path: Path) -> IO[str]:
    """A new file to write text to. Raises OSError if there is one already."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    return os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8", newline="\n")


def _write(path: Path, text: str) -> None:
    with _new(path) as file:
        file.write(text)
