"""How long a picture takes to encode, beside a matrix product with as many operations.

    python bench/vision.py eva --precision fp16       # SEEChat: EVA ViT-g, Q-Former, projector
    python bench/vision.py clip --precision int8      # CLIP ViT-L/14 and a linear projector

The networks have their published sizes and random weights. Each is exported, to a temporary folder
or to one where they stay and are used again (--folder), and run by ONNX Runtime in two ways:
prepared (graph optimized and matrices laid out at load, which is its default) and as written
(weights stay in their mapped file; a float16 matrix is widened whenever it is used). The matrix
product is torch's, float32, 4096 x 4096 x 4096, measured before and after each way; the better one
counts.
"""

import argparse
import multiprocessing
import platform
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seechat_export.vision_graph import PRECISIONS, export_vision
from seechat_lite.nn.layer_streaming import Streamed
from seechat_lite.nn.vision import vision_network
from seechat_lite.onnx_runtime import ort
from seechat_weights.config import VisionConfig
from seechat_weights.vision.network import PUBLISHED_VISION

HIDDEN, SIZE, SIDE = 4096, 224, 4096  # the LM's width, pixels a side, rows of the matrix product


def network(tower: str) -> nn.Module:
    """A vision network of published size, without weights."""
    return vision_network(PUBLISHED_VISION[tower], HIDDEN)


def random_weights(net: nn.Module) -> Streamed:
    """Unit layer norms, zero biases, matrices that keep the scale of what they take."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}

    def read(name: str) -> np.ndarray:
        shape = shapes[name]
        if len(shape) == 1 and not name.endswith("embedding"):
            return np.full(shape, float("norm" in name.lower() and name.endswith("weight")))
        draw = np.random.default_rng(zlib.crc32(name.encode()))
        spread = np.prod(shape[1:]) ** -0.5 if name.endswith("weight") else 1.0
        return (draw.standard_normal(shape, np.float32) * spread).astype(np.float16)

    return Streamed(net, read)


def operations(net: nn.Module) -> int:
    """Floating-point operations of one picture's products."""
    net = net.to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, SIZE, SIZE, device="meta"))
    return counter.get_total_flops()


def product_speed(threads: int) -> float:
    """Operations a second of a large float32 matrix product, the best of three."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, SIDE, SIDE)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds[1:])


class Memory(threading.Thread):
    """Watches this process's anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            now = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(now.split()[1]) << 10)
            time.sleep(0.01)


def encode(path: Path, prepared: bool, threads: int, repeat: int) -> tuple[float, float, int]:
    """Seconds to load, seconds a picture (the best), peak anonymous bytes."""
    memory = Memory()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    if not prepared:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    start = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), np.float32)
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        session.run(None, {"pixel_values": pixels})
        seconds.append(time.perf_counter() - start)
    return load, min(seconds), memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tower", choices=("eva", "clip"))
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp16"])
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where exported networks stay")
    args = parser.parse_args()
    count = operations(network(args.tower))
    print(
        f"{args.tower}: {count / 1e9:.0f} GFLOP a picture, {args.threads} threads, "
        f"onnxruntime {ort.__version__}, torch {torch.__version__}, {platform.machine()}\n\n"
        "| precision | run | file | load | a picture | as a matrix product | times | memory |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for precision in args.precision:
            path = (args.folder or Path(temporary)) / f"{args.tower}-{precision}.onnx"
            if not path.exists():
                weights = random_weights(network(args.tower))
                config = VisionConfig(path.name, 1, args.tower, "")
                export_vision(weights, config, path, precision=precision)
            files = list(path.parent.glob(f"{path.name}*"))
            size = sum(f.stat().st_size for f in files)
            # with int8 as written, onnxruntime 1.31 computes something else
            for prepared in (True,) if precision == "int8" else (True, False):
                before = product_speed(args.threads)
                job = (path, prepared, args.threads, args.repeat)
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of its own
                    load, seconds, peak = pool.apply(encode, job)
                ideal = count / max(before, product_speed(args.threads))
                print(
                    f"| {precision} | {'prepared' if prepared else 'as written'} "
                    f"| {size / 1e6:.0f} MB | {load:.1f} s | {seconds:.2f} s | {ideal:.2f} s "
                    f"| {seconds / ideal:.2f} | {peak / 1e9:.2f} GB |"
                )
                sys.stdout.flush()
            for file in files if not args.folder else ():
                file.unlink()


if __name__ == "__main__":
    main()
