"""Plans the memory of a model, finds how much is free, and writes sizes as words.

The engine that will run makes the sums of a plan (see engines.base.Engine.plan).
"""

import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from seechat_weights.errors import MemoryPlanError, OptionError

MIN_CONTEXT = 16  # tokens; less holds no question and answer
DEFAULT_CONTEXT = 2048  # tokens; as many as ChatGLM-6B was trained with
ADVISED_CONTEXT = 256  # tokens; less is never recommended
KEPT_VISION = 256_000_000  # bytes; a larger vision network is loaded for each new picture
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}

# a container's own limits (cgroup versions 2 and 1): folder, limit, use, and the files' share of
# the use in memory.stat
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
class Advice:
    """What would fit, in words and as data.

    options, calls: see errors.SeechatError.
    """

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, value: Any) -> Self:
        """Advice to load the model with another value of one argument.

        name: the argument.
        value: its new value.
        """
        return cls(f"load it with {name}={value!r}", {name: value})


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part when the context is full.

    weights: the LM's weights.
    cache: keys and values.
    vision: the vision network.
    workspace: what computing needs beside these.
    context: tokens that the cache has room for.
    """

    weights: int
    cache: int
    vision: int
    workspace: int
    context: int  # tokens

    @property
    def on_host(self) -> bool:
        """Whether this is the machine's own memory, not that of a GPU."""
        return True

    @property
    def total(self) -> int:
        """The most bytes held at once."""
        return self.weights + self.cache + self.vision + self.workspace

    @property
    def parts(self) -> str:
        """The parts with their sizes, for people."""
        sizes = {n: getattr(self, n) for n in ("weights", "cache", "workspace", "vision")}
        return " + ".join(f"{n} {human(s)}" for n, s in sizes.items() if s or n != "vision")

    def __str__(self) -> str:
        return f"{self.parts} = {human(self.total)} at a context of {self.context} tokens"


def available_memory() -> int:
    """Bytes this process may still take: of the machine, or of its container if that has less."""
    try:
        import psutil

        free = psutil.virtual_memory().available
    except ImportError:
        # not installed, but run from a clone, such as bench/gpu.py on a bare machine
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


def check_room(
    needed: MemoryPlan,
    name: str,
    *,
    free: int | None,
    budget: int | None,
    advice: Callable[[int, str], Advice],
    where: str = "",
) -> None:
    """Check a plan against the free memory and the budget.

    needed: the plan.
    name: the model's name, for the error.
    free: bytes that are free; None if that is not known.
    budget: bytes that the model may take; None for any number.
    advice: returns the next smaller setting that takes at most so many bytes, or else
        the text it was given.
    where: whose memory it is, if not this machine's.

    Raises MemoryPlanError if the model needs more than either.
    """
    rooms = [room for room in (free, budget) if room is not None]
    if not rooms or needed.total <= (room := min(rooms)):
        return
    limit = f"{human(room)} are free" if room == free else f"the budget is {human(room)}"
    last = "close other programs" if room == free else "allow more"
    found = advice(room, last)
    raise MemoryPlanError(
        f"{name} needs {needed}{where}; {limit}: {found.text}",
        options=found.options,
        calls=found.calls,
    )


def smaller_context(context: int, fits: Callable[[int], bool]) -> int | None:
    """Halve a context until it fits; None if that leaves too little for a conversation.

    context: tokens to begin with.
    fits: whether so many tokens fit.
    """
    while (context := context // 2) >= ADVISED_CONTEXT:
        if fits(context):
            return context
    return None


def parse_size(text: str) -> int:
    """The bytes in a text such as "5GB", "600 MB", "4.5GiB" or a plain number.

    text: the text.

    Raises OptionError.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    size = float(match[1]) * SIZES.get(match[2].upper(), math.nan) if match else math.nan
    if not size < 2**63:
        raise OptionError(
            f"{text[:40]!r} is no size; expected a number of bytes, or such as 5GB: "
            "write a number, with KB, MB or GB behind it if they are meant"
        )
    return int(size)


def human(size: int) -> str:
    """A number of bytes for people, in decimal units.

    size: bytes.
    """
    return f"{size / 1e9:.2f} GB" if size >= 999.5e6 else f"{size / 1e6:.0f} MB"


def _number(folder: Path, name: str) -> int | None:
    try:
        text = (folder / name).read_text()
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None  # "max" means that there is no limit


def _stat(folder: Path, names: tuple[str, ...]) -> list[int]:
    try:
        lines = (folder / "memory.stat").read_text().split("\n")
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith(names)]
