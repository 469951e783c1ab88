"""What this machine's processor can do, and which of ONNX Runtime's kernels that chooses."""

import platform
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np

# our name: its names in Linux's /proc/cpuinfo and in numpy, which asks the processor elsewhere
_INSTRUCTIONS = {
    "AVX2": ("avx2", "AVX2"),
    "AVX-VNNI": ("avx_vnni", ""),
    "AVX-512": ("avx512bw", "AVX512BW"),
    "AVX-512 VNNI": ("avx512_vnni", "AVX512VNNI"),
    "AVX-512 BF16": ("avx512_bf16", "AVX512BF16"),
    "AMX int8": ("amx_int8", ""),
    "NEON": ("asimd", "NEON"),
    "NEON dot product": ("asimddp", "ASIMDDP"),
    "NEON int8 matrices": ("i8mm", ""),
    "SVE": ("sve", "SVE"),
}
# integer kernels of MatMulNBits with 8-bit inputs, best first: what each needs
_INTEGER = ("AVX-512 VNNI", "AVX-512", "AVX-VNNI", "AVX2", "NEON int8 matrices", "NEON dot product")
_FLOAT = ("AVX-512", "AVX2", "NEON")


def name() -> str:
    """The processor's name, as far as the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Those of its instructions that matter for a model's products."""
    said = _cpuinfo()
    linux = set((said.get("flags") or said.get("Features") or "").split())
    if linux:
        return [ours for ours, (theirs, _) in _INSTRUCTIONS.items() if theirs in linux]
    # numpy chooses its own kernels by this table; outside Linux nothing else needs no library
    core = getattr(np, "_core", None)
    found = getattr(getattr(core, "_multiarray_umath", None), "__cpu_features__", {})
    return [ours for ours, (_, theirs) in _INSTRUCTIONS.items() if found.get(theirs)]


def kernels(bits: int, known: Collection[str]) -> str:
    """The kernels that ONNX Runtime chooses on the CPU.

    bits: of the weights, 4 or 8; 0 for floats.
    known: the processor's instructions().
    """
    best = next((k for k in (_INTEGER if bits else _FLOAT) if k in known), "portable code")
    if bits:
        return f"int{bits} weights with 8-bit inputs by {best}"
    return f"floats by {best}"


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    if sys.platform != "linux":
        return {}
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:  # a container may hide it
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
