"""What caches keep of earlier prompts, with caches that are lists of what was written to them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seechat_lite.engines.kept import Content, KeptCaches
from seechat_lite.prompt import Prompt

Cache = list[object]


def pool(budget: int = 1000, *, single: bool = False) -> KeptCaches[Cache]:
    def copy(source: Cache, target: Cache, tokens: int) -> None:
        target[:] = source[:tokens]

    return KeptCaches(list, copy, token_bytes=10, budget=budget, single=single)


def tokens(prompt: Prompt) -> Cache:
    """What a cache holds of a prompt: every token with the whole picture it is of."""
    found: Cache = list(prompt.ids)
    for start, embeds in prompt.images:
        found[start : start + len(embeds)] = [(row.tobytes(), i) for i, row in enumerate(embeds)]
    return found


def read(caches: KeptCaches[Cache], prompt: Prompt) -> int:
    """Read a prompt as an engine does; returns how many tokens it did not have to read."""
    cache, start = caches.begin(prompt)
    assert 0 <= start < len(prompt.ids)
    assert cache[:start] == tokens(prompt)[:start]
    cache[start:] = tokens(prompt)[start:]
    caches.read()
    return start


def answer(caches: KeptCaches[Cache], ids: list[int]) -> None:
    caches.caches[-1].cache += ids
    caches.append(ids)


def picture(number: int, size: int = 3) -> np.ndarray:
    return np.full((size, 2), number, np.float32)


def test_the_next_question_is_read_alone() -> None:
    caches = pool()
    first = Prompt([1, 2, 0, 0, 0, 5], [(2, picture(7))])
    assert read(caches, first) == 0
    answer(caches, [8, 9])
    assert read(caches, Prompt([1, 2, 0, 0, 0, 5, 8, 9, 4, 4], first.images)) == 8
    assert read(caches, Prompt([1, 2, 0, 0, 0, 5, 8, 3], first.images)) == 7
    # asked again: only the last token is read
    assert read(caches, Prompt([1, 2, 0, 0, 0, 5, 8, 3], first.images)) == 7
    assert len(caches.caches) == 1


def test_pictures_are_compared_by_what_they_show() -> None:
    caches = pool()
    read(caches, Prompt([1, 0, 0, 0, 5], [(1, picture(7))]))
    assert read(caches, Prompt([1, 0, 0, 0, 5], [(1, picture(8))])) == 1
    caches = pool()
    read(caches, Prompt([1, 0, 0, 0, 5], [(1, picture(7))]))
    assert read(caches, Prompt([1, 0, 0, 0, 5])) == 1  # the same ids, but words
    caches = pool()
    read(caches, Prompt([1, 0, 0, 0, 5], [(1, picture(7))]))
    assert read(caches, Prompt([1, 0, 0, 0], [(1, picture(7))])) == 1  # never a part of a picture


def test_guesses_that_are_taken_back_are_not_held() -> None:
    caches = pool()
    read(caches, Prompt([1, 2, 3]))
    answer(caches, [4, 5, 6])
    caches.rewind(2)
    assert read(caches, Prompt([1, 2, 3, 4, 5, 6])) == 4


def test_conversations_keep_their_own_cache_within_the_budget() -> None:
    caches = pool(budget=300)  # 30 tokens
    talks = [[1, 2, *[10 + i] * 8] for i in range(3)]
    for talk in talks:
        read(caches, Prompt(talk))
    assert len(caches.caches) == 3
    for talk in talks:
        assert read(caches, Prompt(talk)) == 9
    read(caches, Prompt([*talks[2], 5, 5, 5]))  # grows: the one used longest ago leaves
    assert len(caches.caches) == 2
    assert read(caches, Prompt(talks[1])) == 9
    answer(caches, [3] * 40)  # more than all may have: the others leave
    assert len(caches.caches) == 1


def test_one_cache_only() -> None:
    caches = pool(single=True)
    read(caches, Prompt([1, 2, 3, 4, 5, 6]))
    assert read(caches, Prompt([1, 2, 9])) == 2
    assert len(caches.caches) == 1


prompts = st.builds(
    lambda ids, at, number: (
        Prompt([*ids[:at], 0, 0, *ids[at:]], [(min(at, len(ids)), picture(number, 2))])
        if number
        else Prompt(ids)
    ),
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
    st.integers(0, 8),
    st.integers(0, 2),
)


@given(
    st.lists(st.tuples(prompts, st.lists(st.integers(0, 2), max_size=3)), max_size=8), st.booleans()
)
def test_what_is_not_read_is_there(talks: list[tuple[Prompt, list[int]]], single: bool) -> None:
    caches = pool(budget=200, single=single)
    for prompt, said in talks:
        read(caches, prompt)  # asserts it
        answer(caches, said)
        held = sum(kept.most for kept in caches.caches) * 10
        assert held <= 200 or len(caches.caches) == 1


@given(prompts, prompts)
def test_what_is_shared_is_the_same(one: Prompt, other: Prompt) -> None:
    shared = Content.of(one).shared(Content.of(other))
    assert tokens(one)[:shared] == tokens(other)[:shared]
