"""Turns messages in the shape of the OpenAI API, as chat programs send them, into turns.

Chat programs write histories that the models do not know: a greeting before any question;
instructions at the start, in the middle or at the end; results of tools; messages without content.
All of them have a place here, so that whatever a program sends is answered. Only what cannot be
read is refused. Pictures stay as they were given.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seechat_lite.conversation import Format, description_question, letters, trimmed
from seechat_weights.errors import OptionError

INSTRUCTING = ("system", "developer")
TOOLS = ("tool", "function")
ROLES = (*INSTRUCTING, "user", "assistant", *TOOLS)
TEXTS = ("text", "input_text", "output_text", "refusal", "summary_text")
PICTURES = ("image_url", "input_image", "image")


_FILES = re.compile(r"\s*<attached_files>.*?</attached_files>\s*", re.DOTALL)


class MessagesError(OptionError):
    """A conversation that cannot be read.

    where: the message, as "messages.3.content.0".
    why: what is wrong.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where


@dataclass
class Exchange:
    """A question, its pictures as they were given, and its answer; None if it has no answer.

    The texts are parts that line breaks join. They may be empty in a past exchange. `told` are a
    system's texts before it, if the format has a place of their own for them.
    """

    texts: list[str] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    answers: list[str] | None = None
    asked: bool = False  # whether any of the texts are the user's words
    told: list[str] = field(default_factory=list)

    def question(self, most: int | None = None) -> str:
        """The question as one text.

        most: if the text has more characters, a text that is long enough to show so; None for no
            limit.
        """
        return joined(self.texts, most)

    def answer(self, most: int | None = None) -> str:
        """The answer as one text; None if there is none.

        most: as for question().
        """
        return joined(self.answers or (), most)

    def system(self, most: int | None = None) -> str:
        """What the system says before it, as one text.

        most: as for question().
        """
        return joined(self.told, most)


@dataclass(frozen=True)
class Conversation:
    """What read_messages() found.

    past: exchanges with an answer, oldest first.
    turn: the exchange to answer.
    ignored: what had no effect, in words.
    """

    past: list[Exchange]
    turn: Exchange | None
    ignored: list[str]

    @property
    def question(self) -> Exchange:
        """The exchange to answer. Raises MessagesError if there is none."""
        if self.turn is None:
            raise _no_question()
        return self.turn


def read_messages(
    messages: Sequence[Any], *, format: Format, more: Sequence[Any] = (), asking: bool = True
) -> Conversation:
    """Turn messages into exchanges; the last one is to be answered.

    Texts of instructions and tools go to the question that follows, or to the last one; those of
    instructions to their own place there, if the format has one. Messages of one side that follow
    each other become one.

    messages: mappings with `role` and `content`, or objects with model_dump(), such as the OpenAI
        client's answers.
    format: says whether instructions are written, and what a picture alone asks.
    more: pictures that belong to the last question.
    asking: whether there must be a question. If so, empty messages at the end are left out, and so
        is an answer at the end: its question is answered anew.

    Raises MessagesError: an unknown role or part, or no question.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise MessagesError(
            "messages", f'a {type(messages).__name__}; expected a list of {{"role", "content"}}'
        )
    exchanges: list[Exchange] = []
    waiting: list[str] = []  # texts for the next question
    told: list[str] = []  # a system's, which the format writes in a place of their own
    pictures: list[Any] = []  # pictures for the next question
    unwritten: list[str] = []  # instructions that the format has no place for
    for i, given in enumerate(messages):
        where = f"messages.{i}"
        message = _mapping(given, where)
        role = message.get("role")
        if role not in ROLES:
            shown = f"{role!r:.40}" if role is not None else "missing"
            raise MessagesError(f"{where}.role", f"{shown}; expected one of {', '.join(ROLES)}")
        texts, images = _content(message, where)
        last = exchanges[-1] if exchanges and exchanges[-1].answers is None else None
        if role == "user":
            if not format.instructions:
                texts, listed = _own_words(texts, alone=not images)
                unwritten += listed
            if last is None:
                last = Exchange()
                exchanges.append(last)
            last.texts += waiting + texts
            last.images += pictures + images
            last.asked |= any(map(trimmed, texts))
            last.told += told
            waiting, pictures, told = [], [], []
        elif role == "assistant":
            if not any(texts) and (message.get("tool_calls") or message.get("function_call")):
                continue  # it asked a tool; the tool's answer follows
            if last is None and exchanges:
                answers = exchanges[-1].answers
                assert answers is not None
                answers += filter(None, texts)
                exchanges[-1].images += images
                continue
            if last is None:
                last = Exchange()
                exchanges.append(last)
            last.texts += waiting
            last.images += pictures + images
            last.told += told
            last.answers = list(filter(None, texts))
            waiting, pictures, told = [], [], []
        else:
            pictures += images
            if role in INSTRUCTING and not format.instructions:
                unwritten += filter(trimmed, texts)
            elif role in INSTRUCTING and format.system:
                told += filter(trimmed, texts)
            else:
                waiting += filter(trimmed, texts)
    pictures += more
    if not exchanges and not waiting and not pictures and asking:
        waiting, unwritten = unwritten, []  # these are all the texts there are
    is_open = bool(exchanges) and exchanges[-1].answers is None
    if waiting or pictures or told:
        if not is_open:
            exchanges.append(Exchange(asked=bool(waiting)))
        exchanges[-1].texts += waiting
        exchanges[-1].images += pictures
        exchanges[-1].told += told
    ignored = ["system texts (this model has learnt none)"] if unwritten else []
    unanswered = False
    while asking and exchanges:
        last = exchanges[-1]
        if any(map(trimmed, last.answers or ())) and not unanswered:
            ignored.append("the last message, an answer (its question is answered anew)")
        unanswered, last.answers = True, None
        if _says_nothing(last):  # then what the system says is the question
            last.texts, last.told = last.told, []
        if len(exchanges) == 1 or not _says_nothing(last):
            break
        exchanges.pop()
    _describe(exchanges, format)
    turn = exchanges.pop() if exchanges and exchanges[-1].answers is None else None
    if asking and not (turn and (turn.images or any(map(trimmed, turn.texts)))):
        raise _no_question()
    if not format.instructions:  # nor has the model learnt answers without a question
        exchanges = [e for e in exchanges if e.images or any(map(trimmed, e.texts))]
    return Conversation(exchanges, turn, ignored)


def joined(texts: Sequence[str], most: int | None = None) -> str:
    """The texts as one text.

    texts: the parts.
    most: if the text has more characters, a text that is long enough to show so; None for no limit.
    """
    if most is None:
        return "\n".join(texts)
    parts: list[str] = []
    for text in texts:
        parts.append(text[: most + 1])
        most -= len(text)
        if most < 0:
            break
    return "\n".join(parts)


def _describe(exchanges: Sequence[Exchange], format: Format) -> None:
    """Give a question to pictures that came without the user's words."""
    said: tuple[str, ...] = ()  # letters stand for what was said: there may be many exchanges
    for exchange in exchanges:
        own = [text[:1000] for text in (*exchange.texts, *(exchange.answers or ()))]
        if exchange.images and not exchange.asked:
            exchange.texts.append(description_question(format, (*said, *own)))
            exchange.asked = True
        said = letters((*said, *own))


def _says_nothing(exchange: Exchange) -> bool:
    answered = exchange.answers and any(map(trimmed, exchange.answers))
    return not (exchange.images or answered or any(map(trimmed, exchange.texts)))


def _own_words(texts: Sequence[str], *, alone: bool) -> tuple[list[str], list[str]]:
    """A user's words, and lists of files that a program (Open WebUI) put before them.

    texts: those of one message.
    alone: whether there is nothing else in the message; then all texts are the user's.
    """
    own: list[str] = []
    listed: list[str] = []
    for text in texts:
        if found := _FILES.match(text):
            listed.append(found[0])
            text = text[found.end() :]
            if not text:
                continue
        own.append(text)
    return (list(texts), []) if alone and not any(map(trimmed, own)) else (own, listed)


def _no_question() -> MessagesError:
    return MessagesError(
        "messages", "the question is empty; expected a last message of the user's, text or picture"
    )


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    if hasattr(given, "model_dump"):
        return given.model_dump()
    raise MessagesError(
        where, f'a {type(given).__name__}; expected an object {{"role": …, "content": …}}'
    )


def _content(message: Mapping[str, Any], where: str) -> tuple[list[str], list[Any]]:
    """The texts and the pictures of a message."""
    content = message.get("content")
    texts: list[str] = []
    images: list[Any] = []
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        for i, part in enumerate(content):
            _part(part, f"{where}.content.{i}", texts, images)
    elif isinstance(content, Mapping):
        _part(content, f"{where}.content", texts, images)
    elif content is not None:
        raise MessagesError(
            f"{where}.content",
            f"a {type(content).__name__}; expected a text or a list of parts: text, image_url",
        )
    if refusal := message.get("refusal"):
        texts.append(str(refusal))
    beside = message.get("images")  # as Ollama sends them
    if beside is not None:
        if isinstance(beside, str) or not isinstance(beside, Sequence):
            raise MessagesError(f"{where}.images", "expected a list of pictures in base64")
        images += beside
    return texts, images


def _part(part: Any, where: str, texts: list[str], images: list[Any]) -> None:
    if isinstance(part, str):
        texts.append(part)
        return
    part = _mapping(part, where)
    kind = part.get("type")
    if kind is None:  # its field tells the kind, as some programs leave out the type
        kind = next((k for k in ("text", *PICTURES) if part.get(k) is not None), None)
    if kind in TEXTS:
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if not isinstance(text, str):
            raise MessagesError(where, f"{kind!r} without a text; expected some, or leave it out")
        texts.append(text)
    elif kind in PICTURES:
        images.append(_picture(part, where))
    else:
        shown = f"{kind!r:.40}" if kind is not None else "missing"
        raise MessagesError(
            f"{where}.type",
            f"{shown}; expected text, or image_url for a picture: this model takes nothing else",
        )


def _picture(part: Mapping[str, Any], where: str) -> Any:
    """The picture in a part, from OpenAI's, Anthropic's or Hugging Face's fields."""
    for name in ("image_url", "image", "url", "path", "base64", "source", "data"):
        found = part.get(name)
        if isinstance(found, Mapping):
            inner = (found.get(field) for field in ("url", "data", "path"))
            found = next((v for v in inner if v is not None and not _is_empty_text(v)), None)
        if found is not None:
            return found
    raise MessagesError(
        where, 'a picture without its content; expected {"image_url": {"url": "data:image/png;…"}}'
    )


def _is_empty_text(value: Any) -> bool:
    return isinstance(value, str | bytes) and not value  # an array's truth is an error
