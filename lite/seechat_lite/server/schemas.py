"""Describes requests and answers as clients see them; the OpenAPI document is made from this.

A field of the OpenAI API that means nothing to this server is ignored. A field that would change
the answer is refused in asking.py.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from seechat_lite.messages import ROLES

MAX_INTEGER = 2**63 - 1
FinishReason = Literal["stop", "length"]
T = TypeVar("T")
# Only the first wrong item is reported, the others are not checked: a request may have very many.
FastList = Annotated[list[T], Field(fail_fast=True)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageURL(_Request):
    url: str = Field(
        description="data:, https: or file: URL, the latter two if the server reads them, or base64"
    )


class ImageSource(_Request):
    """A picture as Anthropic's clients send it."""

    data: str | None = Field(None, description="base64")
    url: str | None = None


class Part(_Request):
    """A text or a picture. One model for both: a union would build a large picture twice."""

    type: str | None = Field(None, description="text, image_url, input_text, input_image, image")
    text: str | None = None
    refusal: str | None = None
    image_url: ImageURL | str | None = None
    image: str | None = None
    source: ImageSource | None = None


class Message(_Request):
    """One message; the text of system and developer messages precedes the next question."""

    role: str | None = Field(None, description=", ".join(ROLES))
    content: str | FastList[Part] | None = None
    images: FastList[str] | None = Field(None, description="base64, as Ollama has it")
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class ImageData(_Request):
    """A picture as llama.cpp's server takes it."""

    data: str


_NUMBER = re.compile(r"\s*[+-]?\d{1,20}(\.\d{0,20})?([eE][+-]?\d{1,3})?\s*")


def _number(value: Any) -> Any:
    """A number as it was meant: "0.7" as 0.7, 512.0 as 512. Anything else as it is."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = BeforeValidator(_number)


def _not_zero(tokens: int) -> int:
    if tokens == 0:
        raise PydanticCustomError("zero", "expected 1 or more, or -1 for as many as fit")
    return tokens


Limit = Annotated[int, Number, Field(ge=-1, le=MAX_INTEGER), AfterValidator(_not_zero)]


class StreamOptions(_Request):
    include_usage: bool | None = None


class AnswerOptions(_Request):
    """How tokens are drawn and what ends an answer; what is left out is as the model has it."""

    temperature: Annotated[float | None, Number] = Field(None, ge=0, le=2)
    top_p: Annotated[float | None, Number] = Field(None, ge=0, le=1)
    top_k: Annotated[int | None, Number] = Field(
        None, ge=-1, le=MAX_INTEGER, description="0 or -1: all"
    )
    repetition_penalty: Annotated[float | None, Number] = Field(None, ge=0.01, le=100)
    seed: Annotated[int | None, Number] = Field(
        None, ge=-MAX_INTEGER - 1, le=MAX_INTEGER, description="-1: as good as none"
    )
    stop: str | FastList[str] | None = None


class ChatRequest(AnswerOptions):
    """POST /v1/chat/completions, after OpenAI's; top_k and repetition_penalty are additions."""

    model: str | None = Field(None, description="the served model's name; may be left out")
    messages: FastList[Message] = Field(min_length=1, max_length=2048)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = Field(None, description="-1: as many as fit, as LM Studio has it")
    max_completion_tokens: Limit | None = None
    n: Annotated[int | None, Number] = None
    frequency_penalty: Annotated[float | None, Number] = None
    presence_penalty: Annotated[float | None, Number] = None
    logit_bias: dict[str, Any] | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = Field(None, description="ignored unless tool_choice demands a call")
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    image_data: FastList[ImageData] | None = Field(None, max_length=64)
    images: FastList[str] | None = Field(None, max_length=64)
    response_format: dict[str, Any] | None = None
    conversation_format: str | None = Field(
        None, description="how the conversation is written; /v1/models lists the names"
    )


class CompletionRequest(AnswerOptions):
    """POST /v1/completions, OpenAI's older API: `prompt` is taken as a question."""

    model: str | None = None
    prompt: str | FastList[str]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    n: Annotated[int | None, Number] = None
    frequency_penalty: Annotated[float | None, Number] = None
    presence_penalty: Annotated[float | None, Number] = None
    logit_bias: dict[str, Any] | None = None
    logprobs: int | None = None
    image_data: FastList[ImageData] | None = Field(None, max_length=64)


class ResponsesItem(_Request):
    """A message, or what an agent's run left behind: calls, results, reasoning."""

    type: str | None = None
    role: str | None = None
    content: str | FastList[Part] | None = None
    output: str | FastList[Part] | None = None


class TextSettings(_Request):
    format: dict[str, Any] | None = None


class ResponsesRequest(_Request):
    """POST /v1/responses, OpenAI's newer API; nothing is stored."""

    model: str | None = None
    input: str | Annotated[list[ResponsesItem], Field(fail_fast=True, max_length=2048)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Limit | None = None
    temperature: Annotated[float | None, Number] = Field(None, ge=0, le=2)
    top_p: Annotated[float | None, Number] = Field(None, ge=0, le=1)
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextSettings | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None


class OllamaOptions(AnswerOptions):
    """Of an answer; others are ignored, as Ollama does."""

    num_predict: Annotated[int | None, Number] = Field(None, ge=-2, le=MAX_INTEGER)
    temperature: Annotated[float | None, Number] = Field(None, ge=0, le=100)
    repetition_penalty: Annotated[float | None, Number] = Field(
        None, ge=0.01, le=100, validation_alias="repeat_penalty"
    )


class OllamaChat(_Request):
    """POST /api/chat, after Ollama's; streamed unless `stream` is false."""

    model: str | None = None
    messages: FastList[Message] = Field(default_factory=list, max_length=2048)
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    tools: list[Any] | None = None


class OllamaGenerate(_Request):
    """POST /api/generate, after Ollama's."""

    model: str | None = None
    prompt: str = ""
    system: str | None = None
    images: FastList[str] | None = Field(None, max_length=64)
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None


class OllamaShow(_Request):
    model: str | None = None
    name: str | None = None


class PromptTokens(BaseModel):
    cached_tokens: int = Field(description="that an earlier answer left in the cache")


class Usage(BaseModel):
    prompt_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens: int
    total_tokens: int
    dropped_turns: int = Field(description="turns for which the context had no room; an addition")


class Timings(BaseModel):
    """How long an answer took, an addition to OpenAI's fields."""

    first_token_seconds: float
    seconds: float
    tokens_per_second: float


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a stream; the one with the finish reason has `timings`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class ModelInfo(BaseModel):
    """What /v1/models says; from `precision` on, additions to OpenAI's fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    precision: str
    vision: str | None = Field(description="the vision tower and bridge, null without")
    context: int
    root: str = Field(description="the model's own name, where `id` is another one of it")
    capabilities: list[str]
    input_modalities: list[str]
    output_modalities: list[str] = ["text"]
    conversation_format: str = Field(description="how conversations are written")
    conversation_formats: list[str] = Field(description="how a request may have them written")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(BaseModel):
    status: Literal["ok", "loading", "unloaded", "stopping"]
    waiting: int
    answering: bool
    memory_bytes: int = Field(description="resident memory of the server's process")


class LegacyRequest(_Request):
    """What clients of the ChatGLM-6B demo (`prompt`) and the VisualGLM-6B demo (`text`) send."""

    prompt: str | None = None
    text: str | None = None
    image: str | None = Field(None, description="base64")
    image_prompt: str | None = Field(None, description="base64, the older name")
    history: FastList[FastList[str]] | None = Field(None, max_length=1024)
    max_length: Annotated[int | None, Number] = Field(None, ge=1, le=MAX_INTEGER)
    top_p: Annotated[float | None, Number] = Field(None, ge=0, le=1)
    top_k: Annotated[int | None, Number] = Field(None, ge=0, le=MAX_INTEGER)
    temperature: Annotated[float | None, Number] = Field(None, ge=0, le=100)
    repetition_penalty: Annotated[float | None, Number] = Field(None, ge=0.01, le=100)


class LegacyAnswer(BaseModel):
    """Both demos' answers at once: `response` is ChatGLM-6B's, `result` VisualGLM-6B's name."""

    response: str
    result: str
    history: list[list[str]]
    status: Literal[200] = 200
    time: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail
