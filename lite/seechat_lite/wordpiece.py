"""Cuts texts into BERT's word pieces: captions for their judge, questions for a bridge."""

from collections.abc import Collection, Mapping
from pathlib import Path

from seechat_lite.native import Native, guarded
from seechat_weights.errors import BundleError, CheckpointError, EngineError
from seechat_weights.libraries import import_error
from seechat_weights.wordpiece import (
    BEGINNING,
    END,
    MASK,
    PAD,
    START,
    UNKNOWN,
    read_question_vocabulary,
)

MAX_WORD = 100  # characters; a longer word is one unknown piece, as in BERT's own code


class WordPieces(Native):
    """The word pieces of an uncased vocabulary (extra `tokenizers`)."""

    _fork = "any"  # single texts start no threads, and calls leave no state behind

    @guarded
    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        special: Collection[str] = (),
        max_word: int = MAX_WORD,
        needed: str,
    ) -> None:
        """Prepare.

        vocabulary: the pieces and their ids.
        special: pieces whose names in a text are these pieces; no others are.
        max_word: characters of a word that is cut into pieces.
        needed: why the library is needed, for errors.

        Raises EngineError if the library is not installed.
        """
        try:
            from tokenizers import Tokenizer
            from tokenizers.models import WordPiece
            from tokenizers.normalizers import BertNormalizer
            from tokenizers.pre_tokenizers import BertPreTokenizer
        except (ImportError, OSError) as e:
            install = '"seechat-lite[tokenizers]"'
            raise import_error(EngineError, e, needed=needed, install=install) from None
        self._start, self._end = vocabulary[START], vocabulary[END]
        model = WordPiece(dict(vocabulary), unk_token=UNKNOWN, max_input_chars_per_word=max_word)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.add_special_tokens([name for name in special if name in vocabulary])
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    @guarded
    def encode(self, text: str, *, most: int, keep_end: bool = False) -> tuple[list[int], bool]:
        """The ids of a text between [CLS] and [SEP], and whether it was cut.

        text: the text; halves of surrogate pairs become question marks.
        most: ids at most.
        keep_end: of a text that is cut the end is kept, not the beginning.
        """
        plain = text.encode("utf-8", "replace").decode()
        ids = self._tokenizer.encode(plain, add_special_tokens=False).ids
        surplus = max(0, len(ids) - (most - 2))
        kept = ids[surplus:] if keep_end else ids[: len(ids) - surplus]
        return [self._start, *kept, self._end], surplus > 0

    def _release(self) -> None:
        """Free nothing: only the interpreter's exit closes it."""


def question_words(path: Path, size: int) -> WordPieces:
    """What cuts the questions of a bridge that reads them, as LAVIS does.

    path: the vocabulary.
    size: pieces that the bridge knows.

    Raises BundleError for a file that is not its vocabulary, EngineError if the library is not
    installed.
    """
    try:
        vocabulary = read_question_vocabulary(path, size)
    except CheckpointError as e:
        raise BundleError(str(e)) from None
    special = (PAD, UNKNOWN, START, END, MASK, BEGINNING)
    needed = "this model's vision needs it to read questions"
    return WordPieces(vocabulary, special=special, needed=needed)
