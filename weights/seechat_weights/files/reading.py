"""Reads small files that nobody has vouched for.

A file that is missing, too large or malformed is refused before anything is built from it.
"""

import codecs
import json
import os
from pathlib import Path
from typing import Any

from seechat_weights.arguments import check_type
from seechat_weights.errors import CheckpointError
from seechat_weights.files.untrusted import open_file, read_file
from seechat_weights.plain_text import one_line

LFS_POINTER = b"version https://git-lfs"
MAX_JSON = 8 << 20  # bytes; the largest published index has 40 kB


def local_path(given: str | Path) -> Path:
    """A path as people write it: `~` is their home, unless a file here is called so.

    given: the path.

    Raises OptionError if it is not a path.
    """
    check_type("path", given, str | os.PathLike, "the path of a file or folder")
    path = Path(given)
    if not str(given).startswith("~") or os.path.lexists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user
        return path


def first_bytes(path: Path, count: int = len(LFS_POINTER)) -> bytes:
    """The first bytes of a regular file that is not empty.

    path: the file.
    count: how many bytes.

    Raises CheckpointError: the file is missing, a folder, a device, a pipe, a loop of links, empty,
    or a Git LFS pointer.
    """
    try:
        with open_file(path) as f:
            head = f.read(max(count, len(LFS_POINTER)))
    except OSError as e:
        raise unreadable(path, e) from None
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file itself; expected the real file: "
            "run `git lfs pull` or download it from the model page"
        )
    if not head:
        raise CheckpointError(f"{path}: empty; expected a checkpoint file: download it again")
    return head[:count]


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read.

    path: the file.
    error: why.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or line(error)
    return CheckpointError(
        f"{path}: cannot be read ({reason}); expected a checkpoint file or folder: check the path"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON object (config or index). Raises CheckpointError.

    path: the file, of MAX_JSON bytes at most.
    """
    first_bytes(path)
    try:
        text = read_file(path, limit=MAX_JSON)
    except OSError as e:
        raise unreadable(path, e) from None
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; repeated names, NaN and infinities are refused.

    text: the JSON.
    where: the file's name, for errors.
    """
    try:
        data = json.loads(decoded(text), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{where}: not valid JSON ({line(e)}); expected an object: download the file again"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{where}: holds a JSON {type(data).__name__}; expected an object: "
            "download the file again"
        )
    return data


def decoded(text: bytes) -> str:
    """Decode UTF-8, with or without the byte order mark that Windows' editors write.

    text: the bytes.

    Raises ValueError, which names UTF-16 if that is what they are.
    """
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in text[:4]:
        raise ValueError("it is in UTF-16 or UTF-32, save it as UTF-8")
    return text.decode("utf-8-sig")


def line(error: Exception) -> str:
    """The first line of an error, short and printable."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0][:160])


def shown(name: object) -> str:
    """A name from a file, as a message may show it: one short line that commands no terminal."""
    text = one_line(name[:200]) if isinstance(name, str) else ascii(name)
    return text if len(text) <= 100 else text[:100] + "…"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"{shown(name)} is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
