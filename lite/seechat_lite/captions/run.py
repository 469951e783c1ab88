"""Captions many pictures: each content once, in order, in bounded memory."""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from seechat_lite.captions.ahead import ReadAhead
from seechat_lite.captions.known import Known
from seechat_lite.captions.writer import Writer, open_writer
from seechat_lite.conversation import FORMATS, trimmed
from seechat_lite.generation import Generation
from seechat_lite.images import ImageSource, PreparedImage, load_image
from seechat_weights.errors import EngineError, ImageError, SeechatError

if TYPE_CHECKING:
    from seechat_lite.chat import Answer, Model

LANGUAGES = ("zh", "en")
MAX_BATCH = 1024
EXPECTED_BATCH = f"1 to {MAX_BATCH}"


@dataclass(frozen=True)
class Caption:
    """What a model says about one picture, or why it could not.

    image: the picture, as it was given.
    text: the caption; None if there is an error.
    error: why there is no caption.
    sha256: of the picture's content, hexadecimal; None if it could not be read.
    seconds: that it took; 0 for the caption of another picture with the same content.
    finish_reason: "stop" or "length" (max_new_tokens or a full context).
    """

    image: Any
    text: str | None = None
    error: SeechatError | None = None
    sha256: str | None = None
    seconds: float = 0.0
    finish_reason: str | None = None


@dataclass(frozen=True)
class Item:
    """A picture to be captioned.

    image: becomes Caption.image.
    take: returns the picture; called before the next item is drawn, as an archive is read on then.
        May raise ImageError.
    """

    image: Any
    take: Callable[[], ImageSource]


def failed(image: Any, error: ImageError) -> Item:
    """An item of which it is known already that it cannot be read.

    image: as Item has it.
    error: why.
    """

    def take() -> NoReturn:
        raise error

    return Item(image, take)


def shard(number: int, count: int) -> Callable[[str], bool]:
    """Choose a part of all pictures, by their content; the parts together are all.

    number: which part, from 1.
    count: how many parts there are.
    """
    return lambda digest: int(digest, 16) % count == number - 1


def question(prompt: str | None, format: str, language: str) -> str:
    """What is asked about each picture.

    prompt: the question; None or blank asks for a description.
    format: the conversation format, whose words are taken for that.
    language: one of LANGUAGES.
    """
    return prompt if prompt and trimmed(prompt) else FORMATS[format].describe[language == "en"]


def of_sources(
    model: "Model",
    sources: Iterable[ImageSource],
    *,
    question: str,
    format: str,
    generation: Generation,
    batch: int,
) -> Generator[Caption, None, None]:
    """Yield the captions of pictures that a program has, in order.

    sources: the pictures.
    model, question, format, generation, batch: as for captioned().

    Raises the errors of captioned().
    """
    items = (Item(source, partial(_same, source)) for source in sources)
    with Known() as known:
        yield from captioned(
            model,
            items,
            question=question,
            format=format,
            generation=generation,
            batch=batch,
            known=known,
        )


def _same(source: ImageSource) -> ImageSource:
    return source


def captioned(
    model: "Model",
    items: Iterable[Item],
    *,
    question: str,
    format: str,
    generation: Generation,
    batch: int,
    known: Known,
    keep: Callable[[str], bool] | None = None,
) -> Generator[Caption, None, None]:
    """Yield the captions of pictures, in order.

    model: writes them.
    items: the pictures; drawn in another thread.
    question: asked about every picture.
    format: a name of conversation.FORMATS.
    generation: the options of the answers.
    batch: how many pictures are in work at once.
    known: captions that were written before; the new ones are added.
    keep: called with a picture's sha256, or that of its name if it cannot be read; False leaves it
        out. None keeps all.

    Raises EngineError if the engine fails on two pictures in a row, and what `items` raises.
    """
    exact = FORMATS[format].exact  # as Chat has its pictures
    ahead: ReadAhead[_Taken, _Entry]

    def stopped() -> bool:
        return ahead.closed

    def prepared(taken: _Taken) -> _Entry:
        entry = _Entry(taken.image)
        try:
            picture = load_image(taken.picture(), name=taken.name)
            entry.key = picture.key
            entry.left_out = keep is not None and not keep(picture.key)
            if not entry.left_out:
                entry.picture = model.prepare_image(picture, exact=exact, stopped=stopped)
        except ImageError as e:
            if keep is not None and entry.key is None:
                name = str(taken.image).encode("utf-8", "surrogatepass")
                entry.left_out = not keep(hashlib.sha256(name).hexdigest())
            entry.ended = Caption(taken.image, error=e, sha256=entry.key)
        return entry

    most = max(batch, 2)
    ahead = ReadAhead(map(_Taken, items), prepared, most=most, size=_Taken.size)
    with (
        closing(ahead),
        closing(open_writer(model, question, format, generation, batch=batch)) as writer,
    ):
        yield from _Run(ahead, writer, known, most=most + writer.slots).captions()


class _Taken:
    """An item whose picture was taken, or what was wrong with it."""

    def __init__(self, item: Item) -> None:
        self.image = item.image
        self.name = item.image if isinstance(item.image, str) else "image bytes"
        self._picture: ImageSource | None = None
        self._error: ImageError | None = None
        try:
            self._picture = item.take()
        except ImageError as e:
            self._error = e

    def size(self) -> int:
        """Bytes that it holds."""
        return len(self._picture) if isinstance(self._picture, bytes) else 0

    def picture(self) -> Any:
        """The picture, once. Raises ImageError."""
        if self._error:
            raise self._error
        picture, self._picture = self._picture, None
        return picture


@dataclass
class _Entry:
    """A picture on its way."""

    image: Any
    key: str | None = None
    picture: PreparedImage | None = None
    ended: Caption | None = None
    left_out: bool = False


class _Run:
    """Brings pictures to the writer and captions back into order.

    A failure of the engine is the picture's own if another picture goes well after it. Otherwise
    the engine is broken, and no picture is blamed.
    """

    def __init__(
        self, ahead: ReadAhead[Any, _Entry], writer: Writer, known: Known, *, most: int
    ) -> None:
        self._ahead, self._writer, self._known, self._most = ahead, writer, known, most
        self._order: deque[_Entry] = deque()  # all that have not been handed on
        self._open: dict[str, list[_Entry]] = {}  # without a caption, by content
        self._writing = 0
        self._worked = False  # whether any caption was written
        self._doubtful: tuple[str, EngineError] | None = None  # content and failure

    def captions(self) -> Iterator[Caption]:
        """Yield all captions."""
        while True:
            while self._order and (caption := self._order[0].ended):
                self._order.popleft()
                yield caption
            if self._take_one():
                continue
            if self._writing:
                for key, outcome in self._writer.ended():
                    self._writing -= 1
                    self._end(key, outcome)
            elif self._doubtful:
                self._settle()
            else:
                return

    def _take_one(self) -> bool:
        """Take the next picture, if there is one and room for it."""
        if self._writing >= self._writer.slots or len(self._order) >= self._most:
            return False
        entry = self._ahead.get(wait=not self._writing)
        if entry is None:
            return False
        if entry.left_out:
            return True
        self._order.append(entry)
        if entry.ended or entry.key is None or entry.picture is None:
            return True
        if found := self._known.caption(entry.key):
            text, finish_reason = found
            entry.ended = Caption(entry.image, text, sha256=entry.key, finish_reason=finish_reason)
        elif entry.key in self._open:
            self._open[entry.key].append(entry)
        else:
            self._open[entry.key] = [entry]
            self._writer.begin(entry.picture)
            self._writing += 1
        entry.picture = None  # the writer has it
        return True

    def _end(self, key: str, outcome: "Answer | ImageError | EngineError") -> None:
        """A caption was written, or could not be."""
        if isinstance(outcome, ImageError):
            self._fail(key, outcome)
        elif isinstance(outcome, EngineError):
            if self._doubtful:
                raise outcome
            self._doubtful = key, outcome
        else:
            self._worked = True
            self._settle()
            finish_reason = outcome.stats.finish_reason
            self._known.remember(key, str(outcome), finish_reason)
            seconds = outcome.stats.seconds
            for entry in self._open.pop(key):
                entry.ended = Caption(entry.image, str(outcome), None, key, seconds, finish_reason)
                seconds = 0.0

    def _settle(self) -> None:
        """Say whose failure a failure of the engine was. Raises EngineError."""
        if self._doubtful:
            (key, error), self._doubtful = self._doubtful, None
            if not self._worked:
                raise error
            self._fail(key, error)

    def _fail(self, key: str, error: SeechatError) -> None:
        for entry in self._open.pop(key):
            entry.ended = Caption(entry.image, error=error, sha256=key)
