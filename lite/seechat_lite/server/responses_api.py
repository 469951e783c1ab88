"""POST /v1/responses, OpenAI's newer API, for one answer to one conversation.

Nothing is stored. A request that continues an earlier response is refused and must send the
conversation. A stream has the events that clients wait for, in their order.
"""

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from seechat_lite.chat import Stats
from seechat_lite.server import schemas
from seechat_lite.server.asking import Asking, headers, tools_ignored
from seechat_lite.server.errors import as_api_error, unsupported
from seechat_lite.server.json_formats import chat_schema
from seechat_lite.server.logs import note
from seechat_lite.server.openai_api import begin, event_stream, finish_reason
from seechat_lite.server.scheduler import Begun, GenerationRequest

log = logging.getLogger(__name__)

_CALLS = ("function_call", "custom_tool_call", "reasoning", "item_reference")
_RESULTS = ("function_call_output", "custom_tool_call_output")


class Responses:
    """The endpoint.

    asking: what the APIs share.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def answer(self, request: Request) -> Response:
        """Answer a request, whole or as a stream.

        request: the request.
        """
        ask, ignored, stream, about = await self._asked(request)
        item = f"msg_{secrets.token_hex(16)}"
        if not stream:
            text, stats = await self._asking.scheduler.whole_answer(ask)
            note(request, stats)
            return JSONResponse(
                _finished(about, item, text, stats), headers=headers(stats, ignored)
            )
        answer, begun = await begin(self._asking.scheduler, ask)
        return event_stream(self._events(request, answer, about, item), headers(begun, ignored))

    async def _asked(
        self, request: Request
    ) -> tuple[GenerationRequest, list[str], bool, dict[str, Any]]:
        """Read the request.

        This is not in answer(), so that the request is not held while it waits for its turn.
        """
        body = await self._asking.bodies.read(request, schemas.ResponsesRequest)
        self._asking.check_name(body.model)
        for name in ("previous_response_id", "conversation"):
            if getattr(body, name):
                advice = "nothing is stored here: send the conversation as input"
                raise unsupported(name, advice, param=name)
        form = body.text and body.text.format
        chosen = self._asking.generation(
            schemas.AnswerOptions.model_validate(
                {"temperature": body.temperature, "top_p": body.top_p}
            ),
            limit=body.max_output_tokens,
            schema=chat_schema(form, param="text.format"),
        )
        ask, ignored = await self._asking.ask(
            request, _messages(body), chosen, ignored=tools_ignored(body.tools, body.tool_choice)
        )
        about = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": body.max_output_tokens,
            "model": self._asking.names[0],
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": chosen.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": chosen.top_p,
            "truncation": "auto",
            "usage": None,
            "metadata": {},
        }
        return ask, ignored, bool(body.stream), about

    async def _events(
        self, request: Request, answer: Any, about: dict[str, Any], item: str
    ) -> AsyncIterator[str]:
        number = 0

        def event(kind: str, **fields: Any) -> str:
            nonlocal number
            value = {"type": kind, "sequence_number": number} | fields
            number += 1
            return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"

        place = {"item_id": item, "output_index": 0, "content_index": 0}
        yield event("response.created", response=about)
        yield event("response.in_progress", response=about)
        yield event(
            "response.output_item.added", output_index=0, item=_item(item, "in_progress", [])
        )
        yield event("response.content_part.added", **place, part=_part(""))
        text = ""
        async with aclosing(answer):
            try:
                async for piece in answer:
                    if isinstance(piece, str):
                        text += piece
                        yield event("response.output_text.delta", **place, delta=piece, logprobs=[])
                        continue
                    if isinstance(piece, Begun):
                        continue
                    note(request, piece)
                    done = _finished(about, item, text, piece)
                    yield event("response.output_text.done", **place, text=text, logprobs=[])
                    yield event("response.content_part.done", **place, part=_part(text))
                    yield event("response.output_item.done", output_index=0, item=done["output"][0])
                    yield event(f"response.{done['status']}", response=done)
            except Exception as e:  # too late for a status
                log.error("an answer broke off", exc_info=e)
                error = as_api_error(e)
                told = {"code": "server_error", "message": error.message}
                yield event("response.failed", response=about | {"status": "failed", "error": told})


def _messages(body: schemas.ResponsesRequest) -> list[dict[str, Any]]:
    """The input as messages: a text, or items, of which some are not messages."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        given = item.model_dump(exclude_none=True)
        if item.type in _CALLS:
            continue
        if item.type in _RESULTS:
            messages.append({"role": "tool", "content": given.get("output", "")})
            continue
        messages.append(given)
    return messages


def _finished(about: dict[str, Any], item: str, text: str, stats: Stats) -> dict[str, Any]:
    whole = finish_reason(stats) == "stop"
    status = "completed" if whole else "incomplete"
    return about | {
        "status": status,
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "output": [_item(item, status, [_part(text)])],
        "usage": {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.held_tokens},
            "output_tokens": stats.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
            "dropped_turns": stats.dropped_turns,
        },
    }


def _item(name: str, status: str, content: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": name,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": list(content),
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
