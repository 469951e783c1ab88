"""Reads mutated pictures of every format and says how each ended and what it took.

    python bench/fuzz_pictures.py --count 20000 [--seed 0] [--keep FOLDER]

A picture is read or refused with ImageError: any other exception, a worker that broke down, more
than SECONDS or more than MEMORY bytes (this process and its workers together) is a failure. Those
are kept in --keep, and the exit code is 1.
"""

import argparse
import io
import random
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from PIL import Image

from seechat_lite.images import load_image, pixels
from seechat_weights.config import PixelSpec
from seechat_weights.errors import ImageError

SECONDS = 10.0
MEMORY = 500_000_000  # bytes, of which a program that loads a picture holds some already
PROGRAM = 60_000_000  # bytes: what this one holds when it is run by itself
SPEC = PixelSpec(image_size=32)
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seeds() -> dict[str, bytes]:
    """One sound file, or some, of each format that is read."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    colour = Image.fromarray(noise).resize((61, 47), Image.Resampling.BICUBIC)
    rgb, grey = colour.convert("RGB"), colour.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 16)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a panda"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"

    def frames() -> dict[str, Any]:  # new ones each time: Pillow leaves settings in them
        return {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}

    jobs: list[tuple[str, Image.Image, str, dict[str, Any]]]
    jobs = [
        ("jpeg", rgb, "JPEG", {"exif": exif, "icc_profile": bytes(200)}),
        ("progressive", rgb, "JPEG", {"progressive": True, "exif": exif}),
        ("cmyk", rgb.convert("CMYK"), "JPEG", {}),
        ("mpo", rgb, "MPO", frames()),
        ("png", colour, "PNG", {"exif": exif, "icc_profile": bytes(200)}),
        ("png palette", rgb.quantize(20), "PNG", {"transparency": 3}),
        ("png 16", deep, "PNG", {}),
        ("apng", rgb, "PNG", frames()),
        ("webp", rgb, "WEBP", {"exif": exif}),
        ("webp lossless", colour, "WEBP", {"lossless": True}),
        ("webp animated", rgb, "WEBP", frames()),
        ("gif", rgb, "GIF", frames()),
        ("bmp", rgb, "BMP", {}),
        ("bmp palette", rgb.quantize(16), "BMP", {}),
        ("dib", rgb, "DIB", {}),
        ("tiff", rgb, "TIFF", {"exif": exif}),
        ("tiff lzw", colour, "TIFF", {"compression": "tiff_lzw"}),
        ("tiff deflate", rgb, "TIFF", {"compression": "tiff_deflate", **frames()}),
        ("tiff jpeg", rgb, "TIFF", {"compression": "jpeg"}),
        ("tiff g4", rgb.convert("1"), "TIFF", {"compression": "group4"}),
        ("tiff 16", deep, "TIFF", {}),
        ("tiff float", rgb.convert("F"), "TIFF", {}),
        ("tiff lab", Image.merge("LAB", rgb.split()), "TIFF", {}),
        ("ico", colour, "ICO", {"sizes": [(32, 32), (16, 16)]}),
        ("ico bmp", colour, "ICO", {"sizes": [(32, 32)], "bitmap_format": "bmp"}),
        ("icns", colour.resize((64, 64)), "ICNS", {}),
        ("jpeg 2000", rgb, "JPEG2000", {}),
        ("j2k tiles", colour, "JPEG2000", {"no_jp2": True, "tile_size": (32, 32)}),
        ("avif", rgb, "AVIF", {"exif": exif.tobytes()}),
        ("avif alpha", colour, "AVIF", {}),
        ("ppm", rgb, "PPM", {}),
        ("pgm", grey, "PPM", {}),
        ("tga", colour, "TGA", {"compression": "tga_rle"}),
        ("qoi", colour, "QOI", {}),
        ("pcx", rgb, "PCX", {}),
    ]
    found = {}
    for job in jobs:
        name, image, format, settings = job
        file = io.BytesIO()
        try:
            image.copy().save(file, format, **settings)
        except (OSError, KeyError, ValueError):  # a Pillow without this format
            continue
        found[name] = file.getvalue()
    if "ico bmp" in found:  # cursors are icons with another number
        found["cur"] = found["ico bmp"][:2] + b"\2" + found["ico bmp"][3:]
    return found


def mutated(sound: bytes, other: bytes, draw: random.Random) -> bytes:
    """A file damaged in one of the ways that files and attackers have."""
    data = bytearray(sound)
    head = min(len(data), 256)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(head if draw.random() < 0.6 else len(data))
        match draw.randrange(9):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 2 | 3:  # a number of the header
                form = draw.choice(("<H", ">H", "<I", ">I"))
                number = draw.choice(NUMBERS) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
                piece = struct.pack(form, number)
                data[at : at + len(piece)] = piece
            case 4:
                del data[at : at + draw.randrange(1, 40)]
            case 5:
                data[at:at] = draw.randbytes(draw.randrange(1, 40))
            case 6:  # a part repeated
                part = bytes(data[at : at + draw.randrange(1, 60)])
                data[at:at] = part * draw.choice((1, 3, 200))
            case 7:  # a part of another file
                start = draw.randrange(len(other))
                data[at:at] = other[start : start + draw.randrange(1, 120)]
            case _:
                if draw.random() < 0.3:
                    del data[at:]
        if not data:
            data = bytearray(sound)
        head = min(len(data), 256)
    return bytes(data)


@dataclass
class Report:
    """How the pictures ended."""

    read: int = 0
    refused: int = 0
    failures: list[tuple[str, bytes]] = field(default_factory=list)  # why, and the file
    slowest: float = 0.0  # seconds
    peak: int = 0  # bytes of this process and its workers
    reasons: Counter[str] = field(default_factory=Counter)


def fuzz(count: int, seed: int) -> Report:
    """Read `count` mutated pictures."""
    draw, files, report = random.Random(seed), list(seeds().items()), Report()
    held = psutil.Process().memory_info().rss  # of a long test run more than of this program
    with Peak() as peak:
        for i in range(count):
            name, sound = files[i % len(files)]
            data = mutated(sound, draw.choice(files)[1], draw)
            start = time.monotonic()
            try:
                pixels(load_image(data).image, SPEC)
                report.read += 1
            except ImageError as e:
                report.refused += 1
                report.reasons[str(e).partition(": ")[2][:40]] += 1
                if "broke down" in str(e) or "\n" in str(e):
                    report.failures.append((f"{name}: {e}", data))
            except Exception as e:
                report.failures.append((f"{name}: {type(e).__name__}: {e}", data))
            took = time.monotonic() - start
            report.slowest = max(report.slowest, took)
            if took > SECONDS:
                report.failures.append((f"{name}: {took:.1f} s", data))
    report.peak = peak.bytes
    if report.peak - max(0, held - PROGRAM) > MEMORY:
        report.failures.append((f"{report.peak / 1e6:.0f} MB", b""))
    return report


class Peak:
    """The most resident bytes of this process and its workers, looked at 200 times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, sum(_resident(me)))


def _resident(me: psutil.Process) -> Iterator[int]:
    for process in (me, *me.children()):
        try:
            yield process.memory_info().rss
        except psutil.Error:  # it has just ended
            yield 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Read mutated pictures")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    args = parser.parse_args()
    start = time.monotonic()
    report = fuzz(args.count, args.seed)
    print(
        f"{args.count} pictures in {time.monotonic() - start:.0f} s: {report.read} read, "
        f"{report.refused} refused, {len(report.failures)} failures; slowest {report.slowest:.2f} "
        f"s, peak {report.peak / 1e6:.0f} MB"
    )
    for reason, number in report.reasons.most_common(12):
        print(f"  {number:6d}  {reason}")
    for i, (why, data) in enumerate(report.failures):
        print(why, file=sys.stderr)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{i}").write_bytes(data)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
