"""Conversations as chat programs send them, and how they become turns."""

import base64
import io
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import seechat_lite as sl
from seechat_lite import messages
from seechat_lite.cli.main import main
from seechat_lite.conversation import FORMATS, Format, description_question, letters
from seechat_lite.messages import ROLES, MessagesError, read_messages

PANDA = Path(__file__).parent.parent / "docs/images/panda.png"
FORMAT, PLAIN = FORMATS["seechat"], FORMATS["seechat-plain"]
DESCRIBE = FORMAT.describe[0]


def said(*messages: tuple[str, Any], format: str = "seechat") -> list[tuple[str, str | None]]:
    """Questions and answers of messages, each a role and its content."""
    found = read_messages([{"role": r, "content": c} for r, c in messages], format=FORMATS[format])
    past = [(e.question(), e.answer()) for e in found.past]
    return [*past, (found.question.question(), None)]


GREETING = [("assistant", "Hi, I am Ada."), ("user", "a")]
S, U, A, T = "system", "user", "assistant", "tool"


@given(st.lists(st.text("a é中1", max_size=5), max_size=5), st.text("a中 ", max_size=3))
def test_letters_stand_for_what_was_said(texts: list[str], more: str) -> None:
    expected = description_question(FORMAT, [*texts, more])
    assert description_question(FORMAT, [*letters(texts), more]) == expected


def test_many_pictures_without_words_are_described_in_little_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each looks at its own message, not again at all that came before."""
    looked: list[int] = []

    def describe(format: Format, said: Iterable[str]) -> str:
        texts = list(said)
        looked.append(sum(map(len, texts)))
        return description_question(format, texts)

    monkeypatch.setattr(messages, "description_question", describe)
    shown = [{"role": U, "content": [{"image": "x"}]}, {"role": A, "content": "a" * 1000}] * 300
    found = read_messages([*shown, {"role": U, "content": "b"}], format=FORMAT)
    assert {e.question() for e in found.past[1:]} == {FORMAT.describe[1]}
    assert len(looked) == 300 and max(looked) < 1100


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (GREETING, [("", "Hi, I am Ada."), ("a", None)]),
        ([(S, "x"), *GREETING], [("x", "Hi, I am Ada."), ("a", None)]),
        ([(U, "a"), (S, "x"), (A, "b"), (U, "c")], [("a\nx", "b"), ("c", None)]),
        ([(U, "a"), (A, "b"), (S, "x"), (U, "c")], [("a", "b"), ("x\nc", None)]),
        ([(U, "a"), (A, "b"), (S, "x")], [("a", "b"), ("x", None)]),
        ([(U, "a"), (S, "x")], [("a\nx", None)]),
        ([(S, "x")], [("x", None)]),
        ([(U, "a"), (A, "b")], [("a", None)]),
        ([(U, "a"), (A, "")], [("a", None)]),
        ([(U, "a"), (A, None), (U, "b")], [("a", ""), ("b", None)]),
        ([(U, ""), (A, "b"), (U, "c")], [("", "b"), ("c", None)]),
        ([(U, "a"), (U, "b"), (A, "c"), (A, "d"), (U, "e")], [("a\nb", "c\nd"), ("e", None)]),
        ([(U, "a"), (T, "21 °C")], [("a\n21 °C", None)]),
        ([(U, "a"), ("function", "21 °C"), (U, "b")], [("a\n21 °C\nb", None)]),
        ([(S, ""), (S, None), (U, "a")], [("a", None)]),
        ([(U, "a"), (A, "b"), (U, "")], [("a", None)]),
        ([(U, ["a", {"text": "b"}])], [("a\nb", None)]),
        ([(U, {"type": "text", "text": "a"})], [("a", None)]),
    ],
)
def test_histories(messages: Any, expected: Any) -> None:
    found = said(*messages)
    assert [(q.replace("\n\n", "\n"), a) for q, a in found] == expected


def test_a_call_of_a_tool_is_no_answer() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    asked = {"role": "user", "content": "weather?"}
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    found = read_messages([asked, call, result], format=FORMAT)
    assert (found.past, found.question.question()) == ([], "weather?\nsunny")


def test_a_format_may_leave_instructions_out() -> None:
    assert said((S, "x"), *GREETING, format="seechat-plain") == [("a", None)]
    assert said((S, "x"), format="seechat-plain") == [("x", None)]
    found = read_messages([{"role": S, "content": "x"}, {"role": U, "content": "a"}], format=PLAIN)
    assert "system" in found.ignored[0]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([], DESCRIBE),
        ([("user", "Hello"), ("assistant", "Hi")], FORMAT.describe[1]),
        ([("user", "Hello"), ("assistant", "你好")], DESCRIBE),
    ],
)
@pytest.mark.parametrize("words", [[], [{"type": "text", "text": " "}]])
def test_a_picture_alone_is_described(before: Any, expected: str, words: Any) -> None:
    found = said(*before, ("user", [{"type": "image_url", "image_url": "data:,x"}, *words]))
    assert found[-1][0].strip() == expected
    found = said(("system", "Be brief."), ("user", [{"type": "image", "image": b""}]))
    assert found[-1][0] == "Be brief.\n" + FORMAT.describe[1]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "P"}},
        {"type": "image_url", "image_url": "P"},
        {"type": "input_image", "image_url": "P", "detail": "auto"},
        {"type": "image", "image": "P"},
        {"type": "image", "url": "P"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "P"}},
        {"image_url": {"url": "P"}},
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_pictures_as_parts(part: Any, role: str) -> None:
    content = [part, {"type": "text", "text": "a"}]
    found = read_messages([{"role": role, "content": content}], format=FORMAT)
    assert found.question.images == ["P"]


@pytest.mark.parametrize(
    ("messages", "where", "why"),
    [
        ([], "messages", "empty"),
        ("hello", "messages", "a list"),
        ([1], "messages.0", "an object"),
        ([{"role": "human", "content": "a"}], "messages.0.role", "expected one of system"),
        ([{"content": "a"}], "messages.0.role", "missing; expected one of"),
        ([{"role": "user", "content": 1}], "messages.0.content", "expected a text or a list"),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            "messages.0.content.0.type",
            "expected text, or image_url",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0", "without a"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages.0.content.0", "without its"),
        ([{"role": "user", "content": " "}], "messages", "the question is empty"),
        ([{"role": "assistant", "content": "a"}], "messages", "the question is empty"),
    ],
)
def test_what_cannot_be_read(messages: Any, where: str, why: str) -> None:
    with pytest.raises(MessagesError, match=why) as e:
        read_messages(messages, format=FORMAT)
    assert e.value.where == where and str(e.value).startswith(where)


_TEXTS = st.sampled_from(["", " ", "a", "你好", "long text"])
_PART = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, _TEXTS),
    st.just({"type": "image_url", "image_url": {"url": "data:,"}}),
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(ROLES),
            "content": st.one_of(st.none(), _TEXTS, st.lists(_PART, max_size=3)),
        }
    ),
    max_size=8,
)


def empty(content: Any) -> bool:
    """Whether a message says and shows nothing."""
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    return not any("image_url" in p or p.get("text", "").strip() for p in parts)


@pytest.mark.parametrize("format", sorted(FORMATS))
@given(messages=_MESSAGES)
def test_any_history_is_answered_or_has_no_question(messages: Any, format: str) -> None:
    """Every text and picture of it has one place, in its order; the last turn is a question."""
    chosen = FORMATS[format]
    texts, answer_at_end, pictures = Counter[str](), Counter[str](), 0
    for i, message in enumerate(messages):
        parts = message["content"] or []
        parts = [{"text": parts}] if isinstance(parts, str) else parts
        pictures += sum("image_url" in p for p in parts)
        written = chosen.instructions or message["role"] not in ("system", "developer")
        last = all(m["role"] == "assistant" or empty(m["content"]) for m in messages[i:])
        if written:
            own = Counter(t for p in parts if (t := p.get("text", "").strip()))
            texts += own
            answer_at_end += own if last else Counter()
    try:
        found = read_messages(messages, format=chosen)
    except MessagesError as e:
        assert e.where == "messages" and not pictures
        return
    exchanges = [*found.past, found.question]
    assert all(e.answers is not None for e in found.past) and found.question.answers is None
    question = [t.strip() for t in found.question.texts]
    # one format asks nothing about a picture
    assert any(question) or (found.question.images and chosen.describe == ("", ""))
    kept = [
        t.strip() for e in exchanges for t in (*e.told, *e.texts, *(e.answers or ())) if t.strip()
    ]
    kept = [t for t in kept if t not in chosen.describe]
    if chosen.instructions:
        assert Counter(kept) <= texts and texts - Counter(kept) <= answer_at_end
    assert sum(len(e.images) for e in exchanges) == pictures


# --- model.chat(messages=…)


@pytest.fixture(scope="module")
def model() -> Any:
    with sl.load() as model:
        yield model


def question(image: Any, text: str = "这是什么？") -> dict[str, Any]:
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def test_a_chat_goes_on_with_messages(model: sl.Model) -> None:
    expected = model.chat()
    first, second = expected.ask("这是什么？", PANDA), expected.ask("它能吃吗？")
    messages = [
        question({"type": "image", "image": PANDA}),
        {"role": "assistant", "content": first},
    ]
    chat = model.chat(messages=messages)
    assert chat.ask("它能吃吗？") == second
    chat = model.chat(messages=[*messages, {"role": "user", "content": "它能吃吗？"}])
    assert chat.ask() == second
    assert [t.question for t in chat.turns] == ["这是什么？", "它能吃吗？"]
    with pytest.raises(sl.ContextError, match="empty"):  # it is answered
        chat.ask()
    with pytest.raises(sl.OptionError, match=r"messages\.0\.role"):
        model.chat(messages=[{"role": "nobody", "content": "x"}])


def test_a_question_is_added_to_what_was_asked(model: sl.Model) -> None:
    chat = model.chat(messages=[{"role": "user", "content": "你好"}])
    chat.ask("你是谁？")
    assert [t.question for t in chat.turns] == ["你好\n你是谁？"]


TEXT = base64.b64encode(PANDA.read_bytes()).decode()


@pytest.mark.parametrize(
    "given",
    [
        str(PANDA),
        PANDA,
        PANDA.read_bytes(),
        io.BytesIO(PANDA.read_bytes()),
        Image.open(PANDA),
        np.asarray(Image.open(PANDA).convert("RGB")),
        "data:image/png;base64," + TEXT,
        TEXT,
    ],
    ids=lambda g: type(g).__name__,
)
def test_pictures_as_values(model: sl.Model, given: Any) -> None:
    chat = model.chat(messages=[question({"type": "image", "image": given})])
    assert chat.ask() == "这是熊猫。"


def test_a_picture_without_words(model: sl.Model) -> None:
    for words in (None, "", " \n"):
        chat = model.chat()
        assert "熊猫" in chat.ask(words, PANDA)
        assert chat.turns[0].question == DESCRIBE
    chat = model.chat()
    chat.append("What is it?", "This is a panda.", PANDA)
    assert chat.ask("", PANDA) == "This is a panda."
    for nothing in (None, [], ()):
        with pytest.raises(sl.ContextError, match="the question is empty"):
            model.chat().stream("", nothing)


def test_the_command_describes_a_picture_without_words(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["ask", str(PANDA), ""]) == 0
    assert capfd.readouterr().out == "这是熊猫。\n"
    with pytest.raises(SystemExit):
        main(["ask", " "])


# --- what an answer took


def test_statistics_are_on_the_answer(model: sl.Model) -> None:
    chat = model.chat()
    answer = chat.ask("这是什么？", PANDA)
    assert answer == "这是熊猫。" and isinstance(answer, str)
    assert answer.stats is chat.stats and answer.stats.new_tokens == 3
    assert "3 written" in repr(answer.stats) and "'stop'" in repr(answer.stats)
    assert pickle.loads(pickle.dumps(answer)).stats == answer.stats


def test_statistics_of_a_stream(model: sl.Model) -> None:
    stream = model.chat().stream("这是什么？", PANDA)
    assert stream.stats is None and next(stream) and stream.stats is None
    assert "".join(stream) and stream.stats and stream.stats.finish_reason == "stop"
    chat = model.chat()
    stream = chat.stream("这是什么？", PANDA)
    next(stream)
    stream.close()
    assert stream.stats and stream.stats.finish_reason == "cancelled"
    begun = chat.stream("你好")
    begun.close()
    assert begun.stats is None
