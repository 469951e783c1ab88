"""Measure a bundle on this machine: load, picture, first token, prefill, decode, memory.

Speeds are set against what the hardware allows: a decode step must read all of the decoder's
weights and the whole cache once, so the memory bandwidth, measured in the same run, bounds it from
below (the roofline). Every figure is the median of `repeat` runs after one that is not counted.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil

from seechat_lite.chat import Model, load
from seechat_lite.memory import cache_bytes, human, plan, widening
from seechat_lite.prompt import Prompt
from seechat_weights.bundle import Manifest
from seechat_weights.precisions import PRECISIONS

PREFILL = (32, 128, 512)  # prompt lengths, tokens
DECODE = (32, 256, 1024, 1920)  # context lengths at which steps are timed
STEPS = 8  # steps timed at each
BANDWIDTH_BYTES = 1 << 28  # far more than any cache holds


@dataclass
class Report:
    """What was measured; times in seconds, memory and bandwidth in bytes."""

    name: str
    precision: str
    block_size: int
    engine: str
    machine: str
    threads: int
    context: int
    load: float
    first_token: float  # of a short question in a loaded model, with a picture where it can see
    encode_image: float | None  # None for a text-only bundle
    prefill: dict[int, float] = field(default_factory=dict)  # prompt tokens: tokens per second
    decode: dict[int, float] = field(default_factory=dict)  # context tokens: seconds per token
    token_bytes: dict[int, int] = field(default_factory=dict)  # read from memory for one token
    bandwidth: float = 0.0  # bytes per second, reading, all threads
    peak_memory: int = 0  # resident, mapped files included
    anonymous_memory: int | None = None  # resident without files, at the end; Linux only
    planned_memory: int = 0

    def roofline(self, context: int) -> float:
        """The share of the memory bandwidth that decoding at `context` reaches."""
        return self.token_bytes[context] / self.bandwidth / self.decode[context]


def measure(
    path: Path | None,
    *,
    engine: str = "auto",
    device: str = "auto",
    context: int = 2048,
    repeat: int = 3,
    say: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Load the bundle at `path` and measure it; `say` hears what is being measured.

    Raises what chat.load raises.
    """
    say("load")
    start = time.perf_counter()
    with load(path, engine=engine, device=device, context=context) as model:
        loaded = time.perf_counter() - start
        manifest = model.manifest
        report = Report(
            name=manifest.name,
            precision=manifest.decoder.precision,
            block_size=manifest.decoder.block_size,
            engine=f"onnxruntime {ort.__version__}",
            machine=_machine(),
            threads=len(os.sched_getaffinity(0))
            if sys.platform == "linux"
            else os.cpu_count() or 1,
            context=context,
            load=loaded,
            first_token=0.0,
            encode_image=None,
            planned_memory=plan(manifest, context=context).total,
        )
        if manifest.vision:
            say("picture")
            size = manifest.vision.pixels.image_size
            noise = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
            report.encode_image = _median(repeat, lambda: model.engine.encode_image(noise))
        say("first token")
        report.first_token = _first_token(model, repeat)
        for length in (n for n in PREFILL if n < context):
            say(f"prefill {length}")
            prompt = _prompt(manifest, length)
            seconds = _median(repeat, lambda p=prompt: model.engine.prefill(p))
            report.prefill[length] = length / seconds
        weights = manifest.files[f"{manifest.decoder.graph}.data"].bytes
        weights *= widening(PRECISIONS[manifest.decoder.precision])
        for length in (n for n in DECODE if n + STEPS < context):
            say(f"decode {length}")
            report.decode[length] = _decode(model, length, repeat)
            cached = cache_bytes(manifest.lm, length + STEPS // 2)
            report.token_bytes[length] = weights + cached
        report.peak_memory, report.anonymous_memory = _memory()
        say("bandwidth")
        report.bandwidth = read_bandwidth(report.threads)
    return report


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory, the best of five passes."""
    data = np.ones(BANDWIDTH_BYTES // 4, np.int32)
    parts = np.array_split(data, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):  # the first pass wakes the threads
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def rows(report: Report) -> dict[str, str]:
    """The report for people: names and values."""
    blocks = f", blocks of {report.block_size}" if report.block_size else ""
    rows = {
        "model": f"{report.name} ({report.precision}{blocks})",
        "machine": f"{report.machine}, {report.threads} threads, {report.engine}",
        "load": f"{report.load:.2f} s",
    }
    if report.encode_image is not None:
        rows["picture"] = f"{report.encode_image * 1e3:.3g} ms"
    rows["first token"] = f"{report.first_token * 1e3:.3g} ms"
    for length, speed in report.prefill.items():
        rows[f"prefill {length}"] = f"{speed:.1f} tokens/s"
    for length, seconds in report.decode.items():
        rows[f"decode at {length}"] = (
            f"{1 / seconds:.1f} tokens/s ({seconds * 1e3:.3g} ms, "
            f"{human(report.token_bytes[length])} read, "
            f"{report.roofline(length):.0%} of the bandwidth)"
        )
    rows["bandwidth"] = f"{report.bandwidth / 1e9:.1f} GB/s"
    anonymous = report.anonymous_memory
    rows["memory"] = f"peak {human(report.peak_memory)}"
    if anonymous is not None:
        rows["memory"] += f", {human(anonymous)} of it not files"
    planned = human(report.planned_memory)
    rows["planned"] = f"{planned} at a context of {report.context} tokens"
    return rows


def _median(repeat: int, call: Callable[[], object]) -> float:
    """Seconds a call takes: the median of `repeat`, after one that is not counted."""
    call()
    return statistics.median(_times(call for _ in range(repeat)))


def _times(calls: Iterable[Callable[[], object]]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _prompt(manifest: Manifest, length: int) -> Prompt:
    """A prompt of `length` ordinary tokens, its end included."""
    lm = manifest.lm
    last = min(lm.mask_id, lm.gmask_id)
    words = np.random.default_rng(length).integers(5, last, length - 2).tolist()
    return Prompt([*words, lm.gmask_id, lm.bos_id])


def _decode(model: Model, length: int, repeat: int) -> float:
    """Median seconds of one step with `length` to `length` + STEPS tokens in the cache."""
    times = []
    for _ in range(repeat):
        model.engine.prefill(_prompt(model.manifest, length))
        times += _times((lambda i=i: model.engine.step(5 + i)) for i in range(STEPS))
    return statistics.median(times)


def _first_token(model: Model, repeat: int) -> float:
    """Median seconds from a question to its first token, in a new chat, the picture new as well."""
    times = []
    for i in range(repeat + 1):
        chat = model.chat()
        image = None
        if model.manifest.vision:
            from PIL import Image

            image = Image.effect_noise((256, 256), 64 + i)
        chat.ask("这是什么?", image, max_new_tokens=1)
        assert chat.stats
        times.append(chat.stats.first_token_seconds)
    return statistics.median(times[1:])


def _memory() -> tuple[int, int | None]:
    """Peak resident memory of this process, and what of its present memory is not files."""
    info = psutil.Process().memory_info()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        sizes = dict(line.split(":", 1) for line in status.splitlines())
        kilobytes = {k: int(v.split()[0]) * 1024 for k, v in sizes.items() if v.endswith(" kB")}
        return kilobytes["VmHWM"], kilobytes["RssAnon"]
    return getattr(info, "peak_wset", info.rss), None


def _machine() -> str:
    """The processor's name, as far as the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
