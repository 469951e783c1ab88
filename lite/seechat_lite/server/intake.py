"""Takes a request's body in, within limits, and ends its task when the client goes away."""

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seechat_lite.server.errors import ApiError
from seechat_lite.server.settings import Settings

DRAIN_SECONDS = 2.0


class Intake:
    """ASGI middleware around every route that takes a body.

    The body is read here, to the limits of Settings: its size, that of all bodies together, and
    the time a client may take. The application then runs in a task of its own, which is cancelled
    when the client disconnects or does not take what is sent to it.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        taken = bytearray()
        try:
            try:
                async with asyncio.timeout(self._settings.body_seconds):
                    complete = await self._read(scope, receive, taken)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not come within {self._settings.body_seconds:g} s",
                    code="request_timeout",
                ) from None
            if complete:
                await self._run(scope, receive, send, taken)
        except ApiError as e:
            await self._drain(scope, receive)
            response = e.response()
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
        finally:
            self._held -= len(taken)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Fill in the body; False if the client has gone before its end."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                self._check(int(value))
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return False
            chunk = message.get("body", b"")
            self._check(len(body) + len(chunk))
            if self._held + len(chunk) > self._settings.max_bodies:
                raise ApiError(
                    503,
                    "too many large requests at once: try again later",
                    code="overloaded",
                    headers={"Retry-After": "5"},
                )
            body += chunk
            self._held += len(chunk)
            if not message.get("more_body", False):
                return True

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        """Throw away what the client still sends, for a moment.

        Closing a connection with unread bytes resets it, and the client would never see the answer.
        """
        if any(name == b"expect" for name, _ in scope["headers"]):
            return  # it waits to be told to send
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

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytearray) -> None:
        gone = asyncio.Event()
        waiting: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal waiting
            if waiting:
                message, waiting = waiting, None
                return message
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
            # a client that has gone, or does not listen, is no error
            with suppress(asyncio.CancelledError, TimeoutError):
                await answer
