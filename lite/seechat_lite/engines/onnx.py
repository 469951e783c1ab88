"""The default engine: ONNX Runtime executes the vision graph and the decoder graph of a bundle.

The key/value cache is one buffer per layer and part, of the context's length, bound as the
decoder's past and present alike, so that no step copies it. The context of a prompt is one
bidirectional call, everything from <sop> on is causal (see seechat_export.graphs). The embedding
table is never loaded: the few rows a prompt needs are read from the memory-mapped file.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from seechat_lite.errors import BundleError, ContextError, EngineError
from seechat_lite.prompt import Prompt, context_length, position_ids
from seechat_lite.rotary import rotary_rows, rotary_tables
from seechat_weights.bundle import Manifest

# names people use for ONNX Runtime's execution providers; any provider's full name works as well
DEVICES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


class OnnxEngine:
    """See engines.base.Engine. `device` is a key of DEVICES or an execution provider's name."""

    def __init__(self, folder: Path, manifest: Manifest, *, device: str, context: int) -> None:
        self.context = context
        self._folder = folder
        self._manifest = manifest
        self._providers = _providers(device)
        self._vision: ort.InferenceSession | None = None
        self._vision_lock = threading.Lock()
        lm = manifest.lm
        parts = [f"past_{part}_{i}" for part in ("key", "value") for i in range(lm.num_layers)]
        self._decoder: ort.InferenceSession | None = _session(
            folder / manifest.decoder.graph,
            self._providers,
            {
                "inputs_embeds": (None, None, lm.hidden_size),
                **dict.fromkeys(parts, (None, lm.num_heads, None, None)),
                "logits": (None, lm.vocab_size),
            },
        )
        self._embeddings = np.memmap(
            folder / manifest.decoder.embeddings,
            dtype=manifest.decoder.embeddings_dtype,
            mode="r",
            shape=(lm.vocab_size, lm.hidden_size),
        )
        self._rotary = rotary_tables(lm.head_size, context + 1)
        decoder = self._opened()
        self._binding = decoder.io_binding()
        cache = next(i for i in decoder.get_inputs() if i.name == "past_key_0")
        heads, head = cache.shape[1], cache.shape[3]
        self._rotary_width = head // 2
        self._cache: dict[tuple[str, int], np.ndarray] = {}
        for layer in range(lm.num_layers):
            for part in ("key", "value"):
                # zeros from the allocator: pages that no token has reached take no memory
                buffer = np.zeros((1, heads, context, head), np.float32)
                self._cache[part, layer] = buffer
                value = ort.OrtValue.ortvalue_from_numpy(buffer)
                self._binding.bind_ortvalue_input(f"past_{part}_{layer}", value)
                self._binding.bind_ortvalue_output(f"present_{part}_{layer}", value)
        # the logits' buffer is bound once as well; every call overwrites it
        self._logits = np.zeros((1, lm.vocab_size), np.float32)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
        self._length = 0  # tokens in the cache
        self._next_position = np.zeros((2, 1), np.int64)  # of the token that the next step appends

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self._opened()
        vision = self._manifest.vision
        if vision is None:
            raise EngineError(
                f"{self._folder}: a text-only bundle, it cannot see pictures: "
                "export it with a vision tower, or ask without a picture"
            )
        size = vision.pixels.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise EngineError(
                f"pixels of shape {list(pixels.shape)}; expected [n, 3, {size}, {size}]: "
                "prepare them with seechat_lite.images.pixels"
            )
        with self._vision_lock:  # loaded with the first picture: text alone needs none of it
            session = self._vision or _session(
                self._folder / vision.graph,
                self._providers,
                {
                    "pixel_values": (None, 3, size, size),
                    "image_embeds": (None, vision.tokens, self._manifest.lm.hidden_size),
                },
            )
            self._vision = session
        feeds = {"pixel_values": np.ascontiguousarray(pixels, np.float32)}
        (embeddings,) = session.run(["image_embeds"], feeds)
        return np.asarray(embeddings)

    def prefill(self, prompt: Prompt) -> np.ndarray:
        lm, ids = self._manifest.lm, prompt.ids
        if len(ids) > self.context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context}: "
                "shorten the question, start a new chat or load the model with a larger context"
            )
        if min(ids) < 0 or max(ids) >= lm.vocab_size:
            raise ContextError(
                f"the prompt's ids reach from {min(ids)} to {max(ids)}; expected 0 to "
                f"{lm.vocab_size - 1}: it was made with another tokenizer"
            )
        positions = position_ids(
            ids, gmask_id=lm.gmask_id, mask_id=lm.mask_id, bos_id=lm.bos_id
        )  # int64 [2, tokens]
        embeds = self._rows(ids)
        for start, image in prompt.images:
            if image.shape[1] != lm.hidden_size:
                raise ContextError(
                    f"picture embeddings of width {image.shape[1]}; expected {lm.hidden_size}: "
                    "they were made by another model"
                )
            embeds[start : start + len(image)] = image
        split = context_length(ids, bos_id=lm.bos_id)
        self._length = 0
        if split:
            self._run(embeds[:split], positions[:, :split], bidirectional=True)
        logits = self._run(embeds[split:], positions[:, split:], bidirectional=False)
        self._next_position = positions[:, -1:].copy()
        self._next_position[1] += 1
        return logits

    def step(self, token_id: int) -> np.ndarray:
        if not self._length:
            raise EngineError("step() before prefill(): there is no prompt to continue")
        if self._length >= self.context:
            raise ContextError(
                f"the context of {self.context} tokens is full: "
                "start a new chat or load the model with a larger context"
            )
        logits = self._run(self._rows([token_id]), self._next_position, bidirectional=False)
        self._next_position[1] += 1
        return logits

    def cached(self, part: str, layer: int) -> np.ndarray:
        """What the cache holds, float32 [heads, tokens, head]; part is "key" or "value"."""
        return self._cache[part, layer][0, :, : self._length]

    def close(self) -> None:
        if self._decoder is not None:
            self._binding.clear_binding_inputs()  # the cache goes with its bindings
            self._binding.clear_binding_outputs()
            self._cache.clear()
        self._decoder = self._vision = None

    def _opened(self) -> ort.InferenceSession:
        if self._decoder is None:
            raise EngineError("the model is closed: load it again")
        return self._decoder

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        """Word embeddings, float32 [tokens, hidden]."""
        return self._embeddings[ids].astype(np.float32)

    def _run(self, embeds: np.ndarray, positions: np.ndarray, *, bidirectional: bool) -> np.ndarray:
        """Append tokens (embeddings [s, hidden], positions [2, s]); logits [vocab] of the last."""
        decoder = self._opened()
        total = self._length + len(embeds)
        cos, sin = rotary_rows(self._rotary, positions, self._rotary_width)
        feeds = {
            "inputs_embeds": embeds[None],
            "rotary_cos": cos,
            "rotary_sin": sin,
            "last_index": np.array([total - 1], np.int32),
            "total_length": np.array(total, np.int32),
            "bidirectional": np.array(bidirectional),
        }
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        decoder.run_with_iobinding(self._binding)
        self._length = total
        return self._logits[0].copy()


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
    path: Path, providers: list[str], expected: Mapping[str, tuple[int | None, ...]]
) -> ort.InferenceSession:
    """Load a graph; `expected` are inputs and outputs that it must have, None for any size."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors are raised; warnings about node placement help nobody
    # prepacked weights replace the originals: keeping the memory arena off returns their pages
    options.enable_cpu_mem_arena = False
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
