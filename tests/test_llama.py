"""LLaMA against the recorded cases of the published network, in both engines."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import seechat_lite as sl
from llama_reference import LLAMA, arrays, cases, needs_llama_reference
from seechat_export.export import export_bundle
from seechat_lite.engines import Engine, EngineOptions, create, engine_class
from seechat_lite.engines.base import Cancelled
from seechat_lite.generate import generate
from seechat_lite.generation import Sampling
from seechat_lite.prompt import Prompt
from seechat_lite.rotary import llama_tables
from seechat_lite.source import open_source
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError, EngineError
from seechat_weights.identify import identify
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.llama import llama_config
from serving import Running, asking, data_url, running

pytestmark = needs_llama_reference
TOLERANCE = 5e-4
MODELS = sorted(f.name for f in LLAMA.glob("*/") if (f / "config.json").is_file())
FORMS = ("onnx", "torch", "published")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("llama")

    def export(name: str, precision: str = "fp32") -> Path:
        out = folder / f"{name}-{precision}"
        if not out.exists():
            export_bundle(lm=LLAMA / name, out=out, precision=precision, block_size=32)
        return out

    return export


@pytest.fixture(params=[(name, form) for name in MODELS for form in FORMS], ids="-".join)
def model(
    request: pytest.FixtureRequest, bundle: Callable[..., Path]
) -> tuple[str, Engine, LMConfig]:
    name, form = request.param
    path = LLAMA / name if form == "published" else bundle(name)
    source = open_source(path)
    engine = create(
        "onnx" if form == "onnx" else "torch",
        source,
        context=300,
        options=EngineOptions(device="cpu"),
    )
    request.addfinalizer(engine.close)
    return name, engine, source.manifest.lm


def check_row(found: np.ndarray, recorded: Mapping[str, np.ndarray], what: str = "logits") -> None:
    """The last logits: all of them, or of a large vocabulary the 64 highest."""
    assert int(found.argmax()) == int(recorded[f"{what}_argmax"][-1])
    if f"{what}_last" in recorded:
        expected = recorded[f"{what}_last"]
    else:
        found = found[recorded[f"{what}_last_top64_ids"]]
        expected = recorded[f"{what}_last_top64"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def greedy(engine: Engine, logits: np.ndarray, count: int) -> list[int]:
    found = []
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = engine.step(found[-1])
    return found


def test_recorded_prompts(model: tuple[str, Engine, LMConfig]) -> None:
    """Logits of every position, the likeliest tokens, and the answers of 24 tokens."""
    name, engine, _ = model
    for prompt in ("p0", "p1", "p2", "long"):
        case, recorded = (
            arrays(f"llama_tiny/{name}/case_{prompt}.safetensors"),
            cases(f"llama_tiny/{name}/cases.json")[prompt],
        )
        ids = case["input_ids"].tolist()
        rows = [engine.prefill(Prompt(ids[:1])), *engine.extend(ids[1:])]
        if "logits" in case:
            np.testing.assert_allclose(rows, case["logits"], rtol=0, atol=TOLERANCE)
        else:
            assert [int(row.argmax()) for row in rows] == case["logits_argmax"].tolist()
            check_row(rows[-1], case)
        logits = engine.prefill(Prompt(ids))
        np.testing.assert_allclose(logits, rows[-1], rtol=0, atol=TOLERANCE)
        assert greedy(engine, logits, len(recorded["greedy_ids"])) == recorded["greedy_ids"]


def test_recorded_embeddings(model: tuple[str, Engine, LMConfig]) -> None:
    """A picture's embeddings stand among the words, at ordinary positions."""
    name, engine, _ = model
    case = arrays(f"llama_tiny/{name}/case_embeds.safetensors")
    recorded = cases(f"llama_tiny/{name}/cases.json")["embeds"]
    ids, at = recorded["input_ids_without_image"], recorded["image_inserted_at"]
    image = case["image_embeds"].reshape(recorded["image_tokens"], -1)
    prompt = Prompt([*ids[:at], *[0] * len(image), *ids[at:]], [(at, image)])
    logits = engine.prefill(prompt)
    check_row(logits, case)
    assert greedy(engine, logits, len(recorded["greedy_ids"])) == recorded["greedy_ids"]


def test_recorded_turns(model: tuple[str, Engine, LMConfig]) -> None:
    """A second question behind the cache gives the logits of all read again."""
    name, engine, _ = model
    case = arrays(f"llama_tiny/{name}/case_turns.safetensors")
    recorded = cases(f"llama_tiny/{name}/cases.json")["turns"]
    *answer, last = recorded["answer1_ids"]
    logits = engine.prefill(Prompt(recorded["turn1_ids"]))
    assert greedy(engine, logits, len(answer)) == answer
    rows = engine.extend([last, *recorded["turn2_ids"]])
    check_row(rows[-1], case, "turn2_with_cache.logits")
    if (expected := case.get("turn2_without_cache.logits")) is not None:
        np.testing.assert_allclose(rows, expected, rtol=0, atol=TOLERANCE)
    whole = [*recorded["turn1_ids"], *answer, last, *recorded["turn2_ids"]]
    logits = engine.prefill(Prompt(whole))
    np.testing.assert_allclose(logits, rows[-1], rtol=0, atol=TOLERANCE)
    *answer, last = recorded["answer2_ids"]
    assert greedy(engine, logits, len(answer)) == answer
    rows = engine.extend([last, *recorded["turn3_ids"]])
    check_row(rows[-1], case, "turn3_with_cache.logits")


def test_recorded_answers_together(model: tuple[str, Engine, LMConfig]) -> None:
    """In slots; the caches that are kept between answers live on beside them."""
    name, engine, _ = model
    recorded = cases(f"llama_tiny/{name}/cases.json")
    prompts = {p: recorded[p]["input_ids"] for p in ("p0", "p1", "p2")}
    expected = [recorded[p]["greedy_ids"] for p in prompts]
    assert engine.open_slots(4, tokens=300) == 4
    said: dict[int, list[int]] = {}

    def step() -> None:
        for slot, logits in engine.step_slots({s: a[-1] for s, a in said.items()}).items():
            said[slot].append(int(logits.argmax()))

    for ids in prompts.values():
        first = int(engine.prefill(Prompt(ids)).argmax())
        said[engine.adopt()] = [first]
        step()
    while any(len(a) < len(e) for a, e in zip(said.values(), expected, strict=True)):
        step()
    for answer, whole in zip(said.values(), expected, strict=True):
        assert answer[: len(whole)] == whole
    again = engine.prefill(Prompt(prompts["p0"]))
    assert greedy(engine, again, len(expected[0])) == expected[0]


def test_recorded_penalty(model: tuple[str, Engine, LMConfig]) -> None:
    name, engine, lm = model
    recorded = cases(f"llama_tiny/{name}/cases.json")
    penalty, expected = (recorded["repetition_penalty"][k] for k in ("penalty", "ids_given"))
    tokens = generate(
        engine,
        Prompt(recorded["p1"]["input_ids"]),
        Sampling(repetition_penalty=penalty),
        max_new_tokens=len(expected),
        eos_id=lm.eos_id,
        stopped=lambda: False,
    )
    until_eos = expected[: expected.index(lm.eos_id)] if lm.eos_id in expected else expected
    assert list(tokens) == until_eos


@pytest.mark.parametrize(("precision", "kl"), [("fp16", 1e-4), ("int8", 1e-2), ("int4", 1.0)])
def test_fewer_bits(precision: str, kl: float, bundle: Callable[..., Path]) -> None:
    """The check of every export compares graph and torch; the loss is that of the bits."""
    for name in ("gqa", "tied"):
        folder = bundle(name, precision)
        report = json.loads((folder / "parity.json").read_text("utf-8"))
        assert report["against_checkpoint"]["kl_divergence"] < kl
        engines = [create(e, open_source(folder), context=64) for e in ("onnx", "torch")]
        ids = cases(f"llama_tiny/{name}/cases.json")["p2"]["input_ids"]
        found = [engine.prefill(Prompt(ids)) for engine in engines]
        assert np.corrcoef(*found)[0, 1] > 0.99


def test_a_bundle_says_what_it_is(bundle: Callable[..., Path]) -> None:
    manifest = read_manifest(bundle("gqa_linear"))
    lm, settings = manifest.lm, json.loads((LLAMA / "gqa_linear/config.json").read_text("utf-8"))
    assert (lm.family, lm.kv_heads) == ("llama", settings["num_key_value_heads"])
    assert lm.max_sequence_length == settings["max_sequence_length"]
    assert (lm.bos_id, lm.eos_id) == (1, 2)
    assert manifest.tokenizer.kind == "llama"
    assert "tokenizer.model" in manifest.files


def test_lora_is_merged_into_parts() -> None:
    """PEFT names q, k and v, gate and up; ours are one tensor each."""
    base, tuned = LLAMA / "llama2", LLAMA.parent / "llava_tiny/llava_lora"
    lm = open_lm(base, adapter=tuned)
    recorded = arrays("llava_tiny/llava_lora/case_conversations.safetensors")
    settings = json.loads((tuned / "adapter_config.json").read_text("utf-8"))
    scaling = settings["lora_alpha"] / settings["r"]
    plain, checkpoint = open_lm(base), lm._tensors["layers.0.mlp.gate_up.weight"].loras[0]
    read, prefix = checkpoint.checkpoint.read, "base_model.model.model.layers.1"
    parts = {
        "attention.query_key_value": [f"self_attn.{x}_proj" for x in "qkv"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    for ours, names in parts.items():
        key = f"layers.1.{ours}.weight"
        deltas = []
        for name in names:
            a, b = (read(f"{prefix}.{name}.lora_{x}.weight").astype("f4") for x in "AB")
            deltas.append(b @ a * scaling)
        expected = plain.read(key).astype("f4") + np.concatenate(deltas)
        np.testing.assert_allclose(lm.read(key), expected, rtol=0, atol=1e-6)
        rows = slice(3, len(expected) - 5)
        np.testing.assert_allclose(lm.read(key, rows), expected[rows], rtol=0, atol=1e-6)
    merged = recorded["merged.layers.0.q_proj.weight"]
    found = lm.read("layers.0.attention.query_key_value.weight", slice(len(merged)))
    np.testing.assert_allclose(found, merged, rtol=0, atol=1e-6)
    merged = recorded["merged.layers.1.down_proj.weight"]
    np.testing.assert_allclose(lm.read("layers.1.mlp.down.weight"), merged, rtol=0, atol=1e-6)


def settings(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return {"model_type": "llama", "vocab_size": 100, "intermediate_size": 80} | sizes | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 3}, "4 heads, 3 of keys"),
        ({"head_dim": 32}, "head_dim is 32; expected 16"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"eos_token_id": 100}, "eos_token_id is 100 in a vocabulary of 100"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"text_config": {"model_type": "t5"}}, "text_config's model_type is 't5'"),
        ({"num_hidden_layers": 10**9}, "a whole number from 1 to"),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llama_config(settings(**changes))


def test_settings_that_may_be_absent() -> None:
    lm = llama_config(settings())
    assert (lm.kv_heads, lm.rope_theta, lm.layernorm_epsilon) == (4, 10000.0, 1e-6)
    assert llama_config(settings(eos_token_id=[9, 8, 9])).other_eos == (8,)
    newer = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}
    lm = llama_config(settings(rope_parameters=newer, max_position_embeddings=50))
    assert (lm.rope_theta, lm.rope_factor, lm.max_sequence_length) == (5e5, 2.0, 100)


def test_angles_of_llama_3() -> None:
    """The frequencies are those that transformers computes."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    published = settings(rope_scaling=rope, rope_theta=5e5, max_position_embeddings=1024)
    module = LlamaRotaryEmbedding(LlamaConfig(**published))
    cos, sin = module(torch.zeros(1), torch.arange(1000)[None])
    tables = llama_tables(llama_config(published), 1000)
    half = cos.shape[-1] // 2
    np.testing.assert_allclose(tables[0], cos[0, :, :half], rtol=0, atol=2e-4)
    np.testing.assert_allclose(tables[1], sin[0, :, :half], rtol=0, atol=2e-4)


QUESTIONS = ("What is shown?", "And what else?", "In one word?")


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_kept_caches_do_not_change_answers(engine: str, bundle: Callable[..., Path]) -> None:
    """Two conversations in turn: the same answers, and of each prompt only the rest is read."""
    said: dict[int, list[str]] = {}
    held: dict[int, list[int]] = {}
    for size in (0, 1 << 20):
        with sl.load(bundle("gqa"), engine=engine, device="cpu", context=250, kept_cache=size) as m:
            chats = [m.chat(), m.chat()]
            for question in QUESTIONS:
                for i, chat in enumerate(chats):
                    answer = chat.ask(f"{i}: {question}", max_new_tokens=8)
                    said.setdefault(size, []).append(answer)
                    held.setdefault(size, []).append(answer.stats.held_tokens)
    assert said[0] == said[1 << 20]
    assert set(held[0]) == {0}
    kept = held[1 << 20]
    assert kept[1] > 10  # what stands before every question
    if engine == "onnx":  # torch keeps one conversation's
        assert all(n > 40 for n in kept[2:])


def test_a_failed_or_cancelled_prompt_is_not_kept(bundle: Callable[..., Path]) -> None:
    source = open_source(bundle("gqa"))
    engine = create("onnx", source, context=64)
    ids = cases("llama_tiny/gqa/cases.json")["p2"]["input_ids"]
    expected = engine.prefill(Prompt(ids))
    engine.reset()
    engine.cancel()
    other = [*ids[:5], 9, 9, 9]
    with pytest.raises(Cancelled):
        engine.prefill(Prompt(other))
    engine.reset()
    np.testing.assert_allclose(engine.prefill(Prompt(ids)), expected, rtol=0, atol=1e-5)
    engine.reset()
    with pytest.raises(EngineError, match=r"call prefill\(\) first"):
        engine.step(5)


def test_the_plan_counts_what_is_kept(bundle: Callable[..., Path]) -> None:
    source = open_source(bundle("gqa"))
    plans = [
        engine_class("onnx").plan(
            source, context=200, options=EngineOptions(device="cpu", kept_cache=size)
        )
        for size in (0, None, 10**9)
    ]
    assert plans[0].total == plans[1].total  # what a full context takes anyway
    assert plans[2].cache == 10**9


@pytest.mark.parametrize("name", MODELS)
def test_info_knows_it(name: str) -> None:
    found = identify(LLAMA / name)
    assert (found.kind, found.runs, found.missing) == ("llama", True, {})
    assert found.options == {"lm": LLAMA / name}


def test_info_says_what_is_missing(tmp_path: Path) -> None:
    for file in (LLAMA / "gqa").glob("*"):
        if file.suffix == ".safetensors" and file.name.startswith("model"):
            (tmp_path / file.name).symlink_to(file)
    named = {"_name_or_path": "lmsys/vicuna-7b-v1.5"}
    settings = json.loads((LLAMA / "gqa/config.json").read_text("utf-8")) | named
    assert set(identify(tmp_path).missing) == {"config.json", "tokenizer.model or tokenizer.json"}
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    where = "https://huggingface.co/lmsys/vicuna-7b-v1.5"
    assert identify(tmp_path).missing == {"tokenizer.model or tokenizer.json": where}
    alone = identify(tmp_path / "config.json")
    assert alone.kind == "llama"
    adapter = LLAMA.parent / "llava_tiny/llava_lora/adapter_model.bin"
    assert identify(adapter).title == "a LoRA run of LLaVA"
    assert identify(LLAMA / "gqa/tokenizer.model").kind == "tokenizer"


def taken(model: sl.Model) -> int:
    """Bytes that the caches of a model have touched."""
    kept = getattr(model.engine, "_kept", None)
    return kept._taken() if kept else 0


def test_many_conversations_through_the_server(tmp_path: Path) -> None:
    """The same 50 turns over HTTP, where each request brings the whole conversation again."""
    source = open_source(LLAMA.parent / "llava_tiny/llava_v1")
    bundle = tmp_path / "b"
    export_bundle(lm=source, out=bundle, vision=source.vision, precision="fp32")
    pictures = sorted((LLAMA.parent / "pictures").glob("*.png"))[:3]
    urls = [data_url(picture.read_bytes()) for picture in pictures]
    budget, context = 300_000, 220
    said: dict[int, dict[int, list[str]]] = {}
    for kept in (0, budget):
        models: list[sl.Model] = []

        def load(kept: int = kept, models: list[sl.Model] = models) -> sl.Model:
            models.append(sl.load(bundle, context=context, kept_cache=kept))
            return models[-1]

        with running(load=load, manifest=read_manifest(bundle)) as server:
            answers: dict[int, list[str]] = {i: [] for i in range(4)}
            cached = [0] * 4

            def talk(
                i: int,
                server: Running = server,
                models: list[sl.Model] = models,
                answers: Any = answers,
                cached: list[int] = cached,
            ) -> None:
                messages: list[Any] = []
                for turn in range(13 if i < 2 else 12):
                    shown = [urls[(i + turn) % 3]] if turn % 4 == 0 else []
                    messages += asking(f"{i}{turn}?", *shown)["messages"]
                    answer = server.post({"messages": messages, "max_tokens": 6, "temperature": 0})
                    text = answer["choices"][0]["message"]["content"]
                    messages.append({"role": "assistant", "content": text})
                    answers[i].append(text)
                    usage = answer["usage"]
                    cached[i] += usage["prompt_tokens_details"]["cached_tokens"]
                    assert usage["prompt_tokens"] <= context
                    assert taken(models[-1]) <= context * 2048

            with ThreadPoolExecutor(4) as threads:
                list(threads.map(talk, range(4)))
            assert len(models) == 1 and bool(sum(cached)) == bool(kept)
            said[kept] = answers
    assert sum(map(len, said[0].values())) == 50
    assert said[0] == said[budget]


def test_many_conversations_at_once(tmp_path: Path) -> None:
    """50 turns about three pictures in four conversations: the answers of a cache never kept.

    The caches stay within their number of bytes.
    """
    source = open_source(LLAMA.parent / "llava_tiny/llava_v1")
    export_bundle(lm=source, out=tmp_path / "b", vision=source.vision, precision="fp32")
    pictures = sorted((LLAMA.parent / "pictures").glob("*.png"))[:3]
    budget = 300_000
    said: dict[int, dict[int, list[str]]] = {}
    for kept in (0, budget):
        with sl.load(tmp_path / "b", context=220, kept_cache=kept) as model:
            answers: dict[int, list[str]] = {i: [] for i in range(4)}

            def talk(i: int, model: sl.Model = model, answers: Any = answers) -> None:
                chat = model.chat()
                for turn in range(13 if i < 2 else 12):
                    image = pictures[(i + turn) % 3] if turn % 4 == 0 else None
                    answers[i].append(chat.ask(f"{i}{turn}?", image, max_new_tokens=6))
                    assert taken(model) <= 220 * 2048

            with ThreadPoolExecutor(4) as threads:
                list(threads.map(talk, range(4)))
            said[kept] = answers
    assert sum(map(len, said[0].values())) == 50
    assert said[0] == said[budget]
