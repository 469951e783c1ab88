"""Measures how captions with Ray Data scale with actors on this machine.

    python bench/ray_captions.py [--pictures 1200] [--actors 1 2]

Generated pictures, the built-in model, one thread an actor. Time counts from the first batch of the
first actor to the end of the last: starting Ray and the models is not in it.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import ray
from captions import generated
from pyarrow import parquet

from seechat_lite.captions.batches import CaptionBatches
from seechat_lite.cli.terminal import print_table

BLOCK = 20  # pictures in a batch: many, so that no actor is idle for long at the end


class Timed(CaptionBatches):
    """Captions, with the times at which their batch began and ended."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        begun = time.time()
        found = super().__call__(batch)
        ones = np.ones(len(found["caption"]))
        return found | {"begun": ones * begun, "ended": ones * time.time()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=1200, metavar="N")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2], metavar="N")
    args = parser.parse_args()
    ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pictures.parquet"
        images = pa.table({"image": list(generated(args.pictures))})
        parquet.write_table(images, source)
        for actors in args.actors:
            rates[actors] = args.pictures / seconds(source, actors)
    first = rates[args.actors[0]]
    table: dict[str, str | list[str]] = {
        f"{actors} actors": f"{rate:.1f} pictures a second, {rate / first:.2f} times the first"
        for actors, rate in rates.items()
    }
    print_table(table)


def seconds(source: Path, actors: int) -> float:
    """What the actors take for all pictures of a file."""
    rows: Any = ray.data.read_parquet(str(source)).repartition(target_num_rows_per_block=BLOCK)
    found = rows.map_batches(
        Timed,
        fn_constructor_kwargs={"loading": {"threads": 1}},
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=BLOCK,
        num_cpus=0.5,
    ).to_pandas()
    return found["ended"].max() - found["begun"].min()


if __name__ == "__main__":
    main()
