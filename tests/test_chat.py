"""Conversations: history, streaming, pictures, stopping, and a context that never overflows."""

import io
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import seechat_lite as sl
from reference import load_json
from seechat_lite.conversation import FORMATS, CleanStream, postprocess
from seechat_lite.tokenizer import Tokenizer

WORDS = dict(max_new_tokens=12)
MARKS = [
    *["###", "#", "Human:", "<Img>", "</Img>", "Assistant:", ",", "?", "!", ":", ";"],
    *["好", "吗", "a", "训练时间", "[[训练时间]]", "[[训", "]]"],
    *[" ", "  ", "\n", "\u3000"],
]


@pytest.fixture(scope="module")
def text_model(text_bundle: Path) -> Iterator[sl.Model]:
    with sl.load(text_bundle) as model:
        yield model


@pytest.fixture(scope="module")
def model(vision_bundle: Path) -> Iterator[sl.Model]:
    with sl.load(vision_bundle) as model:
        yield model


@pytest.fixture
def small(vision_bundle: Path) -> Iterator[sl.Model]:
    """A context of 64 tokens, four pictures' worth."""
    with sl.load(vision_bundle, context=64) as model:
        yield model


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(noise)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def count_calls(monkeypatch: pytest.MonkeyPatch, model: sl.Model, method: str) -> list[tuple]:
    """Record the arguments of every call of an engine's method."""
    calls: list[tuple] = []
    original = getattr(model.engine, method)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(model.engine, method, counted)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_what_the_system_cannot_read_is_no_bundle(engine: str) -> None:
    for name in ("a" * 300, "/proc/self/mem"):  # systems and Pythons say it differently
        with pytest.raises((sl.BundleError, sl.CheckpointError), match=f"{name}.*; expected a "):
            sl.load(name, engine=engine)


# --- what is sent and what comes back


@pytest.mark.parametrize("case", load_json("prompts/chatglm_chat.json")["cases"])
def test_prompts_are_the_published_ones(text_model: sl.Model, case: dict[str, Any]) -> None:
    chat = text_model.chat("chatglm")
    for question, answer in case["history"]:
        chat.append(question, answer)
    assert chat.prompt(case["query"]).ids == case["input_ids"]


@pytest.mark.parametrize("name", ["p0", "p1", "p2"])
def test_answers_are_the_reference_models(text_model: sl.Model, name: str) -> None:
    case = load_json("chatglm_tiny/cases.json")["cases"][name]
    chat = text_model.chat("chatglm")
    ids = case["greedy"]
    expected = postprocess(FORMATS["chatglm"], text_model.tokenizer.decode(ids))
    assert chat.ask(case["text"], max_new_tokens=len(ids)) == expected
    assert chat.stats is not None
    assert (chat.stats.new_tokens, chat.stats.finish_reason) == (len(ids), "length")
    assert chat.stats.prompt_tokens == case["len"]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_stream_ask_and_history_agree(model: sl.Model, format: str) -> None:
    image = None if format == "chatglm" else picture(0)
    first, second = model.chat(format), model.chat(format)
    pieces = list(first.stream("你好 hello", image, **WORDS))
    answer = second.ask("你好 hello", image, **WORDS)
    assert "".join(pieces) == answer == first.turns[0].answer == second.turns[0].answer
    assert all(pieces)
    assert first.ask("然后呢?", **WORDS) == second.ask("然后呢?", **WORDS)
    assert [t.question for t in first.turns] == ["你好 hello", "然后呢?"]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_prompt_is_what_stream_sends_and_changes_nothing(
    model: sl.Model, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = count_calls(monkeypatch, model, "prefill")
    chat = model.chat(format)
    for question, image in (("一", None if format == "chatglm" else png(1)), ("二", None)):
        before = list(chat.turns)
        expected = chat.prompt(question, image)
        assert chat.prompt(question, image).ids == expected.ids
        assert chat.turns == before and len(sent) == len(before)
        chat.ask(question, image, max_new_tokens=3)
        prompt = sent[-1][0]
        assert prompt.ids == expected.ids
        assert [start for start, _ in prompt.images] == [start for start, _ in expected.images]
        for (_, found), (_, wanted) in zip(prompt.images, expected.images, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_append_is_as_if_it_had_been_said(model: sl.Model) -> None:
    asked, told = model.chat(), model.chat()
    answer = asked.ask("这是什么?", png(2), **WORDS)
    told.append("这是什么?", answer, png(2))
    assert told.turns == asked.turns
    assert told.prompt("为什么?").ids == asked.prompt("为什么?").ids
    told.clear()
    assert told.prompt("为什么?").ids == model.chat().prompt("为什么?").ids


def test_seeds_are_reproducible(text_model: sl.Model) -> None:
    def answer(seed: int, **options: Any) -> str:
        return text_model.chat().ask("你好", max_new_tokens=20, seed=seed, **options)

    hot = dict(temperature=1.5, top_p=0.95, top_k=50, repetition_penalty=1.1)
    assert answer(7, **hot) == answer(7, **hot)
    assert len({answer(seed, **hot) for seed in range(4)}) > 1
    assert answer(1) == answer(2)  # greedy


def test_finish_reasons(text_model: sl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = text_model.chat()
    chat.ask("你好", max_new_tokens=3)
    assert chat.stats is not None and chat.stats.finish_reason == "length"
    assert chat.stats.new_tokens == 3 and chat.stats.seconds >= chat.stats.first_token_seconds > 0
    say(monkeypatch, text_model, "好的")
    assert chat.ask("你好") == "好的"
    assert chat.stats.finish_reason == "stop" and chat.stats.dropped_turns == 0


def say(monkeypatch: pytest.MonkeyPatch, model: sl.Model, text: str) -> None:
    """Let the engine answer `text`, whatever it is asked."""
    ids: list[int] = []

    def logits() -> np.ndarray:
        out = np.zeros(model.manifest.lm.vocab_size, np.float32)
        out[ids.pop(0) if ids else model.tokenizer.eos_id] = 1
        return out

    def prefill(prompt: sl.Prompt) -> np.ndarray:
        ids[:] = model.tokenizer.encode(text)
        return logits()

    monkeypatch.setattr(model.engine, "prefill", prefill)
    monkeypatch.setattr(model.engine, "step", lambda token: logits())


def test_an_answer_ends_at_the_marker(
    text_model: sl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, text_model, "红色 and # blue ###Human: 再见")
    chat = text_model.chat("seechat")
    pieces = list(chat.stream("什么颜色?"))
    assert "".join(pieces) == chat.turns[0].answer == "红色 and # blue"
    assert chat.stats is not None and chat.stats.finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("format", sorted(FORMATS))
@given(
    text=st.lists(
        st.sampled_from(MARKS),
        max_size=25,
    ).map("".join),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
@settings(max_examples=200)
@example(text=" 好,[[训练时间]],吗", cuts=[1, 2, 4])
def test_cleaned_pieces_join_to_the_cleaned_whole(format: str, text: str, cuts: list[int]) -> None:
    # as TextStream hands it on: cut at the stop marker already
    for marker in FORMATS[format].stop:
        text = text.split(marker)[0]
    stream, shown, start = CleanStream(FORMATS[format]), "", 0
    for cut in [*sorted(cuts), len(text)]:
        shown += stream.push(text[start:cut])
        start = max(start, cut)
        assert stream.shown == shown
    shown += stream.finish()
    assert shown == stream.shown == postprocess(FORMATS[format], text)


# --- pictures


def test_a_picture_is_encoded_once(
    model: sl.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = count_calls(monkeypatch, model, "encode_image")
    path = tmp_path / "图 片.png"
    path.write_bytes(png(10))
    chat = model.chat()
    chat.ask("一", path, max_new_tokens=2)
    chat.ask("二", str(path), max_new_tokens=2)
    chat.ask("三", png(10), max_new_tokens=2)
    chat.ask("四", max_new_tokens=2)
    model.chat().ask("五", [png(10), path], max_new_tokens=2)
    assert len(calls) == 1
    path.unlink()  # remembered, not read again
    assert len(chat.prompt("六").images) == 3
    assert len(calls) == 1


def test_sources_of_a_picture_are_equal(model: sl.Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(11))
    prompts = [model.chat().prompt("?", s) for s in (path, str(path), png(11), picture(11))]
    for prompt in prompts:
        assert prompt.ids == prompts[0].ids
        np.testing.assert_array_equal(prompt.images[0][1], prompts[0].images[0][1])


def test_several_pictures_are_remembered(model: sl.Model) -> None:
    chat = model.chat()
    chat.ask("两张", [picture(20), picture(21)], max_new_tokens=2)
    chat.ask("又一张", picture(22), max_new_tokens=2)
    chat.ask("没有", max_new_tokens=2)
    found = [embeds for _, embeds in chat.prompt("最后").images]
    expected = [model.encode_image(picture(seed))[1] for seed in (20, 21, 22)]
    np.testing.assert_array_equal(found, expected)
    assert len({embeds.tobytes() for embeds in found}) == 3


def test_a_text_only_model_refuses_pictures(text_model: sl.Model) -> None:
    chat = text_model.chat("seechat")
    with pytest.raises(sl.EngineError, match="text-only"):
        chat.ask("这是什么?", picture(0))
    assert chat.turns == [] and chat.ask("你好", max_new_tokens=2)


def test_a_format_without_pictures_refuses_them(model: sl.Model) -> None:
    with pytest.raises(sl.ContextError, match="no place for pictures"):
        model.chat("chatglm").ask("这是什么?", picture(0))


def test_compat_wants_one_picture_first(model: sl.Model) -> None:
    chat = model.chat("seechat-compat")
    with pytest.raises(sl.ContextError, match="exactly one picture"):
        chat.ask("你好")
    chat.ask("这是什么?", picture(3), max_new_tokens=4)
    with pytest.raises(sl.ContextError, match="exactly one picture"):
        chat.ask("那这个呢?", picture(4))
    assert len(chat.turns) == 1


# --- ends before the end


def test_stop_from_another_thread(text_model: sl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = count_calls(monkeypatch, text_model, "step")
    chat = text_model.chat()
    pieces, done = [], -1
    for piece in chat.stream("你好", max_new_tokens=400):
        pieces.append(piece)
        if len(pieces) == 3:
            thread = threading.Thread(target=chat.stop)
            thread.start()
            thread.join()
            done = len(steps)
    assert len(steps) <= done + 1
    assert chat.turns[0].answer == "".join(pieces)
    assert chat.stats is not None and chat.stats.finish_reason == "cancelled"
    assert chat.ask("继续", max_new_tokens=2)  # and the chat goes on
    assert chat.stats.finish_reason == "length"


def test_stop_before_the_first_piece(text_model: sl.Model) -> None:
    chat = text_model.chat()
    stream = chat.stream("你好", max_new_tokens=400)
    chat.stop()
    assert list(stream) == [] and chat.turns == []


def test_stop_between_pictures(model: sl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture at hand is the last one read; the chat is as if nothing had been asked."""
    chat, encode = model.chat(), model.engine.encode_image
    chat.append("一", "二")
    before, seen = list(chat.turns), []

    def stopped_meanwhile(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        thread = threading.Thread(target=chat.stop)
        thread.start()
        thread.join()
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "encode_image", stopped_meanwhile)
        assert list(chat.stream("三", [png(seed) for seed in (40, 41, 42)])) == []
    assert len(seen) == 1 and chat.turns == before
    assert chat.stats is not None and chat.stats.finish_reason == "cancelled"
    chat.append("三", "四", png(41))  # a stop concerns the answer that ran, nothing after it
    assert chat.ask("五", png(42), max_new_tokens=2) and len(chat.turns) == 3


@pytest.mark.parametrize("reads", ["append", "prompt"])
def test_stop_ends_what_reads_pictures(
    model: sl.Model, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    chat, encode = model.chat(), model.engine.encode_image
    chat.append("一", "二", png(45))
    before, seen = list(chat.turns), []
    read = {
        "append": lambda: chat.append("三", "四", [png(seed) for seed in (46, 47, 48)]),
        "prompt": lambda: chat.prompt("三", [png(seed) for seed in (49, 50, 51)]),
    }[reads]

    def stopped_meanwhile(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        chat.stop()
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "encode_image", stopped_meanwhile)
        with pytest.raises(sl.EngineError, match="stopped"):
            read()
    assert len(seen) == 1 and chat.turns == before
    assert read() or len(chat.turns) == 2  # a stop concerns what ran, nothing after it


def test_stop_concerns_every_stream_that_was_begun(text_model: sl.Model) -> None:
    chat = text_model.chat()
    first = chat.stream("你好", max_new_tokens=400)
    next(first)
    chat.stop()
    second = chat.stream("继续", max_new_tokens=2)
    assert len(list(first)) <= 1
    assert list(second) and chat.stats is not None and chat.stats.finish_reason == "length"


def test_clear_amid_an_answer(model: sl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer goes on with what was said before, and nothing counts as forgotten for room."""
    chat, encode = model.chat(), model.engine.encode_image
    chat.append("一", "二", png(52))
    expected = len(chat.prompt("三", png(53)).ids)
    model._images.clear()

    def cleared_meanwhile(pixels: np.ndarray) -> np.ndarray:
        chat.clear()
        return encode(pixels)

    monkeypatch.setattr(model.engine, "encode_image", cleared_meanwhile)
    assert chat.ask("三", png(53), max_new_tokens=2)
    assert chat.stats is not None
    assert (chat.stats.prompt_tokens, chat.stats.dropped_turns) == (expected, 0)
    assert chat.turns == []


@pytest.mark.parametrize("format", ["seechat", "chatglm"])
def test_a_stream_closed_early(text_model: sl.Model, format: str) -> None:
    chat = text_model.chat(format)
    stream = chat.stream("你好", max_new_tokens=400)
    heard = next(stream) + next(stream)
    stream.close()
    assert chat.turns[0].answer == heard  # what was heard is what is remembered
    assert chat.ask("继续", max_new_tokens=2)


def test_an_unread_stream_blocks_nobody(text_model: sl.Model) -> None:
    chat = text_model.chat()
    chat.stream("你好")
    assert chat.ask("你好", max_new_tokens=2) and len(chat.turns) == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("lost the GPU")])
def test_an_error_keeps_the_history(
    text_model: sl.Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    chat = text_model.chat()
    chat.append("一", "二")
    before = list(chat.turns)

    def fail(token: int) -> np.ndarray:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(text_model.engine, "step", fail)
        stream = chat.stream("三")
        with pytest.raises(type(error)):
            list(stream)
    assert chat.turns == before
    assert chat.ask("三", max_new_tokens=2) and len(chat.turns) == 2


def test_an_interrupt_keeps_what_was_said(
    text_model: sl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, heard = text_model.chat("seechat"), []
    steps, original = iter(range(100)), text_model.engine.step

    def interrupted(token: int) -> np.ndarray:
        if next(steps) == 6:
            raise KeyboardInterrupt
        return original(token)

    monkeypatch.setattr(text_model.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for piece in chat.stream("你好"):
            heard.append(piece)
    assert heard and chat.turns[0].answer == "".join(heard)


def test_two_answers_in_one_thread(text_model: sl.Model) -> None:
    first, second = text_model.chat(), text_model.chat()
    stream = first.stream("你好")
    next(stream)
    with pytest.raises(sl.EngineError, match="not finished in this thread"):
        second.ask("你好")
    assert second.turns == []
    stream.close()
    assert second.ask("你好", max_new_tokens=2)


def test_threads_take_turns(text_model: sl.Model) -> None:
    questions = ["你好", "hello", "图里有什么?", "一二三"]
    expected = [text_model.chat().ask(q, max_new_tokens=30) for q in questions]
    found = [""] * len(questions)

    def ask(i: int) -> None:
        found[i] = text_model.chat().ask(questions[i], max_new_tokens=30)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_closed_model_says_so(text_bundle: Path) -> None:
    with sl.load(text_bundle) as model:
        chat = model.chat()
    with pytest.raises(sl.EngineError, match="closed"):
        chat.ask("你好")
    model.close()  # twice is harmless


# --- the context


def test_the_oldest_turns_are_forgotten(
    text_bundle: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with sl.load(text_bundle, context=100) as model:
        chat = model.chat("seechat")
        for i in range(30):
            chat.append(f"问题{i}", f"回答{i}")
        with caplog.at_level(logging.WARNING):
            chat.ask("最后?", max_new_tokens=5)
        assert [r.message for r in caplog.records] == [
            f"the context is full: the oldest {31 - len(chat.turns)} turn(s) are forgotten"
        ]
        assert chat.turns[-1].question == "最后?" and 1 < len(chat.turns) < 30
        assert chat.turns[0].question == f"问题{31 - len(chat.turns)}"
        assert chat.stats is not None and chat.stats.dropped_turns == 31 - len(chat.turns)
        # no more than needed: one turn more would not have fitted
        longer = model.chat("seechat")
        longer.append(f"问题{30 - len(chat.turns)}", f"回答{30 - len(chat.turns)}")
        for turn in chat.turns[:-1]:
            longer.append(turn.question, turn.answer or "")
        assert len(longer.prompt("最后?", max_new_tokens=5).ids) <= 95
        assert len(longer.turns) + 1 > len(chat.turns)
        again = model.chat("seechat")
        for turn in chat.turns[:-1]:
            again.append(turn.question, turn.answer or "")
        assert chat.stats.prompt_tokens == len(again.prompt("最后?", max_new_tokens=5).ids)


def test_a_long_history_is_trimmed_with_little_work(
    text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what may fit is read, and that a few times, whatever the length of the whole."""
    with sl.load(text_bundle, context=256) as model:
        chat = model.chat()
        for i in range(3000):
            chat.append(f"第{i}个问题", "一个不太长的回答" * 3)
        read, encode = [], model.tokenizer.encode

        def counted(text: str, **options: Any) -> list[int]:
            read.append(len(text))
            return encode(text, **options)

        monkeypatch.setattr(model.tokenizer, "encode", counted)
        assert 150 < len(chat.prompt("最后?").ids) <= 192
        assert sum(read) < 4 * max(read) < 1500  # the whole has 90 000 characters


def test_pictures_outlive_their_turns(small: sl.Model) -> None:
    chat = small.chat()
    chat.append("看", "好的", picture(1))
    for i in range(12):
        chat.append(f"问题{i}", "回答")
    chat.ask("还记得吗?", max_new_tokens=3)
    assert len(chat.turns) < 12 and len(chat.turns[0].images) == 1
    chat.ask("现在呢?", max_new_tokens=3)
    (_, embeds), *others = chat.prompt("?").images
    np.testing.assert_array_equal(embeds, small.encode_image(picture(1))[1])
    assert not others


def test_pictures_without_end(small: sl.Model) -> None:
    """They are not read once it is certain that they do not fit."""
    with pytest.raises(sl.ContextError, match=r"the first \d+ pictures"):
        small.chat().ask("hi", (picture(n) for n in itertools.count()))
    with pytest.raises(sl.ContextError, match=r"the first \d+ pictures"):
        small.chat().append("hi", "yes", itertools.repeat(picture(1)))


def test_the_latest_pictures_are_kept(small: sl.Model) -> None:
    chat = small.chat()
    for seed in range(6):
        chat.append("看", "好", picture(seed))
    shown = [embeds for _, embeds in chat.prompt("哪个?", max_new_tokens=2).images]
    expected = [small.encode_image(picture(seed))[1] for seed in range(6)][-len(shown) :]
    assert shown and len(shown) < 4
    np.testing.assert_array_equal(shown, expected)
    with pytest.raises(sl.ContextError, match="64 of them for pictures"):
        chat.ask("哪个?", [picture(seed) for seed in range(4)])


def test_a_question_too_long(small: sl.Model) -> None:
    chat = small.chat()
    chat.append("一", "二")
    with pytest.raises(sl.ContextError, match=r"takes \d+ tokens, 16 .* holds 64, answer included"):
        chat.ask("很长的问题" * 40, picture(1))
    assert len(chat.turns) == 1 and chat.ask("短", max_new_tokens=2)


@pytest.mark.parametrize("question", ["", " \n\t", "\u3000"])
def test_an_empty_question(text_model: sl.Model, question: str) -> None:
    with pytest.raises(sl.ContextError, match="empty"):
        text_model.chat().ask(question)


def test_an_answer_fills_the_context_to_its_last_place(text_bundle: Path) -> None:
    with sl.load(text_bundle, context=40) as model:
        chat = model.chat("chatglm")
        chat.ask("你好", max_new_tokens=1000)
        assert chat.stats is not None and chat.stats.finish_reason == "length"
        assert chat.stats.prompt_tokens + chat.stats.new_tokens == 41  # the last is not fed back


@pytest.mark.parametrize("format", sorted(FORMATS))
@given(
    context=st.integers(32, 160),
    turns=st.lists(
        st.tuples(
            st.text("一个问题?ab \n#", min_size=1, max_size=60).filter(str.strip),
            st.text("回答,ab #\n", max_size=60),
            st.integers(0, 2),
        ),
        max_size=8,
    ),
    new=st.integers(1, 60),
)
@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_history_overflows(
    model: sl.Model,
    format: str,
    context: int,
    turns: list[tuple[str, str, int]],
    new: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "context", context)  # less than there really is
        chat = model.chat(format)
        for i, (question, answer, pictures) in enumerate(turns):
            if format == "seechat-compat":
                pictures = int(i == 0)
            images = [] if format == "chatglm" else [picture(i * 2 + j) for j in range(pictures)]
            chat.append(question, answer, images)
        image = picture(99) if format == "seechat-compat" and not turns else None
        try:
            answer = chat.ask("最后的问题?", image, max_new_tokens=new)
        except sl.ContextError as e:
            assert "the question takes" in str(e)
            assert len(chat.turns) == len(turns)
            chosen = FORMATS[format]  # its own words take tokens, many with this tokenizer
            own = f"{chosen.first or chosen.turn}{chosen.system}{chosen.told}"
            said = len(model.tokenizer.encode(own))
            assert format == "seechat-compat" or context < 48 + said
            return
        stats = chat.stats
        assert stats is not None
        assert stats.prompt_tokens <= context
        assert stats.prompt_tokens + stats.new_tokens <= context + 1
        assert chat.turns[-1].answer == answer
        asked = [t[0] for t in turns] + ["最后的问题?"]
        assert [t.question for t in chat.turns] == asked[stats.dropped_turns :]


# --- options


def test_unknown_format(text_model: sl.Model) -> None:
    with pytest.raises(sl.OptionError, match="format is 'x'; expected one of"):
        text_model.chat("x")


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_p=0.0),
        dict(top_k=-1),
        dict(repetition_penalty=0.0),
        dict(seed=-1),
    ],
)
def test_options_out_of_range(text_model: sl.Model, options: dict[str, Any]) -> None:
    chat = text_model.chat()
    with pytest.raises(sl.OptionError, match=f"{next(iter(options))} is"):
        chat.stream("你好", **options)  # at once, not when it is read
    assert chat.turns == []


def test_load_refuses_options(text_bundle: Path) -> None:
    refused: list[tuple[Callable[[], sl.Model], type[Exception], str]] = [
        (lambda: sl.load(text_bundle, context=15), sl.ContextError, "at least 16"),
        (lambda: sl.load(text_bundle, engine="x"), sl.OptionError, "engine is 'x'"),
        (lambda: sl.load(text_bundle, device="x"), sl.EngineError, "it offers, auto, cpu"),
    ]
    for load, error, message in refused:
        with pytest.raises(error, match=message):
            load()
