"""Reads files of captions: JSON lines as `caption` writes them, JSON, or lines with a tab."""

import json
import ntpath
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seechat_lite.json_structure import too_complex
from seechat_lite.text_lines import LineError, text_lines
from seechat_weights.errors import OptionError
from seechat_weights.files.reading import MAX_JSON, decoded, line, local_path, shown
from seechat_weights.files.untrusted import open_file, read_file

MAX_BYTES = 1 << 30
MAX_LINE = 1 << 20  # bytes
MAX_CAPTIONS = 2_000_000
MAX_TEXT = 20_000  # characters of a caption; it is cut to 50 pieces, which have far fewer
MAX_PARTS = 32  # of a path
_EXPECTED = (
    'captions: JSON lines {"image": …, "caption": …}, one JSON object of pictures and captions, or '
    "lines of picture, tab, caption"
)


class CaptionFile:
    """What one method wrote, by picture.

    A line that has the sha256 of its picture belongs to that content, whatever the file is called
    now. Any other belongs to its path, name, or name without suffix.

    name: of the method.
    path: the file.
    errors: how many pictures it has an error for, in the place of a caption.
    """

    def __init__(self, name: str, path: str | Path) -> None:
        """Read a file.

        name: of the method.
        path: the file.

        Raises OptionError.
        """
        self.name, self.path = name, local_path(path)
        self._by_content: dict[str, str | None] = {}
        self._by_name: dict[str, str | None] = {}
        self._used: dict[str, str] = {}  # what was found -> the picture that it was found for
        self._matched = 0  # captions, not errors, among these
        try:
            for number, image, content, text in _rows(self.path):
                self._add(number, image, content, text)
        except OSError as e:
            raise self._error(f"cannot be read ({e.strerror or e})", "check the path") from None
        if not self._by_content and not self._by_name:
            raise self._error("holds none", "check that it is the right file")
        found = (*self._by_content.values(), *self._by_name.values())
        self.errors = sum(text is None for text in found)

    def __len__(self) -> int:
        return len(self._by_content) + len(self._by_name)

    @property
    def unused(self) -> int:
        """How many captions belong to none of the pictures that were asked for so far."""
        return len(self) - self.errors - self._matched

    @property
    def unused_name(self) -> str:
        """What one of these is called; "" if none has a name."""
        others = (k for k, text in self._by_name.items() if text is not None)
        return next((k for k in others if k not in self._used), "")

    def find(self, names: Sequence[str], content: str) -> str | None:
        """A picture's caption; None if there is none, or an error in its place.

        names: what the picture may be called here, its path first.
        content: its sha256, hexadecimal.

        Raises OptionError if a bare name stands for two pictures.
        """
        if content in self._by_content:
            return self._take(content, content, self._by_content[content])
        key = next((name for name in names if name in self._by_name), None)
        if key is None:
            return None
        return self._take(key, content, self._by_name[key])

    def _take(self, key: str, content: str, text: str | None) -> str | None:
        if key not in self._used:
            self._matched += text is not None
        if self._used.setdefault(key, content) != content:
            raise self._error(
                f"{shown(key)} stands for two pictures", "write paths that tell them apart"
            )
        return text

    def _add(self, number: int, image: str, content: str | None, text: str | None) -> None:
        where = self._by_content if content else self._by_name
        key = content or normal(image)
        if len(self) >= MAX_CAPTIONS:
            raise self._error(f"more than {MAX_CAPTIONS} captions", "compare fewer at once")
        before = where.get(key)
        if before is not None and text is not None and before != text:
            raise self._error(
                f"line {number} is a second caption of {shown(image)}", "leave one of them"
            )
        where[key] = before if text is None else text[:MAX_TEXT]

    def _error(self, found: str, do: str) -> OptionError:
        return OptionError(f"{shown(str(self.path))}: {found}; expected {_EXPECTED}: {do}")


def normal(path: str) -> str:
    """A path as captions of any system are compared.

    path: the path.
    """
    return os.path.normpath(path).replace("\\", "/")


def names_of(path: str) -> list[str]:
    """What a picture may be called in a file of captions, the most exact first.

    These are its path, every end of its whole path, as captions may have been written in any folder
    above, and its name without suffix.

    path: the picture's path.
    """
    whole = normal(os.path.abspath(path))  # noqa: PTH100  resolve() would follow links
    parts = whole.split("/")
    ends = ["/".join(parts[at:]) for at in range(max(1, len(parts) - MAX_PARTS), len(parts))]
    stem = ntpath.splitext(ntpath.basename(path))[0]
    return list(dict.fromkeys([normal(path), whole, *ends, normal(stem)]))


Row = tuple[int, str, str | None, str | None]  # line, picture, its sha256, caption (None: an error)


def _rows(path: Path) -> Iterator[Row]:
    with open_file(path, limit=MAX_BYTES) as file:
        lines = enumerate(text_lines(Reader(file), most=MAX_LINE), 1)
        first = next(
            ((n, text) for n, text in lines if isinstance(text, LineError) or text.strip()), None
        )
        if first is None:
            return
        if isinstance(first[1], str) and first[1].lstrip()[:1] in "{[" and not _is_line(first[1]):
            yield from _of_json(path)
            return
        yield from _of_line(path, *first)
        for number, text in lines:
            if isinstance(text, LineError) or text.strip():
                yield from _of_line(path, number, text)


class Reader:
    """An unbuffered file under the name that text_lines reads by."""

    def __init__(self, file: Any) -> None:
        self.read1 = file.read


def _is_line(text: str) -> bool:
    """Whether the first line of a file is one picture's."""
    found = _json(text)
    return (
        isinstance(found, dict)
        and isinstance(found.get("image"), str)
        and ("caption" in found or "error" in found)
    )


def _of_line(path: Path, number: int, text: str | LineError) -> Iterator[Row]:
    if isinstance(text, LineError):
        raise _bad(path, number, str(text))
    if text.lstrip().startswith("{"):
        yield _row(path, number, _json(text))
        return
    image, tab, caption = text.partition("\t")
    if not tab or not image.strip():
        raise _bad(path, number, "no tab between picture and caption")
    yield number, image.strip(), None, caption.strip()


def _of_json(path: Path) -> Iterator[Row]:
    try:
        text = decoded(read_file(path, limit=MAX_JSON))
    except ValueError as e:
        raise _bad(path, 1, line(e)) from None
    if reason := too_complex(text.encode("utf-8", "replace")):
        raise _bad(path, 1, f"{reason}, or one JSON object a line")
    found = _json(text)
    if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
        yield from ((i, image, None, said) for i, (image, said) in enumerate(found.items(), 1))
    elif isinstance(found, list):
        for number, entry in enumerate(found, 1):
            yield _row(path, number, entry)
    else:
        raise _bad(path, 1, "not valid JSON, a picture twice, or another shape")


def _row(path: Path, number: int, found: Any) -> Row:
    found = found if isinstance(found, dict) else {}
    image, content = found.get("image"), found.get("sha256")
    said = found.get("caption")
    failed = said is None and isinstance(found.get("error"), str)
    if not isinstance(image, str) or not image or not (failed or isinstance(said, str)):
        raise _bad(path, number, "no picture with a caption, or with an error")
    digest = content.lower() if isinstance(content, str) and len(content) == 64 else None
    return number, image, digest, said


def _json(text: str) -> Any:
    if too_complex(text.encode("utf-8", "replace")):
        return None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _bad(path: Path, number: int, found: str) -> OptionError:
    return OptionError(
        f"{shown(str(path))}: line {number}: {found}; expected {_EXPECTED}: mend it or leave it out"
    )
