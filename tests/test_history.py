"""Which turns and pictures fit: exactly those that an exhaustive search finds, with little work."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seechat_lite import prompt as prompts
from seechat_lite.conversation import FORMATS, Turn, render
from seechat_lite.engines.base import Cancelled
from seechat_lite.history import MAX_CHARACTERS_PER_TOKEN, _without_oldest, fit
from seechat_lite.prompt import Prompt
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.errors import ContextError

TEXT = st.text("一个问题?ab \n#<>[]1", max_size=60)


def picture(number: int, tokens: int = 16) -> np.ndarray:
    return np.full((tokens, 8), number, np.float32)


def exhaustive(
    turns: list[Turn], embeds: dict[str, np.ndarray], format: str, tokenizer: Tokenizer, limit: int
) -> tuple[Prompt, list[Turn]]:
    """The least number of turns left out, found by building every prompt."""

    def build(left: list[Turn]) -> Prompt:
        form = FORMATS[format]
        return prompts.build(tokenizer, render(form, left), embeds, specials=form.specials)

    for dropped in range(len(turns)):
        left = _without_oldest(turns, dropped, embeds, CONTEXT // 2)
        prompt = build(left)
        if len(prompt.ids) <= limit:
            break
    while len(prompt.ids) > limit and len(left[0].images) > len(turns[-1].images):
        left = [replace(left[0], images=left[0].images[1:])]
        prompt = build(left)
    return prompt, left


CONTEXT = 160


@pytest.mark.slow
@given(
    format=st.sampled_from(["seechat", "chatglm", "visualglm"]),
    said=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 2)), max_size=40),
    question=TEXT,
    reserve=st.integers(1, 80),
)
def test_as_many_turns_as_fit(
    tokenizer: Tokenizer, format: str, said: list[tuple[str, str, int]], question: str, reserve: int
) -> None:
    embeds: dict[str, np.ndarray] = {}
    turns = []
    for asked, answer, shown in said:
        keys = [f"picture {len(embeds) + i}" for i in range(shown * (format != "chatglm"))]
        embeds |= {key: picture(i) for i, key in enumerate(keys)}
        turns.append(Turn(asked, answer, tuple(keys)))
    turns.append(Turn(question))
    limit = CONTEXT - min(reserve, CONTEXT // 4)
    expected, left = exhaustive(turns, embeds, format, tokenizer, limit)
    if len(expected.ids) >= CONTEXT:
        with pytest.raises(ContextError):
            fit_all(turns, embeds, format, tokenizer, reserve)
        return
    prompt, kept = fit_all(turns, embeds, format, tokenizer, reserve)
    assert kept == left
    assert prompt.ids == expected.ids
    assert [start for start, _ in prompt.images] == [start for start, _ in expected.images]


def fit_all(
    turns: list[Turn],
    embeds: dict[str, np.ndarray],
    format: str,
    tokenizer: Tokenizer,
    reserve: int,
    context: int = CONTEXT,
    **options: Any,
) -> tuple[Prompt, list[Turn]]:
    return fit(
        turns,
        embeds,
        format=FORMATS[format],
        tokenizer=tokenizer,
        context=context,
        reserve=reserve,
        **options,
    )


def test_the_demos_history_is_searched_as_before(tokenizer: Tokenizer) -> None:
    """Its prompt begins anew after 2000 characters, so that more turns may take fewer tokens."""
    embeds = {"picture": picture(1)}
    for count in range(1, 60, 7):
        turns = [Turn(f"第{i}个问题", "回答" * i) for i in range(count)]
        turns = [replace(turns[0], images=("picture",)), *turns[1:], Turn("最后?")]

        def fits(dropped: int, turns: list[Turn] = turns) -> bool:
            left = _without_oldest(turns, dropped, embeds, CONTEXT // 2)
            segments = render(FORMATS["seechat-compat"], left)
            return len(prompts.build(tokenizer, segments, embeds, specials=True).ids) <= 150

        past = range(count)
        dropped = 0 if fits(0) else bisect_left(past, True, lo=1, key=fits)
        _, kept = fit_all(turns, embeds, "seechat-compat", tokenizer, 10)
        assert len(kept) == len(turns) - dropped


LONG = "很长的历史 with words\n" * 20_000
HISTORIES: list[list[Turn]] = [
    [Turn(LONG, LONG) for _ in range(20)],
    [Turn("问", "答") for _ in range(20_000)],
    [Turn(LONG, "好"), *(Turn("问", "答") for _ in range(5))],
    [*(Turn("问", "答") for _ in range(5)), Turn(" " * 1_000_000, "好")],
]


@pytest.mark.slow
@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("past", HISTORIES, ids=["long", "many", "old", "blanks"])
def test_what_cannot_fit_is_not_tokenized(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, past: list[Turn], format: str
) -> None:
    """Whatever the history, no more is read than a few contexts hold at most."""
    read: list[int] = []
    encode = tokenizer.encode
    context = CONTEXT + len(encode(FORMATS[format].first or ""))
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, **o: read.append(len(text)) or encode(text, **o)
    )
    embeds = {"picture": picture(1)}
    first = replace(past[0], images=("picture",)) if format == "seechat-compat" else past[0]
    turns = [first, *past[1:], Turn("最后?")]
    prompt, kept = fit_all(turns, embeds, format, tokenizer, 10, context)
    assert kept[-1].question == "最后?" and len(prompt.ids) <= context - 10
    assert sum(read) < 4 * context * MAX_CHARACTERS_PER_TOKEN


def test_a_question_that_cannot_fit_is_not_tokenized(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(
        ContextError, match=r"question has more than 12800 characters.*context of 160 tokens"
    ):
        fit_all([Turn("x" * 12_801)], {}, "seechat", tokenizer, 10)


def test_the_longest_token_is_no_longer(tokenizer: Tokenizer) -> None:
    """A text of as many characters as the bound allows does fit: runs of blanks are one token."""
    blanks = ("a" + " " * (MAX_CHARACTERS_PER_TOKEN - 1)) * 60
    prompt, _ = fit_all([Turn(blanks)], {}, "seechat", tokenizer, 10)
    assert len(prompt.ids) < CONTEXT


@pytest.mark.parametrize("after", range(4))
def test_it_can_be_stopped_between_texts(tokenizer: Tokenizer, after: int) -> None:
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > after

    turns = [Turn("一个很长的问题" * 5, "答" * 30) for _ in range(50)]
    with pytest.raises(Cancelled):
        fit_all([*turns, Turn("?")], {}, "seechat", tokenizer, 10, stopped=stopped)
    assert len(asked) == after + 1


def test_stop_ends_the_reading_of_a_history(
    tokenizer: Tokenizer, text_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat that is stopped while its history is read answers nothing and keeps its turns."""
    import seechat_lite as sl

    with sl.load(text_bundle, context=256) as model:
        chat = model.chat("seechat")
        for _ in range(50):
            chat.append("一个很长的问题" * 5, "答" * 30)
        encode: Callable[..., list[int]] = model.tokenizer.encode

        def stopping(text: str, **options: Any) -> list[int]:
            chat.stop()
            return encode(text, **options)

        monkeypatch.setattr(model.tokenizer, "encode", stopping)
        assert chat.ask("?") == ""
        assert chat.stats and chat.stats.finish_reason == "cancelled"
        assert len(chat.turns) == 50


def test_what_a_system_said_stays_when_its_turn_is_forgotten(tokenizer: Tokenizer) -> None:
    turns = [Turn("问题" * 9, "回答" * 9, system="一"), *[Turn("问题" * 9, "回答" * 9)] * 9]
    turns += [Turn("问", "答", system="二"), Turn("最后")]
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": CONTEXT, "reserve": 20}
    prompt, left = fit(turns, {}, format=FORMATS["llama_3"], **options)
    assert len(left) < len(turns) and left[0].system.startswith("一")
    assert "\n".join(turn.system for turn in left if turn.system) == "一\n二"
    assert len(prompt.ids) <= CONTEXT - 20
    with pytest.raises(ContextError, match="what a system said have more than"):
        fit([Turn("q", system="x" * 20_000)], {}, format=FORMATS["llama_3"], **options)


def test_a_published_code_may_cut_off_the_beginning(tokenizer: Tokenizer) -> None:
    form = replace(FORMATS["minigpt4-compat"], cut=80)
    turns = [Turn("一" * 30, "二" * 30, ("x",)), Turn("三" * 9)]
    embeds = {"x": np.arange(128, dtype=np.float32).reshape(16, 8)}
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": 400, "reserve": 20}
    whole = prompts.build(tokenizer, render(form, turns), embeds, specials=form.specials)
    ((at, _),) = whole.images
    for tokens in (*range(len(whole.ids) - at - 18, len(whole.ids) - at + 3), len(whole.ids) + 9):
        cut = replace(form, cut=tokens + 20)
        prompt, left = fit(turns, embeds, format=cut, **options)
        assert left == turns and prompt.ids == whole.ids[-tokens:]
        for start, part in prompt.images:
            gone = len(whole.ids) - len(prompt.ids)
            np.testing.assert_array_equal(part, embeds["x"][max(gone - at, 0) :])
            assert start == max(at - gone, 0)
        assert bool(prompt.images) == (len(whole.ids) - len(prompt.ids) < at + 16)
    prompt, left = fit(turns, embeds, format=replace(form, cut=10**6), **options | {"context": 50})
    assert len(prompt.ids) <= 50 - 12
    prompt, left = fit([Turn("x" * 3000, "y" * 90_000), turns[1]], {}, format=form, **options)
    assert len(left) == 1
