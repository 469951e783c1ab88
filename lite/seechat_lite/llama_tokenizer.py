"""The LLaMA tokenizer over sentencepiece, as the slow tokenizer these models were trained with.

Two published behaviours differ in the spaces around special tokens; `tokenizer_config.json` names
the one a checkpoint was made with ("legacy", true where it is absent):

    legacy      every part of a text between special tokens gets a dummy prefix of its own
    otherwise   U+2581 stands before the whole text only, and parts get no dummy prefix

Newer tokenizers that are called fast differ from both and are not followed here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from seechat_lite.pieces import open_pieces
from seechat_lite.text_stream import AsWritten
from seechat_lite.written import split_names
from seechat_weights.config import LMConfig
from seechat_weights.errors import BundleError

SPECIALS = ("<unk>", "<s>", "</s>")
# added tokens that LLaVA's models say now and then; its code shows them, and reads them again
SAID = ("<im_patch>", "<im_start>", "<im_end>")
_SPACE = "\u2581"
# A protobuf message that is appended to another is merged into it: ModelProto.normalizer_spec (3)
# with add_dummy_prefix (3) false
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class LlamaTokenizer(AsWritten):
    """Text to token ids and back, as LlamaTokenizer of transformers 4.37 does it.

    path: a sentencepiece model with byte fallback, LLaMA's `tokenizer.model`.
    legacy: which of the two published behaviours, see above.
    added: tokens behind the model's own, by their text, such as LLaVA's "<im_start>".

    Raises BundleError if the file is missing, no sentencepiece model or one without the specials.
    """

    unk_id: int
    bos_id: int  # <s>: begins a prompt
    eos_id: int  # </s>: ends an answer
    vocab_size: int  # ids from here on are padding rows of the model's vocabulary

    def __init__(
        self, path: Path, *, legacy: bool = True, added: Mapping[str, int] | None = None
    ) -> None:
        self._path = path = Path(path)
        self._legacy = legacy
        settings = b"" if legacy else _NO_DUMMY_PREFIX
        self._sp = open_pieces(path, "LLaMA's tokenizer.model", more=settings)
        self._added = dict(added or {})
        self._added_texts = {i: text for text, i in self._added.items()}
        self._specials = {name: self._special_id(name) for name in SPECIALS}
        self.unk_id, self.bos_id, self.eos_id = self._specials.values()
        self.prompt_begin: tuple[int, ...] = (self.bos_id,)
        self.prompt_end: tuple[int, ...] = ()
        self.vocab_size = max([len(self._sp), *(i + 1 for i in self._added.values())])
        said = [name for name in SAID if name in self._added]
        # by Names: none, all, those that models say
        self._names = (None, _finding([*self._specials, *self._added]), _finding(said))
        # of these names none may come out of a text, even if the model's file has it as a word
        self._structural = {self.bos_id, self.eos_id, *self._added.values()}
        # the U+2581 put before the text, and with a dummy prefix sentencepiece's own
        self.leading_spaces_dropped = 2 if legacy else 1
        self._unk = self._sp.encode(SPECIALS[0])

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
        """Token ids of `text`, none added: the published encode(text, add_special_tokens=False).

        text: any; lone surrogates become question marks.
        specials: whether names such as </s> in the text become those tokens, as published. With
            False they are spelled out, so that nobody's words can end an answer.
        """
        return self.encode_parts([(text, specials)])

    def encode_parts(self, parts: Iterable[tuple[str, int]]) -> list[int]:
        """Token ids of one text that is given in parts, so that only some of them hold specials.

        parts: each a text and what becomes of names of specials in it, see written.Names.
        """
        readable = ((text.encode("utf-8", "replace").decode(), names) for text, names in parts)
        if not self._legacy:
            readable = ((text.replace(_SPACE, " "), names) for text, names in readable)
        pieces = split_names(readable, self._names)
        if not self._legacy and pieces != [""]:
            # no prefix before a special
            pieces[0] = _SPACE + pieces[0] if pieces[0] or len(pieces) == 1 else ""
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._specials.get(piece, self._added.get(piece, self.unk_id)))
            elif piece:
                ids += self._encode_part(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without <s>, </s> and <unk>; spaces are not cleaned up.

        ids: token ids; each byte of an incomplete UTF-8 sequence becomes U+FFFD.

        Raises IndexError for ids beyond the tokenizer's vocabulary.
        """
        parts: list[str] = []  # parts between added tokens, and these
        pending: list[str] = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise IndexError(
                    f"token id {i}: expected less than {self.vocab_size}, the tokenizer's size; "
                    "the ids come from another model or from padding rows of its vocabulary"
                )
            if (added := self._added_texts.get(i)) is not None:
                parts += [self._decode_pieces(pending), added] if pending else [added]
                pending = []
            elif i < len(self._sp) and i not in self._specials.values():
                pending.append(self._sp.id_to_piece(i))
        if pending:
            parts.append(self._decode_pieces(pending))
        return " ".join(parts)

    def surface(self, token_id: int) -> str | int | None:
        """What one token contributes inside a text: characters, or the value of a byte.

        U+2581 stands for a space. None: nothing, the token is left out.

        token_id: the token.
        """
        if not 0 <= token_id < len(self._sp):
            added = self._added_texts.get(token_id)
            return None if added is None else f" {added} "
        if self._sp.is_control(token_id) or self._sp.is_unknown(token_id):
            return None
        piece = self._sp.id_to_piece(token_id)
        return int(piece[3:-1], 16) if self._sp.is_byte(token_id) else piece  # <0xE4>

    def written(self, token_id: int) -> bytes:
        """The bytes that a token stands for wherever it comes; none for specials and added tokens.

        token_id: the token.
        """
        surface = None if token_id in self._added_texts else self.surface(token_id)
        if isinstance(surface, int):
            return bytes((surface,))
        return (surface or "").replace(_SPACE, " ").encode()

    def opening(self, surface: str) -> str | None:
        """The text of the first piece of an answer, if it is not its surface less spaces.

        Of a run of spaces the first is cut off. If no piece has so many, sentencepiece takes the
        rest for unknown text and shows it as it is.

        surface: the piece's.
        """
        rest = surface.removeprefix(_SPACE)
        known = _SPACE not in rest or not self._sp.is_unknown(self._sp.piece_to_id(rest))
        return None if known else rest

    def _encode_part(self, text: str) -> list[int]:
        if self._legacy or not text.startswith((_SPACE, " ")):
            ids = self._sp.encode(text)
        else:  # sentencepiece strips these without a dummy prefix, but not behind another piece
            ids = self._sp.encode(SPECIALS[0] + text)[len(self._unk) :]
        return ids if self._structural.isdisjoint(ids) else self._spelled_out(ids)

    def _spelled_out(self, ids: Sequence[int]) -> list[int]:
        """Replace structural tokens by the pieces, or bytes, of the characters of their names."""
        spelled: list[int] = []
        for i in ids:
            if i not in self._structural:
                spelled.append(i)
                continue
            for char in self._sp.id_to_piece(i):
                piece = self._sp.piece_to_id(char)
                if self._sp.is_unknown(piece):
                    spelled += [self._sp.piece_to_id(f"<0x{b:02X}>") for b in char.encode()]
                else:
                    spelled.append(piece)
        return spelled

    def _decode_pieces(self, pieces: list[str]) -> str:
        first = pieces[0].removeprefix(_SPACE)
        return self._sp.decode_pieces([first, *pieces[1:]])

    def _special_id(self, piece: str) -> int:
        i = self._sp.piece_to_id(piece)
        if self._sp.id_to_piece(i) != piece:
            raise BundleError(
                f"{self._path}: a sentencepiece model without {piece}; expected the layout of "
                "LLaMA's tokenizer.model: use the tokenizer that belongs to the model"
            )
        return i


def _finding(names: Sequence[str]) -> re.Pattern[str] | None:
    """Finds names in a text, the longest first as the published tokenizer does."""
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if names else None
