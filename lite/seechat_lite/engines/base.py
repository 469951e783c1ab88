"""What every engine can do: pictures to embeddings, a prompt to logits, a token to logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from seechat_lite.memory import MemoryPlan
from seechat_lite.prompt import Prompt, context_length, position_ids
from seechat_lite.source import Source
from seechat_weights.config import LMConfig, VisionConfig
from seechat_weights.errors import ContextError, EngineError

# of the largest machines; ONNX Runtime starts as many as it is told, and each of them spins
MAX_THREADS = 512


@dataclass(frozen=True)
class EngineOptions:
    """Where and how an engine runs."""

    device: str = "auto"
    threads: int = 0  # on the CPU, MAX_THREADS at most; 0 is one a core
    vision_device: str | None = None  # None for `device`
    # hold the vision network, or release it after every picture; None for what suits the device
    keep_vision: bool | None = True
    dtype: str | None = None  # "fp16", "fp32" or torch's "bf16"; None for what suits the device
    max_memory: int | None = None  # bytes that the model may take; on a GPU of its memory
    # for engines that have them in their `own_options`
    quantize: str | None = None  # a name of nn.linears.QUANTIZATIONS
    rounded_rotary: bool = False  # angles as the published code rounds them in half precision


OPTIONAL = ("quantize", "rounded_rotary", "vision", "bf16")  # what not every engine can do


class Cancelled(EngineError):  # noqa: N818 (an event, not a fault)
    """A call of the engine was ended by cancel()."""


class Engine(Protocol):
    """Executes one loaded bundle and holds one key/value cache: one answer at a time."""

    reads_checkpoints: ClassVar[bool]  # published weights, or bundles alone
    own_options: ClassVar[frozenset[str]]  # of OPTIONAL, what it takes
    context: int  # tokens the cache has room for, prompt and answer together

    def __init__(
        self, source: Source, *, context: int, options: EngineOptions, plan: MemoryPlan
    ) -> None:
        """Load the model, for which there was room. plan: what plan() said."""
        ...

    @classmethod
    def plan(cls, source: Source, *, context: int, options: EngineOptions) -> MemoryPlan:
        """What the model will take, known before anything of it is read.

        Raises EngineError for a device that is not there, or options that do not suit the model.
        """
        ...

    @classmethod
    def check(cls, plan: MemoryPlan, source: Source, *, options: EngineOptions) -> None:
        """Raise MemoryPlanError if the plan exceeds what is free, or the budget."""
        ...

    @classmethod
    def runtime(cls) -> str:
        """What executes it, with its version."""
        ...

    def step_bytes(self, tokens: int) -> int | None:
        """Bytes that a step reads of this machine's memory behind `tokens` tokens, if it does."""
        ...

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

    def rewind(self, tokens: int) -> None:
        """Take back the last `tokens` appended by step() or extend()."""
        ...

    def cancel(self) -> None:
        """End the running call, or the next one before reset(), soon; it raises Cancelled.

        May be called from any thread. Does not concern encode_image().
        """
        ...

    def reset(self) -> None:
        """Free the cache (a GPU keeps its), and forget a cancel(): the answer is complete."""
        ...

    def close(self) -> None:
        """End the running call, wait for it, and release all; calling it twice is harmless.

        May be called from any thread and at any time; later calls raise EngineError.
        """
        ...


def embedded(
    prompt: Prompt, lm: LMConfig, *, context: int, rows: Callable[[Sequence[int]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, int]:
    """A prompt as the decoder takes it: embeddings, positions and the length of its context.

    rows: word embeddings of ids. Returns them, [tokens, hidden], float32 where pictures are among
    them; int64 [2, tokens]; and how many tokens come before <sop>. Raises ContextError.
    """
    ids = prompt.ids
    if len(ids) > context:
        raise ContextError(
            f"the prompt has {len(ids)} tokens, the context holds {context}: "
            "shorten the question, start a new chat or load the model with a larger context"
        )
    if min(ids) < 0 or max(ids) >= lm.vocab_size:
        raise ContextError(
            f"the prompt's ids reach from {min(ids)} to {max(ids)}; expected 0 to "
            f"{lm.vocab_size - 1}: it was made with another tokenizer"
        )
    positions = position_ids(ids, gmask_id=lm.gmask_id, mask_id=lm.mask_id, bos_id=lm.bos_id)
    embeds = rows(ids)
    if prompt.images:
        embeds = embeds.astype(np.float32)
    for start, image in prompt.images:
        if image.shape[1] != lm.hidden_size:
            raise ContextError(
                f"picture embeddings of width {image.shape[1]}; expected {lm.hidden_size}: "
                "they were made by another model"
            )
        embeds[start : start + len(image)] = image
    return embeds, positions, context_length(ids, bos_id=lm.bos_id)


def check_room(tokens: int, free: int, context: int) -> None:
    """Raise ContextError if `tokens` more do not fit the places that are `free`."""
    if tokens > free:
        raise ContextError(
            f"the context of {context} tokens is full ({free} left, {tokens} needed): "
            "start a new chat or load the model with a larger context"
        )


def check_pixels(pixels: np.ndarray, vision: VisionConfig | None, folder: Path) -> None:
    """Raise EngineError if a bundle has no vision, or not for pixels of this shape."""
    if vision is None:
        raise EngineError(
            f"{folder}: a text-only bundle, it cannot see pictures: "
            "export it with a vision tower, or ask without a picture"
        )
    size = vision.pixels.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise EngineError(
            f"pixels of shape {list(pixels.shape)}; expected [n, 3, {size}, {size}]: "
            "prepare them with seechat_lite.images.pixels"
        )
