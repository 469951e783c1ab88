"""tokenizer.json: hard texts against the library that made the format, and damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import byte_level
from seechat_lite.json_tokenizer import JsonTokenizer
from seechat_lite.text_stream import TextStream
from seechat_lite.written import Names
from seechat_weights.config import LMConfig
from seechat_weights.errors import BundleError

tokenizers = pytest.importorskip("tokenizers")

HARD = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            [
                *(" ", "  ", "\n", "\r\n", "\t", "\n\n  ", "\u00a0", "\u3000", "\u200d", "\ufeff"),
                *("熊猫", "，", "é", "e\u0301", "\u0301", "🐼", "👩\u200d🔬", "🇨🇳", "ﷺ", "Ⅷ", "½"),
                *("don't", "WE'LL", "'s", "1234", "12 345", "__init__", "x += 1", "\0", "\x7f"),
                *(
                    "<|im_start|>",
                    "<|im_end|>",
                    "<|eot_id|>",
                    "<|begin_of_text|>",
                    "<|im_",
                    "end|>",
                ),
                *("end|>", "<tool_call>", "Ġ", "Ċ", "\udce4"),
            ]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module", params=byte_level.KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level.make(request.param, tmp_path_factory.mktemp("json") / "tokenizer.json")


@pytest.fixture(scope="module")
def ours(made: Path) -> JsonTokenizer:
    library = tokenizers.Tokenizer.from_file(str(made))
    ends = (library.token_to_id(name) for name in ("<|im_end|>", "<|eot_id|>"))
    return JsonTokenizer(made, eos_id=next(i for i in ends if i is not None))


@pytest.fixture(scope="module")
def theirs(made: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(made))


def readable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@given(text=HARD)
def test_texts_are_encoded_as_the_library_does(ours: JsonTokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(readable(text), add_special_tokens=False).ids
    assert ours.encode_parts([(text, Names.ALL)]) == ids
    assert [*ours.prompt_begin, *ids] == theirs.encode(readable(text)).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@given(text=HARD)
def test_people_s_words_are_text(ours: JsonTokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text, specials=False)
    specials = {i for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert specials.isdisjoint(ids)
    whole = readable(text)
    if theirs.normalizer:
        whole = theirs.normalizer.normalize_str(whole)
    assert ours.decode(ids) == whole
    for names in (Names.NONE, Names.SAID):
        assert ours.encode_parts([(text, names)]) == ids


@given(parts=st.lists(st.tuples(HARD, st.sampled_from(Names)), max_size=4))
def test_only_names_in_the_format_s_own_parts_are_tokens(
    ours: JsonTokenizer, theirs: Any, parts: list[tuple[str, Names]]
) -> None:
    specials = {t.content: i for i, t in theirs.get_added_tokens_decoder().items() if t.special}
    expected = sum(
        text.count(name) for text, names in parts if names == Names.ALL for name in specials
    )
    found = ours.encode_parts(parts)
    assert sum(i in specials.values() for i in found) == expected


@given(data=st.data())
def test_a_stream_shows_only_what_stays(
    ours: JsonTokenizer, theirs: Any, data: st.DataObject
) -> None:
    """Any ids, so characters are split wherever tokens end, and some are never whole."""
    some = st.one_of(
        st.integers(0, ours.vocab_size - 1).map(lambda i: [i]),
        HARD.map(lambda text: ours.encode(text, specials=False)),
        st.characters(min_codepoint=0x80).map(
            lambda c: [b for x in c.encode("utf-8", "replace") for b in byte_ids(ours, x)][:-1]
        ),
    )
    ids = [i for part in data.draw(st.lists(some, max_size=10)) for i in part]
    whole = theirs.decode(ids, skip_special_tokens=True)
    stream, shown = TextStream(ours), ""
    for i in ids:
        shown += stream.push(i)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole == ours.decode(ids)


def byte_ids(tokenizer: JsonTokenizer, byte: int) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if tokenizer.surface(i) == bytes((byte,))][:1]


def test_characters_are_shown_once_they_are_whole(ours: JsonTokenizer) -> None:
    stream = TextStream(ours)
    shown = [stream.push(i) for b in "é🐼猫".encode() for i in byte_ids(ours, b)]
    assert shown == ["", "é", "", "", "", "🐼", "", "", "猫"]


def test_ids_that_are_no_text(ours: JsonTokenizer) -> None:
    with pytest.raises(IndexError, match="expected less than"):
        ours.decode([ours.vocab_size])
    with pytest.raises(BundleError, match="the model has 10 ids"):
        ours.check(LMConfig(vocab_size=10))
    end = ours.encode("<|im_end|><|eot_id|>")
    assert ours.eos_id in end
    assert ours.decode([ours.eos_id]) == "" and ours.written(ours.eos_id) == b""
    (tool,) = ours.encode("<tool_call>")
    assert ours.decode([tool]) == "<tool_call>"


def test_blanks_that_belong_to_a_special_token(tmp_path: Path) -> None:
    path = byte_level.make("smollm2", tmp_path / "tokenizer.json")
    settings = json.loads(path.read_text("utf-8"))
    for token in settings["added_tokens"]:
        token["lstrip"] = token["content"] == "<|im_start|>"
        token["rstrip"] = token["content"] == "<|im_end|>"
        token["single_word"] = token["content"] == "<|endoftext|>"
    path.write_text(json.dumps(settings), "utf-8")
    ours = JsonTokenizer(path, eos_id=0)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in (
        "a <|im_start|> b <|im_end|> c",
        "<|im_end|> \n <|im_start|>",
        "x<|endoftext|>y <|endoftext|> z",
    ):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_parts([(text, Names.ALL)]) == expected == ours.encode(text)


# --- damaged files --------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Any) -> Path:
    path = byte_level.make("llama3", tmp_path / "tokenizer.json")
    settings = json.loads(path.read_text("utf-8"))
    change(settings)
    path.write_text(json.dumps(settings), "utf-8")
    return path


def set_(*keys: Any) -> Any:
    """A change that puts the last of `keys` where the others lead."""

    def change(settings: Any) -> None:
        *path, last, value = keys
        for key in path:
            settings = settings[key]
        settings[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_("model", None), "no tokenizer.json"),
        (set_("model", "type", "Unigram"), "its model is 'Unigram'"),
        (set_("model", "type", "WordPiece"), "its model is 'WordPiece'"),
        (set_("model", "byte_fallback", True), "its model is"),
        (set_("model", "vocab", []), "no vocabulary"),
        (set_("model", "vocab", "a", -1), "no vocabulary"),
        (set_("model", "vocab", "a", 1 << 40), "no vocabulary"),
        (set_("model", "vocab", "a", True), "no vocabulary"),
        (set_("model", "vocab", {}), "no vocabulary"),
        (set_("model", "merges", [["zzz", "yyy"]]), "tokenizers cannot read it"),
        (set_("model", "merges", 7), "tokenizers cannot read it"),
        (set_("decoder", None), "its decoder is not ByteLevel"),
        (set_("decoder", {"type": "Metaspace"}), "its decoder is not ByteLevel"),
        (set_("normalizer", {"type": "Lowercase"}), "its normalizer is 'Lowercase'"),
        (set_("normalizer", "NFC"), "its normalizer is"),
        (set_("pre_tokenizer", {"type": "Metaspace"}), "it splits text in an unknown way"),
        (set_("pre_tokenizer", "ByteLevel"), "it splits text in an unknown way"),
        (set_("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "(a+)+$"}), "unknown way"),
        (set_("pre_tokenizer", "pretokenizers", 0, "pattern", {"String": " "}), "unknown way"),
        (set_("added_tokens", 0, "content", 7), "its added tokens are damaged"),
        (set_("added_tokens", 0, "content", ""), "its added tokens are damaged"),
        (set_("added_tokens", 0, "id", "x"), "its added tokens are damaged"),
        (set_("added_tokens", 0, "id", -4), "its added tokens are damaged"),
        (set_("added_tokens", 0, "id", True), "its added tokens are damaged"),
        (set_("added_tokens", {"a": 1}), "its added tokens are damaged"),
        (set_("added_tokens", 7), "its added tokens are damaged"),
        (set_("post_processor", {"type": "Nothing"}), "tokenizers cannot read it"),
    ],
)
def test_a_file_of_another_kind_or_damaged(tmp_path: Path, change: Any, said: str) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(BundleError) as error:
        JsonTokenizer(path, eos_id=0)
    message = str(error.value)
    assert said in message and message.startswith(str(path)) and "\n" not in message
    assert "expected" in message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"null", b"[" * 100_000, b"\xff\xfe{}"])
def test_what_is_no_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="expected"):
        JsonTokenizer(path, eos_id=0)
    with pytest.raises(BundleError, match="cannot be read"):
        JsonTokenizer(tmp_path / "missing.json", eos_id=0)
