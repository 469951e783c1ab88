"""Looking into files that nobody has vouched for.

What is no file, too large or malformed is refused before anything is made of it.
"""

import json
import stat
from pathlib import Path
from typing import Any

from seechat_weights.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"
MAX_JSON = 8 << 20  # bytes; the largest published index has 40 kB


def first_bytes(path: Path, count: int = len(LFS_POINTER)) -> bytes:
    """The first bytes of a regular file that has any.

    Raises CheckpointError: missing, a folder, device, pipe or loop of links, empty, or a Git LFS
    pointer.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
            raise CheckpointError(f"{path}: a {kind}; expected a checkpoint file: check the path")
        with path.open("rb") as f:
            head = f.read(max(count, len(LFS_POINTER)))
    except (OSError, ValueError) as e:  # ValueError: a null character in the path
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
    reason = (error.strerror if isinstance(error, OSError) else None) or line(error)
    return CheckpointError(
        f"{path}: cannot be read ({reason}); expected a checkpoint file or folder: check the path"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON object (config, index). Raises CheckpointError."""
    first_bytes(path)
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes of JSON; expected less than {MAX_JSON}: "
                "download the file again"
            )
        text = path.read_bytes()
    except OSError as e:
        raise unreadable(path, e) from None
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without repeated names, NaN or infinities; `where` names it in errors."""
    try:
        data = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
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


def line(error: Exception) -> str:
    """An error's first line, short and printable."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0][:160])


def shown(name: object) -> str:
    """A name from a file, for a message: one line, short, nothing that commands a terminal."""
    text = ascii(name) if not isinstance(name, str) else name if name.isprintable() else ascii(name)
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
