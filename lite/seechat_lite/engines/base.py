"""What every engine can do: pictures to embeddings, a prompt to logits, a token to logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from seechat_lite.errors import EngineError
from seechat_lite.prompt import Prompt


@dataclass(frozen=True)
class EngineOptions:
    """Where and how an engine runs."""

    device: str = "auto"
    threads: int = 0  # on the CPU; 0 is one a core
    vision_device: str | None = None  # None for `device`
    keep_vision: bool = True  # or release the vision network after every picture


class Cancelled(EngineError):  # noqa: N818 (an event, not a fault)
    """A call of the engine was ended by cancel()."""


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

    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        """Append several tokens, each of which sees those before it.

        Returns the next token's logits after each of them, float32 [tokens, vocab]; raises what
        step() raises.
        """
        ...

    def forget(self, tokens: int) -> None:
        """Take back the last `tokens` appended by step() or extend()."""
        ...

    def cancel(self) -> None:
        """End the running call, if there is one, soon; it raises Cancelled. From any thread."""
        ...

    def reset(self) -> None:
        """Free the cache: the answer is complete."""
        ...

    def close(self) -> None:
        """Release sessions, cache and files; calling it twice is harmless."""
        ...
