"""Answers that are held to a JSON schema, by every tokenizer and by the model."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seechat_lite as sl
from reference import data
from seechat_lite import json_schema
from seechat_lite.json_schema import MAX_SCHEMA, Constraint, SchemaError, Verbatim, Vocabulary
from seechat_lite.json_tokenizer import JsonTokenizer
from seechat_lite.llama_tokenizer import LlamaTokenizer
from seechat_lite.sampling import Sampler, Sampling
from seechat_lite.text_stream import TextStream
from seechat_lite.tokenizer import Tokenizer
from seechat_lite.tokenizers import TextTokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

SPARE = 40  # ids beyond the tokenizer's, as published models have them
TOKENIZERS: dict[str, TextTokenizer] = {
    "published": Tokenizer(data("chatglm_tiny/ice_text.model")),
    "shifted": Tokenizer(data("chatglm_tiny/ice_text.model"), num_image_tokens=20000),
    "specials that are text": Tokenizer(data("tokenizer/variant_userdef.model")),
    "white space kept": Tokenizer(data("tokenizer/variant_keepws.model")),
    "identity": Tokenizer(data("tokenizer/variant_identity.model")),
    "LLaMA's": LlamaTokenizer(data("llama/tokenizer.model"), added={"<im_start>": 760}),
}
ANIMAL = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["panda", "熊猫", "frog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


def valid(schema: Any, text: str) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


# --- random schemas -----------------------------------------------------------------------------

_names = st.text('abcd_名字 <n>"\\\n', min_size=1, max_size=6)
_numbers = st.integers(-1000, 1000)


def _ranged(low: str, high: str, kind: str, bounds: st.SearchStrategy[int]) -> Any:
    pair = st.tuples(bounds, bounds).map(sorted)
    return pair.map(lambda p: {"type": kind, low: p[0], high: p[1]})


_leaves = st.one_of(
    _ranged("minLength", "maxLength", "string", st.integers(0, 8)),
    _ranged("minimum", "maximum", "integer", _numbers),
    _ranged("minimum", "maximum", "number", _numbers),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.lists(st.one_of(_names, _numbers, st.none()), min_size=1, max_size=4, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.one_of(_names, st.lists(_names, max_size=2)).map(lambda value: {"const": value}),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{3}$"},
            {"type": "string", "pattern": "^(熊猫|panda)+$", "maxLength": 12},
            {"type": "string", "format": "date"},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
            {"type": "string", "maxLength": 5, "description": "free", "title": "t", "default": ""},
        ]
    ),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any], draw: int, more: bool) -> dict[str, Any]:
        required = [name for i, name in enumerate(properties) if draw >> i & 1]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": {"type": "null"} if more else False,
        }

    properties = st.dictionaries(_names, inner, max_size=4)
    return st.builds(made, properties, st.integers(0, 15), st.booleans())


_inner = st.recursive(
    st.one_of(_leaves, st.just({"$ref": "#/$defs/it"})),
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(
            lambda items, n: {"type": "array", "items": items, "minItems": n[0], "maxItems": n[1]},
            inner,
            st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda all: {"anyOf": all}),
    ),
    max_leaves=6,
)
_schemas = st.builds(
    lambda schema, it: {"$ref": "#/$defs/all", "$defs": {"all": schema, "it": it}},
    _inner,
    _leaves,
)


@pytest.fixture(scope="module")
def model() -> Iterator[sl.Model]:
    with sl.load() as model:
        yield model


@pytest.mark.slow
def test_answers_of_200_random_schemas(model: sl.Model) -> None:
    """Every answer that ends by itself satisfies its schema; most of them end by themselves."""
    finished: list[bool] = []

    @settings(max_examples=200)
    @given(_schemas, st.booleans())
    def ask(schema: dict[str, Any], sampled: bool) -> None:
        answer = model.chat().ask(
            "这是什么？ JSON", schema=schema, max_new_tokens=200, temperature=float(sampled)
        )
        finished.append(answer.stats.finish_reason == "stop")
        if finished[-1]:
            assert valid(schema, answer), (schema, answer)

    ask()
    assert len(finished) >= 200 and sum(finished) > 0.9 * len(finished)


# --- every tokenizer ----------------------------------------------------------------------------


def walk(
    tokenizer: TextTokenizer, constraint: Constraint, logits: Callable[[], np.ndarray], *, most: int
) -> str | None:
    """The text of an answer by these logits; None if it is not whole after so many tokens."""
    sampler = Sampler(Sampling(), [], eos_ids=[tokenizer.eos_id], constraint=constraint)
    text, shown = TextStream(Verbatim(tokenizer)), ""
    for _ in range(most):
        token = sampler.next(logits())
        if token == tokenizer.eos_id:
            return shown + text.finish()
        shown += text.push(token)
        if constraint.finished:
            return shown + text.finish()
    return None


VOCABULARIES = {
    name: Vocabulary(tokenizer, size=tokenizer.vocab_size + SPARE)
    for name, tokenizer in TOKENIZERS.items()
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_logits_end_in_valid_json(name: str) -> None:
    """Of whatever the tokens are made: bytes, blanks, names of newlines, names of specials."""
    tokenizer = TOKENIZERS[name]
    ended: list[bool] = []

    @settings(max_examples=40)
    @given(_schemas, st.integers(0, 2**32))
    def check(schema: dict[str, Any], seed: int) -> None:
        random = np.random.default_rng(seed)
        constraint = VOCABULARIES[name].constraint(schema)
        size = tokenizer.vocab_size + SPARE
        text = walk(tokenizer, constraint, lambda: random.normal(size=size), most=300)
        ended.append(text is not None)
        assert text is None or valid(schema, text), (schema, text)

    check()
    assert sum(ended) > 0.8 * len(ended)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "value",
    [
        "熊猫🐼 and  two   blanks\n\tnewline",
        "<n> <|tab|> <|blank_3|> spelled out",
        "[gMASK]<sop><eop><pad>[MASK]",
        "\u2581 a\u00a0\ufffd\u0000",
        {"训练": ["###", "[[训练时间]]", "你好,世界!"]},
    ],
)
def test_every_text_can_be_said_as_it_is(name: str, value: Any) -> None:
    tokenizer = TOKENIZERS[name]
    random = np.random.default_rng(0)
    constraint = VOCABULARIES[name].constraint({"const": value})
    size = tokenizer.vocab_size + SPARE
    text = walk(tokenizer, constraint, lambda: random.normal(size=size), most=500)
    assert text is not None and json.loads(text) == value


def test_byte_level_pieces_may_be_parts_of_characters(tmp_path: Path) -> None:
    """A tokenizer.json, whose tokens are bytes; a token that ends answers is text in it."""
    tokenizers = pytest.importorskip("tokenizers")
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(characters)} | {'"}': 256, '"}]': 257}
    merges = [('"', "}"), ('"}', "]")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["<|turn|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", eos_id=258)
    turn = tokenizer.encode("<|turn|>")
    assert len(turn) == 1
    size = tokenizer.vocab_size + SPARE
    all_tokens = Vocabulary(tokenizer, size=size, ends=turn)
    random = np.random.default_rng(0)
    schema: dict[str, Any]
    for value in ("熊猫🐼\n", [{"a": "<|turn|>"}], "<|end|>"):
        for schema in ({"const": value}, {"type": "string", "maxLength": 4}):
            constraint = all_tokens.constraint(schema)
            assert not constraint.allowed()[turn[0]]
            text = walk(tokenizer, constraint, lambda: random.normal(size=size), most=200)
            assert text is not None and valid(schema, text)


# --- the model ----------------------------------------------------------------------------------


def test_an_answer_that_is_whole_ends_and_one_that_is_cut_says_so(model: sl.Model) -> None:
    whole = model.chat().ask("这是什么？", schema=ANIMAL)
    assert valid(ANIMAL, whole) and whole.stats.finish_reason == "stop"
    count = whole.stats.new_tokens
    exact = model.chat().ask("这是什么？", schema=ANIMAL, max_new_tokens=count)
    assert (exact, exact.stats.finish_reason) == (whole, "stop")
    for limit in range(1, count):
        cut = model.chat().ask("这是什么？", schema=ANIMAL, max_new_tokens=limit)
        assert cut.stats.finish_reason == "length" and whole.startswith(cut)


def test_guesses_change_no_answer(model: sl.Model) -> None:
    """The question holds what the schema wants, so that guesses are right, and wrong ones too."""
    items = {"type": "array", "items": ANIMAL, "minItems": 4, "maxItems": 4}
    question = '[{"animal":"panda","legs":4},{"animal":"panda","legs":4},'
    asked = {"schema": items, "max_new_tokens": 200}
    plain = model.chat().ask(question, **asked, speculate=False)
    guessed = model.chat().ask(question, **asked)
    assert guessed == plain and guessed.stats.guessed_tokens > 0
    assert valid(items, plain)


def test_without_a_schema_nothing_changes(model: sl.Model) -> None:
    """Also after an answer with one, in the same conversation."""
    picture = "docs/images/panda.png"
    chat = model.chat()
    assert chat.ask("这是什么？", picture) == "这是熊猫。"
    json_answer = chat.ask("这是什么？", schema=ANIMAL)
    assert chat.turns[-1].answer == json_answer
    assert model.chat().ask("这是什么？", picture) == "这是熊猫。"


def test_texts_that_end_other_answers_are_words_in_json(model: sl.Model) -> None:
    """The format's own end is no end, and ChatGLM's full-width punctuation is not made."""
    value = "### 你好,世界: [[训练时间]]"
    for name in ("seechat", "chatglm"):
        assert json.loads(model.chat(name).ask("x", schema={"const": value})) == value
    cut = model.chat().ask("x", schema={"const": value}, stop=["你好"])
    assert cut == '"### '


@pytest.mark.torch
def test_the_torch_engine_says_the_same(model: sl.Model) -> None:
    with sl.load(engine="torch", device="cpu") as other:
        picture = "docs/images/panda.png"
        answers = [m.chat().ask("这是什么？", picture, schema=ANIMAL) for m in (model, other)]
    assert answers[0] == answers[1] and valid(ANIMAL, answers[0])


# --- what is refused ----------------------------------------------------------------------------

_DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(70):
    _DEEP = {"type": "array", "items": _DEEP}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "animal"}, "animal"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#/nowhere"}, "schema cannot be followed"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"type": "string", "format": "poem"}, "poem"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "schema cannot be followed"),
        ({"enum": []}, "schema cannot be followed"),
        ({"$ref": "#"}, "no JSON satisfies it"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"const": object()}, "cannot be written as JSON"),
        ({"const": "\ud800"}, "schema cannot be followed"),
        ({"title": "x" * MAX_SCHEMA}, f"at most {MAX_SCHEMA}"),
        ({"a": _DEEP}, "64 levels"),
    ],
)
def test_what_cannot_be_followed_is_refused(model: sl.Model, schema: Any, message: str) -> None:
    with pytest.raises(SchemaError, match="schema") as e:
        model.chat().stream("x", schema=schema)  # before anything is asked
    assert message in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("schema", ["x", [], 1, True])
def test_a_schema_is_an_object(model: sl.Model, schema: Any) -> None:
    with pytest.raises(sl.OptionError, match="schema is"):
        model.chat().stream("x", schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"value{i * 7919 % 100003}" for i in range(4000)]},
        {"type": "string", "minLength": 10**6},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
        {"type": "string", "pattern": "(a|b)*a(a|b){40}"},
        {"type": "string", "pattern": "((((x{100}){100}){100}){100}){100}"},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
        {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {}}}, {"properties": {f"b{i}": {}}}]}
                for i in range(16)
            ]
        },
        {"type": "integer", "minimum": 1, "maximum": 10**15, "multipleOf": 78977887},
    ],
    ids=range(9),
)
def test_schemas_meant_to_exhaust_take_little(model: sl.Model, schema: Any) -> None:
    before = psutil.Process().memory_info().rss
    with suppress(SchemaError):
        model.chat().ask("x", schema=schema, max_new_tokens=40)
    assert psutil.Process().memory_info().rss - before < 200 << 20


def test_without_the_extra(model: sl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schema, "find_spec", lambda name: None)
    with pytest.raises(SchemaError, match=r"seechat-lite\[schema\]"):
        model.chat().stream("x", schema={})
    assert model.chat().ask("这是什么？", "docs/images/panda.png") == "这是熊猫。"


def test_a_closed_model_says_so() -> None:
    model = sl.load()
    model.chat().ask("x", schema={"const": 1})
    model.close()
    with pytest.raises(sl.EngineError, match="closed"):
        model.chat().ask("x", schema={"const": 1})
