"""Requests and answers as clients see them; the OpenAPI document is made of these.

Fields that the OpenAI API has and this server has no use for are ignored, unless ignoring them
would change an answer: those are refused in completions.py.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_INTEGER = 2**63 - 1
FinishReason = Literal["stop", "length"]
T = TypeVar("T")
# The first wrong item is told, and the others are not looked at: a request may have very many.
FastList = Annotated[list[T], Field(fail_fast=True)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageURL(_Request):
    url: str = Field(
        description="data:, https: or file: URL, the latter two if the server reads them"
    )


class TensorMapping(_Request):
    """A text or a picture. One model for both: a union would build a large picture twice."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | str | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if getattr(self, self.type) is None:
            raise PydanticCustomError("empty_part", "expected the field of its type")
        return self

    @property
    def url(self) -> str | None:
        return self.image_url.url if isinstance(self.image_url, ImageURL) else self.image_url


class Message(_Request):
    """One message; the text of system and developer messages precedes the next question."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | FastList[TensorMapping] | None = None


def _not_zero(tokens: int) -> int:
    if tokens == 0:
        raise PydanticCustomError("zero", "expected 1 or more, or -1 for as many as fit")
    return tokens


Limit = Annotated[int, Field(ge=-1, le=MAX_INTEGER), AfterValidator(_not_zero)]


class StreamOptions(_Request):
    include_usage: bool | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions, after OpenAI's; top_k and repetition_penalty are additions."""

    model: str | None = Field(None, description="the served model's name; may be left out")
    messages: FastList[Message] = Field(min_length=1, max_length=2048)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = Field(None, description="-1: as many as fit, as LM Studio has it")
    max_completion_tokens: Limit | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INTEGER, description="0 or -1: all")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(
        None, ge=-MAX_INTEGER - 1, le=MAX_INTEGER, description="-1: as good as none"
    )
    stop: str | FastList[str] | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    max_length: int | None = Field(None, ge=1, le=MAX_INTEGER)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_INTEGER)
    temperature: float | None = Field(None, ge=0, le=100)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)


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
