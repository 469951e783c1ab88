"""Says why a library could not be imported: missing, broken, or memory was short."""

import re
from typing import TypeVar

from seechat_weights.errors import SeechatError

# what the systems' loaders and Python say; a package's own text may be wrapped around it
_NO_MEMORY = re.compile(
    "failed to map segment|cannot allocate|out of memory|not enough memory|paging file is too small"
    "|MemoryError",
    re.IGNORECASE,
)
Error = TypeVar("Error", bound=SeechatError)


def import_error(kind: type[Error], error: Exception, *, needed: str, install: str) -> Error:
    """The error for a library that cannot be imported.

    kind: the error's class.
    error: what importing it raised: an ImportError, or an OSError of a library that it loads.
    needed: what needs it, as "expected it for the engine 'torch'".
    install: the requirement that brings it, for pip.
    """
    name = _name(error)
    if isinstance(error, ModuleNotFoundError):
        return kind(f"{name} is not installed; {needed}: run pip install {install}")
    if _NO_MEMORY.search(f"{error} {error.__cause__!r}"):
        return kind(
            f"{name} cannot be loaded for lack of memory ({_reason(error)}); {needed}: close other "
            "programs, or allow this process more (a limit of the shell's or the container's)"
        )
    return kind(
        f"{name} is installed and cannot be loaded ({_reason(error)}); {needed}: remove it with "
        f"pip uninstall, then run pip install {install}"
    )


def _name(error: Exception) -> str:
    """The package that failed; a compiled module knows only its own name, and its path."""
    _, installed, inside = (getattr(error, "path", None) or "").rpartition("site-packages")
    if installed:
        return re.split(r"[\\/]", inside)[1]
    return (getattr(error, "name", None) or "a library").partition(".")[0]


def _reason(error: Exception) -> str:
    """The line that says most, of a text that may be a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(filter(_NO_MEMORY.search, lines), lines[0] if lines else "")[:200]
