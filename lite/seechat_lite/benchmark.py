"""Measures a bundle on this machine: load, picture, first token, prefill, decode, memory.

Speeds are compared with what the hardware allows. A decode step must read all of the decoder's
weights and the whole cache once, so the memory bandwidth limits it (the roofline). The bandwidth is
measured between the steps, so that a busy moment of the machine slows both. It is not measured for
the torch engine, which may run elsewhere. Every figure is the median of its runs; the first run is
not counted.
"""

import logging
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from PIL import Image

from seechat_lite.chat import Model
from seechat_lite.lm_families import framed, ordinary_ids
from seechat_lite.loading import load
from seechat_lite.memory import MemoryPlan, human
from seechat_lite.prompt import Prompt
from seechat_weights.bundle.manifest import Manifest

PREFILL = (32, 128, 512)  # prompt lengths, tokens
DECODE = (32, 256, 1024, 1920)  # context lengths at which steps are timed
STEPS = 8  # steps timed at each, in every repetition
TURN_TOKENS = 16  # of each answer in a dialogue
WATCH_SECONDS = 0.02  # between two readings of the memory
BANDWIDTH_BYTES = 1 << 28  # far more than any cache holds


@dataclass
class Report:
    """What was measured. Times are in seconds, memory and bandwidth in bytes."""

    name: str
    precision: str
    block_size: int
    engine: str
    device: str  # as it was chosen, or "auto"
    dtype: str  # as it was chosen, or "auto"
    machine: str  # the machine's processor, whatever the device
    threads: int  # of the processor
    context: int
    load: float
    first_token: float  # of a short question in a loaded model, with a picture if it has vision
    encode_image: float | None  # None for a text-only bundle
    next_question: float = 0.0  # of the next short question in the same conversation
    prefill: dict[int, float] = field(default_factory=dict)  # prompt tokens: tokens per second
    decode: dict[int, float] = field(default_factory=dict)  # context tokens: seconds per token
    # not for the torch engine: bytes read from memory for one token, and per second by all threads
    token_bytes: dict[int, int] = field(default_factory=dict)
    bandwidth: float | None = None
    turns: list[int] = field(default_factory=list)  # resident memory after each
    # resident memory at its peak: with the pages of mapped files (the system takes them back when
    # it needs them), and without, as the plan counts it (Linux only, like the next field)
    peak_memory: int = 0
    peak_anonymous: int | None = None
    anonymous_memory: int | None = None  # between answers
    planned_memory: int | None = None  # not for the torch engine, nor for a GPU

    def roofline(self, context: int) -> float:
        """The share of the memory bandwidth that decoding reaches; needs a measured bandwidth.

        context: tokens in the cache, a key of `decode`.
        """
        assert self.bandwidth
        return self.token_bytes[context] / self.bandwidth / self.decode[context]


def measure(
    path: Path | None,
    *,
    options: Mapping[str, Any],
    repeat: int = 3,
    turns: int = 0,
    say: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Load a model and measure it.

    path: what load() takes.
    options: the other arguments of load().
    repeat: runs that are counted.
    turns: turns of a dialogue held at the end, which shows what it does to the memory.
    say: called with what is being measured.

    Raises the errors of load() and of the engine.
    """
    say("load")
    plans: list[MemoryPlan] = []
    start = time.perf_counter()
    with Anonymous() as anonymous, load(path, **options, announce=plans.append) as model:
        loaded = time.perf_counter() - start
        manifest, context = model.manifest, model.engine.context
        precision = manifest.decoder.precision if manifest.files else "as published"
        # whether this machine's memory holds the weights
        plan, here = plans[0], model.engine.step_bytes(0) is not None
        report = Report(
            name=manifest.name,
            precision=options.get("quantize") or precision,
            block_size=manifest.decoder.block_size,
            engine=model.engine.runtime(),
            device=options.get("device") or "auto",
            dtype=options.get("dtype") or "auto",
            machine=_machine(),
            threads=options.get("threads") or _cores(),
            context=context,
            load=loaded,
            first_token=0.0,
            encode_image=None,
            planned_memory=plan.total if here else None,
        )
        if manifest.vision:
            say("picture")
            size = manifest.vision.pixels.image_size
            noise = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
            report.encode_image = _median(repeat, lambda: model.engine.encode_image(noise))
        say("first token")
        report.first_token, report.next_question = _first_tokens(model, repeat)
        for length in (n for n in PREFILL if n < context):
            say(f"prefill {length}")
            # each time another prompt: of the same one, a cache may keep what was read
            prompts = (_prompt(manifest, length, seed) for seed in range(repeat + 1))
            seconds = _median(repeat, lambda p=prompts: model.engine.prefill(next(p)))
            report.prefill[length] = length / seconds
        # the longest prompt that a chat sends leaves a quarter of the context, at most 512 tokens
        say("longest prompt")
        model.engine.prefill(_prompt(manifest, context - min(context // 4, 512)))
        model.engine.reset()
        say("dialogue")
        report.turns = list(_dialogue(model, turns))
        report.peak_memory = _peak()
        report.anonymous_memory = Anonymous.now()
        report.peak_anonymous = anonymous.stop()
        # this machine's memory; the torch engine and GPUs do not read it
        bandwidth = Bandwidth(report.threads) if here else None
        for length in (n for n in DECODE if n + repeat * STEPS < context):
            say(f"decode {length}")
            report.decode[length] = _decode(model, length, repeat, bandwidth)
        if bandwidth:
            for length in report.decode:
                report.token_bytes[length] = (
                    model.engine.step_bytes(length + repeat * STEPS // 2) or 0
                )
            report.bandwidth = bandwidth.median()
    return report


class Anonymous:
    """Watches this process's anonymous memory, that is, memory that belongs to no file (Linux)."""

    def __init__(self) -> None:
        self._peak = self.now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int | None:
        """The anonymous memory in bytes; None if the system does not tell."""
        return _status("RssAnon") if sys.platform == "linux" else None

    def stop(self) -> int | None:
        """End the watch; returns the most bytes seen, or None if the system does not tell."""
        self._ended.set()
        self._thread.join()
        return self._peak

    def __enter__(self) -> Self:
        if self._peak is not None:
            self._thread.start()
        else:
            self._ended.set()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self._peak = max(self._peak or 0, self.now() or 0)


class Bandwidth:
    """Measures how fast all threads together read memory, again and again.

    threads: how many read.
    """

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(BANDWIDTH_BYTES // 8, np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)
        self._seconds: list[float] = []

    def measure(self) -> None:
        """Note the best of four reads of more than any cache holds; the first wakes the threads."""
        passes = []
        for _ in range(4):
            start = time.perf_counter()
            list(self._pool.map(np.max, self._parts))
            passes.append(time.perf_counter() - start)
        self._seconds.append(min(passes))

    def median(self) -> float:
        """Bytes a second."""
        if not self._seconds:
            self.measure()
        return BANDWIDTH_BYTES / statistics.median(self._seconds)


def rows(report: Report) -> dict[str, str]:
    """The report for people: names and values.

    report: what measure() returned.
    """
    blocks = f", blocks of {report.block_size}" if report.block_size else ""
    rows = {
        "model": f"{report.name} ({report.precision}{blocks})",
        "engine": f"{report.engine}, device {report.device}, dtype {report.dtype}",
        "machine": f"{report.machine}, {report.threads} threads",
        "load": f"{report.load:.2f} s",
    }
    if report.encode_image is not None:
        rows["picture"] = f"{report.encode_image * 1e3:.3g} ms"
    rows["first token"] = f"{report.first_token * 1e3:.3g} ms"
    rows["of the next question"] = f"{report.next_question * 1e3:.3g} ms"
    for length, speed in report.prefill.items():
        rows[f"prefill {length}"] = f"{speed:.1f} tokens/s"
    for length, seconds in report.decode.items():
        of_it = ""
        if report.bandwidth:
            read, share = human(report.token_bytes[length]), report.roofline(length)
            of_it = f", {read} read, {share:.0%} of the bandwidth"
        rows[f"decode at {length}"] = f"{1 / seconds:.1f} tokens/s ({seconds * 1e3:.3g} ms{of_it})"
    if report.bandwidth:
        rows["bandwidth"] = f"{report.bandwidth / 1e9:.1f} GB/s"
    if report.turns:
        first, last, most = report.turns[0], report.turns[-1], max(report.turns)
        rows[f"{len(report.turns)} turns"] = (
            f"{human(first)} resident after the first, {human(last)} after the last, "
            f"at most {human(most)}"
        )
    rows["resident"] = f"peak {human(report.peak_memory)}, mapped files included"
    if report.peak_anonymous is not None and report.anonymous_memory is not None:
        between = human(report.anonymous_memory)
        rows["anonymous"] = f"peak {human(report.peak_anonymous)}, {between} between answers"
    if report.planned_memory:
        planned = human(report.planned_memory)
        rows["planned"] = f"{planned} at a context of {report.context} tokens"
    return rows


def _median(repeat: int, call: Callable[[], object]) -> float:
    """Seconds that a call takes: the median of `repeat` calls, after one that is not counted."""
    call()
    return statistics.median(_times(call for _ in range(repeat)))


def _times(calls: Iterable[Callable[[], object]]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _prompt(manifest: Manifest, length: int, seed: int = 0) -> Prompt:
    """A prompt of `length` ordinary tokens in all."""
    lm = manifest.lm
    words, around = ordinary_ids(lm), len(framed([], lm))
    drawn = np.random.default_rng([length, seed]).integers(words.start, words.stop, length - around)
    return Prompt(framed(drawn.tolist(), lm))


def _decode(model: Model, length: int, repeat: int, bandwidth: Bandwidth | None) -> float:
    """Median seconds of one step with `length` tokens in the cache, or a few more."""
    times = []
    model.engine.prefill(_prompt(model.manifest, length))
    for _ in range(repeat):
        if bandwidth:
            bandwidth.measure()
        times += _times((lambda i=i: model.engine.step(5 + i)) for i in range(STEPS))
    return statistics.median(times)


def _dialogue(model: Model, turns: int) -> Iterator[int]:
    """Talk, about a picture if the model has vision; yield the resident memory after each turn."""
    chat, process = model.chat(), psutil.Process()
    image = Image.effect_noise((256, 256), 64) if model.manifest.vision else None
    log = logging.getLogger("seechat_lite.chat")
    level = log.level
    log.setLevel(logging.ERROR)  # this dialogue fills the context on purpose: no need to log it
    for i in range(turns):
        question = f"第{i + 1}个问题：请详细描述这张图片中的内容，并说明它的主要特点。"
        chat.ask(question, None if i else image, max_new_tokens=TURN_TOKENS)
        yield process.memory_info().rss
    log.setLevel(level)


def _first_tokens(model: Model, repeat: int) -> tuple[float, float]:
    """Median seconds from a question to its first token: the first about a picture, and the next.

    Every time in a new chat with a new picture.
    """
    times = []
    for i in range(repeat + 1):
        chat = model.chat()
        image = None
        if model.manifest.vision:
            image = Image.effect_noise((256, 256), 64 + i)
        found = []
        for question, shown in (("这是什么?", image), ("它是什么颜色?", None)):
            chat.ask(question, shown, max_new_tokens=1)
            assert chat.stats
            found.append(chat.stats.first_token_seconds)
        times.append(found)
    first, then = zip(*times[1:], strict=True)
    return statistics.median(first), statistics.median(then)


def _peak() -> int:
    """Peak resident memory of this process, in bytes."""
    info = psutil.Process().memory_info()
    found = _status("VmHWM") if sys.platform == "linux" else getattr(info, "peak_wset", None)
    return found or info.rss


def _status(name: str) -> int | None:
    """A size of Linux's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _machine() -> str:
    """The processor's name, as far as the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
