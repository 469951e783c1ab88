"""POST /v1/chat/completions: a request to a GenerationRequest, an answer to JSON or events."""

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from seechat_lite.chat import Stats
from seechat_lite.conversation import trimmed
from seechat_lite.generation import Generation
from seechat_lite.history import MAX_CHARACTERS_PER_TOKEN
from seechat_lite.server import schemas
from seechat_lite.server.access import client_of
from seechat_lite.server.bodies import Bodies
from seechat_lite.server.errors import ApiError, as_api_error, unsupported
from seechat_lite.server.image_urls import Images
from seechat_lite.server.logs import note
from seechat_lite.server.request_limits import held_by
from seechat_lite.server.scheduler import GenerationRequest, Scheduler, Turn

log = logging.getLogger(__name__)

MAX_STOPS, MAX_STOP_LENGTH = 16, 256


@dataclass
class _Draft:
    """A turn whose pictures are still URLs."""

    texts: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    answers: list[str] | None = None


class Completions:
    """The endpoint.

    names: what the model may be called; the first is its own name. context: tokens it can hold.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bodies: Bodies,
        images: Images,
        *,
        names: Sequence[str],
        context: int,
    ) -> None:
        self._scheduler = scheduler
        self._bodies = bodies
        self._images = images
        self._names = names
        self._most = context * MAX_CHARACTERS_PER_TOKEN

    async def answer(self, request: Request) -> Response:
        ask, stream, usage = await self._asked(request)
        head = _Head(self._names[0])
        if stream:
            return await self._stream(request, head, ask, with_usage=usage)
        text, stats = await self._scheduler.whole_answer(ask)
        note(request, stats)
        return json_response(head.completion(text, stats))

    async def _asked(self, request: Request) -> tuple[GenerationRequest, bool, bool]:
        """What is asked, whether as a stream, and whether with its usage.

        Apart from answer(), so that the request is not held while it waits for its turn.
        """
        body = await self._bodies.read(request, schemas.ChatRequest)
        if body.model and body.model not in self._names:
            raise unknown_model(body.model)
        _refuse_unsupported(body)
        drafts = _turns(body.messages)
        urls = [url for d in drafts for url in d.urls]
        read = await self._images.read(urls, held_by(request.scope))
        files = iter(await self._scheduler.prepare(read))
        *past, turn = (
            Turn(
                joined(d.texts, self._most),
                tuple(next(files) for _ in d.urls),
                joined(d.answers or (), self._most),
            )
            for d in drafts
        )
        ask = _ask(client_of(request.scope), body, turn, tuple(past))
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return ask, bool(body.stream), usage

    async def _stream(
        self, request: Request, head: "_Head", ask: GenerationRequest, *, with_usage: bool
    ) -> Response:
        """Headers are sent with the first piece, so that errors before it have their status."""
        answer = self._scheduler.answer(ask)
        try:
            first = await anext(answer)
        except BaseException:
            await answer.aclose()
            raise

        async def events() -> AsyncIterator[str]:
            yield _event(head.chunk(schemas.Delta(role="assistant", content="")))
            async with aclosing(answer):
                piece = first
                try:
                    while not isinstance(piece, Stats):
                        yield _event(head.chunk(schemas.Delta(content=piece)))
                        piece = await anext(answer)
                except Exception as e:  # too late for a status
                    log.error("an answer broke off", exc_info=e)
                    yield f"data: {json.dumps(as_api_error(e).body, ensure_ascii=False)}\n\n"
                    return
            note(request, piece)
            yield _event(head.last_chunk(piece))
            if with_usage:
                yield _event(head.usage_chunk(piece))
            yield "data: [DONE]\n\n"

        return StreamingResponse(
            events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )


@dataclass(frozen=True)
class _Head:
    """What all parts of one answer have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, stats: Stats) -> schemas.ChatCompletion:
        choice = schemas.Choice(
            message=schemas.AnswerMessage(content=text), finish_reason=_reason(stats)
        )
        return schemas.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=_usage(stats),
            timings=_timings(stats),
        )

    def chunk(self, delta: schemas.Delta) -> schemas.ChatChunk:
        return self._chunk([schemas.ChunkChoice(delta=delta)])

    def last_chunk(self, stats: Stats) -> schemas.ChatChunk:
        choice = schemas.ChunkChoice(delta=schemas.Delta(), finish_reason=_reason(stats))
        return self._chunk([choice], timings=_timings(stats))

    def usage_chunk(self, stats: Stats) -> schemas.ChatChunk:
        return self._chunk([], usage=_usage(stats))

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


def unknown_model(name: str) -> ApiError:
    shown = name if len(name) <= 80 else name[:80] + "…"
    return ApiError(
        404,
        f"no model {shown!r} here: ask /v1/models, or leave `model` out",
        code="model_not_found",
        param="model",
    )


def joined(texts: Sequence[str], most: int) -> str:
    """The texts as one; of more than `most` characters, so many that it shows."""
    parts: list[str] = []
    for text in texts:
        parts.append(text[: most + 1])
        most -= len(text)
        if most < 0:
            break
    return "\n".join(parts)


def json_response(body: BaseModel) -> Response:
    return Response(to_json(body), media_type="application/json")


def _ask(
    client: str, body: schemas.ChatRequest, turn: Turn, past: tuple[Turn, ...]
) -> GenerationRequest:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stop = [text for text in stop if text]  # a form's field that nobody filled in stops nothing
    if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in stop):
        raise ApiError(
            400,
            f"stop: expected at most {MAX_STOPS} texts of up to {MAX_STOP_LENGTH} characters",
            code="invalid_value",
            param="stop",
        )
    temperature = body.temperature or 0.0
    top_p = 1.0 if body.top_p is None else body.top_p
    if top_p == 0 or temperature < 0.001:  # only the likeliest token is left
        temperature, top_p = 0.0, 1.0
    # a seed is a name for an answer; without one, or with other local servers' -1, it is drawn anew
    seed = secrets.randbits(63) if body.seed in (None, -1) else body.seed % 2**64
    limit = body.max_completion_tokens or body.max_tokens or Generation.max_new_tokens
    if limit == -1:  # the context is what limits it
        limit = schemas.MAX_INTEGER
    return GenerationRequest(
        client,
        turn,
        past,
        Generation(
            stop=tuple(stop),
            max_new_tokens=limit,
            temperature=temperature,
            top_p=top_p,
            top_k=max(body.top_k or 0, 0),
            repetition_penalty=body.repetition_penalty or 1.0,
            seed=seed,
        ),
    )


def _turns(messages: Sequence[schemas.Message]) -> list[_Draft]:
    """Questions and answers in turn; the last is to be answered.

    The models know no system messages: their text goes before the next question. Messages of one
    side that follow each other are one.
    """
    turns: list[_Draft] = []
    instructions: list[str] = []
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        texts, urls = _content(message, where)
        if message.role == "assistant":
            if not turns or instructions:
                raise _bad("an answer has no question before it", where)
            turns[-1].answers = [*(turns[-1].answers or ()), *filter(None, texts)]
            continue
        if message.role != "user":
            instructions += texts
            continue
        if not turns or turns[-1].answers is not None:
            turns.append(_Draft())
        turns[-1].texts += instructions + texts
        turns[-1].urls += urls
        instructions = []
    if not turns or turns[-1].answers is not None or instructions:
        raise _bad("expected the last message to be the user's", "messages")
    if not any(map(trimmed, turns[-1].texts)):
        raise _bad("the question is empty; expected some text", "messages")
    return turns


def _content(message: schemas.Message, where: str) -> tuple[list[str], list[str]]:
    """The texts and the picture URLs of a message."""
    if message.content is None:
        if message.role != "assistant":
            raise _bad("a message without content", where)
        return [], []  # an answer of which nothing was said
    if isinstance(message.content, str):
        return [message.content], []
    texts: list[str] = []
    urls: list[str] = []
    for part in message.content:
        if part.type == "text":
            texts.append(part.text or "")
        elif message.role != "user":
            raise unsupported("pictures are the user's to send", "put it there", param=where)
        else:
            urls.append(part.url or "")
    return texts, urls


def _refuse_unsupported(body: schemas.ChatRequest) -> None:
    """What would change the answer and cannot be done."""
    if body.n not in (None, 1):
        raise unsupported("n", "one answer a request; ask again with another seed", param="n")
    for name, advice in (
        ("frequency_penalty", "use repetition_penalty"),
        ("presence_penalty", "use repetition_penalty"),
        ("logit_bias", "leave it out"),
        ("logprobs", "leave it out"),
        ("tools", "these models call none; leave it out"),
        ("functions", "these models call none; leave it out"),
    ):
        if getattr(body, name):
            raise unsupported(name, advice, param=name)
    if body.response_format and body.response_format.get("type") != "text":
        raise unsupported("response_format", "answers are text", param="response_format")


def _bad(why: str, where: str) -> ApiError:
    return ApiError(400, f"{where}: {why}", code="invalid_messages", param=where)


def _reason(stats: Stats) -> schemas.FinishReason:
    return "stop" if stats.finish_reason == "stop" else "length"


def _usage(stats: Stats) -> schemas.Usage:
    return schemas.Usage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.new_tokens,
        total_tokens=stats.prompt_tokens + stats.new_tokens,
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
        choice.setdefault("finish_reason", None)  # clients look for it, other fields may be missing
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
