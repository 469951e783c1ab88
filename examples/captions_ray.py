"""Captions the pictures of Parquet files with Ray Data: pip install "seechat-lite[ray]"
    python examples/captions_ray.py s3://bucket/pictures s3://bucket/captions --actors 8 --cpus 4

A file of pictures becomes a folder of captions; those that are complete are left as they are.
"""

import argparse
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody

import ray
from pyarrow import fs

from seechat_lite.captions.batches import CaptionBatches

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("pictures", help="a folder of Parquet files: a URI or an absolute path")
parser.add_argument("captions", help="the folder to write to")
parser.add_argument("--model", help="a bundle that every node can read")
parser.add_argument("--column", default="image", help="the column of pictures (%(default)s)")
parser.add_argument("--actors", type=int, default=1, help="models in memory at once")
parser.add_argument("--cpus", type=int, default=1, help="cores for each")
parser.add_argument("--gpus", type=float, default=0, help="GPUs for each, such as 0.5")
args = parser.parse_args()
source, root = fs.FileSystem.from_uri(args.pictures)
target, out = fs.FileSystem.from_uri(args.captions)
options = {"column": args.column, "loading": {"threads": args.cpus}}
for info in source.get_file_info(fs.FileSelector(root, recursive=True)):
    folder = f"{out}/{info.path.removeprefix(root).strip('/')}"
    complete = target.get_file_info(f"{folder}/_SUCCESS").type != fs.FileType.NotFound
    if complete or not info.path.endswith(".parquet"):
        continue
    rows = ray.data.read_parquet(info.path, filesystem=source)
    rows.repartition(target_num_rows_per_block=64).map_batches(  # an actor that dies loses few
        CaptionBatches, fn_constructor_args=[args.model], fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=args.actors), batch_size=64,
        num_cpus=args.cpus - 0.5, num_gpus=args.gpus,  # the other half reads and writes
    ).write_parquet(folder, filesystem=target, mode="overwrite")  # fmt: skip
    target.open_output_stream(f"{folder}/_SUCCESS").close()
