"""POST /: answers the requests of ChatGLM-6B's and VisualGLM-6B's demo servers, for their clients.

{"prompt", "history", max_length, top_p, temperature} is ChatGLM-6B's. {"text", "image" (base64),
"history", …} is VisualGLM-6B's. Each has its demo's defaults. `min_length` and `num_beams` are
ignored.
"""

import secrets
from dataclasses import replace
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response

from seechat_lite.conversation import trimmed
from seechat_lite.generation import Generation
from seechat_lite.server import schemas
from seechat_lite.server.access import client_of
from seechat_lite.server.asking import bearable, headers
from seechat_lite.server.bodies import Bodies
from seechat_lite.server.errors import ApiError
from seechat_lite.server.image_urls import Images
from seechat_lite.server.logs import note
from seechat_lite.server.openai_api import json_response
from seechat_lite.server.scheduler import GenerationRequest, Scheduler, Turn
from seechat_weights.bundle.manifest import Sampling

# (temperature, top_p, top_k, repetition_penalty) of the two demos
_CHATGLM = (0.95, 0.7, 0, 1.0)
_VISUALGLM = (0.8, 0.4, 100, 1.2)
_MAX_LENGTH = 2048


class Legacy:
    """The endpoint.

    scheduler: answers.
    bodies: reads bodies.
    images: reads pictures.
    sampling: what the model bears.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        bodies: Bodies,
        images: Images,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        self._sampling = sampling
        self._scheduler = scheduler
        self._bodies = bodies
        self._images = images

    async def answer(self, request: Request) -> Response:
        """Answer a request of either demo.

        request: the request.
        """
        body = await self._bodies.read(request, schemas.LegacyRequest)
        question = body.prompt if body.text is None else body.text
        if question is None or (body.prompt is not None and body.text is not None):
            raise _bad("expected either `prompt` (ChatGLM-6B) or `text` (VisualGLM-6B)", "prompt")
        if not trimmed(question):
            raise _bad("the question is empty", "prompt")
        history = [pair for pair in body.history or [] if pair]  # [[]] is ChatGLM's default
        if any(len(pair) != 2 for pair in history):
            raise _bad("expected pairs of a question and its answer", "history")
        turns = [Turn(question=q, answer=a) for q, a in history] + [Turn(question)]
        if body.image or body.image_prompt:
            file = await self._image(body)
            turns[0] = replace(turns[0], images=tuple(await self._scheduler.prepare([file])))
        temperature, top_p, top_k, penalty = _CHATGLM if body.text is None else _VISUALGLM
        if body.temperature is not None:
            temperature = body.temperature if body.temperature >= 0.001 else 0.0
        chosen = Generation(
            temperature=temperature,
            top_p=body.top_p or top_p,
            top_k=top_k if body.top_k is None else body.top_k,
            repetition_penalty=body.repetition_penalty or penalty,
            seed=secrets.randbits(63),
        )
        chosen, ignored = bearable(chosen, self._sampling)
        ask = GenerationRequest(
            client_of(request.scope),
            turns[-1],
            tuple(turns[:-1]),
            chosen,
            max_length=body.max_length or _MAX_LENGTH,
        )
        text, stats = await self._scheduler.whole_answer(ask)
        note(request, stats)
        return json_response(
            schemas.LegacyAnswer(
                response=text,
                result=text,
                history=[*history, [question, text]],
                time=datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            ),
            headers(stats, ignored),
        )

    async def _image(self, body: schemas.LegacyRequest) -> bytes:
        """The picture; it is removed from the body, which may wait long for its turn."""
        image = body.image or body.image_prompt or ""
        body.image = body.image_prompt = None
        return await self._images.decode(image)


def _bad(why: str, where: str) -> ApiError:
    return ApiError(422, f"{where}: {why}", code="invalid_request", param=where)
