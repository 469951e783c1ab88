"""ONNX Runtime's devices, the sessions made on them, and steps recorded on a GPU."""

import contextlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seechat_lite.engines.onnx.memory import CARDS
from seechat_lite.onnx_runtime import ort
from seechat_weights.errors import BundleError, EngineError

# names people use for ONNX Runtime's execution providers; any provider's full name works as well
DEVICES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# flash, memory-efficient or plain attention (1 + 2 + 16). By default cuDNN's on GPUs from Hopper
# on, which makes a plan for every length of prompt
ATTENTION = 19
NO_MEMORY = re.compile(r"Failed to allocate memory.*|Available memory of .*|.*out of memory.*")
PROOFS = 2  # steps that are made both ways: the one that is recorded, and another
SAME = 0.05  # of the logits' standard deviation: what they may differ by


@dataclass(frozen=True)
class Device:
    """An execution provider, and which of its devices."""

    provider: str
    number: int = 0

    @property
    def kind(self) -> str:
        """Whose memory its tensors lie in, as OrtValue calls it."""
        return next((name for name in CARDS if DEVICES[name] == self.provider), "cpu")

    @property
    def on_gpu(self) -> bool:
        return self.kind in CARDS

    def tensor(self, array: np.ndarray) -> ort.OrtValue:
        """An array there: on a GPU a copy, else the array itself."""
        return ort.OrtValue.ortvalue_from_numpy(array, self.kind, self.number)


def find_device(name: str) -> Device:
    """A device by a name of DEVICES or its provider's, such as "cuda:1"; "auto" is the CPU.

    Raises EngineError where this ONNX Runtime has none such.
    """
    available = ort.get_available_providers()
    kind, colon, number = ("cpu" if name == "auto" else name).partition(":")
    device = Device(DEVICES.get(kind.lower(), kind), int(number) if number.isdecimal() else 0)
    if device.provider not in available:
        known = ", ".join(n for n in DEVICES if DEVICES[n] in available)
        gpu = "; onnxruntime-gpu has to take the place of onnxruntime (docs/gpu.md)"
        hint = gpu if device.kind == "cuda" else ""
        raise EngineError(
            f"device {name!r} is not in this ONNX Runtime; it offers: auto, {known}{hint}"
        )
    if colon and not (device.on_gpu and number.isdecimal()):
        raise EngineError(f"device is {name!r}; expected its name, or such as cuda:1: choose one")
    return device


def open_session(
    path: Path,
    device: Device,
    expected: Mapping[str, tuple[int | None, ...]],
    *,
    threads: int,
    as_written: bool = False,
    exact: bool = False,
    record: bool = False,
    limit: int | None = None,
) -> ort.InferenceSession:
    """Load a graph; `expected` are inputs and outputs that it must have, None for any size.

    as_written: not optimized; float16 weights stay in their mapped file until they are used.
    The rest is for CUDA. exact: float32 is multiplied as such. record: runs may be recorded (see
    Recorded). limit: bytes for weights and activations.

    Raises EngineError, or BundleError for another graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised; warnings about node placement help nobody
    options.intra_op_num_threads = threads
    # neither saves time: a plan of memory is kept for every length of prompt, and buffers that the
    # next layer can use again are held for the whole run, though the arena would lend them as well
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen = {"device_id": str(device.number)} if device.on_gpu else {}
    if device.kind == "cuda":
        chosen |= {
            "arena_extend_strategy": "kSameAsRequested",  # not to the next power of two
            "cudnn_conv_algo_search": "HEURISTIC",  # trying all pays for more than one convolution
            "use_tf32": str(int(not exact)),
            "sdpa_kernel": str(ATTENTION),
            "enable_cuda_graph": str(int(record)),
        }
        if limit is not None:
            chosen["gpu_mem_limit"] = str(max(limit, 1))
        with contextlib.redirect_stdout(sys.stderr):  # where it prints what it cannot find
            ort.preload_dlls()  # NVIDIA's libraries, from their Python packages
    providers = [(device.provider, chosen)]
    if device.provider != DEVICES["cpu"]:
        providers.append((DEVICES["cpu"], {}))  # takes what the device has no kernel for
    try:
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as e:  # ONNX Runtime raises its own unrelated exception types
        said = str(e).splitlines()[0].rpartition(" : ")[2]
        where = f"check the number of the device ({device.number}), " if device.number else ""
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({said}): {where}"
            "check the bundle with `seechat info`, or export it again"
        ) from e
    if device.provider not in session.get_providers():  # it goes on without, and only logs why
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot start {device.provider}: a library or driver, "
            "named above, is missing or another version; expected NVIDIA's driver and what "
            'pip install "onnxruntime-gpu[cuda,cudnn]" brings'
        )
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


def out_of_memory(error: BaseException) -> str:
    """What ONNX Runtime says of memory that it did not get; "" where something else is wrong."""
    found = NO_MEMORY.search(str(error.__cause__ or error))
    return found[0] if found else ""


class Recorded:
    """A decoder's step of one token as a CUDA graph, which finds everything where it lay before.

    ONNX Runtime records a session whose nodes are all on the GPU, and none of them control flow,
    where inputs and outputs are bound there too. On the host stays the total length, which chooses
    kernels: here it is the cache's. How far to read they learn on the GPU.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: Device,
        binding: ort.IOBinding,
        feeds: Mapping[str, np.ndarray],
        *,
        capacity: int,
        vocab_size: int,
    ) -> None:
        """binding: to a cache for `capacity` tokens, which stays where it is. feeds: of a step."""
        self._session, self._binding = session, binding
        self._inputs = {n: device.tensor(a) for n, a in feeds.items() if n != "total_length"}
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_cpu_input("total_length", np.array(capacity, np.int32))
        self._logits = device.tensor(np.empty((1, vocab_size), np.float32))
        binding.bind_ortvalue_output("logits", self._logits)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", "1")  # recorded with the first run
        self._proofs = 0

    @property
    def proven(self) -> bool:
        return self._proofs >= PROOFS

    def agrees(self, feeds: Mapping[str, np.ndarray], logits: np.ndarray) -> bool:
        """Whether a step gives `logits`, but for rounding."""
        self._proofs += 1
        difference = np.abs(self.run(feeds) - logits).max()
        return bool(difference <= SAME * logits.std())  # which NaN is not

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits, float32 [1, vocab]."""
        for name, value in self._inputs.items():
            value.update_inplace(feeds[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return self._logits.numpy()
