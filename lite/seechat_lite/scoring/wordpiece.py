"""Turns a text into the ids of BERT's word pieces, as Chinese-CLIP's own tokenizer does."""

from seechat_lite.native import Native, guarded
from seechat_weights.errors import EngineError
from seechat_weights.libraries import import_error
from seechat_weights.scorer.vocabulary import END, START, UNKNOWN

MAX_WORD = 200  # characters; a longer word is one unknown piece
MAX_TEXT = 20_000  # characters; a text is cut to 50 pieces, which have far fewer


class WordPieces(Native):
    """The word pieces of a vocabulary."""

    _fork = "any"  # single texts start no threads, and calls leave no state behind

    @guarded
    def __init__(self, vocabulary: dict[str, int], *, context: int) -> None:
        """Prepare.

        vocabulary: the pieces and their ids.
        context: tokens of a text at most, with [CLS] and [SEP].

        Raises EngineError if the library is not installed.
        """
        try:
            from tokenizers import Tokenizer
            from tokenizers.models import WordPiece
            from tokenizers.normalizers import BertNormalizer
            from tokenizers.pre_tokenizers import BertPreTokenizer
        except (ImportError, OSError) as e:
            needed, install = "expected it, to score captions", '"seechat-lite[tokenizers]"'
            raise import_error(EngineError, e, needed=needed, install=install) from None
        self._first, self._last = vocabulary[START], vocabulary[END]
        self._most = context - 2
        model = WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD)
        self._tokenizer = Tokenizer(model)
        # no special pieces: "[SEP]" in a text is five characters and three letters
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    @guarded
    def encode(self, text: str) -> tuple[list[int], bool]:
        """The ids of a text, and whether it was cut.

        text: the text; of one that is longer than MAX_TEXT, only the beginning counts.
        """
        # half of a surrogate pair is no character
        text = text[:MAX_TEXT].encode("utf-8", "replace").decode()
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._first, *ids[: self._most], self._last], len(ids) > self._most

    def _release(self) -> None:
        """Free nothing: only the interpreter's exit closes it."""
