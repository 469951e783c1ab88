"""Has the engine write captions: the one place that knows how many it writes at once."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from seechat_lite.generation import Generation
from seechat_lite.images import PreparedImage
from seechat_weights.errors import EngineError, ImageError

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
        """Work until at least one caption has ended, and return these: key, caption or error."""
        ...


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
