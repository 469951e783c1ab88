"""Plans an export before it starts: time, memory, disk.

Sizes follow from the shapes. Time is measured: a few million of the actual weights are quantized,
written and checked as the export will do it. This takes about a second.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from seechat_export.quantize import stored_arrays
from seechat_lite.memory import available_memory, human
from seechat_lite.nn.block_quantization import dequantize_blocks
from seechat_weights.bundle.layout import TensorLayout, decoder_layout
from seechat_weights.bundle.precisions import Precision, smaller_precisions
from seechat_weights.config import LMConfig
from seechat_weights.errors import BundleError, MemoryPlanError
from seechat_weights.lm.checkpoint import ALL, Rows

PROCESS = 260_000_000  # bytes of Python, torch and ONNX Runtime themselves
SAMPLE = 1 << 23  # weights that are converted to measure the time
PROBE_BYTES = 1 << 26  # bytes written to measure the disk
PROBE = "probe.new"  # the file that they are written to
CHECK_TOKENS = 29  # tokens of the prompt that the check runs
SESSION = 1.2  # ONNX Runtime prepares and runs a layer in this many times torch's time


class Weights(Protocol):
    """A source of tensors: seechat_export.export.Source."""

    config: LMConfig

    def tensor(self, key: str, rows: Rows = ALL) -> Tensor: ...


@dataclass(frozen=True)
class Parts:
    """Bytes of a bundle's files, without the small ones."""

    weights: int
    embeddings: int
    vision: int

    @property
    def total(self) -> int:
        """Bytes of all files together."""
        return self.weights + self.embeddings + self.vision

    def __str__(self) -> str:
        names = [n for n in ("weights", "embeddings", "vision") if getattr(self, n)]
        return " + ".join(f"{n} {human(getattr(self, n))}" for n in names)


@dataclass(frozen=True)
class ExportPlan:
    """What an export will take.

    seconds: from now on.
    memory: bytes at the peak. Mapped input files are not counted, because the system takes their
        pages back when it needs them.
    disk: bytes of `parts` still to be written.
    parts: bytes of the bundle's files.
    free_memory, free_disk: bytes.
    """

    seconds: float
    memory: int
    disk: int
    parts: Parts
    free_memory: int
    free_disk: int

    def __str__(self) -> str:
        return (
            f"about {_duration(self.seconds)}, {human(self.memory)} of memory "
            f"({human(self.free_memory)} free), {human(self.disk)} on the disk "
            f"({human(self.free_disk)} free)"
        )


def make_plan(
    source: Weights,
    items: Sequence[TensorLayout],
    folder: Path,
    *,
    precision: Precision,
    block_size: int,
    parts: Parts,
    done: int,
    vision_memory: int = 0,
) -> ExportPlan:
    """Plan an export. This writes a file to measure the disk and removes it.

    source: the LM to export.
    items: the tensors to write.
    folder: where the bundle is written.
    precision: how weights are stored.
    block_size: inputs that share a scale.
    parts: bytes of the bundle's files.
    done: how many items are already written.
    vision_memory: bytes that the vision part takes at its peak, beyond the process itself.
    """
    speed = _measure(source, items, folder, precision, block_size, limit=parts.total)
    linear = [_weights(item) for item in items if item.kind == "linear"]
    convert = sum(_weights(item) for item in items[done:] if item.kind == "linear")
    there = sum(f.stat().st_size for f in folder.iterdir())
    disk = max(parts.total - there, 0)
    seconds = (
        convert * speed.convert
        + disk * speed.write
        + sum(linear) * speed.check
        + parts.total * speed.hash
        + parts.vision * 2 * speed.hash  # traced, written and run once
    )
    memory = max(memory_bytes(source.config, items, precision), PROCESS + vision_memory)
    free = shutil.disk_usage(folder).free
    return ExportPlan(seconds, memory, disk, parts, available_memory(), free)


def memory_bytes(config: LMConfig, items: Sequence[TensorLayout], precision: Precision) -> int:
    """The peak of writing and checking the LM, in bytes, without mapped files.

    config: the decoder's shape.
    items: the tensors to write.
    precision: how weights are stored.
    """
    stored = {item.key: sum(s.nbytes for s in item.stored) for item in items}
    # rearranged heads: the tensor is copied a few times, at most in float32
    write = max(stored[i.key] + (8 * _weights(i) if i.heads else 0) for i in items)
    layer = [item for item in items if item.key.startswith("layers.0.")]
    # the check holds one layer in float32 while its largest weight is still being computed
    check = 4 * sum(map(_weights, layer)) + 2 * max(map(_weights, layer))
    # ONNX Runtime keeps a product's weights in its own order, and widens float16 before that
    head = stored["lm_head.weight"] * precision.widening**2
    return PROCESS + max(write, check, head)


def check_room(plan: ExportPlan, config: LMConfig, precision: Precision, *, out: Path) -> None:
    """Check a plan against the free memory and the free disk.

    plan: the plan.
    config: the decoder's shape.
    precision: how weights are stored.
    out: the bundle's folder.

    Raises MemoryPlanError or BundleError, with the sums and with what would fit.
    """
    needs, free, options = "", 0, {}
    if plan.memory > plan.free_memory:
        error, advice = MemoryPlanError, "close other programs"
        needs, free = f"{human(plan.memory)} of memory at its peak", plan.free_memory
    elif plan.disk > plan.free_disk:
        error, advice = BundleError, "free some space or choose another place"
        parts = f"{plan.parts} = {human(plan.parts.total)}"
        needs, free = f"{human(plan.disk)} more on the disk (of {parts})", plan.free_disk
    else:
        return
    there = plan.parts.total - plan.disk  # other options would start over
    for form in smaller_precisions(precision.name):
        items = decoder_layout(config, form, 128 if form.block else 0)
        parts = replace(plan.parts, weights=items[-1].end)
        memory = memory_bytes(config, items, form)
        if memory <= plan.free_memory and parts.total <= plan.free_disk + there:
            small = f"{human(memory)} of memory, {human(parts.total)} on the disk"
            advice += f", or use precision {form.name} ({small})"
            options["precision"] = form.name
            break
    raise error(
        f"{out}: the export needs {needs}; {human(free)} are free: {advice}", options=options
    )


@dataclass(frozen=True)
class _Speed:
    """Seconds for a weight (convert, check) and for a byte (write, hash)."""

    convert: float
    write: float
    check: float
    hash: float


def _measure(
    source: Weights,
    items: Sequence[TensorLayout],
    folder: Path,
    precision: Precision,
    block_size: int,
    limit: int,
) -> _Speed:
    item = max((i for i in items if i.kind == "linear" and not i.heads), key=_weights)
    outputs, inputs = item.shape
    rows = min(-(-outputs // 3), max(1, SAMPLE // inputs))
    sample = replace(item, shape=(rows, inputs))

    # another part each time: the first access to a page costs more
    def part(number: int) -> Tensor:
        return source.tensor(item.key, slice(number * rows, (number + 1) * rows))

    def convert(number: int) -> list[Tensor]:
        return stored_arrays(sample, part(number), source.config, precision, block_size)

    def check(number: int) -> None:
        stored = [array.clone() for array in arrays]
        if item.bits:
            restored = dequantize_blocks(*stored[:2], bits=item.bits, inputs=inputs)
        else:
            restored = stored[0].float().t()
        x = torch.ones(CHECK_TOKENS, inputs)
        for weight in (restored, part(number).float()):
            F.linear(x, weight)

    def write(number: int) -> None:
        with probe.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    arrays = convert(0)  # once before timing, because the first call starts threads
    check(0)
    data = arrays[0].numpy().tobytes()
    data = (data * (PROBE_BYTES // len(data) + 1))[: min(PROBE_BYTES, limit)]
    probe = folder / PROBE
    speed = _Speed(
        convert=_time(convert, 1, 2) / (rows * inputs),
        write=_time(write, 1, 2) / len(data),
        check=_time(check, 1, 2) / (rows * inputs) * (1 + SESSION),
        hash=_time(lambda _: hashlib.sha256(data).digest(), 1) / len(data),
    )
    probe.unlink()
    return speed


def _time(work: Callable[[int], object], *numbers: int) -> float:
    """Seconds of the fastest of several calls: other work on the machine may slow one down."""
    times = []
    for number in numbers:
        start = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - start)
    return min(times)


def _weights(item: TensorLayout) -> int:
    return torch.Size(item.shape).numel()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min"
