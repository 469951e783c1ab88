"""Tokenizers in a tokenizer.json, byte-level BPE as LLaMA-3 and SmolLM2 have it.

The library `tokenizers` (the extra "tokenizers") encodes. Decoding and streaming need no library:
each piece stands for some bytes, spelled with one character a byte.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seechat_lite.native import Native, guarded
from seechat_lite.text_stream import AsWritten, TextStream
from seechat_lite.written import split_names
from seechat_weights.config import LMConfig
from seechat_weights.errors import BundleError, EngineError
from seechat_weights.files.untrusted import read_file
from seechat_weights.libraries import import_error
from seechat_weights.lm.tokenizer_file import MAX_BYTES

# how texts are split before their bytes are merged; other patterns could take for ever
PATTERNS = (
    # LLaMA-3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")


class JsonTokenizer(AsWritten):
    """Text to token ids and back, as the tokenizer.json says.

    path: the file.
    eos_id: the token that ends an answer; the file does not say it.

    Raises BundleError if the file is missing, damaged or another kind of tokenizer, EngineError if
    the library is not installed.
    """

    leading_spaces_dropped = 0

    def __init__(self, path: Path, *, eos_id: int) -> None:
        self._path = path = Path(path)
        self.eos_id = eos_id
        try:
            data = read_file(path, limit=MAX_BYTES)
            settings = json.loads(data)
        except (OSError, ValueError, RecursionError) as e:
            said = (e.strerror if isinstance(e, OSError) else None) or type(e).__name__
            raise BundleError(
                f"{path}: cannot be read ({said}); expected the model's tokenizer.json: get it "
                "from where the weights are from"
            ) from None
        self._check_kind(settings)
        self._native = _Encoder(data, path)
        vocabulary: dict[str, int] = settings["model"]["vocab"]
        self._bytes = {
            i: bytes(_BYTES[c] for c in piece)
            for piece, i in vocabulary.items()
            if all(c in _BYTES for c in piece)
        }
        added = settings.get("added_tokens") or []
        hidden = {t["content"]: t for t in added if t.get("special")}
        self._hidden = {t["id"] for t in hidden.values()}
        self._special_ids = {name: t["id"] for name, t in hidden.items()}
        self._special_names = {i: name for name, i in self._special_ids.items()}
        self._names = (None, _finding(hidden), None)  # by written.Names
        self._bytes |= {t["id"]: t["content"].encode() for t in added if not t.get("special")}
        self.vocab_size = max([*vocabulary.values(), *(t["id"] for t in added)]) + 1
        self.prompt_begin = tuple(self._native.frame())
        self.prompt_end: tuple[int, ...] = ()

    def _check_kind(self, settings: Any) -> None:
        """Refuse whatever is not byte-level BPE."""

        def refuse(found: str) -> BundleError:
            return BundleError(
                f"{self._path}: {found}; expected byte-level BPE, as LLaMA-3 has it: use the "
                "tokenizer.model of the model, if it has one"
            )

        if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
            raise refuse("no tokenizer.json")
        model = settings["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            raise refuse(f"its model is {model.get('type')!r:.40}")
        if (
            not model.get("vocab")
            or not isinstance(model["vocab"], dict)
            or not all(_is_id(i) for i in model["vocab"].values())
        ):
            raise refuse("its model has no vocabulary")
        if not any(part.get("type") == "ByteLevel" for part in _parts(settings.get("decoder"))):
            raise refuse("its decoder is not ByteLevel")
        for part in _parts(settings.get("normalizer")):
            if part.get("type") not in _NORMALIZERS:
                raise refuse(f"its normalizer is {part.get('type')!r:.40}")
        for part in _parts(settings.get("pre_tokenizer")):
            kind, pattern = part.get("type"), part.get("pattern")
            known = isinstance(pattern, dict) and pattern.get("Regex") in PATTERNS
            if kind not in ("ByteLevel", "Digits") and not (kind == "Split" and known):
                raise refuse(f"it splits text in an unknown way ({part!r:.120})")
        added = settings.get("added_tokens") or []
        for token in added if isinstance(added, list) else [added]:
            content = token.get("content") if isinstance(token, dict) else None
            if not content or not isinstance(content, str) or not _is_id(token.get("id")):
                raise refuse("its added tokens are damaged")

    def check(self, lm: LMConfig) -> None:
        """Check that this tokenizer belongs to a model of this shape.

        lm: the model's shape.

        Raises BundleError if it does not.
        """
        if self.vocab_size > lm.vocab_size:
            raise BundleError(
                f"{self._path}: {self.vocab_size} pieces, the model has {lm.vocab_size} ids: the "
                "tokenizer is another model's, get it from where the weights are from"
            )

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """The token ids of a text; none are added.

        text: any; lone surrogates become question marks.
        specials: whether names of special tokens in the text become those tokens, as published.
            With False they are spelled out, so that nobody's words can end an answer.
        """
        text = text.encode("utf-8", "replace").decode()
        return self._native.encode(text, specials=True) if specials else self._plain(text)

    def encode_parts(self, parts: Iterable[tuple[str, int]]) -> list[int]:
        """The token ids of one text that is given in parts, so that only some hold specials.

        parts: each a text and what becomes of names of specials in it, see written.Names.
        """
        readable = ((text.encode("utf-8", "replace").decode(), names) for text, names in parts)
        ids: list[int] = []
        for i, piece in enumerate(split_names(readable, self._names)):
            if i % 2:  # blanks around it belong to it where the file says so
                found = self._special_ids.get(piece, self._special_ids.get(piece.strip()))
                assert found is not None
                ids.append(found)
            elif piece:
                ids += self._plain(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        """The ids of a text in which no name of a special token is that token."""
        ids = self._native.encode(text, specials=False)
        if self._hidden.isdisjoint(ids):
            return ids
        spelled: list[int] = []  # the vocabulary has a name as a word: its characters, one by one
        for i in ids:
            for char in self._special_names.get(i, ""):
                spelled += self._native.encode(char, specials=False)
            if i not in self._hidden:
                spelled.append(i)
        return spelled

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; spaces are not cleaned up.

        ids: token ids; an incomplete UTF-8 sequence becomes U+FFFD.

        Raises IndexError for ids beyond the tokenizer's vocabulary.
        """
        text = TextStream(self)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise IndexError(
                    f"token id {i}: expected less than {self.vocab_size}, the tokenizer's size; "
                    "the ids come from another model or from padding rows of its vocabulary"
                )
        return "".join(text.push(i) for i in ids) + text.finish()

    def surface(self, token_id: int) -> bytes | None:
        """The bytes that one token adds to a text; None for a special token.

        token_id: the token.
        """
        return None if token_id in self._hidden else self._bytes.get(token_id)

    def written(self, token_id: int) -> bytes:
        """The bytes that a token stands for wherever it comes; none if it stands for no text.

        token_id: the token.
        """
        return self.surface(token_id) or b""

    def opening(self, surface: str) -> str | None:
        """None: the first piece of a text is like all others.

        surface: the piece's.
        """
        return None


class _Encoder(Native):
    """Guards the library's tokenizers: native code that works without Python's lock."""

    _fork = "any"  # texts are encoded one at a time, in the calling thread

    @guarded
    def __init__(self, data: bytes, path: Path) -> None:
        """Load two tokenizers, one of which spells out the names of special tokens."""
        try:
            from tokenizers import Tokenizer
        except (ImportError, OSError) as e:
            needed, install = f"{path} needs it", '"seechat-lite[tokenizers]"'
            raise import_error(EngineError, e, needed=needed, install=install) from None
        try:
            self._special, self._plain = (Tokenizer.from_buffer(data) for _ in range(2))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of the library is no Exception
            raise BundleError(
                f"{path}: tokenizers cannot read it ({str(e)[:80]}); expected the model's "
                "tokenizer.json: get it from where the weights are from"
            ) from None
        for tokenizer in (self._special, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True

    @guarded
    def encode(self, text: str, *, specials: bool) -> list[int]:
        tokenizer = self._special if specials else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    @guarded
    def frame(self) -> list[int]:
        """The ids that the published tokenizer puts before a text."""
        return self._special.encode("", add_special_tokens=True).ids

    def _release(self) -> None:
        """Free nothing: only the interpreter's exit closes it."""


def _parts(component: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer.json, or the parts of a sequence; what is damaged has no type."""
    if not isinstance(component, dict):
        return [] if component is None else [{}]
    inner = next(
        (component[k] for k in ("normalizers", "pretokenizers", "decoders") if k in component), None
    )
    if component.get("type") != "Sequence":
        return [component]
    parts = inner if isinstance(inner, list) else []
    return [part if isinstance(part, dict) else {} for part in parts]


def _is_id(i: Any) -> bool:
    return isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 24


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


def _finding(tokens: Mapping[str, Mapping[str, Any]]) -> re.Pattern[str] | None:
    """Finds names in a text, with the blanks around them that are part of them."""

    def one(name: str) -> str:
        token, found = tokens[name], re.escape(name)
        if token.get("single_word"):
            found = rf"(?<!\w){found}(?!\w)"
        return (
            (r"\s*" if token.get("lstrip") else "")
            + found
            + (r"\s*" if token.get("rstrip") else "")
        )

    names = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(one, names)) + ")") if names else None
