"""The default engine: ONNX Runtime executes the vision graph and the decoder graph of a bundle.

The key/value cache is one buffer per layer and part, of the context's length, bound as the
decoder's past and present alike, so that no step copies it; it lives as long as one answer, and on
a GPU, where it stays between the steps, as long as the engine. The context of a prompt is one
bidirectional call, everything from <sop> on is causal (see seechat_export.graphs). The embedding
table is never loaded: the few rows a prompt needs are read from the memory-mapped file.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnxruntime as ort

from seechat_lite.engines.base import (
    Cancelled,
    EngineOptions,
    check_pixels,
    check_room,
    embedded,
)
from seechat_lite.engines.pages import new_mappings, release, releasing, trim_heap, untouched
from seechat_lite.errors import BundleError, EngineError
from seechat_lite.prompt import Prompt
from seechat_lite.rotary import rotary_rows, rotary_tables
from seechat_weights.bundle import LMConfig, Manifest

# names people use for ONNX Runtime's execution providers; any provider's full name works as well
DEVICES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


class OnnxEngine:
    """See engines.base.Engine; devices are keys of DEVICES or execution providers' names."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, context: int, options: EngineOptions
    ) -> None:
        self.context = context
        self._folder = folder
        self._manifest = manifest
        self._threads = options.threads
        self._providers = _providers(options.device)
        self._vision = OnnxVision(folder, manifest, options)
        lm = manifest.lm
        with new_mappings(folder / f"{manifest.decoder.graph}.data") as mapped:
            self._decoder: ort.InferenceSession | None = _session(
                folder / manifest.decoder.graph,
                self._providers,
                {
                    "inputs_embeds": (None, None, lm.hidden_size),
                    **dict.fromkeys(_cache_names("past", lm), (None, lm.num_heads, None, None)),
                    "logits": (None, lm.vocab_size),
                },
                threads=self._threads,
            )
        release(mapped)  # some stay mapped after they were copied for the kernels
        self._embeddings = np.memmap(
            folder / manifest.decoder.embeddings,
            dtype=manifest.decoder.embeddings_dtype,
            mode="r",
            shape=(lm.vocab_size, lm.hidden_size),
        )
        self._rotary = rotary_tables(lm.head_size, context + 1)
        cache = next(i for i in self._opened().get_inputs() if i.name == "past_key_0")
        self._head = cache.shape[3]
        self._prefix = _prefix(folder, manifest, self._head)
        self._cache_dtype = np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2"}[cache.type])
        self._cache: dict[str, ort.OrtValue] = {}  # by the graph's names of the past
        self._on_gpu: dict[str, ort.OrtValue] = {}  # the same, which there outlives an answer
        self._binding = self._opened().io_binding()
        self._options = ort.RunOptions()
        self._cancelled = False
        self._length = 0  # tokens in the cache, those of a prefix included
        self._next_position = np.zeros((2, 1), np.int64)  # of the token that the next step appends

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self._opened()
        check_pixels(pixels, self._manifest.vision, self._folder)
        return self._vision.encode(pixels)

    def prefill(self, prompt: Prompt) -> np.ndarray:
        embeds, positions, split = embedded(
            prompt, self._manifest.lm, context=self.context, rows=self._rows
        )
        self._begin()
        if split:
            self._run(embeds[:split], positions[:, :split], bidirectional=True)
        logits = self._run(embeds[split:], positions[:, split:])[0]
        self._next_position = positions[:, -1:].copy()
        self._next_position[1] += 1
        self._options = ort.RunOptions()  # steps are short: keep their memory from one to the next
        return logits

    def step(self, token_id: int) -> np.ndarray:
        return self.extend([token_id])[0]

    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        if not self._cache:
            raise EngineError("step() before prefill(): there is no prompt to continue")
        free = self.context + len(self._prefix) - self._length
        check_room(len(token_ids), free, self.context)
        positions = self._next_position.repeat(len(token_ids), axis=1)
        positions[1] += np.arange(len(token_ids))
        logits = self._run(self._rows(token_ids), positions, rows=len(token_ids))
        self._next_position[1] += len(token_ids)
        return logits

    def forget(self, tokens: int) -> None:
        self._length -= tokens  # what lies behind the length is never read, only overwritten
        self._next_position[1] -= tokens

    def cancel(self) -> None:
        self._cancelled = True  # first: a prompt may just be changing the options
        self._options.terminate = True

    def reset(self) -> None:
        self._empty()
        self._cancelled = False

    def _empty(self) -> None:
        """Free the cache."""
        self._binding.clear_binding_inputs()  # the cache goes with its bindings
        self._binding.clear_binding_outputs()
        self._cache.clear()
        self._length = 0
        trim_heap()

    def cached(self, part: str, layer: int) -> np.ndarray:
        """What the cache holds, [heads, tokens, head]; part is "key" or "value"."""
        return self._cache[f"past_{part}_{layer}"].numpy()[0, :, : self._length]

    def close(self) -> None:
        self.reset()
        self._on_gpu.clear()
        self._decoder = None
        self._vision.close()

    def _opened(self) -> ort.InferenceSession:
        if self._decoder is None:
            raise EngineError("the model is closed: load it again")
        return self._decoder

    def _begin(self) -> None:
        """An empty cache, but for the prefix."""
        lm = self._manifest.lm
        self._empty()
        shape = (1, lm.num_heads, len(self._prefix) + self.context, self._head)
        names = zip(_cache_names("past", lm), _cache_names("present", lm), strict=True)
        buffers = untouched((2 * lm.num_layers, *shape), self._cache_dtype)
        for i, (past, present) in enumerate(names):
            if len(self._prefix):  # [tokens, layers, key and value, heads, head]
                layer, part = divmod(i, 2)
                prefix = self._prefix[:, layer, part].swapaxes(0, 1)
                buffers[i][0, :, : len(self._prefix)] = prefix
            value = self._on_gpu.get(past)
            if value is None and self._providers[0] == DEVICES["cuda"]:
                value = self._on_gpu[past] = ort.OrtValue.ortvalue_from_numpy(buffers[i], "cuda", 0)
            value = self._cache[past] = value or ort.OrtValue.ortvalue_from_numpy(buffers[i])
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._length = len(self._prefix)
        self._options = _returning_memory()

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        """Word embeddings, float32 [tokens, hidden]."""
        return self._embeddings[ids].astype(np.float32)

    def _run(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        *,
        bidirectional: bool = False,
        rows: int = 1,
    ) -> np.ndarray:
        """Append tokens (embeddings [s, hidden], positions [2, s]).

        Returns the logits [rows, vocab] of the last ones. Raises Cancelled.
        """
        decoder = self._opened()
        if self._cancelled:
            raise Cancelled
        total = self._length + len(embeds)
        cos, sin = rotary_rows(self._rotary, positions, self._head // 2)
        feeds = {
            "inputs_embeds": embeds[None],
            "rotary_cos": cos,
            "rotary_sin": sin,
            "last_index": np.array([total - 1], np.int32),
            "total_length": np.array(total, np.int32),
            "bidirectional": np.array(bidirectional),
            "logit_rows": np.arange(len(embeds) - rows, len(embeds)),
        }
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits = np.empty((rows, self._manifest.lm.vocab_size), np.float32)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            decoder.run_with_iobinding(self._binding, self._options)
        except Exception as e:  # ONNX Runtime raises its own unrelated exception types
            if self._cancelled:
                raise Cancelled from None
            raise EngineError(
                f"ONNX Runtime failed after {self._length} tokens ({str(e).splitlines()[0]}): "
                "if memory was short, load the model with a smaller context"
            ) from e
        self._length = total
        return logits


class OnnxVision:
    """A bundle's vision graph, loaded with the first picture: text alone needs none of it."""

    def __init__(self, folder: Path, manifest: Manifest, options: EngineOptions) -> None:
        self._folder = folder
        self._manifest = manifest
        self._options = options
        self._providers = _providers(options.vision_device or options.device)
        self._session: ort.InferenceSession | None = None
        self._lock = threading.Lock()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings of pictures: float32 [n, 3, S, S] to float32 [n, tokens, hidden]."""
        vision = self._manifest.vision
        assert vision is not None
        size = vision.pixels.image_size
        # for one picture, preparing the weights takes longer than it saves, and twice the memory;
        # int8 products need it
        mapped = (
            not self._options.keep_vision
            and vision.precision in ("fp16", "fp32")
            and self._providers == [DEVICES["cpu"]]
        )
        with self._lock:
            session, ranges = self._session, []
            if session is None:
                with new_mappings(self._folder / vision.weights) as ranges:
                    session = _session(
                        self._folder / vision.graph,
                        self._providers,
                        {
                            "pixel_values": (None, 3, size, size),
                            "image_embeds": (None, vision.tokens, self._manifest.lm.hidden_size),
                        },
                        threads=self._options.threads,
                        as_written=mapped,
                    )
            self._session = session if self._options.keep_vision else None
        feeds = {"pixel_values": np.ascontiguousarray(pixels, np.float32)}
        with releasing(ranges) if mapped else nullcontext():
            (embeddings,) = session.run(["image_embeds"], feeds, _returning_memory())
        return np.asarray(embeddings)

    def close(self) -> None:
        self._session = None


def _cache_names(prefix: str, lm: LMConfig) -> list[str]:
    """The graph's names of the cache's buffers: key and value of every layer in turn."""
    return [f"{prefix}_{part}_{i}" for i in range(lm.num_layers) for part in ("key", "value")]


def _prefix(folder: Path, manifest: Manifest, head: int) -> np.ndarray:
    """A P-tuning prefix, [tokens, layers, key and value, heads, head]; no tokens without one."""
    lm, decoder = manifest.lm, manifest.decoder
    shape = (lm.num_layers, 2, lm.num_heads, decoder.prefix_tokens, head)
    if not decoder.prefix:
        return np.empty((0,), np.float32)
    stored = np.fromfile(folder / decoder.prefix, decoder.embeddings_dtype).reshape(shape)
    return np.moveaxis(stored, 3, 0)


def _returning_memory() -> ort.RunOptions:
    """Options of a run whose large activations go back to the system when it ends."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _providers(device: str) -> list[str]:
    """Execution providers to try, the CPU last."""
    available = ort.get_available_providers()
    if device == "auto":
        return [DEVICES["cpu"]]
    name = DEVICES.get(device.lower(), device)
    if name not in available:
        known = ", ".join(n for n in DEVICES if DEVICES[n] in available)
        hint = "; pip install seechat-lite[cuda]" if name == DEVICES["cuda"] else ""
        raise EngineError(
            f"device {device!r} is not in this ONNX Runtime; it offers: auto, {known}{hint}"
        )
    return list(dict.fromkeys([name, DEVICES["cpu"]]))


def _session(
    path: Path,
    providers: list[str],
    expected: Mapping[str, tuple[int | None, ...]],
    *,
    threads: int,
    as_written: bool = False,
) -> ort.InferenceSession:
    """Load a graph; `expected` are inputs and outputs that it must have, None for any size.

    as_written: not optimized; float16 weights stay in their mapped file until they are used.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors are raised; warnings about node placement help nobody
    options.intra_op_num_threads = threads
    # neither saves time: a plan of memory is kept for every length of prompt, and buffers that the
    # next layer can use again are held for the whole run, though the arena would lend them as well
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as e:  # ONNX Runtime raises its own unrelated exception types
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({str(e).splitlines()[0]}): "
            "check the bundle with `seechat info`, or export it again"
        ) from e
    found = {v.name: v.shape for v in [*session.get_inputs(), *session.get_outputs()]}
    for name, shape in expected.items():
        sizes = found.get(name, [])
        pairs = list(zip(sizes, shape, strict=False))  # sizes that vary are strings
        if len(sizes) != len(shape) or any(
            isinstance(f, int) and e not in (None, f) for f, e in pairs
        ):
            raise BundleError(
                f"{path}: {name} is {sizes or 'missing'}, the manifest expects "
                f"{['any' if e is None else e for e in shape]}: the graph is another model's; "
                "export the bundle again"
            )
    return session
