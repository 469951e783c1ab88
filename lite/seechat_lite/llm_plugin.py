"""Offers the models of seechat-lite to the program `llm` (https://llm.datasette.io).

    llm -m seechat -a cat.png "这是什么？"
    llm -c "它能吃吗？"                                # goes on with the last conversation
    llm -m seechat -o bundle DIR "你好"

`llm` finds this module as an entry point once both are installed. Nothing else imports it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import AttachmentPart, Message, TextPart, ToolResultPart
from pydantic import Field, create_model

from seechat_lite.generation import DEFAULTS, HELP, Generation
from seechat_weights.errors import ImageError, SeechatError

if TYPE_CHECKING:
    from seechat_lite.chat import Chat, Model


# `stop` is not a single value, and `llm` has an option of its own for a schema
_OPTIONS = [name for name in DEFAULTS if name not in ("stop", "schema")]
_GENERATION: dict[str, Any] = {
    name: (type(DEFAULTS[name]), Field(DEFAULTS[name], description=HELP[name])) for name in _OPTIONS
}


class _Options(llm.Options):
    """What `llm -o NAME VALUE` takes; the fields of generation.Generation are added to it."""

    bundle: str | None = Field(None, description="folder of a bundle; default: built in")
    format: str | None = Field(None, description="conversation format")


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Register the model `seechat` with `llm`: the built-in bundle, or that of the option `bundle`.

    register: called with the model.
    """
    register(Seechat())


class Seechat(llm.Model):
    """A model of `llm`. The first question loads it, and it stays loaded."""

    model_id = "seechat"
    can_stream = True
    supports_schema = True  # with the extra `schema`
    attachment_types = {  # noqa: RUF012 (llm declares it so)
        "image/apng",
        "image/avif",
        "image/bmp",
        "image/gif",
        "image/heic",  # refused with a message that names it and says what to do
        "image/jp2",
        "image/jpeg",
        "image/png",
        "image/tiff",
        "image/webp",
    }

    Options: Any = create_model("Options", __base__=_Options, **_GENERATION)

    def __init__(self) -> None:
        self._loaded: tuple[str | None, Model] | None = None

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Yield the answer's pieces.

        prompt, stream, response, conversation: as `llm` gives them.

        Raises llm.ModelError; it says what is wrong.
        """
        options = prompt.options
        assert isinstance(options, _Options)
        try:
            chat = self._model(options.bundle).chat(
                options.format, messages=[_message(m) for m in prompt.messages]
            )
            chosen = {name: getattr(options, name) for name in _OPTIONS}
            schema = prompt.schema
            assert schema is None or isinstance(schema, dict)  # `llm` has made one of a class
            yield from chat.stream(generation=Generation(**chosen, schema=schema))
        except SeechatError as e:
            raise llm.ModelError(str(e)) from e
        _tell_usage(chat, response)

    def _model(self, bundle: str | None) -> "Model":
        # here, because `llm` imports all plugins for every command
        from seechat_lite.loading import load

        if self._loaded and self._loaded[0] != bundle:
            self._loaded[1].close()
            self._loaded = None
        if not self._loaded:
            self._loaded = bundle, load(Path(bundle) if bundle else None)
        return self._loaded[1]


def _message(message: Message) -> dict[str, Any]:
    """A message as messages.read_messages() takes it."""
    content: list[dict[str, Any]] = []
    for part in message.parts:
        match part:
            case TextPart():
                content.append({"type": "text", "text": part.text})
            case AttachmentPart(attachment=llm.Attachment() as attachment):
                content.append({"type": "image", "image": _picture(attachment)})
            case ToolResultPart():
                content.append({"type": "text", "text": part.output})
    return {"role": message.role, "content": content}


def _picture(attachment: llm.Attachment) -> str | bytes:
    if attachment.path:
        return attachment.path
    try:
        return attachment.content_bytes() or b""
    except Exception as e:  # `llm` has fetched an address, or tried to
        raise ImageError(
            f"{attachment.url or 'an attachment'}: cannot be read ({e}); expected a picture: "
            "save it as a file and name that"
        ) from None


def _tell_usage(chat: "Chat", response: llm.Response) -> None:
    if chat.stats:
        response.set_usage(input=chat.stats.prompt_tokens, output=chat.stats.new_tokens)
