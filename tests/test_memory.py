"""The memory plan: its sums, its advice, and what a container leaves us."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import seechat_lite as sl
from seechat_lite import memory
from seechat_lite.engines.onnx import memory as onnx_memory
from seechat_lite.engines.onnx.memory import bundle_plan as plan
from seechat_lite.engines.onnx.memory import check_memory
from seechat_lite.memory import MemoryPlan, human
from seechat_weights.bundle.manifest import Decoder, FileHash, Manifest, TokenizerConfig
from seechat_weights.config import LMConfig, VisionConfig

CHATGLM = Manifest(
    name="chatglm-6b-int4",
    lm=LMConfig(),
    decoder=Decoder("decoder.onnx", "embeddings.bin", "float16", "int4", 128),
    tokenizer=TokenizerConfig(),
    conversation="seechat",
    vision=VisionConfig("vision.onnx", 256, "clip", "linear", precision="fp16"),
    files={
        "decoder.onnx": FileHash(100_000, ""),
        "decoder.onnx.data": FileHash(3_300_000_000, ""),
        "embeddings.bin": FileHash(1_069_000_000, ""),  # mapped, not loaded
        "vision.onnx": FileHash(600_000_000, ""),
    },
)


def test_sums_of_chatglm_6b() -> None:
    needed = plan(CHATGLM, context=2048)
    assert needed.weights == 3_300_100_000 * 18 // 17  # and a sum for every scale
    assert needed.cache == 2 * 28 * 4096 * 2048 * 2  # keys and values, float16
    assert needed.vision == onnx_memory.VISION_WORKSPACE  # mapped, not prepared: the system's pages
    assert needed.workspace > 2048 * 2 * 16384 * 4
    # the vision network is gone when the prompt is read
    assert not needed.keep_vision
    assert needed.total == needed.weights + needed.cache + needed.workspace
    assert str(needed) == (
        "weights 3.49 GB + (cache 940 MB + workspace 1.01 GB, or before that vision 315 MB) "
        "= 5.44 GB at a context of 2048 tokens"
    )
    kept = plan(CHATGLM, context=2048, keep_vision=True)
    assert kept.vision == 1_200_000_000  # half precision is computed with in float32
    assert kept.total == needed.total + kept.vision
    assert str(kept) == (
        "weights 3.49 GB + cache 940 MB + workspace 1.01 GB + vision 1.20 GB = 6.64 GB "
        "at a context of 2048 tokens"
    )
    short = plan(CHATGLM, context=256)
    assert short.total == short.weights + short.vision + onnx_memory.RUNTIME
    assert plan(CHATGLM, context=2048, keep_vision=False) == needed


def test_what_changes_the_sums() -> None:
    full, half = plan(CHATGLM, context=2048), plan(CHATGLM, context=1024)
    assert half.cache == full.cache // 2 and half.weights == full.weights
    assert plan(replace(CHATGLM, vision=None), context=2048).vision == 0
    fp16 = replace(CHATGLM, decoder=replace(CHATGLM.decoder, precision="fp16"))
    assert plan(fp16, context=2048).weights == 2 * 3_300_100_000


def test_the_sums_on_a_gpu() -> None:
    """In float16 weights are what they are in the file, and the cache outlives an answer."""
    decoder, vision = CHATGLM.decoder, CHATGLM.vision
    assert vision is not None
    graphs = {decoder.half: FileHash(100_000, ""), vision.half: FileHash(100_000, "")}
    both = replace(CHATGLM, files=CHATGLM.files | graphs)
    for manifest, dtype, number in ((both, None, 2), (both, "fp32", 4), (CHATGLM, None, 4)):
        assert onnx_memory.float_bytes_on_gpu(manifest, "cuda:1", dtype) == number
        assert onnx_memory.float_bytes_on_gpu(manifest, "cpu", dtype) == 0
    half, full = (plan(both, context=2048, gpu=number) for number in (2, 4))
    assert half.weights == full.weights == 3_300_100_000
    assert half.cache == full.cache == plan(CHATGLM, context=2048).cache
    assert (half.vision, full.vision) == (600_000_000, 1_200_000_000)
    assert half.keep_vision  # or every new picture would bring it to the GPU again
    assert half.workspace - onnx_memory.RUNTIME == (full.workspace - onnx_memory.RUNTIME) / 2
    released = plan(both, context=2048, gpu=2, keep_vision=False)
    assert released.total == half.total - half.workspace + onnx_memory.RUNTIME
    fp16 = replace(both, decoder=replace(decoder, precision="fp16"))
    assert plan(fp16, context=2048, gpu=4).weights == 2 * 3_300_100_000
    assert plan(fp16, context=2048, gpu=2).weights == 3_300_100_000
    for gpu, vision_gpu in ((2, 0), (0, 2)):  # pictures elsewhere
        apart = plan(both, context=2048, gpu=gpu, vision_gpu=vision_gpu)
        assert apart.vision == 0
        assert apart.keep_vision == bool(vision_gpu)
    with pytest.raises(sl.MemoryPlanError, match=r"allow|keep_vision=False"):
        check_memory(half, both, budget=half.total - 1)
    check_memory(half, both)  # what is free on a GPU is not known


@pytest.mark.parametrize(
    ("precision", "keep_vision", "free", "advice"),
    [
        ("int4", None, 4_800_000_000, "load it with context=1024"),
        ("int4", None, 2_000_000_000, "close other programs"),
        ("int8", None, 2_000_000_000, "export it with precision int4, or close other programs"),
        ("int4", True, 5_500_000_000, "load it with keep_vision=False"),
        ("int4", True, 5_100_000_000, "load it with context=256"),
    ],
)
def test_the_error_says_what_would_fit(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    keep_vision: bool | None,
    free: int,
    advice: str,
) -> None:
    manifest = replace(CHATGLM, decoder=replace(CHATGLM.decoder, precision=precision))
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    needed = plan(manifest, context=2048, keep_vision=keep_vision)
    with pytest.raises(sl.MemoryPlanError) as error:
        check_memory(needed, manifest)
    assert str(error.value) == f"chatglm-6b-int4 needs {needed}; {human(free)} are free: {advice}"
    # the advice is right
    if "context=" in advice:
        smaller = int(advice.split("=")[1].split()[0])
        check_memory(plan(manifest, context=smaller, keep_vision=keep_vision), manifest)
        with pytest.raises(sl.MemoryPlanError):
            check_memory(plan(manifest, context=2 * smaller, keep_vision=keep_vision), manifest)
    elif "keep_vision" in advice:
        check_memory(plan(manifest, context=2048, keep_vision=False), manifest)


def test_a_budget_below_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10**11)
    needed = plan(CHATGLM, context=2048)
    check_memory(needed, CHATGLM, budget=needed.total)
    with pytest.raises(sl.MemoryPlanError, match=r"the budget is 2\.00 GB: allow more$"):
        check_memory(needed, CHATGLM, budget=2_000_000_000)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("4.5 gib", 4831838208), ("600MB", 600_000_000), ("123", 123)],
)
def test_sizes(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "five", "-1", "1e9", "5 TB", "0x10", "5GB!", "9" * 400])
def test_no_sizes(text: str) -> None:
    with pytest.raises(sl.OptionError, match="expected a number of bytes, or such as 5GB"):
        memory.parse_size(text)


def test_load_refuses_before_anything_is_read(
    text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    with pytest.raises(sl.MemoryPlanError, match=r"tiny-text needs .* 1 MB are free"):
        sl.load(text_bundle)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """What the machine has to give, for the length of a test."""
    monkeypatch.setattr(memory, "CGROUPS", ())
    machine = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return machine.available


def test_the_machines_free_memory(free: int) -> None:
    assert memory.available_memory() == free


@pytest.mark.skipif(psutil.LINUX is False, reason="containers are Linux's")
def test_a_containers_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int) -> None:
    names = ("memory.max", "memory.current", ("inactive_file ", "active_file "))
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, *names),))
    assert memory.available_memory() == free
    (tmp_path / "memory.max").write_text("200000000\n")
    assert memory.available_memory() == 200_000_000
    (tmp_path / "memory.current").write_text("150000000\n")
    assert memory.available_memory() == 50_000_000
    # pages of files that were read are given back on demand
    (tmp_path / "memory.stat").write_text(
        "anon 30000000\nfile 120000000\ninactive_anon 5\ninactive_file 70000000\n"
        "active_file 50000000\nworkingset_refault_file 9\n"
    )
    assert memory.available_memory() == 170_000_000
    (tmp_path / "memory.current").write_text("500000000\n")
    assert memory.available_memory() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == free


def test_numbers_for_people() -> None:
    assert [human(n) for n in (0, 499_999, 15_000_000, 999_999_999, 3_280_000_000)] == [
        "0 MB",
        "0 MB",
        "15 MB",
        "1.00 GB",
        "3.28 GB",
    ]
    assert MemoryPlan(1, 2, 3, 4, 16).total == 10
