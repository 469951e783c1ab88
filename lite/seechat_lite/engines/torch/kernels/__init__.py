"""The one door to the Triton kernels: `kernels.linear` and `kernels.attention`.

Both are imported when they are first used, and only where fused() says that they run: Triton is
part of torch for GPUs alone.
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

KERNEL_ROWS = 16  # that the kernels multiply by codes at most; of more, the weight is made first


@cache
def fused(device: torch.device) -> bool:
    """Whether the kernels run there; a log line says why not on a GPU."""
    if device.type != "cuda":
        return False
    try:
        with torch.cuda.device(device):  # without a C compiler, Triton finds out here
            import_module("triton.runtime").driver.active.get_current_target()
    except Exception as e:  # whatever keeps it from working
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
