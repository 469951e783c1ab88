"""The contract every engine keeps, against the reference model's recorded tensors."""

import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import seechat_lite as sl
from networks import TorchEngine, cached, load_chatglm
from reference import check_recorded, data, greedy, load_json, tensors
from seechat_export.export import export_bundle
from seechat_export.reference_chatglm import ChatGLM
from seechat_lite.engines import ENGINES, Engine, EngineOptions, create
from seechat_lite.engines.base import Cancelled
from seechat_lite.prompt import Prompt
from seechat_lite.rotary import rotary_rows, rotary_tables
from seechat_lite.source import open_source
from seechat_weights.config import LMConfig
from seechat_weights.errors import ContextError, EngineError, OptionError

TOLERANCE = 5e-4
CASES = ["p0", "p1", "p2", "p3_mask", "p4_continue", "p5_both", "p6_infill", "p7_len1", "p8_long"]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The fp32 (or other) bundle of a fixture model, exported once."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, precision: str = "fp32") -> Path:
        if (model, precision) not in made:
            folder = tmp_path_factory.mktemp("bundles") / f"{model}-{precision}"
            source = data(model)
            if not (source / "ice_text.model").exists():  # one tokenizer for both fixture models
                source = tmp_path_factory.mktemp("checkpoint")
                for file in data(model).iterdir():
                    (source / file.name).symlink_to(file)
                (source / "ice_text.model").symlink_to(data("chatglm_tiny/ice_text.model"))
            export_bundle(lm=source, out=folder, precision=precision, block_size=32)
            made[model, precision] = folder
        return made[model, precision]

    return make


def open_engine(
    folder: Path, name: str = "onnx", context: int = 300, options: EngineOptions | None = None
) -> Engine:
    return create(name, open_source(folder), context=context, options=options)


@pytest.fixture(scope="module", params=["torch reference", *ENGINES])
def engine(
    request: pytest.FixtureRequest, bundle_of: Callable[..., Path]
) -> Iterator[Engine | TorchEngine]:
    if request.param == "torch reference":
        yield TorchEngine(load_chatglm("chatglm_tiny"))
        return
    engine = open_engine(bundle_of("chatglm_tiny"), request.param)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", CASES)
def test_reference_case(engine: Engine, name: str) -> None:
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    answer = load_json("chatglm_tiny/cases.json")["cases"][name]["greedy"]
    logits = [engine.prefill(Prompt(case["input_ids"][0].tolist()))]
    last = case["logits"][0, -1] if "logits" in case else case["logits_last"][0]
    np.testing.assert_allclose(logits[0], last, rtol=0, atol=TOLERANCE)
    logits += [engine.step(token) for token in answer[:5]]
    np.testing.assert_allclose(logits, case["greedy_step_logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers(engine: Engine, name: str) -> None:
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    expected = load_json("chatglm_tiny/cases.json")["cases"][name]["greedy"]
    assert greedy(engine, case["input_ids"][0].tolist(), len(expected)) == expected


@pytest.mark.parametrize("count", [1, 3, 8, 17])
@pytest.mark.parametrize("name", ENGINES)
def test_greedy_answers_together(bundle_of: Callable[..., Path], name: str, count: int) -> None:
    """Recorded answers are written together; each leaves when it is complete."""
    engine = open_engine(bundle_of("chatglm_tiny"), name)
    recorded = load_json("chatglm_tiny/cases.json")["cases"]
    left = [CASES[i % len(CASES)] for i in range(17)]
    found: dict[int, tuple[list[int], list[int]]] = {}  # slot -> answer, what is expected
    assert engine.open_slots(count, tokens=300) == count
    while left or found:
        if left and len(found) < count:  # one joins before each step
            case = left.pop()
            ids = tensors(f"chatglm_tiny/case_{case}.safetensors")["input_ids"][0].tolist()
            first = int(engine.prefill(Prompt(ids)).argmax())
            found[engine.adopt()] = [first], recorded[case]["greedy"]
        logits = engine.step_slots({slot: said[-1] for slot, (said, _) in found.items()})
        for slot, (said, expected) in list(found.items()):
            said.append(int(logits[slot].argmax()))
            if len(said) >= len(expected):
                assert said[: len(expected)] == expected
                engine.free_slot(slot)
                del found[slot]
    engine.close()


@pytest.mark.parametrize("name", ENGINES)
def test_a_prefix_in_slots(tmp_path: Path, name: str) -> None:
    source = data("chatglm_tiny")
    prefix = source / "ptuning_embed_pytorch_model.bin"
    export_bundle(lm=source, prefix=prefix, out=tmp_path / "b", precision="fp32")
    case = tensors("chatglm_tiny/case_prefix_embed.safetensors")
    recorded = load_json("chatglm_tiny/cases.json")["cases"]["prefix_embed"]
    engine = open_engine(tmp_path / "b", name, context=len(recorded["greedy"]) + 50)
    ids = case["input_ids"][0].tolist()
    tokens = len(ids) + len(recorded["greedy"])
    assert engine.open_slots(2, tokens=tokens) == 2  # those of the prefix come on top
    said: dict[int, list[int]] = {}
    for _ in range(2):
        first = int(engine.prefill(Prompt(ids)).argmax())
        said[engine.adopt()] = [first]
    while len(said[0]) < len(recorded["greedy"]):
        for slot, logits in engine.step_slots({s: a[-1] for s, a in said.items()}).items():
            said[slot].append(int(logits.argmax()))
    assert list(said.values()) == [recorded["greedy"]] * 2
    engine.close()


def test_pictures_as_embeddings(engine: Engine) -> None:
    case = tensors("chatglm_tiny/case_seechat_embeds.safetensors")
    ids, image = case["input_ids"][0].tolist(), case["image_embeds"][0]
    logits = [engine.prefill(Prompt(ids, [(ids.index(0), image)]))]
    answer = load_json("chatglm_tiny/cases.json")["cases"]["seechat_embeds"]["greedy"]
    logits += [engine.step(token) for token in answer[:5]]
    np.testing.assert_allclose(logits, case["greedy_step_logits"], rtol=0, atol=TOLERANCE)


def test_every_prefill_starts_afresh(engine: Engine) -> None:
    long, short = (
        tensors(f"chatglm_tiny/case_{name}.safetensors")["input_ids"][0].tolist()
        for name in ("p8_long", "p0")
    )
    first = engine.prefill(Prompt(short))
    engine.prefill(Prompt(long))
    engine.step(7)
    again = engine.prefill(Prompt(short))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32


def test_28_layers(bundle_of: Callable[..., Path]) -> None:
    engine = open_engine(bundle_of("chatglm_tiny28"))
    for name, recorded in load_json("chatglm_tiny28/cases.json")["cases"].items():
        case = tensors(f"chatglm_tiny28/case_{name}.safetensors")
        check_recorded(engine, case, recorded, atol=TOLERANCE)
    engine.close()


def test_the_cache_holds_the_published_keys_and_values(bundle_of: Callable[..., Path]) -> None:
    """The graph's cache, with the quarters of each key head put back as published."""
    case = tensors("chatglm_tiny/case_p1_kv.safetensors")
    ids = tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist()
    engine = open_engine(bundle_of("chatglm_tiny"))
    engine.prefill(Prompt(ids))
    for layer in range(3):
        for part in ("key", "value"):
            published = case[f"prefill.past.{layer}.{part}"][:, 0]  # [length, heads, head]
            kept = cached(engine, part, layer).transpose(1, 0, 2)
            if part == "key":
                a1, b1, a2, b2 = np.split(kept, 4, axis=-1)
                kept = np.concatenate([a1, a2, b1, b2], axis=-1)
            np.testing.assert_allclose(kept, published, rtol=0, atol=TOLERANCE)
    for i, token in enumerate(case["decode_fed_ids"].tolist()):
        logits = engine.step(token)
        np.testing.assert_allclose(logits, case["decode_logits"][i], rtol=0, atol=TOLERANCE)


SIZES = [  # hidden, heads, layers, inner; head sizes 12, 20, 24, 4 and 80: no powers of two
    (60, 5, 2, 100),
    (60, 3, 1, 240),
    (72, 3, 1, 288),
    (12, 3, 3, 7),
    (160, 2, 2, 96),
    (256, 2, 1, 512),
]


@pytest.mark.parametrize(("hidden", "heads", "layers", "inner"), SIZES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_other_sizes(
    tmp_path: Path, hidden: int, heads: int, layers: int, inner: int, precision: str
) -> None:
    """A model of any size goes from checkpoint to bundle to logits."""
    special = load_json("chatglm_tiny/config.json")
    config = LMConfig(
        vocab_size=special["vocab_size"],
        hidden_size=hidden,
        num_heads=heads,
        num_layers=layers,
        inner_size=inner,
        max_sequence_length=64,
        mask_id=special["mask_token_id"],
        gmask_id=special["gmask_token_id"],
        bos_id=special["bos_token_id"],
        eos_id=special["eos_token_id"],
    )
    torch.manual_seed(hidden)
    model = ChatGLM(config).eval().requires_grad_(False)
    write_checkpoint(model, tmp_path / "checkpoint", special)
    export_bundle(
        lm=tmp_path / "checkpoint", out=tmp_path / "bundle", precision=precision, block_size=32
    )
    ids = [*range(40, 60), config.gmask_id, config.bos_id, 7, 8]
    engine = open_engine(tmp_path / "bundle", context=40)
    found = [engine.prefill(Prompt(ids)), engine.step(9)]
    reference = TorchEngine(model)
    expected = [reference.prefill(Prompt(ids)), reference.step(9)]
    if precision in ("fp32", "fp16"):  # fp16 rounds the weights
        atol = {"fp32": TOLERANCE, "fp16": 5e-3}[precision]
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    else:
        least = {"int8": 0.999, "int4": 0.9}[precision]
        assert np.corrcoef(np.ravel(found), np.ravel(expected))[0, 1] > least
    assert config.padded_head_size % 8 == 0


def write_checkpoint(model: ChatGLM, folder: Path, config: dict) -> None:
    """A checkpoint folder as published: fp32 here, so that nothing is rounded."""
    folder.mkdir()
    c = model.config
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.num_heads,
        "num_layers": c.num_layers,
        "inner_hidden_size": c.inner_size,
        "max_sequence_length": c.max_sequence_length,
    }
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    published = {
        key if key.startswith("lm_head") else f"transformer.{key}": value.contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(published, folder / "model.safetensors")
    (folder / "ice_text.model").symlink_to(data("chatglm_tiny/ice_text.model"))


def test_quantized_bundles_answer_alike(bundle_of: Callable[..., Path]) -> None:
    """int8 keeps the reference's likeliest token wherever it leads by a margin."""
    engine = open_engine(bundle_of("chatglm_tiny", "int8"))
    for name in CASES:
        case = tensors(f"chatglm_tiny/case_{name}.safetensors")
        logits = engine.prefill(Prompt(case["input_ids"][0].tolist()))
        expected = case["greedy_step_logits"][0]
        second, first = np.sort(expected)[-2:]
        if first - second > 0.5:
            assert logits.argmax() == expected.argmax(), name
        assert np.corrcoef(logits, expected)[0, 1] > 0.995


@pytest.fixture
def small(bundle_of: Callable[..., Path]) -> Iterator[Engine]:
    engine = open_engine(bundle_of("chatglm_tiny"), context=16)
    yield engine
    engine.close()


def test_a_full_context_is_an_error_not_an_overflow(small: Engine) -> None:
    config = load_chatglm("chatglm_tiny").config
    ids = [*range(40, 53), config.gmask_id, config.bos_id]
    small.prefill(Prompt(ids))
    small.step(7)
    with pytest.raises(ContextError, match="context of 16 tokens is full"):
        small.step(8)
    with pytest.raises(ContextError, match="17 tokens, the context holds 16"):
        small.prefill(Prompt([40, 41, *ids]))


def test_wrong_inputs_are_named(small: Engine) -> None:
    config = load_chatglm("chatglm_tiny").config
    end = [config.gmask_id, config.bos_id]
    with pytest.raises(EngineError, match=r"before prefill"):
        small.step(7)
    with pytest.raises(ContextError, match="99999"):
        small.prefill(Prompt([99999, *end]))
    with pytest.raises(ContextError, match=r"without \[gMASK\]"):
        small.prefill(Prompt([5, 6, config.bos_id]))
    with pytest.raises(ContextError, match="width 3"):
        small.prefill(Prompt([0, 0, *end], [(0, np.zeros((2, 3), np.float32))]))
    with pytest.raises(EngineError, match="text-only"):
        small.encode_image(np.zeros((1, 3, 56, 56), np.float32))


def test_a_closed_engine_says_so(bundle_of: Callable[..., Path]) -> None:
    engine = open_engine(bundle_of("chatglm_tiny"), context=16)
    engine.close()
    engine.close()
    for call in (lambda: engine.prefill(Prompt([5, 2001, 2004])), lambda: engine.step(5)):
        with pytest.raises(EngineError, match=r"^the model is closed"):
            call()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_closed_engine_holds_no_file(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bundle_of("chatglm_tiny"), tmp_path / "alone")
    engine = open_engine(folder, context=16)
    engine.prefill(Prompt([5, 2001, 2004]))
    assert str(folder) in Path("/proc/self/maps").read_text()
    engine.close()
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_unknown_engines_and_devices(bundle_of: Callable[..., Path]) -> None:
    folder = bundle_of("chatglm_tiny")
    with pytest.raises(OptionError, match="engine is 'tpu'"):
        open_engine(folder, "tpu")
    with pytest.raises(EngineError, match="'NoSuchProvider' is not in this ONNX Runtime"):
        open_engine(folder, options=EngineOptions(device="NoSuchProvider"))
    open_engine(folder, options=EngineOptions(device="CPUExecutionProvider")).close()


def test_positions_match_the_reference() -> None:
    """The engine's rotary rows, laid out for the graph, hold the published tables' numbers."""
    tables = tensors("rope/rope_tables.safetensors")
    at = tables["positions"]
    ours = rotary_tables(16, int(at.max()) + 1)
    np.testing.assert_allclose(ours[0][at], tables["dim8.cos_fp32_path"][:, :4], atol=1e-6)
    np.testing.assert_allclose(ours[1][at], tables["dim8.sin_fp32_path"][:, :4], atol=1e-6)
    cos, sin = rotary_rows(ours, np.array([[3, 4], [0, 1]]), 8)
    np.testing.assert_array_equal(cos[1], np.concatenate([ours[0][4], ours[0][1]]))
    np.testing.assert_array_equal(sin[0], np.concatenate([ours[1][3], ours[1][0]]))


def test_several_tokens_at_once_are_as_good_as_one_by_one(engine: Engine) -> None:
    case = tensors("chatglm_tiny/case_p1.safetensors")
    answer = load_json("chatglm_tiny/cases.json")["cases"]["p1"]["greedy"]
    prompt = Prompt(case["input_ids"][0].tolist())
    engine.prefill(prompt)
    rows = engine.extend(answer[:5])
    np.testing.assert_allclose(rows, case["greedy_step_logits"][1:], rtol=0, atol=TOLERANCE)
    assert rows.dtype == np.float32
    # wrong guesses leave no trace once they are taken back
    engine.prefill(prompt)
    engine.extend([answer[0], 77, 78, 79])
    engine.rewind(3)
    logits = [engine.step(token) for token in answer[1:5]]
    np.testing.assert_allclose(logits, case["greedy_step_logits"][2:], rtol=0, atol=TOLERANCE)


def test_the_cache_goes_with_the_answer(bundle_of: Callable[..., Path]) -> None:
    engine = open_engine(bundle_of("chatglm_tiny"))
    prompt = Prompt(tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist())
    first = engine.prefill(prompt)
    engine.reset()
    with pytest.raises(EngineError, match="before prefill"):
        engine.step(7)
    np.testing.assert_array_equal(engine.prefill(prompt), first)


def test_a_running_call_can_be_cancelled(bundle_of: Callable[..., Path]) -> None:
    """From another thread, in the middle of a prompt; the next one runs."""
    engine = open_engine(bundle_of("chatglm_tiny28"), context=2048)
    prompt = Prompt([*[40] * 2000, 2001, 2004])
    first = engine.prefill(prompt)
    cancelled: list[Cancelled] = []

    def run() -> None:
        try:
            engine.prefill(prompt)
        except Cancelled as e:
            cancelled.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():  # however soon it is asked, it ends
        engine.cancel()
    assert cancelled
    engine.reset()
    np.testing.assert_array_equal(engine.prefill(prompt), first)


def test_a_call_that_is_about_to_begin_can_be_cancelled(bundle_of: Callable[..., Path]) -> None:
    """Whoever stops an answer just before its prompt is read must not wait for its end."""
    engine = open_engine(bundle_of("chatglm_tiny"))
    prompt = Prompt(tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist())
    engine.cancel()
    with pytest.raises(Cancelled):
        engine.prefill(prompt)
    engine.reset()
    engine.prefill(prompt)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_cache_is_half_precision_but_in_full_precision_bundles(
    bundle_of: Callable[..., Path], precision: str
) -> None:
    engine = open_engine(bundle_of("chatglm_tiny", precision))
    engine.prefill(Prompt([40, 41, 2001, 2004]))
    assert cached(engine, "key", 0).dtype == ("f4" if precision == "fp32" else "f2")
    assert cached(engine, "value", 2).shape[1] == 4


@pytest.mark.parametrize("name", ["embed", "proj"])
def test_a_prefix_is_seen_by_all_tokens(tmp_path: Path, name: str) -> None:
    """P-tuned reference cases, by the cache that a bundle begins with."""
    source = data("chatglm_tiny")
    prefix = source / f"ptuning_{name}_pytorch_model.bin"
    export_bundle(lm=source, prefix=prefix, out=tmp_path / "b", precision="fp32")
    case = tensors(f"chatglm_tiny/case_prefix_{name}.safetensors")
    recorded = load_json("chatglm_tiny/cases.json")["cases"][f"prefix_{name}"]
    check_recorded(open_engine(tmp_path / "b"), case, recorded, atol=TOLERANCE)


def test_models_are_loaded_and_see_at_the_same_time(vision_bundle: Path) -> None:
    """Mapped files and freed heaps of one do not disturb another."""

    def see(_: int) -> np.ndarray:
        with sl.load(vision_bundle, keep_vision=False) as model:
            vision = model.manifest.vision
            assert vision is not None
            size = vision.pixels.image_size
            pixels = np.ones((1, 3, size, size), np.float32)
            prompt = model.chat("chatglm").prompt("hello")
            return np.concatenate(
                [model.engine.prefill(prompt).ravel(), model.engine.encode_image(pixels).ravel()]
            )

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(see, range(16))
    for found in others:
        np.testing.assert_array_equal(found, first)
