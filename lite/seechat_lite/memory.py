"""What a bundle will take in memory, known before anything is loaded.

The sums are what an engine on the CPU holds: weights as its kernels keep them, the key/value cache
when the context is full, the vision network, and a workspace for the longest prompt.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from seechat_lite.errors import MemoryPlanError
from seechat_weights.bundle import LMConfig, Manifest
from seechat_weights.precisions import PRECISIONS, Precision

MIN_CONTEXT = 16  # tokens; less holds no question and answer
RUNTIME = 80 << 20  # Python, numpy, Pillow and ONNX Runtime themselves
CACHE_BYTES = 4  # a number in the cache is float32

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

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.vision + self.workspace

    @property
    def parts(self) -> str:
        """The sums, for people."""
        names = ("weights", "cache", "vision", "workspace")
        return " + ".join(f"{name} {human(getattr(self, name))}" for name in names)

    def __str__(self) -> str:
        return f"{self.parts} = {human(self.total)} at a context of {self.context} tokens"


def plan(manifest: Manifest, *, context: int) -> MemoryPlan:
    """The memory plan of a bundle at a context of `context` tokens."""
    lm, precision = manifest.lm, PRECISIONS[manifest.decoder.precision]

    def stored(graph: str) -> int:  # a graph and the weights beside it
        return sum(f.bytes for name, f in manifest.files.items() if name.startswith(graph))

    vision = 0
    if manifest.vision:
        widen_vision = 2 if manifest.vision.precision == "fp16" else 1
        vision = stored(manifest.vision.graph) * widen_vision
    # of the widest layer's activations in a prompt that fills the context: the MLP's
    activations = context * (2 * lm.inner_size + 6 * lm.hidden_size) * 4
    return MemoryPlan(
        weights=stored(manifest.decoder.graph) * widening(precision),
        cache=cache_bytes(lm, context),
        vision=vision,
        workspace=RUNTIME + activations,
        context=context,
    )


def widening(precision: Precision) -> int:
    """How many times its stored size a weight takes: floats are computed with in float32."""
    return 2 if precision.dtype == "float16" else 1


def cache_bytes(lm: LMConfig, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    return 2 * lm.num_layers * lm.hidden_size * tokens * CACHE_BYTES


def available_memory() -> int:
    """Bytes this process may still take: of the machine, or of its container where that is less."""
    free = psutil.virtual_memory().available
    if sys.platform == "linux":
        for folder, limit, used, cached in CGROUPS:
            if (most := _number(folder, limit)) is not None:
                # files read lately count as used, though their pages are given back on demand
                taken = (_number(folder, used) or 0) - sum(_stat(folder, cached))
                free = min(free, most - max(taken, 0))
    return max(free, 0)


def check_memory(needed: MemoryPlan, manifest: Manifest) -> None:
    """Raise MemoryPlanError, with the sums and what would fit, if `needed` exceeds what is free."""
    free = available_memory()
    if needed.total <= free:
        return
    smaller = needed.context // 2
    while smaller >= 256 and plan(manifest, context=smaller).total > free:
        smaller //= 2
    advice = (
        f"load it with context={smaller} (--context {smaller})"
        if smaller >= 256
        else "export it at a lower precision, or close other programs"
    )
    raise MemoryPlanError(f"{manifest.name} needs {needed}; {human(free)} are free: {advice}")


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
