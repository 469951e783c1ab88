"""The engine for GPUs: torch executes a bundle of any precision, or published weights as they are.

The key/value cache is one buffer per layer and part, as long as the context. A prompt is one
forward of known size: ChatGLM's context sees itself both ways, and the rest is causal. A
step on a GPU is a recorded CUDA graph of Triton kernels (engines.torch.kernels); it reads the
number of tokens on the device. Elsewhere a step is plain torch. The embedding table is never
loaded: the few rows that a prompt needs are read from its file.

Answers that are written together have their caches in slots (see engines.slots). All linears of a
step run for all of them at once; attention runs for each by itself.
"""

import logging
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seechat_lite import memory
from seechat_lite.engines.base import (
    OPTIONAL,
    Cancelled,
    EngineOptions,
    check_pixels,
    check_room,
    embedded,
    fitting,
)
from seechat_lite.engines.kept import KeptCaches
from seechat_lite.engines.slots import Rows
from seechat_lite.engines.torch.cuda_graphs import Recorder
from seechat_lite.engines.torch.decoder import Decoder
from seechat_lite.engines.torch.kernels import KERNEL_ROWS, fused
from seechat_lite.engines.torch.memory import TorchPlan, advice, device_plan
from seechat_lite.engines.torch.ops import (
    Cache,
    KernelOps,
    PromptKernelOps,
    SlotKernelOps,
    SlotOps,
    StepOps,
    TorchOps,
    owned,
)
from seechat_lite.engines.torch.settings import torch_settings
from seechat_lite.engines.torch.vision import TorchVision
from seechat_lite.engines.torch.weights import CheckpointWeights, Weights, build, weights_of
from seechat_lite.lm_families import TRAITS
from seechat_lite.memory import MemoryPlan
from seechat_lite.native import Native, guarded, guarded_block
from seechat_lite.prompt import Prompt
from seechat_lite.source import Source
from seechat_weights.errors import EngineError, MemoryPlanError
from seechat_weights.files.audit import Place, check_half
from seechat_weights.files.in_use import FilesInUse
from seechat_weights.lm.families import LM_FAMILIES

if TYPE_CHECKING:
    from seechat_lite.engines.onnx.vision import OnnxVision

log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# torch's allocator and graphs, Triton, cuBLAS
NO_MEMORY = re.compile("out of memory|ALLOC_FAILED|can't allocate", re.IGNORECASE)


class TorchEngine(Native):
    """See engines.base.Engine; devices are torch's: "cpu", "cuda", "cuda:1".

    Raises EngineError (device, dtype, quantization), CheckpointError and MemoryPlanError.
    """

    reads_checkpoints = True
    own_options = frozenset(OPTIONAL)
    batches = True
    _cancelled = False

    @guarded
    def __init__(
        self,
        source: Source,
        *,
        context: int,
        options: EngineOptions,
        plan: MemoryPlan | None = None,
        weights: Weights | None = None,
    ) -> None:
        """Load the model; see engines.base.Engine.

        source, context, options: as there.
        plan: what plan() returned; None makes one.
        weights: weights other than those of `source`, such as a benchmark's.
        """
        if plan is None:
            plan = self.plan(source, context=context, options=options, weights=weights)
            self.check(plan, source, options=options)
        assert isinstance(plan, TorchPlan)
        self._plan = plan
        self.context = context
        self._source = source
        self._manifest = manifest = source.manifest
        self._options = options
        self._device = _device(options.device)
        self._dtype = _dtype(options.dtype, self._device)
        # held for the rows of embeddings
        self._weights: Weights | None = weights or _weights(source, options, self._dtype)
        self._head = self._weights.head
        prefix = self._weights.prefix
        self._prefix = None if prefix is None else torch.from_numpy(prefix).to(self._dtype)
        if self._prefix is not None and self._dtype == torch.float16:
            made_of = source.lm and source.lm.prefix_place
            check_half(self._prefix.numpy(), made_of or Place(source.path, "prefix"))
        self._before = _prefix_tokens(self._weights)
        # held while a picture is encoded, and while a step is recorded
        self._device_lock = threading.Lock()
        # a benchmark's weights are in no files
        self._files = None if weights else source.opened_files()
        self._vision = _sight(source, options, self._device, self._dtype, self._files)
        self._cache: Cache | None = None
        self.held_tokens = 0
        # what the cache keeps between answers; None: nothing
        causal = LM_FAMILIES[manifest.lm.family].causal and options.kept_cache != 0
        self._kept = KeptCaches(self._new_cache, _no_copy, **_ONE) if causal else None
        self._recorder: Recorder | None = None
        self._slots: Rows | None = None
        self._slot_cache: Cache | None = None
        self._slot_recorder: Recorder | None = None
        self._length = 0  # tokens in the cache, those of a prefix included; 0 before a prompt
        # positions of the token that comes next
        self._next = np.zeros((TRAITS[manifest.lm.family].rows, 1), np.int64)
        self._lend_memory()
        with self._memory_planned():
            self._decoder: Decoder | None = build(
                manifest.lm,
                self._weights,
                positions=context + 1,
                dtype=self._dtype,
                device=self._device,
                quantize=options.quantize,
                rounded_rotary=options.rounded_rotary,
            )
        # bitsandbytes' modules decide on the CPU what to do, so they cannot be recorded
        self._fused = fused(self._device)
        self._records = self._fused and options.quantize in (None, "int4")

    @classmethod
    @guarded_block()
    def plan(
        cls,
        source: Source,
        *,
        context: int,
        options: EngineOptions,
        weights: Weights | None = None,
    ) -> TorchPlan:
        device = _device(options.device)
        dtype = _dtype(options.dtype, device)
        if dtype == torch.bfloat16 and source.manifest.lm.family == "chatglm":
            log.warning(
                "bf16: ChatGLM-6B was trained in fp16, whose numbers are eight times finer; expect "
                "other answers than its authors'"
            )
        weights = weights or _weights(source, options, dtype)
        blocks = weights.blocks if isinstance(weights, CheckpointWeights) else {}
        vision, held = _sight(source, options, device, dtype), 0
        if isinstance(vision, TorchVision) and vision.device == device:
            held = vision.held
        found = device_plan(
            source.manifest,
            context=context + _prefix_tokens(weights),
            dtype_bytes=dtype.itemsize,
            quantize=options.quantize,
            blocks=blocks,
            vision=held,
        )
        in_bits = source.manifest.decoder.block_size or options.quantize or 4 in blocks.values()
        return replace(found, device=str(device), quantizable=not in_bits)

    @classmethod
    @guarded_block()
    def check(cls, plan: MemoryPlan, source: Source, *, options: EngineOptions) -> None:
        assert isinstance(plan, TorchPlan)
        free = memory.available_memory()
        if not plan.on_host:
            free, _ = torch.cuda.mem_get_info(plan.device)
        memory.check_room(
            plan,
            source.manifest.name,
            free=free,
            budget=options.max_memory,
            advice=lambda room, last: advice(plan, room, last=last),
            where=f" on {plan.device}",
        )

    @classmethod
    def runtime(cls) -> str:
        return f"torch {torch.__version__}"

    def step_bytes(self, tokens: int) -> int | None:
        return None  # it may run elsewhere

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self.check_open()
        check_pixels(pixels, self._manifest.vision, self._source.path)
        assert self._vision
        with self._device_lock, self._memory_planned(self._vision.unload):
            return self._vision.encode(pixels)

    def read_question(self, seen: np.ndarray, question_ids: Sequence[int]) -> np.ndarray:
        self.check_open()
        assert self._vision
        with self._device_lock, self._memory_planned(self._vision.unload):
            return self._vision.read_question(seen, question_ids)

    @guarded
    @torch.inference_mode()
    def prefill(self, prompt: Prompt) -> np.ndarray:
        embeds, positions, split = embedded(
            prompt, self._manifest.lm, context=self.context, rows=self._rows
        )
        with self._memory_planned():
            self.held_tokens = start = self._begin(prompt)
            embeds, positions = embeds[start:], positions[:, start:]
            at = torch.from_numpy(np.ascontiguousarray(positions)).to(self._device)
            place = TorchOps(at, self._length, context=split)
            if self._fused:
                place = PromptKernelOps(at, self._length_there(), place)
            logits = self._opened()(
                torch.from_numpy(embeds).to(self._dtype).to(self._device),
                place,
                self._cache,
                between_layers=self._raise_if_cancelled,
            )
            self._length += len(embeds)
            self._next = positions[:, -1:].copy()
            self._next[-1] += 1
            if self._kept:
                self._kept.read()
            return owned(logits[0])

    def step(self, token_id: int) -> np.ndarray:
        return self.extend([token_id])[0]

    @guarded
    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        if self._cache is None or not self._length:
            raise EngineError(
                "step() before prefill(); expected a prompt to continue: call prefill() first"
            )
        check_room(len(token_ids), self.context + self._before - self._length, self.context)
        rows = len(token_ids)
        positions = self._next.repeat(rows, axis=1)
        positions[-1] += np.arange(rows)
        self._raise_if_cancelled()
        embeds = torch.from_numpy(self._rows(token_ids))
        with self._memory_planned():
            if self._records and rows <= KERNEL_ROWS:
                if self._recorder is None:
                    self._recorder = Recorder(
                        self._opened(), self._cache, vocab_size=self._manifest.lm.vocab_size
                    )
                with nullcontext() if self._recorder.has(rows) else self._device_lock:
                    logits = self._recorder.run(embeds, positions, [self._length])
            else:
                at = torch.from_numpy(positions).to(self._device)
                place = TorchOps(at, self._length)
                if self._fused:
                    place = KernelOps(at, self._length_there())
                logits = owned(self._run(embeds, place, self._cache))
        self._length += rows
        self._next[-1] += rows
        if self._kept:
            self._kept.append(token_ids)
        return logits

    @guarded
    def rewind(self, tokens: int) -> None:
        self._length -= tokens  # nothing behind the length is ever read, only overwritten
        if self._kept:
            self._kept.rewind(tokens)
        self._next[-1] -= tokens

    @guarded
    @torch.inference_mode()
    def open_slots(self, count: int, *, tokens: int) -> int:
        if self._slots is not None:
            return 0
        capacity = self._before + min(tokens, self.context)
        lm, host = self._manifest.lm, self._plan.on_host
        each = 2 * lm.num_layers * lm.kv_heads * self._head * capacity * self._dtype.itemsize
        free = memory.available_memory() if host else torch.cuda.mem_get_info(self._device)[0]
        count = fitting(count, each, self._plan, free=free, budget=self._options.max_memory)
        if count:
            with self._memory_planned():
                self._slot_cache = self._new_cache(capacity, slots=count)
            self._slots = Rows(count, capacity)
        log.info("%d answers at once, with caches of %s each", count, memory.human(each))
        return count

    def close_slots(self) -> None:
        with self._lock:
            self._slots = self._slot_cache = self._slot_recorder = None
            self._return_memory()

    @guarded
    @torch.inference_mode()
    def adopt(self) -> int:
        if self._cache is None or not self._length:
            raise EngineError(
                "adopt() before prefill(); expected an answer that has begun: call prefill() first"
            )
        rows, cache = self._opened_slots()
        slot = rows.take(self._length, self._next)
        place, length = len(rows) - 1, self._length
        for there, here in zip(_buffers(cache), _buffers(self._cache), strict=True):
            there[place, :, :length] = here[:, :length]
        self._empty()
        return slot

    @guarded
    @torch.inference_mode()
    def step_slots(self, token_ids: Mapping[int, int]) -> dict[int, np.ndarray]:
        rows, cache = self._opened_slots()
        ids, positions, lengths = rows.tokens(token_ids), rows.positions, rows.lengths
        self._raise_if_cancelled()
        embeds = torch.from_numpy(self._rows(ids))
        with self._memory_planned():
            if self._records and len(ids) <= KERNEL_ROWS:
                if self._slot_recorder is None:
                    size = self._manifest.lm.vocab_size
                    self._slot_recorder = Recorder(
                        self._opened(), cache, vocab_size=size, slots=True
                    )
                recorded = self._slot_recorder.has(len(ids))
                with nullcontext() if recorded else self._device_lock:
                    logits = self._slot_recorder.run(embeds, positions, lengths)
            else:
                at = torch.from_numpy(positions).to(self._device)
                place = SlotOps(at, 0, lengths=lengths)
                if self._fused:
                    there = torch.tensor(lengths, dtype=torch.int32, device=self._device)
                    place = SlotKernelOps(at, there)
                logits = owned(self._run(embeds, place, cache))
        rows.stepped()
        return dict(zip(rows.used, logits, strict=True))

    @torch.inference_mode()
    def free_slot(self, slot: int) -> None:
        with self._lock:
            if self._slots is None or self._slot_cache is None:  # the engine was closed
                return
            source, target, tokens = self._slots.drop(slot)
            for buffer in _buffers(self._slot_cache) if tokens else ():
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def cancel(self) -> None:
        self._cancelled = True

    def reset(self) -> None:
        with self._lock:
            self._cancelled = False
            self._empty()

    def _empty(self) -> None:
        self._length = 0
        # recorded steps still use the memory of this one cache
        if self._recorder is None and self._kept is None:
            self._cache = None

    def _release(self) -> None:
        self._recorder = self._kept = None
        self._slots = self._slot_cache = self._slot_recorder = None
        self.reset()
        self._decoder = self._weights = None
        if self._device.type == "cuda" and self._options.max_memory is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)
        if self._vision is not None:
            self._vision.close()
        if self._files:
            self._files.close()
        self._return_memory()

    def _opened(self) -> Decoder:
        self.check_open()
        assert self._decoder
        return self._decoder

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        """Word embeddings as they are stored, [tokens, hidden]; the first thing of every call."""
        if self._files:
            self._files.check()
        assert self._weights
        return self._weights.rows(ids)

    def _length_there(self) -> Tensor:
        return torch.tensor([self._length], dtype=torch.int32, device=self._device)

    def _opened_slots(self) -> tuple[Rows, Cache]:
        if self._slots is None or self._slot_cache is None:
            raise EngineError("the engine has no slots; expected some: call open_slots() first")
        return self._slots, self._slot_cache

    def _new_cache(self, capacity: int | None = None, slots: int | None = None) -> Cache:
        return Cache.empty(
            self._manifest.lm,
            self._head,
            self._before + self.context if capacity is None else capacity,
            dtype=self._dtype,
            device=self._device,
            slots=slots,
        )

    def _begin(self, prompt: Prompt) -> int:
        """Begin with a cache that holds only the prefix, or of the prompt what is kept of it.

        Returns how many of the prompt's tokens that is.
        """
        held = 0
        if self._kept:
            self._cache, held = self._kept.begin(prompt)
        elif self._cache is None:
            self._cache = self._new_cache()
        if self._prefix is not None:
            for layer, (keys, values) in enumerate(self._prefix):
                self._cache.keys[layer][:, : self._before] = keys.to(self._device)
                self._cache.values[layer][:, : self._before] = values.to(self._device)
        self._length = self._before + held
        return held

    def _run(self, embeds: Tensor, place: StepOps, cache: Cache) -> Tensor:
        """Run a step that is not recorded; returns its logits, [rows, vocab].

        place: how tokens go through a layer.
        cache: the cache that it appends to.
        """
        return self._opened()(
            embeds.to(self._dtype).to(self._device),
            place,
            cache,
            logit_rows=len(embeds),
            between_layers=self._raise_if_cancelled,
        )

    def _lend_memory(self) -> None:
        """Limit torch to the budget."""
        budget = self._options.max_memory
        # also without a budget: an earlier engine's may still apply
        if self._device.type == "cuda":
            _, total = torch.cuda.mem_get_info(self._device)
            share = 1.0 if budget is None else min(budget / total, 1.0)
            torch.cuda.set_per_process_memory_fraction(share, self._device)

    @contextmanager
    def _memory_planned(self, release: Callable[[], None] | None = None) -> Iterator[None]:
        """Turn a lack of memory into an error that says what to do, and give the memory back.

        release: frees what is in use; None frees the cache.
        """
        # kernels and graphs belong to the current device; -1 leaves it as it is
        here = self._device.index if self._device.type == "cuda" else -1
        try:
            on_gpu = self._device.type == "cuda"
            settings = torch_settings(threads=self._options.threads, on_gpu=on_gpu)
            with torch.cuda.device(here), settings:
                yield
        except RuntimeError as e:
            if not NO_MEMORY.search(str(e)):
                raise
            first = str(e).splitlines()[0]
            # its frames hold the memory, and whoever catches our error would hold the frames
            traceback.clear_frames(e.__traceback__)
        else:
            return
        if release:
            release()
        else:
            self._recorder = None
            if self._kept:
                self._kept.clear()
                self._cache = None
            self.reset()
        self._return_memory()
        how = advice(self._plan, self._plan.total - 1, last="close other programs")
        raise MemoryPlanError(
            f"{self._device} is out of memory ({first}); {self._manifest.name} needs "
            f"{self._plan}: {how.text}",
            options=how.options,
            calls=how.calls,
        )

    def _return_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


# the one cache stays where it is: recorded steps use its memory
_ONE: dict[str, Any] = {"token_bytes": 0, "budget": 0, "single": True}


def _buffers(cache: Cache) -> list[Tensor]:
    return [*cache.keys, *cache.values]


def _no_copy(source: Cache, target: Cache, tokens: int) -> None:
    raise AssertionError("there is one cache")


def _weights(source: Source, options: EngineOptions, dtype: torch.dtype) -> Weights:
    return weights_of(source, quantize=options.quantize, exact=dtype == torch.float32)


def _prefix_tokens(weights: Weights) -> int:
    return 0 if weights.prefix is None else weights.prefix.shape[3]


def _sight(
    source: Source,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
    files: FilesInUse | None = None,
) -> "TorchVision | OnnxVision | None":
    """Return what encodes pictures, not yet loaded, or None if the model is text-only.

    A graph that is not one of our networks, such as the built-in model's, is left to ONNX Runtime.
    """
    if source.manifest.vision is None:
        return None
    if source.vision is None:
        # imported here: nothing else needs ONNX Runtime
        from seechat_lite.engines.onnx.vision import OnnxVision

        keep, place = options.keep_vision is not False, options.vision_device or "cpu"
        return OnnxVision(source, replace(options, keep_vision=keep, vision_device=place), files)
    if options.vision_device:
        device = _device(options.vision_device)
    # as published and trained, however few bits the language model has
    half = device.type == "cuda" and dtype != torch.float32
    wanted = torch.float16 if half else torch.float32
    keep = options.keep_vision
    return TorchVision(source.vision, device=device, dtype=wanted, keep=keep, files=files)


def _device(name: str) -> torch.device:
    """A torch device that exists; "auto" takes the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("another kind")
        device = torch.empty(1, device=device).device  # with its number
    except (RuntimeError, AssertionError):
        found = "auto, cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise EngineError(
            f"device {name!r:.80} is not there for torch {torch.__version__}; expected one that it "
            f"offers, {found}: take one of these"
        ) from None
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
