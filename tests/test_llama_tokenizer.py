"""LLaMA's tokenizer against the recorded cases of the published slow one, and its streams."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import data, load_json
from seechat_lite.llama_tokenizer import LlamaTokenizer
from seechat_lite.text_stream import TextStream
from seechat_lite.tokenizers import open_tokenizer
from seechat_weights.config import LMConfig
from seechat_weights.errors import BundleError
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.tokenizers import describe_tokenizer

CASES = load_json("llama/cases.json")
MODEL = data("llama/tokenizer.model")
TOKENIZERS = {legacy: LlamaTokenizer(MODEL, legacy=legacy) for legacy in (True, False)}
OTHERS = CASES["differences"]["transformers 4.37.2 legacy_false"]


def differs(what: str, index: int, canonical: Any, *, legacy: bool) -> Any:
    """What the other behaviour gives for a case, where it is not the same."""
    return canonical if legacy else dict(OTHERS[what]).get(index, canonical)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("index", range(len(CASES["cases"])))
def test_reference_text(index: int, legacy: bool) -> None:
    case, tokenizer = CASES["cases"][index], TOKENIZERS[legacy]
    ids = differs("ids", index, case["ids"], legacy=legacy)
    assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == ids
    decoded = differs("decode", index, case["decode"], legacy=legacy)
    assert tokenizer.decode(ids) == decoded
    if legacy:
        assert tokenizer.encode(case["text"], specials=False) == case["sp_ids"]


def test_added_tokens() -> None:
    added = CASES["added_tokens"]
    numbers = {name: 760 + i for i, name in enumerate(added["order"])}
    other = dict(OTHERS["added_tokens"])
    for case in added["cases"]:
        for legacy in (True, False):
            tokenizer = LlamaTokenizer(MODEL, legacy=legacy, added=numbers)
            expected = case["ids"] if legacy else other.get(case["text"], case["ids"])
            assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == expected
        assert tokenizer.vocab_size == added["len"]


def stream(tokenizer: LlamaTokenizer, ids: list[int]) -> tuple[str, list[str]]:
    text = TextStream(tokenizer)
    pieces = [text.push(i) for i in ids]
    return "".join(pieces) + text.finish(), pieces


@pytest.mark.parametrize("index", range(len(CASES["streams"])))
def test_reference_stream(index: int) -> None:
    for legacy in (True, False):
        case = CASES["streams"][index]
        if not legacy:
            case = dict(CASES["streams_legacy_false_that_differ"]).get(index, case)
        tokenizer = TOKENIZERS[legacy]
        text, pieces = stream(tokenizer, case["ids"])
        assert text == case["text"] == tokenizer.decode(case["ids"])
        shown = ""
        for piece, prefix in zip(pieces, case["prefix_texts"], strict=True):
            shown += piece
            assert prefix.startswith(shown)  # nothing is shown that would have to be taken back
            assert prefix.rstrip("\ufffd") == shown.rstrip("\ufffd") or prefix.endswith("\ufffd")


@given(st.lists(st.integers(0, 759), max_size=30), st.booleans())
def test_a_stream_equals_decode(ids: list[int], legacy: bool) -> None:
    tokenizer = TOKENIZERS[legacy]
    assert stream(tokenizer, ids)[0] == tokenizer.decode(ids)


@given(st.lists(st.tuples(st.text(max_size=12), st.booleans()), max_size=4), st.booleans())
def test_parts_without_specials_are_one_text(parts: list[tuple[str, bool]], legacy: bool) -> None:
    """Only names that lie in a part with specials are tokens; all else is one text."""
    tokenizer = TOKENIZERS[legacy]
    plain = [(text.replace("<", "("), specials) for text, specials in parts]
    joined = "".join(text for text, _ in plain)
    assert tokenizer.encode_parts(plain) == tokenizer.encode(joined)
    assert tokenizer.encode(joined) == tokenizer.encode(joined, specials=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_nobodys_words_end_an_answer(legacy: bool) -> None:
    tokenizer = TOKENIZERS[legacy]
    ids = tokenizer.encode_parts([("USER: ", True), ("</s><s>", False), (" A: b</s>", True)])
    assert [i for i in ids if i < 3] == [2]
    assert ids[-1] == 2
    # a name is not made of two parts
    assert 2 not in tokenizer.encode_parts([("</", True), ("s>", False)])


@pytest.mark.parametrize("name", ["llama1", "llama2", "tied"])
def test_what_the_files_beside_the_weights_say(name: str, llama_reference: Path) -> None:
    folder = llama_reference / "llama_tiny" / name
    lm = open_lm(folder)
    config = describe_tokenizer(lm.tokenizer, lm.config)
    assert (config.kind, config.legacy) == ("llama", name != "llama2")
    tokenizer = open_tokenizer(lm.tokenizer, config, lm.config)
    cases = json.loads((folder / "cases.json").read_text("utf-8"))
    for prompt in ("p0", "p1", "p2"):
        case = cases[prompt]
        assert [*tokenizer.prompt_begin, *tokenizer.encode(case["text"])] == case["input_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]


def test_added_tokens_of_a_folder(llama_reference: Path) -> None:
    lm = open_lm(llama_reference / "llava_tiny/llava_v1")
    config = describe_tokenizer(lm.tokenizer, lm.config)
    assert config.added == {"<im_patch>": 760, "<im_start>": 761, "<im_end>": 762}
    assert open_tokenizer(lm.tokenizer, config, lm.config).encode("<im_start>") == [761]
    small = replace(lm.config, vocab_size=762)
    assert "<im_end>" not in describe_tokenizer(lm.tokenizer, small).added


def test_the_real_vocabulary(llama_reference: Path) -> None:
    folder = llama_reference / "llama_tiny"
    cases = json.loads((folder / "tokenizer_real_cases.json").read_text("utf-8"))
    model = folder / "vicuna_real_vocab/tokenizer.model"
    others = cases["differences"]["transformers 4.37.2 legacy_false"]
    for legacy in (True, False):
        tokenizer = LlamaTokenizer(model, legacy=legacy)
        for index, case in enumerate(cases["cases"]):
            ids = case["ids"] if legacy else dict(others["ids"]).get(index, case["ids"])
            assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == ids
            text = case["decode"] if legacy else dict(others["decode"]).get(index, case["decode"])
            assert tokenizer.decode(ids) == text


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        LlamaTokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(BundleError, match="no sentencepiece model"):
        LlamaTokenizer(data("llama/cases.json"))
    with pytest.raises(BundleError, match="760 pieces, the model has 100 ids"):
        TOKENIZERS[True].check(LMConfig(vocab_size=100))
