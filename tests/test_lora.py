"""PEFT's LoRA adapters: merged as they would act, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from networks import TorchEngine, chatglm_of
from reference import data, lm_error, random_array, tensors
from seechat_lite.prompt import Prompt
from seechat_weights.lm.chatglm import lm_shapes
from seechat_weights.lm.checkpoint import open_lm

TOLERANCE = 5e-4
TINY = data("chatglm_tiny")
PEFT = "base_model.model.transformer.layers"
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "fan_in_fan_out": False, "bias": "none"}


def adapter_state() -> dict[str, np.ndarray]:
    """Rank 4 on all four linears of two layers and on the head."""
    state = {}
    for ours, (outputs, inputs) in linears().items():
        if ours.startswith("layers.2"):
            continue
        module = f"base_model.model.transformer.{ours}" if "layers" in ours else PEFT[:17] + ours
        module = module.removesuffix(".weight")
        state[f"{module}.lora_A.weight"] = random_array(4, inputs) * 0.05
        state[f"{module}.lora_B.weight"] = random_array(outputs, 4) * 0.05
    return state


def linears() -> dict[str, tuple[int, ...]]:
    shapes = lm_shapes(open_lm(TINY).config)
    return {k: s for k, s in shapes.items() if len(s) == 2 and k != "word_embeddings.weight"}


def write_adapter(folder: Path, state: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_is_merged(tmp_path: Path, rslora: bool) -> None:
    state = adapter_state()
    lm = open_lm(TINY, adapter=write_adapter(tmp_path / "a", state, use_rslora=rslora))
    plain = open_lm(TINY)
    scaling = 32 / (2 if rslora else 4)
    for ours in lm.shapes:
        published = ours if ours == "lm_head.weight" else f"transformer.{ours}"
        module = f"base_model.model.{published.removesuffix('.weight')}"
        expected = plain.read(ours).astype(np.float32)
        if f"{module}.lora_A.weight" in state:
            a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
            expected = expected + scaling * b @ a
            assert lm.shapes[ours].dtype == "float32"
        np.testing.assert_allclose(lm.read(ours), expected, rtol=0, atol=1e-6)
        rows = np.array([3, 1])
        np.testing.assert_allclose(lm.read(ours, rows), expected[rows], rtol=0, atol=1e-6)


def test_a_merged_lora_answers_as_one_beside_the_network(tmp_path: Path) -> None:
    """Against torch's own forward with the low-rank branch beside each linear, as PEFT runs it."""
    state = adapter_state()
    lm = open_lm(TINY, adapter=write_adapter(tmp_path / "a", state))
    merged, beside = chatglm_of(lm), chatglm_of(open_lm(TINY))

    def branch(a: torch.Tensor, b: torch.Tensor) -> Any:
        return lambda module, inputs, output: output + inputs[0] @ a.T @ b.T * (32 / 4)

    for name in {k.partition(".lora_")[0] for k in state}:
        module = beside.get_submodule(
            name.removeprefix("base_model.model.").removeprefix("transformer.")
        )
        a, b = (torch.from_numpy(state[f"{name}.lora_{part}.weight"]) for part in "AB")
        module.register_forward_hook(branch(a, b))
    ids = tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist()
    expected = TorchEngine(beside).prefill(Prompt(ids))
    found = TorchEngine(merged).prefill(Prompt(ids))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(TorchEngine(chatglm_of(open_lm(TINY))).prefill(Prompt(ids)) - found).max() > 0.1


def test_a_lora_on_quantized_weights(tmp_path: Path) -> None:
    int4 = data("quantized/int4")
    lm = open_lm(int4, adapter=write_adapter(tmp_path / "a", adapter_state()))
    key = "layers.0.mlp.dense_h_to_4h.weight"
    assert lm.bits(key) == 0
    a, b = (adapter_state()[f"{PEFT}.0.mlp.dense_h_to_4h.lora_{p}.weight"] for p in "AB")
    expected = open_lm(int4).read(key) + 8 * b @ a
    np.testing.assert_allclose(lm.read(key), expected, rtol=0, atol=1e-6)
    assert lm.bits(key.replace("layers.0", "layers.2")) == 4


def test_biases_and_modules_to_save_are_taken(tmp_path: Path) -> None:
    bias, head = random_array(192), random_array(2432, 64)
    state = adapter_state() | {
        f"{PEFT}.1.attention.query_key_value.bias": bias,
        f"{PEFT}.1.attention.dense.base_layer.bias": bias[:64],
        "base_model.model.lm_head.modules_to_save.default.weight": head,
    }
    for part in "AB":
        state.pop(f"base_model.model.lm_head.lora_{part}.weight")
    lm = open_lm(TINY, adapter=write_adapter(tmp_path / "a", state, bias="lora_only"))
    np.testing.assert_array_equal(lm.read("layers.1.attention.query_key_value.bias"), bias)
    np.testing.assert_array_equal(lm.read("layers.1.attention.dense.bias"), bias[:64])
    np.testing.assert_array_equal(lm.read("lm_head.weight"), head)
    reason = "replaced by the one in adapter_model.safetensors"
    assert lm.ignored["lm"]["lm_head.weight"] == reason
    assert [f.name for f in lm.sources["adapter"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is PREFIX_TUNING; expected plain LoRA"),
        ({"use_dora": True}, "use_dora is True; expected plain LoRA: merge the adapter with PEFT"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens is \[5, 6\]"),
        ({"enable_lora": [True, False, True]}, "enable_lora is"),
        ({"init_lora_weights": "pissa_niter_16"}, "which may change the base weights as well"),
        ({"alpha_pattern": {".*dense": 5}}, "alpha_pattern is .* not names of modules"),
        ({"alpha_pattern": [5]}, "alpha_pattern is .* not names of modules"),
        ({"lora_alpha": None}, "lora_alpha of .* is None"),
        ({"alpha_pattern": {"dense": "5"}}, "lora_alpha of .*dense is '5'"),
        ({"r": 8}, "have rank 4, expected r = 8 of adapter_config.json"),
    ],
)
def test_refused_adapter_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    adapter = write_adapter(tmp_path / "a", adapter_state(), **settings)
    assert re.search(message, lm_error(TINY, adapter=adapter))


def test_refused_adapter_tensors(tmp_path: Path) -> None:
    state, key = adapter_state(), f"{PEFT}.0.attention.dense.lora_B.weight"
    a = key.replace("lora_B", "lora_A")
    missing = {k: v for k, v in state.items() if k != key}
    message = lm_error(TINY, adapter=write_adapter(tmp_path / "a", missing))
    assert f"1 missing ({a} (its lora_B))" in message
    surplus = state | {f"{PEFT}.3.attention.dense.lora_A.weight": random_array(4, 64)}
    message = lm_error(TINY, adapter=write_adapter(tmp_path / "a", surplus))
    assert f"1 not known ({PEFT}.3.attention.dense.lora_A.weight)" in message
    message = lm_error(
        TINY, adapter=write_adapter(tmp_path / "a", state | {key: random_array(63, 4)})
    )
    assert f"{key} is [63, 4] instead of [64, 4]" in message
    embedding = "base_model.model.transformer.word_embeddings.lora_embedding_A"
    surplus = state | {embedding: random_array(4, 2432)}
    message = lm_error(TINY, adapter=write_adapter(tmp_path / "a", surplus))
    assert f"1 not known ({embedding})" in message and "merge the adapter with PEFT" in message
    assert "no PEFT adapter" in lm_error(TINY, adapter=TINY)


def test_patterns_of_ranks_and_alphas(tmp_path: Path) -> None:
    state, module = adapter_state(), f"{PEFT}.0.attention.dense"
    state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = (
        random_array(2, 64),
        random_array(64, 2),
    )
    # a name, its end, or its whole: the first that fits counts
    for pattern in ("dense", "layers.0.attention.dense", "^transformer.layers.0.attention.dense"):
        patterns = {"^layers.0.attention.dense": 9, "attention": 8, pattern: 6, "dense": 6}
        settings = {"rank_pattern": {pattern: 2}, "alpha_pattern": patterns}
        lm = open_lm(TINY, adapter=write_adapter(tmp_path / "a", state, **settings))
        key = "layers.0.attention.dense.weight"
        expected = open_lm(TINY).read(key) + 6 / 2 * random_array(64, 2) @ random_array(2, 64)
        np.testing.assert_allclose(lm.read(key), expected, rtol=0, atol=1e-5)
