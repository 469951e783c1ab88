"""Says which tokenizer a published language model has, by the files beside its weights.

They also say how it was trained to be spoken to: a chat template is a program, which is not run,
but what it writes tells which conversation format it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seechat_weights.bundle.manifest import TOKENIZER_KINDS, TokenizerConfig
from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import read_json, shown
from seechat_weights.files.untrusted import read_file
from seechat_weights.lm.chatglm import OLD_IMAGE_TOKENS, OLD_VOCABULARY
from seechat_weights.lm.tokenizer_file import MAX_BYTES

TEMPLATE = "chat_template.jinja"
# texts that a chat template writes, and the conversation format that this is; the first counts
_TEMPLATES = (
    (("<|im_start|>", "named SmolLM"), "smollm2"),
    (("<|im_start|>", "<|im_end|>"), "chatml"),
    (("<|start_header_id|>", "<|eot_id|>"), "llama_3"),
    (("[INST]", "<<SYS>>"), "llama_2"),
)
# pieces of the model itself, under the names that it gives them
_OWN = ("<unk>", "<s>", "</s>")


def describe_tokenizer(file: Path, config: LMConfig) -> TokenizerConfig:
    """The tokenizer of a published language model, under the name that it has in a bundle.

    file: its tokenizer's file; tokenizer_config.json and added_tokens.json beside it count, too.
    config: the model's shape.

    Raises CheckpointError if these cannot be read.
    """
    if config.family == "chatglm":
        old = config.vocab_size == OLD_VOCABULARY
        return TokenizerConfig(num_image_tokens=OLD_IMAGE_TOKENS if old else 0)
    if file.suffix == ".json":
        return TokenizerConfig(TOKENIZER_KINDS["json"], kind="json")
    settings = _beside(file, "tokenizer_config.json")
    return TokenizerConfig(
        TOKENIZER_KINDS["llama"],
        kind="llama",
        legacy=settings.get("legacy") is not False,  # absent in files from before the setting
        added=_added(file, settings, config),
    )


def template_format(file: Path) -> str | None:
    """The conversation format of a published language model's chat template; None if none is known.

    file: its tokenizer's file, beside which the template lies.

    Raises CheckpointError if the files cannot be read.
    """
    template: Any = _beside(file, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # one for each use
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    alone = file.with_name(TEMPLATE)
    if alone.is_file():
        try:
            template = read_file(alone, limit=MAX_BYTES).decode("utf-8", "replace")
        except OSError as e:
            raise CheckpointError(
                f"{alone}: cannot be read ({e.strerror or e}); expected the model's chat template: "
                "make it readable, or remove it"
            ) from None
    if not isinstance(template, str):
        return None
    return next((name for texts, name in _TEMPLATES if all(t in template for t in texts)), None)


def _added(file: Path, settings: Mapping[str, Any], config: LMConfig) -> dict[str, int]:
    """Tokens that the model's table has behind those of the tokenizer's file; text -> id."""
    found: dict[str, Any] = dict(_beside(file, "added_tokens.json"))
    listed = settings.get("added_tokens_decoder")
    for i, token in listed.items() if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str) and i.isdecimal():
            found[text] = int(i[:9])
    added = {}
    for text, i in found.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise CheckpointError(
                f"{file.with_name('added_tokens.json')}: {shown(text)} is {i!r:.40}; expected an "
                "id: download the file again"
            )
        # a padding token beyond the table is common, and no prompt has it
        if text and text not in _OWN and i < config.vocab_size:
            added[text] = i
    return added


def _beside(file: Path, name: str) -> dict[str, Any]:
    path = file.with_name(name)
    return read_json(path) if path.is_file() else {}
