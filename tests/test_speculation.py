"""Guessed tokens: the answer stays the same, and fewer calls of the engine make it."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seechat_lite as sl
from seechat_lite.engines.base import Cancelled
from seechat_lite.generate import generate
from seechat_lite.prompt import Prompt
from seechat_lite.prompt_lookup import ENOUGH, LONGEST, ROW_COSTS, PromptLookup, RowCost
from seechat_lite.sampling import Sampling

VOCABULARY = 40
EOS = VOCABULARY - 1


class Scripted:
    """An engine that says a fixed text after its prompt; counts its calls."""

    context = 10_000

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer = answer
        self.calls = 0

    def prefill(self, prompt: Prompt) -> np.ndarray:
        self.fed: list[int] = []
        return self._logits(0)

    def step(self, token_id: int) -> np.ndarray:
        return self.extend([token_id])[0]

    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        self.calls += 1
        assert self.fed == list(self.answer[: len(self.fed)])  # wrong guesses were taken back
        self.fed += token_ids
        end = len(self.fed)
        return np.stack([self._logits(i + 1) for i in range(end - len(token_ids), end)])

    def rewind(self, tokens: int) -> None:
        del self.fed[len(self.fed) - tokens :]

    def _logits(self, place: int) -> np.ndarray:
        logits = np.random.default_rng(place).standard_normal(VOCABULARY).astype(np.float32)
        logits[self.answer[place] if place < len(self.answer) else EOS] += 100
        return logits


def said(engine: Scripted, prompt: list[int], lookup: PromptLookup | None, **settings: float):
    limit = int(settings.pop("max_new_tokens", 100))
    return list(
        generate(
            engine,
            Prompt([*prompt, 38]),
            Sampling(**settings),
            max_new_tokens=limit,
            eos_id=EOS,
            stopped=lambda: False,
            lookup=lookup,
        )
    )


TOKENS = st.lists(st.integers(0, 4), max_size=40)


@given(prompt=TOKENS, answer=TOKENS, limit=st.integers(1, 50))
def test_greedy_answers_are_the_same(prompt: list[int], answer: list[int], limit: int) -> None:
    plain, guessing = Scripted(answer), Scripted(answer)
    lookup = PromptLookup(prompt)
    expected = said(plain, prompt, None, max_new_tokens=limit)
    assert said(guessing, prompt, lookup, max_new_tokens=limit) == expected == answer[:limit]
    assert guessing.calls <= plain.calls
    assert lookup.right <= lookup.guessed
    # every right guess that was not the last word saved a call
    assert plain.calls - guessing.calls >= lookup.right - LONGEST


def test_sampled_answers_are_the_same() -> None:
    """The sampler draws once a token, from the same logits, whether that was guessed or not."""
    prompt, answer = [1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4, 5, 6, 7, 8] * 4
    for seed in range(20):
        plain, guessing = Fixed(answer), Fixed(answer)
        settings = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.1, "seed": seed}
        expected = said(plain, prompt, None, **settings)
        assert said(guessing, prompt, PromptLookup(prompt), **settings) == expected
        assert guessing.calls <= plain.calls


class Fixed(Scripted):
    """Logits that depend on the place alone: a sampled answer may leave the script."""

    def extend(self, token_ids: Sequence[int]) -> np.ndarray:
        self.calls += 1
        self.fed += token_ids
        end = len(self.fed)
        return np.stack([self._logits(i + 1) for i in range(end - len(token_ids), end)])

    def _logits(self, place: int) -> np.ndarray:
        logits = np.random.default_rng(place).standard_normal(VOCABULARY).astype(np.float32)
        logits[self.answer[place] if place < len(self.answer) else EOS] += 6
        return logits


def test_repetition_is_faster_and_novelty_no_slower() -> None:
    prompt = list(range(30))
    copied = Scripted(prompt)
    cost = RowCost()
    cost.known = True  # else it is measured on this engine, where tokens cost what steps do
    lookup = PromptLookup(prompt, cost)
    assert said(copied, prompt, lookup) == prompt
    assert copied.calls < 10
    assert lookup.right > 10  # what the last call guessed is not counted
    generator = np.random.default_rng(0)
    new = Scripted(generator.permutation(38).tolist())
    lookup = PromptLookup(generator.permutation(38).tolist())
    said(new, prompt, lookup)
    assert lookup.guessed <= 4


def test_it_pauses_where_it_is_wrong() -> None:
    """When nothing guessed is ever right, guesses become rare; one right guess brings them back."""
    lookup, asked = PromptLookup([1, 2, 3] * 4), 0
    for _ in range(300):
        if guess := lookup.guess(100):
            asked += 1
            lookup.learn(len(guess), 0)
        for token in (1, 2, 3):
            lookup.append(token)
    assert asked < 25
    for _ in range(5):
        lookup.learn(LONGEST, LONGEST)
    assert lookup.guess(100) == ([1, 2, 3] * LONGEST)[:LONGEST]
    assert lookup.guess(3) == [1, 2, 3]
    for _ in range(10):
        lookup.learn(8, 1)
    assert len(lookup.guess(100)) < 4


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 16)), max_size=60))
def test_dear_tokens_make_shorter_guesses(history: list[tuple[int, int]]) -> None:
    """Whatever happened before; and never one that is longer than there is room for."""
    lengths = []
    for value in ROW_COSTS:
        cost = RowCost()
        cost.value = value
        lookup = PromptLookup([1, 2, 3] * 4, cost)
        for guessed, right in history:
            lookup.learn(guessed, min(guessed, right))
            lookup.learn(1, 1)  # no pause
        lengths.append(len(lookup.guess(100)))
        assert 1 <= lengths[-1] <= LONGEST
        assert len(lookup.guess(2)) <= 2
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("row", ROW_COSTS)
def test_the_first_calls_tell_what_a_token_costs(row: float) -> None:
    """Neither a busy moment nor what comes later changes it: the same machine finds the same."""
    cost = RowCost()
    cost.note(5, 100.0)  # beside nothing that it could be compared with
    for i in range(ENOUGH):
        cost.note(1, 5.0 if i == 0 else 1.0)
    assert not cost.known and cost.value == ROW_COSTS[0]
    for tokens, busy in ((5, 3.0), (2, 9.0), (5, 1.0), (4, 1.1)):
        assert not cost.known
        cost.note(tokens, busy * (1 + row * (tokens - 1)))
    assert cost.known and cost.value == row
    for _ in range(50):
        cost.note(1, 1.0)
        cost.note(9, 100.0)
    assert cost.value == row


def test_cancelling_ends_the_answer() -> None:
    class Ends(Scripted):
        def step(self, token_id: int) -> np.ndarray:
            if self.calls == 3:
                raise Cancelled
            return super().step(token_id)

    assert said(Ends([7, 8, 9, 10, 11, 12]), [1], None) == [7, 8, 9, 10]


@pytest.mark.parametrize("question", ["这是什么?", "What is it?", "再说一遍", "左边是什么?"])
def test_the_built_in_model_says_the_same(question: str) -> None:
    with sl.load() as model:
        answers, guessed = [], 0
        for speculate in (False, True):
            chat = model.chat()
            chat.append("请重复：苹果、香蕉、火箭、自行车。", "苹果、香蕉、火箭、自行车。")
            answers.append([chat.ask(question, speculate=speculate) for _ in range(3)])
            assert chat.stats
            guessed += chat.stats.guessed_tokens
            assert speculate or not guessed
    assert answers[0] == answers[1]
