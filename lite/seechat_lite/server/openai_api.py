"""POST /v1/chat/completions: a request to a GenerationRequest, an answer to JSON or events."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from seechat_lite.chat import Stats
from seechat_lite.server import schemas
from seechat_lite.server.asking import Asking, headers, not_done
from seechat_lite.server.errors import as_api_error
from seechat_lite.server.json_formats import chat_schema
from seechat_lite.server.logs import note
from seechat_lite.server.scheduler import Begun, GenerationRequest, Scheduler

log = logging.getLogger(__name__)


class Completions:
    """The endpoint.

    asking: what the APIs share.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def answer(self, request: Request) -> Response:
        """Answer a request, whole or as a stream.

        request: the request.
        """
        ask, ignored, stream, usage = await self._asked(request)
        head = _Head(self._asking.names[0])
        if stream:
            return await self._stream(request, head, ask, ignored, with_usage=usage)
        text, stats = await self._asking.scheduler.whole_answer(ask)
        note(request, stats)
        return json_response(head.completion(text, stats), headers(stats, ignored))

    async def _asked(self, request: Request) -> tuple[GenerationRequest, list[str], bool, bool]:
        """Read the request: what is asked, what is ignored, whether to stream, whether with usage.

        This is not in answer(), so that the request is not held while it waits for its turn.
        """
        body = await self._asking.bodies.read(request, schemas.ChatRequest)
        self._asking.check_name(body.model)
        ignored = not_done(body)
        ask, ignored = await self._asking.ask(
            request,
            [m.model_dump(exclude_none=True) for m in body.messages],
            self._asking.generation(
                body,
                limit=body.max_completion_tokens or body.max_tokens,
                schema=chat_schema(body.response_format, param="response_format"),
            ),
            pictures=[*(d.data for d in body.image_data or ()), *(body.images or ())],
            ignored=ignored,
            format=body.conversation_format,
        )
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return ask, ignored, bool(body.stream), usage

    async def _stream(
        self,
        request: Request,
        head: "_Head",
        ask: GenerationRequest,
        ignored: Sequence[str],
        *,
        with_usage: bool,
    ) -> Response:
        answer, begun = await begin(self._asking.scheduler, ask)

        async def events() -> AsyncIterator[str]:
            yield _event(head.chunk(schemas.Delta(role="assistant", content="")))
            async with aclosing(answer):
                try:
                    async for piece in answer:
                        if isinstance(piece, Stats):
                            note(request, piece)
                            yield _event(head.last_chunk(piece))
                            if with_usage:
                                yield _event(head.usage_chunk(piece))
                        elif isinstance(piece, str):
                            yield _event(head.chunk(schemas.Delta(content=piece)))
                except Exception as e:  # too late for a status
                    log.error("an answer broke off", exc_info=e)
                    yield data_event(as_api_error(e).body)
                    return
            yield "data: [DONE]\n\n"

        return event_stream(events(), headers(begun, ignored))


async def begin(
    scheduler: Scheduler, ask: GenerationRequest
) -> tuple[AsyncGenerator[Begun | str | Stats, None], Begun]:
    """Begin an answer; no text is sent yet.

    The headers are sent after this, so that errors before the first piece have their own status.

    scheduler: answers.
    ask: the request.

    Raises the errors that come before the first piece.
    """
    answer = scheduler.answer(ask)
    try:
        begun = await anext(answer)
        assert isinstance(begun, Begun)
    except BaseException:
        await answer.aclose()
        raise
    return answer, begun


def event_stream(
    events: AsyncIterator[str], more: Mapping[str, str], media_type: str = "text/event-stream"
) -> Response:
    """A response that sends each event as it comes.

    events: the events.
    more: more headers.
    media_type: the type of the response.
    """
    told = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **more}
    return StreamingResponse(events, media_type=media_type, headers=told)


@dataclass(frozen=True)
class _Head:
    """What all parts of one answer have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, stats: Stats) -> schemas.ChatCompletion:
        choice = schemas.Choice(
            message=schemas.AnswerMessage(content=text), finish_reason=finish_reason(stats)
        )
        return schemas.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=usage_of(stats),
            timings=_timings(stats),
        )

    def chunk(self, delta: schemas.Delta) -> schemas.ChatChunk:
        return self._chunk([schemas.ChunkChoice(delta=delta)])

    def last_chunk(self, stats: Stats) -> schemas.ChatChunk:
        choice = schemas.ChunkChoice(delta=schemas.Delta(), finish_reason=finish_reason(stats))
        return self._chunk([choice], timings=_timings(stats))

    def usage_chunk(self, stats: Stats) -> schemas.ChatChunk:
        return self._chunk([], usage=usage_of(stats))

    def _chunk(
        self,
        choices: list[schemas.ChunkChoice],
        *,
        usage: schemas.Usage | None = None,
        timings: schemas.Timings | None = None,
    ) -> schemas.ChatChunk:
        return schemas.ChatChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
            timings=timings,
        )


def json_response(body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """A model as a JSON response.

    body: the model.
    headers: more headers.
    """
    return Response(to_json(body), media_type="application/json", headers=headers)


def finish_reason(stats: Stats) -> schemas.FinishReason:
    """Why an answer ended, in OpenAI's words.

    stats: what it took.
    """
    return "stop" if stats.finish_reason == "stop" else "length"


def usage_of(stats: Stats) -> schemas.Usage:
    """The tokens of prompt and answer, as OpenAI counts them.

    stats: what the answer took.
    """
    return schemas.Usage(
        prompt_tokens=stats.prompt_tokens,
        prompt_tokens_details=schemas.PromptTokens(cached_tokens=stats.held_tokens),
        completion_tokens=stats.new_tokens,
        total_tokens=stats.prompt_tokens + stats.new_tokens,
        dropped_turns=stats.dropped_turns,
    )


def _timings(stats: Stats) -> schemas.Timings:
    return schemas.Timings(
        first_token_seconds=round(stats.first_token_seconds, 4),
        seconds=round(stats.seconds, 4),
        tokens_per_second=round(stats.tokens_per_second, 2),
    )


def _event(chunk: schemas.ChatChunk) -> str:
    event = chunk.model_dump(exclude_none=True)
    for choice in event["choices"]:
        # clients read this field; other fields may be missing
        choice.setdefault("finish_reason", None)
    return data_event(event)


def data_event(value: Mapping[str, Any]) -> str:
    """One event of a stream, as OpenAI's APIs send them.

    value: its JSON.
    """
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
