"""Answers that are written together: each has the tokens that it has when it runs alone."""

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seechat_lite as sl
from seechat_lite.engines import ENGINES, Engine
from seechat_lite.engines.base import Cancelled
from seechat_lite.generate import Seat, decode, generate
from seechat_lite.lm_families import framed, ordinary_ids
from seechat_lite.loading import load
from seechat_lite.memory import MemoryPlan
from seechat_lite.prompt import Prompt
from seechat_lite.prompt_lookup import PromptLookup
from seechat_lite.sampling import Sampling
from seechat_lite.together import Together
from seechat_weights.errors import ContextError, EngineError

PROMPTS = 6
LONGEST = 24  # tokens of an answer
NO_EOS = -1


@pytest.fixture(scope="module", params=ENGINES)
def model(request: pytest.FixtureRequest) -> Iterator[sl.Model]:
    with load(engine=request.param, context=128, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def prompts(model: sl.Model) -> list[Prompt]:
    lm, drawn = model.manifest.lm, np.random.default_rng(0)
    words = ordinary_ids(lm)
    lengths = (1, 3, 8, 20, 33, 50)
    ids = [drawn.integers(words.start, words.stop, n).tolist() for n in lengths]
    return [Prompt(framed(i, lm)) for i in ids]


@pytest.fixture(scope="module")
def alone(model: sl.Model, prompts: list[Prompt]) -> list[list[int]]:
    """The answer to each prompt, when it runs by itself."""
    return [answer(model.engine, prompt) for prompt in prompts]


def answer(engine: Engine, prompt: Prompt, sampling: Sampling | None = None) -> list[int]:
    tokens = generate(
        engine,
        prompt,
        sampling or Sampling(),
        max_new_tokens=LONGEST,
        eos_id=NO_EOS,
        stopped=lambda: False,
    )
    found = list(tokens)
    engine.reset()
    return found


# --- the engines' slots


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_order_of_joining_and_leaving(
    model: sl.Model, prompts: list[Prompt], alone: list[list[int]], data: st.DataObject
) -> None:
    engine, count = model.engine, data.draw(st.sampled_from([1, 3, 8, 17]))
    assert engine.open_slots(count, tokens=80) == count
    inside: dict[int, tuple[int, list[int]]] = {}  # slot -> prompt, answer so far
    try:
        for _ in range(data.draw(st.integers(1, 30))):
            event = data.draw(st.sampled_from(["join", "join", "step", "step", "step", "leave"]))
            if event == "join" and len(inside) < count:
                which = data.draw(st.integers(0, PROMPTS - 1))
                first = int(engine.prefill(prompts[which]).argmax())
                slot = engine.adopt()
                assert slot not in inside
                inside[slot] = which, [first]
            elif event == "leave" and inside:
                slot = data.draw(st.sampled_from(sorted(inside)))
                engine.free_slot(slot)
                del inside[slot]
            elif event == "step" and inside:
                logits = engine.step_slots({slot: said[-1] for slot, (_, said) in inside.items()})
                assert logits.keys() == inside.keys()
                for slot, (_, said) in inside.items():
                    said.append(int(logits[slot].argmax()))
            for which, said in inside.values():
                assert said[:LONGEST] == alone[which][: len(said)]
    finally:
        engine.close_slots()
    assert answer(engine, prompts[0]) == alone[0]


def test_what_slots_refuse(model: sl.Model, prompts: list[Prompt]) -> None:
    engine = model.engine
    with pytest.raises(EngineError, match="no slots; expected some"):
        engine.step_slots({0: 5})
    assert engine.open_slots(1, tokens=len(prompts[3].ids) + 2) == 1
    assert engine.open_slots(1, tokens=8) == 0  # it has them already
    try:
        with pytest.raises(EngineError, match="expected an answer that has begun"):
            engine.adopt()
        engine.prefill(prompts[4])
        with pytest.raises(ContextError):
            engine.adopt()
        engine.prefill(prompts[3])
        slot = engine.adopt()
        engine.prefill(prompts[0])
        with pytest.raises(EngineError, match="free a slot first"):
            engine.adopt()
        for tokens in ({}, {slot: 5, slot + 1: 5}, {slot + 1: 5}):
            with pytest.raises(EngineError, match="give each"):
                engine.step_slots(tokens)
        engine.step_slots({slot: 5})
        engine.step_slots({slot: 6})
        with pytest.raises(ContextError, match="full"):
            engine.step_slots({slot: 7})
        engine.free_slot(slot)
        with pytest.raises(EngineError, match="is free"):
            engine.free_slot(slot)
    finally:
        engine.reset()
        engine.close_slots()
    engine.close_slots()


def test_slots_stay_within_the_budget() -> None:
    seen: list[MemoryPlan] = []
    with load(context=512, announce=seen.append):
        each = seen[0].cache
    with load(context=512, max_memory=seen[0].total + 2 * each) as model:
        assert model.engine.open_slots(8, tokens=512) == 2
    with load(context=512, max_memory=seen[0].total) as model:
        assert model.engine.open_slots(8, tokens=512) == 0
        model.engine.close_slots()


def test_slots_of_a_closed_engine() -> None:
    model = load(context=64)
    model.engine.open_slots(2, tokens=64)
    model.engine.prefill(Prompt(framed([5, 6, 7], model.manifest.lm)))
    slot = model.engine.adopt()
    model.close()
    model.engine.free_slot(slot)
    model.engine.close_slots()
    with pytest.raises(EngineError, match="closed"):
        model.engine.step_slots({slot: 5})


# --- tasks


@dataclass
class Plan:
    """What one answer does.

    joins: the round in which it joins.
    which: its prompt.
    most: tokens that it may have.
    stops: it is stopped once it has so many; None for never.
    fails: its task raises once it has so many; None for never.
    seed: with it, tokens are drawn.
    """

    joins: int
    which: int
    most: int
    stops: int | None
    fails: int | None
    seed: int | None

    @property
    def sampling(self) -> Sampling:
        if self.seed is None:
            return Sampling()
        return Sampling(temperature=0.9, top_k=50, repetition_penalty=1.1, seed=self.seed)


def work(seat: Seat, plan: Plan, prompt: Prompt, said: list[int]) -> Generator[None, None, int]:
    """Write an answer into `said`; returns how many tokens it has."""
    tokens = decode(
        seat,
        prompt,
        plan.sampling,
        max_new_tokens=plan.most,
        eos_id=NO_EOS,
        stopped=lambda: plan.stops is not None and len(said) >= plan.stops,
        lookup=PromptLookup(prompt.ids),
    )
    try:
        for token in tokens:
            if token is None:
                yield
                continue
            said.append(token)
            if len(said) == plan.fails:
                raise EngineError("its own failure")
    finally:
        seat.reset()
    return len(said)


COUNT = st.none() | st.integers(1, LONGEST)
PLANS = st.builds(
    Plan,
    joins=st.integers(0, 12),
    which=st.integers(0, PROMPTS - 1),
    most=st.integers(1, LONGEST),
    stops=COUNT,
    fails=COUNT,
    seed=st.none() | st.integers(0, 3),
)


@given(
    plans=st.lists(PLANS, min_size=1, max_size=17),
    slots=st.sampled_from([1, 2, 3, 8, 17]),
    alone=st.booleans(),
    share=st.sampled_from([0, 0.5]),
)
@settings(max_examples=25, deadline=None)
def test_any_schedule(
    model: sl.Model,
    prompts: list[Prompt],
    plans: list[Plan],
    slots: int,
    alone: bool,
    share: float,
) -> None:
    engine = model.engine
    assert engine.open_slots(slots, tokens=100) == slots
    together: Together[int] = Together(engine, slots, alone=alone, share=share)
    said: list[list[int]] = [[] for _ in plans]
    tasks, waiting, rounds = {}, dict(enumerate(plans)), 0
    try:
        while waiting or len(together):
            for i in [i for i, plan in waiting.items() if plan.joins <= rounds]:
                plan = waiting.pop(i)
                task = together.join(
                    lambda seat, i=i, plan=plan: work(seat, plan, prompts[plan.which], said[i])
                )
                tasks[task] = i
            for task in together.advance():
                plan, answer = plans[tasks.pop(task)], task.result
                fails = plan.fails is not None and plan.fails <= min(plan.most, plan.stops or 99)
                assert isinstance(task.error, EngineError) == fails
                assert (answer is None) == fails
            rounds += 1
    finally:
        together.close()
        engine.close_slots()
    assert not tasks
    for plan, tokens in zip(plans, said, strict=True):
        expected = expected_answer(model, prompts, plan)
        ends = min(n for n in (plan.most, plan.stops, plan.fails) if n is not None)
        assert tokens == expected[:ends]


_KNOWN: dict[tuple[int, int, int | None], list[int]] = {}


def expected_answer(model: sl.Model, prompts: list[Prompt], plan: Plan) -> list[int]:
    key = id(model), plan.which, plan.seed
    if key not in _KNOWN:
        _KNOWN[key] = answer(model.engine, prompts[plan.which], plan.sampling)
    return _KNOWN[key]


def test_a_failing_step_is_told_to_all(
    model: sl.Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = model.engine
    engine.open_slots(3, tokens=100)
    together: Together[int] = Together(engine, 3)
    said: list[list[int]] = [[], []]
    plan = Plan(0, 0, LONGEST, None, None, None)

    def fail(tokens: object) -> None:
        raise EngineError("broken")

    try:
        for one in said:
            together.join(lambda seat, one=one: work(seat, plan, prompts[2], one))
        while len(said[1]) < 3:
            assert not together.advance()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step_slots", fail)
            ended = together.advance() + together.advance()
        assert [str(task.error) for task in ended] == ["broken", "broken"]
        again: list[int] = []  # the slots are free again
        together.join(lambda seat: work(seat, plan, prompts[2], again))
        while len(together):
            together.advance()
        assert again == answer(engine, prompts[2])
    finally:
        together.close()
        engine.close_slots()


def test_cancelling_a_prompt_concerns_only_its_answer(
    model: sl.Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the engine notices only in the call after the prompt's."""
    engine = model.engine
    engine.open_slots(2, tokens=100)
    together: Together[int] = Together(engine, 2)
    first: list[int] = []
    second: list[int] = []
    seats: list[Seat] = []
    prefill, plan = engine.prefill, Plan(0, 0, LONGEST, None, None, None)

    def cancelled(prompt: Prompt) -> np.ndarray:
        logits = prefill(prompt)
        thread = threading.Thread(target=seats[1].cancel)
        thread.start()
        thread.join()
        return logits

    def second_work(seat: Seat) -> Generator[None, None, int]:
        seats.append(seat)
        return work(seat, Plan(0, 0, LONGEST, 0, None, None), prompts[1], second)

    def first_work(seat: Seat) -> Generator[None, None, int]:
        seats.append(seat)
        return work(seat, plan, prompts[0], first)

    try:
        together.join(first_work)
        while len(first) < 2:
            together.advance()
        monkeypatch.setattr(engine, "prefill", cancelled)
        together.join(second_work)
        while len(together):
            for task in together.advance():
                assert task.error is None
        monkeypatch.undo()
        assert first == answer(engine, prompts[0])
    finally:
        together.close()
        engine.close_slots()


def test_cancelled_while_it_is_read(
    model: sl.Model, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = model.engine
    engine.open_slots(2, tokens=100)
    together: Together[int] = Together(engine, 2)
    said: list[list[int]] = [[], []]
    prefill, plan, seats = engine.prefill, Plan(0, 0, LONGEST, None, None, None), list[Seat]()

    def cancelling(prompt: Prompt) -> np.ndarray:
        if len(seats) > 1:
            seats[0].cancel()  # not the one that is being read: nothing happens
            seats[1].cancel()
            assert engine.held_tokens == 0
        return prefill(prompt)

    def start(seat: Seat, one: list[int]) -> Generator[None, None, int]:
        seats.append(seat)
        return work(seat, plan, prompts[0], one)

    monkeypatch.setattr(engine, "prefill", cancelling)
    try:
        together.join(lambda seat: start(seat, said[0]))
        while not said[0]:
            together.advance()
        together.join(lambda seat: start(seat, said[1]))
        results = []
        while len(together):
            results += [task.result for task in together.advance()]
        assert results == [0, LONGEST]
        assert said[1] == []
    finally:
        together.close()
        engine.close_slots()


# --- chats and captions


def test_chats_with_seats(model: sl.Model) -> None:
    questions = ["你好", "你是谁?", "谢谢", "你会做什么?"]
    alone = [model.chat().ask(q) for q in questions]
    model.engine.open_slots(3, tokens=128)
    together: Together[sl.Answer] = Together(model.engine, 3, alone=True)

    def ask(seat: Seat, question: str) -> Generator[None, None, sl.Answer]:
        chat = model.chat()
        chat.seat = seat
        return chat.stream(question).whole()

    try:
        tasks = [together.join(lambda seat, q=q: ask(seat, q)) for q in questions]
        while len(together):
            together.advance()
    finally:
        together.close()
        model.engine.close_slots()
    assert [task.result for task in tasks] == alone
    for task, found in zip(tasks, alone, strict=True):
        assert task.result and task.result.stats.new_tokens == found.stats.new_tokens
        assert task.result.stats.finish_reason == "stop"


def test_stopped_chats_leave_within_a_step(model: sl.Model) -> None:
    model.engine.open_slots(2, tokens=128)
    together: Together[sl.Answer] = Together(model.engine, 2)
    chats = [model.chat(), model.chat()]

    def ask(seat: Seat, chat: sl.Chat) -> Generator[None, None, sl.Answer]:
        chat.seat = seat
        return chat.stream("你会做什么?").whole()

    try:
        first, second = [together.join(lambda seat, c=c: ask(seat, c)) for c in chats]
        for _ in range(4):
            assert not together.advance()
        chats[0].stop()
        assert together.advance() == [first]
        assert first.result is not None and first.result.stats.finish_reason == "cancelled"
        while len(together):
            together.advance()
        assert second.result == model.chat().ask("你会做什么?")
    finally:
        together.close()
        model.engine.close_slots()


def test_a_model_closed_while_answers_are_written() -> None:
    with load(context=128) as model:
        model.engine.open_slots(2, tokens=128)
        together: Together[sl.Answer] = Together(model.engine, 2)

        def ask(seat: Seat) -> Generator[None, None, sl.Answer]:
            chat = model.chat()
            chat.seat = seat
            return chat.stream("你会做什么?").whole()

        tasks = [together.join(ask), together.join(ask)]
        for _ in range(4):
            together.advance()
        model.close()
        while len(together):
            together.advance()
        assert all(isinstance(task.error, EngineError) for task in tasks)
        assert not any(isinstance(task.error, Cancelled) for task in tasks)
