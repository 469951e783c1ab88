"""Holds a loaded model (Model) and its conversations (Chat), and streams answers.

An answer has the engine for itself, and a second thread waits its turn; or its chat has a seat,
beside other answers (see together.Together).
Pictures are remembered by their content: each is encoded once, in whatever turn or chat it is
    shown.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from seechat_lite import history
from seechat_lite.conversation import (
    FORMATS,
    CleanStream,
    Format,
    Turn,
    description_question,
    trimmed,
    with_marks,
)
from seechat_lite.engines import Engine
from seechat_lite.engines.base import Cancelled
from seechat_lite.generate import Alone, Seat, decode
from seechat_lite.generation import Generation, GenerationOptions
from seechat_lite.images import (
    ImageSource,
    PreparedImage,
    is_one,
    levels,
    load_image,
    message_picture,
    pixels,
    prepared_pixels,
    several,
)
from seechat_lite.json_schema import Constraint, Verbatim, Vocabulary
from seechat_lite.messages import read_messages
from seechat_lite.one_at_a_time import OneAtATime
from seechat_lite.prompt import Prompt
from seechat_lite.prompt_lookup import PromptLookup, RowCost
from seechat_lite.text_stream import TextStream
from seechat_lite.tokenizers import TextTokenizer
from seechat_lite.wordpiece import WordPieces, question_words
from seechat_weights.arguments import check_choice, check_integer, check_type
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.config import PixelSpec
from seechat_weights.errors import ContextError, EngineError, OptionError

if TYPE_CHECKING:
    from seechat_lite.captions.run import Caption

log = logging.getLogger(__name__)

IMAGE_CACHE = 64 << 20  # bytes
# tokens for all that SEEChat's demo remembers (2000 characters of three bytes at most, mostly
# one token each, and a picture) and an answer
DEMO_CONTEXT = 4096


class Model:
    """A loaded bundle, made by `load`; a context manager; safe to use from several threads.

    manifest: describes the bundle.
    tokenizer: its tokenizer.
    engine: runs it.
    image_cache: bytes of embeddings kept for pictures that no chat shows any more.
    vocabulary: the file with which the question is read, if the pictures' embeddings depend on it.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        engine: Engine,
        *,
        image_cache: int = IMAGE_CACHE,
        vocabulary: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.engine = engine
        self._tokens = Vocabulary(
            tokenizer,
            size=manifest.lm.vocab_size,
            ends={manifest.lm.eos_id, *manifest.lm.other_eos},
        )
        self._row_cost = RowCost()
        self._closed = False
        self._answers = OneAtATime()
        self._pictures = OneAtATime()  # also keeps two threads from encoding the same picture
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()  # least recently used first
        self._images_lock = threading.RLock()
        self._image_cache = image_cache
        self._question_vocabulary = vocabulary
        self._wordpiece: WordPieces | None = None

    def chat(self, format: str | None = None, *, messages: Sequence[Any] = ()) -> "Chat":
        """Begin a conversation.

        format: a name of conversation.FORMATS; None for the bundle's.
        messages: what was said before, in the OpenAI API's shape. Pictures are parts of it, or
            `{"type": "image", "image": …}` with anything that stream() takes. If the last message
            is the user's, ask() and stream() without a question answer it.

        Raises OptionError for an unknown format or messages that cannot be read, ImageError.
        """
        name = format or self.manifest.conversation
        check_choice("format", name, FORMATS)
        vision = self.manifest.vision
        chat = Chat(self, with_marks(FORMATS[name], vision.marks if vision else ("", "")))
        if messages:
            chat.take(messages)
        return chat

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        prompt: str | None = None,
        *,
        language: str = "zh",
        format: str | None = None,
        batch: int = 8,
        generation: Generation | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator["Caption"]:
        """Describe many pictures, each by itself; yields a Caption for each, in order.

        A picture that cannot be read gives a Caption with an error. Pictures are read and decoded
        ahead, in other threads, and `images` is iterated over in one of them. Those of the same
        content are captioned once.

        images: the pictures, or one.
        prompt: what is asked about each; None or blank asks for a description.
        language: of that description: "zh" or "en".
        format: a name of conversation.FORMATS; None for the bundle's.
        batch: how many pictures are in work at once. Their captions are written together, as far as
            the engine batches and memory allows (see engines.base.Engine.open_slots).
        generation: all options of the answers as one value.
        options: fields of generation.Generation by name; they override those of `generation`.

        Raises OptionError for a wrong argument, EngineError for a text-only bundle. While it is
        iterated over: EngineError if the engine fails, ContextError if the prompt is too long, and
        whatever `images` raises.
        """
        from seechat_lite.captions import run

        check_type("prompt", prompt, str | None, "a text")
        check_choice("language", language, run.LANGUAGES)
        check_integer("batch", batch, least=1, most=run.MAX_BATCH, expected=run.EXPECTED_BATCH)
        check_type("generation", generation, Generation | None, "a Generation")
        sources = [images] if is_one(images) else images
        check_type("images", sources, Iterable, "a picture or several")
        name = self.chat(format).format.name
        self._pixel_spec(exact=False)  # whether it sees pictures
        return run.of_sources(
            self,
            sources,  # pyright: ignore[reportArgumentType]  not one picture
            question=run.question(prompt, name, language),
            format=name,
            generation=replace(generation or Generation(), **options),
            batch=batch,
        )

    def encode_image(
        self,
        source: ImageSource,
        *,
        exact: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[str, np.ndarray]:
        """A picture's key and its embeddings, float32 [tokens, hidden].

        The embeddings of a known picture come from memory.

        source: the picture.
        exact: prepare it as the published code does (see PixelSpec.exact).
        stopped: asked while the picture is decoded, which may take seconds, while it waits for
            other pictures, and after every wake().

        Raises ImageError, EngineError for a text-only bundle or a closed model, Cancelled once
        `stopped` returns True.
        """
        spec = self._pixel_spec(exact)
        known = source if isinstance(source, PreparedImage) else load_image(source)
        key = known.key + ("-exact" if exact else "")
        if (embeds := self._remembered(key)) is not None:
            return key, embeds
        if isinstance(known, PreparedImage):
            values = prepared_pixels(known, spec, stopped=stopped)
        else:
            values = pixels(known.image, spec, stopped=stopped)
        with self._pictures.held(partial(self._check, stopped)):
            if (embeds := self._remembered(key)) is None:
                embeds = self.engine.encode_image(values[None])[0]
                self._remember(key, embeds)
            return key, embeds

    def read_question(self, question: str, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The embeddings of pictures for a question, float32 [tokens, hidden] by key.

        Most models encode a picture the same way whatever is asked: they come as they are. What
        was computed for a picture and a question is remembered.

        question: the question.
        seen: what encode_image() returned, by key.

        Raises EngineError if the package tokenizers is not installed.
        """
        vision = self.manifest.vision
        if not (vision and vision.question and seen):
            return dict(seen)
        with self._pictures.held(partial(self._check, lambda: False)):
            if self._wordpiece is None:
                assert self._question_vocabulary and vision.network
                size = vision.network.query_words
                self._wordpiece = question_words(self._question_vocabulary, size)
            # LAVIS reads the end of a long question
            ids, _ = self._wordpiece.encode(question, most=vision.question.pieces, keep_end=True)
            asked = hashlib.sha256(repr(ids).encode()).hexdigest()
            found = {}
            for key, features in seen.items():
                if (embeds := self._remembered(f"{key} {asked}")) is None:
                    embeds = self.engine.read_question(features, ids)
                    self._remember(f"{key} {asked}", embeds)
                found[key] = embeds
            return found

    def prepare_image(
        self,
        source: ImageSource,
        *,
        exact: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> PreparedImage:
        """Decode a picture ahead, in any thread, and return it as a picture to ask about.

        A picture that the model remembers is not decoded.

        source, exact, stopped: as for encode_image.

        Raises the errors of encode_image.
        """
        spec = self._pixel_spec(exact)
        picture = load_image(source)
        if self._remembered(picture.key + ("-exact" if exact else "")) is not None:
            return PreparedImage(picture.key, spec, picture.image)
        return PreparedImage(picture.key, spec, levels(picture.image, spec, stopped=stopped))

    def _pixel_spec(self, exact: bool) -> PixelSpec:
        """How pictures become pixels. Raises EngineError for a text-only bundle."""
        vision = self.manifest.vision
        if vision is None:
            raise EngineError(
                f"{self.manifest.name}: a text-only model; expected one that sees pictures: "
                "ask without one, or load a bundle that was exported with a vision tower"
            )
        return replace(vision.pixels, exact=exact or vision.pixels.exact)

    def _remembered(self, key: str) -> np.ndarray | None:
        with self._images_lock:
            if key in self._images:
                self._images.move_to_end(key)
            return self._images.get(key)

    def _remember(self, key: str, embeds: np.ndarray) -> None:
        with self._images_lock:
            self._images[key] = embeds
            while sum(e.nbytes for e in self._images.values()) > self._image_cache:
                self._images.popitem(last=False)

    def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """What an answer of a JSON schema may hold. It serves one answer.

        schema: the schema.

        Raises OptionError if the schema cannot be followed or the extra `schema` is not installed.
        """
        return self._tokens.constraint(schema)

    def close(self) -> None:
        """End running answers, wait for them, and free all memory. Closing twice is harmless.

        May be called from any thread at any time. Answers that run or wait then raise EngineError,
        and so does any later use of the model.
        """
        self._closed = True
        self.wake()
        self.engine.close()
        self._tokens.close()
        if self._wordpiece:
            self._wordpiece.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def answering(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the engine for one answer. Others wait; the thread that holds it must not ask again.

        stopped: asked before waiting and after every wake().

        Raises EngineError if the model is closed, Cancelled once `stopped` returns True.
        """
        with self._answers.held(partial(self._check, stopped)):
            yield

    def wake(self) -> None:
        """Make those who wait for their turn ask `stopped` again."""
        self._answers.wake()
        self._pictures.wake()

    def _check(self, stopped: Callable[[], bool]) -> None:
        if self._closed:
            raise EngineError("the model is closed; expected an open one: load it again")
        if stopped():
            raise Cancelled("stopped while it waited for its turn")


@dataclass(frozen=True, repr=False)
class Stats:
    """What one answer took: tokens, seconds, and why it ended."""

    prompt_tokens: int
    new_tokens: int
    dropped_turns: int  # turns left out because the context had no room for them
    first_token_seconds: float  # pictures and prompt included
    seconds: float
    finish_reason: str  # "stop", "length" (max_new_tokens or a full context) or "cancelled"
    guessed_tokens: int = 0  # run before they were chosen; right_guesses of them were chosen
    right_guesses: int = 0
    held_tokens: int = 0  # of the prompt, that an earlier answer left in the cache: not read again

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        rest = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / rest if self.new_tokens > 1 and rest > 0 else 0.0

    def __repr__(self) -> str:
        forgotten = f", {self.dropped_turns} turns forgotten" if self.dropped_turns else ""
        held = f", {self.held_tokens} of them known" if self.held_tokens else ""
        return (
            f"<Stats: {self.prompt_tokens} tokens read{held}, {self.new_tokens} written in "
            f"{self.seconds:.2f} s (the first after {self.first_token_seconds:.2f} s, then "
            f"{self.tokens_per_second:.1f} a second), ended by {self.finish_reason!r}{forgotten}>"
        )


class Answer(str):
    """An answer's text, a str, with `stats`: what it took."""

    stats: Stats

    def __new__(cls, text: str, stats: Stats) -> Self:
        answer = super().__new__(cls, text)
        answer.stats = stats
        return answer

    def __reduce__(self) -> tuple[type[Self], tuple[str, Stats]]:
        return type(self), (str(self), self.stats)


class AnswerStream(Iterator[str]):
    """Iterates over the pieces of an answer.

    stats: what the answer took, once it has ended; None before.
    """

    def __init__(self, chat: "Chat", pieces: Generator[str | None, None, None]) -> None:
        self._chat = chat
        self._pieces = pieces
        self._begun = False
        self.stats: Stats | None = None

    def __next__(self) -> str:
        while (piece := self.advance()) is None:
            pass
        return piece

    def advance(self) -> str | None:
        """The next piece, or None while the answer waits for its chat's seat.

        Raises StopIteration at the end, and the errors of Chat.stream().
        """
        self._begun = True
        try:
            return next(self._pieces)
        except StopIteration:
            self.stats = self.stats or self._chat.stats
            raise

    def whole(self) -> Generator[None, None, "Answer"]:
        """The whole answer, which the generator returns; it yields while the answer waits.

        Raises the errors of Chat.stream().
        """
        text = ""
        while True:
            try:
                piece = self.advance()
            except StopIteration:
                break
            if piece is None:
                yield
            else:
                text += piece
        assert self.stats is not None
        return Answer(text, self.stats)

    def close(self) -> None:
        """End the answer here. Its turn stays in the history with the text said so far."""
        self._pieces.close()
        if self._begun:
            self.stats = self.stats or self._chat.stats


@dataclass(frozen=True)
class _Past:
    """A conversation's history at one moment; another thread may clear() it at any time."""

    turns: list[Turn]
    embeds: dict[str, np.ndarray]  # pictures of the turns, by key
    cleared: int  # how many times it had been cleared


class Chat:
    """One conversation, made by Model.chat.

    Two threads must not use it at once, except for stop() and clear().

    seat: where its answers run; None: they have the engine for themselves.
    """

    def __init__(self, model: Model, format: Format) -> None:
        self.model = model
        self.format = format
        self.turns: list[Turn] = []
        self.stats: Stats | None = None  # of the last answer
        self.dropped_turns = 0  # for which the last question left no room
        self._embeds: dict[str, np.ndarray] = {}  # pictures of the turns, by key
        # a question from messages, not yet answered
        self._asked: tuple[str, list[ImageSource]] | None = None
        self._told = ""  # what the system says before the next question
        self.seat: Seat | None = None
        self._working: Seat | None = None  # of the answer for which the engine works
        # held while the history changes, and by stop(), which keeps the engine from beginning
        # another chat's work meanwhile
        self._lock = threading.RLock()
        self._stopped = self._cleared = 0  # how many times

    def stream(
        self,
        question: str | None = None,
        image: ImageSource | Iterable[ImageSource] | None = None,
        *,
        generation: Generation | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AnswerStream:
        """Ask, and yield the answer piece by piece; the pieces joined are the answer.

        The turn enters the history when the stream ends, also if it was stopped or closed early. It
        does not if the answer fails.

        question: the question. None or blank asks for a description of the picture, or, if the
            messages that the chat was made of end with a question, for its answer.
        image: one picture or several, shown with this question; later questions remember them.
        generation: all options as one value.
        options: fields of generation.Generation by name; they override those of `generation`.

        Raises ImageError, EngineError, ContextError (neither question nor picture, or too long for
        the context), OptionError (an option out of range).
        """
        check_type("generation", generation, Generation | None, "a Generation")
        check_type("question", question, str | None, "a text")
        chosen = replace(generation or Generation(), **options)
        constraint = None if chosen.schema is None else self.model.constraint(chosen.schema)
        question = question or ""
        if self._asked:
            before, pictures = self._asked
            question = f"{before}\n{question}" if trimmed(question) else before
            image = [*pictures, *several(image)]
        elif not trimmed(question):
            image = list(several(image))
            if not image:
                raise ContextError("the question is empty; expected some text: type a question")
        stopped = self._stopped_from_now()  # a stop() before the first piece must count
        return AnswerStream(self, self._stream(question, image, chosen, stopped, constraint))

    def ask(
        self,
        question: str | None = None,
        image: ImageSource | Iterable[ImageSource] | None = None,
        *,
        generation: Generation | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """Ask, and return the whole answer: a text with `stats` of what it took.

        question, image, generation, options: as for stream().

        Raises the errors of stream().
        """
        pieces = self.stream(question, image, generation=generation, **options)
        text = "".join(pieces)
        assert pieces.stats is not None
        return Answer(text, pieces.stats)

    def take(self, messages: Sequence[Any]) -> None:
        """Add messages to the conversation.

        messages: as for Model.chat.

        Raises OptionError for messages that cannot be read, ImageError.
        """
        found = read_messages(messages, format=self.format, asking=False)
        for past in found.past:
            self.instruct(past.system())
            self.append(past.question(), past.answer(), map(message_picture, past.images))
        if turn := found.turn:
            self.instruct(turn.system())
            asked = turn.question(), [message_picture(image) for image in turn.images]
            self._asked = asked if any(asked) else None

    def instruct(self, text: str) -> None:
        """Have the system tell the model something before the next question.

        text: what it says; empty for nothing. It replaces what was said since the last question.

        Raises OptionError if the conversation's format has no place for it.
        """
        check_type("text", text, str, "a text")
        if text and not self.format.system:
            formats = ", ".join(f.name for f in FORMATS.values() if f.system)
            raise OptionError(
                f"conversation format {self.format.name!r} has no place for a system's text; "
                f"expected one of {formats}: put the text into the question"
            )
        self._told = text

    def append(
        self,
        question: str,
        answer: str,
        image: ImageSource | Iterable[ImageSource] | None = None,
    ) -> None:
        """Put a past turn into the history without running it.

        question: what was asked.
        answer: what was answered.
        image: one picture or several, shown with the question.

        Raises ImageError, EngineError for a picture and a text-only bundle, or if stop() was called
        meanwhile. The history is then as it was.
        """
        turn, embeds = self._turn(question, image, answer=answer, stopped=self._stopped_from_now())
        with self._lock:
            self._embeds |= embeds
            self.turns.append(replace(turn, answer=answer))
            self._told = ""

    def prompt(
        self,
        question: str,
        image: ImageSource | Iterable[ImageSource] | None = None,
        *,
        max_new_tokens: int = 512,
    ) -> Prompt:
        """The prompt that the next stream() would send to the engine; the chat does not change.

        question: as for stream().
        image: as for stream().
        max_new_tokens: as for stream(); room for the answer may cost the prompt its oldest turns.

        Raises the errors of stream(), EngineError if stop() was called meanwhile.
        """
        check_integer("max_new_tokens", max_new_tokens, least=1, expected="at least 1")
        stopped = self._stopped_from_now()
        turn, embeds = self._turn(question, image, stopped=stopped)
        past = self._past()
        return self._fit(past, turn, embeds, reserve=max_new_tokens, stopped=stopped)[0]

    def stop(self) -> None:
        """End the running answer within one token, or together with the picture that is being read.

        append() and prompt() end in the same way, with an EngineError. May be called from any
        thread.
        """
        with self._lock:
            self._stopped += 1
            if self._working:
                self._working.cancel()
        self.model.wake()

    def clear(self) -> None:
        """Forget all turns and pictures, also those of a running answer, which goes on.

        May be called from any thread.
        """
        with self._lock:
            self._cleared += 1
            self.turns, self._embeds, self._asked, self._told = [], {}, None, ""

    def _stopped_from_now(self) -> Callable[[], bool]:
        """Return what says whether stop() was called after this."""
        before = self._stopped
        return lambda: self._stopped != before

    def _past(self) -> "_Past":
        """The history as it is now."""
        with self._lock:
            return _Past([*self.turns], self._embeds, self._cleared)

    def _stream(
        self,
        question: str,
        image: ImageSource | Iterable[ImageSource] | None,
        generation: Generation,
        stopped: Callable[[], bool],
        constraint: Constraint | None,
    ) -> Generator[str | None, None, None]:
        start = time.perf_counter()
        try:
            with nullcontext() if self.seat else self.model.answering(stopped):
                yield from self._answer(
                    question, image, generation, stopped, constraint=constraint, start=start
                )
        except Cancelled:  # before the engine began
            seconds = time.perf_counter() - start
            self.stats = Stats(
                prompt_tokens=0,
                new_tokens=0,
                dropped_turns=0,
                first_token_seconds=seconds,
                seconds=seconds,
                finish_reason="cancelled",
            )

    def _answer(
        self,
        question: str,
        image: ImageSource | Iterable[ImageSource] | None,
        generation: Generation,
        stopped: Callable[[], bool],
        *,
        constraint: Constraint | None,
        start: float,
    ) -> Iterator[str | None]:
        """The rest of _stream(), once the engine, or a seat, is ours.

        Raises Cancelled if the chat is stopped before the engine works.
        """
        model, past = self.model, self._past()
        turn, embeds = self._turn(question, image, stopped=stopped)
        prompt, turns = self._fit(
            past, turn, embeds, reserve=generation.max_new_tokens, stopped=stopped
        )
        dropped = self.dropped_turns = len(past.turns) + 1 - len(turns)
        if dropped:
            log.warning("the context is full: the oldest %d turn(s) are forgotten", dropped)
            if self.format.demo and model.engine.context < DEMO_CONTEXT:
                log.warning(
                    "the published demo would remember them, up to 2000 characters: to compare "
                    "with it, load the model with a context of %d tokens",
                    DEMO_CONTEXT,
                )
        # the last token needs no place in the cache
        room = model.engine.context - len(prompt.ids) + 1
        limit = min(generation.max_new_tokens, room)
        lookup = PromptLookup(prompt.ids, model._row_cost) if generation.speculate else None
        seat = self.seat or Alone(model.engine)
        tokens = decode(
            seat,
            prompt,
            generation,
            max_new_tokens=limit,
            eos_id=model.tokenizer.eos_id,
            other_eos=(model.manifest.lm.eos_id, *model.manifest.lm.other_eos, *self._ends()),
            stopped=stopped,
            lookup=lookup,
            said=None if self.format.penalizes_prompt else model.tokenizer.prompt_begin,
            constraint=constraint,
        )
        if constraint:  # JSON stays as it is; texts that end other answers may be words in it
            text = TextStream(Verbatim(model.tokenizer), stop=tuple(generation.stop))
            answer = CleanStream(replace(self.format, stop=(), clean=str, holdback=0))
        else:
            text = TextStream(model.tokenizer, stop=(*self.format.stop, *generation.stop))
            answer = CleanStream(self.format)
        count, first, finish, failed = 0, 0.0, "cancelled", False
        self._working = seat
        try:
            for token in tokens:
                if token is None:
                    yield None
                    continue
                count += 1
                first = first or time.perf_counter() - start
                if piece := answer.push(text.push(token)):
                    yield piece
                if text.stopped:
                    break
            if not stopped():
                whole = text.stopped or (constraint is not None and constraint.finished)
                finish = "length" if count >= limit and not whole else "stop"
            if piece := answer.push(text.finish()) + answer.finish():
                yield piece
        except Exception:
            failed = True
            raise
        finally:
            with self._lock:
                self._working = None
            # unless it is kept, a later turn is read again; its memory is free until then
            seat.reset()
            # closed early, interrupted or stopped: what was said so far stays said
            seconds = time.perf_counter() - start
            self.stats = Stats(
                len(prompt.ids),
                count,
                dropped,
                first or seconds,
                seconds,
                finish,
                guessed_tokens=lookup.guessed if lookup else 0,
                right_guesses=lookup.right if lookup else 0,
                held_tokens=seat.held_tokens if count else 0,
            )
            said = answer.shown or finish != "cancelled"
            with self._lock:
                if said and not failed and past.cleared == self._cleared:
                    self.turns = [*turns[:-1], replace(turns[-1], answer=answer.shown)]
                    shown = {key for t in self.turns for key in t.images}
                    self._embeds = {k: e for k, e in (self._embeds | embeds).items() if k in shown}
                    self._asked, self._told = None, ""

    def _ends(self) -> list[int]:
        """The tokens that end an answer in this format, as far as the tokenizer has them."""
        found = map(self.model.tokenizer.encode, self.format.ends)
        return [ids[0] for ids in found if len(ids) == 1]

    def _turn(
        self,
        question: str,
        image: ImageSource | Iterable[ImageSource] | None,
        *,
        answer: str = "",
        stopped: Callable[[], bool],
    ) -> tuple[Turn, dict[str, np.ndarray]]:
        """The turn to ask and the embeddings of its pictures.

        answer: the answer, if it is known; it tells which language is spoken.
        stopped: asked before each picture, which may take seconds; Cancelled is raised if so.
        """
        check_type("question", question, str, "a text")
        embeds: list[tuple[str, np.ndarray]] = []
        tokens, context = 0, self.model.engine.context
        for source in several(image):
            if stopped():
                raise Cancelled("stopped while its pictures were read")
            # refused before the other pictures are read: there may be endlessly many
            if tokens >= context:
                raise ContextError(
                    f"the first {len(embeds)} pictures of the question take {tokens} tokens; the "
                    f"context holds {context}, answer included: show fewer"
                )
            # answers are compared with the published demo's, so its pixels are used
            embeds.append(self.model.encode_image(source, exact=self.format.exact, stopped=stopped))
            vision = self.model.manifest.vision
            tokens += vision.tokens if vision else 0
        if embeds and not trimmed(question):
            said = [text for turn in self.turns for text in (turn.question, turn.answer or "")]
            question = description_question(self.format, [*said, answer])
        keys = tuple(key for key, _ in embeds)
        return Turn(question, images=keys, system=self._told), dict(embeds)

    def _fit(
        self,
        past: "_Past",
        turn: Turn,
        embeds: dict[str, np.ndarray],
        *,
        reserve: int,
        stopped: Callable[[], bool],
    ) -> tuple[Prompt, list[Turn]]:
        """The prompt for `turn`, and the turns in it: see history.fit."""
        return history.fit(
            [*past.turns, turn],
            self.model.read_question(turn.question, past.embeds | embeds),
            format=self.format,
            tokenizer=self.model.tokenizer,
            context=self.model.engine.context,
            reserve=reserve,
            stopped=stopped,
        )
