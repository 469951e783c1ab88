"""Run in a process of its own: reads the files it is given, tells how each ends and what it took.

usage: hostile.py KIND FILE ...; the first file is sound and sets the baseline of the memory.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from seechat_lite.images import load_image, pixels
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.config import PixelSpec
from seechat_weights.files.checkpoint import open_checkpoint, read_json
from seechat_weights.identify import identify


def read_checkpoint(path: Path) -> None:
    """Look, open, and read every tensor."""
    identify(path)
    checkpoint = open_checkpoint(path)
    for key in checkpoint.shapes:
        checkpoint.read(key)


def read_text(path: Path) -> None:
    if path.name == "seechat.json":
        Manifest.from_json(path.read_text("utf-8"), str(path))
    elif path.is_dir():
        open_checkpoint(path)
    else:
        read_json(path)


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(path)
    tokenizer.decode(tokenizer.encode("你好 hello [gMASK] \n\t   123"))


def read_picture(path: Path) -> None:
    pixels(load_image(path).image, PixelSpec(image_size=16))


READ: dict[str, Callable[[Path], None]] = {
    "checkpoint": read_checkpoint,
    "json": read_text,
    "tokenizer": read_tokenizer,
    "picture": read_picture,
}


def peak() -> int:
    """The most memory this process ever held, in bytes."""
    if sys.platform == "linux":  # whose ru_maxrss begins with that of the parent process
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(kind: str, *files: str) -> None:
    read = READ[kind]
    read(Path(files[0]))
    baseline, ends = peak(), {}
    for file in files[1:]:
        try:
            read(Path(file))
        except Exception as e:
            parents = [c.__name__ for c in type(e).__mro__]
            ends[file] = {"is": parents, "says": str(e), "took": peak() - baseline}
        else:
            ends[file] = {"is": [], "says": "was read", "took": peak() - baseline}
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
