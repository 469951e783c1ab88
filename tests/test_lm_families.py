"""The LM of SEEChat's checkpoint_N.pth and of VisualGLM-6B in both its forms."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from reference import (
    data,
    lm_error,
    random_array,
)
from seechat_export.export import export_bundle
from seechat_weights.lm.checkpoint import SAT_CONFIG, SAT_FILE, open_lm

TINY = data("chatglm_tiny")


def save_checkpoint(path: Path, state: dict[str, np.ndarray]) -> Path:
    """A file such as SEEChat's training writes."""
    tensors_ = {k: torch.from_numpy(v) for k, v in state.items()}
    torch.save({"model": tensors_, "optimizer": {}, "config": {}, "scaler": None, "epoch": 0}, path)
    return path


@pytest.mark.parametrize("file", ["checkpoint_100.pth", "checkpoint_trainable_qformer.pth"])
def test_checkpoints_without_lm_change_nothing(file: str) -> None:
    plain, lm = open_lm(TINY), open_lm(TINY, checkpoint=data(f"vision/{file}"))
    for key in lm.shapes:
        np.testing.assert_array_equal(lm.read(key), plain.read(key))
    assert set(lm.ignored["checkpoint"].values()) == {"computed from the head size"}
    assert len(lm.ignored["checkpoint"]) == 3


def test_a_checkpoint_is_laid_over_the_base(tmp_path: Path) -> None:
    """A norm, a linear and a prefix of the checkpoint; all else, the head included, of the base."""
    encoder = "llama_model.transformer.prefix_encoder."
    state = {
        "llama_model.transformer.layers.1.input_layernorm.weight": random_array(64),
        "llama_model.transformer.word_embeddings.weight": random_array(2432, 64),
        f"{encoder}embedding.weight": random_array(8, 384),
        "llama_proj.weight": random_array(64, 32),
    }
    file = save_checkpoint(tmp_path / "checkpoint_3.pth", state)
    lm, plain = open_lm(TINY, checkpoint=file), open_lm(TINY)
    for key in lm.shapes:
        expected = state.get(f"llama_model.transformer.{key}")
        expected = plain.read(key) if expected is None else expected
        np.testing.assert_array_equal(lm.read(key), expected)
    expected = random_array(8, 384).reshape(8, 3, 2, 4, 16).transpose(1, 2, 3, 0, 4)
    np.testing.assert_array_equal(lm.prefix, expected)
    replaced = {k for k, why in lm.ignored["lm"].items() if why.startswith("replaced")}
    assert replaced == {
        "transformer.layers.1.input_layernorm.weight",
        "transformer.word_embeddings.weight",
    }
    assert lm.sources["checkpoint"] == [file]
    tuned = TINY / "ptuning_proj_pytorch_model.bin"
    lm = open_lm(TINY, checkpoint=file, prefix=tuned)
    assert f"{encoder}embedding.weight" in lm.ignored["checkpoint"]


def test_a_tied_head_stays_the_bases_own(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors")
    words = "transformer.word_embeddings.weight"
    file = save_checkpoint(tmp_path / "c.pth", {f"llama_model.{words}": random_array(2432, 64)})
    lm = open_lm(base, checkpoint=file)
    np.testing.assert_array_equal(lm.read("lm_head.weight"), weights[words])
    np.testing.assert_array_equal(lm.read("word_embeddings.weight"), random_array(2432, 64))
    assert words not in lm.ignored["lm"]


def test_refused_checkpoints(tmp_path: Path) -> None:
    key = "llama_model.transformer.layers.0.attention.dense.bias"

    def message(state: dict[str, np.ndarray]) -> str:
        return lm_error(TINY, checkpoint=save_checkpoint(tmp_path / "c.pth", state))

    assert f"{key} is [65] instead of [64]" in message({key: random_array(65)})
    other = "llama_model.model.layers.0.self_attn.q_proj.weight"  # SEEChat's Vicuna branch
    assert f"1 not known ({other})" in message({key: random_array(64), other: random_array(64, 64)})
    assert "1 not known (surprise.weight)" in message(
        {key: random_array(64), "surprise.weight": random_array(1)}
    )


def to_sat(state: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """A Hugging Face checkpoint under SAT's names and with its rows of query_key_value."""
    sat = {}
    for key, value in state.items():
        if key.endswith("inv_freq"):
            sat["mixins.chatglm-attn.rotary_emb.inv_freq"] = value
        elif key == "lm_head.weight":
            sat["mixins.chatglm-final.lm_head.weight"] = value
        elif "query_key_value" in key:
            by_head = value.reshape(heads, 3, -1, *value.shape[1:])
            sat[key] = np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(value.shape)
        else:
            sat[key] = value
    return sat


@pytest.fixture
def write_sat(tmp_path: Path) -> Callable[[dict[str, np.ndarray]], Path]:
    def write(state: dict[str, np.ndarray]) -> Path:
        # a file that may be mapped is not written again
        folder = tmp_path / f"visualglm-6b-{len(list(tmp_path.iterdir()))}"
        (folder / "1").mkdir(parents=True)
        (folder / "latest").write_text("1")
        config = json.loads((TINY / "config.json").read_text())
        kept = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
        kept += ("max_sequence_length", "inner_hidden_size", "eos_token_id", "pad_token_id")
        kept += ("bos_token_id", "mask_token_id", "gmask_token_id")
        settings = {"model_class": "VisualGLMModel", "layernorm_order": "post", "pre_seq_len": 128}
        settings |= {name: config[name] for name in kept}
        (folder / SAT_CONFIG).write_text(json.dumps(settings))
        module = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()}
        torch.save({"module": module, "iteration": 1}, folder / "1" / SAT_FILE)
        return folder

    return write


def published() -> dict[str, np.ndarray]:
    return load_file(TINY / "model.safetensors")


def test_sat_holds_the_same_model(write_sat: Callable[..., Path]) -> None:
    sat = to_sat(published(), heads=4)
    vision = {"mixins.eva.model.glm_proj.weight": random_array(64, 32)}
    position = {"transformer.position_embeddings.weight": random_array(256, 64)}
    folder = write_sat(sat | vision | position)
    plain = open_lm(TINY)
    for path in (folder, folder / "1", folder / "1" / SAT_FILE):
        lm = open_lm(path)
        assert lm.config == plain.config
        assert lm.shapes == plain.shapes
        for key in lm.shapes:
            np.testing.assert_array_equal(lm.read(key), plain.read(key))
            np.testing.assert_array_equal(lm.read(key, slice(5, 40)), plain.read(key)[5:40])
        assert lm.vision_keys == {"lm": list(vision)}
        assert set(lm.ignored["lm"]) == {*position, "mixins.chatglm-attn.rotary_emb.inv_freq"}
        assert (lm.conversation, lm.tokenizer) == ("visualglm", folder / "ice_text.model")


def test_sat_exports_to_the_same_bundle(write_sat: Callable[..., Path], tmp_path: Path) -> None:
    sat = write_sat(to_sat(published(), heads=4))
    options = {"tokenizer": TINY / "ice_text.model", "precision": "int4"}
    of_sat = export_bundle(lm=sat, out=tmp_path / "sat", **options)
    of_folder = export_bundle(lm=TINY, out=tmp_path / "folder", **options)
    for name in ("decoder.onnx", "decoder.onnx.data", "embeddings.bin", "ice_text.model"):
        assert of_sat.files[name] == of_folder.files[name]
    assert of_sat.lm == of_folder.lm


def test_sat_lora(write_sat: Callable[..., Path]) -> None:
    """On query_key_value in three parts and on dense, of the layers a fine-tuning chose."""
    state, layer = to_sat(published(), heads=4), "transformer.layers.2.attention"
    expected = dict(state)
    for module, parts in (("query_key_value", 3), ("dense", 1)):
        for kind in ("weight", "bias"):
            state[f"{layer}.{module}.original.{kind}"] = state.pop(f"{layer}.{module}.{kind}")
        deltas = []
        for i in range(parts):
            a, b = random_array(2, 64, seed=i), random_array(64, 2, seed=i)
            state[f"{layer}.{module}.matrix_A.{i}"] = a
            state[f"{layer}.{module}.matrix_B.{i}"] = b
            deltas.append(b @ a / 2)
        key = f"{layer}.{module}.weight"
        expected[key] = expected[key] + np.concatenate(deltas)
    lm = open_lm(write_sat(state))
    merged = {key: lm.read(key) for key in lm.shapes}
    rows = lm.read("layers.2.attention.query_key_value.weight", slice(10, 99))
    unmerged = open_lm(write_sat(expected))
    for key, value in merged.items():
        np.testing.assert_allclose(value, unmerged.read(key), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(rows, merged["layers.2.attention.query_key_value.weight"][10:99])

    del state[f"{layer}.query_key_value.matrix_B.1"]
    assert f"1 missing ({layer}.query_key_value.matrix_B.1)" in lm_error(write_sat(state))
    state[f"{layer}.query_key_value.matrix_B.1"] = random_array(60, 2)
    assert f"{layer}.query_key_value.matrix_B.1 is [60, 2] instead of [64, 2]" in lm_error(
        write_sat(state)
    )


def test_sat_ptuning(write_sat: Callable[..., Path]) -> None:
    state = to_sat(published(), heads=4)
    for i in range(3):
        state[f"mixins.ptuning.prefix.{i}"] = random_array(2, 4, 5, 16, seed=i)
    lm = open_lm(write_sat(state))
    expected = np.stack([random_array(2, 4, 5, 16, seed=i) for i in range(3)])
    np.testing.assert_array_equal(lm.prefix, expected)
    del state["mixins.ptuning.prefix.1"]
    assert "1 missing (mixins.ptuning.prefix.1)" in lm_error(write_sat(state))


def test_refused_sat_folders(write_sat: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_sat(to_sat(published(), heads=4))
    (folder / "1" / "mp_rank_01_model_states.pt").write_bytes(b"")
    assert "split over several files" in lm_error(folder)
    (folder / "1" / "mp_rank_01_model_states.pt").unlink()
    shutil.copytree(folder / "1", folder / "2")
    (folder / "latest").write_text("2")
    assert open_lm(folder).sources["lm"] == [folder / "2" / SAT_FILE]
    (folder / "latest").unlink()
    assert "holds 2 mp_rank_00_model_states.pt" in lm_error(folder)
    assert "no such folder" in lm_error(tmp_path / "nowhere")
    assert "holds no config.json" in lm_error(data("images"))
    assert open_lm(TINY / "model.safetensors").shapes == open_lm(TINY).shapes  # config.json beside
    shutil.copy(TINY / "model.safetensors", tmp_path / "alone.safetensors")
    assert "one file, not by SAT" in lm_error(tmp_path / "alone.safetensors")
    settings = json.loads((folder / SAT_CONFIG).read_text()) | {"layernorm_order": "pre"}
    (folder / SAT_CONFIG).write_text(json.dumps(settings))
    assert "layernorm_order is 'pre'" in lm_error(folder / "2" / SAT_FILE)


def test_visualglm_folder(base: Path) -> None:
    vision = {"image_encoder.glm_proj.weight": random_array(64, 32)}
    save_file(load_file(base / "model.safetensors") | vision, base / "model.safetensors")
    lm = open_lm(base)
    assert lm.vision_keys == {"lm": list(vision)}
    assert lm.conversation == "visualglm"
    assert len(lm.shapes) == len(open_lm(TINY).shapes)
