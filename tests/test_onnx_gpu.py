"""The onnx engine as it is on a GPU: in float16, with recorded steps, on a GPU that is the CPU."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import seechat_lite as sl
from networks import run_torch
from reference import data, greedy, load_json, random_array, run_onnx, tensors
from seechat_export.export import export_bundle
from seechat_export.vision_graph import export_vision
from seechat_lite.engines import Engine, EngineOptions, create
from seechat_lite.engines.onnx import devices as onnx_devices
from seechat_lite.engines.onnx.devices import Device, find_device
from seechat_lite.engines.onnx.engine import OnnxEngine
from seechat_lite.nn.vision import streamed
from seechat_lite.onnx_runtime import ort
from seechat_lite.prompt import Prompt
from seechat_lite.source import open_source
from seechat_weights.bundle.manifest import read_manifest
from seechat_weights.bundle.precisions import PRECISIONS
from seechat_weights.errors import EngineError, MemoryPlanError, OptionError
from seechat_weights.vision.blip_names import BlipSettings
from seechat_weights.vision.weights import load_clip, load_seechat

VISION = {
    "clip": lambda: load_clip(
        clip=data("vision/clip_open_clip"), projector=data("vision/mm_projector_linear.bin")
    ),
    "seechat": lambda: load_seechat(
        eva=data("vision/eva_vit_tiny.pth"),
        qformer=data("vision/blip2_tiny_flant5.pth"),
        checkpoint=data("vision/checkpoint_100.pth"),
        settings=BlipSettings(blocks=3, heads=4, query_heads=4),
    ),
}
CASES = ["p0", "p1", "p2", "p3_mask", "p4_continue", "p5_both", "p6_infill", "p7_len1", "p8_long"]
HALF = 0.02  # of the logits' standard deviation: what computing in float16 may change
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ChatGLM at a precision, or at fp16 with a prefix or vision, exported once."""
    folder, source = tmp_path_factory.mktemp("bundles"), data("chatglm_tiny")

    for form in (*PRECISIONS, "prefix", "seeing"):
        export_bundle(
            lm=source,
            prefix=source / "ptuning_proj_pytorch_model.bin" if form == "prefix" else None,
            vision=VISION["clip"]() if form == "seeing" else None,
            out=folder / form,
            precision=form if form in PRECISIONS else "fp16",
            block_size=32,
        )
    return folder


def opened(folder: Path, engine: str = "onnx", **options: Any) -> Engine:
    return create(engine, open_source(folder), context=300, options=EngineOptions(**options))


def answers(engine: Engine, name: str) -> np.ndarray:
    """Logits after a reference prompt and after the first tokens of its answer."""
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    tokens = load_json("chatglm_tiny/cases.json")["cases"][name]["greedy"][:5]
    # a copy: what a GPU's memory holds is copied anyhow, but the pretended one's is the CPU's
    logits = [engine.prefill(Prompt(case["input_ids"][0].tolist())).copy()]
    return np.stack([*logits, *(engine.step(token) for token in tokens)])


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * expected.std())


# --- the graph in float16 ------------------------------------------------------------------------


def test_one_file_of_weights_serves_both_graphs(bundles: Path) -> None:
    for precision, count in (("fp32", 1), ("fp16", 2), ("int8", 2), ("int4", 2)):
        folder = bundles / precision
        manifest = read_manifest(folder)
        graphs = [name for name in manifest.files if name.endswith(".onnx")]
        assert len(graphs) == count
        assert (manifest.decoder.half in graphs) == (count == 2)
        for name in graphs:
            used = ir.load(folder / name).graph.initializers.values()
            places = {
                v.const_value.location for v in used if isinstance(v.const_value, ir.ExternalTensor)
            }
            assert places == {"decoder.onnx.data"}


@pytest.mark.parametrize("name", CASES)
def test_float16_answers_as_the_reference(bundles: Path, name: str) -> None:
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    found = answers(opened(bundles / "fp16", dtype="fp16"), name)
    assert_close(found, np.asarray(case["greedy_step_logits"]), HALF)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_float16_products_of_blocks(bundles: Path, precision: str) -> None:
    """As torch multiplies the same integers in float32."""
    folder = bundles / precision
    expected = opened(folder, "torch", device="cpu", dtype="fp32")
    found = opened(folder, dtype="fp16")
    for name in CASES:
        assert_close(answers(found, name), answers(expected, name), HALF)


def test_float16_sees_a_prefix(bundles: Path) -> None:
    case = tensors("chatglm_tiny/case_prefix_proj.safetensors")
    recorded = load_json("chatglm_tiny/cases.json")["cases"]["prefix_proj"]["greedy"]
    engine, ids = opened(bundles / "prefix", dtype="fp16"), case["input_ids"][0].tolist()
    assert_close(engine.prefill(Prompt(ids)), case["logits_last"][0], HALF)
    assert greedy(engine, ids, len(recorded)) == recorded


def test_float16_takes_several_tokens_and_takes_them_back(
    bundles: Path,
) -> None:
    engine = opened(bundles / "fp16", dtype="fp16")
    prompt = Prompt(tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist())
    engine.prefill(prompt)
    one_by_one = np.stack([engine.step(token) for token in (40, 41, 42, 43)])
    engine.prefill(prompt)
    engine.step(40)
    engine.extend([7, 8, 9])
    engine.rewind(3)
    assert_close(engine.extend([41, 42, 43]), one_by_one[1:], HALF)


def test_a_precision_that_a_bundle_has_no_graph_for_is_refused(
    bundles: Path,
) -> None:
    for precision, dtype, known in (
        ("fp32", "fp16", "computes in fp32:"),
        ("fp16", "bf16", "computes in fp32 or fp16:"),
    ):
        with pytest.raises(EngineError, match=known):
            opened(bundles / precision, dtype=dtype)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("tower", ["clip", "seechat"])
def test_vision_in_float16(tmp_path: Path, tower: str, precision: str) -> None:
    """As torch has it in float32, but for the rounding of weights and sums."""
    network = streamed(VISION[tower]())
    config = replace(VISION[tower]().config, precision=precision)
    export_vision(network, config, tmp_path / config.graph, precision=precision)
    assert {f.name for f in tmp_path.iterdir()} == {config.graph, config.half, config.weights}
    size = config.pixels.image_size
    pixels = random_array(2, 3, size, size)
    found = run_onnx(tmp_path / config.half, pixels)
    assert found.dtype == np.float32
    tolerance = HALF if precision == "fp16" else 0.2
    assert_close(found, run_torch(network, pixels), tolerance)


# --- devices -------------------------------------------------------------------------------------


def test_devices_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "DmlExecutionProvider", CPU])
    assert find_device("auto") == find_device("CPU") == Device(CPU)
    assert find_device("cuda:1") == find_device(f"{CUDA}:1") == Device(CUDA, 1)
    assert find_device("cuda").kind == "cuda" and find_device("dml").kind == "dml"
    assert find_device("cpu").kind == "cpu"
    for name in ("cpu:1", "cuda:", "cuda:one", "cuda:-1"):
        with pytest.raises(OptionError, match="such as cuda:1"):
            find_device(name)
    with pytest.raises(EngineError, match="offers, auto, cpu, cuda, dml: take one"):
        find_device("coreml")


class PretendGPU:
    """What the CPU says when it is asked as if it were a GPU."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []  # options of the provider, of every session
        self.paths: list[Path] = []  # of every session's graph
        self.loads = True
        self.broken = ""  # what is said of every call

    def session(self, path: Path, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback
        (name, chosen), *_ = providers
        self.asked.append(chosen)
        self.paths.append(path)
        real = SESSION(path, options, providers=[CPU])
        if name == CUDA and self.loads:
            real.get_providers = lambda: [CUDA, CPU]
        run = real.run_with_iobinding

        def run_with_iobinding(*args: Any) -> None:
            if self.broken:
                raise RuntimeError(self.broken)
            run(*args)

        real.run_with_iobinding = run_with_iobinding
        return real


SESSION = ort.InferenceSession


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendGPU:
    gpu = PretendGPU()
    monkeypatch.setattr(onnx_devices.ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnx_devices.ort, "InferenceSession", gpu.session)
    monkeypatch.setattr(onnx_devices.ort, "preload_dlls", lambda: None)
    copy = lambda self, array: ort.OrtValue.ortvalue_from_numpy(array.copy())  # noqa: E731
    monkeypatch.setattr(Device, "tensor", copy)
    return gpu


def test_a_gpu_computes_in_float16_unless_told_otherwise(bundles: Path, gpu: PretendGPU) -> None:
    expected = answers(opened(bundles / "fp32", "torch"), "p1")
    for precision, dtype, half in (
        ("int8", None, True),
        ("int8", "fp32", False),
        ("fp32", None, False),
    ):
        engine = opened(bundles / precision, device="cuda:1", dtype=dtype, max_memory=10**9)
        assert isinstance(engine, OnnxEngine)
        asked = gpu.asked.pop()
        assert asked["device_id"] == "1"
        assert asked["enable_cuda_graph"] == str(int(half))
        assert asked["use_tf32"] == str(int(half))  # fp32 is asked for where the numbers matter
        assert int(asked["gpu_mem_limit"]) < 10**9
        assert_close(answers(engine, "p1"), expected, 0.3)  # the CPU's int8 products round


def test_a_provider_that_does_not_start_is_an_error(bundles: Path, gpu: PretendGPU) -> None:
    """ONNX Runtime itself would go on, on the CPU."""
    gpu.loads = False
    with pytest.raises(EngineError, match=f"cannot start {CUDA}.*expected NVIDIA's driver"):
        opened(bundles / "int8", device="cuda")


@pytest.mark.parametrize("form", ["fp16", "int4", "prefix"])
def test_recorded_steps(bundles: Path, gpu: PretendGPU, form: str) -> None:
    """They find new tokens, positions and lengths where the first ones lay, in every answer."""
    plain = opened(bundles / form, dtype="fp16")
    engine = opened(bundles / form, device="cuda")
    assert isinstance(engine, OnnxEngine)
    for name in ("p1", "p8_long", "p0"):
        np.testing.assert_array_equal(answers(engine, name), answers(plain, name))
        assert engine._recorded is not None and engine._recorded.proven
        engine.reset()
        plain.reset()
    engine.close()


def test_steps_that_come_out_otherwise_are_not_recorded(
    bundles: Path,
    gpu: PretendGPU,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(opened(bundles / "fp16", dtype="fp16"), "p1")
    engine = opened(bundles / "fp16", device="cuda")
    assert isinstance(engine, OnnxEngine)
    monkeypatch.setattr(onnx_devices.Recorded, "run", lambda *_: np.full((1, 1), np.nan))
    caplog.clear()  # of what opening on the CPU said
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(answers(engine, "p1"), expected)
    assert engine._recorded is None
    assert [r.getMessage() for r in caplog.records] == [
        "steps are not recorded: they would give other numbers"
    ]


@pytest.mark.parametrize(
    "said",
    [
        "Failed to allocate memory for requested buffer of size 1073741824",
        "Available memory of 20000000 is smaller than requested bytes of 33415168",
    ],
)
def test_a_gpu_without_memory_says_what_would_fit(
    bundles: Path, gpu: PretendGPU, said: str
) -> None:
    engine = create(
        "onnx",
        open_source(bundles / "int4"),
        context=1024,
        options=EngineOptions(device="cuda"),
    )
    expected = answers(engine, "p1")
    gpu.broken = said
    with pytest.raises(MemoryPlanError, match=r"GPU's memory is short.*: load it with context=512"):
        answers(engine, "p1")
    gpu.broken = ""
    np.testing.assert_array_equal(answers(engine, "p1"), expected)  # the next answer is whole


def test_bytes_are_multiplied_a_few_tokens_at_a_time(bundles: Path, gpu: PretendGPU) -> None:
    """More, and a GPU would make floats of all of them."""
    lengths: list[int] = []
    engine = opened(bundles / "int8", device="cuda")
    assert isinstance(engine, OnnxEngine)
    call = engine._call
    engine._call = lambda to, feeds, rows: lengths.append(rows) or call(to, feeds, rows)
    prompt = Prompt(tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist())
    engine.prefill(prompt)
    lengths.clear()
    found = engine.extend(list(range(40, 50)))
    assert lengths == [4, 4, 2]
    plain = opened(bundles / "int8", dtype="fp16")
    plain.prefill(prompt)
    assert_close(found, plain.extend(list(range(40, 50))), HALF)


def test_a_gpu_sees_in_float16(bundles: Path, gpu: PretendGPU) -> None:
    """With the graph for it; on the CPU, and where fp32 is asked for, with the other."""
    manifest = read_manifest(bundles / "seeing")
    assert manifest.vision and manifest.vision.half in manifest.files
    pixels = random_array(1, 3, 56, 56)
    for device, dtype, graph in (
        ("cuda", None, manifest.vision.half),
        ("cuda", "fp32", manifest.vision.graph),
        ("cpu", None, manifest.vision.graph),
    ):
        engine = opened(bundles / "seeing", device=device, dtype=dtype)
        found = engine.encode_image(pixels)
        assert gpu.paths.pop().name == graph
        assert_close(found, opened(bundles / "seeing").encode_image(pixels), HALF)


# --- load() --------------------------------------------------------------------------------------


def test_the_plan_for_a_gpu_is_not_the_machine_s(
    bundles: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seechat_lite.memory.available_memory", lambda: 1)
    sl.load(bundles / "fp16", device="cuda").close()
    with pytest.raises(MemoryPlanError, match="the budget is"):
        sl.load(bundles / "fp16", device="cuda", max_memory=1_000_000)
    with pytest.raises(MemoryPlanError, match="are free"):
        sl.load(bundles / "fp16")
