"""The ICE tokenizer of ChatGLM-6B, on top of sentencepiece.

The published tokenizer adds four things to sentencepiece. Newlines, tabs and runs of spaces travel
as the pieces `<n>`, `<|tab|>` and `<|blank_k|>`. Text is split at the literal names of five special
tokens. `<pad>` is dropped before decoding. In the old vocabulary of 150528 ids, all text ids are
shifted by the 20000 image tokens in front of them.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from seechat_lite.pieces import Pieces, open_pieces
from seechat_lite.written import Names
from seechat_weights.config import LMConfig
from seechat_weights.errors import BundleError

_BLANKS = {f"<|blank_{k}|>": " " * k for k in range(2, 81)}
_WHITESPACE = {"<n>": "\n", "<|tab|>": "\t", **_BLANKS}
_WHITESPACE_PREFIXES = frozenset(name[:i] for name in _WHITESPACE for i in range(1, len(name)))
_WHITESPACE_NAME = re.compile(r"<(?:n|\|tab\||\|blank_(?:[2-9]|[1-7][0-9]|80)\|)>")
_SPACES = re.compile(r" {2,80}")
_SPECIAL = re.compile(
    r"(<sop>|<eop>|<unk>|<pad>|\[MASK\])"
)  # [gMASK] is not among them, as published


class Tokenizer:
    """Turns text into token ids and back, as the published ChatGLMTokenizer does.

    path: a sentencepiece model of the `ice_text.model` layout. The file tells whether its special
        tokens are control or user-defined pieces, and how it treats white space.
    num_image_tokens: what every text id is shifted by (20000 in the old vocabulary of 150528 ids).

    Raises BundleError if the file is missing, a Git LFS pointer, not a sentencepiece model, or one
    without the special tokens.
    """

    pad_id: int
    mask_id: int  # [MASK]
    gmask_id: int  # [gMASK]
    bos_id: int  # <sop>: begins an answer
    eos_id: int  # <eop>: ends an answer
    vocab_size: int  # ids from here on are padding rows of the model's vocabulary

    def __init__(self, path: Path, *, num_image_tokens: int = 0) -> None:
        self._path = path = Path(path)
        self._sp = open_pieces(path, "ChatGLM-6B's ice_text.model")
        self._shift = num_image_tokens
        self.vocab_size = len(self._sp) + num_image_tokens
        self.pad_id = self._special_id("<pad>", path)
        self.mask_id = self._special_id("[MASK]", path)
        self.gmask_id = self._special_id("[gMASK]", path)
        self.bos_id = self._special_id("<sop>", path)
        self.eos_id = self._special_id("<eop>", path)
        self.prompt_begin: tuple[int, ...] = ()
        self.prompt_end: tuple[int, ...] = (self.gmask_id, self.bos_id)
        # In models that declare their specials user-defined, plain text can produce these pieces.
        self._structural = {self.pad_id, self.mask_id, self.gmask_id, self.bos_id, self.eos_id}
        self.leading_spaces_dropped = _leading_spaces_dropped(self._sp)

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """The token ids of a text; none are added, as in encode(text, add_special_tokens=False).

        text: the text.
        specials: as published, the literal names <sop>, <eop>, <unk>, <pad> and [MASK] become those
            tokens; white space beside them is stripped, and each part between them gets its own
            dummy prefix. With False the names are spelled out like any other text, so that nobody's
            words can end or begin an answer.
        """
        if not specials:
            ids = self._encode_part(text)
            return ids if self._structural.isdisjoint(ids) else self._spell_out(ids)
        parts = _SPECIAL.split(text)
        if len(parts) == 1:
            return self._encode_part(text)
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._sp.piece_to_id(part) + self._shift)
                continue
            part = part.lstrip() if i else part
            part = part.rstrip() if i < len(parts) - 1 else part
            ids += self._encode_part(part)
        return ids

    def encode_parts(self, parts: Iterable[tuple[str, int]]) -> list[int]:
        """The token ids of one text that is given in parts.

        No conversation format writes a name of its specials. So they are spelled out in the whole
        text, unless all of it may hold them.

        parts: each a text and what becomes of names of specials in it, see written.Names.
        """
        parts = list(parts)
        text = "".join(text for text, _ in parts)
        return self.encode(text, specials=all(names == Names.ALL for _, names in parts))

    def check(self, lm: LMConfig) -> None:
        """Check that this tokenizer belongs to a model of this shape.

        <pad> is not compared: no prompt has it, and published configurations differ on it.

        lm: the model's shape.

        Raises BundleError if it does not.
        """
        for name in ("mask_id", "gmask_id", "bos_id", "eos_id"):
            found, expected = getattr(self, name), getattr(lm, name)
            if found != expected:
                raise BundleError(
                    f"{self._path}: {name} is {found}, the model expects {expected}: the tokenizer "
                    "is another model's, get it from where the weights are from"
                )
        if self.vocab_size > lm.vocab_size:
            raise BundleError(
                f"{self._path}: {self.vocab_size} pieces, the model has {lm.vocab_size} ids: the "
                "tokenizer is another model's, get it from where the weights are from"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids: sentencepiece's, with newlines, tabs and blanks put back.

        Spaces are not cleaned up. <pad> and image tokens are left out. Each byte of an incomplete
        UTF-8 sequence becomes U+FFFD.

        ids: token ids.

        Raises IndexError for ids beyond the tokenizer's vocabulary, as published.
        """
        text_ids = []
        for i in ids:
            if i >= self.vocab_size:
                raise IndexError(
                    f"token id {i}: expected less than {self.vocab_size}, the tokenizer's size; "
                    "the ids come from another model or from padding rows of its vocabulary"
                )
            if i >= self._shift and i != self.pad_id:
                text_ids.append(int(i) - self._shift)
        return self.restore(self._sp.decode(text_ids))

    def surface(self, token_id: int) -> str | int | None:
        """What one token adds inside a text: its characters, or the value of a byte, 0..255.

        U+2581 stands for a space, because a leading space may be dropped. None: the token is
        skipped before decoding (<pad>, image tokens, ids beyond the vocabulary).

        token_id: the token.
        """
        if token_id == self.pad_id or not self._shift <= token_id < self.vocab_size:
            return None
        i = token_id - self._shift
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return int(piece[3:-1], 16)  # <0xE4>
        if self._sp.is_control(i):
            return ""
        return self._sp.decode([i]) if self._sp.is_unknown(i) else piece

    def opening(self, surface: str) -> str | None:
        """None: the first piece of a text is its surface less leading spaces.

        surface: the piece's.
        """
        return None

    def written(self, token_id: int) -> bytes:
        """The bytes that a token stands for wherever it comes; none if it stands for no text.

        The names of newlines, tabs and blanks are what they mean.

        token_id: the token.
        """
        surface = self.surface(token_id)
        if isinstance(surface, int):
            return bytes((surface,))
        if (
            surface is None
            or token_id in self._structural
            or self._sp.is_unknown(token_id - self._shift)
        ):
            return b""
        return self.restore(surface.replace("\u2581", " ")).encode()

    def restore(self, text: str) -> str:
        """Replace the names of newlines, tabs and blanks in decoded text by what they mean.

        text: the decoded text.
        """
        if "<" not in text:
            return text
        return _WHITESPACE_NAME.sub(lambda name: _WHITESPACE[name[0]], text)

    def unfinished(self, text: str) -> int:
        """Index at which the last name of white space begins that `text` may not yet hold whole.

        text: the decoded text so far.
        """
        cut = text.rfind("<")  # an unfinished name can only begin here
        return cut if cut >= 0 and text[cut:] in _WHITESPACE_PREFIXES else len(text)

    def _encode_part(self, text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = _SPACES.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
        # lone surrogates, such as the undecodable bytes of a command line, become question marks
        ids = self._sp.encode(text.encode("utf-8", "replace").decode())
        return [i + self._shift for i in ids] if self._shift else ids

    def _spell_out(self, ids: list[int]) -> list[int]:
        """Replace structural tokens by the pieces (or bytes) of the characters of their names."""
        spelled: list[int] = []
        for i in ids:
            if i not in self._structural:
                spelled.append(i)
                continue
            for char in self._sp.id_to_piece(i - self._shift):
                piece = self._sp.piece_to_id(char)
                if self._sp.is_unknown(piece):
                    piece = self._sp.piece_to_id(f"<0x{ord(char):02X}>")
                spelled.append(piece + self._shift)
        return spelled

    def _special_id(self, piece: str, path: Path) -> int:
        i = self._sp.piece_to_id(piece)
        if self._sp.id_to_piece(i) != piece:
            raise BundleError(
                f"{path}: a sentencepiece model without {piece}; expected the layout of "
                "ChatGLM-6B's ice_text.model: use the tokenizer that belongs to the model"
            )
        return i + self._shift


def _leading_spaces_dropped(sp: Pieces) -> int:
    """How many spaces the start of a decoded text swallows: all, one or none, by the model's flags.

    sentencepiece drops the dummy prefix, and all leading spaces if the model removes extra white
    space. This is found by an example, because the flags are not part of its interface.
    """
    space, comma = sp.piece_to_id("\u2581"), sp.piece_to_id(",")
    kept = len(sp.decode([space, space, comma])) - len(sp.decode([comma]))
    return 1_000_000_000 if kept == 0 else 2 - kept
