"""Reads a request's body within limits, and ends its task when the client goes away."""

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seechat_lite.allocation import trim_heap
from seechat_lite.server.access import client_of
from seechat_lite.server.budget import Budget, Held
from seechat_lite.server.errors import ApiError
from seechat_lite.server.settings import Settings

DRAIN_SECONDS = 2.0
LARGE = 1 << 20  # bytes
_HELD = "seechat_held"  # the key under which a request's scope keeps its part of the budget


def held_by(scope: Scope) -> Held:
    """The part of the memory budget that a request holds; add to it what is read for the request.

    scope: the request's.
    """
    return scope[_HELD]


class Intake:
    """ASGI middleware around every route that takes a body.

    It reads the body within the limits of Settings: its size, that of all bodies together, and the
        time a client may take. The application then runs in a task of its own. That task is
        cancelled if the client disconnects or does not take what is sent to it.

    app: the application behind it.
    settings: the operator's.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self.budget = Budget(total=settings.max_bodies, request=settings.max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        held = scope[_HELD] = self.budget.open(client_of(scope))
        try:
            try:
                async with asyncio.timeout(self._settings.body_seconds):
                    body = await self._read(scope, receive, held)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {self._settings.body_seconds:g} s",
                    code="request_timeout",
                ) from None
            if body is not None:
                waiting: list[Message] = [
                    {"type": "http.request", "body": body, "more_body": False}
                ]
                del body  # the application takes it over and frees it long before the answer ends
                await self._run(scope, receive, send, waiting)
        except ApiError as e:
            e.__traceback__ = None  # its frames hold the bytes that came
            if held.release() >= LARGE:  # before draining: others may wait for this memory
                trim_heap()
            await self._drain(scope, receive)
            response = e.response(scope["path"])
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
        finally:
            if held.release() >= LARGE:
                trim_heap()  # else every thread that had a part of it keeps that memory for later

    async def _read(self, scope: Scope, receive: Receive, held: Held) -> bytearray | None:
        """The body; None if the client has gone before its end."""
        body = bytearray()
        size = 0
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                self._check(int(value))
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            self._check(size)
            held.add(len(chunk))
            body += chunk
            if not message.get("more_body", False):
                return body

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        """Throw away, for a moment, what the client still sends.

        Closing a connection with unread bytes resets it, and the client would never see the answer.
        """
        if any(name == b"expect" for name, _ in scope["headers"]):
            return  # the client waits to be told to send
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while (await receive()).get("more_body", False):
                    pass

    def _check(self, size: int) -> None:
        if size > self._settings.max_body:
            raise ApiError(
                413,
                f"the body is larger than {self._settings.max_body} bytes: send smaller pictures",
                code="body_too_large",
            )

    async def _run(
        self, scope: Scope, receive: Receive, send: Send, waiting: list[Message]
    ) -> None:
        """Run the application; `waiting` is what it will receive, and this takes it out."""
        gone = asyncio.Event()

        async def replay() -> Message:
            if waiting:
                return waiting.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._settings.send_seconds):
                await send(message)

        answer = asyncio.ensure_future(self._app(scope, replay, send_in_time))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({answer, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answer, watcher):
                task.cancel()
            # a client that has gone, or does not listen, is not an error
            with suppress(asyncio.CancelledError, TimeoutError):
                await answer
