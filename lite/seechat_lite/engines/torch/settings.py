"""Sets torch's process-wide settings to ours while we compute, then back to the host's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0  # running calls of all engines in all threads
_before: tuple[int, bool, bool] = (0, True, True)  # the settings before the first of them


@contextmanager
def torch_settings(*, threads: int, on_gpu: bool) -> Iterator[None]:
    """Compute with our settings. When the last such block has ended, the old settings are back.

    threads: on the CPU; 0 for as many as there are.
    on_gpu: do not use cuDNN's attention, which makes a plan for each length of prompt, nor its
        convolutions that round float32 to 10 bits.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _found()
        _inside += 1
        if threads:
            torch.set_num_threads(threads)
        if on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if threads:  # torch keeps this number for each thread
                torch.set_num_threads(_before[0])
            if on_gpu and not _inside:
                torch.backends.cuda.enable_cudnn_sdp(_before[1])
                torch.backends.cudnn.allow_tf32 = _before[2]


def _found() -> tuple[int, bool, bool]:
    return (
        torch.get_num_threads(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.allow_tf32,
    )
