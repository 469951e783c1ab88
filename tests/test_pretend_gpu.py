"""The torch engine where a GPU is pretended: nothing is left behind in the wrong memory."""

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from pretend_gpu import PRETENDED, pretend_gpu
from reference import data
from seechat_export.export import export_bundle
from seechat_lite.engines import EngineOptions
from seechat_lite.engines.torch.cuda_graphs import Recorder
from seechat_lite.engines.torch.engine import TorchEngine
from seechat_lite.prompt import Prompt
from seechat_lite.source import open_source
from seechat_weights.errors import MemoryPlanError
from seechat_weights.vision.weights import VisionFiles

ROOT = Path(__file__).resolve().parent.parent
VISION = data("vision")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretend_gpu(monkeypatch, triton=False):
        yield PRETENDED


def test_the_gpu_refuses_what_a_real_one_refuses(gpu: torch.device) -> None:
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    graph = torch.cuda.CUDAGraph()
    for waits in (lambda: there.cpu(), lambda: there.copy_(here), lambda: there[0].item()):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
            waits()
    assert (there.cpu() + here).tolist() == [2, 2, 2]


def test_a_graph_replays_what_was_recorded(gpu: torch.device) -> None:
    x, graph = torch.ones(2, device=gpu), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 3).unflatten(0, (1, 2))
        z = y + 1
        y.add_(1)
    x.copy_(torch.tensor([5.0, 7.0]))
    graph.replay()
    assert (y.cpu().tolist(), z.cpu().tolist()) == ([[16, 22]], [[16, 22]])


def answers(engine: TorchEngine, *, picture: bool) -> list[np.ndarray]:
    lm = engine._manifest.lm
    ids, images = [40, *[3] * 20, 41, lm.gmask_id, lm.bos_id], []
    if picture:
        vision = engine._manifest.vision
        assert vision
        size = vision.pixels.image_size
        pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
        images = [(1, engine.encode_image(pixels)[0])]
    found = [engine.prefill(Prompt(ids, images)), engine.step(7), *engine.extend([9, 50, 8])]
    engine.reset()
    found.append(engine.prefill(Prompt(ids, images)))
    assert engine.open_slots(3, tokens=60) == 3
    slots = [engine.adopt()]
    for length in (3, 9):  # three answers of different lengths; the first leaves
        engine.prefill(Prompt([*ids[-length:]]))
        slots.append(engine.adopt())
    for used in (slots, slots[1:]):
        for token in (7, 9):
            stepped = engine.step_slots({slot: token + slot for slot in used})
            found += [stepped[slot] for slot in used]
        engine.free_slot(used[0])
    engine.close()
    return found


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int4", "published", "prefix", "vision"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_answers_are_those_of_the_cpu(
    form: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = None
    tiny = data("chatglm_tiny")
    folder = data("quantized/int4") if form == "published" else tiny
    if form == "vision":
        vision = VisionFiles(
            clip=VISION / "clip_open_clip", projector=VISION / "mm_projector_linear.bin"
        )
    if form not in ("published", "vision"):
        prefix = tiny / "ptuning_embed_pytorch_model.bin" if form == "prefix" else None
        folder, precision = tmp_path / "b", "fp32" if form == "prefix" else form
        export_bundle(lm=tiny, prefix=prefix, out=folder, precision=precision, block_size=32)
    source = open_source(folder, vision=vision)

    def run(device: str, dtype: str) -> list[np.ndarray]:
        options = EngineOptions(device=device, dtype=dtype)
        engine = TorchEngine(source, context=60, options=options)
        return answers(engine, picture=vision is not None)

    expected = run("cpu", "fp32")
    with pretend_gpu(monkeypatch, triton=False):
        found = run("auto", dtype)
    bar = {"fp32": 5e-4, "fp16": 0.2}[dtype]
    np.testing.assert_allclose(found, expected, rtol=0, atol=bar)


def test_a_refused_budget_is_not_in_force_afterwards(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shares, engines = data("chatglm_tiny"), [], []
    lend = lambda share, device: shares.append(share)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lend)
    for budget in (1000, 12 << 30, None):
        options = EngineOptions(device="cuda", max_memory=budget)
        with pytest.raises(MemoryPlanError) if budget == 1000 else nullcontext():
            engines.append(TorchEngine(open_source(folder), context=60, options=options))
    assert shares == [0.5, 1.0]
    engines.clear()  # what nobody has any more gives its share back
    assert shares == [0.5, 1.0, 1.0]


def test_the_gpu_program_runs_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--here", "--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # its code for GPUs needs a real one
    with pretend_gpu(monkeypatch, triton=False):
        runpy.run_path(str(ROOT / "bench/gpu.py"), run_name="__main__")
    report = json.loads((tmp_path / "gpu-pretended-gpu-tiny.json").read_text("utf-8"))
    found = {name: stage["found"] for name, stage in report["stages"].items()}
    assert all(row["ok"] for row in found["correctness"]["correctness"]), found["correctness"]
    assert all(row["runs"] for row in found["budgets"]["budgets"]), found["budgets"]
    models = [form for stage in found.values() for form in stage.get("models", ())]
    assert models == ["int4", "int4 of fp16", "fp16", "int8"]
    skipped = {what: why for stage in found.values() for what, why in stage["skipped"].items()}
    assert not [why for why in skipped.values() if "Error" in why], skipped


def test_steps_are_recorded_with_plain_operations_as_well(gpu: torch.device) -> None:
    """The recorder by itself, over a decoder that is one multiplication."""

    class Doubles(torch.nn.Module):
        final_layernorm = torch.nn.LayerNorm(4)

        def forward(self, x: torch.Tensor, *unused: object, logit_rows: int) -> torch.Tensor:
            return (x * 2)[-logit_rows:].float()

    from seechat_lite.engines.torch.ops import Cache

    keys = torch.zeros(1, 8, 4, device=gpu)
    recorder = Recorder(Doubles(), Cache([keys], [keys]), vocab_size=4)  # type: ignore[arg-type]
    for value in (1.0, 5.0):
        found = recorder.run(torch.full((2, 4), value), np.zeros((2, 2), np.int64), [3])
        assert (found == 2 * value).all() and found.shape == (2, 4)
