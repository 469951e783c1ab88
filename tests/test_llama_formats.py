"""The formats of LLaVA, MiniGPT-4 and InstructBLIP, against prompts of the original code."""

from collections.abc import Iterator
from typing import Any

import pytest

import llama_reference as golden
from seechat_lite.conversation import (
    FORMATS,
    Format,
    ImageSlot,
    Turn,
    postprocess,
    render,
    with_marks,
)


def written(format: Format, turns: list[Turn], slot: str) -> str:
    segments = render(format, turns)
    return "".join(slot if isinstance(s, ImageSlot) else s for s in segments)


def llava_turns() -> Iterator[tuple[str, Format, list[Turn], dict[str, Any]]]:
    """Every recorded question of LLaVA: where, its format, the turns so far, what was recorded."""
    cases = golden.cases("llava_tiny/cases.json")
    for part in ("v1", "v15", "projector_only", "lora"):
        marked = cases[part].get("im_start") is not None
        marks = ("<im_start>", "<im_end>") if marked else ("", "")
        for conversation in cases[part]["conversations"]:
            format = with_marks(FORMATS[conversation["template"]], marks)
            for turns, turn in golden.llava_conversation(conversation):
                yield part, format, turns, turn


@golden.needs_llama_reference
def test_llavas_prompts() -> None:
    count = 0
    for part, format, turns, turn in llava_turns():
        assert written(format, turns, "<image>") == turn["prompt"], (part, format.name)
        cut = turn["text_cut_at_stop"]
        assert postprocess(format, turn["text"]) == cut, (part, format.name)
        count += 1
    assert count


@golden.needs_llama_reference
def test_minigpt4s_segments() -> None:
    count = 0
    for name, case in golden.minigpt4_cases():
        for format in (FORMATS[name], FORMATS[f"{name}-compat"]):
            turns: list[Turn] = []
            for i, turn in enumerate(case["turns"]):
                turns.append(Turn(turn["question"], None, () if i else (case["picture"],)))
                texts = [s for s in render(format, turns) if isinstance(s, str)]
                assert texts == turn["segments"]
                turns[-1] = Turn(turn["question"], turn["text"], turns[-1].images)
                count += 1
    assert count


@golden.needs_llama_reference
def test_minigpt4s_answers() -> None:
    cases = golden.cases("minigpt4_tiny/cases.json")
    for said, shown in cases["post_processing"]:
        for name in ("minigpt4-compat", "minigpt4_llama2-compat"):
            assert postprocess(FORMATS[name], said) == shown
    turns = [Turn("a", "", ("p",)), Turn("b")]
    found = written(FORMATS["minigpt4-compat"], turns, "<ImageHere>")
    assert found == cases["empty_answer_prompt"]
    turns = [Turn("one", "ok", ("p",)), Turn("What is this?", None, ("q",))]
    found = written(FORMATS["minigpt4-compat"], turns, "<ImageHere>")
    assert found == cases["two_pictures"]["prompt"]


def test_a_turn_without_an_answer_has_no_text_of_one() -> None:
    turns = [Turn("q", None, ("p",))]
    assert written(FORMATS["vicuna_v1"], turns, "<image>").endswith(" USER: <image>\nq ASSISTANT:")
    turns = [Turn("q", "a", ("p",)), Turn("r")]
    assert written(FORMATS["vicuna_v1"], turns, "<image>").endswith(
        " USER: <image>\nq ASSISTANT: a</s>USER: r ASSISTANT:"
    )
    turns = [Turn("q", "", ("p",)), Turn("r")]
    assert written(FORMATS["llava_llama_2"], turns, "<image>").endswith(
        "<image>\nq [/INST]<s>[INST] r [/INST]"
    )


def test_marks_stand_around_each_picture() -> None:
    marked = with_marks(FORMATS["llava_v0"], ("<im_start>", "<im_end>"))
    found = written(marked, [Turn("q", None, ("a", "b"))], "<image>")
    picture = "<im_start><image><im_end>\n"
    assert found.endswith(f"###Human: {picture}{picture}q###Assistant:")
    for name in ("minigpt4", "seechat"):
        assert with_marks(FORMATS[name], ("<im_start>", "<im_end>")) == FORMATS[name]


def test_plain_asks_nothing() -> None:
    assert written(FORMATS["plain"], [Turn("", None, ("p",))], "<image>") == "<image>\n"


def test_instructblip_sees_the_last_question_and_every_picture() -> None:
    turns = [Turn("q", "a", ("p",)), Turn("r", "b", ("p", "s")), Turn("t")]
    assert render(FORMATS["instructblip"], turns) == [
        ImageSlot("p", 0),
        ImageSlot("s", 0),
        "</s>t",
    ]


@pytest.mark.parametrize("name", ["minigpt4", "minigpt4_llama2"])
def test_the_sensible_format_sends_what_the_published_one_sends(name: str) -> None:
    turns = [Turn("q", "a", ("p",)), Turn("r", "b"), Turn("t", None, ("s",))]
    assert render(FORMATS[name], turns) == render(FORMATS[f"{name}-compat"], turns)
    assert FORMATS[f"{name}-compat"].exact and not FORMATS[name].exact
