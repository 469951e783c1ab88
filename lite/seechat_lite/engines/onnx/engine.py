"""The default engine: ONNX Runtime executes the vision graph and the decoder graph of a bundle.

The key/value cache is one buffer per layer and part, as long as the context. The decoder's past and
present are both bound to it, so that no step copies it. It lives as long as one answer. If the
model is causal, it may be kept, and so may those of other conversations (see engines.kept). On a
GPU it stays there between the steps and lives as long as the engine.

Answers that are written together have their caches in slots (see engines.slots), on the CPU.
Graphs that were exported before there were slots take one answer at a time.

The context of a ChatGLM prompt is one bidirectional call; everything from <sop> on is causal (see
seechat_export.chatglm_graph). All of a LLaMA prompt is causal. The embedding table is never loaded:
the few rows that a prompt needs are read from its file.

On a GPU the bundle's second graph runs, in float16, if the bundle has one. With CUDA a step of one
token is recorded.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from seechat_lite import memory
from seechat_lite.allocation import trim_heap, untouched
from seechat_lite.engines.base import (
    Cancelled,
    EngineOptions,
    check_pixels,
    check_room,
    embedded,
    fitting,
)
from seechat_lite.engines.kept import KeptCaches
from seechat_lite.engines.onnx.devices import (
    Recorded,
    find_device,
    open_session,
    out_of_memory,
    run_options,
)
from seechat_lite.engines.onnx.memory import (
    OnnxPlan,
    advice,
    bundle_plan,
    cache_bytes,
    check_memory,
    float_bytes_on_gpu,
)
from seechat_lite.engines.onnx.slots import Slots
from seechat_lite.engines.onnx.vision import OnnxVision
from seechat_lite.lm_families import TRAITS
from seechat_lite.memory import MemoryPlan
from seechat_lite.native import Native, guarded, guarded_block
from seechat_lite.onnx_runtime import ort
from seechat_lite.prompt import Prompt
from seechat_lite.rotary import rotary_rows
from seechat_lite.source import Source
from seechat_weights.bundle.arrays import BundleArrays
from seechat_weights.bundle.onnx_graph import check_decoder
from seechat_weights.bundle.precisions import PRECISIONS, stored_precision
from seechat_weights.config import LMConfig
from seechat_weights.errors import EngineError, MemoryPlanError
from seechat_weights.lm.families import LM_FAMILIES

log = logging.getLogger(__name__)


class OnnxEngine(Native):
    """See engines.base.Engine; devices are those of engines.onnx.devices.find_device."""

    reads_checkpoints = False
    own_options = frozenset[str]()
    _cancelled = False
    _options: ort.RunOptions | None = None  # of the running call and the next calls

    @guarded
    def __init__(
        self, source: Source, *, context: int, options: EngineOptions, plan: MemoryPlan
    ) -> None:
        self.context = context
        self._folder, self._manifest = source.path, source.manifest
        self._device = find_device(options.device)
        assert isinstance(plan, OnnxPlan)
        self._plan, self._budget = plan, options.max_memory
        options = replace(options, keep_vision=plan.keep_vision)
        self._files = source.opened_files()
        self._vision = OnnxVision(source, options, self._files)
        half = plan.gpu == 2 or options.dtype == "fp16"
        self._dtype = np.dtype("f2" if half else "f4")  # of the decoder's inputs
        self._records = half and self._device.kind == "cuda"
        with self._memory_planned():
            self._decoder: ort.InferenceSession | None = self._open_decoder(options, half=half)
        self._read_arrays()
        self._begin_empty()
        if plan.kept:
            lm, precision = self._manifest.lm, PRECISIONS[self._manifest.decoder.precision]
            self._kept = KeptCaches(
                self._new_cache,
                _copy_cache,
                token_bytes=cache_bytes(lm, precision, 1),
                budget=plan.kept,
                single=self._device.on_gpu,
            )
        self._fork = "never" if self._device.on_gpu else "idle"

    @classmethod
    @guarded_block()
    def plan(cls, source: Source, *, context: int, options: EngineOptions) -> OnnxPlan:
        manifest, device = source.manifest, find_device(options.device)
        seeing = find_device(options.vision_device or options.device)
        dtypes = ("fp32", "fp16") if manifest.decoder.half in manifest.files else ("fp32",)
        if options.dtype not in (None, *dtypes):
            raise EngineError(
                f"{source.path}: dtype is {options.dtype!r}; with this engine the bundle computes "
                f"in {' or '.join(dtypes)}: choose that, or export it again"
            )
        if options.dtype == "fp16" and device.kind == "cpu":
            log.warning(
                "fp16 on the CPU is slower than fp32 with this engine and saves no memory: it is "
                "for GPUs"
            )
        return bundle_plan(
            manifest,
            context=context,
            keep_vision=options.keep_vision,
            kept_cache=options.kept_cache,
            gpu=float_bytes_on_gpu(manifest, device.kind, options.dtype),
            vision_gpu=float_bytes_on_gpu(manifest, seeing.kind, options.dtype),
        )

    @classmethod
    @guarded_block()
    def check(cls, plan: MemoryPlan, source: Source, *, options: EngineOptions) -> None:
        assert isinstance(plan, OnnxPlan)
        check_memory(plan, source.manifest, budget=options.max_memory)

    @classmethod
    def runtime(cls) -> str:
        return f"onnxruntime {ort.__version__}"

    def step_bytes(self, tokens: int) -> int | None:
        if self._plan.gpu:
            return None
        lm, decoder = self._manifest.lm, self._manifest.decoder
        form = PRECISIONS[decoder.precision]
        weights = self._manifest.files[f"{decoder.graph}.data"].bytes * form.widening
        return weights + cache_bytes(lm, form, tokens)

    def _open_decoder(self, options: EngineOptions, *, half: bool) -> ort.InferenceSession:
        lm, decoder = self._manifest.lm, self._manifest.decoder
        exact = PRECISIONS[decoder.precision].exact
        if self._plan.gpu and exact:  # there GroupQueryAttention needs half precision
            log.warning(
                "%s: a GPU leaves attention in float32 to the CPU, which is slow: "
                "export at another precision, or use the torch engine",
                self._manifest.name,
            )
        graph = decoder.half if half else decoder.graph
        check_decoder(self._folder, self._manifest, graph)
        return open_session(
            self._folder / graph,
            self._device,
            {
                "inputs_embeds": (None, None, lm.hidden_size),
                **dict.fromkeys(_cache_names(lm), (None, lm.kv_heads, None, None)),
                "logits": (None, lm.vocab_size),
            },
            threads=options.threads,
            exact=options.dtype == "fp32" or exact,
            record=self._records,
            limit=options.max_memory and options.max_memory - self._plan.cache,
        )

    def _read_arrays(self) -> None:
        """Read what the graph does not hold: embeddings, angles and a prefix."""
        arrays = BundleArrays(self._folder, self._manifest)
        self._arrays: BundleArrays | None = arrays
        lm = self._manifest.lm
        self._rotary = TRAITS[lm.family].tables(lm, self.context + 1)
        prefix = arrays.prefix  # from here on [tokens, layers, key and value, heads, head]
        self._prefix = np.empty((0,)) if prefix is None else np.moveaxis(prefix, 3, 0)

    def _begin_empty(self) -> None:
        """Prepare names, shapes and counters of a cache that does not exist yet."""
        decoder = self._manifest.decoder
        precision = stored_precision(
            decoder.precision, head_bits=decoder.head_bits, zeros=decoder.zeros
        )
        cache = next(i for i in self._opened().get_inputs() if i.name == "past_key_0")
        self._head = cache.shape[3]
        self._cache_dtype = np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2"}[cache.type])
        self._cache: dict[str, ort.OrtValue] = {}  # by the names of the graph's past inputs
        self._array: np.ndarray | None = None  # what it lies in, see _Buffers
        self._kept: KeptCaches[_Buffers] | None = None  # None: nothing is kept between answers
        self.held_tokens = 0
        self._on_gpu: dict[str, ort.OrtValue] = {}  # the same on a GPU, where it outlives an answer
        self._recorded: Recorded | None = None
        self._binding: ort.IOBinding | None = self._opened().io_binding()
        self._takes_rows = any(i.name == "rotary_row" for i in self._opened().get_inputs())
        self.batches = self._takes_rows and not self._device.on_gpu
        self._slots: Slots | None = None
        self._length = 0  # tokens in the cache, those of a prefix included
        # of the token that the next step appends
        self._next_position = np.zeros((TRAITS[self._manifest.lm.family].rows, 1), np.int64)
        # with more, the GPU would make floats of all 8-bit weights: 1.1 GB for the head
        self._at_once = 4 if self._device.on_gpu and precision.in_bytes else self.context

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self.check_open()
        check_pixels(pixels, self._manifest.vision, self._folder)
        with self._memory_planned():
            return self._vision.encode(pixels)

    def read_question(self, seen: np.ndarray, question_ids: Sequence[int]) -> np.ndarray:
        self.check_open()
        with self._memory_planned():
            return self._vision.read_question(seen, question_ids)

    @guarded
    def prefill(self, prompt: Prompt) -> np.ndarray:
        embeds, positions, split = embedded(
            prompt, self._manifest.lm, context=self.context, rows=self._rows
        )
        with self._memory_planned():
            self.held_tokens = start = self._begin(prompt)
            if split:
                self._run(embeds[:split], positions[:, :split], bidirectional=True)
                start = split
            logits = self._run(embeds[start:], positions[:, start:])[0]
        if self._kept:
            self._kept.read()
        self._next_position = positions[:, -1:].copy()
        self._next_position[-1] += 1
        self._options = run_options()  # steps are short: they keep their memory for the next one
        return logits

    def step(self, token_id: int) -> np.ndarray:
        return self.extend([token_id])[0]

    @guarded
    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        if not self._cache:
            raise EngineError(
                "step() before prefill(); expected a prompt to continue: call prefill() first"
            )
        free = self.context + len(self._prefix) - self._length
        check_room(len(token_ids), free, self.context)
        logits = []
        with self._memory_planned():
            for i in range(0, len(token_ids), self._at_once):
                part = token_ids[i : i + self._at_once]
                positions = self._next_position.repeat(len(part), axis=1)
                positions[-1] += np.arange(len(part))
                logits.append(self._run(self._rows(part), positions, rows=len(part)))
                self._next_position[-1] += len(part)
                if self._kept:
                    self._kept.append(part)
        return np.concatenate(logits)

    @guarded
    def rewind(self, tokens: int) -> None:
        self._length -= tokens  # nothing behind the length is ever read, only overwritten
        if self._kept:
            self._kept.rewind(tokens)
        self._next_position[-1] -= tokens

    @guarded
    def open_slots(self, count: int, *, tokens: int) -> int:
        if self._slots is not None or not self.batches:
            return 0
        lm, precision = self._manifest.lm, PRECISIONS[self._manifest.decoder.precision]
        tokens = len(self._prefix) + min(tokens, self.context)
        each, free = cache_bytes(lm, precision, tokens), memory.available_memory()
        count = fitting(count, each, self._plan, free=free, budget=self._budget)
        if count:
            shape = (lm.kv_heads, tokens, self._head)
            self._slots = Slots(_cache_names(lm), count, shape, self._cache_dtype)
        log.info("%d answers at once, with caches of %s each", count, memory.human(each))
        return count

    def close_slots(self) -> None:
        with self._lock:
            self._slots = None

    @guarded
    def adopt(self) -> int:
        if not self._cache:
            raise EngineError(
                "adopt() before prefill(); expected an answer that has begun: call prefill() first"
            )
        assert self._array is not None
        slot = self._opened_slots().adopt(self._array, self._length, self._next_position)
        self._empty()
        return slot

    @guarded
    def step_slots(self, token_ids: Mapping[int, int]) -> dict[int, np.ndarray]:
        slots = self._opened_slots()
        embeds = self._rows(slots.tokens(token_ids))
        lengths = np.array(slots.lengths, np.int32)
        feeds = self._feeds(embeds[:, None], slots.positions, lengths=lengths)
        self._options = run_options()
        binding = slots.binding(self._opened())
        with self._memory_planned():
            logits = self._called(binding, feeds, len(embeds), tokens=int(lengths.max()))
        slots.stepped()
        return dict(zip(slots.used, logits, strict=True))

    def free_slot(self, slot: int) -> None:
        with self._lock:
            if self._slots is not None:  # they are gone if the engine was closed
                self._slots.free(slot)

    def cancel(self) -> None:
        self._cancelled = True  # first, because a prompt may be changing the options now
        if self._options:
            self._options.terminate = True

    def reset(self) -> None:
        with self._lock:
            if not self._ended:
                self._empty()
            self._cancelled = False

    def _empty(self) -> None:
        """Free the cache, unless it is kept; a GPU keeps its own in any case."""
        if self._binding:
            self._binding.clear_binding_inputs()  # the cache goes with its bindings
            self._binding.clear_binding_outputs()
        self._cache, self._array = {}, None
        self._length = 0
        trim_heap()

    def _release(self) -> None:
        self._empty()
        self._on_gpu.clear()
        self._kept = self._slots = None
        # a binding holds its session, embeddings hold their file
        self._recorded = self._binding = self._decoder = self._arrays = None
        self._vision.close()
        self._files.close()

    def _opened(self) -> ort.InferenceSession:
        self.check_open()
        assert self._decoder
        return self._decoder

    def _opened_slots(self) -> Slots:
        if self._slots is None:
            raise EngineError("the engine has no slots; expected some: call open_slots() first")
        return self._slots

    def _begin(self, prompt: Prompt) -> int:
        """Begin with a cache that holds only the prefix, or of the prompt what is kept of it.

        Returns how many of the prompt's tokens that is.
        """
        assert self._binding
        self._empty()
        held = 0
        if self._kept:
            buffers, held = self._kept.begin(prompt)
            self._cache, self._array = buffers.values, buffers.array
        elif self._on_gpu:
            self._cache = dict(self._on_gpu)
        else:
            buffers = self._new_cache()
            self._cache, self._array = buffers.values, buffers.array
            if self._device.on_gpu:
                self._on_gpu, self._array = dict(self._cache), None
        self._bind_cache(self._binding)
        self._length = len(self._prefix) + held
        self._options = run_options(return_memory=True)
        return held

    def _new_cache(self) -> "_Buffers":
        """Buffers that hold the prefix."""
        lm, values = self._manifest.lm, {}
        shape = (1, lm.kv_heads, len(self._prefix) + self.context, self._head)
        buffers = untouched((2 * lm.num_layers, *shape), self._cache_dtype)
        for i, name in enumerate(_cache_names(lm)):
            if len(self._prefix):  # [tokens, layers, key and value, heads, head]
                layer, part = divmod(i, 2)
                prefix = self._prefix[:, layer, part].swapaxes(0, 1)
                buffers[i][0, :, : len(self._prefix)] = prefix
            values[name] = self._device.tensor(buffers[i])
        return _Buffers(values, buffers)

    def _bind_cache(self, binding: ort.IOBinding) -> None:
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), value)

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        """Word embeddings as they are stored, [tokens, hidden]."""
        assert self._arrays is not None
        return self._arrays.rows(ids)

    def _run(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        *,
        bidirectional: bool = False,
        rows: int = 1,
    ) -> np.ndarray:
        """Append tokens (embeddings [s, hidden], positions [rows, s]).

        Returns the logits of the last `rows` tokens, [rows, vocab]. Raises Cancelled.
        """
        feeds = self._feeds(
            embeds[None],
            positions,
            lengths=np.array([self._length + len(embeds) - 1], np.int32),
            bidirectional=bidirectional,
            rows=rows,
        )
        assert self._binding
        logits = self._called(self._binding, feeds, rows, tokens=self._length)
        self._length += len(embeds)
        return logits

    def _feeds(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        *,
        lengths: np.ndarray,
        bidirectional: bool = False,
        rows: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The graph's inputs beside the cache.

        embeds: [b, s, hidden]: s tokens of one sequence, or one of each of b sequences.
        positions: [rows, b * s].
        lengths: int32 [b], tokens before the last new one of each sequence.
        rows: how many of the last tokens' logits are wanted; None for all.
        """
        new = positions.shape[1]
        cos, sin = rotary_rows(self._rotary, positions, self._head // 2)
        feeds = {
            "inputs_embeds": embeds.astype(self._dtype, copy=False),
            "rotary_cos": cos.astype(self._dtype, copy=False),
            "rotary_sin": sin.astype(self._dtype, copy=False),
            "last_index": lengths,
            "total_length": np.array(lengths.max() + 1, np.int32),
            "logit_rows": np.arange(new - (new if rows is None else rows), new),
        }
        if self._takes_rows:
            feeds["rotary_row"] = np.arange(new).reshape(embeds.shape[:2])
        if not LM_FAMILIES[self._manifest.lm.family].causal:
            feeds["bidirectional"] = np.array(bidirectional)
        return {name: np.asarray(array, order="C") for name, array in feeds.items()}

    def _called(
        self, binding: ort.IOBinding, feeds: dict[str, np.ndarray], rows: int, *, tokens: int
    ) -> np.ndarray:
        """Call the decoder; returns logits [rows, vocab].

        tokens: in the cache, for errors.

        Raises Cancelled, EngineError.
        """
        if self._cancelled:
            raise Cancelled
        self._files.check()
        try:
            return self._call(binding, feeds, rows)
        except Exception as e:  # ONNX Runtime raises its own unrelated exception types
            if self._cancelled:
                raise Cancelled from None
            raise EngineError(
                f"ONNX Runtime failed after {tokens} tokens ({str(e).splitlines()[0]}); "
                "expected a step: "
                "if memory was short, load the model with a smaller context"
            ) from e

    def _call(self, binding: ort.IOBinding, feeds: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """Call the decoder once; a recorded step runs if it appends one token to cached tokens."""
        decoder = self._opened()
        alone = self._records and len(feeds["rotary_cos"]) == 1
        if alone and self._recorded and self._recorded.proven:
            return self._recorded.run(feeds)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        logits = np.empty((rows, self._manifest.lm.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        decoder.run_with_iobinding(binding, self._options)
        if alone:
            self._prove(feeds, logits)
        return logits

    def _prove(self, feeds: dict[str, np.ndarray], logits: np.ndarray) -> None:
        """Run a step again, recorded. If it gives other logits, nothing more is recorded."""
        try:
            if self._recorded is None:
                binding = self._opened().io_binding()
                self._bind_cache(binding)
                self._recorded = Recorded(
                    self._opened(),
                    self._device,
                    binding,
                    feeds,
                    capacity=self.context + len(self._prefix),
                    vocab_size=self._manifest.lm.vocab_size,
                )
            self._records = self._recorded.agrees(feeds, logits)
            said = "they would give other numbers"
        except Exception as e:  # ONNX Runtime raises its own unrelated exception types
            self._records, said = False, str(e).splitlines()[0]
        if not self._records:
            log.warning("steps are not recorded: %s", said)
            self._recorded = None

    @contextmanager
    def _memory_planned(self) -> Iterator[None]:
        """Turn a GPU's lack of memory into an error that says what to do."""
        try:
            yield
        except Exception as e:  # ONNX Runtime raises its own unrelated exception types
            if not self._plan.gpu or not (said := out_of_memory(e)):
                raise
            how = advice(self._plan, self._manifest, self._plan.total - 1, last="free some of it")
            raise MemoryPlanError(
                f"the GPU's memory is short ({said}); {self._manifest.name} needs {self._plan}: "
                f"{how.text}",
                options=how.options,
                calls=how.calls,
            ) from e


@dataclass(frozen=True)
class _Buffers:
    """Keys and values of one cache.

    values: [1, heads, context, head] each, by the names of the graph's past inputs.
    array: on the CPU, what they lie in, [layers * 2, 1, heads, context, head].
    """

    values: dict[str, ort.OrtValue]
    array: np.ndarray


def _copy_cache(source: _Buffers, target: _Buffers, tokens: int) -> None:
    target.array[..., :tokens, :] = source.array[..., :tokens, :]


def _cache_names(lm: LMConfig) -> list[str]:
    """The names of the graph's past inputs: key and value of every layer in turn."""
    return [f"past_{part}_{i}" for i in range(lm.num_layers) for part in ("key", "value")]
