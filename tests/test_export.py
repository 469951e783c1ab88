"""Export: what is written, what is refused, and what an interruption leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reference import data
from seechat_export import export, plan, quantize
from seechat_export.export import export_bundle
from seechat_export.plan import ExportPlan
from seechat_lite.nn.block_quantization import dequantize_blocks, quantize_blocks
from seechat_weights.bundle.layout import head_order, inverse_order, reordered
from seechat_weights.bundle.manifest import read_manifest, verify_hashes
from seechat_weights.config import LMConfig
from seechat_weights.errors import (
    BundleError,
    CheckpointError,
    MemoryPlanError,
    OptionError,
    SeechatError,
)

LM = data("chatglm_tiny")


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    folder = tmp_path / "lm"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "ice_text.model"):
        shutil.copy(LM / name, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """A bundle's files; the manifest without the source's dates."""
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    manifest = json.loads(files.pop("seechat.json"))
    manifest["provenance"]["lm"] = sorted(manifest["provenance"]["lm"])
    manifest["name"] = ""
    return files | {"seechat.json": json.dumps(manifest).encode()}


# --- quantization -------------------------------------------------------------------------------


def test_int4_golden_integers() -> None:
    """Two blocks of 4-bit values, worked out by hand; the earlier value is in the low nibble."""
    weight = torch.tensor([[-8.0, 7.0, 0.0, 1.0] + [0.0] * 28 + [4.0, -2.0] + [0.0] * 14])
    codes, scales = quantize_blocks(weight, bits=4, block_size=32)
    assert codes.shape == (1, 2, 16)
    assert codes[0, 0, :3].tolist() == [0xF0, 0x98, 0x88]  # -8 7 | 0 1 | 0 0, each plus 8
    assert scales[0].tolist() == [1.0, -0.5]  # the extreme of each block becomes -8 steps
    assert codes[0, 1, 0] == 0xC0  # 4 = -8 * -0.5 → 0; -2 = 4 * -0.5 → 12
    assert codes[0, 1, 8:].tolist() == [0x88] * 8  # padding is zero


def test_int8_golden_integers() -> None:
    weight = torch.tensor([[-128.0, 127.0, 1.0, 0.0]])
    codes, scales = quantize_blocks(weight, bits=8, block_size=32)
    assert codes.shape == (1, 1, 32)
    assert codes[0, 0, :4].tolist() == [0, 255, 129, 128]
    assert scales.tolist() == [[1.0]]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 200),
)
def test_quantization_is_at_least_as_good_as_rounding(
    seed: int, bits: int, block: int, inputs: int
) -> None:
    weight = torch.randn(3, inputs, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_blocks(weight, bits=bits, block_size=block)
    restored = dequantize_blocks(codes, scales, bits=bits, inputs=inputs)
    padded = torch.nn.functional.pad(weight, (0, -inputs % block)).unflatten(1, (-1, block))
    step = padded.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    rounded = (padded / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    plain_error = (rounded.nan_to_num() - padded).square().sum()
    assert (restored - weight).square().sum() <= plain_error * (1 + 1e-5) + 1e-12


def test_blocks_are_made_on_the_device() -> None:
    """A weight never gets there whole; what is on another device is refused by torch."""
    weight = torch.randn(70, 200, dtype=torch.float16)
    device = torch.device("meta")
    codes, scales = quantize_blocks(weight, bits=4, block_size=128, device=device)
    assert (codes.shape, codes.device, codes.dtype) == ((70, 2, 64), device, torch.uint8)
    assert (scales.shape, scales.device, scales.dtype) == ((70, 2), device, torch.float32)


def test_zero_and_extreme_blocks() -> None:
    for value in (0.0, 1e-30, 6e4):
        weight = torch.full((2, 64), value)
        codes, scales = quantize_blocks(weight, bits=4, block_size=32)
        restored = dequantize_blocks(codes, scales, bits=4, inputs=64)
        torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)


def test_heads_are_rearranged_and_put_back() -> None:
    config = LMConfig(hidden_size=24, num_heads=2)  # head size 12: quarters of 3, padded to 4
    rows = torch.arange(72.0)
    q, k, v = reordered(rows, head_order(config, "rows")).unflatten(0, (3, 2, 4, 4)).unbind(0)
    # head 0: q is rows 0-11, its quarters a1 a2 b1 b2 become a1 b1 a2 b2, each padded with a zero
    assert q[0].tolist() == [[0, 1, 2, 0], [6, 7, 8, 0], [3, 4, 5, 0], [9, 10, 11, 0]]
    assert k[0].tolist() == [[12, 13, 14, 0], [18, 19, 20, 0], [15, 16, 17, 0], [21, 22, 23, 0]]
    assert v[1].tolist() == [[60, 61, 62, 0], [63, 64, 65, 0], [66, 67, 68, 0], [69, 70, 71, 0]]
    columns = reordered(torch.arange(24.0)[None], head_order(config, "columns"), axis=1)
    assert columns[0, :8].tolist() == [0, 1, 2, 0, 3, 4, 5, 0]
    for axis in ("rows", "columns", "key", "value"):
        order = head_order(config, axis)
        published = np.arange(1, order.max() + 2)  # no zero, which is what padding holds
        there = reordered(published, order)
        assert np.count_nonzero(there) == len(published) < len(there)
        assert reordered(there, inverse_order(order)).tolist() == published.tolist()
        unpadded = head_order(config, axis, padded=False)
        assert unpadded.tolist() == order[order >= 0].tolist()


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_bundle_is_complete_and_its_report_is_in_it(tmp_path: Path, precision: str) -> None:
    manifest = export_bundle(lm=LM, out=tmp_path / "b", precision=precision, block_size=64)
    assert manifest == read_manifest(tmp_path / "b")
    verify_hashes(tmp_path / "b", manifest)
    report = json.loads((tmp_path / "b/parity.json").read_text())
    assert report["against_checkpoint"]["kl_divergence"] < {"int4": 0.5}.get(precision, 0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]  # no partial folder, no lock


def test_shards_give_the_same_bundle(lm: Path, tmp_path: Path) -> None:
    """Three .bin shards in fp16 with fp32 norms, as published, and an index with a stale size."""
    export_bundle(lm=lm, out=tmp_path / "one", precision="int4")
    state = load_file(lm / "model.safetensors")
    (lm / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05}-of-00003.bin"
        part = {
            k: state[k] if "layernorm" in k else state[k].half()
            for k in names[i * len(names) // 3 : (i + 1) * len(names) // 3]
        }
        torch.save(part, lm / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 13744473856}, "weight_map": weight_map}
    (lm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    export_bundle(lm=lm, out=tmp_path / "shards", precision="int4")
    one, shards = contents(tmp_path / "one"), contents(tmp_path / "shards")
    for name in ("decoder.onnx", "decoder.onnx.data", "embeddings.bin"):
        assert one[name] == shards[name]


def test_a_tied_head_may_be_absent(lm: Path, tmp_path: Path) -> None:
    state = load_file(lm / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, lm / "model.safetensors")
    export_bundle(lm=lm, out=tmp_path / "b", precision="fp32")


# --- what is refused ----------------------------------------------------------------------------


def damaged(lm: Path, what: str) -> Path:
    state = load_file(lm / "model.safetensors")
    key = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    if what == "missing":
        del state[key]
    elif what == "surplus":
        state["transformer.layers.3.mlp.dense_h_to_4h.weight"] = state[key].clone()
    elif what == "misshapen":
        state[key] = state[key][:-1].contiguous()
    save_file(state, lm / "model.safetensors")
    return lm


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "layers.1.mlp.dense_h_to_4h.weight"),
        ("surplus", "layers.3.mlp.dense_h_to_4h.weight"),
        ("misshapen", r"\[255, 64\].*\[256, 64\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit(lm: Path, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_bundle(lm=damaged(lm, what), out=tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lm"]


def test_wrong_tokenizers(lm: Path, tmp_path: Path) -> None:
    (lm / "ice_text.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:5e")
    with pytest.raises(BundleError, match="Git LFS pointer"):
        export_bundle(lm=lm, out=tmp_path / "b")
    shutil.copy(data("tokenizer/variant_identity.model"), lm / "ice_text.model")
    with pytest.raises(SeechatError, match=r"ice_text\.model"):
        export_bundle(lm=lm, out=tmp_path / "b")


def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="exists already"):
        export_bundle(lm=LM, out=tmp_path / "b")
    assert (tmp_path / "b/mine.txt").read_text() == "mine"
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial/mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="conversation is 'nonsense'"):
        export_bundle(lm=LM, out=tmp_path / "c", conversation="nonsense")
    with pytest.raises(BundleError, match="not made by an export"):
        export_bundle(lm=LM, out=tmp_path / "c")
    assert (tmp_path / "c.partial/mine.txt").read_text() == "mine"


def test_a_bundle_that_disagrees_is_not_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong rearrangement of heads is just the kind of silent error that the check is for."""
    right = quantize.head_order
    monkeypatch.setattr(quantize, "head_order", lambda c, axis: np.roll(right(c, axis), 1))
    with pytest.raises(BundleError, match="layer 0 graph differs from the torch network"):
        export_bundle(lm=LM, out=tmp_path / "b", precision="fp32")
    assert not (tmp_path / "b").exists()


# --- interruptions ------------------------------------------------------------------------------


class StopHere(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("stop_at", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_an_interrupted_export_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, stop_at: float
) -> None:
    converted = []
    original = export.stored_arrays
    monkeypatch.setattr(
        export, "stored_arrays", lambda item, *rest: converted.append(item) or original(item, *rest)
    )
    export_bundle(lm=LM, out=tmp_path / "whole", precision=precision)
    everything = len(converted)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "weights" and done >= stop_at * total:
            raise StopHere

    with pytest.raises(StopHere):
        export_bundle(lm=LM, out=tmp_path / "b", precision=precision, progress=interrupt)
    assert not (tmp_path / "b").exists()

    converted.clear()
    export_bundle(lm=LM, out=tmp_path / "b", precision=precision)
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")
    if stop_at > 0.5:  # what was written is not converted again
        assert len(converted) <= everything / 2


def test_other_options_start_anew(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "embeddings":
            raise StopHere

    with pytest.raises(StopHere):
        export_bundle(lm=LM, out=tmp_path / "b", precision="int8", progress=interrupt)
    export_bundle(lm=LM, out=tmp_path / "b", precision="int4")
    export_bundle(lm=LM, out=tmp_path / "fresh", precision="int4")
    assert contents(tmp_path / "b") == contents(tmp_path / "fresh")


def test_what_another_run_left_is_not_shipped(tmp_path: Path) -> None:
    """An interrupted export with vision, finished without it, is a text-only bundle."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "embeddings":
            (tmp_path / "b.partial/bundle/vision.onnx").write_text("half a graph")
            raise StopHere

    with pytest.raises(StopHere):
        export_bundle(lm=LM, out=tmp_path / "b", progress=interrupt)
    manifest = export_bundle(lm=LM, out=tmp_path / "b")
    assert "vision.onnx" not in manifest.files
    assert not (tmp_path / "b/vision.onnx").exists()


def test_the_plan_comes_first_and_its_sizes_are_right(tmp_path: Path) -> None:
    plans: list[ExportPlan] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        assert len(plans) == 1
        if done > total / 2:
            raise StopHere

    with pytest.raises(StopHere):
        export_bundle(lm=LM, out=tmp_path / "b", announce=plans.append, progress=interrupt)
    export_bundle(lm=LM, out=tmp_path / "b", announce=plans.append)
    first, second = plans
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "b").iterdir()}
    assert first.parts.weights == sizes["decoder.onnx.data"]
    assert first.parts.embeddings == sizes["embeddings.bin"]
    assert first.parts.total - 1000 < first.disk <= first.parts.total
    assert first.seconds > 0
    assert first.parts.embeddings < second.disk < first.disk
    assert str(first).startswith("about ")


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each error names the next smaller precision if that fits, and nothing is left behind."""
    usage = shutil.disk_usage(tmp_path)
    for free, advice in ((1_500_000, "use precision fp16"), (1000, "another place$")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(BundleError, match=f"on the disk .*are free: .*{advice}"):
            export_bundle(lm=LM, out=tmp_path / "b", precision="fp32")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    monkeypatch.setattr(plan, "available_memory", lambda: 10**8)
    with pytest.raises(MemoryPlanError, match=r"260 MB of memory at its peak; 100 MB are free"):
        export_bundle(lm=LM, out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export.os, "fsync", full)
        with pytest.raises(BundleError, match=r"the disk is full.*run the same command again"):
            export_bundle(lm=LM, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    export_bundle(lm=LM, out=tmp_path / "b")  # there is room again


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from seechat_export.export import export_bundle
from seechat_export.plan import ExportPlan
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.errors import BundleError

lm, whole, out = map(Path, sys.argv[1:])

def start(folder):  # in a process of its own, of which nothing but the files is left
    pid = os.fork()
    if not pid:
        export_bundle(lm=lm, out=folder, precision="int4", block_size=32)
        os._exit(0)
    return pid

def contents(folder):
    # but the manifest, which names its folder
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "seechat.json"}

begun = time.perf_counter()
assert os.waitpid(start(whole), 0)[1] == 0
duration = time.perf_counter() - begun
moments, kills = random.Random(3), 0
while kills < 10:
    pid, moment = start(out), duration * moments.random()
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        kills += 1
        for folder in (out, out.with_name(out.name + ".partial") / "bundle"):
            try:
                read_manifest(folder)
            except BundleError:
                continue
            # only when killed in the last moments, which a slow disk may stretch
            assert contents(folder) == contents(whole), f"{folder} loads and is not whole"
    else:  # it takes less by now
        assert status == 0
        duration = moment
    if out.exists():  # it was done already: begin anew
        shutil.rmtree(out)
assert os.waitpid(start(out), 0)[1] == 0
"""


@pytest.mark.parametrize("step", ["rename", "rmdir"])
def test_stopped_before_one_of_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What has the final name is whole and holds nothing else; what has not is continued."""

    def stop(*args: object) -> None:
        raise StopHere

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, stop)
        with pytest.raises(StopHere):
            export_bundle(lm=LM, out=tmp_path / "b")
    export_bundle(lm=LM, out=tmp_path / "whole")
    if step == "rename":
        assert not (tmp_path / "b").exists()
    else:
        assert contents(tmp_path / "b") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "b")
    export_bundle(lm=LM, out=tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "whole"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    """SIGKILL; what is left loads only if whole, and is continued, to the same bytes."""
    whole, out = tmp_path / "whole", tmp_path / "b"
    run = subprocess.run([sys.executable, "-c", KILLED, LM, whole, out])
    assert run.returncode == 0
    assert contents(out) == contents(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "whole"]


def test_two_at_once(tmp_path: Path) -> None:
    def second(stage: str, done: int, total: int) -> None:
        if stage == "embeddings":
            with pytest.raises(BundleError, match="another export is writing it"):
                export_bundle(lm=LM, out=tmp_path / "b")

    export_bundle(lm=LM, out=tmp_path / "b", progress=second)


def test_the_command_reports_and_draws_nothing_on_stdout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seechat_lite", "export", "--lm", LM, "--out", tmp_path / "b"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert "agrees with the torch networks" in run.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "exists already" in again.stderr
    np.testing.assert_equal(sorted(p.name for p in tmp_path.iterdir()), ["b"])
