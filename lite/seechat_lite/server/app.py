"""Builds the application: routes, the middleware before them, and the life of the model."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seechat_lite.chat import Model
from seechat_lite.conversation import FORMATS
from seechat_lite.memory import DEFAULT_CONTEXT
from seechat_lite.server import openapi, page, schemas
from seechat_lite.server.access import PROGRAM_ORIGINS, Framing, Guard
from seechat_lite.server.asking import DROPPED, IGNORED, Asking, unknown_model
from seechat_lite.server.bodies import Bodies
from seechat_lite.server.completions_api import OldCompletions
from seechat_lite.server.demo_api import Legacy
from seechat_lite.server.errors import HANDLED, Faults, handle
from seechat_lite.server.fetch import Fetcher
from seechat_lite.server.image_urls import Images
from seechat_lite.server.logs import RequestLog
from seechat_lite.server.metrics import Metrics, memory
from seechat_lite.server.ollama_api import Ollama
from seechat_lite.server.openai_api import Completions, json_response
from seechat_lite.server.request_limits import Intake
from seechat_lite.server.responses_api import Responses
from seechat_lite.server.scheduler import Scheduler
from seechat_lite.server.settings import Settings
from seechat_weights.bundle.manifest import Manifest


def create_app(
    load: Callable[[], Model],
    manifest: Manifest,
    *,
    settings: Settings,
    context: int = DEFAULT_CONTEXT,
    format: str | None = None,
    failed: Callable[[Exception], None],
    fetcher: Fetcher | None = None,
) -> Starlette:
    """The server as an ASGI application. `app.state.scheduler` is its Scheduler.

    load: opens the model; called in the model's thread when the application starts, and again after
        keep_alive unloaded it.
    manifest: the model's.
    settings: the operator's.
    context: tokens that the cache has room for.
    format: the conversation format; None for the bundle's.
    failed: called if the first loading fails; nothing can be answered then, and the server should
        end.
    fetcher: fetches pictures; None for the default.
    """
    metrics = Metrics()
    scheduler = Scheduler(
        load,
        format=format,
        slots=settings.slots,
        queue=settings.queue,
        keep_alive=settings.keep_alive,
        observe=metrics.answered,
    )
    images = Images(settings, fetcher or Fetcher(seconds=settings.fetch_seconds))
    names = (manifest.name, *settings.aliases)
    vision = manifest.vision
    about = schemas.ModelInfo(
        id=manifest.name,
        created=int(time.time()),
        owned_by="seechat-lite",
        precision=manifest.decoder.precision,
        vision=f"{vision.tower} + {vision.bridge}" if vision else None,
        context=context,
        root=manifest.name,
        capabilities=["completion", *(["vision"] if vision else [])],
        input_modalities=["text", *(["image"] if vision else [])],
        conversation_format=format or manifest.conversation,
        conversation_formats=list(FORMATS),
    )
    bodies = Bodies()
    asking = Asking(
        scheduler,
        bodies,
        images,
        names=names,
        context=context,
        format=FORMATS[format or manifest.conversation],
        sampling=manifest.sampling,
    )
    completions, old = Completions(asking), OldCompletions(asking)
    responses = Responses(asking)
    ollama = Ollama(asking, manifest, context=context)
    legacy = Legacy(scheduler, bodies, images, sampling=manifest.sampling)
    document = openapi.document(with_key=bool(settings.api_keys))

    async def models(_: Request) -> Response:
        listed = [about.model_copy(update={"id": name}) for name in dict.fromkeys(names)]
        return json_response(schemas.ModelList(data=listed))

    async def index(_: Request) -> Response:
        paths = sorted(route.path for route in app.routes if isinstance(route, Route))
        return JSONResponse(
            {
                "message": f"seechat-lite serves {manifest.name!r}. Give programs this address as "
                "the base URL of an OpenAI-compatible server; what it takes is in /openapi.json.",
                "paths": paths,
            }
        )

    async def model(request: Request) -> Response:
        if request.path_params["model"] not in names:
            raise unknown_model(request.path_params["model"])
        return json_response(about)

    async def health(_: Request) -> Response:
        status = scheduler.status
        body = schemas.Health(
            status=status,
            waiting=scheduler.waiting,
            answering=scheduler.answering,
            memory_bytes=memory(),
        )
        return JSONResponse(body.model_dump(), 200 if status in ("ok", "unloaded") else 503)

    async def numbers(_: Request) -> Response:
        return metrics.response(waiting=scheduler.waiting, loaded=scheduler.status == "ok")

    async def describe(_: Request) -> Response:
        return JSONResponse(document)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async def open_model() -> None:
            try:
                await scheduler.open()
            except Exception as e:
                failed(e)

        loading = asyncio.create_task(open_model())
        yield
        await scheduler.stop(0)
        loading.cancel()
        scheduler.close()
        bodies.close()
        images.close()

    middleware = [
        Middleware(RequestLog, metrics=metrics),
        Middleware(Framing),
        Middleware(Guard, settings=settings, public=page.PATHS),
        Middleware(Intake, settings=settings),
        Middleware(Faults),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_origin_regex=PROGRAM_ORIGINS.pattern,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # SDKs send their own headers
        expose_headers=["X-Request-Id", "Retry-After", IGNORED, DROPPED],
    )
    middleware.insert(2, cors)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", completions.answer, methods=["POST"]),
            Route("/v1/completions", old.answer, methods=["POST"]),
            Route("/v1/responses", responses.answer, methods=["POST"]),
            *ollama.routes(),
            Route("/v1", index),
            Route("/v1/", index),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/health", health),
            Route("/metrics", numbers),
            Route("/openapi.json", describe),
            Route("/", legacy.answer, methods=["POST"]),
            *page.routes(),
        ],
        middleware=middleware,
        exception_handlers=dict.fromkeys(HANDLED, handle),
        lifespan=lifespan,
    )
    app.state.scheduler = scheduler
    return app
