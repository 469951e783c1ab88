"""Finds pictures: in files, folders, patterns, archives and tables.

Of a folder or an archive, only files that are named like pictures are taken, and no hidden ones.
What is named itself is always taken: it is a picture, or its line says why not.
"""

import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Self

from seechat_lite.captions import archive, table
from seechat_lite.captions.run import Item, failed
from seechat_lite.pictures.formats import is_picture_name
from seechat_weights.errors import ImageError


def pictures(places: Iterable[str], *, column: str | None = None) -> Iterator[Item]:
    """Yield the pictures in places, as they are found.

    places: paths of pictures, folders, tar archives and Parquet files; patterns such as *.jpg.
    column: the column of Parquet files that holds pictures; None to find it.

    Raises EngineError for a Parquet file if pyarrow is not installed.
    """
    for path in files(places):
        if isinstance(path, Unreadable):
            yield failed(str(path), path.error)
        elif archive.is_one(path):
            yield from archive.members(path)
        elif table.is_one(path):
            yield from table.rows(path, column=column)
        else:
            yield Item(path, partial(str, path))


def count(places: Iterable[str], *, stopped: Callable[[], bool]) -> int | None:
    """How many pictures there are in places; None if that is not quickly known.

    places: as for pictures().
    stopped: asked at every file; True ends the count.
    """
    total = 0
    for path in files(places):
        if stopped() or archive.is_one(path):
            return None
        found = table.count(path) if table.is_one(path) else 1
        if found is None:
            return None
        total += found
    return total


class Unreadable(str):
    """A path that cannot be read, with the reason."""

    __slots__ = ("error",)

    def __new__(cls, path: str, error: ImageError) -> Self:
        self = super().__new__(cls, path)
        self.error = error
        return self


def files(places: Iterable[str]) -> Iterator[str]:
    """Yield the paths of all files in places, and Unreadable ones.

    places: as for pictures().
    """
    for place in places:
        if isinstance(place, Unreadable):
            yield place
        elif not _exists(place) and glob.has_magic(place):
            yield from _matching(place)
        else:
            yield from _at(place)


def _exists(place: str) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError):  # too long for a name, or a null character
        return False


def _at(path: str) -> Iterator[str]:
    try:
        folder = _folder(path)
    except (OSError, ValueError):  # reading the picture will say what is wrong
        folder = None
    if folder:
        yield from _below(path, folder)
    else:
        yield path


def _folder(path: str) -> tuple[int, int] | None:
    """The device and number of a folder; None for what is none. Raises OSError, ValueError."""
    found = os.stat(path)  # noqa: PTH116  a Path would write it anew
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


def _below(top: str, first: tuple[int, int]) -> Iterator[str]:
    """The files below a folder that may hold pictures, by name; each folder is entered once."""
    seen, todo = {first}, [top]
    while todo:
        folder = todo.pop()
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if entry.name[:1] != ".")
        except OSError as e:
            yield Unreadable(
                folder,
                ImageError(
                    f"{folder}: cannot be read ({e.strerror}); expected a folder of pictures: "
                    "check it"
                ),
            )
            continue
        inner: list[str] = []
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118  as above
            try:
                found = _folder(path)
            except OSError:  # a link to nothing; its name says whether a picture was meant
                found = None
            if found is None:
                if is_picture_name(name) or archive.is_one(name) or table.is_one(name):
                    yield path
            elif found not in seen:
                seen.add(found)
                inner.append(path)
        todo += reversed(inner)


_HIDDEN = re.compile(r"(?:^|[\\/])\.[^./\\]")  # a part of a path that begins with a point


def _matching(pattern: str) -> Iterator[str]:
    """The files that a pattern matches; the pattern itself if there are none."""
    anchor = Path(pattern).anchor
    hidden, matched = _HIDDEN.search(pattern), False
    try:  # pathlib's ** does not follow links, so it ends
        paths = sorted(map(str, Path(anchor).glob(pattern[len(anchor) :])))
    except (OSError, ValueError, NotImplementedError):
        paths = []
    for path in paths:
        if hidden or not _HIDDEN.search(path):
            matched = True
            yield from _at(path)
    if not matched:
        yield pattern
