"""Reads how clients of each API ask for JSON, as the schema that an answer must satisfy."""

from collections.abc import Mapping
from typing import Any

from seechat_lite.json_schema import check_installed
from seechat_lite.server.errors import ApiError

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def chat_schema(given: Mapping[str, Any] | None, *, param: str) -> Mapping[str, Any] | None:
    """The schema of OpenAI's `response_format` or `text.format`; None for text.

    given: the field.
    param: its name.

    Raises ApiError.
    """
    kind = (given or {}).get("type", "text")
    if not given or kind == "text":
        return None
    if kind not in ("json_schema", "json_object"):
        raise _wrong(param, "expected the type text, json_object or json_schema")
    # `response_format` has the schema an object deeper than `text.format`; llama.cpp's server and
    # others take one beside json_object too
    holder = given.get("json_schema", given) if kind == "json_schema" else given
    if not isinstance(holder, Mapping):
        raise _wrong(f"{param}.json_schema", "expected an object with a name and a schema")
    schema = holder.get("schema")
    return _checked(ANY_OBJECT if schema is None else schema, f"{param}: schema")


def ollama_schema(given: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The schema of Ollama's `format`; None for text.

    given: the field.

    Raises ApiError.
    """
    if given in (None, ""):
        return None
    if isinstance(given, str) and given != "json":
        raise _wrong("format", "expected json, or a JSON schema")
    return _checked(ANY_OBJECT if given == "json" else given, "format")


def _checked(schema: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(schema, Mapping):
        raise _wrong(param, "expected a JSON schema, an object")
    check_installed()
    return schema


def _wrong(param: str, expected: str) -> ApiError:
    return ApiError(
        400, f"{param}: {expected}", code="invalid_value", param=param.partition(":")[0]
    )
