"""The decode loop on the reference model: recorded answers, and every way an answer ends."""

from typing import Any

import numpy as np
import pytest

from networks import TorchEngine
from reference import load_json, tensors
from seechat_export.reference_chatglm import ChatGLM
from seechat_lite.generate import generate
from seechat_lite.prompt import Prompt
from seechat_lite.sampling import Sampling
from seechat_weights.errors import EngineError, OptionError

CASES = load_json("chatglm_tiny/cases.json")["cases"]
NAMES = [name for name, case in CASES.items() if "eos_case" in case and name != "batch"]
NO_EOS = -1


def recorded_prompt(name: str) -> Prompt:
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    ids = case["input_ids"][0].tolist()
    if "image_embeds" in case:
        return Prompt(ids, [(ids.index(0), case["image_embeds"][0])])
    return Prompt(ids)


def answer(engine: TorchEngine, name: str, *, eos_id: int = NO_EOS, **settings: Any) -> list[int]:
    maximum = settings.pop("max_new_tokens", 24)
    return list(
        generate(
            engine,
            recorded_prompt(name),
            Sampling(**settings),
            max_new_tokens=maximum,
            eos_id=eos_id,
            stopped=lambda: False,
        )
    )


@pytest.fixture
def engine(chatglm_tiny: ChatGLM) -> TorchEngine:
    return TorchEngine(chatglm_tiny)


@pytest.mark.parametrize("name", NAMES)
def test_greedy(engine: TorchEngine, name: str) -> None:
    case = CASES[name]
    assert answer(engine, name) == case["greedy"]
    assert engine.steps == 23  # nothing is run for a token that would not be shown
    assert answer(engine, name, repetition_penalty=1.1) == case["greedy_reppen_1.1"]


@pytest.mark.parametrize("name", NAMES)
def test_the_end_token_is_never_shown(engine: TorchEngine, name: str) -> None:
    recorded = CASES[name]["eos_case"]
    eos_id = recorded["eos_token_id"]
    shown = answer(engine, name, eos_id=eos_id)
    assert [*shown, eos_id] == recorded["generate_output"]
    assert shown == (recorded["stream_generate_yields"] or [[]])[-1]


def test_pictures(engine: TorchEngine) -> None:
    case = CASES["seechat_embeds"]
    assert answer(engine, "seechat_embeds") == case["greedy"]
    assert answer(engine, "seechat_embeds", repetition_penalty=1.3) == case["greedy_reppen_1.3"]


def test_the_number_of_tokens(engine: TorchEngine) -> None:
    """All of max_new_tokens are shown; the published stream_generate withholds the last."""
    for maximum in (1, 2, 5):
        shown = answer(engine, "p0", max_new_tokens=maximum)
        assert shown == CASES["p0"]["greedy"][:maximum]
    published = CASES["p0"]["stream_generate_max_new_tokens_5_yields"]
    assert published[-1] == answer(engine, "p0", max_new_tokens=5)[:4]
    with pytest.raises(OptionError, match="max_new_tokens is 0; expected at least 1"):
        answer(engine, "p0", max_new_tokens=0)


def test_stopping_takes_effect_within_one_token(engine: TorchEngine) -> None:
    for stop_after in range(4):
        seen: list[int] = []
        engine.steps = 0
        for token in generate(
            engine,
            recorded_prompt("p1"),
            Sampling(),
            max_new_tokens=24,
            eos_id=NO_EOS,
            stopped=lambda seen=seen, n=stop_after: len(seen) >= n,
        ):
            seen.append(token)
        assert seen == CASES["p1"]["greedy"][:stop_after]
        assert engine.steps == max(0, stop_after - 1)


def test_stopped_while_the_engine_works(engine: TorchEngine) -> None:
    """A stop that arrives during the prefill or a step is seen before another token is shown."""
    calls = iter([False, True])
    tokens = generate(
        engine,
        recorded_prompt("p1"),
        Sampling(),
        max_new_tokens=24,
        eos_id=NO_EOS,
        stopped=lambda: next(calls),
    )
    assert list(tokens) == []


def test_an_answer_left_early_leaves_nothing_behind(engine: TorchEngine) -> None:
    tokens = generate(
        engine,
        recorded_prompt("p1"),
        Sampling(),
        max_new_tokens=24,
        eos_id=NO_EOS,
        stopped=lambda: False,
    )
    assert next(tokens) == CASES["p1"]["greedy"][0]
    del tokens
    assert answer(engine, "p0") == CASES["p0"]["greedy"]
    assert answer(engine, "p0") == CASES["p0"]["greedy"]


def test_sampled_answers_repeat_with_their_seed(engine: TorchEngine) -> None:
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    first = answer(engine, "p1", seed=1, **settings)
    assert answer(engine, "p1", seed=1, **settings) == first
    assert answer(engine, "p1", seed=2, **settings) != first
    assert answer(engine, "p1", seed=1, temperature=1.0, top_k=1) == CASES["p1"]["greedy"]


def test_broken_logits_end_with_an_error(engine: TorchEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "step", lambda token: np.full(2432, np.nan, np.float32))
    with pytest.raises(EngineError, match="NaN"):
        answer(engine, "p0")
