"""Logs one line a request on stderr, for people or (--log-json) for programs."""

import json
import logging
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seechat_lite.chat import Stats
from seechat_lite.server.metrics import Metrics
from seechat_weights.plain_text import many_lines, one_line

log = logging.getLogger("seechat_lite.requests")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_STATE = "seechat"  # the key under which a request's scope keeps its notes


def set_up(*, as_json: bool, verbose: bool) -> None:
    """Log to stderr; this replaces the set-up of the command line.

    as_json: JSON lines.
    verbose: log more.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(as_json=as_json))
    logging.basicConfig(
        handlers=[handler], level=logging.DEBUG if verbose else logging.INFO, force=True
    )
    logging.getLogger("uvicorn").setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def formatter(*, as_json: bool) -> logging.Formatter:
    """A formatter that makes one line of every record, whatever is in it.

    as_json: JSON lines.
    """
    return _Json() if as_json else _Text()


def note(request: Request, stats: Stats) -> None:
    """Make the request's line tell what its answer took.

    request: the request.
    stats: of its answer.
    """
    request.scope[_STATE].update(
        prompt_tokens=stats.prompt_tokens,
        new_tokens=stats.new_tokens,
        first_token_seconds=round(stats.first_token_seconds, 3),
        tokens_per_second=round(stats.tokens_per_second, 1),
        finish_reason=stats.finish_reason,
    )


def note_error(request: Request, code: str) -> None:
    """Make the request's line tell why it was refused.

    request: the request.
    code: the error's word for programs.
    """
    request.scope[_STATE]["error"] = code


def _request_id(scope: Scope) -> bytes:
    """The name that the client gave its request, or one of ours."""
    for header, value in scope["headers"]:
        if header == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return b"req_" + secrets.token_hex(8).encode()


class RequestLog:
    """The outermost ASGI middleware. It never logs what users ask and what is answered.

    app: the application behind it.
    metrics: counts requests.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        notes: dict[str, Any] = {}
        scope[_STATE] = notes
        status = 499  # the client had gone before an answer

        name = _request_id(scope)

        async def noticing(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        try:
            await self._app(scope, receive, noticing)
        except Exception:
            status = 500
            raise
        finally:
            fields = {
                "client": (scope.get("client") or ("", 0))[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - start, 3),
                "request": name.decode(),
            } | notes
            self._metrics.requested(scope["method"], status)
            log.info("request", extra={"fields": fields})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        message = " ".join(f"{k}={v}" for k, v in fields.items()) or record.getMessage().strip()
        # a path may hold anything that a client sent, also line breaks and escape sequences
        line = one_line(f"seechat: {message}")
        if not record.exc_info:
            return line
        return f"{line}\n{many_lines(self.formatException(record.exc_info))}"
