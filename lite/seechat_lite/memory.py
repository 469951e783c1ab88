"""What a bundle will take in memory, known before anything is loaded.

The sums are what the default engine holds at most: the weights as its kernels keep them; then
either the key/value cache of a full context and a workspace for the longest prompt, or the vision
network, if that is released after every picture; else all of them. On a card the cache stays.

What counts is memory that the system cannot take back. Pages of mapped files (weights that were
copied for the kernels, a vision network that runs as written) are resident besides, as long as
nothing else needs them.
"""

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seechat_lite.errors import MemoryPlanError, OptionError
from seechat_weights.bundle import LMConfig, Manifest
from seechat_weights.precisions import (
    PRECISIONS,
    VISION_PRECISIONS,
    Precision,
    smaller_precisions,
)

CARDS = ("cuda", "dml")  # devices with a memory of their own, and how their names begin
MIN_CONTEXT = 16  # tokens; less holds no question and answer
ADVISED_CONTEXT = 256  # tokens; less is nothing to recommend
RUNTIME = 130 << 20  # Python, numpy, Pillow and ONNX Runtime themselves
VISION_WORKSPACE = 300 << 20  # what a picture's activations and one layer's weights take
KEPT_VISION = 256_000_000  # bytes; a larger vision network is loaded for each new picture
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}

# where a container sees its own limits (versions 2 and 1): folder, limit, use, and in memory.stat
# the files' share of the use
CGROUPS = (
    (
        Path("/sys/fs/cgroup"),
        "memory.max",
        "memory.current",
        ("inactive_file ", "active_file "),
    ),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file ", "total_active_file "),
    ),
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part when the context is full."""

    weights: int
    cache: int
    vision: int
    workspace: int
    context: int  # tokens
    keep_vision: bool = True  # or it is released after every picture, before the prompt is read
    card: int = 0  # see float_bytes_on_card
    vision_card: int = 0  # the same of vision, whose bytes are not here if it lies elsewhere

    @property
    def total(self) -> int:
        """The most that is held at once."""
        if self.keep_vision:
            return self.weights + self.cache + self.vision + self.workspace
        cache, stays = (0, self.cache) if self.card else (self.cache, 0)
        return self.weights + stays + max(self.vision + RUNTIME, cache + self.workspace)

    @property
    def parts(self) -> str:
        """The sums, for people."""
        sizes = {n: human(getattr(self, n)) for n in ("weights", "cache", "workspace", "vision")}
        parts = [f"{name} {sizes[name]}" for name in ("weights", "cache", "workspace")]
        if self.vision and self.keep_vision:
            parts.append(f"vision {sizes['vision']}")
        elif self.vision:
            stay = 2 if self.card else 1
            parts[stay:] = [
                f"({' + '.join(parts[stay:])}, or before that vision {sizes['vision']})"
            ]
        return " + ".join(parts)

    def __str__(self) -> str:
        return f"{self.parts} = {human(self.total)} at a context of {self.context} tokens"


def plan(
    manifest: Manifest,
    *,
    context: int,
    keep_vision: bool | None = None,
    card: int = 0,
    vision_card: int | None = None,
) -> MemoryPlan:
    """The memory plan of a bundle at a context of `context` tokens, where the decoder runs.

    keep_vision: None keeps a vision network of up to KEPT_VISION bytes, on a card any. card,
    vision_card: see float_bytes_on_card; vision_card is None for the decoder's device.
    """
    vision_card = card if vision_card is None else vision_card
    lm, precision = manifest.lm, PRECISIONS[manifest.decoder.precision]

    def stored(graph: str) -> int:  # a graph and the weights beside it
        return sum(f.bytes for name, f in manifest.files.items() if name.startswith(graph))

    vision = 0
    if manifest.vision:
        file, form = stored(manifest.vision.graph), VISION_PRECISIONS[manifest.vision.precision]
        half = vision_card == 2 and manifest.vision.half in manifest.files
        vision = file * (1 if half else form.widening)  # prepared for speed
        if keep_vision is None:
            keep_vision = bool(vision_card) or vision <= KEPT_VISION
        if bool(vision_card) != bool(card):
            vision = 0
        elif not (keep_vision or form.integers or card):  # mapped, widened a layer at a time
            vision = VISION_WORKSPACE
    # what a layer of the longest prompt holds at once, as measured: the MLP's and the attention's,
    # and what an arena leaves between them
    activations = context * (2 * lm.inner_size + 18 * lm.hidden_size) * (card or 4)
    weights = stored(manifest.decoder.graph) * (1 if card == 2 else precision.widening)
    if precision.block and not card:  # the kernels add the sum of every block to its scale
        weights += weights * 4 // (manifest.decoder.block_size * precision.bits // 8 + 4)
    return MemoryPlan(
        weights=weights,
        cache=cache_bytes(lm, precision, context + manifest.decoder.prefix_tokens),
        vision=vision,
        workspace=RUNTIME + activations,
        context=context,
        keep_vision=keep_vision is not False,
        card=card,
        vision_card=vision_card,
    )


def float_bytes_on_card(manifest: Manifest, device: str, dtype: str | None) -> int:
    """Bytes of a number that the default engine computes with on `device`; 0 for the CPU.

    dtype: "fp32" where float16 is not wanted.
    """
    if not device.lower().startswith(CARDS):
        return 0
    return 2 if dtype != "fp32" and manifest.decoder.half in manifest.files else 4


def cache_bytes(lm: LMConfig, precision: Precision, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens: float16 but in a float32 model."""
    number = np.dtype(precision.cache_dtype).itemsize
    return 2 * lm.num_layers * lm.hidden_size * tokens * number


def available_memory() -> int:
    """Bytes this process may still take: of the machine, or of its container where that is less."""
    try:
        import psutil

        free = psutil.virtual_memory().available
    except ImportError:  # not installed but run from a clone, as bench/gpu.py is on a bare machine
        if not hasattr(os, "sysconf"):
            raise
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # without file caches
    if sys.platform == "linux":
        for folder, limit, used, cached in CGROUPS:
            if (most := _number(folder, limit)) is not None:
                # files read lately count as used, though their pages are given back on demand
                taken = (_number(folder, used) or 0) - sum(_stat(folder, cached))
                free = min(free, most - max(taken, 0))
    return max(free, 0)


def check_memory(needed: MemoryPlan, manifest: Manifest, *, budget: int | None = None) -> None:
    """Raise MemoryPlanError if `needed` exceeds what is free, or `budget` bytes.

    Of a card only the budget is known. The error has the sums and the next smaller setting that
    fits.
    """
    free = sys.maxsize if needed.card else available_memory()
    room = free if budget is None else min(free, budget)
    if needed.total <= room:
        return
    limit = f"{human(free)} are free" if room == free else f"the budget is {human(room)}"
    last = "close other programs" if room == free else "allow more"
    raise MemoryPlanError(
        f"{manifest.name} needs {needed}; {limit}: {advice(needed, manifest, room, last=last)}"
    )


def advice(needed: MemoryPlan, manifest: Manifest, room: int, *, last: str) -> str:
    """The next smaller setting that takes at most `room` bytes, in words; or `last`."""

    def fits(context: int, keep_vision: bool) -> bool:
        smaller = plan(
            manifest,
            context=context,
            keep_vision=keep_vision,
            card=needed.card,
            vision_card=needed.vision_card,
        )
        return smaller.total <= room

    smaller = smaller_context(needed.context, lambda n: fits(n, needed.keep_vision))
    if needed.keep_vision and needed.vision and fits(needed.context, False):
        return "load it with keep_vision=False (--no-keep-vision)"
    if smaller:
        return f"load it with context={smaller} (--context {smaller})"
    lower = smaller_precisions(manifest.decoder.precision)
    return f"export it with --precision {lower[0].name}, or {last}" if lower else last


def smaller_context(context: int, fits: Callable[[int], bool]) -> int | None:
    """`context` halved until it fits; None if that leaves too little for a conversation."""
    while (context := context // 2) >= ADVISED_CONTEXT:
        if fits(context):
            return context
    return None


def parse_size(text: str) -> int:
    """Bytes of "5GB", "600 MB", "4.5GiB" or a plain number. Raises OptionError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    size = float(match[1]) * SIZES.get(match[2].upper(), math.nan) if match else math.nan
    if not size < 2**63:
        raise OptionError(
            f"{text[:40]!r} is no size; expected a number of bytes, or such as 5GB: "
            "write a number, with KB, MB or GB behind it if they are meant"
        )
    return int(size)


def human(size: int) -> str:
    """A number of bytes for people, in decimal units."""
    return f"{size / 1e9:.2f} GB" if size >= 999.5e6 else f"{size / 1e6:.0f} MB"


def _number(folder: Path, name: str) -> int | None:
    try:
        text = (folder / name).read_text()
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None  # "max" where there is no limit


def _stat(folder: Path, names: tuple[str, ...]) -> list[int]:
    try:
        lines = (folder / "memory.stat").read_text().split("\n")
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith(names)]
