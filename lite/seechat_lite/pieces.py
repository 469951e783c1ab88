"""A sentencepiece model, guarded: it works without Python's lock, as native code does."""

from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

from seechat_lite.native import Native, guarded


class Pieces(Native):
    """The part of SentencePieceProcessor that tokenizers use, under its names."""

    _fork = "any"  # it has no threads, and no call leaves anything behind

    @guarded
    def __init__(self, data: bytes) -> None:
        """data: a model's file. Raises RuntimeError, OSError or ValueError if it is none."""
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
        """Nothing: closed at the interpreter's end alone."""
