"""The reference networks in torch over the golden data, and a tiny engine over one of them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from reference import load_json, positions, tensors
from seechat_export.reference_chatglm import ChatGLM, KVCache
from seechat_lite.engines.onnx.engine import OnnxEngine
from seechat_lite.prompt import Prompt, context_length
from seechat_weights.lm.chatglm import lm_config
from seechat_weights.lm.checkpoint import LM


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


def run_torch(module: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """What a vision network makes of pixels [n, 3, S, S]."""
    with torch.inference_mode():
        return module(torch.from_numpy(pixels)).numpy()


def prefixed_cache(model: ChatGLM, capacity: int, prefix: torch.Tensor) -> KVCache:
    """A cache that begins with a P-tuning prefix, which no position counts.

    prefix: [layers, 2 (key, value), heads, tokens, head_size]; capacity includes its tokens.
    """
    cache, tokens = KVCache.empty(model, capacity), prefix.shape[3]
    for i, (key, value) in enumerate(prefix):
        cache.keys[i][:, :, :tokens], cache.values[i][:, :, :tokens] = key, value
    cache.length = tokens
    return cache


def cached(engine: OnnxEngine, part: str, layer: int) -> np.ndarray:
    """What an engine's cache holds, [heads, tokens, head]; part is "key" or "value"."""
    return engine._cache[f"past_{part}_{layer}"].numpy()[0, :, : engine._length]


class TorchEngine:
    """The engine protocol over the torch network: no mask anywhere, as the runtime's engines."""

    def __init__(self, model: ChatGLM, prefix: np.ndarray | None = None) -> None:
        self.model = model
        self.prefix = prefix
        self.context = model.config.max_sequence_length
        self.steps = 0
        self.held_tokens = 0
        self.cache: KVCache | None = None

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def prefill(self, prompt: Prompt) -> np.ndarray:
        config, ids = self.model.config, prompt.ids
        self.cache = KVCache.empty(self.model, self.context)
        if self.prefix is not None:
            prefix = torch.from_numpy(self.prefix)
            capacity = self.context + prefix.shape[3]
            self.cache = prefixed_cache(self.model, capacity, prefix)
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

    def rewind(self, tokens: int) -> None:
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
        logits = self.model(embeds[None], torch.from_numpy(position)[None], cache=self.cache)
        return logits[0, -1].numpy()
