"""Makes errors as clients of the OpenAI API expect them: a status and {"error": {...}}."""

import logging
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seechat_lite.json_schema import SchemaError
from seechat_lite.messages import MessagesError
from seechat_lite.server.logs import note_error
from seechat_weights.errors import (
    BundleError,
    CheckpointError,
    ContextError,
    EngineError,
    ImageError,
    MemoryPlanError,
    SeechatError,
)

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer that says what is wrong with a request, or with the server.

    status: the HTTP status.
    message: one line for people.
    code: a word for programs.
    param: the field of the request that it is about.
    headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as a JSON object, as OpenAI's API has it."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, path: str) -> JSONResponse:
        """The error as a response with its status and headers, in the shape that clients expect.

        path: what was asked; Ollama's clients, who ask below /api/, look for a text.
        """
        body = {"error": self.message} if path.startswith("/api/") else self.body
        return JSONResponse(body, self.status, headers=self.headers)


HANDLED = (ApiError, SeechatError, ValidationError, MemoryError, HTTPException, Exception)


def unsupported(what: str, advice: str, *, param: str) -> ApiError:
    """The error for a request that this server cannot do; saying so is better than ignoring it.

    what: what was asked for.
    advice: what to do.
    param: the field of the request.
    """
    return ApiError(400, f"{what}: {advice}", code="unsupported", param=param)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any exception; it learns nothing of our own mistakes.

    error: the exception.
    """
    match error:
        case ApiError():
            return error
        case MessagesError():
            return ApiError(400, str(error), code="invalid_messages", param=error.where)
        case ImageError():
            return ApiError(400, str(error), code="invalid_image", param="messages")
        case ContextError():
            return ApiError(400, str(error), code="context_length_exceeded", param="messages")
        case MemoryPlanError():
            return ApiError(503, str(error), code="out_of_memory", headers={"Retry-After": "60"})
        case MemoryError():
            text = "out of memory: send smaller pictures, or give the server more memory"
            return ApiError(503, text, code="out_of_memory", headers={"Retry-After": "60"})
        case EngineError():
            log.error("%s", error)
            return ApiError(500, "the engine failed; the server's log says why", code="engine")
        case BundleError() | CheckpointError():
            log.error("%s", error)
            text = "the model's files cannot be used; the server's log says why"
            return ApiError(500, text, code="model_files")
        case SchemaError():
            return ApiError(400, str(error), code="invalid_json_schema", param="schema")
        case SeechatError():
            return ApiError(400, str(error), code="invalid_value")
        case ValidationError():
            return _invalid(error)
        case HTTPException(status_code=404):
            return ApiError(404, "no such address; see /openapi.json", code="not_found")
        case HTTPException():
            return ApiError(
                error.status_code, error.detail, code="http_error", headers=error.headers
            )
        case _:
            return ApiError(500, "internal error; the server's log says more", code="internal")


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's handler for all of our exceptions.

    request: the request.
    error: the exception.
    """
    answer = as_api_error(error)
    note_error(request, answer.code)
    if answer.status < 500:
        # Its frames hold the request, and a future in them holds the error. This circle would
        # keep megabytes until the garbage collector runs.
        error.__traceback__ = None
    return answer.response(request.url.path)


class Faults:
    """The innermost ASGI middleware: answers our own mistakes.

    Starlette would answer them outside all other middleware, so without the headers without which
    a page of another origin is told of no answer at all.

    app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noticing(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noticing)
        except Exception as e:
            if scope["type"] != "http" or started:
                raise
            log.error("a request could not be answered", exc_info=e)
            response = await handle(Request(scope), e)
            await response(scope, receive, send)


def _invalid(error: ValidationError) -> ApiError:
    """422 for JSON of the wrong shape; 400 for an unknown kind of content."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # for a field of several types, the error of the type that was nearest to right
    first = max(errors, key=lambda e: len(e["loc"]))
    # the names of union members in a path mean nothing to a client
    path = [str(p) for p in first["loc"] if not (isinstance(p, str) and not p.islower())]
    where = _short(".".join(path)) or None
    status = 400 if "content" in path and path[-1] == "type" else 422
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = f"{where or 'body'}: {_short(first['msg'])}{more}"
    return ApiError(status, message, code="invalid_request", param=where)


def _short(text: str) -> str:
    """A text shortened, because a client's own words in it may have any length."""
    return text if len(text) <= 200 else text[:200] + "…"
