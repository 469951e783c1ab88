"""Guards a sentencepiece model: it is native code that works without Python's lock."""

from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

from seechat_lite.native import Native, guarded


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
