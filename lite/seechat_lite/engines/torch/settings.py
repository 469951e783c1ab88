"""Settings of torch that belong to the whole process: ours while we compute, else the host's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0  # calls of any engine, in any thread, that run now
_before: tuple[int, bool, bool] = (0, True, True)  # what the first of them found


@contextmanager
def torch_settings(*, threads: int, on_gpu: bool) -> Iterator[None]:
    """Compute with our settings; when the last such block has ended, all is as it was.

    threads: on the CPU, 0 for as many as there are. on_gpu: cuDNN's attention is not used, which
    makes a plan for each length of prompt, nor its convolutions that round float32 to 10 bits.
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
            if threads:  # each thread has a number of its own
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
