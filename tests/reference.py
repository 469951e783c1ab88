"""Reading the golden data under tests/data, and comparing with it; needs no torch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from seechat_lite.engines import Engine
from seechat_lite.onnx_runtime import ort
from seechat_lite.prompt import Prompt, position_ids
from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.lm.checkpoint import open_lm

DATA = Path(__file__).parent / "data"


def data(path: str) -> Path:
    return DATA / path


def load_json(path: str) -> Any:
    return json.loads(data(path).read_text("utf-8"))


def tensors(path: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file under tests/data."""
    return load_file(data(path))


def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens after a prompt, one by one."""
    logits, found = engine.prefill(Prompt(ids)), []
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = engine.step(found[-1])
    return found


def check_recorded(
    engine: Engine, case: dict[str, np.ndarray], recorded: dict[str, Any], *, atol: float
) -> None:
    """The logits after the case's prompt and the greedy answer are the recorded ones."""
    ids = case["input_ids"][0].tolist()
    logits = engine.prefill(Prompt(ids))
    np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=atol)
    assert greedy(engine, ids, len(recorded["greedy"])) == recorded["greedy"]


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    """The same standard normal float32 numbers whenever the same shape and seed are asked for."""
    return np.random.default_rng([*shape, seed]).standard_normal(shape).astype(np.float32)


def lm_error(path: Path, **options: Path) -> str:
    """The message with which open_lm refuses a checkpoint."""
    with pytest.raises(CheckpointError) as e:
        open_lm(path, **options)
    assert "\n" not in str(e.value) and "expected" in str(e.value)
    return str(e.value)


def positions(ids: list[int], config: LMConfig) -> np.ndarray:
    """Position ids, int64 [2, len(ids)], with the special ids of `config`."""
    return position_ids(ids, gmask_id=config.gmask_id, mask_id=config.mask_id, bos_id=config.bos_id)


def manifest(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of a checkpoint at its published size."""
    published = load_json(f"manifests/{name}.json")["tensors"]
    return {key: (tuple(entry[0]), entry[1]) for key, entry in published.items()}


def run_onnx(path: Path, pixels: np.ndarray) -> np.ndarray:
    """What a vision graph makes of pixels [n, 3, S, S]."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["image_embeds"], {"pixel_values": pixels})[0])


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of Python a call takes: its work, on a machine however slow."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines
