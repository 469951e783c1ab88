"""Conversation formats against the recorded prompts of the published demos, and our own rules."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import load_json
from seechat_lite.conversation import FORMATS, ImageSlot, Turn, postprocess, render, trimmed
from seechat_weights.errors import ContextError

CHATGLM = load_json("prompts/chatglm_chat.json")
DEMO = load_json("prompts/seechat_demo_stage2.json")


def history(pairs: list[list[str]], question: str) -> list[Turn]:
    return [*(Turn(q, a) for q, a in pairs), Turn(question)]


@pytest.mark.parametrize("case", CHATGLM["cases"], ids=lambda case: case["query"][:20] or "empty")
def test_chatglm_text(case: dict[str, Any]) -> None:
    segments = render(FORMATS["chatglm"], history(case["history"], case["query"]))
    assert "".join(map(str, segments)) == case["prompt"]


@pytest.mark.parametrize("case", load_json("tokenizer/process_response.json")["cases"])
def test_chatglm_answers(case: dict[str, str]) -> None:
    for name in ("chatglm", "visualglm"):
        assert postprocess(FORMATS[name], case["in"]) == case["out"]


@pytest.mark.parametrize("case", DEMO["cases"], ids=range(len(DEMO["cases"])))
def test_the_demos_text(case: dict[str, Any]) -> None:
    """Its forced first question and 2000-character rule, turn after turn, on its own answers."""
    format, turns = FORMATS["seechat-compat"], []
    for i, turn in enumerate(case["turns"]):
        # the demo records no first question: whatever the user asks, it asks its own
        turns.append(Turn(turn["question"] or "它是谁?", images=() if i else ("cat",)))
        assert render(format, turns) == [case["before"], ImageSlot("cat", 0), turn["after"]]
        answer = postprocess(format, turn["raw"])
        assert answer == turn["answer"]
        turns[-1] = Turn(turns[-1].question, answer, turns[-1].images)


@pytest.mark.parametrize(
    "case", DEMO["answer_postprocess"], ids=lambda case: case["raw"] or "empty"
)
def test_the_demos_answers(case: dict[str, str]) -> None:
    assert postprocess(FORMATS["seechat-compat"], case["raw"]) == case["answer"]


def test_seechat_equals_the_demo_where_the_first_question_is_the_same() -> None:
    compared = 0
    for case in DEMO["cases"]:
        turns: list[Turn] = []
        for i, turn in enumerate(case["turns"]):
            turns.append(Turn(turn["question"] or "详细描述这张图片", None, () if i else ("cat",)))
            segments = render(FORMATS["seechat"], turns)
            if i and turn["after"] == DEMO["first_after"]:
                break  # from here on the demo has forgotten the history
            assert segments == [case["before"], ImageSlot("cat", 0), turn["after"]]
            compared += 1
            turns[-1] = Turn(turns[-1].question, turn["answer"], turns[-1].images)
    assert compared > 15


def test_seechat_asks_the_users_own_question_about_any_pictures() -> None:
    turns = [
        Turn("你好", "你好!"),
        Turn("哪个更大?", "左边。", ("a", "b")),
        Turn("为什么?", "因为它更高。"),
        Turn("这个呢?", None, ("a",)),
    ]
    assert render(FORMATS["seechat"], turns) == [
        "###Human: 你好 ###Assistant: 你好!###Human: <Img>",
        ImageSlot("a", 0),
        "</Img><Img>",
        ImageSlot("b", 0),
        "</Img> 哪个更大? ###Assistant: 左边。###Human: 为什么? ###Assistant: 因为它更高。"
        "###Human: <Img>",
        ImageSlot("a", 0),
        "</Img> 这个呢? ###Assistant: ",
    ]
    assert render(FORMATS["seechat"], [Turn("hi")]) == ["###Human: hi ###Assistant: "]


def test_seechat_never_drops_a_question() -> None:
    turns = [Turn("q" * 5000, "a" * 5000, ("cat",)), Turn("这是什么?")]
    text = "".join(map(str, render(FORMATS["seechat"], turns)))
    assert "q" * 5000 in text and "a" * 5000 in text and "这是什么?" in text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" A cat, sitting. ", "A cat, sitting."),
        ("code: def f(a, b):\n    return a", "code: def f(a, b):\n    return a"),
        ("图片###Human: 再说一次", "图片"),
        ("###", ""),
        ("1,000元", "1,000元"),
        ("a ## b", "a ## b"),
    ],
)
def test_seechat_leaves_answers_as_they_are(text: str, answer: str) -> None:
    assert postprocess(FORMATS["seechat"], text) == answer


def test_visualglm_pictures_stand_at_their_turn() -> None:
    turns = [Turn("一?", "1", ("a",)), Turn("二?", None, ("b",))]
    assert render(FORMATS["visualglm"], turns) == [
        "<img>",
        ImageSlot("a", 0),
        "</img>问：一?\n答：1\n<img>",
        ImageSlot("b", 0),
        "</img>问：二?\n答：",
    ]


@given(st.lists(st.text(), min_size=1, max_size=8), st.data())
def test_words_are_never_taken_for_the_template(words: list[str], data: st.DataObject) -> None:
    """Braces, rounds and markers in what people write arrive as they wrote them."""
    words = [w + "{question}{answer}{images}{round}{}" for w in words]
    for name, format in FORMATS.items():
        if name == "seechat-compat" or not format.remembers:
            continue  # these forget questions by their nature
        turns = [*(Turn(q, a) for q, a in pairwise(words)), Turn(words[-1])]
        text = "".join(map(str, render(format, turns)))
        for word in words:
            assert (trimmed(word) if format.trim else word) in text


@pytest.mark.parametrize(
    "turns",
    [[], [Turn("q", "a")], [Turn("q"), Turn("q")], [Turn("q"), Turn("q", "a")]],
    ids=["none", "answered", "two open", "open in the middle"],
)
def test_only_the_last_turn_is_open(turns: list[Turn]) -> None:
    with pytest.raises(ContextError, match="every turn but the last"):
        render(FORMATS["seechat"], turns)


def test_pictures_without_a_place() -> None:
    with pytest.raises(ContextError, match="'chatglm' has no place for pictures"):
        render(FORMATS["chatglm"], [Turn("q", None, ("cat",))])
    for turns in (
        [Turn("q")],
        [Turn("q", None, ("a", "b"))],
        [Turn("q", "a", ("a",)), Turn("q", None, ("b",))],
    ):
        with pytest.raises(ContextError, match="exactly one picture, with the first question"):
            render(FORMATS["seechat-compat"], turns)
