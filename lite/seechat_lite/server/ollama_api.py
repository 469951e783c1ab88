"""Ollama's API, for the many programs that speak only that: /api/chat, /api/generate and lists.

Answers are objects. A streamed answer, the default, is one object a line. Options that mean nothing
to these models are ignored, as Ollama does.
"""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seechat_lite.chat import Stats
from seechat_lite.generation import Generation
from seechat_lite.server import schemas
from seechat_lite.server.asking import Asking, headers, tools_ignored, unknown_model
from seechat_lite.server.errors import as_api_error
from seechat_lite.server.json_formats import ollama_schema
from seechat_lite.server.logs import note
from seechat_lite.server.openai_api import begin, event_stream
from seechat_lite.server.scheduler import GenerationRequest
from seechat_weights.bundle.manifest import Manifest

log = logging.getLogger(__name__)

VERSION = "0.12.0"  # the version of Ollama's API that this follows; programs ask for a minimum
_LINES = "application/x-ndjson"


class Ollama:
    """The endpoints.

    asking: what the APIs share.
    manifest: the model's.
    context: tokens that the cache has room for.
    """

    def __init__(self, asking: Asking, manifest: Manifest, *, context: int) -> None:
        self._asking = asking
        self._manifest = manifest
        self._context = context
        self._since = _now()

    def routes(self) -> list[Route]:
        """The routes of these endpoints."""
        return [
            Route("/api/chat", self._chat, methods=["POST"]),
            Route("/api/generate", self._generate, methods=["POST"]),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/tags", self._tags),
            Route("/api/ps", self._tags),
            Route("/api/version", self._version),
        ]

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def _tags(self, _: Request) -> Response:
        names = dict.fromkeys(self._asking.names)
        return JSONResponse({"models": [self._listed(name) for name in names]})

    async def _show(self, request: Request) -> Response:
        body = await self._asking.bodies.read(request, schemas.OllamaShow)
        self._check_name(body.model or body.name)
        lm, vision = self._manifest.lm, self._manifest.vision
        info = {
            "general.architecture": lm.family,
            f"{lm.family}.context_length": self._context,
            f"{lm.family}.embedding_length": lm.hidden_size,
            f"{lm.family}.block_count": lm.num_layers,
        }
        return JSONResponse(
            {
                "modelfile": "",
                "parameters": "",
                "template": "",
                "details": self._details(),
                "model_info": info,
                "capabilities": ["completion", *(["vision"] if vision else [])],
                "modified_at": self._since,
            }
        )

    async def _chat(self, request: Request) -> Response:
        body = await self._asking.bodies.read(request, schemas.OllamaChat)
        messages = [m.model_dump(exclude_none=True) for m in body.messages]
        ignored = tools_ignored(body.tools, None)
        return await self._answered(request, body, messages, _Chat(), ignored=ignored)

    async def _generate(self, request: Request) -> Response:
        body = await self._asking.bodies.read(request, schemas.OllamaGenerate)
        messages: list[dict[str, Any]] = []
        if body.system:
            messages.append({"role": "system", "content": body.system})
        messages.append({"role": "user", "content": body.prompt, "images": body.images or []})
        return await self._answered(request, body, messages, _Generate())

    async def _answered(
        self,
        request: Request,
        body: schemas.OllamaChat | schemas.OllamaGenerate,
        messages: Sequence[dict[str, Any]],
        shape: "_Shape",
        *,
        ignored: Sequence[str] = (),
    ) -> Response:
        self._check_name(body.model)
        name = body.model or self._asking.names[0]
        if not any(m.get("content") or m.get("images") for m in messages):
            # programs load a model ahead, or unload it, in this way
            done = {"done": True, "done_reason": "load"}
            return JSONResponse(_head(name) | shape.piece("") | done)
        stream = body.stream is not False
        ask, told = await self._asking.ask(
            request, messages, self._generation(body), ignored=ignored
        )
        del body, messages  # so that nothing is held while it waits for its turn
        if stream:
            return await self._stream(request, name, ask, shape, told)
        text, stats = await self._asking.scheduler.whole_answer(ask)
        note(request, stats)
        answer = _head(name) | shape.piece(text) | _end(stats)
        return JSONResponse(answer, headers=headers(stats, told))

    async def _stream(
        self,
        request: Request,
        name: str,
        ask: GenerationRequest,
        shape: "_Shape",
        ignored: Sequence[str],
    ) -> Response:
        answer, begun = await begin(self._asking.scheduler, ask)

        async def lines() -> AsyncIterator[str]:
            async with aclosing(answer):
                try:
                    async for piece in answer:
                        if isinstance(piece, Stats):
                            note(request, piece)
                            yield _line(_head(name) | shape.piece("") | _end(piece))
                        elif isinstance(piece, str):
                            yield _line(_head(name) | shape.piece(piece) | {"done": False})
                except Exception as e:  # too late for a status
                    log.error("an answer broke off", exc_info=e)
                    yield _line({"error": as_api_error(e).message})

        return event_stream(lines(), headers(begun, ignored), _LINES)

    def _generation(self, body: schemas.OllamaChat | schemas.OllamaGenerate) -> Generation:
        given = body.options or schemas.OllamaOptions.model_validate({})
        return self._asking.generation(
            given,
            limit=-1 if given.num_predict == -2 else given.num_predict,
            schema=ollama_schema(body.format),
        )

    def _check_name(self, name: str | None) -> None:
        """Check a name as Ollama writes it: with a tag, which here is always the latest."""
        if name and name.removesuffix(":latest") not in self._asking.names:
            raise unknown_model(name)

    def _listed(self, name: str) -> dict[str, Any]:
        files = self._manifest.files
        return {
            "name": name,
            "model": name,
            "modified_at": self._since,
            "size": sum(f.bytes for f in files.values()),
            "digest": next((f.sha256 for f in files.values()), ""),
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        family = self._manifest.lm.family
        seeing = self._manifest.vision is not None
        return {
            "format": "onnx",
            "family": family,
            # tells programs that it takes pictures
            "families": [family, *(["clip"] if seeing else [])],
            "parameter_size": "",
            "quantization_level": self._manifest.decoder.precision,
        }


class _Shape:
    """Says where an answer's text stands in the object."""

    def piece(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class _Chat(_Shape):
    def piece(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


class _Generate(_Shape):
    def piece(self, text: str) -> dict[str, Any]:
        return {"response": text}


def _head(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": _now()}


def _end(stats: Stats) -> dict[str, Any]:
    """The last object; times are in nanoseconds, as Ollama has them."""
    first, rest = stats.first_token_seconds, stats.seconds - stats.first_token_seconds
    return {
        "done": True,
        "done_reason": "stop" if stats.finish_reason == "stop" else "length",
        "total_duration": int(stats.seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": stats.prompt_tokens,
        "prompt_eval_duration": int(first * 1e9),
        "eval_count": stats.new_tokens,
        "eval_duration": int(rest * 1e9),
    }


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
