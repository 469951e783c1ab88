"""Finds ONNX Runtime's devices, opens sessions on them, and records steps on a GPU."""

import contextlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seechat_lite.engines.onnx.memory import GPUS
from seechat_lite.onnx_runtime import ort
from seechat_weights.arguments import refuse
from seechat_weights.errors import BundleError, EngineError

# short names of ONNX Runtime's execution providers; a provider's full name works too
DEVICES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
# flash, memory-efficient or plain attention (1 + 2 + 16). The default from Hopper on is cuDNN's,
# which makes a plan for every length of prompt
ATTENTION = 19
NO_MEMORY = re.compile(r"Failed to allocate memory.*|Available memory of .*|.*out of memory.*")
PROOFS = 2  # steps that run both ways: the recorded one, and one more
SAME = 0.05  # of the logits' standard deviation: the largest allowed difference


@dataclass(frozen=True)
class Device:
    """An execution provider and the number of its device."""

    provider: str
    number: int = 0

    @property
    def kind(self) -> str:
        """The memory that its tensors lie in, under OrtValue's name."""
        return next((name for name in GPUS if DEVICES[name] == self.provider), "cpu")

    @property
    def on_gpu(self) -> bool:
        return self.kind in GPUS

    def tensor(self, array: np.ndarray) -> ort.OrtValue:
        """An array on the device: a copy on a GPU, else the array itself.

        array: the array.
        """
        return ort.OrtValue.ortvalue_from_numpy(array, self.kind, self.number)


def find_device(name: str) -> Device:
    """Find a device.

    name: a name of DEVICES or of a provider, such as "cuda:1"; "auto" is the CPU.

    Raises EngineError if this ONNX Runtime does not have it, OptionError for a wrong number.
    """
    available = ort.get_available_providers()
    kind, colon, number = ("cpu" if name == "auto" else name).partition(":")
    device = Device(DEVICES.get(kind.lower(), kind), int(number) if number.isdecimal() else 0)
    if device.provider not in available:
        known = ", ".join(n for n in DEVICES if DEVICES[n] in available)
        gpu = ", or put onnxruntime-gpu in the place of onnxruntime (docs/gpu.md)"
        hint = gpu if device.kind == "cuda" else ""
        raise EngineError(
            f"device {name!r:.80} is not in this ONNX Runtime; expected one that it offers, auto, "
            f"{known}: take one of these{hint}"
        )
    if colon and not (device.on_gpu and number.isdecimal()):
        refuse("device", name, "its name, or such as cuda:1", "number GPUs from 0, others not")
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
    """Load a graph.

    path: the graph's file.
    device: where it runs.
    expected: the inputs and outputs that it must have, with their sizes; None for any size.
    threads: threads on the CPU; 0 for one a core.
    as_written: do not optimize; float16 weights stay in their mapped file until they are used.
    exact: for CUDA: multiply float32 as float32.
    record: for CUDA: runs may be recorded (see Recorded).
    limit: for CUDA: bytes for weights and activations.

    Raises EngineError, or BundleError for another graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised; warnings about node placement help nobody
    options.intra_op_num_threads = threads
    # neither saves time: a memory plan is kept for every length of prompt; it holds buffers that
    # the next layer could use again for the whole run, though the arena would lend them as well
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen = {"device_id": str(device.number)} if device.on_gpu else {}
    if device.kind == "cuda":
        chosen |= {
            "arena_extend_strategy": "kSameAsRequested",  # not to the next power of two
            "cudnn_conv_algo_search": "HEURISTIC",  # trying all costs too much for one convolution
            "use_tf32": str(int(not exact)),
            "sdpa_kernel": str(ATTENTION),
            "enable_cuda_graph": str(int(record)),
        }
        if limit is not None:
            chosen["gpu_mem_limit"] = str(max(limit, 1))
        with contextlib.redirect_stdout(sys.stderr):  # it prints which libraries it cannot find
            ort.preload_dlls()  # NVIDIA's libraries, from their Python packages
    providers = [(device.provider, chosen)]
    if device.provider != DEVICES["cpu"]:
        # runs the operators that the device has no kernel for
        providers.append((DEVICES["cpu"], {}))
    try:
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as e:  # ONNX Runtime raises its own unrelated exception types
        said = str(e).splitlines()[0].rpartition(" : ")[2]
        where = f"check the number of the device ({device.number}), " if device.number else ""
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({said}); expected a graph "
            f"for it: {where}"
            "check the bundle's files with identify(), or export it again",
            calls={"identify": {"path": path.parent}},
        ) from e
    # it goes on without the device and only logs why
    if device.provider not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot start {device.provider}: a library or driver, "
            "named above, is missing or another version; expected NVIDIA's driver and libraries: "
            "install what "
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
                f"{path}: {name} is {sizes or 'missing'}; the manifest expects "
                f"{['any' if e is None else e for e in shape]}: the graph is another model's, "
                "export the bundle again"
            )
    return session


def out_of_memory(error: BaseException) -> str:
    """What ONNX Runtime says of memory that it did not get; "" for any other error.

    error: the error.
    """
    found = NO_MEMORY.search(str(error.__cause__ or error))
    return found[0] if found else ""


class Recorded:
    """A decoder's step of one token as a CUDA graph; it needs everything at fixed addresses.

    ONNX Runtime records a session if all of its nodes are on the GPU, none of them is control flow,
    and inputs and outputs are bound on the GPU too. Only the total length stays on the host, where
    it chooses kernels; here it is the cache's capacity. The kernels read the true length on the
    GPU.
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
        """Prepare to record.

        binding: to a cache, which stays where it is.
        feeds: those of a step.
        capacity: tokens that the cache has room for.
        vocab_size: width of the logits.
        """
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
        """Whether a step gives the same logits, except for rounding.

        feeds: those of the step.
        logits: float32 [1, vocab].
        """
        self._proofs += 1
        difference = np.abs(self.run(feeds) - logits).max()
        return bool(difference <= SAME * logits.std())  # False for NaN

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run a step; returns its logits, float32 [1, vocab].

        feeds: those of the step.
        """
        for name, value in self._inputs.items():
            value.update_inplace(feeds[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return self._logits.numpy()


def run_options(*, return_memory: bool = False) -> ort.RunOptions:
    """Options of a run; return_memory gives large activations back to the system when it ends."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")  # do not record this run
    if return_memory:  # not a GPU's: recorded steps still use it
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
