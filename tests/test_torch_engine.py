"""What the torch engine does beyond the contract: published weights, few bits, budgets."""

import json
import shutil
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import seechat_lite as sl
from networks import load_chatglm
from reference import check_recorded, data, greedy, load_json, positions, tensors
from seechat_export.export import export_bundle
from seechat_export.reference_chatglm import KVCache
from seechat_lite.cli.main import main
from seechat_lite.engines import Engine, EngineOptions, create
from seechat_lite.engines.base import Cancelled
from seechat_lite.engines.torch.engine import DTYPES, TorchEngine
from seechat_lite.engines.torch.linears import QUANTIZATIONS, BlockLinear
from seechat_lite.engines.torch.memory import device_plan
from seechat_lite.prompt import Prompt
from seechat_lite.rotary import rotary_tables
from seechat_lite.source import open_source
from seechat_weights.bundle import precisions
from seechat_weights.bundle.manifest import Decoder, Manifest, TokenizerConfig
from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError, EngineError, MemoryPlanError, OptionError

TINY = data("chatglm_tiny")
TOLERANCE = 5e-4
needs_bitsandbytes = pytest.mark.skipif(
    not find_spec("bitsandbytes"), reason="bitsandbytes is not installed"
)


def ids_of(name: str) -> list[int]:
    return tensors(f"chatglm_tiny/case_{name}.safetensors")["input_ids"][0].tolist()


def direct(folder: Path = TINY, **chosen: object) -> TorchEngine:
    """Published weights, loaded as they are, on the CPU."""
    settings = EngineOptions(device="cpu", **chosen)  # type: ignore[arg-type]
    return TorchEngine(open_source(folder), context=300, options=settings)


def answers(engine: Engine, name: str = "p1") -> np.ndarray:
    """Logits of a prompt and of two steps after it, [3, vocab]."""
    return np.stack([engine.prefill(Prompt(ids_of(name))), *(engine.step(t) for t in (7, 50))])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_bundle_answers_alike_in_both_engines(precision: str, tmp_path: Path) -> None:
    export_bundle(lm=TINY, out=tmp_path / "b", precision=precision, block_size=32)
    found, expected = (
        answers(create(name, open_source(tmp_path / "b"), context=300))
        for name in ("torch", "onnx")
    )
    if precision.startswith("fp"):  # ONNX Runtime's cache is float16 with the weights
        atol = {"fp32": TOLERANCE, "fp16": 5e-3}[precision]
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    else:  # ONNX Runtime's integer products also round what they multiply the weights by
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_blocks_are_multiplied_exactly(precision: str, tmp_path: Path) -> None:
    """The network over the weights that the blocks stand for gives the same logits."""
    from test_export_lm import bundle_tensor

    manifest = export_bundle(lm=TINY, out=tmp_path / "b", precision=precision, block_size=64)
    model = load_chatglm("chatglm_tiny")
    state = {
        key: torch.from_numpy(bundle_tensor(tmp_path / "b", manifest, key))
        for key in model.state_dict()
        if key != "word_embeddings.weight"
    }
    model.load_state_dict(state, strict=False)
    engine, ids = create("torch", open_source(tmp_path / "b"), context=300), ids_of("p1")
    cache, at = KVCache.empty(model, 300), torch.from_numpy(positions(ids, model.config))[None]
    embeds = model.word_embeddings(torch.tensor([ids]))
    model(embeds[:, :-1], at[..., :-1], cache=cache)
    expected = model(embeds[:, -1:], at[..., -1:], cache=cache)[0, 0].numpy()
    np.testing.assert_allclose(engine.prefill(Prompt(ids)), expected, rtol=0, atol=TOLERANCE)


def test_published_weights_answer_as_their_export(tmp_path: Path) -> None:
    export_bundle(lm=TINY, out=tmp_path / "b", precision="fp32")
    expected = answers(create("torch", open_source(tmp_path / "b"), context=300))
    np.testing.assert_allclose(answers(direct()), expected, rtol=0, atol=1e-5)


def quantized_folder(form: str, into: Path) -> Path:
    shutil.copytree(data(f"quantized/{form}"), into / form)
    shutil.copy(TINY / "ice_text.model", into / form)
    return into / form


def in_blocks(engine: TorchEngine) -> dict[str, int]:
    """Bits of the linears that are in blocks, by name."""
    modules = engine._opened().named_modules()
    return {name: m.bits for name, m in modules if isinstance(m, BlockLinear)}


@pytest.mark.parametrize("form", ["int8", "int4", "int4-qe"])
def test_published_integers_stay_what_they_are(form: str, tmp_path: Path) -> None:
    """At fp32 nothing is lost: the recorded logits, from the integers themselves."""
    engine = direct(quantized_folder(form, tmp_path))
    bits = in_blocks(engine)
    assert set(bits.values()) == {int(form[3])}
    assert len(bits) == 4 * 3 + ("lm_head" in bits)  # of the published three, int4-qe's head alone
    assert ("lm_head" in bits) == (form == "int4-qe")
    for name, recorded in load_json(f"quantized/{form}/cases.json")["cases"].items():
        case = tensors(f"quantized/{form}/case_{name}.safetensors")
        check_recorded(engine, case, recorded, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_published_integers_answer_as_their_export(form: str, tmp_path: Path) -> None:
    """In half precision the head gets 8 bits, as in a bundle, and no more memory is taken."""
    folder = quantized_folder(form, tmp_path)
    engine = direct(folder, dtype="bf16")
    export_bundle(lm=folder, out=tmp_path / "b", precision=form[:4])
    chosen = EngineOptions(dtype="bf16")
    exported = create("torch", open_source(tmp_path / "b"), context=300, options=chosen)
    assert isinstance(exported, TorchEngine)
    assert in_blocks(engine) == in_blocks(exported)
    np.testing.assert_array_equal(answers(engine), answers(exported))
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name, t in engine._opened().state_dict().items()
    }
    assert sum(held.values()) == pytest.approx(engine._plan.weights, rel=0.02)


@pytest.mark.parametrize(
    ("form", "quantize", "message"),
    [("int4", "nf4", "are int4 already"), ("int4-qe", "int4", "int4"), ("int8", "int8", "int8")],
)
def test_as_few_bits_are_not_made_of_published_integers(
    form: str, quantize: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        direct(quantized_folder(form, tmp_path), quantize=quantize)


def test_fewer_bits_are_made_of_published_integers(tmp_path: Path) -> None:
    engine = direct(quantized_folder("int8", tmp_path), quantize="int4")
    bits = in_blocks(engine)
    assert (len(bits), set(bits.values())) == (13, {4})


def test_int4_is_what_an_export_makes(tmp_path: Path) -> None:
    """Of a checkpoint, and of a bundle at fp32."""
    export_bundle(lm=TINY, out=tmp_path / "b", precision="int4")
    expected = answers(create("torch", open_source(tmp_path / "b"), context=300))
    np.testing.assert_array_equal(answers(direct(quantize="int4")), expected)
    export_bundle(lm=TINY, out=tmp_path / "wide", precision="fp32")
    chosen = EngineOptions(quantize="int4")
    found = create("torch", open_source(tmp_path / "wide"), context=300, options=chosen)
    np.testing.assert_array_equal(answers(found), expected)


@pytest.mark.parametrize("published", [True, False])
def test_a_prefix(published: bool, tmp_path: Path, base: Path) -> None:
    prefix = TINY / "ptuning_embed_pytorch_model.bin"
    if published:
        encoder = torch.load(prefix, weights_only=True)
        from safetensors.torch import load_file, save_file

        encoder = {
            key if key.startswith("transformer.") else f"transformer.{key}": value
            for key, value in encoder.items()
        }
        save_file(load_file(base / "model.safetensors") | encoder, base / "model.safetensors")
        engine: Engine = direct(base)
    else:
        export_bundle(lm=TINY, prefix=prefix, out=tmp_path / "b", precision="fp32")
        engine = create("torch", open_source(tmp_path / "b"), context=300)
    case = tensors("chatglm_tiny/case_prefix_embed.safetensors")
    recorded = load_json("chatglm_tiny/cases.json")["cases"]["prefix_embed"]["greedy"]
    for _ in range(2):  # the second prompt finds the prefix as the first did
        logits = engine.prefill(Prompt(case["input_ids"][0].tolist()))
        np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=TOLERANCE)
        assert greedy(engine, case["input_ids"][0].tolist(), len(recorded)) == recorded


@pytest.mark.parametrize(
    ("key", "bundle"),
    [
        ("transformer.layers.1.mlp.dense_h_to_4h.weight", False),
        ("transformer.layers.0.input_layernorm.weight", False),
        ("lm_head.weight", False),
        ("transformer.prefix_encoder.embedding.weight", False),
        ("transformer.layers.1.mlp.dense_h_to_4h.weight", True),
    ],
)
def test_numbers_that_float16_cannot_hold(
    key: str, bundle: bool, tmp_path: Path, base: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    prefix = torch.load(TINY / "ptuning_embed_pytorch_model.bin", weights_only=True)
    weights = load_file(base / "model.safetensors")
    weights |= {
        f"transformer.{k.removeprefix('transformer.')}": v.numpy() for k, v in prefix.items()
    }
    weights[key] = weights[key].copy()
    weights[key].flat[0] = 70_000
    save_file(weights, base / "model.safetensors")
    folder, name = base, key
    if bundle:
        export_bundle(lm=base, out=tmp_path / "b", precision="fp32")
        folder, name = tmp_path / "b", key.removeprefix("transformer.")
    with pytest.raises(CheckpointError, match=f"{folder}.*{name} holds numbers beyond 65504"):
        direct(folder, dtype="fp16")
    direct(folder, dtype="fp32").close()
    direct(folder, dtype="bf16").close()


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "least"), [("nf4", 0.9), ("fp4", 0.85), ("int8", 0.999)])
def test_bitsandbytes(kind: str, least: float) -> None:
    expected = answers(direct())
    engine = direct(quantize=kind)
    found = answers(engine)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least
    linears = {type(m).__name__ for m in engine._opened().modules() if "Linear" in type(m).__name__}
    assert linears == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}  # the head as well


@needs_bitsandbytes
def test_bundles_in_blocks_are_not_quantized_again(tmp_path: Path) -> None:
    export_bundle(lm=TINY, out=tmp_path / "b", precision="int4", block_size=32)
    chosen = EngineOptions(quantize="nf4")
    with pytest.raises(EngineError, match="int4 already"):
        create("torch", open_source(tmp_path / "b"), context=300, options=chosen)


def test_bf16_is_offered_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    found = answers(direct(dtype="bf16"))
    assert "bf16" in caplog.text
    assert np.corrcoef(found.ravel(), answers(direct()).ravel())[0, 1] > 0.999


def test_rounded_rotary_tables_are_the_published_ones() -> None:
    tables = tensors("rope/rope_tables.safetensors")
    at = tables["positions"]
    for head, name in ((128, "dim64"), (16, "dim8")):
        ours = rotary_tables(head, int(at.max()) + 1, rounded=True)[:, at]
        for part, which in zip(ours, ("cos", "sin"), strict=True):
            published = tables[f"{name}.{which}_fp16_path"][:, : head // 4]
            np.testing.assert_array_equal(part, published.astype(np.float32))
    rounded, exact = (answers(direct(rounded_rotary=r), "p8_long") for r in (True, False))
    assert 0 < np.abs(rounded - exact).max() < 0.5


def test_several_tokens_at_once_and_taken_back() -> None:
    engine, ids = direct(), ids_of("p1")
    engine.prefill(Prompt(ids))
    expected = np.stack([engine.step(t) for t in (7, 50, 9)])
    engine.prefill(Prompt(ids))
    np.testing.assert_allclose(engine.extend([7, 50, 9]), expected, rtol=0, atol=1e-5)
    engine.rewind(2)
    np.testing.assert_allclose(engine.step(50), expected[1], rtol=0, atol=1e-5)


def test_cancel_ends_a_call_between_layers() -> None:
    engine, ids = direct(), ids_of("p1")
    expected = answers(engine)
    layers = engine._opened().layers
    hook = layers[0].register_forward_hook(lambda *_: engine.cancel())
    beyond = layers[1].register_forward_hook(lambda *_: pytest.fail("it went on"))
    with pytest.raises(Cancelled):
        engine.prefill(Prompt(ids))
    hook.remove(), beyond.remove()
    engine.reset()
    np.testing.assert_array_equal(answers(engine), expected)


def test_the_cache_lives_as_long_as_an_answer() -> None:
    engine = direct()
    engine.prefill(Prompt(ids_of("p1")))
    engine.reset()
    assert engine._cache is None
    with pytest.raises(EngineError, match="before prefill"):
        engine.step(7)


def test_out_of_memory_says_what_to_do_and_the_engine_survives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = direct()
    expected = answers(engine)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def returned() -> None:
        alive.append(cache() is not None)

    hook = engine._opened().layers[-1].register_forward_pre_hook(full)
    engine._begin(Prompt(ids_of("p1")))
    assert engine._cache
    cache, alive = weakref.ref(engine._cache.keys[0]), []
    monkeypatch.setattr(engine, "_return_memory", returned)
    with pytest.raises(MemoryPlanError, match=r"2.00 GiB.*weights.*quantize") as e:
        engine.prefill(Prompt(ids_of("p1")))
    assert alive == [False]  # or there would be nothing to give back
    assert "\n" not in str(e.value)
    hook.remove()
    np.testing.assert_array_equal(answers(engine), expected)


def test_a_budget_that_is_too_small_is_refused_before_loading() -> None:
    with pytest.raises(MemoryPlanError, match=r"the budget is 1 MB: load it with"):
        direct(max_memory=1_000_000)


# GB at a context of 2048 without vision, which takes 0.6: the published figures are 13, 8 and 6
@pytest.mark.parametrize(
    ("precision", "quantize", "most"),
    [
        ("fp16", None, 13.9),
        ("int8", None, 8.4),
        ("int4", None, 4.9),
        ("fp16", "int4", 4.9),
        ("fp16", "nf4", 4.9),
    ],
)
def test_the_plan_of_the_published_model(precision: str, quantize: str | None, most: float) -> None:
    decoder = Decoder("d", "e", precision=precision, block_size=128 * (precision < "fp"))
    if precision.startswith("int"):
        decoder = Decoder("d", "e", precision=precision, block_size=128)
    manifest = Manifest("m", LMConfig(), decoder, TokenizerConfig(), "chatglm")
    plan = device_plan(manifest, context=2048, dtype_bytes=2, quantize=quantize)
    assert plan.total < most * 1e9, str(plan)
    assert plan.total > 0.8 * most * 1e9, str(plan)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'; expected one of fp16"),
        ({"quantize": "int3"}, "quantize is 'int3'; expected one of int4"),
    ],
)
def test_unknown_settings(chosen: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        direct(**chosen)


def test_devices_that_are_not_there() -> None:
    for name in ("cuda:99", "tpu"):
        with pytest.raises(EngineError, match=f"device '{name}' is not there"):
            create(
                "torch",
                open_source(TINY),
                context=20,
                options=EngineOptions(device=name),
            )


def test_the_command_line_offers_what_there_is() -> None:
    assert set(DTYPES) == set(precisions.DTYPES)
    assert tuple(QUANTIZATIONS) == precisions.QUANTIZATIONS


def test_a_dialogue_straight_from_published_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with sl.load(TINY, engine="torch", device="cpu", context=200) as model:
        expected = model.chat().ask("你好", max_new_tokens=8)
    command = ["ask", "你好", "--model", str(TINY), "--engine", "torch", "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "8", "--context", "200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == expected


def test_settings_of_the_torch_engine_go_with_it() -> None:
    with pytest.raises(SystemExit) as e:
        main(["ask", "你好", "--quantize", "int4"])
    assert e.value.code == 2
