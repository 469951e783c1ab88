"""Sampling against the probabilities that transformers' own classes gave, and its edges."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import load_json, tensors
from seechat_lite.sampling import Sampler, Sampling, candidates, scores
from seechat_weights.errors import EngineError, OptionError

REFERENCE = load_json("sampling/sampling.json")
TENSORS = tensors("sampling/sampling.safetensors")
EOS = REFERENCE["eos_token_id"]


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["key"])
def test_reference_case(case: dict[str, Any]) -> None:
    effective, key = case["effective"], case["key"]
    sampling = Sampling(
        temperature=effective["temperature"],
        top_p=effective["top_p"],
        top_k=effective["top_k"],
        repetition_penalty=effective["repetition_penalty"],
    )
    batch = TENSORS[f"logits.{case['logits']}"]
    for row, recorded in enumerate(batch):
        logits, options = recorded.copy(), sampling
        if effective["min_length"]:  # two processors that no entry here offers
            logits[EOS] = -np.inf
        if case["invalid_score_processor"] and not np.isfinite(logits).all():
            logits[:], logits[5] = 0, 5e4
            options = replace(sampling, repetition_penalty=1.0)  # which came before it
        past = TENSORS[f"input_ids.{len(batch)}"][row]
        expected = TENSORS[f"probs.{key}"][row]
        if np.isnan(expected).all():  # the published code samples from NaN
            with pytest.raises(EngineError, match="NaN or infinite logits"):
                scores(logits, past, options)
            continue
        scored = scores(logits, past, options)
        np.testing.assert_array_equal(scored, TENSORS[f"after_processors.{key}"][row])
        assert scored.argmax() == case["argmax_greedy_after_processors"][row]

        ids, kept = candidates(scored, sampling)
        probabilities = np.zeros_like(expected)
        probabilities[ids] = kept
        assert len(ids) == case["kept"][row]
        if case["logits"] == "ties":
            # Which of several equal tokens top-p keeps is up to torch's unstable sort and the
            # processor it ran on; here the lowest ids win. How many, and how likely, is the same.
            np.testing.assert_array_equal(np.sort(scored[ids]), np.sort(scored[expected > 0]))
            probabilities, expected = np.sort(probabilities), np.sort(expected)
        np.testing.assert_array_equal(probabilities > 0, expected > 0)
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)


def plain_top_p(probabilities: np.ndarray, top_p: float) -> set[int]:
    """The likeliest tokens, ties by the lowest id, until they reach top_p."""
    order, kept, total = np.argsort(-probabilities, kind="stable"), set(), 0.0
    for i in order:
        kept.add(int(i))
        total += float(probabilities[i])
        if total >= top_p:
            break
    return kept


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_top_p_keeps_the_fewest_that_reach_it(logits: list[float], top_p: float) -> None:
    ids, probabilities = candidates(
        np.array(logits, np.float32), Sampling(temperature=1, top_p=top_p)
    )
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    whole = np.exp(np.array(logits, np.float64) - max(logits))
    whole /= whole.sum()
    # single precision may decide otherwise exactly at the limit
    assert plain_top_p(whole, top_p - 1e-5) <= set(ids.tolist()) <= plain_top_p(whole, top_p + 1e-5)


@pytest.mark.slow
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    st.sampled_from([0.001, 0.5, 1.0, 10.0]),
    st.sampled_from([1e-12, 0.3, 1.0]),
    st.integers(0, 50),
    st.integers(0, 2**40),
)
def test_only_candidates_are_sampled(
    logits: list[float], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    array = np.array(logits, np.float32)
    ids, _ = candidates(array, sampling)
    assert array[ids].max() == pytest.approx(array.max(), abs=1e-6)
    sampler = Sampler(sampling, [], eos_ids=[0])
    assert {sampler.next(array) for _ in range(5)} <= set(ids.tolist())


def test_samples_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [], eos_ids=[0])
    drawn = np.bincount([sampler.next(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(drawn, [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_the_seed_decides() -> None:
    logits = TENSORS["logits.flat"][0]

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], eos_ids=[0])
        return [sampler.next(logits) for _ in range(20)]

    np.random.seed(1)
    assert draw(5) == draw(5) != draw(6)


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    logits = np.array([5.0, 4.9, 4.8, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0, 0, 3], eos_ids=[9])
    assert [sampler.next(logits) for _ in range(3)] == [1, 2, 0]
    scored = scores(logits, np.array([0, 0, 3]), Sampling(repetition_penalty=2.0))
    np.testing.assert_allclose(scored, [2.5, 4.9, 4.8, -2.0], rtol=1e-6)
    assert logits[0] == 5.0  # what the engine returned is left as it is


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature), [], eos_ids=[0])
    with pytest.raises(EngineError, match="expected finite numbers"):
        sampler.next(np.array([1.0, bad, 2.0], np.float32))
    with pytest.raises(EngineError):
        sampler.next(np.full(3, -np.inf, np.float32))
    assert sampler.next(np.array([1.0, -np.inf, -np.inf], np.float32)) == 0  # masked tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),  # what it divides would overflow
        ("repetition_penalty", math.inf),
        ("seed", -1),
    ],
)
def test_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value}; expected"):
        Sampling(**{name: value})
