"""Plans the memory that a bundle takes with ONNX Runtime, before anything is loaded.

The sums are the most that is held. The weights, as the kernels keep them, are always held. Beside
them there is either the key/value cache of a full context with a workspace for the longest prompt,
or the vision network, if that is released after every picture; else all of these. On a GPU the
cache stays, and so does one that is kept between answers.

The plan counts memory that the system cannot take back. Pages of mapped files (weights that were
copied for the kernels, a vision network that runs as written) are resident in addition, as long as
nothing else needs them.
"""

from dataclasses import dataclass

import numpy as np

from seechat_lite import memory
from seechat_lite.lm_families import TRAITS
from seechat_lite.memory import (
    KEPT_VISION,
    Advice,
    MemoryPlan,
    check_room,
    human,
    smaller_context,
)
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.bundle.precisions import (
    PRECISIONS,
    VISION_PRECISIONS,
    Precision,
    smaller_precisions,
)
from seechat_weights.config import LMConfig
from seechat_weights.lm.families import LM_FAMILIES

GPUS = ("cuda", "dml")  # how the names of devices with their own memory begin
RUNTIME = 130 << 20  # Python, numpy, Pillow and ONNX Runtime themselves
VISION_WORKSPACE = 300 << 20  # what a picture's activations and one layer's weights take


@dataclass(frozen=True)
class OnnxPlan(MemoryPlan):
    """A MemoryPlan whose vision network may be released before the prompt is read."""

    keep_vision: bool = True  # False: it is released after every picture
    gpu: int = 0  # see float_bytes_on_gpu
    vision_gpu: int = 0  # the same for vision; if it runs elsewhere, its bytes are not counted
    kept: int = 0  # bytes of keys and values that may stay between answers

    @property
    def on_host(self) -> bool:
        return not self.gpu

    @property
    def total(self) -> int:
        if self.keep_vision:
            return super().total
        cache, stays = (0, self.cache) if self.gpu or self.kept else (self.cache, 0)
        return self.weights + stays + max(self.vision + RUNTIME, cache + self.workspace)

    @property
    def parts(self) -> str:
        if self.keep_vision or not self.vision:
            return super().parts
        sizes = [f"{n} {human(getattr(self, n))}" for n in ("weights", "cache", "workspace")]
        stay = 2 if self.gpu or self.kept else 1
        rest = f"({' + '.join(sizes[stay:])}, or before that vision {human(self.vision)})"
        return " + ".join([*sizes[:stay], rest])


def bundle_plan(
    manifest: Manifest,
    *,
    context: int,
    keep_vision: bool | None = None,
    kept_cache: int | None = None,
    gpu: int = 0,
    vision_gpu: int | None = None,
) -> OnnxPlan:
    """The memory plan of a bundle, for the device on which the decoder runs.

    manifest: the bundle's.
    context: tokens that the cache has room for.
    keep_vision: None keeps a vision network of up to KEPT_VISION bytes, and any on a GPU.
    kept_cache: see engines.base.EngineOptions.
    gpu: see float_bytes_on_gpu.
    vision_gpu: the same for vision; None for the decoder's device.
    """
    vision_gpu = gpu if vision_gpu is None else vision_gpu
    lm, precision = manifest.lm, PRECISIONS[manifest.decoder.precision]

    def stored(graph: str) -> int:  # a graph and the weights beside it
        return sum(f.bytes for name, f in manifest.files.items() if name.startswith(graph))

    vision = 0
    if manifest.vision:
        file, form = stored(manifest.vision.graph), VISION_PRECISIONS[manifest.vision.precision]
        if manifest.vision.question:
            file += stored(manifest.vision.question.graph)
        half = vision_gpu == 2 and manifest.vision.half in manifest.files
        vision = file * (1 if half else form.widening)  # prepared for speed
        if keep_vision is None:
            keep_vision = bool(vision_gpu) or vision <= KEPT_VISION
        if bool(vision_gpu) != bool(gpu):
            vision = 0
        elif not (keep_vision or form.integers or gpu):  # mapped, widened a layer at a time
            vision = VISION_WORKSPACE
    # what a layer of the longest prompt holds at once, as measured: that of MLP and attention,
    # and what an arena leaves between them
    inner = TRAITS[lm.family].inner * lm.inner_size
    activations = context * (inner + 18 * lm.hidden_size) * (gpu or 4)
    weights = stored(manifest.decoder.graph) * (1 if gpu == 2 else precision.widening)
    if precision.block and not gpu:  # the kernels keep the sum of every block beside its scale
        weights += weights * 4 // (manifest.decoder.block_size * precision.bits // 8 + 4)
    cache = cache_bytes(lm, precision, context + manifest.decoder.prefix_tokens)
    kept = 0
    if LM_FAMILIES[lm.family].causal:
        kept = cache if kept_cache is None else kept_cache
    return OnnxPlan(
        weights=weights,
        cache=max(cache, kept) if not gpu else cache,
        vision=vision,
        workspace=RUNTIME + activations,
        context=context,
        keep_vision=keep_vision is not False,
        gpu=gpu,
        vision_gpu=vision_gpu,
        kept=kept,
    )


def float_bytes_on_gpu(manifest: Manifest, device: str, dtype: str | None) -> int:
    """Bytes of a number that the default engine computes with; 0 for the CPU.

    manifest: the bundle's.
    device: its name.
    dtype: "fp32" if float16 is not wanted.
    """
    if not device.lower().startswith(GPUS):
        return 0
    return 2 if dtype != "fp32" and manifest.decoder.half in manifest.files else 4


def cache_bytes(lm: LMConfig, precision: Precision, tokens: int) -> int:
    """Bytes of keys and values; they are float32 in a float32 model, else float16.

    lm: the decoder's shape.
    precision: its precision.
    tokens: how many are cached.
    """
    number = np.dtype(precision.cache_dtype).itemsize
    return 2 * lm.num_layers * lm.kv_heads * lm.padded_head_size * tokens * number


def check_memory(needed: OnnxPlan, manifest: Manifest, *, budget: int | None = None) -> None:
    """Check a plan against the free memory and the budget.

    Only the budget of a GPU is known. The error has the sums and the next smaller setting that
    fits.

    needed: the plan.
    manifest: the bundle's.
    budget: bytes that the model may take.

    Raises MemoryPlanError.
    """
    check_room(
        needed,
        manifest.name,
        free=None if needed.gpu else memory.available_memory(),
        budget=budget,
        advice=lambda room, last: advice(needed, manifest, room, last=last),
    )


def advice(needed: OnnxPlan, manifest: Manifest, room: int, *, last: str) -> Advice:
    """The next smaller setting that takes little enough.

    needed: the plan.
    manifest: the bundle's.
    room: bytes that it may take.
    last: returned if no setting fits.
    """

    def fits(context: int, keep_vision: bool) -> bool:
        smaller = bundle_plan(
            manifest,
            context=context,
            keep_vision=keep_vision,
            kept_cache=None if needed.kept == needed.cache else needed.kept,
            gpu=needed.gpu,
            vision_gpu=needed.vision_gpu,
        )
        return smaller.total <= room

    smaller = smaller_context(needed.context, lambda n: fits(n, needed.keep_vision))
    if needed.keep_vision and needed.vision and fits(needed.context, False):
        return Advice.load("keep_vision", False)
    if smaller:
        return Advice.load("context", smaller)
    lower = smaller_precisions(manifest.decoder.precision)
    if not lower:
        return Advice(last)
    text, name = f"export it with precision {lower[0].name}, or {last}", lower[0].name
    return Advice(text, calls={"export": {"precision": name}})
