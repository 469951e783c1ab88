"""Where files are kept that can be made again."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """SEECHAT_CACHE, or the system's place for such files."""
    if folder := os.environ.get("SEECHAT_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seechat-lite"
