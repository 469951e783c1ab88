"""Has the engine write captions: the one place that knows how many it writes at once."""

from collections.abc import Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from seechat_lite import history
from seechat_lite.conversation import Turn
from seechat_lite.generate import Seat
from seechat_lite.generation import Generation
from seechat_lite.images import PreparedImage
from seechat_lite.together import Task, Together
from seechat_weights.errors import ContextError, EngineError, ImageError

if TYPE_CHECKING:
    from seechat_lite.chat import Answer, Model


class Writer(Protocol):
    """Writes captions of prepared pictures. They may end in another order than they began."""

    slots: int  # how many pictures it takes before one must have ended

    def begin(self, picture: PreparedImage) -> None:
        """Take a picture.

        picture: prepared for the writer's model; none with the same key is being captioned.
        """
        ...

    def ended(self) -> "Iterable[tuple[str, Answer | ImageError | EngineError]]":
        """Work, and return the captions that have ended: key, caption or error.

        These may be none, if it has room for another picture.
        """
        ...

    def close(self) -> None:
        """Let go of what has not ended. Closing twice is harmless."""
        ...


def open_writer(
    model: "Model", question: str, format: str, generation: Generation, *, batch: int
) -> Writer:
    """A writer of as many captions at once as may be, and as there is memory for.

    model: the model.
    question: asked about every picture.
    format: a name of conversation.FORMATS.
    generation: the options of the answers.
    batch: how many at most.
    """
    if batch > 1 and model.engine.batches:
        tokens = _tokens(model, question, format, generation)
        slots = model.engine.open_slots(batch, tokens=tokens)
        if slots > 1:
            return InSlots(model, question, format, generation, slots=slots)
        if slots:
            model.engine.close_slots()
    return OneByOne(model, question, format, generation)


def _tokens(model: "Model", question: str, format: str, generation: Generation) -> int:
    """The tokens of a prompt with one picture and of its caption, or those of the context."""
    vision, context = model.manifest.vision, model.engine.context
    if vision is None:
        return context
    picture = np.zeros((vision.tokens, model.manifest.lm.hidden_size), np.float32)
    try:
        prompt, _ = history.fit(
            [Turn(question, images=("",))],
            {"": picture},
            format=model.chat(format).format,
            tokenizer=model.tokenizer,
            context=context,
            reserve=generation.max_new_tokens,
            stopped=lambda: False,
        )
    except ContextError:  # every picture will say so
        return context
    return min(len(prompt.ids) + generation.max_new_tokens, context)


class InSlots:
    """Writes captions together, in the slots of the engine, which it closes.

    Other threads may use the model between two calls of ended().
    """

    def __init__(
        self, model: "Model", question: str, format: str, generation: Generation, *, slots: int
    ) -> None:
        """Ask nothing yet.

        model, question, format, generation: as for open_writer().
        slots: how many slots are open.
        """
        self.slots = slots
        self._model, self._question, self._format = model, question, format
        self._generation = generation
        self._together: Together[Answer] = Together(model.engine, slots)
        self._keys: dict[Task[Answer], str] = {}
        self._closed = False

    def begin(self, picture: PreparedImage) -> None:
        """Take a picture.

        picture: the picture.
        """
        self._keys[self._together.join(partial(self._caption, picture))] = picture.key

    def ended(self) -> "Iterable[tuple[str, Answer | ImageError | EngineError]]":
        """Work until a caption has ended, or for one call of the engine if there is room."""
        with self._model.answering():
            while not (tasks := self._together.advance()) and len(self._keys) >= self.slots:
                pass
        for task in tasks:
            key = self._keys.pop(task)
            if isinstance(task.error, ImageError | EngineError):
                yield key, task.error
            elif task.result is None:
                assert task.error
                raise task.error
            else:
                yield key, task.result

    def close(self) -> None:
        """End the captions, and free the slots."""
        if not self._closed:
            self._closed = True
            self._together.close()
            self._model.engine.close_slots()

    def _caption(self, picture: PreparedImage, seat: Seat) -> "Generator[None, None, Answer]":
        chat = self._model.chat(self._format)
        chat.seat = seat
        pieces = chat.stream(self._question, picture, generation=self._generation)
        return (yield from pieces.whole())


class OneByOne:
    """Writes a caption after the other, for engines that write one answer at a time."""

    slots = 1

    def __init__(
        self, model: "Model", question: str, format: str | None, generation: Generation
    ) -> None:
        """Ask nothing yet.

        model: the model.
        question: asked about every picture.
        format: the conversation format; None for the bundle's.
        generation: the options of the answers.
        """
        self._model, self._question, self._format = model, question, format
        self._generation = generation
        self._pictures: list[PreparedImage] = []

    def begin(self, picture: PreparedImage) -> None:
        """Take a picture.

        picture: the picture.
        """
        self._pictures.append(picture)

    def ended(self) -> "Iterable[tuple[str, Answer | ImageError | EngineError]]":
        """Write the captions of what was taken: key, caption or error."""
        taken, self._pictures = self._pictures, []
        for picture in taken:
            try:
                chat = self._model.chat(self._format)
                yield picture.key, chat.ask(self._question, picture, generation=self._generation)
            except (ImageError, EngineError) as e:
                yield picture.key, e

    def close(self) -> None:
        """Forget what was taken."""
        self._pictures.clear()
