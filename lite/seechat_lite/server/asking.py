"""Turns a request of any API into what the scheduler takes, and makes an answer's headers."""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from seechat_lite.chat import Stats
from seechat_lite.conversation import FORMATS, Format
from seechat_lite.generation import Generation
from seechat_lite.history import MAX_CHARACTERS_PER_TOKEN
from seechat_lite.messages import read_messages
from seechat_lite.server import schemas
from seechat_lite.server.access import client_of
from seechat_lite.server.bodies import Bodies
from seechat_lite.server.errors import ApiError, unsupported
from seechat_lite.server.image_urls import Images
from seechat_lite.server.request_limits import held_by
from seechat_lite.server.scheduler import Begun, GenerationRequest, Scheduler, Turn
from seechat_weights.bundle.manifest import Sampling

log = logging.getLogger(__name__)

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
SMALL_PENALTY = 1.0  # a smaller penalty changes little; a larger one is meant
IGNORED, DROPPED = "X-Seechat-Ignored", "X-Seechat-Dropped-Turns"


class Asking:
    """What the APIs share.

    scheduler: answers.
    bodies: reads bodies.
    images: reads pictures.
    names: what the model may be called; the first is its own name.
    context: tokens that the cache has room for.
    format: how conversations are written.
    sampling: what the model bears.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bodies: Bodies,
        images: Images,
        *,
        names: Sequence[str],
        context: int,
        format: Format,
        sampling: Sampling | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.bodies = bodies
        self.names = names
        self._images = images
        self._format = format
        self._sampling = sampling
        self._most = context * MAX_CHARACTERS_PER_TOKEN
        self._told: set[str] = set()

    async def ask(
        self,
        request: Request,
        messages: Sequence[dict[str, Any]],
        generation: Generation,
        *,
        pictures: Sequence[str] = (),
        ignored: Sequence[str] = (),
        format: str | None = None,
    ) -> tuple[GenerationRequest, list[str]]:
        """Turn messages into a request for the scheduler; returns it, and what had no effect.

        request: the HTTP request.
        messages: the conversation.
        generation: the options of the answer.
        pictures: pictures of the last question.
        ignored: what is known to have no effect.
        format: the name of a conversation format; None for the server's.

        Raises ApiError, MessagesError, ImageError.
        """
        if format and format not in FORMATS:
            raise ApiError(
                400,
                f"conversation_format is {format!r:.40}; expected one of {', '.join(FORMATS)}",
                code="invalid_value",
                param="conversation_format",
            )
        written = FORMATS[format] if format else self._format
        found = read_messages(messages, format=written, more=pictures)
        exchanges = [*found.past, found.question]
        urls = [url for e in exchanges for url in e.images]
        if not all(isinstance(url, str) for url in urls):
            raise ApiError(
                400, "a picture that is no text", code="invalid_image_url", param="messages"
            )
        read = await self._images.read(urls, held_by(request.scope))
        files = iter(await self.scheduler.prepare(read, format=format))
        *past, turn = (
            Turn(
                e.question(self._most),
                tuple(next(files) for _ in e.images),
                e.answer(self._most),
                e.system(self._most),
            )
            for e in exchanges
        )
        all_ignored = [*ignored, *found.ignored]
        generation, too_high = bearable(generation, self._sampling)
        all_ignored += too_high
        if new := set(all_ignored) - self._told:
            self._told |= new
            log.info("ignored, here and from now on: %s", ", ".join(sorted(new)))
        ask = GenerationRequest(
            client_of(request.scope), turn, tuple(past), generation, format=format or None
        )
        return ask, all_ignored

    def generation(
        self,
        given: schemas.AnswerOptions,
        *,
        limit: int | None,
        schema: Mapping[str, Any] | None = None,
    ) -> Generation:
        """The options of an answer as clients mean them.

        given: what the request says of them; None there is the model's default, or ours.
        limit: tokens of the answer; negative for as many as the context holds.
        schema: see generation.Generation.

        Raises ApiError.
        """
        stops = [given.stop] if isinstance(given.stop, str) else given.stop or []
        stops = [text for text in stops if text]  # an empty field of a form stops nothing
        if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in stops):
            raise ApiError(
                400,
                f"stop: expected at most {MAX_STOPS} texts of up to {MAX_STOP_LENGTH} characters",
                code="invalid_value",
                param="stop",
            )
        usual = self._sampling
        heat = _first(given.temperature, usual and usual.temperature, 0.0)
        reach = _first(given.top_p, usual and usual.top_p, 1.0)
        if reach == 0 or heat < 0.001:  # only the likeliest token is left
            heat, reach = 0.0, 1.0
        # a seed names an answer; without one, or with -1 as in other servers, it is drawn anew
        seed = given.seed
        seed = secrets.randbits(63) if seed in (None, -1) else seed % 2**63
        limit = limit or Generation.max_new_tokens
        return Generation(
            stop=tuple(stops),
            max_new_tokens=schemas.MAX_INTEGER if limit < 0 else limit,  # the context limits it
            temperature=heat,
            top_p=reach,
            top_k=max(_first(given.top_k, usual and usual.top_k, 0), 0),
            repetition_penalty=_first(
                given.repetition_penalty, usual and usual.repetition_penalty, 1.0
            ),
            seed=seed,
            schema=schema,
        )

    def check_name(self, name: str | None) -> None:
        """Raise ApiError 404 for another model's name.

        name: the name in the request; None for any model.
        """
        if name and name not in self.names:
            raise unknown_model(name)


def bearable(generation: Generation, sampling: Sampling | None) -> tuple[Generation, list[str]]:
    """The options that a model bears, and in words what was too high for it.

    generation: the options.
    sampling: what the model bears; None for everything.
    """
    told: list[str] = []
    for name in ("temperature", "repetition_penalty"):
        most = sampling and getattr(sampling, f"max_{name}")
        if most is not None and getattr(generation, name) > most:
            generation = replace(generation, **{name: most})
            told.append(f"{name} above {most:g}")
    return generation, told


def headers(begun: Begun | Stats, ignored: Sequence[str]) -> dict[str, str]:
    """An answer's headers: what was ignored, and how many turns were dropped.

    begun: what is known of the answer.
    ignored: what had no effect.
    """
    told = {IGNORED: ", ".join(ignored)} if ignored else {}
    if begun.dropped_turns:
        told[DROPPED] = str(begun.dropped_turns)
    return told


def not_done(body: schemas.ChatRequest | schemas.CompletionRequest) -> list[str]:
    """The fields of a request that have no effect.

    body: the request.

    Raises ApiError for a field that would change the answer.
    """
    if body.n not in (None, 1):
        raise unsupported("n", "one answer a request; ask again with another seed", param="n")
    ignored = []
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(body, name)
        if value and abs(value) > SMALL_PENALTY:
            raise unsupported(name, "use repetition_penalty", param=name)
        ignored += [name] if value else []
    for name in ("logit_bias", "logprobs"):
        if getattr(body, name):
            raise unsupported(name, "leave it out", param=name)
    if not isinstance(body, schemas.ChatRequest):
        return ignored
    ignored += tools_ignored(body.tools, body.tool_choice)
    if body.functions:
        if isinstance(body.function_call, dict):
            raise _no_calls("function_call")
        ignored.append("functions")
    return ignored


def tools_ignored(tools: Any, choice: str | dict[str, Any] | None) -> list[str]:
    """Return the names of the fields for tools, which are ignored: this model calls none.

    Programs declare tools to every model.

    tools: the declared tools.
    choice: which tool to call.

    Raises ApiError if the model is told to call one.
    """
    if isinstance(choice, dict) or choice in ("required", "any"):
        raise _no_calls("tool_choice")
    return ["tools"] if tools else []


def unknown_model(name: str) -> ApiError:
    """The error for another model's name.

    name: the name.
    """
    shown = name if len(name) <= 80 else name[:80] + "…"
    return ApiError(
        404,
        f"no model {shown!r} here: ask /v1/models, or leave `model` out",
        code="model_not_found",
        param="model",
    )


def _first(*values: Any) -> Any:
    """The first of them that is not None."""
    return next(value for value in values if value is not None)


def _no_calls(name: str) -> ApiError:
    return unsupported(name, "this model calls no tools; expected auto or none", param=name)
