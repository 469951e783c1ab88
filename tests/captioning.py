"""A model for tests of captions: it says at once which picture it saw, and can break."""

import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from seechat_lite.captions.known import Known
from seechat_lite.captions.run import Caption, Item, captioned
from seechat_lite.chat import Answer, Stats
from seechat_lite.generation import Generation
from seechat_lite.images import Picture, PreparedImage, levels
from seechat_weights.config import PixelSpec

SPEC = PixelSpec(image_size=16)


class TellingModel:
    """Its caption of a picture is made of the question and the picture's content.

    asked: contents of the pictures that it was asked about, in order.
    """

    manifest = SimpleNamespace(name="telling", conversation="seechat", vision=True)
    engine = SimpleNamespace(batches=False)

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        broken: Callable[[int], Exception | None],
        remember: bool = True,
    ) -> None:
        self.asked: list[str] = []
        self._seconds, self._broken, self._remember = seconds, broken, remember

    def prepare_image(
        self, picture: Picture, *, exact: bool, stopped: Callable[[], bool]
    ) -> PreparedImage:
        return PreparedImage(picture.key, SPEC, levels(picture.image, SPEC, stopped=stopped))

    def chat(self, format: str) -> "TellingModel":
        return self

    def ask(self, question: str, picture: PreparedImage, *, generation: Generation) -> Answer:
        if self._remember:
            self.asked.append(picture.key)
        time.sleep(self._seconds)
        if error := self._broken(len(self.asked)):
            raise error
        stats = Stats(1, 1, 0, 0.1, 0.1, "stop")
        return Answer(f"{question} {picture.key[:8]}", stats)

    def __enter__(self) -> "TellingModel":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def never(count: int) -> Exception | None:
    return None


def captions(
    items: Iterable[Item],
    *,
    model: Any = None,
    batch: int = 8,
    keep: Callable[[str], bool] | None = None,
) -> list[Caption]:
    with Known() as known:
        found = captioned(
            model or TellingModel(broken=never),
            items,
            question="?",
            format="seechat",
            generation=Generation(),
            batch=batch,
            known=known,
            keep=keep,
        )
        return list(found)


def png(number: int) -> bytes:
    """A small picture of its own for every number."""
    data = io.BytesIO()
    color = (number % 256, number // 256 % 256, number // 65536)
    Image.new("RGB", (8, 6), color).save(data, "PNG")
    return data.getvalue()


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(png(number))
    return paths


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def main() -> int:
    """`seechat caption` in a process of its own, with this model: it takes no time to load."""
    from seechat_lite.cli import caption
    from seechat_lite.cli import main as cli

    seconds = float(os.environ.get("TELLING_SECONDS", "0"))
    caption.load_model = lambda args, options: TellingModel(seconds=seconds, broken=never)
    return cli.main(["caption", *sys.argv[1:]])


if __name__ == "__main__":
    from seechat_lite.interrupts import leave_on_ctrl_c

    leave_on_ctrl_c()
    sys.exit(main())
