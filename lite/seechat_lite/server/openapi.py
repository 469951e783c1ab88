"""Makes the OpenAPI document from schemas.py."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from seechat_lite.server import schemas

_MODELS: list[tuple[type[BaseModel], JsonSchemaMode]] = [
    (schemas.ChatRequest, "validation"),
    (schemas.CompletionRequest, "validation"),
    (schemas.ResponsesRequest, "validation"),
    (schemas.OllamaChat, "validation"),
    (schemas.OllamaGenerate, "validation"),
    (schemas.OllamaShow, "validation"),
    (schemas.LegacyRequest, "validation"),
    (schemas.ChatCompletion, "serialization"),
    (schemas.ChatChunk, "serialization"),
    (schemas.ModelInfo, "serialization"),
    (schemas.ModelList, "serialization"),
    (schemas.Health, "serialization"),
    (schemas.LegacyAnswer, "serialization"),
    (schemas.ErrorBody, "serialization"),
]
_WRONG = {
    400: "what was asked cannot be done",
    401: "no key, or a wrong one",
    403: "from a page of another origin, or to an unknown name",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is compressed",
    422: "JSON of another shape",
    500: "the server's fault",
    503: "the queue is full, or the server is loading or stopping",
}
_OLLAMA_ERROR = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"error": {"type": ["string", "object"]}},
                "required": ["error"],
            }
        }
    }
}


def document(*, with_key: bool) -> dict[str, Any]:
    """The document as JSON.

    with_key: whether requests need a key.
    """
    ref = "#/components/schemas/{model}"
    _, definitions = models_json_schema(_MODELS, ref_template=ref)
    completion = _ok(schemas.ChatCompletion, "an answer; with `stream`, events")
    completion["content"]["text/event-stream"] = {"schema": _ref(schemas.ChatChunk)}
    paths = {
        "/v1/chat/completions": {
            "post": _operation(
                "Answer a conversation", completion, _WRONG, body=schemas.ChatRequest
            )
        },
        "/v1/completions": {
            "post": _operation(
                "Answer a prompt",
                _object("with `stream`, events"),
                _WRONG,
                body=schemas.CompletionRequest,
            )
        },
        "/v1/responses": {
            "post": _operation(
                "Answer a conversation, as OpenAI's newer API has it",
                _object("with `stream`, events"),
                _WRONG,
                body=schemas.ResponsesRequest,
            )
        },
        "/api/chat": {
            "post": _operation(
                "Answer a conversation, as Ollama does",
                _object("lines, or one object"),
                _WRONG,
                body=schemas.OllamaChat,
                wrong_body=_OLLAMA_ERROR,
            )
        },
        "/api/generate": {
            "post": _operation(
                "Answer a prompt, as Ollama does",
                _object("lines, or one object"),
                _WRONG,
                body=schemas.OllamaGenerate,
                wrong_body=_OLLAMA_ERROR,
            )
        },
        "/api/show": {
            "post": _operation(
                "What the model is, as Ollama says it",
                _object("the model"),
                _WRONG,
                body=schemas.OllamaShow,
                wrong_body=_OLLAMA_ERROR,
            )
        },
        "/api/tags": {
            "get": _operation("The names, as Ollama lists them", _object("them"), (401, 403))
        },
        "/api/version": {"get": _operation("Ollama's version", _object("it"), (401, 403))},
        "/v1": {"get": _operation("What there is", _object("paths"), (401, 403))},
        "/v1/models": {
            "get": _operation("The served model", _ok(schemas.ModelList, "its names"), (401, 403))
        },
        "/v1/models/{model}": {
            "get": _operation("One model", _ok(schemas.ModelInfo, "the model"), (401, 403, 404))
            | {
                "parameters": [
                    {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
                ]
            }
        },
        "/health": {"get": _operation("Is it ready?", _ok(schemas.Health, "ready"), (403,))},
        "/metrics": {
            "get": _operation(
                "Counts and times, for Prometheus",
                {"description": "text", "content": {"text/plain": {"schema": {"type": "string"}}}},
                (401, 403),
            )
        },
        "/": {
            "get": _operation(
                "The page",
                {"description": "HTML", "content": {"text/html": {"schema": {"type": "string"}}}},
                (403,),
            ),
            "post": _operation(
                "What the demo servers of ChatGLM-6B and VisualGLM-6B answered",
                _ok(schemas.LegacyAnswer, "an answer"),
                _WRONG,
                body=schemas.LegacyRequest,
            ),
        },
    }
    paths["/health"]["get"]["responses"]["503"] = _ok(schemas.Health, "loading or stopping")
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "seechat-lite", "version": version("seechat-lite")},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }
    if with_key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _operation(
    summary: str,
    ok: dict[str, Any],
    wrong: Mapping[int, str] | tuple[int, ...],
    *,
    body: type[BaseModel] | None = None,
    wrong_body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    shape = wrong_body or _json(schemas.ErrorBody)
    responses = {"200": ok} | {
        str(status): {"description": _WRONG[status]} | shape for status in wrong
    }
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        operation["requestBody"] = {"required": True} | _json(body)
    return operation


def _object(description: str) -> dict[str, Any]:
    """An answer whose shape another project's documents say."""
    kinds = ("application/json", "text/event-stream", "application/x-ndjson")
    return {
        "description": description,
        "content": {kind: {"schema": {"type": "object"}} for kind in kinds},
    }


def _ok(model: type[BaseModel], description: str) -> dict[str, Any]:
    return {"description": description} | _json(model)


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": _ref(model)}}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
