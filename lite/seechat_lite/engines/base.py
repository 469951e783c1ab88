"""What every engine can do: pictures to embeddings, a prompt to logits, a token to logits."""

from typing import Protocol

import numpy as np

from seechat_lite.prompt import Prompt


class Engine(Protocol):
    """Executes one loaded bundle and holds one key/value cache: one answer at a time."""

    context: int  # tokens the cache has room for, prompt and answer together

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Embeddings of pictures: float32 [n, 3, S, S] to float32 [n, tokens, hidden].

        Raises EngineError when the bundle is text-only or the shape does not fit.
        """
        ...

    def prefill(self, prompt: Prompt) -> np.ndarray:
        """Empty the cache, read the prompt and return the next token's logits, float32 [vocab].

        Raises ContextError when the prompt is malformed or longer than the context.
        """
        ...

    def step(self, token_id: int) -> np.ndarray:
        """Append one token and return the next token's logits, float32 [vocab].

        Raises ContextError when the cache is full, EngineError before any prefill.
        """
        ...

    def close(self) -> None:
        """Release sessions, cache and files; calling it twice is harmless."""
        ...
