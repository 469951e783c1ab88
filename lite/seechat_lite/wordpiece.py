"""Cuts a question into BERT's word pieces, for a bridge that reads it beside the picture."""

from pathlib import Path

from seechat_lite.native import Native, guarded
from seechat_weights.errors import BundleError, EngineError
from seechat_weights.files.untrusted import read_file
from seechat_weights.libraries import import_error

MAX_BYTES = 16 << 20  # of a vocabulary; BERT's is 0.2 MB
BEGIN, END, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
ADDED = "[DEC]"  # LAVIS puts it behind the vocabulary; in a question its name becomes it


class WordPiece(Native):
    """BERT's uncased tokenizer, as LAVIS uses it: of a long question the end is read.

    path: the vocabulary, a piece a line.
    pieces: the most ids of a question.
    rows: how many pieces the model knows.

    Raises BundleError for a file that is no such vocabulary, EngineError if the package tokenizers
    is not installed.
    """

    _fork = "any"  # single texts start no threads

    @guarded
    def __init__(self, path: Path, *, pieces: int, rows: int) -> None:
        try:
            from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer
        except (ImportError, OSError) as e:
            needed = "this model's vision needs it to read questions"
            install = '"seechat-lite[tokenizers]"'
            raise import_error(EngineError, e, needed=needed, install=install) from None
        vocabulary = _read(path)
        self._pieces = pieces
        self._begin, self._end = vocabulary[BEGIN], vocabulary[END]
        self._tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=True)
        self._tokenizer.add_special_tokens([ADDED])
        size = self._tokenizer.get_vocab_size()
        if size > rows:
            raise BundleError(
                f"{path}: {size} pieces with {ADDED}; expected at most {rows}, which the model "
                "knows: get the vocabulary from where the weights are from"
            )

    @guarded
    def encode(self, text: str) -> list[int]:
        """The ids of a question, with [CLS] and [SEP].

        text: the question; lone surrogates become question marks.
        """
        plain = text.encode("utf-8", "replace").decode()
        ids = self._tokenizer.encode(plain, add_special_tokens=False).ids
        return [self._begin, *ids[max(0, len(ids) - self._pieces + 2) :], self._end]

    def _release(self) -> None:
        """Free nothing: only the interpreter's exit closes it."""


def _read(path: Path) -> dict[str, int]:
    expected = f"expected a WordPiece vocabulary with {BEGIN}, {END} and {UNKNOWN}"
    try:
        text = read_file(path, limit=MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as e:
        said = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise BundleError(
            f"{path}: cannot be read ({said or e}); {expected}: get it from where the model is from"
        ) from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary = {piece: i for i, piece in enumerate(lines)}
    if not {BEGIN, END, UNKNOWN} <= vocabulary.keys():
        raise BundleError(
            f"{path}: {len(lines)} lines that are none; {expected}: get it from where the model is "
            "from"
        )
    return vocabulary
