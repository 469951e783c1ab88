"""LLaVA, MiniGPT-4 and InstructBLIP from checkpoint to answer, against the original code's own.

Each model is exported in full precision once. Both engines then give the original's prompts, logits
and greedy answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_reference as golden
import seechat_lite as sl
from seechat_export.export import export_bundle
from seechat_lite import prompt as prompts
from seechat_lite.conversation import FORMATS, Format, Turn, render, with_marks
from seechat_lite.prompt import Prompt
from seechat_lite.source import Source, open_source

pytestmark = [golden.needs_llama_reference, pytest.mark.slow]

CONTEXT = 1600
LOGITS = 5e-4
PICTURE = -200  # stands for a picture in recorded ids
PARTS = {
    "llava_v1": "v1", "llava_v15": "v15", "llava_projector_only": "projector_only",
    "llava_lora": "lora",
}  # fmt: skip
_exported: dict[str, Path] = {}


@pytest.fixture(params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def bundle(name: str, folder: pytest.TempPathFactory) -> Path:
    """The bundle of a published model, exported once."""
    if name not in _exported:
        out = folder.mktemp("llama") / name
        published = golden.PUBLISHED[name]
        vision = published.weights()
        lm: Path | Source = published.lm
        checkpoint = published.vision.checkpoint
        if published.as_named:  # as the command does it
            files, adapter = published.vision, published.adapter
            lm, checkpoint = open_source(published.lm, vision=files, adapter=adapter), None
        export_bundle(lm=lm, out=out, checkpoint=checkpoint, vision=vision, precision="fp32")
        _exported[name] = out
    return _exported[name]


def load(name: str, engine: str, folder: pytest.TempPathFactory) -> sl.Model:
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32"} if engine == "torch" else {}
    return sl.load(bundle(name, folder), engine=engine, context=CONTEXT, **options)


def built(model: sl.Model, format: Format, turns: Sequence[Turn]) -> Prompt:
    """The prompt for the last turn; the pictures' keys are the names of their files."""
    names = {name for turn in turns for name in turn.images}
    seen = {n: model.encode_image(golden.picture(n), exact=True)[1] for n in names}
    embeds = model.read_question(turns[-1].question, seen)
    segments = render(format, turns)
    return prompts.build(
        model.tokenizer, segments, embeds, specials=format.specials, begins=format.begins
    )


def text_ids(prompt: Prompt) -> list[int]:
    """The ids of a prompt, with one PICTURE for each picture."""
    ids, at = [], 0
    for start, embeds in prompt.images:
        ids += [*prompt.ids[at:start], PICTURE]
        at = start + len(embeds)
    return ids + prompt.ids[at:]


def greedy(model: sl.Model, prompt: Prompt, expected: Sequence[int]) -> np.ndarray:
    """Check the greedy answer, and return the logits after the prompt."""
    first = logits = model.engine.prefill(prompt)
    for i, token in enumerate(expected):
        assert int(logits.argmax()) == token, (i, int(logits.argmax()), token)
        if i + 1 < len(expected):
            logits = model.engine.step(token)
    return first


def close_to(logits: np.ndarray, recorded: np.ndarray, ids: np.ndarray | None = None) -> None:
    """Compare logits with recorded ones: all, or those of some ids."""
    found = logits if ids is None else logits[ids]
    size = min(len(found), len(recorded))  # of padded rows nothing is recorded
    np.testing.assert_allclose(found[:size], recorded[:size], rtol=0, atol=LOGITS)


def check_logits(logits: np.ndarray, recorded: dict[str, np.ndarray], key: str) -> None:
    """Compare with what was recorded under `key`, if anything was."""
    if key in recorded:
        close_to(logits, recorded[key])
    for top, which in ((k, f"{k}_ids") for k in recorded if k.startswith(f"{key}_top")):
        if which in recorded:
            close_to(logits, recorded[top], recorded[which])


@pytest.mark.parametrize("form", PARTS)
def test_llava(form: str, engine: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    recorded = golden.arrays(f"llava_tiny/{form}/case_conversations.safetensors")
    with load(form, engine, tmp_path_factory) as model:
        vision = model.manifest.vision
        assert vision is not None
        for conversation in golden.cases("llava_tiny/cases.json")[PARTS[form]]["conversations"]:
            format = with_marks(FORMATS[conversation["template"]], vision.marks)
            for turns, turn in golden.llava_conversation(conversation):
                prompt = built(model, format, turns)
                assert text_ids(prompt) == turn["input_ids"], turn["key"]
                logits = greedy(model, prompt, turn["greedy_ids"])
                check_logits(logits, dict(recorded), f"{turn['key']}.logits_last")
                answer = [i for i in turn["greedy_ids"] if i != model.tokenizer.eos_id]
                assert model.tokenizer.decode(answer).strip() == turn["text"], turn["key"]


@pytest.mark.parametrize("form", ["hf_old", "hf_new"])
def test_llava_in_hugging_faces_form(
    form: str, engine: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recorded = golden.arrays("llava_tiny/hf_old/cases.safetensors")
    cases = golden.cases("llava_tiny/hf_old/cases.json")
    with load(form, engine, tmp_path_factory) as model:
        for i, case in enumerate(cases["cases"]):
            before, after = case["prompt"].split("<image>")
            slot = sl_slot(case["picture"])
            seen = model.encode_image(golden.picture(case["picture"]), exact=True)[1]
            embeds = {case["picture"]: seen}
            prompt = prompts.build(model.tokenizer, [before, slot, after], embeds, specials=True)
            wanted = case["input_ids"]
            ids = [cases["image_token_index"] if k == PICTURE else k for k in text_ids(prompt)]
            assert ids == wanted
            logits = greedy(model, prompt, case["greedy_ids"])
            for key in (f"{i}.logits_last", f"case{i}.logits_last"):
                check_logits(logits, dict(recorded), key)


def sl_slot(name: str) -> Any:
    from seechat_lite.conversation import ImageSlot

    return ImageSlot(name, 0)


def minigpt4_turns(name: str) -> Iterator[tuple[str, list[Turn], dict[str, Any]]]:
    """The format, the turns so far and what was recorded, of every question to one model."""
    cases = golden.cases("minigpt4_tiny/cases.json")
    own = {
        "minigpt4": cases["vicuna"],
        "minigpt4_real_vocab": cases["vicuna_real_vocab"]["cases"],
        "minigpt4_llama2": cases["llama2"]["cases"],
    }[name]
    for format, case in golden.minigpt4_cases():
        if not any(case is one for one in own):
            continue
        turns: list[Turn] = []
        for i, turn in enumerate(case["turns"]):
            turns.append(Turn(turn["question"], None, () if i else (case["picture"],)))
            yield format, list(turns), turn
            turns[-1] = Turn(turn["question"], turn["text"], turns[-1].images)


@pytest.mark.parametrize("name", ["minigpt4", "minigpt4_real_vocab", "minigpt4_llama2"])
def test_minigpt4(name: str, engine: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = ("cases_vicuna", "cases_other")
    recorded = {
        k: v for f in files for k, v in golden.arrays(f"minigpt4_tiny/{f}.safetensors").items()
    }
    with load(name, engine, tmp_path_factory) as model:
        for format, turns, turn in minigpt4_turns(name):
            prompt = built(model, FORMATS[format], turns)
            assert len(prompt.ids) == turn["prompt_length"]
            assert text_ids(prompt) == [
                i for n, ids in enumerate(turn["segment_ids"]) for i in [PICTURE] * (n > 0) + ids
            ]
            logits = greedy(model, prompt, turn["greedy_ids_without_stop_rule"])
            check_logits(logits, recorded, f"{turn['key']}.logits_last")
            for penalty, key in ((1.0, "text"), (1.05, "text_rp1_05")):
                chat = model.chat(f"{format}-compat")
                for past in turns[:-1]:
                    chat.append(past.question, past.answer or "", pictures(past))
                answer = chat.ask(
                    turns[-1].question,
                    pictures(turns[-1]),
                    max_new_tokens=len(turn["greedy_ids_without_stop_rule"]),
                    temperature=0,
                    repetition_penalty=penalty,
                )
                assert answer == turn[key], (turn["key"], penalty)


def test_minigpt4_loses_the_beginning_of_a_long_prompt(
    engine: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As published; its system's text goes first, and the picture may be cut through."""
    cut = golden.cases("minigpt4_tiny/cases.json")["max_length_cut"]
    with load("minigpt4", engine, tmp_path_factory) as model:
        _, turns, turn = next(minigpt4_turns("minigpt4"))
        assert turn["prompt_length"] == cut["full_length"]
        chat = model.chat("minigpt4-compat")
        chat.format = replace(chat.format, cut=cut["max_length"])
        prompt = chat.prompt(
            turns[0].question, pictures(turns[0]), max_new_tokens=cut["max_new_tokens"]
        )
        whole = model.chat("minigpt4-compat").prompt(turns[0].question, pictures(turns[0]))
        assert len(whole.ids) == cut["full_length"]
        assert prompt.ids == whole.ids[-cut["kept_last"] :]
        greedy(model, prompt, cut["greedy_ids"])


def pictures(turn: Turn) -> list[Path]:
    return [golden.picture(name) for name in turn.images]


def test_minigpt4_and_two_pictures(engine: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = golden.cases("minigpt4_tiny/cases.json")["two_pictures"]
    first, second = case["pictures"]
    turns = [Turn("one", "ok", (first,)), Turn("What is this?", None, (second,))]
    with load("minigpt4", engine, tmp_path_factory) as model:
        prompt = built(model, FORMATS["minigpt4"], turns)
        assert text_ids(prompt) == [
            i for n, ids in enumerate(case["segment_ids"]) for i in [PICTURE] * (n > 0) + ids
        ]
        greedy(model, prompt, case["greedy_ids"])


@pytest.mark.parametrize("name", ["instructblip", "instructblip_hf", "instructblip_real_vocab"])
def test_instructblip(name: str, engine: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("tokenizers")
    cases = golden.cases("instructblip_tiny/cases.json")
    real = name.endswith("real_vocab")
    own = cases["real_llm"]["cases"] if real else cases["cases"]
    file = "cases_real_vocab" if real else "cases"
    recorded = dict(golden.arrays(f"instructblip_tiny/{file}.safetensors"))
    with load(name, engine, tmp_path_factory) as model:
        for case in own:
            question, key = case["question"], case["key"]
            turns = [Turn(question, None, (case["picture"],))]
            prompt = built(model, FORMATS["instructblip"], turns)
            ((_, embeds),) = prompt.images
            if f"{key}.projected" in recorded:
                expected = recorded[f"{key}.projected"]
                np.testing.assert_allclose(embeds, expected, rtol=0, atol=1e-3)
            assert text_ids(prompt) == [PICTURE, *case["llm_input_ids"]]
            logits = greedy(model, prompt, case["greedy_ids"])
            check_logits(logits, recorded, f"{key}.logits_last")
            for penalty, output in ((1.0, "greedy_rp1_0"), (1.5, "greedy_rp1_5")):
                answer = model.chat("instructblip").ask(
                    question,
                    golden.picture(case["picture"]),
                    max_new_tokens=case["max_length"] - 1,
                    temperature=0,
                    repetition_penalty=penalty,
                )
                if case["picture"] not in golden.OTHER_PIXELS:
                    assert answer == case["outputs"][output]["text"], (key, penalty)
