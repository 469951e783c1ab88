"""Checkpoint files: every published form reads, tensor by tensor, and damage is named."""

import argparse
import gc
import gzip
import json
import os
import shutil
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from reference import data, load_json, tensors
from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import open_checkpoint, read_json
from seechat_weights.files.reading import LFS_POINTER

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A writable copy of the sharded .bin folder."""
    return Path(shutil.copytree(data("chatglm_bin"), tmp_path / "shards"))


def refused(path: Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    message = str(e.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_shards_hold_what_the_safetensors_file_holds() -> None:
    binary, safe = open_checkpoint(data("chatglm_bin")), open_checkpoint(data("chatglm_tiny"))
    assert binary.shapes.keys() == safe.shapes.keys()
    for key, (shape, dtype) in binary.shapes.items():
        found, expected = binary.read(key), safe.read(key)
        assert found.shape == expected.shape == shape == safe.shapes[key].shape
        assert found.dtype == dtype == ("float32" if "layernorm" in key else "float16")
        np.testing.assert_array_equal(found, expected)
    assert binary.source("lm_head.weight").name == "pytorch_model-00003-of-00003.bin"


@pytest.mark.parametrize("file", ["checkpoint_100.pth", "checkpoint_100_legacy_format.pth"])
def test_training_checkpoint(file: str) -> None:
    checkpoint = open_checkpoint(data(f"vision/{file}"))
    assert checkpoint.shapes["llama_proj.weight"] == ((64, 32), "float32")
    assert checkpoint.shapes["Qformer.bert.embeddings.position_ids"] == ((1, 512), "int64")
    assert len(checkpoint.shapes) == 6
    other = open_checkpoint(data("vision/checkpoint_100.pth"))
    for key in checkpoint.shapes:
        np.testing.assert_array_equal(checkpoint.read(key), other.read(key))


def test_wrapped_and_data_parallel_weights(tmp_path: Path) -> None:
    file = tmp_path / "epoch_3.pt"
    torch.save({"state_dict": {"module.a": torch.arange(3), "module.b": torch.ones(1)}}, file)
    checkpoint = open_checkpoint(file)
    assert list(checkpoint.shapes) == ["a", "b"]
    assert checkpoint.read("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_bfloat16_comes_as_float32(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    values = {"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    save_file(values, file) if suffix == ".safetensors" else torch.save(values, file)
    checkpoint = open_checkpoint(file)
    assert checkpoint.shapes["a"] == ((2,), "bfloat16")
    assert checkpoint.read("a").dtype == np.float32
    assert checkpoint.read("a").tolist() == [1.5, -2.0]


def test_dtype_that_numpy_lacks(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, file)
    with pytest.raises(CheckpointError, match=r"tensor a \(F8_E4M3\)"):
        open_checkpoint(file).read("a")


def test_safetensors_are_preferred(shards: Path) -> None:
    save_file({"a": torch.ones(1)}, shards / "model.safetensors")
    assert list(open_checkpoint(shards).shapes) == ["a"]


def test_shards_without_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    assert len(open_checkpoint(shards).shapes) == 43
    (shards / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin: missing"):
        open_checkpoint(shards)
    (shards / "pytorch_model-00003-of-00003.bin").unlink()
    (shards / "pytorch_model-00001-of-00003.bin").rename(shards / "pytorch_model-1-of-999999.bin")
    with pytest.raises(
        CheckpointError, match=r"model-000001-of-999999\.bin: missing or of another"
    ):
        open_checkpoint(shards)


def test_stale_total_size_is_not_believed(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["metadata"]["total_size"] = 13744473856
    (shards / INDEX).write_text(json.dumps(index))
    assert len(open_checkpoint(shards).shapes) == 43


def test_missing_shard(shards: Path) -> None:
    (shards / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.bin: missing; pytorch_model"):
        open_checkpoint(shards)


def test_index_names_what_its_shard_lacks(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["transformer.extra.weight"] = "pytorch_model-00001-of-00003.bin"
    (shards / INDEX).write_text(json.dumps(index))
    assert "00001-of-00003.bin: lacks tensor transformer.extra.weight" in refused(shards)


def test_tensor_in_two_shards(shards: Path) -> None:
    third = shards / "pytorch_model-00003-of-00003.bin"
    state = torch.load(third, weights_only=True)
    torch.save(state | {"transformer.word_embeddings.weight": torch.zeros(1)}, third)
    message = refused(shards)
    assert "tensor transformer.word_embeddings.weight is in pytorch_model-00001" in message
    assert "pytorch_model-00003" in message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"metadata": {}}', 'lacks "weight_map"'),
        ('{"weight_map": {"a": "../../secret.bin"}}', "refused"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_index(shards: Path, index: str, message: str) -> None:
    (shards / INDEX).write_text(index)
    assert message in refused(shards)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", INDEX])
def test_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS_POINTER + b"/spec/v1\noid sha256:00\nsize 1\n")
    assert "Git LFS pointer" in refused(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "vision/clip_hf/model.safetensors",
        "chatglm_bin/pytorch_model-00001-of-00003.bin",
        "vision/checkpoint_100_legacy_format.pth",
    ],
)
@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_truncated_file(tmp_path: Path, source: str, keep: float) -> None:
    whole = data(source).read_bytes()
    file = tmp_path / data(source).name
    file.write_bytes(whole[: int(len(whole) * keep)])
    message = refused(file)
    assert any(word in message for word in ("truncated", "empty", "not a checkpoint"))


@pytest.mark.parametrize("zipped", [True, False])
def test_unsafe_pickle_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "was run"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(marker),)

    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil()}, file, _use_new_zipfile_serialization=zipped)
    message = refused(file)
    assert "unsafe pickle, it calls" in message
    assert "mkdir" in message
    assert not marker.exists()


def test_what_a_training_script_saves_beside_the_weights(tmp_path: Path) -> None:
    """Optimizer, configuration objects and random states are stepped over, nothing is built."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    content = {
        "model": {"a": torch.ones(1)},
        "optimizer": optimizer.state_dict(),
        "config": argparse.Namespace(lr=1, out=Path("out"), dtype=torch.float16),
        "np_rng_state": np.random.get_state(),
        "counts": defaultdict(int, a=1),
    }
    for zipped in (True, False):
        file = tmp_path / f"last{zipped}.pt"
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        assert open_checkpoint(file).shapes == {"a": ((1,), "float32")}


def test_torchscript_is_read_without_its_code(tmp_path: Path) -> None:
    """As OpenAI's own CLIP files: tensors are attributes of nested modules."""
    file = tmp_path / "scripted.pt"
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3).half())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module[:1], torch.ones(1, 2)).save(str(file))
    checkpoint = open_checkpoint(file)
    assert checkpoint.shapes == {"0.weight": ((3, 2), "float32"), "0.bias": ((3,), "float32")}
    np.testing.assert_array_equal(checkpoint.read("0.weight"), module[0].weight.detach().numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_storage(tmp_path: Path, zipped: bool) -> None:
    """Slices, transposed and tied tensors, scalars and empty ones, of every dtype."""
    file = tmp_path / "views.pt"
    base = torch.arange(24).reshape(4, 6)
    values = {"all": base, "turned": base.T, "part": base[1:3, 2:5], "tied": base}
    values |= {"scalar": torch.tensor(3.5), "empty": torch.ones(0, 3), "flags": base > 3}
    values |= {str(d): base.to(d) for d in (torch.uint8, torch.int8, torch.int16, torch.int32)}
    torch.save(values, file, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(file)
    for key, value in values.items():
        np.testing.assert_array_equal(checkpoint.read(key), value.numpy())
        assert checkpoint.read(key).dtype == value.numpy().dtype


def test_a_read_tensor_can_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    torch.save({"a": torch.ones(2)}, file)
    before = file.read_bytes()
    array = open_checkpoint(file).read("a")
    torch.from_numpy(array).zero_()
    assert file.read_bytes() == before


def test_a_changed_byte_in_a_tensor(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    torch.save({"a": torch.full((64,), 1.5), "b": torch.zeros(2)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(b"\0\0\xc0\x3f" * 64) + 5] ^= 1
    file.write_bytes(content)
    checkpoint = open_checkpoint(file)
    assert checkpoint.read("b").tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds no tensors"), ({"model": {}}, "holds no tensors"), ({}, "holds no tensors")],
)
def test_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "a.pt"
    torch.save(content, file)
    assert message in refused(file)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("hello")
    assert "not a checkpoint" in refused(tmp_path / "a.bin")
    assert "no such file" in refused(tmp_path / "missing.bin")
    assert "not a checkpoint" in refused(tmp_path)  # the only file that could be
    (tmp_path / "a.bin").unlink()
    assert "looked for model.safetensors" in refused(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "found", "do"),
    [
        (b"GGUF\3\0\0\0" + bytes(40), "a GGUF file", "get the weights it was made from"),
        (b"ggml\1\0\0\0" + bytes(40), "a GGML file", "get the weights it was made from"),
        (b"\x08\x09\x12\x07pytorch" + bytes(40), "an ONNX graph", "get the weights"),
        (gzip.compress(bytes(99), mtime=0), "an archive", "unpack it"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "a web page", "log in"),
        (b'{"error": "Repository not found"}', "a text in JSON", "name the file"),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_what_is_taken_for_weights(
    tmp_path: Path, content: bytes, found: str, do: str, suffix: str
) -> None:
    file = tmp_path / f"pytorch_model{suffix}"
    file.write_bytes(content)
    message = refused(file)
    assert f"{file}: {found}" in message and do in message


def test_an_archive_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "chatglm-6b.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(data("chatglm_tiny/config.json"), "chatglm-6b/config.json")
    assert "an archive of chatglm-6b/config.json; expected" in refused(file)


def test_files_are_mapped_not_loaded(tmp_path: Path) -> None:
    """Opening and reading one tensor of two 64 MB shards costs about one tensor."""
    big = torch.ones(16, 1024, 1024)
    for i in (1, 2):
        state = {f"big{i}": big, f"small{i}": torch.ones(2)}
        torch.save(state, tmp_path / f"pytorch_model-{i:05}-of-00002.bin")
    del big, state
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("small2").tolist() == [1, 1]
    assert checkpoint.read("small1").tolist() == [1, 1]
    assert process.memory_info().rss - before < 40_000_000


def test_int8_reads_as_stored(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    torch.save({"q": torch.tensor([[-8, 7]], dtype=torch.int8)}, file)
    assert open_checkpoint(file).read("q").dtype == np.int8


def test_golden_index_is_that_of_the_fixture() -> None:
    index = load_json(f"chatglm_bin/{INDEX}")["weight_map"]
    assert index.keys() == tensors("chatglm_tiny/model.safetensors").keys()
