"""BERT's word pieces: the vocabulary of the very weights, and how texts are cut."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_reference import INSTRUCTBLIP, PUBLISHED, PublishedBlip
from seechat_lite.wordpiece import WordPieces, question_words
from seechat_weights.errors import BundleError, CheckpointError
from seechat_weights.wordpiece import BEGINNING, parse_vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = [*SPECIAL, "red", "##dish", "cat", "猫"]
FILE = "\n".join(PIECES).encode()


def parsed(data: bytes, size: int, added: str = "") -> dict[str, int]:
    return parse_vocabulary(data, size, "vocab.txt", place="there", added=added)


@pytest.mark.parametrize(
    "data", [FILE, FILE + b"\n", b"\xef\xbb\xbf" + FILE, FILE.replace(b"\n", b"\r\n")]
)
def test_a_vocabulary(data: bytes) -> None:
    assert parsed(data, 8) == {piece: i for i, piece in enumerate(PIECES)}
    assert parsed(data, 9, BEGINNING)[BEGINNING] == 8
    own = data.rstrip() + b"\n[DEC]"
    assert parsed(own, 9, BEGINNING)[BEGINNING] == 8  # it has the piece already


@pytest.mark.parametrize(
    "data, size, added, said",
    [
        (b"", 8, "", "1 lines; expected the 8 word pieces"),
        (FILE, 7, "", "8 lines; expected the 7 word pieces"),
        (FILE, 8, BEGINNING, "8 lines; expected the 7 word pieces"),
        (FILE + b"\nred", 9, "", "'red' on two lines"),
        (FILE + b"\nred", 10, BEGINNING, "'red' on two lines"),
        (FILE.replace(b"[SEP]", b"[EOS]"), 8, "", r"lacks \[SEP\]"),
        (FILE + "中".encode("gbk"), 8, "", "not UTF-8"),
    ],
)
def test_another_models_vocabulary(data: bytes, size: int, added: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parsed(data, size, added)


@given(st.binary(max_size=200), st.integers(0, 20), st.sampled_from(["", BEGINNING]))
def test_any_bytes(data: bytes, size: int, added: str) -> None:
    try:
        found = parsed(data, size, added)
    except CheckpointError as e:
        assert "\n" not in str(e)
    else:
        assert sorted(found.values()) == list(range(size))


def test_texts_are_cut() -> None:
    pytest.importorskip("tokenizers")
    vocabulary = parsed(FILE, 8)
    plain = WordPieces(vocabulary, needed="a test")
    assert plain.encode("Reddish CAT猫", most=8) == ([2, 4, 5, 6, 7, 3], False)
    assert plain.encode("red cat red 猫", most=5) == ([2, 4, 6, 4, 3], True)
    assert plain.encode("red cat red 猫", most=5, keep_end=True) == ([2, 6, 4, 7, 3], True)
    assert plain.encode("", most=2) == ([2, 3], False)
    assert plain.encode("\ud83d", most=9) == ([2, 1, 3], False)
    assert plain.encode("[SEP]", most=9)[0].count(3) == 1
    special = WordPieces(vocabulary, special=(*SPECIAL, "[MASK]"), needed="a test")
    assert special.encode("[SEP] cat", most=9) == ([2, 3, 6, 3], False)


@pytest.mark.parametrize("data", [b"", FILE, "中文".encode("gbk")], ids=["empty", "short", "gbk"])
def test_instructblip_with_another_vocabulary(
    tmp_path: Path, data: bytes, llama_reference: Path
) -> None:
    """It is refused where the weights are opened; a bundle's, at the first question."""
    pytest.importorskip("tokenizers")
    words = tmp_path / "vocab.txt"
    words.write_bytes(data)
    published = PUBLISHED["instructblip"]
    assert isinstance(published, PublishedBlip)
    vision = dataclasses.replace(published.vision, wordpiece=words)
    with pytest.raises(CheckpointError, match=r"vocab\.txt: .*expected"):
        dataclasses.replace(published, vision=vision).weights()
    with pytest.raises(BundleError, match=r"vocab\.txt: .*expected"):
        question_words(words, 631)
    assert question_words(INSTRUCTBLIP / "bert_small" / "vocab.txt", 631)
