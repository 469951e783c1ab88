"""Finds the pictures of a comparison: places as `caption` takes them, and lists of these."""

import codecs
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from seechat_lite.captions import archive, places, table
from seechat_lite.pictures.formats import HEAD, identify
from seechat_lite.scoring.captions import MAX_LINE, Reader, names_of
from seechat_lite.scoring.comparison import Candidate
from seechat_lite.text_lines import LineError, text_lines
from seechat_weights.errors import ImageError, OptionError
from seechat_weights.files.reading import local_path, shown
from seechat_weights.files.untrusted import open_file

_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1f]")


def candidates(
    given: Iterable[str | os.PathLike[str]], *, column: str | None = None
) -> Iterator[Candidate]:
    """Yield the pictures in some places.

    given: places as places.pictures() takes them; and lists: text files with a place a line, from
        the working directory or from the list's own, or JSON lines with the place as `image`, as
        files of captions are.
    column: the column of Parquet files that holds pictures; None to find it.

    Raises OptionError for a place that is nothing of this, EngineError for a Parquet file if
    pyarrow is not installed.
    """
    for place in _unlisted(given):
        for item in places.pictures([place], column=column):
            name = str(item.image)
            yield Candidate(name, names_of(name), item.take)


def count(given: Iterable[str | os.PathLike[str]], stopped: Callable[[], bool]) -> int | None:
    """How many pictures there are in places; None if that is not quickly known.

    given: as candidates() takes them.
    stopped: asked at every file; True ends the count.
    """
    try:
        return places.count(_unlisted(given), stopped=stopped)
    except OptionError:  # the one who reads them says so
        return None


def _unlisted(given: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The places, those in lists one by one."""
    for text in given:
        path = local_path(os.fspath(text))
        place = str(path)
        inside = archive.is_one(place) or table.is_one(place)
        if path.is_dir() or inside or (glob.has_magic(place) and not path.exists()):
            yield place
        elif _is_list(path):
            yield from _listed(path)
        else:
            yield place


def _is_list(path: Path) -> bool:
    try:
        with open_file(path) as file:
            head = file.read(HEAD)
    except OSError as e:
        raise OptionError(
            f"{shown(str(path))}: cannot be read ({e.strerror or e}); expected pictures, a folder "
            "of them, or a list of paths: check the path"
        ) from None
    try:
        identify(head)
    except ImageError:
        wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return bool(head) and (wide or not _NO_TEXT.search(head))
    return False


def _listed(path: Path) -> Iterator[str]:
    with open_file(path) as file:
        for number, line in enumerate(text_lines(Reader(file), most=MAX_LINE, paths=True), 1):
            if isinstance(line, LineError):
                raise OptionError(
                    f"{shown(str(path))}: line {number}: {line}; expected the path of a picture: "
                    "is it a list?"
                )
            if name := _name(line.strip()):
                beside = path.parent / name
                here = os.path.exists(name)  # noqa: PTH110  a Path would write it anew
                yield str(beside) if not here and beside.exists() else name


def _name(line: str) -> str:
    if line.startswith("{"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return line
        image = found.get("image") if isinstance(found, dict) else None
        return image if isinstance(image, str) else line
    return line
