"""Decides who is answered when: one model, some answers at a time, clients in turn.

Everything that touches the model runs in one thread, which writes the answers together (see
together.Together). One request at a time passes the door: the next may follow when its prompt has
been read, if fewer answers run than there are slots. The pieces of an answer go to the client's
task through a queue, so a slow client delays nobody. If that task is cancelled, its place in the
queue is free at once, and a running answer ends within one token.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from seechat_lite.chat import Chat, Model, Stats
from seechat_lite.conversation import FORMATS
from seechat_lite.engines.base import Cancelled
from seechat_lite.generate import Seat
from seechat_lite.generation import Generation
from seechat_lite.images import PreparedImage
from seechat_lite.server.errors import ApiError
from seechat_lite.server.fair_queue import FairQueue
from seechat_lite.together import Task, Together
from seechat_weights.errors import BundleError, CheckpointError

log = logging.getLogger(__name__)

DECODERS = 2  # pictures that are decoded at a time
# of the time, that running answers are written before the next prompt is read
SHARE = 0.5


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
    slots: how many answers may run at once, if the engine and the memory allow it.
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
        slots: int = 1,
    ) -> None:
        self._load = load
        self._format = format
        self._wanted_slots = slots
        self._slots = 1  # those of the loaded model
        self._keep_alive = keep_alive
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, "seechat-model")
        self._decoders = ThreadPoolExecutor(DECODERS, "seechat-pictures")
        self._model: Model | None = None
        self._opened = self._stopping = False
        self._busy = False  # the door is shut: the thread loads, or reads a prompt
        self._client = ""  # the client for whom it does, or did last
        self._running: set[_Running] = set()  # the answers that run
        # those that the thread has not begun yet, and whether it is at work
        self._coming: deque[_Running] = deque()
        self._working, self._lock = False, threading.Lock()
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
        return self._usual * (len(self._queue) + 1) / self._slots

    @property
    def answering(self) -> bool:
        """Whether an answer runs."""
        return bool(self._running)

    @property
    def idle(self) -> bool:
        """Whether the model's thread has nothing to do, so that the process may end."""
        return not self._busy and not self._running

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
        running = _Running(ask, asyncio.get_running_loop(), self._door_opens)
        running.done.add_done_callback(partial(self._answered, running))
        self._running.add(running)
        with self._lock:
            self._coming.append(running)
            idle, self._working = not self._working, True
        if idle:
            self._thread.submit(self._work)
        try:
            said = False
            while piece := await running.pieces.get():
                if isinstance(piece, ApiError):
                    raise piece
                said |= isinstance(piece, str)
                yield piece
            try:
                stats = await running.done
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
            if self._model:
                self._model.wake()

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
        """Refuse requests that wait or come, and end running answers.

        grace: seconds that running answers may still take.
        """
        self._stopping = True
        for place in self._queue.clear():
            if not place.done():
                place.set_exception(_shutting_down())
        await self._finished(grace)
        for running in self._running:
            running.stop()
        await self._finished(0.5)
        for running in self._running:  # in a call of the engine that cannot be stopped
            running.pieces.put_nowait(_shutting_down())

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
        if not self._busy and len(self._running) < self._slots:
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
        """Open the door, and let the next client in if there is room."""
        self._busy = False
        while len(self._running) < self._slots and (place := self._queue.get(after=self._client)):
            if not place.done():
                self._busy = True
                place.set_result(None)
                return
        self._stay()
        idle = not self._running and self._model and not self._stopping
        if self._keep_alive is not None and idle:
            loop = asyncio.get_running_loop()
            self._unloading = loop.call_later(self._keep_alive, self._unload)

    def _door_opens(self, running: "_Running") -> None:
        """Let the next client in once the prompt of an answer was read, or the answer has ended."""
        if running.entering:
            running.entering = False
            self._leave()

    def _answered(self, running: "_Running", done: asyncio.Future[Stats]) -> None:
        if not done.cancelled():
            done.exception()  # marks it as seen; the client may have gone
        self._running.discard(running)
        if running.entering:
            self._door_opens(running)
        elif not self._busy:
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
        if self._model is None:
            self._model = model = self._load()
            self._slots = 1
            if self._wanted_slots > 1:
                opened = model.engine.open_slots(self._wanted_slots, tokens=model.engine.context)
                self._slots = max(opened, 1)
                log.info("answers at once: %d of %d", self._slots, self._wanted_slots)
        return self._model

    def _forget(self) -> None:
        if self._model:
            self._model.close()
            self._model = None

    def _work(self) -> None:
        """Write answers until there are none left."""
        running: dict[Task[Stats], _Running] = {}
        try:
            while self._coming or running:
                with ExitStack() as held:
                    self._write(running, held)
                with self._lock:
                    self._working = bool(self._coming)
        except BaseException as e:
            with self._lock:
                self._working = False
                left = [*running.values(), *self._coming]
                self._coming.clear()
            for one in left:
                one.end(e)
            raise

    def _write(self, running: dict[Task[Stats], "_Running"], held: ExitStack) -> None:
        """Write answers with one model until none is left, or that model's files have changed.

        running: filled with those that run, and emptied again.
        held: holds the engine afterwards.
        """
        together: Together[Stats] | None = None
        while self._coming or running:
            while self._coming:
                one = self._coming.popleft()
                try:
                    model = self._loaded()
                    if together is None:
                        held.enter_context(model.answering(lambda one=one: one.stopped))
                        together = Together(model.engine, self._slots, alone=True, share=SHARE)
                except Exception as e:
                    one.end(e)
                else:
                    running[together.join(partial(self._answer, one, model))] = one
            changed = False
            for task in together.advance() if together is not None else ():
                error = task.error
                changed |= isinstance(error, BundleError | CheckpointError)
                running.pop(task).end(error or task.result)
            for task, one in running.items():
                if task.seat.begun:
                    one.read()
            if changed and together is not None:
                self._forget()  # so the next request loads what is there now
                while running:  # these end as the model is closed
                    for task in together.advance():
                        running.pop(task).end(task.error or task.result)
                return

    def _answer(
        self, running: "_Running", model: Model, seat: Seat
    ) -> Generator[None, None, Stats]:
        """Write one answer; yields while it waits for its seat."""
        ask = running.ask
        chat = model.chat(ask.format or self._format)
        chat.seat = seat
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
        while True:
            try:
                piece = stream.advance()
            except StopIteration:
                break
            if piece is None:
                yield
                continue
            if not begun:
                running.put(Begun(chat.dropped_turns))
                begun = True
            running.put(piece)
        if not begun:
            running.put(Begun(chat.dropped_turns))
        if chat.stats is None:
            raise AssertionError("a finished stream has its Stats")
        return chat.stats


class _Running:
    """A running answer: what it has said and how to end it.

    ask: the request.
    done: gets the Stats.
    entering: whether it keeps the door shut.
    """

    def __init__(
        self,
        ask: GenerationRequest,
        loop: asyncio.AbstractEventLoop,
        was_read: Callable[["_Running"], None],
    ) -> None:
        self.ask = ask
        # "" marks the end
        self.pieces: asyncio.Queue[str | Begun | ApiError] = asyncio.Queue()
        self.done: asyncio.Future[Stats] = loop.create_future()
        self.entering = True
        self._loop, self._was_read, self._read = loop, was_read, False
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

    # --- in the model's thread

    def put(self, piece: str | Begun) -> None:
        """Give a piece to the client's task."""
        self._call(self.pieces.put_nowait, piece)

    def read(self) -> None:
        """Tell that the prompt was read."""
        if not self._read:
            self._read = True
            self._call(self._was_read, self)

    def end(self, outcome: Stats | BaseException | None) -> None:
        """Tell how it ended."""
        self._call(self._end, outcome)

    def _call(self, what: Callable[..., object], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, argument)
        except RuntimeError:  # the loop is closed: nobody listens
            self.stop()

    def _end(self, outcome: Stats | BaseException | None) -> None:
        if isinstance(outcome, Stats):
            self.done.set_result(outcome)
        elif outcome:
            self.done.set_exception(outcome)
        self.pieces.put_nowait("")


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
