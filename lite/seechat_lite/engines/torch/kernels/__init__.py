"""The only way to the Triton kernels: `kernels.linear` and `kernels.attention`.

Both are imported at their first use, and only if fused() says that they run: only torch for GPUs
includes Triton.
"""

import logging
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from seechat_lite.engines.torch.kernels import attention as attention
    from seechat_lite.engines.torch.kernels import linear as linear

log = logging.getLogger(__name__)

# the most rows that the kernels multiply by codes; for more, the weight is made first
KERNEL_ROWS = 16


@cache
def fused(device: torch.device) -> bool:
    """Whether the kernels run on a device; for a GPU, a log line says why not.

    device: the device.
    """
    if device.type != "cuda":
        return False
    try:
        with torch.cuda.device(device):  # Triton fails here if there is no C compiler
            import_module("triton.runtime").driver.active.get_current_target()
    except Exception as e:  # anything may keep Triton from working
        log.warning(
            "Triton does not work here (%s): steps on %s run in plain torch, which is slower",
            (str(e) or type(e).__name__).splitlines()[0],
            device,
        )
        return False
    return True


def __getattr__(name: str) -> Any:
    if name not in ("attention", "linear"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
