"""A GPU that is none: torch takes its tensors for CUDA's, and the CPU computes them.

Where a program forgets to move something, this GPU refuses as a real one does: tensors of two
devices in one operation, numpy of a tensor that lies there, a kernel that is handed memory of the
host, anything in a recorded graph that would have to wait. A recorded graph is a list of what was
called, and to replay it calls them again on the same memory. It says nothing of speed, and it
orders everything as one stream would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRETENDED = torch.device("cuda:0")
MEMORY = 24 << 30
FREE_TO_MIX = ("copy_", "_to_copy", "to", "index", "index_put_", "_index_put_impl_")
KERNELS = {"_linear", "_block_row", "_block_rows", "_sum_parts", "_dequantize"}
KERNELS |= {"_add_norm", "_add_rms_norm", "_append", "_attend", "_weigh"}
WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class OnGPU(torch.Tensor):
    """A tensor that says it lies on the GPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnGPU":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="meta",  # torch's own code knows no GPUs here
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PRETENDED

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGPU":
        return OnGPU(self.numbers.clone())


class PretendGPU(TorchDispatchMode):
    """Sends every operation here, so that what is asked of the GPU is made there."""

    recording: "Graph | None" = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Graph:
    """What torch.cuda.CUDAGraph is."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def replay(self) -> None:
        assert self.calls, "nothing was recorded"
        for call, args, kwargs, made in self.calls:
            again = call(*args, **kwargs)
            if made is not None:  # else what was given was changed
                for old, new in zip(tensors(made), tensors(again), strict=True):
                    old.copy_(new)


class Kernel:
    """A kernel of Triton's interpreter, launched on the GPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            for arg in args:
                if isinstance(arg, torch.Tensor) and not isinstance(arg, OnGPU):
                    raise ValueError(
                        "Pointer argument cannot be accessed from Triton (cpu tensor?)"
                    )
            plain = mapped(inside, args)
            record(self.kernel[grid], plain, kwargs, None)
            with torch._C._DisableTorchDispatch():  # what the interpreter does is no part of it
                self.kernel[grid](*plain, **kwargs)

        return launch


def tensors(value: Any) -> list[torch.Tensor]:
    """Those in arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [t for v in value for t in tensors(v)]


def mapped(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Arguments or results with other tensors."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: mapped(change, v) for k, v in value.items()}
    if type(value) not in (list, tuple):
        return value
    return type(value)(mapped(change, v) for v in value)


def inside(value: Any) -> Any:
    return value.numbers if isinstance(value, OnGPU) else value


def record(call: Any, args: Any, kwargs: Any, made: Any) -> None:
    if PretendGPU.recording is not None:
        PretendGPU.recording.calls.append((call, args, kwargs, made))


@torch.inference_mode(False)  # whose tensors torch would not let be views of others
@torch.no_grad()
def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    given = tensors((args, kwargs))
    there = [isinstance(t, OnGPU) for t in given]
    wanted = kwargs.get("device")
    to_gpu = any(there) if wanted is None else torch.device(wanted).type == "cuda"
    apart = any(there) and any(t.dim() and not on for t, on in zip(given, there, strict=True))
    if apart and name not in FREE_TO_MIX:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, {name}: "
            f"{[str(t.device) for t in given]}"
        )
    if PretendGPU.recording is not None and (
        name in WAITS or (given and not all(there) and any(there)) or (any(there) and not to_gpu)
    ):
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    kwargs = dict(kwargs)
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    plain, named = mapped(inside, args), mapped(inside, kwargs)
    made = func(*plain, **named)
    if func._schema.is_mutable:  # returns what was given
        record(func, plain, named, None)
        return args[0] if isinstance(made, torch.Tensor) else made
    memory = {t.untyped_storage().data_ptr() for t in tensors((plain, named))}
    own = all(t.untyped_storage().data_ptr() not in memory for t in tensors(made))
    if wanted is not None and any(there) != to_gpu and not own:  # it went to the other memory
        made = mapped(torch.clone, made)
    elif to_gpu and own:
        record(func, plain, named, made)
    return mapped(OnGPU, made) if to_gpu else made


class Stream:
    device = PRETENDED

    def __init__(self, device: Any = None) -> None: ...
    def wait_stream(self, other: "Stream") -> None: ...


@contextmanager
def recorded(graph: Graph, *unused: Any, **options: Any) -> Iterator[None]:
    assert PretendGPU.recording is None
    graph.calls.clear()
    PretendGPU.recording = graph
    try:
        yield
    finally:
        PretendGPU.recording = None


def few_large_programs(patch: pytest.MonkeyPatch) -> None:
    """Which Triton's interpreter is faster with."""
    from seechat_lite.engines.torch.kernels import attention, linear

    patch.setattr(linear, "OUTPUTS", 1024)
    patch.setattr(linear, "OUTPUTS_OF_ROWS", 512)
    patch.setattr(linear, "PROGRAMS", 2)
    patch.setattr(attention, "SPLITS", 2)


@contextmanager
def pretend_gpu(patch: pytest.MonkeyPatch, *, triton: bool) -> Iterator[None]:
    """A GPU, for as long as this lasts; `triton`: its kernels run, by the interpreter."""
    torch._C._set_only_lift_cpu_tensors(True)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device": lambda device: nullcontext(),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "max_memory_reserved": lambda: 0,
        "get_device_name": lambda device=None: "Pretended GPU",
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "graph_pool_handle": lambda: (0, 0),
        "CUDAGraph": Graph,
        "graph": recorded,
    }.items():
        patch.setattr(torch.cuda, name, value)
    if triton:
        from seechat_lite.engines.torch.kernels import attention, linear

        few_large_programs(patch)
        for module in (linear, attention):
            for name in KERNELS & vars(module).keys():
                patch.setattr(module, name, Kernel(getattr(module, name)))
    from seechat_lite.engines.torch import engine, kernels

    for module in (engine, kernels):
        patch.setattr(module, "fused", lambda device: triton and device.type == "cuda")
    try:
        with PretendGPU():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
