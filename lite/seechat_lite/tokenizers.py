"""Chooses a tokenizer by the kind that a manifest names; each is one class.

A new one needs a class with the methods of TextTokenizer, a row in _KINDS and golden cases.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from seechat_lite.json_tokenizer import JsonTokenizer
from seechat_lite.llama_tokenizer import LlamaTokenizer
from seechat_lite.text_stream import Detokenizer
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.bundle.manifest import TokenizerConfig
from seechat_weights.config import LMConfig


class TextTokenizer(Detokenizer, Protocol):
    """What every tokenizer does.

    eos_id: the token that ends an answer.
    vocab_size: ids from here on are padding rows of the model's vocabulary.
    prompt_begin, prompt_end: the ids before and behind the text of a prompt.
    """

    eos_id: int
    vocab_size: int
    prompt_begin: tuple[int, ...]
    prompt_end: tuple[int, ...]

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """The token ids of a text; none are added.

        text: the text.
        specials: whether names of special tokens in the text become those tokens, as published.
        """
        ...

    def encode_parts(self, parts: Iterable[tuple[str, int]]) -> list[int]:
        """The token ids of one text that is given in parts; none are added.

        parts: each a text and what becomes of names of special tokens in it, see written.Names.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        ids: token ids.

        Raises IndexError for ids beyond the tokenizer's vocabulary.
        """
        ...

    def written(self, token_id: int) -> bytes:
        """The bytes that a token stands for wherever it comes; none if it stands for no text.

        token_id: the token.
        """
        ...

    def check(self, lm: LMConfig) -> None:
        """Check that this tokenizer belongs to a model of this shape.

        lm: the model's shape.

        Raises BundleError if it does not.
        """
        ...


def _ice(path: Path, config: TokenizerConfig, lm: LMConfig) -> TextTokenizer:
    return Tokenizer(path, num_image_tokens=config.num_image_tokens)


def _llama(path: Path, config: TokenizerConfig, lm: LMConfig) -> TextTokenizer:
    return LlamaTokenizer(path, legacy=config.legacy, added=config.added)


def _json(path: Path, config: TokenizerConfig, lm: LMConfig) -> TextTokenizer:
    return JsonTokenizer(path, eos_id=lm.eos_id)


_KINDS = {"ice": _ice, "llama": _llama, "json": _json}


def open_tokenizer(path: Path, config: TokenizerConfig, lm: LMConfig) -> TextTokenizer:
    """Load a model's tokenizer.

    path: its file.
    config: says what kind it is.
    lm: the model's shape.

    Raises BundleError if the file is missing, damaged, of another kind or another model's.
    """
    tokenizer = _KINDS[config.kind](path, config, lm)
    tokenizer.check(lm)
    return tokenizer
