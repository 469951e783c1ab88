"""The LM of quantized and P-tuned checkpoints: the reference's own answers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from networks import TorchEngine, chatglm_of
from reference import data, greedy, lm_error, load_json, tensors
from seechat_lite.prompt import Prompt
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.quantized import Quantized, pack

TOLERANCE = 5e-4
QUANTIZED = ["int8", "int4", "int4-qe"]
TINY = data("chatglm_tiny")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_integers_are_unpacked_as_the_reference_does() -> None:
    matrices = tensors("quantized/matrices.safetensors")
    names = [k.removesuffix(".unpacked") for k in matrices if k.endswith(".unpacked")]
    assert len(names) >= 16
    for name in names:
        stored, bits = matrices[f"{name}.weight"], int(name[-1])
        scales = matrices[f"{name}.weight_scale"].astype(np.float32)
        weight = Quantized(stored, scales, bits)
        np.testing.assert_array_equal(weight.codes, matrices[f"{name}.unpacked"])
        np.testing.assert_array_equal(weight.dequantized(), matrices[f"{name}.dequant_f32"])
        np.testing.assert_array_equal(pack(weight.codes, bits=bits), stored)


@pytest.mark.parametrize("form", QUANTIZED)
def test_quantized_reference(form: str) -> None:
    lm = open_lm(data(f"quantized/{form}"))
    assert lm.read("layers.1.mlp.dense_4h_to_h.weight").shape == (64, 256)
    engine = TorchEngine(chatglm_of(lm))
    for name, recorded in load_json(f"quantized/{form}/cases.json")["cases"].items():
        case = tensors(f"quantized/{form}/case_{name}.safetensors")
        ids = case["input_ids"][0].tolist()
        logits = engine.prefill(Prompt(ids))
        np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=TOLERANCE)
        assert greedy(engine, ids, 24) == recorded["greedy"]


@pytest.mark.parametrize("form", QUANTIZED)
def test_rows_are_those_of_the_whole(form: str) -> None:
    lm = open_lm(data(f"quantized/{form}"))
    rows = np.array([5, 0, 63])
    for key, (_, dtype) in lm.shapes.items():
        whole = lm.read(key)
        assert whole.dtype == dtype
        np.testing.assert_array_equal(lm.read(key, rows), whole[rows])
        np.testing.assert_array_equal(lm.read(key, slice(7, 9)), whole[7:9])
        bits = lm.bits(key)
        expected = re.search(r"(query_key_value|dense\w*)\.weight$", key) is not None
        if form == "int4-qe":
            expected |= key in ("word_embeddings.weight", "lm_head.weight")
        assert bits == (0 if not expected else 8 if form == "int8" else 4)
        if expected:
            np.testing.assert_array_equal(lm.quantized(key).dequantized(), whole)


@pytest.fixture(params=["embed", "proj"])
def tuned(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A P-tuning run's folder, as the published script leaves it."""
    folder = tmp_path / "checkpoint-3000"
    folder.mkdir()
    weights = TINY / f"ptuning_{request.param}_pytorch_model.bin"
    shutil.copy(weights, folder / "pytorch_model.bin")
    shutil.copy(TINY / "config.json", folder)
    edit_config(folder, pre_seq_len=8, prefix_projection=request.param == "proj")
    return request.param, folder


def test_prefix_reference(tuned: tuple[str, Path]) -> None:
    name, folder = tuned
    lm = open_lm(TINY, prefix=folder)
    case = tensors(f"chatglm_tiny/case_prefix_{name}.safetensors")
    assert lm.prefix is not None and lm.prefix.shape == (3, 2, 4, 8, 16)
    for layer in range(3):
        for i, kind in enumerate(("key", "value")):
            expected = case[f"prompt_past.{layer}.{kind}"][:, 0].swapaxes(0, 1)
            np.testing.assert_allclose(lm.prefix[layer, i], expected, rtol=0, atol=1e-5)
    ids = case["input_ids"][0].tolist()
    engine = TorchEngine(chatglm_of(lm), lm.prefix)
    logits = engine.prefill(Prompt(ids))
    np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=TOLERANCE)
    assert engine.cache is not None
    found = engine.cache.keys[2][:, :, : engine.cache.length - 1].permute(2, 0, 1, 3)
    published = case["prefill.past.2.key"][: len(found)]
    np.testing.assert_allclose(found, published, rtol=0, atol=TOLERANCE)
    recorded = load_json("chatglm_tiny/cases.json")["cases"][f"prefix_{name}"]["greedy"]
    assert greedy(engine, ids, 24) == recorded
    single = open_lm(TINY, prefix=folder / "pytorch_model.bin").prefix
    np.testing.assert_array_equal(single, lm.prefix)


def test_prefix_before_pictures() -> None:
    lm = open_lm(TINY, prefix=TINY / "ptuning_embed_pytorch_model.bin")
    case = tensors("chatglm_tiny/case_seechat_embeds_prefix.safetensors")
    ids = case["input_ids"][0].tolist()
    start, end = ids.index(0), len(ids) - ids[::-1].index(0)
    prompt = Prompt(ids, [(start, case["inputs_embeds"][0, start:end])])
    engine = TorchEngine(chatglm_of(lm), lm.prefix)
    logits = engine.prefill(prompt)
    np.testing.assert_allclose(logits, case["logits_last"][0], rtol=0, atol=TOLERANCE)
    found = []
    for _ in range(24):
        found.append(int(logits.argmax()))
        logits = engine.step(found[-1])
    cases = load_json("chatglm_tiny/cases.json")["cases"]
    assert found == cases["seechat_embeds_prefix"]["greedy"]


def test_a_prefix_inside_a_whole_checkpoint(base: Path, tuned: tuple[str, Path]) -> None:
    name, folder = tuned
    alone = open_lm(TINY, prefix=folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights = load_file(base / "model.safetensors") | {k: v.numpy() for k, v in state.items()}
    save_file(weights, base / "model.safetensors")
    edit_config(base, pre_seq_len=8, prefix_projection=name == "proj")
    lm = open_lm(base)
    np.testing.assert_array_equal(lm.prefix, alone.prefix)
    other = TINY / "ptuning_embed_pytorch_model.bin"
    lm = open_lm(base, prefix=other)  # the one that is asked for counts
    np.testing.assert_array_equal(lm.prefix, open_lm(TINY, prefix=other).prefix)
    for key in state:
        assert lm.ignored["lm"][key] == f"the prefix in {other} takes its place"
    assert lm.sources["prefix"] == [other]


def test_refused_prefixes(base: Path, tuned: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = tuned
    key = "transformer.prefix_encoder.embedding.weight"
    edit_config(folder, pre_seq_len=9)
    assert f"{key} is [8, " in lm_error(TINY, prefix=folder)
    assert "pre_seq_len in config.json is 9" in lm_error(TINY, prefix=folder)
    edit_config(folder, pre_seq_len=8)
    edit_config(base, pre_seq_len=8)  # and no weights of one
    assert "a P-tuning prefix of 8 tokens belongs to it, and none is there" in lm_error(base)
    assert open_lm(base, prefix=folder).prefix is not None

    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    wrong = tmp_path / "wrong.bin"
    torch.save(state | {key: state[key][:, :-1].clone()}, wrong)
    width = state[key].shape[1]
    message = lm_error(TINY, prefix=wrong)
    assert f"{key} is [8, {width - 1}] instead of [8, {width}]" in message
    torch.save(state | {"transformer.word_embeddings.weight": torch.zeros(1)}, wrong)
    assert "1 not known (transformer.word_embeddings.weight)" in lm_error(TINY, prefix=wrong)
    assert "holds no P-tuning prefix" in lm_error(TINY, prefix=TINY / "model.safetensors")
