"""Numbers that no trained model has are named, whoever reads them; those of real models pass."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import seechat_lite as sl
from reference import data, random_array
from seechat_export.export import export_bundle
from seechat_lite.nn.vision import streamed
from seechat_weights.errors import CheckpointError, SeechatError
from seechat_weights.files import audit
from seechat_weights.files.audit import Place
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.vision.weights import load_clip

PLACE = Place(Path("folder/weights.bin"), "layers.0.weight")
DTYPES = ("float16", "float32", "float64")


def refused(check: Any, array: np.ndarray, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=r"weights\.bin: tensor layers\.0\.weight") as e:
        check(array, PLACE, **options)
    return str(e.value)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_one_wrong_number_anywhere(dtype: str, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(7,), (3, 700), (1, 1), (2, 3, 4, 5)]))
    array = random_array(*shape).astype(dtype)
    audit.check_numbers(array, PLACE)
    at = data.draw(st.integers(0, array.size - 1))
    wrong = data.draw(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]))
    array.flat[at] = wrong
    said = refused(audit.check_numbers, array)
    index = [int(i) for i in np.unravel_index(at, shape)]
    assert f"(1 of {array.size}, the first at {index})" in said
    assert ("NaN" if np.isnan(wrong) else "infinities") in said
    audit.check_numbers(np.where(np.isfinite(array), array, array.dtype.type(1)), PLACE)


def test_numbers_as_large_and_small_as_there_are() -> None:
    for dtype in DTYPES:
        limits = np.finfo(dtype)
        values = np.array([limits.max, -limits.max, limits.tiny, limits.smallest_subnormal, 0.0])
        audit.check_numbers(values.astype(dtype), PLACE)
        assert not audit.is_nothing(values.astype(dtype))
    audit.check_numbers(np.arange(9), PLACE)


def test_float16_that_overflowed() -> None:
    audit.check_half(np.array([65504, -65504], np.float16), PLACE)
    with np.errstate(over="ignore"):
        array = np.array([1.0, -70000.0]).astype(np.float16)
    assert "beyond 65504 (1 of 2, the first at [1])" in refused(audit.check_half, array)


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_matrices(dtype: str) -> None:
    array = (random_array(300, 1000) * 30).astype(dtype)
    array[array == 0] = 1
    audit.check_matrix(array, PLACE)
    assert "is all zeros" in refused(audit.check_matrix, np.zeros_like(array))
    array[200:] = 0  # the end of a download
    assert "zeros one after another, from row 20" in refused(audit.check_matrix, array)


def test_a_small_matrix_of_which_a_fourth_is_missing() -> None:
    array = random_array(64, 64)
    array[40:] = 0
    assert "zeros one after another, from row 40 of 64" in refused(audit.check_matrix, array)


@given(st.integers(0, 2_000_000), st.integers(70_000, 2_000_000))
def test_a_hole_anywhere(start: int, length: int) -> None:
    """At least a piece of a download, in bytes, across the parts that are looked at."""
    array = HOLED
    before = array.flat[start : start + length // 2].copy()
    array.flat[start : start + length // 2] = 0
    try:
        assert "zeros one after another" in refused(audit.check_matrix, array)
    finally:
        array.flat[start : start + length // 2] = before


HOLED = np.ones((3000, 1000), np.float16)


def test_what_pruning_leaves_is_only_told(caplog: pytest.LogCaptureFixture) -> None:
    array = random_array(4096, 1024).astype(np.float16)
    array[np.random.default_rng(0).random(array.shape) < 0.5] = 0
    audit.check_matrix(array, PLACE)
    assert not caplog.messages
    array[[5, 700, 701, 3000]] = 0
    with caplog.at_level(logging.WARNING):
        audit.check_matrix(array, PLACE)
    assert "rows of zeros (about 4 of 4096)" in caplog.text


def test_gains() -> None:
    audit.check_gains(np.array([0, 0, 1.0, 1.0]), PLACE)
    assert "3 zeros of 4" in refused(audit.check_gains, np.array([0, 0, 0, 1.0]))
    assert "is all zeros" in refused(audit.check_gains, np.zeros(4))
    assert "nothing above 1e-20" in refused(audit.check_gains, np.full(4, 1e-30))


def test_tables() -> None:
    table = random_array(4000, 32).astype(np.float16)
    table[3800:] = 0  # padding of the vocabulary
    table[[3, 500, 501]] = 0  # tokens that training never met
    audit.check_table(table, PLACE)
    table[:900] = 0  # image tokens of the old vocabulary
    audit.check_table(table, PLACE, unused=900)
    assert "has 900 rows of zeros, from 0" in refused(audit.check_table, table)
    table[2000:2100] = 0
    assert "has 100 rows of zeros, from 2000" in refused(audit.check_table, table, unused=900)
    half = random_array(4000, 32)
    half[2000:] = 0
    assert "has 2000 rows of zeros, from 2000 of 4000" in refused(audit.check_table, half)
    assert "rows of zeros" in refused(audit.check_table, np.zeros((4000, 32)))


@pytest.mark.parametrize("end", [".aria2", ".part", ".crdownload"])
def test_an_unfinished_download_is_named(tmp_path: Path, end: str) -> None:
    (tmp_path / f"w.bin{end}").touch()
    with pytest.raises(CheckpointError, match=rf"w\.bin{end} lies beside it, so let that"):
        audit.check_matrix(np.zeros((9, 9)), Place(tmp_path / "w.bin", "a"))


# --- whoever reads them


def spoil(file: Path, key: str, change: Any) -> None:
    tensors = load_file(file)
    tensors[key] = tensors[key].copy()
    change(tensors[key])
    save_file(tensors, file)


def a_nan(array: np.ndarray) -> None:
    array.flat[array.size // 2] = np.nan


def an_infinity(array: np.ndarray) -> None:
    array.flat[-1] = -np.inf


def zeros(array: np.ndarray) -> None:
    array[:] = 0


LAYER = "transformer.layers.1."
SPOILED = [
    *((f"{LAYER}{name}", change) for name in (
        "mlp.dense_4h_to_h.weight", "attention.query_key_value.weight",
        "input_layernorm.weight",
    ) for change in (a_nan, an_infinity, zeros)),
    *((f"{LAYER}{name}", a_nan) for name in ("mlp.dense_4h_to_h.bias", "input_layernorm.bias")),
    *((name, change) for name in ("transformer.word_embeddings.weight", "lm_head.weight")
      for change in (a_nan, zeros)),
    ("transformer.final_layernorm.weight", zeros),
]  # fmt: skip


@pytest.mark.parametrize(("key", "change"), SPOILED, ids=lambda v: getattr(v, "__name__", v))
def test_a_spoiled_base(base: Path, tmp_path: Path, key: str, change: Any) -> None:
    """Neither exported nor run as it is; nothing is left of the export."""
    spoil(base / "model.safetensors", key, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {key} ") as e:
        export_bundle(lm=base, out=tmp_path / "b", precision="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    with pytest.raises(SeechatError) as run:
        sl.load(base, engine="torch", device="cpu", context=64)
    assert str(run.value) == str(e.value)


def test_biases_may_be_zeros(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors = {k: np.zeros_like(v) if "bias" in k else v for k, v in tensors.items()}
    save_file(tensors, base / "model.safetensors")
    export_bundle(lm=base, out=tmp_path / "b", precision="int4")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("key", [f"{LAYER}mlp.dense_4h_to_h.weight", "lm_head.weight",
                                 "transformer.word_embeddings.weight"])  # fmt: skip
def test_what_float16_cannot_hold(base: Path, tmp_path: Path, dtype: Any, key: str) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[key] = tensors[key].astype(np.float32)
    tensors[key][0, 0] = 1e5
    save_file(tensors | {key: tensors[key].astype(dtype)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {key} holds numbers beyond 65504"):
        export_bundle(lm=base, out=tmp_path / "b", precision="fp16")
    export_bundle(lm=base, out=tmp_path / "c", precision="fp32")


def adapter(folder: Path, change: dict[str, Any]) -> Path:
    folder.mkdir()
    name = "base_model.model.transformer.layers.%d.attention.query_key_value.lora_%s.weight"
    state = {}
    for i in range(2):
        state |= {name % (i, "A"): random_array(4, 64), name % (i, "B"): random_array(192, 4)}
    for key in state:
        for part, spoiled in change.items():
            if part in key:
                spoiled(state[key])
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_adapters(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_lm(base, adapter=adapter(tmp_path / "a", {}))
    for i, (part, change, said) in enumerate((
        ("lora_B", zeros, "changes nothing: of all its 2 products"),
        ("lora_A", zeros, "changes nothing"),
        ("1.attention.query_key_value.lora_B", a_nan, "lora_B.weight holds NaN"),
    )):  # fmt: skip
        with pytest.raises(CheckpointError, match=said):
            open_lm(base, adapter=adapter(tmp_path / f"b{i}", {part: change}))
    with caplog.at_level(logging.WARNING):
        open_lm(base, adapter=adapter(tmp_path / "c", {"layers.0.attention": zeros}))
    assert "1 of its 2 products change nothing" in caplog.text


@pytest.mark.parametrize(("change", "said"), [(zeros, "a prefix of zeros"), (a_nan, "holds NaN")])
def test_prefixes(tmp_path: Path, change: Any, said: str) -> None:
    array = random_array(8, 384)
    change(array)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.from_numpy(array)}, file)
    with pytest.raises(CheckpointError, match=f"prefix_encoder.embedding.weight .*{said}"):
        open_lm(data("chatglm_tiny"), prefix=file)


@pytest.mark.parametrize("change", [zeros, a_nan])
@pytest.mark.parametrize("part", ["projector", "tower", "norm"])
def test_vision(tmp_path: Path, part: str, change: Any) -> None:
    """When the network runs, for an export or without one."""
    shutil.copytree(data("vision/clip_open_clip"), tmp_path / "clip")
    projector = tmp_path / "projector.bin"
    shutil.copy(data("vision/mm_projector_linear.bin"), projector)
    tower = tmp_path / "clip/open_clip_model.safetensors"
    file = projector if part == "projector" else tower
    state = load_file(file) if file == tower else torch.load(file)
    end = {"projector": "weight", "tower": ".0.mlp.c_fc.weight", "norm": ".0.ln_1.weight"}[part]
    key = next(k for k in state if k.endswith(end) and not k.startswith("transformer"))
    change(np.asarray(state[key]))
    if file == tower:
        save_file(state, file)
    else:
        torch.save(state, file)
    vision = load_clip(clip=tmp_path / "clip", projector=projector)
    side = vision.config.pixels.image_size
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor {key} "):
        streamed(vision)(torch.zeros(1, 3, side, side))
