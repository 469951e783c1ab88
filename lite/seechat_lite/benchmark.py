"""Measures a bundle on this machine: load, picture, first token, prefill, decode, memory.

Speeds are compared with what the hardware allows. A decode step must read all of the decoder's
weights and the whole cache once, so the memory bandwidth limits it (the roofline). The bandwidth is
measured between the steps, so that a busy moment of the machine slows both. It is not measured for
the torch engine, which may run elsewhere.

Everything is measured in rounds, the short prompts first. What a round took tells whether another
one fits into the time; so a slow machine gets fewer runs, not a longer wait. Every figure is the
median of its runs; the first one is not counted where there are others.
"""

import logging
import os
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from PIL import Image

from seechat_lite import processor
from seechat_lite.chat import Model
from seechat_lite.lm_families import framed, ordinary_ids
from seechat_lite.loading import load
from seechat_lite.memory import MemoryPlan, human
from seechat_lite.prompt import Prompt
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.bundle.precisions import PRECISIONS

PROMPTS = (32, 256, 512)  # lengths, tokens; and the longest prompt that a chat sends
THOROUGH = (32, 128, 256, 512, 1024, 1920)
STEPS = 8  # steps timed after a prompt, in every round
TOGETHER = (2, 5, 9)  # tokens that are run at once after a prompt of
TOGETHER_AT = 256  # tokens
SECONDS = 225  # after which no round begins that would last longer than what is left of it
GROWTH = 1.15  # a longer prompt takes this much more, token by token
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
    instructions: list[str]  # of the processor
    kernels: str | None  # that the decoder's products run in; None where it is not known
    context: int
    load: float
    first_token: float  # of a short question in a loaded model, with a picture if it has vision
    encode_image: float | None  # None for a text-only bundle
    next_question: float = 0.0  # of the next short question in the same conversation
    runs: dict[str, int] = field(default_factory=dict)  # what was measured: how often
    not_measured: list[str] = field(default_factory=list)  # for lack of time
    prefill: dict[int, float] = field(default_factory=dict)  # prompt tokens: tokens per second
    decode: dict[int, float] = field(default_factory=dict)  # context tokens: seconds per token
    together: dict[int, float] = field(default_factory=dict)  # tokens at once: steps that they cost
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
    thorough: bool = False,
    say: Callable[[str, float | None], None] = lambda stage, left: None,
) -> Report:
    """Load a model and measure it.

    path: what load() takes.
    options: the other arguments of load().
    repeat: runs that are counted, if there is time.
    turns: turns of a dialogue held at the end, which shows what it does to the memory.
    thorough: more lengths of prompts, and as much time as all takes.
    say: called with what is being measured, and the seconds that are left if they are known.

    Raises the errors of load() and of the engine.
    """
    say("load", None)
    plans: list[MemoryPlan] = []
    start = time.perf_counter()
    with Anonymous() as anonymous, load(path, **options, announce=plans.append) as model:
        loaded = time.perf_counter() - start
        manifest, context = model.manifest, model.engine.context
        precision = manifest.decoder.precision if manifest.files else "as published"
        # whether this machine's memory holds the weights
        plan, here = plans[0], model.engine.step_bytes(0) is not None
        instructions = processor.instructions()
        stored = PRECISIONS.get(precision)
        report = Report(
            name=manifest.name,
            precision=options.get("quantize") or precision,
            block_size=manifest.decoder.block_size,
            engine=model.engine.runtime(),
            device=options.get("device") or "auto",
            dtype=options.get("dtype") or "auto",
            machine=processor.name(),
            threads=options.get("threads") or _cores(),
            instructions=instructions,
            kernels=(
                processor.kernels(stored.bits if stored.block else 0, instructions)
                if here and stored
                else None
            ),
            context=context,
            load=loaded,
            first_token=0.0,
            encode_image=None,
            planned_memory=plan.total if here else None,
        )
        peak = _peak()
        # this machine's memory; the torch engine and GPUs do not read it
        apart = anonymous.apart = BANDWIDTH_BYTES if here else 0
        bandwidth = Bandwidth(report.threads) if here else None
        limit = None if thorough else start + SECONDS
        lengths = _lengths(context, THOROUGH if thorough else PROMPTS)
        rounds = Rounds(_stages(model, lengths, bandwidth), repeat, limit=limit, say=say)
        rounds.run()
        _enter(report, rounds, lengths)
        model.engine.reset()
        say("dialogue", None)
        report.turns = [resident - apart for resident in _dialogue(model, turns)]
        report.peak_memory = max(peak, _peak() - apart)
        between = Anonymous.now()
        report.anonymous_memory = None if between is None else between - apart
        report.peak_anonymous = anonymous.stop()
        if bandwidth:
            for length in report.decode:
                report.token_bytes[length] = model.engine.step_bytes(length + STEPS // 2) or 0
            report.bandwidth = bandwidth.median()
    return report


def _lengths(context: int, wanted: Iterable[int]) -> list[int]:
    """The prompts that fit, steps included, and the longest one that a chat sends.

    That leaves a quarter of the context, at most 512 tokens.
    """
    longest = context - min(context // 4, 512)
    room = STEPS + max(TOGETHER)
    return sorted({longest, *(n for n in wanted if n + room < context)})


@dataclass
class Stage:
    """One measurement, made once a round.

    name: what is measured.
    run: makes it; returns lists of seconds by their names.
    tokens: of its prompt; 0 if it has none of a given length.
    """

    name: str
    run: Callable[[int], Mapping[str, list[float]]]
    tokens: int = 0
    took: float | None = None  # seconds of its last run


class Rounds:
    """Runs stages in rounds, as long as there is time.

    stages: in the order of their lengths.
    repeat: rounds that are counted; one more comes before them.
    limit: the moment at which all should be over, None for no limit.
    say: see measure().
    """

    def __init__(
        self,
        stages: list[Stage],
        repeat: int,
        *,
        limit: float | None,
        say: Callable[[str, float | None], None],
    ) -> None:
        self.stages = stages
        self.skipped: list[str] = []  # what was never run
        self._rounds, self._limit, self._say = repeat + 1, limit, say
        self._found: defaultdict[str, list[list[float]]] = defaultdict(list)

    def run(self) -> None:
        """Measure."""
        for number in range(self._rounds):
            for i, stage in enumerate(self.stages):
                expected = self._expected(i)
                now = time.perf_counter()
                if self._limit is not None and now + expected > self._limit:
                    if not number:
                        self.skipped.append(stage.name)
                    continue
                self._say(
                    f"{stage.name}, run {number + 1} of {self._rounds}", self._left(number, i)
                )
                found = stage.run(number)
                stage.took = time.perf_counter() - now
                for name, seconds in found.items():
                    self._found[name].append(seconds)

    def median(self, name: str) -> float | None:
        """The median of all that was found under a name; None if there was no time for it.

        name: a key of what the stages return.
        """
        runs = self._found.get(name, [])
        found = [seconds for run in (runs[1:] or runs) for seconds in run]
        return statistics.median(found) if found else None

    def runs(self, name: str) -> int:
        """How many runs median() counts."""
        return max(len(self._found[name]) - 1, 1)

    def _expected(self, index: int) -> float:
        """Seconds that a stage will take: as the last time, or by the stage before it."""
        stage = self.stages[index]
        if stage.took is not None:
            return stage.took
        known = [s.took / s.tokens for s in self.stages[:index] if s.took and s.tokens]
        return GROWTH * known[-1] * stage.tokens if known else 0.0

    def _left(self, number: int, index: int) -> float | None:
        """Seconds until the end; None as long as no prompt has told."""
        if not any(s.took is not None for s in self.stages if s.tokens):
            return None
        expected = [self._expected(i) for i in range(len(self.stages))]
        left = sum(expected[index:]) + (self._rounds - number - 1) * sum(expected)
        return left if self._limit is None else min(left, self._limit - time.perf_counter())


def _stages(model: Model, lengths: list[int], bandwidth: "Bandwidth | None") -> list[Stage]:
    """All that is measured in rounds."""
    manifest, stages = model.manifest, []
    if manifest.vision:
        size = manifest.vision.pixels.image_size
        noise = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)

        def picture(number: int) -> dict[str, list[float]]:
            return {"picture": _times([lambda: model.engine.encode_image(noise)])}

        stages.append(Stage("a picture", picture))
    stages.append(Stage("a question", lambda number: _first_tokens(model, number)))
    together = min(lengths, key=lambda n: abs(n - TOGETHER_AT))
    for length in lengths:

        def prompt(number: int, length: int = length) -> dict[str, list[float]]:
            # each time another prompt: of the same one, a cache may keep what was read
            words = _prompt(manifest, length, number)
            found = {f"prefill {length}": _times([lambda: model.engine.prefill(words)])}
            if bandwidth:
                bandwidth.measure()
            room = model.engine.context - length
            steps = ((lambda i=i: model.engine.step(5 + i)) for i in range(min(STEPS, room)))
            found[f"decode {length}"] = _times(steps)
            room -= STEPS
            for tokens in (n for n in TOGETHER if length == together and n <= room):
                ids = [*range(5, 5 + tokens)]
                found[f"together {tokens}"] = _times([lambda ids=ids: model.engine.extend(ids)])
                model.engine.rewind(tokens)
            return found

        stages.append(Stage(f"a prompt of {length} tokens and {STEPS} steps", prompt, length))
    return stages


def _enter(report: Report, rounds: Rounds, lengths: list[int]) -> None:
    """Enter what was found into the report."""
    report.encode_image = rounds.median("picture")
    report.first_token = rounds.median("first token") or 0.0
    report.next_question = rounds.median("next question") or 0.0
    report.not_measured = rounds.skipped
    for length in lengths:
        if seconds := rounds.median(f"prefill {length}"):
            report.prefill[length] = length / seconds
            report.runs[str(length)] = rounds.runs(f"prefill {length}")
        if seconds := rounds.median(f"decode {length}"):
            report.decode[length] = seconds
    at = min(lengths, key=lambda n: abs(n - TOGETHER_AT))
    for tokens in TOGETHER:
        if at in report.decode and (seconds := rounds.median(f"together {tokens}")):
            report.together[tokens] = seconds / report.decode[at]


class Anonymous:
    """Watches this process's anonymous memory, that is, memory that belongs to no file (Linux)."""

    def __init__(self) -> None:
        self.apart = 0  # bytes that are not the model's
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
            self._peak = max(self._peak or 0, (self.now() or 0) - self.apart)


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
        "instructions": ", ".join(report.instructions) or "none that matter here",
        "load": f"{report.load:.2f} s",
    }
    if report.kernels:
        rows["kernels"] = report.kernels
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
    for tokens, steps in report.together.items():
        rows[f"{tokens} tokens at once"] = f"{steps:.2f} steps"
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
    if report.not_measured:
        rows["not measured"] = f"for lack of time: {'; '.join(report.not_measured)}"
    return rows


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


def _first_tokens(model: Model, seed: int) -> dict[str, list[float]]:
    """Seconds from a question to its first token: the first about a picture, and the next."""
    chat = model.chat()
    image = Image.effect_noise((256, 256), 64 + seed) if model.manifest.vision else None
    found = {}
    for name, question, shown in (
        ("first token", "这是什么?", image),
        ("next question", "它是什么颜色?", None),
    ):
        chat.ask(question, shown, max_new_tokens=1)
        assert chat.stats
        found[name] = [chat.stats.first_token_seconds]
    return found


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
