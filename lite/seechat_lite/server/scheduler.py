"""Decides who is answered when: one model, one answer at a time, clients in turn.

Everything that touches the model runs in one thread. The pieces of an answer go to the client's
task through a queue, so a slow client delays nobody. If that task is cancelled, its place in the
queue is free at once, and a running answer ends within one token.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from seechat_lite.chat import Chat, Model, Stats
from seechat_lite.conversation import FORMATS
from seechat_lite.engines.base import Cancelled
from seechat_lite.generation import Generation
from seechat_lite.images import PreparedImage
from seechat_lite.server.errors import ApiError
from seechat_lite.server.fair_queue import FairQueue
from seechat_weights.errors import BundleError, CheckpointError

log = logging.getLogger(__name__)

DECODERS = 2  # pictures that are decoded at a time


@dataclass(frozen=True)
class Turn:
    """A question with the files of its pictures, and its answer if it is past.

    `system` is what a format with a place for it tells the model before.
    """

    question: str
    images: tuple[bytes | PreparedImage, ...] = ()
    answer: str = ""
    system: str = ""


@dataclass(frozen=True)
class GenerationRequest:
    """Everything that one answer needs.

    client: names who asks; clients take turns.
    """

    client: str
    turn: Turn
    past: tuple[Turn, ...] = ()
    generation: Generation = field(default_factory=Generation)
    max_length: int | None = None  # prompt and answer together, instead of max_new_tokens
    format: str | None = None  # of the conversation; None for the scheduler's


@dataclass(frozen=True)
class Begun:
    """What is known when an answer begins.

    dropped_turns: as in Stats.
    """

    dropped_turns: int


class Scheduler:
    """Runs the model's thread. It must be made and used in the event loop's thread.

    load: opens the model, in open() and again after it was unloaded.
    format: the conversation format; None for the bundle's.
    queue: how many requests may wait.
    keep_alive: seconds without a request after which the model is unloaded; None for never.
    observe: called with every answer's Stats.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        format: str | None,
        queue: int,
        keep_alive: float | None,
        observe: Callable[[Stats], None],
    ) -> None:
        self._load = load
        self._format = format
        self._keep_alive = keep_alive
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, "seechat-model")
        self._decoders = ThreadPoolExecutor(DECODERS, "seechat-pictures")
        self._model: Model | None = None
        self._opened = self._stopping = False
        self._busy = False  # something runs in the thread
        self._client = ""  # the client for whom it runs, or ran last
        self._running: _Running | None = None  # the answer, if an answer runs
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(queue)
        self._unloading: asyncio.TimerHandle | None = None
        self._usual = 1.0  # seconds that recent answers took

    @property
    def status(self) -> Literal["ok", "loading", "unloaded", "stopping"]:
        """The state of the model and the server, as /health shows it."""
        if self._stopping:
            return "stopping"
        if not self._opened:
            return "loading"
        return "ok" if self._model else "unloaded"

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def _expected_wait(self) -> float:
        """Seconds until a request that finds no place now would have been answered."""
        return self._usual * (len(self._queue) + 1)

    @property
    def answering(self) -> bool:
        """Whether an answer runs."""
        return self._running is not None

    @property
    def idle(self) -> bool:
        """Whether the model's thread has nothing to do, so that the process may end."""
        return not self._busy

    async def open(self) -> None:
        """Load the model; requests wait meanwhile. Raises the errors of loading it."""
        await self._enter("")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._loaded)
            self._opened = True
            log.info("ready")
        finally:
            self._leave()

    async def answer(self, ask: GenerationRequest) -> AsyncGenerator[Begun | str | Stats, None]:
        """Wait for a turn; yield Begun, the answer's pieces as they come, and at the end the Stats.

        ask: the request.

        Raises ApiError if the queue is full or the server stops, and the errors of Chat.stream.
        """
        await self._enter(ask.client)
        running = self._running = _Running()
        loop = asyncio.get_running_loop()
        put = partial(loop.call_soon_threadsafe, running.pieces.put_nowait)
        done = loop.run_in_executor(self._thread, self._run, ask, running, put)
        done.add_done_callback(self._answered)
        try:
            said = False
            while piece := await running.pieces.get():
                if isinstance(piece, ApiError):
                    raise piece
                said |= isinstance(piece, str)
                yield piece
            try:
                stats = await done
            except Cancelled:
                raise _shutting_down() from None
            self._observe(stats)
            self._usual += (stats.seconds - self._usual) / 4
            # if anybody still reads this, only a shutdown has cut the answer short
            if running.stopped:
                if not said:
                    raise _shutting_down()
                stats = replace(stats, finish_reason="length")
            yield stats
        finally:
            running.stop()

    async def prepare(
        self, images: Sequence[bytes], *, format: str | None = None
    ) -> list[bytes | PreparedImage]:
        """Decode pictures outside the model's thread; a cancelled caller ends the work.

        Pictures stay as they are while no model is loaded that says how to decode them.

        images: the files.
        format: of the conversation; None for the scheduler's.

        Raises ImageError.
        """
        model = self._model
        if model is None or model.manifest.vision is None:
            return list(images)
        exact = FORMATS[format or self._format or model.manifest.conversation].exact
        loop, gone, ready = asyncio.get_running_loop(), threading.Event(), []
        try:
            for image in images:
                decode = partial(
                    model.prepare_image,
                    image,
                    exact=exact,
                    stopped=lambda: gone.is_set() or self._stopping,
                )
                ready.append(await loop.run_in_executor(self._decoders, decode))
        except Cancelled:
            raise _shutting_down() from None
        finally:
            gone.set()
        return ready

    async def whole_answer(self, ask: GenerationRequest) -> tuple[str, Stats]:
        """The pieces of an answer joined, and its Stats.

        ask: the request.

        Raises the errors of answer().
        """
        text = ""
        async with aclosing(self.answer(ask)) as answer:
            async for piece in answer:
                if isinstance(piece, Stats):
                    return text, piece
                text += piece if isinstance(piece, str) else ""
        raise AssertionError("an answer ends with its Stats")

    async def stop(self, grace: float) -> None:
        """Refuse requests that wait or come, and end a running answer.

        grace: seconds that the running answer may still take.
        """
        self._stopping = True
        for place in self._queue.clear():
            if not place.done():
                place.set_exception(_shutting_down())
        await self._finished(grace)
        if self._running:
            self._running.stop()
            await self._finished(0.5)
        if self._running:  # in a call of the engine that cannot be stopped
            self._running.pieces.put_nowait(_shutting_down())

    def close(self) -> None:
        """Release the model, unless it is still at work."""
        self._stay()
        self._thread.shutdown(wait=False)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self.idle and self._model:
            self._model.close()
            self._model = None

    async def _finished(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def _enter(self, client: str) -> None:
        """Return when it is this client's turn."""
        if self._stopping:
            raise _shutting_down()
        if not self._busy:
            self._stay()
            self._busy = True
            self._client = client
            return
        place = asyncio.get_running_loop().create_future()
        refused = self._queue.put(client, place)
        if refused and not refused.done():
            refused.set_exception(_queue_full(len(self._queue), self._expected_wait))
        try:
            await place
        except asyncio.CancelledError:
            waiting = self._queue.remove(client, place)
            if not (waiting or place.cancelled() or place.exception()):  # its turn has just come
                self._leave()
            raise
        self._client = client

    def _leave(self) -> None:
        """Let the next client in."""
        self._running = None
        while place := self._queue.get(after=self._client):
            if not place.done():
                place.set_result(None)
                return
        self._busy = False
        if self._keep_alive is not None and self._model and not self._stopping:
            loop = asyncio.get_running_loop()
            self._unloading = loop.call_later(self._keep_alive, self._unload)

    def _answered(self, done: asyncio.Future[Stats]) -> None:
        if not done.cancelled():
            done.exception()  # marks it as seen; the client may have gone
        self._leave()

    def _stay(self) -> None:
        if self._unloading:
            self._unloading.cancel()
            self._unloading = None

    def _unload(self) -> None:
        self._unloading = None
        self._busy = True
        log.info("unloading the model: nobody has asked for %g s", self._keep_alive)
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._forget)
        done.add_done_callback(lambda _: self._leave())

    # --- in the model's thread

    def _loaded(self) -> Model:
        self._model = self._model or self._load()
        return self._model

    def _forget(self) -> None:
        if self._model:
            self._model.close()
            self._model = None

    def _run(
        self, ask: GenerationRequest, running: "_Running", put: Callable[[str | Begun], object]
    ) -> Stats:
        try:
            chat = self._loaded().chat(ask.format or self._format)
            running.follow(chat)
            for turn in ask.past:
                chat.instruct(turn.system)
                chat.append(turn.question, turn.answer, running.wanted(turn.images))
            chat.instruct(ask.turn.system)
            question, images = ask.turn.question, ask.turn.images
            generation = ask.generation
            if ask.max_length is not None:
                new = ask.max_length - len(chat.prompt(question, running.wanted(images)).ids)
                generation = replace(generation, max_new_tokens=max(new, 1))
            stream = chat.stream(question, images, generation=generation)
            running.follow(chat)  # again: a stop() before stream() does not concern its answer
            begun = False
            for piece in stream:
                if not begun:
                    put(Begun(chat.dropped_turns))
                    begun = True
                put(piece)
            if not begun:
                put(Begun(chat.dropped_turns))
            if chat.stats is None:
                raise AssertionError("a finished stream has its Stats")
            return chat.stats
        except (BundleError, CheckpointError):  # somebody changed its files
            self._forget()  # so the next request loads what is there now
            raise
        finally:
            put("")


class _Running:
    """A running answer: what it has said and how to end it."""

    def __init__(self) -> None:
        # "" marks the end
        self.pieces: asyncio.Queue[str | Begun | ApiError] = asyncio.Queue()
        self._stop = threading.Event()
        self._chat: Chat | None = None

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def wanted(self, images: Iterable[bytes | PreparedImage]) -> Iterator[bytes | PreparedImage]:
        """Yield pictures until the answer is stopped; each picture takes its time."""
        for image in images:
            if self.stopped:
                raise Cancelled
            yield image

    def follow(self, chat: Chat) -> None:
        """Make stop() stop this chat from now on, also if stop() came before."""
        self._chat = chat
        if self.stopped:
            chat.stop()

    def stop(self) -> None:
        self._stop.set()
        if self._chat:
            self._chat.stop()


def _queue_full(waiting: int, seconds: float) -> ApiError:
    return ApiError(
        503,
        f"the queue is full, {waiting} are waiting: try again later",
        code="queue_full",
        headers={"Retry-After": str(min(max(math.ceil(seconds), 1), 600))},
    )


def _shutting_down() -> ApiError:
    return ApiError(
        503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"}
    )
