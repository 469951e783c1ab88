"""Train the model's own tokenizer, in the layout of ChatGLM-6B's ice_text.model.

sentencepiece unigram with byte fallback; then the special pieces are moved to where that layout
has them: <unk> <s> </s> <pad> <n> first; [MASK] ... <dBLOCK>, tab and blanks after the text; bytes
last.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm
from careless import instructions
from dialogues import load_wordings
from photo_classes import load_classes, load_kinds, load_things
from photo_dialogues import ORDINALS_ZH, PhotoAuthor
from sentencepiece import sentencepiece_model_pb2 as pb

CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
# the conversation format's own words: one token each
NAME_SCORE = -8.0  # as likely as a common word: beats any way of spelling the name
FRAME = ("###Human:", "###Assistant:", "<Img>", "</Img>")


def corpus(lines: int, seed: int = 5) -> Iterator[str]:
    """Text like what the model will read: dialogues, all wordings, all names."""
    from scenes import Picture, Thing

    rng = np.random.default_rng(seed)
    author = PhotoAuthor(rng)
    concepts = author.concepts
    for c in (*concepts, *load_kinds().values()):
        yield from (c.zh, c.en)
    yield from instructions("train")
    for ways in load_wordings().values():
        yield from ways
    for _ in range(lines):
        number = int(rng.choice([1, 1, 2, 3]))
        layout = {1: "one", 2: "row2", 3: "row3"}[number]
        things = [
            Thing(int(rng.integers(len(concepts))), place, int(rng.integers(11)))
            for place in ("left", "middle", "right")[:number]
        ]
        if number == 2:
            things[1] = Thing(things[1].concept, "right", things[1].colour)
        kind = rng.random()
        if kind < 0.2:
            rounds = author.without_picture()
        elif kind < 0.5:
            rounds = author.photo(author.deal(), turns=2)
        elif kind < 0.58:
            rounds = author.several([author.deal() for _ in range(int(rng.integers(2, 6)))])
        else:
            rounds = author.one_picture(Picture("icons", layout, tuple(things)), turns=2)
        for r in rounds:
            yield r.question
            yield r.answer


def name_pieces() -> list[str]:
    """Names and the words answers are made of: one token each, whatever the statistics say."""
    from colours import COLOURS
    from phrases import NUMBERS_ZH, PLACES, YES_NO_ZH

    concepts, _ = load_things()
    kinds = load_kinds().values()
    names = [k.zh for k in kinds] + [k.category.zh for k in kinds]
    names += [f"一{c.measure}" for c in load_classes()]
    names += [c.zh for c in concepts] + [c.category.zh for c in concepts]
    names += [c[1] for c in COLOURS] + [word for zh, _ in PLACES.values() for word in zh]
    names += [f"{n}个" for n in NUMBERS_ZH] + [f"{n}个东西" for n in NUMBERS_ZH]
    names += [word for pair in YES_NO_ZH.values() for word in pair]
    names += [
        "这是",
        "图里有",
        "属于",
        "它属于",
        "英文是",
        "中文是",
        *ORDINALS_ZH,
        "还有",
        "是的",
        "一种",
        "这是一种",
        "不确定",
        "背景主要是",
        "图片主要是",
    ]
    english = [k.en for k in kinds] + [c.en for c in concepts] + [c.category.en for c in concepts]
    english += [where for _, en in PLACES.values() for where in en]
    words = {w for name in english for w in name.replace("-", " ").split()}
    words |= {"This", "These", "The", "There", "Its", "It", "Yes", "No", "On", "At", "In", "I"}
    return list(dict.fromkeys([n for n in names if len(n) > 1] + [f"▁{w}" for w in sorted(words)]))


def train_tokenizer(target: Path, *, vocab_size: int, lines: int = 60_000) -> None:
    """Write an ice_text.model: vocab_size pieces and every name that is not among them."""
    buffer = io.BytesIO()
    extra = len(CONTROL) + 1 + 79 + 1  # pieces that are added below
    spm.SentencePieceTrainer.train(
        sentence_iterator=corpus(lines),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=vocab_size - extra,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=10,  # words, not whole sentences
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<n>", *FRAME],
        pad_id=3,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    model = pb.ModelProto()
    model.ParseFromString(buffer.getvalue())
    kind = pb.ModelProto.SentencePiece
    old = {p.piece: p for p in model.pieces}
    head = ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    text = [p for p in model.pieces if p.piece not in head and p.type != kind.BYTE]
    ours = set(name_pieces())
    for p in text:
        if p.piece in ours:
            p.score = max(p.score, NAME_SCORE)
    missing = sorted(ours - {p.piece for p in text})
    text += [kind(piece=name, score=NAME_SCORE, type=kind.NORMAL) for name in missing]
    pieces = [(old[name].piece, old[name].score, old[name].type) for name in head]
    pieces += [(p.piece, p.score, p.type) for p in text]
    pieces += [(name, 0.0, kind.CONTROL) for name in CONTROL]
    blanks = ["<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
    pieces += [(name, 0.0, kind.USER_DEFINED) for name in blanks]
    pieces += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    del model.pieces[:]
    for piece, score, type_ in pieces:
        model.pieces.add(piece=piece, score=score, type=type_)
    target.write_bytes(model.SerializeToString())
