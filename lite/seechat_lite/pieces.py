"""Reads and guards a sentencepiece model: native code that works without Python's lock."""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from seechat_lite.native import Native, guarded
from seechat_weights.errors import BundleError
from seechat_weights.files.reading import LFS_POINTER
from seechat_weights.files.untrusted import read_file
from seechat_weights.lm.tokenizer_file import MAX_BYTES, completed


class Pieces(Native):
    """The part of SentencePieceProcessor that tokenizers use, under the same names."""

    _fork = "any"  # it has no threads, and calls leave no state behind

    @guarded
    def __init__(self, data: bytes) -> None:
        """Load a model.

        data: the bytes of a model's file.

        Raises RuntimeError, OSError or ValueError if they are not a model.
        """
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(data)

    @guarded
    def __len__(self) -> int:
        return len(self._processor)

    @guarded
    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    @guarded
    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(ids)

    @guarded
    def decode_pieces(self, pieces: Sequence[str]) -> str:
        return self._processor.decode_pieces(pieces)

    @guarded
    def piece_to_id(self, piece: str) -> int:
        return self._processor.piece_to_id(piece)

    @guarded
    def id_to_piece(self, i: int) -> str:
        return self._processor.id_to_piece(i)

    @guarded
    def is_byte(self, i: int) -> bool:
        return self._processor.is_byte(i)

    @guarded
    def is_control(self, i: int) -> bool:
        return self._processor.is_control(i)

    @guarded
    def is_unknown(self, i: int) -> bool:
        return self._processor.is_unknown(i)

    def _release(self) -> None:
        """Free nothing: only the interpreter's exit closes it."""


def open_pieces(path: Path, like: str, *, more: bytes = b"") -> Pieces:
    """Load a sentencepiece model from a file.

    path: the file.
    like: the file that is expected, for errors.
    more: bytes of a protobuf message that is merged into the model, such as other settings.

    Raises BundleError if it is missing, a Git LFS pointer or no sentencepiece model.
    """
    expected = f"expected a sentencepiece model such as {like}"
    try:
        data = completed(read_file(path, limit=MAX_BYTES))
    except OSError as e:
        raise BundleError(
            f"{path}: cannot be read ({e.strerror or e}); {expected}: put the model's tokenizer "
            "there"
        ) from None
    if data.startswith(LFS_POINTER):
        raise BundleError(
            f"{path}: a Git LFS pointer, not the file itself; {expected}: "
            "fetch it with `git lfs pull` or download it again"
        )
    try:
        return Pieces(data + more)
    except (RuntimeError, OSError, ValueError):  # ValueError: its own message is not UTF-8
        raise BundleError(
            f"{path}: {len(data)} bytes that are no sentencepiece model; {expected}: "
            "the file is damaged or something else, download it again"
        ) from None
