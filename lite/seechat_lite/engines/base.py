"""Defines what every engine does: pictures to embeddings, a prompt to logits, a token to logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from seechat_lite.lm_families import TRAITS
from seechat_lite.memory import MemoryPlan
from seechat_lite.prompt import Prompt
from seechat_lite.source import Source
from seechat_weights.arguments import check_choice, check_integer, check_type
from seechat_weights.bundle.precisions import DTYPES, QUANTIZATIONS
from seechat_weights.config import LMConfig, VisionConfig
from seechat_weights.errors import ContextError, EngineError

# of the largest machines; ONNX Runtime starts as many as it is told, and each of them spins
MAX_THREADS = 512


@dataclass(frozen=True)
class EngineOptions:
    """Where and how an engine runs."""

    device: str = "auto"
    threads: int = 0  # on the CPU, MAX_THREADS at most; 0: one a core
    vision_device: str | None = None  # None for `device`
    # hold the vision network, or release it after every picture; None: as suits the device
    keep_vision: bool | None = True
    dtype: str | None = None  # "fp16", "fp32" or torch's "bf16"; None for what suits the device
    max_memory: int | None = None  # bytes that the model may take; on a GPU, of the GPU's memory
    # bytes of keys and values kept between answers, if every token of the model is causal; 0 for
    # none, None for those of one full context
    kept_cache: int | None = None
    # for engines that have them in their `own_options`
    quantize: str | None = None  # a name of engines.torch.linears.QUANTIZATIONS
    rounded_rotary: bool = False  # angles as the published code rounds them in half precision

    def __post_init__(self) -> None:
        """Raises OptionError for what no engine takes."""
        check_type("device", self.device, str, "the name of a device")
        check_type("vision_device", self.vision_device, str | None, "the name of a device")
        check_integer("threads", self.threads, most=MAX_THREADS, expected=f"0 to {MAX_THREADS}")
        check_type("keep_vision", self.keep_vision, bool | None, "True, False or None")
        check_type("rounded_rotary", self.rounded_rotary, bool, "True or False")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        if self.max_memory is not None:
            check_integer("max_memory", self.max_memory, expected="a whole number of bytes")
        if self.kept_cache is not None:
            check_integer("kept_cache", self.kept_cache, expected="a whole number of bytes")
        if self.quantize is not None:
            check_choice("quantize", self.quantize, QUANTIZATIONS)


OPTIONAL = ("quantize", "rounded_rotary", "vision", "bf16")  # not every engine has these


class Cancelled(EngineError):  # noqa: N818 (an event, not a fault)
    """Raised by a call of the engine that cancel() ended."""


class Engine(Protocol):
    """Executes one loaded bundle.

    It has one key/value cache in which an answer is read and written. If it `batches`, it also has
    slots: read answers move there, each with a cache of its own, and are written together. A step
    of many answers reads the weights once, so it takes little longer than a step of one.
    """

    reads_checkpoints: ClassVar[bool]  # published weights too, or only bundles
    own_options: ClassVar[frozenset[str]]  # the names of OPTIONAL that it takes
    context: int  # tokens the cache has room for, prompt and answer together
    held_tokens: int  # of the last prompt that were there already, and were not read
    batches: bool  # whether it can have slots

    def __init__(
        self, source: Source, *, context: int, options: EngineOptions, plan: MemoryPlan
    ) -> None:
        """Load the model.

        source: the model.
        context: tokens that the cache has room for.
        options: where and how to run.
        plan: what plan() returned; check() found that it fits.
        """
        ...

    @classmethod
    def plan(cls, source: Source, *, context: int, options: EngineOptions) -> MemoryPlan:
        """The memory that the model will take, known before any of it is read.

        source: the model.
        context: tokens that the cache has room for.
        options: where and how to run.

        Raises EngineError for a device that is not there, or options that do not suit the model.
        """
        ...

    @classmethod
    def check(cls, plan: MemoryPlan, source: Source, *, options: EngineOptions) -> None:
        """Check a plan against the free memory and the budget.

        plan: what plan() returned.
        source: the model.
        options: where and how to run.

        Raises MemoryPlanError if the plan exceeds either.
        """
        ...

    @classmethod
    def runtime(cls) -> str:
        """The name and version of the library that executes."""
        ...

    def step_bytes(self, tokens: int) -> int | None:
        """Bytes of this machine's memory that one step reads; None if it reads none.

        tokens: tokens in the cache.
        """
        ...

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the embeddings of pictures, float32 [n, tokens, hidden].

        pixels: float32 [n, 3, S, S], normalized.

        Returns what read_question() takes if the embeddings depend on the question.

        Raises EngineError if the bundle is text-only or the shape does not fit.
        """
        ...

    def read_question(self, seen: np.ndarray, question_ids: Sequence[int]) -> np.ndarray:
        """Compute the embeddings of a picture for a question, float32 [tokens, hidden].

        seen: one picture of encode_image(), float32 [positions, width].
        question_ids: the question's pieces, as wordpiece.WordPiece makes them.
        """
        ...

    def prefill(self, prompt: Prompt) -> np.ndarray:
        """Read a prompt and return the next token's logits, float32 [vocab].

        What was in the cache is gone. An engine that keeps keys and values reads only what they do
        not begin with.

        prompt: the prompt.

        Raises ContextError if the prompt is malformed or longer than the context.
        """
        ...

    def step(self, token_id: int) -> np.ndarray:
        """Append one token and return the next token's logits, float32 [vocab].

        token_id: the token.

        Raises ContextError if the cache is full, EngineError before any prefill.
        """
        ...

    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        """Append several tokens; each sees those before it.

        token_ids: the tokens.

        Returns the next token's logits after each of them, float32 [tokens, vocab].

        Raises the errors of step().
        """
        ...

    def rewind(self, tokens: int) -> None:
        """Take back the last tokens that step() or extend() appended.

        tokens: how many.
        """
        ...

    def open_slots(self, count: int, *, tokens: int) -> int:
        """Make room for answers that are written together, until close_slots().

        Their memory is taken when it is used. It comes on top of the plan.

        count: answers, at most.
        tokens: that each of them may have, prompt included.

        Returns how many there is room for, in the free memory and the budget; 0 if the engine does
        not batch, or has slots already.
        """
        ...

    def close_slots(self) -> None:
        """Let all slots go, with what is in them. Without slots this does nothing."""
        ...

    def adopt(self) -> int:
        """Move the answer that prefill() began into a free slot; returns the slot's number.

        The engine can then read another prompt.

        Raises EngineError if there is no answer or no free slot, ContextError if it is too long.
        """
        ...

    def step_slots(self, token_ids: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Append a token to the answer in each slot; returns the next token's logits of each.

        token_ids: the token of every slot in use, by the slot's number.

        Returns logits by the slot's number, float32 [vocab] each.

        Raises the errors of step(); no answer has then got its token.
        """
        ...

    def free_slot(self, slot: int) -> None:
        """Let the answer in a slot go.

        slot: its number.
        """
        ...

    def cancel(self) -> None:
        """End the running call soon, or the next call before reset(); that call raises Cancelled.

        May be called from any thread. It does not concern encode_image().
        """
        ...

    def reset(self) -> None:
        """Finish an answer: free the cache, unless it is kept, and forget a cancel().

        A GPU keeps its own in any case.
        """
        ...

    def close(self) -> None:
        """End the running call, wait for it, and release everything. Closing twice is harmless.

        May be called from any thread at any time. Later calls raise EngineError.
        """
        ...


def embedded(
    prompt: Prompt, lm: LMConfig, *, context: int, rows: Callable[[Sequence[int]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, int]:
    """A prompt as the decoder takes it: embeddings, positions and the length of its context.

    prompt: the prompt.
    lm: the decoder's shape.
    context: tokens that the cache has room for.
    rows: returns the word embeddings of ids, [tokens, hidden].

    Returns the embeddings [tokens, hidden], float32 if there are pictures among them; the
    positions, int64 [rows, tokens]; and the number of first tokens that see each other both ways.

    Raises ContextError if the prompt is malformed or longer than the context.
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
            f"{lm.vocab_size - 1}: make it with this model's tokenizer"
        )
    traits = TRAITS[lm.family]
    positions = traits.positions(ids, lm)
    embeds = rows(ids)
    if prompt.images:
        embeds = embeds.astype(np.float32)
    for start, image in prompt.images:
        if image.shape[1] != lm.hidden_size:
            raise ContextError(
                f"picture embeddings of width {image.shape[1]}; expected {lm.hidden_size}: "
                "use those that this model made"
            )
        embeds[start : start + len(image)] = image
    return embeds, positions, traits.context(ids, lm)


def fitting(
    count: int, each: int, needed: MemoryPlan, *, free: int | None, budget: int | None
) -> int:
    """How many slots fit beside a loaded model.

    count: slots that are wanted.
    each: bytes that one takes.
    needed: the model's plan; its weights are in memory already, the rest may not be.
    free: bytes that are free; None if that is not known.
    budget: bytes that the model may take; None for any number.
    """
    rooms = [count * each]
    if free is not None:
        rooms.append(free - (needed.total - needed.weights))
    if budget is not None:
        rooms.append(budget - needed.total)
    return max(min(rooms) // each, 0)


def check_room(tokens: int, free: int, context: int) -> None:
    """Check that more tokens fit into the cache.

    tokens: how many are to be appended.
    free: places that are free.
    context: all places, for the error.

    Raises ContextError if they do not fit.
    """
    if tokens > free:
        raise ContextError(
            f"the context of {context} tokens is full; {tokens} tokens are needed, {free} are "
            "left: "
            "start a new chat or load the model with a larger context"
        )


def check_pixels(pixels: np.ndarray, vision: VisionConfig | None, folder: Path) -> None:
    """Check that a bundle has a vision network, and that it takes pixels of this shape.

    pixels: float32 [n, 3, S, S].
    vision: the bundle's vision network, if it has one.
    folder: the bundle's folder, for errors.

    Raises EngineError if not.
    """
    if vision is None:
        raise EngineError(
            f"{folder}: a text-only bundle; expected one that sees pictures: "
            "export it with a vision tower, or ask without a picture"
        )
    size = vision.pixels.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise EngineError(
            f"pixels of shape {list(pixels.shape)}; expected [n, 3, {size}, {size}]: "
            "prepare them with seechat_lite.images.pixels"
        )
