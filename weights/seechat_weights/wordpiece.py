"""Reads a BERT vocabulary: one word piece a line; the number of the line is its id."""

from pathlib import Path

from seechat_weights.errors import CheckpointError
from seechat_weights.files.reading import decoded, first_bytes, line, unreadable
from seechat_weights.files.untrusted import read_file

FILE = "vocab.txt"
MAX_BYTES = 4 << 20  # the published files have 110 and 230 kB
PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
BEGINNING = "[DEC]"  # LAVIS puts it behind BERT's vocabulary
CHINESE_CLIP_PLACE = (
    "https://huggingface.co/OFA-Sys/chinese-clip-vit-base-patch16 (vocab.txt; the same for all)"
)
BERT = "bert-base-uncased"
BERT_HUB = f"https://huggingface.co/google-bert/{BERT}"


def read_vocabulary(path: Path, size: int, *, place: str, added: str = "") -> dict[str, int]:
    """The word pieces of a vocabulary and their ids.

    path: the file.
    size: ids that the network knows.
    place: where the file is published.
    added: a piece that the network's code puts behind those of the file.

    Raises CheckpointError.
    """
    first_bytes(path)
    try:
        data = read_file(path, limit=MAX_BYTES)
    except OSError as e:
        raise unreadable(path, e) from None
    return parse_vocabulary(data, size, str(path), place=place, added=added)


def parse_vocabulary(
    data: bytes, size: int, where: str, *, place: str, added: str = ""
) -> dict[str, int]:
    """As read_vocabulary, of bytes that were read already.

    data: the file's bytes.
    where: the file's name, for errors.
    size, place, added: as for read_vocabulary.
    """

    def wrong(found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{where}: {found}; expected {expected}: take it from {place}")

    try:
        text = decoded(data)
    except ValueError as e:
        raise wrong(f"not UTF-8 ({line(e)})", "a list of word pieces") from None
    # only these end a line here: pieces may be characters that splitlines() takes for an end
    pieces = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    found = {piece: i for i, piece in enumerate(pieces)}
    if added:
        found.setdefault(added, len(pieces))
    rest = len(found) - len(set(pieces))
    if len(pieces) + rest != size:
        raise wrong(f"{len(pieces)} lines", f"the {size - rest} word pieces of the network")
    if len(found) != size:
        again = next(piece for i, piece in enumerate(pieces) if found[piece] != i)
        raise wrong(f"{again!r:.80} on two lines", "each word piece once")
    if lacking := [piece for piece in (PAD, UNKNOWN, START, END) if piece not in found]:
        raise wrong(f"lacks {', '.join(lacking)}", "BERT's special pieces")
    return found


def read_question_vocabulary(path: Path, size: int) -> dict[str, int]:
    """The vocabulary with which InstructBLIP's Q-Former reads questions: BERT's, and one piece.

    path: the file.
    size: pieces that the Q-Former knows.

    Raises CheckpointError.
    """
    return read_vocabulary(path, size, place=f"{BERT_HUB} ({FILE})", added=BEGINNING)
