"""Listens, serves until a signal, and ends cleanly, as uvicorn does but with limits of our own."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from seechat_lite.chat import Model
from seechat_lite.interrupts import EXIT_CODE, raise_on_ctrl_c
from seechat_lite.memory import DEFAULT_CONTEXT
from seechat_lite.server import logs
from seechat_lite.server.app import create_app
from seechat_lite.server.scheduler import Scheduler
from seechat_lite.server.settings import Settings
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.errors import SeechatError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
HEADER_SECONDS = 15.0  # a client must have sent a request's headers by then
MAX_HEADER_BYTES = 32 << 10
# bytes at once: a body in chunks of one byte then blocks the loop for 0.2 s, not 4
READ_BYTES = 16 << 10


def serve(
    load: Callable[[], Model],
    manifest: Manifest,
    *,
    settings: Settings,
    listening: Callable[[str], None],
    host: str = "127.0.0.1",
    port: int = 8080,
    context: int = DEFAULT_CONTEXT,
    format: str | None = None,
    log_json: bool = False,
    verbose: bool = False,
) -> int:
    """Serve until SIGTERM (returns 0) or Ctrl-C (returns 130).

    load, manifest, context, format: see create_app.
    settings: the operator's.
    listening: called with the server's address once it accepts connections; the model may still
        load.
    host: the address to listen on.
    port: the port to listen on; 0 for any free one.
    log_json: log JSON lines.
    verbose: log more.

    Raises the errors of loading the model, and SeechatError if the address cannot be listened on.
    """
    logs.set_up(as_json=log_json, verbose=verbose)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        load, manifest, settings=settings, context=context, format=format, failed=failed
    )
    scheduler: Scheduler = app.state.scheduler
    server = _Server(configure(app), scheduler, settings.grace)
    with _listen(host, port) as sock:
        listening(_address(host, sock))
        raise_on_ctrl_c()  # from here on uvicorn handles signals
        server.run([sock])
    # it loads, or is in a call that does not end; waiting could take for ever
    if not scheduler.idle:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(server.exit_code)
    if failures:
        raise failures[0]
    return server.exit_code


def configure(app: Starlette) -> uvicorn.Config:
    """uvicorn's settings: limits for connections and headers, and no logging of its own.

    app: the application.
    """
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=1,
    )


class _Server(uvicorn.Server):
    """Ends running answers before it closes their connections, and survives a signal."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._grace = grace
        self.exit_code = 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in self.servers:
            listener.close()
        log.info("stopping")
        await self._scheduler.stop(self._grace)
        await asyncio.sleep(0)  # lets the last pieces be sent
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Unlike uvicorn's, do not die of the signal afterwards: the server did as it was told."""

        def handle(number: int, frame: object) -> None:
            self.exit_code = EXIT_CODE if number == signal.SIGINT else 0
            if number == signal.SIGINT and sys.stderr.isatty():
                os.write(2, b"\n")  # after the terminal's ^C
            self.should_exit = True  # a second signal changes nothing: the end is near

        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """Closes connections that take too long to begin or to send their headers."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        no_delay(transport.get_extra_info("socket"))
        # asyncio's own transport for Unix; others read less anyway
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        between = self.cycle is None or self.cycle.response_complete
        if not between:
            self._headers_came()
        elif self._late is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if len(self.connections) > MAX_CONNECTIONS // 2:
            silent = [c for c in self.connections if isinstance(c, _Protocol) and c._late]
            oldest = min(silent, key=lambda c: c._late.when() if c._late else 0, default=None)
            if oldest and len(silent) >= MAX_CONNECTIONS // 2:
                oldest.transport.abort()
                oldest._headers_came()
        self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _headers_came(self) -> None:
        if self._late:
            self._late.cancel()
            self._late = None


def no_delay(sock: Any) -> None:
    """Send small events at once; otherwise each waits 40 ms for the client's acknowledgement.

    sock: the connection's socket.
    """
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@contextmanager
def _listen(host: str, port: int) -> Generator[socket.socket, None, None]:
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except OSError as e:
        # the message already names the address
        reason = (e.strerror or str(e)).partition(" (while")[0]
        raise SeechatError(
            f"{host}:{port}: cannot listen there ({reason}); expected a free port of this "
            "machine: choose another port or host",
            options={"port": None, "host": None},
        ) from None
    with sock:
        no_delay(sock)  # accepted connections inherit it on Linux
        yield sock


def _address(host: str, sock: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sock.getsockname()[1]}"
