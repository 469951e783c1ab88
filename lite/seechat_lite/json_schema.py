"""Constrains an answer to JSON that a schema allows (extra `schema`).

llguidance says after each token which tokens may follow. It knows tokens by their bytes alone, so
the text of such an answer is the bytes of its tokens, one after the other: nothing is trimmed,
cleaned, or taken for the name of a newline. White space between values is one space at most;
otherwise a small model could write blanks without end.
"""

import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from seechat_lite.json_structure import too_complex
from seechat_lite.native import Native, guarded
from seechat_lite.text_stream import AsWritten
from seechat_lite.tokenizers import TextTokenizer
from seechat_weights.errors import OptionError
from seechat_weights.libraries import import_error

MAX_SCHEMA = 64 << 10  # characters of its JSON
MAX_STATES = 30_000  # of the automaton that reads texts; 1 to 2 kB each
_SPACE = " ?"  # what may stand between two values: a regular expression


class SchemaError(OptionError):
    """A JSON schema cannot be followed, or what follows schemas is not installed."""


def check_installed() -> None:
    """Raise SchemaError if the library that follows schemas is not installed."""
    if find_spec("llguidance") is None:
        raise SchemaError(
            "JSON of a schema was asked for, and llguidance is not installed; expected it: run "
            'pip install "seechat-lite[schema]"'
        )


class Vocabulary(Native):
    """A model's tokens as bytes, for the schemas of any number of answers; made at first use.

    tokenizer: the model's.
    size: ids of the model's vocabulary, with those beyond the tokenizer's.
    ends: further tokens that end an answer, besides the tokenizer's; no JSON has them in it.
    """

    _fork = "any"  # it has no threads, and calls leave no state behind

    def __init__(self, tokenizer: TextTokenizer, *, size: int, ends: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self._ends = ends
        self._tokens: _Tokens | None = None
        self._native: Any = None

    def constraint(self, schema: Mapping[str, Any]) -> "Constraint":
        """What an answer of this schema may hold. It serves one answer.

        schema: the schema.

        Raises SchemaError.
        """
        check_installed()
        text = _as_text(schema)
        return Constraint(self._made(), text, size=self._size)

    @guarded
    def _made(self) -> Any:
        if self._native is None:
            try:
                from llguidance import LLTokenizer
            except (ImportError, OSError) as e:
                needed, install = "JSON of a schema was asked for", '"seechat-lite[schema]"'
                raise import_error(SchemaError, e, needed=needed, install=install) from None

            self._tokens = tokens = _Tokens(self._tokenizer, self._size, self._ends)
            self._native = LLTokenizer(
                tokens,  # pyright: ignore[reportArgumentType]: it has what is asked of it
                n_vocab=self._size,
                eos_token=self._tokenizer.eos_id,
                slices=[],
            )
            tokens.native = self._native
        return self._native

    def _release(self) -> None:
        if self._tokens:
            self._tokens.native = None  # the two hold each other
        self._tokens = self._native = None


class _Tokens:
    """Says what llguidance asks about tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, size: int, ends: Collection[int]) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = [tokenizer.eos_id]
        # a token without bytes never comes
        self.tokens = [b"" if i in ends else tokenizer.written(i) for i in range(size)]
        self.tokens[tokenizer.eos_id] = b"<end>"
        self.native: Any = None

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text that must follow: the longest ones."""
        if self.native is None:  # it tries the call before it is ready
            return []
        return self.native.greedy_tokenize(text.decode() if isinstance(text, bytes) else text)


class Constraint(Native):
    """Says which tokens may come next in one answer.

    native: llguidance's vocabulary.
    schema: the schema's JSON.
    size: ids of the vocabulary.
    finished: whether the JSON is whole and nothing may follow.

    Raises SchemaError if the schema cannot be followed.
    """

    _fork = "any"

    @guarded
    def __init__(self, native: Any, schema: str, *, size: int) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._size = size
        self.finished = False
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": _SPACE}
            )
        except ValueError as e:
            raise _refused(str(e)) from None
        limits = LLParserLimits(max_lexer_states=MAX_STATES, verbose_errors=False)
        self._matcher: Any = LLMatcher(native, grammar, log_level=0, limits=limits)
        self._next = self._computed()  # what is wrong with a schema shows here at the latest

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, bool [vocab].

        Raises SchemaError if the schema has become too complex to follow.
        """
        if self._next is None:
            self._next = self._computed()
        return self._next

    @guarded
    def accept(self, token: int) -> None:
        """Note the next token.

        token: one that is allowed.
        """
        self._next = None
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher.get_error())
        self.finished = self._matcher.is_stopped()

    @guarded
    def _computed(self) -> np.ndarray:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: self._size]
        if not mask.any() or (self._matcher.is_stopped() and not self._matcher.is_accepting()):
            raise _refused("no JSON satisfies it")
        return mask.view(bool)

    def _release(self) -> None:
        self._matcher = None


class Verbatim(AsWritten):
    """Decodes the tokens of a constrained answer to the bytes that llguidance knows them by.

    tokenizer: the model's.
    """

    leading_spaces_dropped = 0

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def surface(self, token_id: int) -> bytes:
        """The bytes of one token.

        token_id: the token.
        """
        return self._tokenizer.written(token_id)

    def opening(self, surface: str) -> str | None:
        """None: a text begins with all of its first piece.

        surface: the piece's.
        """
        return None


def _as_text(schema: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise SchemaError(
            f"schema cannot be written as JSON ({e!s:.100}); expected a JSON schema: pass an "
            "object of texts, numbers, lists and objects"
        ) from None
    if len(text) > MAX_SCHEMA:
        raise SchemaError(
            f"schema has {len(text)} characters as JSON; expected at most {MAX_SCHEMA}: pass a "
            "smaller one"
        )
    if why := too_complex(text.encode()):
        raise SchemaError(f"schema is {why}; expected one of few parts: pass a simpler one")
    return text


def _refused(why: str) -> SchemaError:
    words = " ".join(why.removesuffix("<non-verbose/>").split())
    if words.startswith("NoExtension"):
        words = "no JSON satisfies it"
    shown = words if len(words) <= 200 else words[:200] + "…"
    return SchemaError(
        f"schema cannot be followed ({shown}); expected a JSON schema that an answer can be held "
        "to: leave that part out or write it in another way"
    )
