"""Reading the golden data under tests/data, and a tiny engine over the torch network."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from seechat_lite.engines import Engine
from seechat_lite.nn.chatglm import ChatGLM, KVCache
from seechat_lite.onnx_runtime import ort
from seechat_lite.prompt import Prompt, context_length, position_ids
from seechat_weights.bundle import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.lm import LM, open_lm
from seechat_weights.names import lm_config

DATA = Path(__file__).parent / "data"


def data(path: str) -> Path:
    return DATA / path


def load_json(path: str) -> Any:
    return json.loads(data(path).read_text("utf-8"))


def tensors(path: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file under tests/data."""
    return load_file(data(path))


def load_chatglm(folder: str) -> ChatGLM:
    """A fixture model in float32, ready to run."""
    config = lm_config(load_json(f"{folder}/config.json"))
    with torch.device("meta"):
        model = ChatGLM(config)
    state = {
        key.removeprefix("transformer."): torch.from_numpy(value).float()
        for key, value in tensors(f"{folder}/model.safetensors").items()
        if not key.endswith("rotary_emb.inv_freq")
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def chatglm_of(lm: LM) -> ChatGLM:
    """The network in float32 over the weights of an opened checkpoint."""
    with torch.device("meta"):
        model = ChatGLM(lm.config)
    state = {key: torch.from_numpy(lm.read(key)).float() for key in lm.shapes}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


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


class TorchEngine:
    """The engine protocol over the torch network: no mask anywhere, as the runtime's engines."""

    def __init__(self, model: ChatGLM, prefix: np.ndarray | None = None) -> None:
        self.model = model
        self.prefix = prefix
        self.context = model.config.max_sequence_length
        self.steps = 0
        self.cache: KVCache | None = None

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def prefill(self, prompt: Prompt) -> np.ndarray:
        config, ids = self.model.config, prompt.ids
        self.cache = KVCache.empty(self.model, self.context)
        if self.prefix is not None:
            prefix = torch.from_numpy(self.prefix)
            capacity = self.context + prefix.shape[3]
            self.cache = KVCache.prefixed(self.model, capacity, prefix)
        self.position = positions(ids, config)
        embeds = self.model.word_embeddings(torch.tensor(ids)).clone()
        for start, image in prompt.images:
            embeds[start : start + len(image)] = torch.from_numpy(image)
        context = context_length(ids, bos_id=config.bos_id)
        self._forward(embeds[:context], self.position[:, :context])
        for i in range(context, len(ids)):
            logits = self._forward(embeds[i : i + 1], self.position[:, i : i + 1])
        return logits

    def step(self, token_id: int) -> np.ndarray:
        self.steps += 1
        self.position = self.position[:, -1:] + [[0], [1]]
        return self._forward(self.model.word_embeddings(torch.tensor([token_id])), self.position)

    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.stack([self.step(token) for token in token_ids])

    def forget(self, tokens: int) -> None:
        self.cache.length -= tokens
        self.position = self.position[:, -1:] - [[0], [tokens]]

    def cancel(self) -> None:
        pass

    def reset(self) -> None:
        self.cache = None

    def close(self) -> None:
        self.cache = None

    def _forward(self, embeds: torch.Tensor, position: np.ndarray) -> np.ndarray:
        if not len(embeds):
            return np.empty(0, np.float32)
        logits = self.model(
            embeds[None], torch.from_numpy(position)[None], cache=self.cache, last_only=True
        )
        return logits[0, 0].numpy()


def manifest(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of a checkpoint at its published size."""
    published = load_json(f"manifests/{name}.json")["tensors"]
    return {key: (tuple(entry[0]), entry[1]) for key, entry in published.items()}


def run_torch(module: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """What a vision network makes of pixels [n, 3, S, S]."""
    with torch.inference_mode():
        return module(torch.from_numpy(pixels)).numpy()


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
