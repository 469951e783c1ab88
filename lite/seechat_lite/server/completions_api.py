"""POST /v1/completions, OpenAI's older API: the prompt is asked as a question."""

import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from seechat_lite.chat import Stats
from seechat_lite.server import schemas
from seechat_lite.server.asking import Asking, headers, not_done
from seechat_lite.server.errors import ApiError, as_api_error
from seechat_lite.server.logs import note
from seechat_lite.server.openai_api import begin, data_event, event_stream, finish_reason, usage_of
from seechat_lite.server.scheduler import GenerationRequest

log = logging.getLogger(__name__)


class OldCompletions:
    """The endpoint.

    asking: what the APIs share.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def answer(self, request: Request) -> Response:
        """Answer a request, whole or as a stream.

        request: the request.
        """
        ask, ignored, stream, with_usage = await self._asked(request)
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._asking.names[0],
        }
        if not stream:
            text, stats = await self._asking.scheduler.whole_answer(ask)
            note(request, stats)
            usage = usage_of(stats).model_dump()
            body = head | {"choices": [_choice(text, finish_reason(stats))], "usage": usage}
            return JSONResponse(body, headers=headers(stats, ignored))
        answer, begun = await begin(self._asking.scheduler, ask)

        async def events() -> AsyncIterator[str]:
            async with aclosing(answer):
                try:
                    async for piece in answer:
                        if isinstance(piece, Stats):
                            note(request, piece)
                            yield data_event(
                                head | {"choices": [_choice("", finish_reason(piece))]}
                            )
                            if with_usage:
                                usage = usage_of(piece).model_dump()
                                yield data_event(head | {"choices": [], "usage": usage})
                        elif isinstance(piece, str):
                            yield data_event(head | {"choices": [_choice(piece, None)]})
                except Exception as e:  # too late for a status
                    log.error("an answer broke off", exc_info=e)
                    yield data_event(as_api_error(e).body)
                    return
            yield "data: [DONE]\n\n"

        return event_stream(events(), headers(begun, ignored))

    async def _asked(self, request: Request) -> tuple[GenerationRequest, list[str], bool, bool]:
        """Read the request.

        This is not in answer(), so that the request is not held while it waits for its turn.
        """
        body = await self._asking.bodies.read(request, schemas.CompletionRequest)
        self._asking.check_name(body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1:
            raise ApiError(400, "prompt: expected one text", code="invalid_value", param="prompt")
        chosen = self._asking.generation(body, limit=body.max_tokens)
        ask, ignored = await self._asking.ask(
            request,
            [{"role": "user", "content": prompts[0]}],
            chosen,
            pictures=[d.data for d in body.image_data or ()],
            ignored=not_done(body),
        )
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return ask, ignored, bool(body.stream), usage


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
