"""Reads a BERT vocabulary: one word piece a line; the number of the line is its id."""

from pathlib import Path

from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import decoded, first_bytes, line, unreadable
from seechat_weights.files.untrusted import read_file

FILE = "vocab.txt"
MAX_BYTES = 4 << 20  # the published file has 110 kB
PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
PLACE = "https://huggingface.co/OFA-Sys/chinese-clip-vit-base-patch16 (vocab.txt; the same for all)"


def read_vocabulary(path: Path, size: int) -> dict[str, int]:
    """The word pieces of a vocabulary and their ids.

    path: the file.
    size: ids that the text tower has.

    Raises CheckpointError.
    """
    first_bytes(path)
    try:
        data = read_file(path, limit=MAX_BYTES)
    except OSError as e:
        raise unreadable(path, e) from None
    return parse_vocabulary(data, size, str(path))


def parse_vocabulary(data: bytes, size: int, where: str) -> dict[str, int]:
    """As read_vocabulary, of bytes that were read already.

    data: the file's bytes.
    size: ids that the text tower has.
    where: the file's name, for errors.
    """
    try:
        text = decoded(data)
    except ValueError as e:
        raise _error(where, f"not UTF-8 ({line(e)})", "a list of word pieces") from None
    # only these end a line here: pieces may be characters that splitlines() takes for an end
    pieces = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if len(pieces) != size:
        raise _error(where, f"{len(pieces)} lines", f"the {size} word pieces of the text tower")
    found = {piece: i for i, piece in enumerate(pieces)}
    if len(found) != len(pieces):
        again = next(piece for i, piece in enumerate(pieces) if found[piece] != i)
        raise _error(where, f"{again!r:.80} on two lines", "each word piece once")
    if lacking := [piece for piece in (PAD, UNKNOWN, START, END) if piece not in found]:
        raise _error(where, f"lacks {', '.join(lacking)}", "BERT's special pieces")
    return found


def _error(where: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{where}: {found}; expected {expected}: take it from {PLACE}")
