"""Measures how many pictures `seechat caption` describes a second, and whether its memory grows.

    python bench/captions.py [--pictures 1000 10000] [--batch 8] [--threads N] [--instant]

Generated pictures in one tar archive, the built-in model, lines into a file; each size in a process
of its own. --instant takes the model away: it measures reading, decoding and writing alone, and
whether they keep memory flat, in minutes.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from seechat_lite.cli import main as cli
from seechat_lite.cli.terminal import print_table

SIDE = 320  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 10_000], metavar="N")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], metavar="N")
    parser.add_argument("--instant", action="store_true", help="without a model")
    parser.add_argument("--in", dest="archive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.archive:
        caption(args.archive, args.threads, args.batch[0], instant=args.instant)
        return
    found: dict[str, str | list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in args.pictures:
            archive = Path(folder) / f"{count}.tar"
            write_pictures(archive, count)
            for batch in args.batch:
                command = [sys.executable, __file__, "--in", str(archive), "--batch", str(batch)]
                command += ["--threads", str(args.threads), *["--instant"] * args.instant]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                took = json.loads(done.stdout)
                rate = count / took["seconds"]
                megabytes = [f"{took[name] / 1e6:.1f} MB {name}" for name in ("resident", "peak")]
                what = f"{count:,} pictures, {batch} at once"
                found[what] = f"{rate:.1f} a second · {' · '.join(megabytes)}"
                archive.with_suffix(".jsonl").unlink()
    print_table(found)


def caption(archive: Path, threads: int, batch: int, *, instant: bool) -> None:
    """Caption an archive in this process; print what it took as JSON."""
    import psutil

    if instant:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from captioning import TellingModel, never
        from seechat_lite.cli import caption as command

        command.load_model = lambda args, options: TellingModel(broken=never, remember=False)
    out = archive.with_suffix(".jsonl")
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        options = ["-o", str(out), "--threads", str(threads), "--batch", str(batch)]
        code = cli.main(["caption", str(archive), *options])
    seconds = time.perf_counter() - start
    resident = psutil.Process().memory_info().rss
    took = {"seconds": seconds, "resident": resident, "peak": peak(resident)}
    assert code == 0 and len(out.read_text("utf-8").splitlines()) == len_of(archive)
    print(json.dumps(took))


def len_of(archive: Path) -> int:
    """How many pictures were written."""
    return int(archive.stem)


def peak(resident: int) -> int:
    """The most resident bytes that this process had, where the system says it."""
    if os.name != "posix":
        return resident
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def generated(count: int) -> Iterator[bytes]:
    """JPEGs of a few colours, all different."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
        data = io.BytesIO()
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG")
        yield data.getvalue()


def write_pictures(archive: Path, count: int) -> None:
    """Write an archive of generated pictures."""
    with tarfile.open(archive, "w") as tar:
        for number, data in enumerate(generated(count)):
            member = tarfile.TarInfo(f"{number:06}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
