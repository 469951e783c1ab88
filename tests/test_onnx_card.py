"""The onnx engine as it is on a GPU: in float16, with recorded steps, on a card that is the CPU."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import seechat_lite as sl
from reference import data, greedy, load_json, tensors
from seechat_export.export import export_bundle
from seechat_lite.engines import Engine, EngineOptions, create, onnx_devices
from seechat_lite.engines.onnx import OnnxEngine
from seechat_lite.engines.onnx_devices import Device, find_device
from seechat_lite.errors import EngineError, MemoryPlanError
from seechat_lite.prompt import Prompt
from seechat_weights.bundle import read_manifest
from seechat_weights.precisions import PRECISIONS

CASES = ["p0", "p1", "p2", "p3_mask", "p4_continue", "p5_both", "p6_infill", "p7_len1", "p8_long"]
HALF = 0.02  # of the logits' standard deviation: what computing in float16 may change
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny ChatGLM at a precision, or with a P-tuning prefix at fp16, exported once."""
    folder, source = tmp_path_factory.mktemp("bundles"), data("chatglm_tiny")

    def make(form: str) -> Path:
        if not (folder / form).exists():
            prefix = source / "ptuning_proj_pytorch_model.bin" if form == "prefix" else None
            precision = form if form in PRECISIONS else "fp16"
            export_bundle(
                lm=source, prefix=prefix, out=folder / form, precision=precision, block_size=32
            )
        return folder / form

    return make


def opened(folder: Path, engine: str = "onnx", **options: Any) -> Engine:
    return create(
        engine, folder, read_manifest(folder), context=300, options=EngineOptions(**options)
    )


def answers(engine: Engine, name: str) -> np.ndarray:
    """Logits after a reference prompt and after the first tokens of its answer."""
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    tokens = load_json("chatglm_tiny/cases.json")["cases"][name]["greedy"][:5]
    # a copy: what a card's memory holds is copied anyhow, but the pretended one's is the CPU's
    logits = [engine.prefill(Prompt(case["input_ids"][0].tolist())).copy()]
    return np.stack([*logits, *(engine.step(token) for token in tokens)])


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * expected.std())


# --- the graph in float16 ------------------------------------------------------------------------


def test_one_file_of_weights_serves_both_graphs(bundle_of: Callable[[str], Path]) -> None:
    for precision, count in (("fp32", 1), ("fp16", 2), ("int8", 2), ("int4", 2)):
        folder = bundle_of(precision)
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
def test_float16_answers_as_the_reference(bundle_of: Callable[[str], Path], name: str) -> None:
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    found = answers(opened(bundle_of("fp16"), dtype="fp16"), name)
    assert_close(found, np.asarray(case["greedy_step_logits"]), HALF)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_float16_products_of_blocks(bundle_of: Callable[[str], Path], precision: str) -> None:
    """As torch multiplies the same integers in float32."""
    folder = bundle_of(precision)
    expected = opened(folder, "torch", device="cpu", dtype="fp32")
    found = opened(folder, dtype="fp16")
    for name in CASES:
        assert_close(answers(found, name), answers(expected, name), HALF)


def test_float16_sees_a_prefix(bundle_of: Callable[[str], Path]) -> None:
    case = tensors("chatglm_tiny/case_prefix_proj.safetensors")
    recorded = load_json("chatglm_tiny/cases.json")["cases"]["prefix_proj"]["greedy"]
    engine, ids = opened(bundle_of("prefix"), dtype="fp16"), case["input_ids"][0].tolist()
    assert_close(engine.prefill(Prompt(ids)), case["logits_last"][0], HALF)
    assert greedy(engine, ids, len(recorded)) == recorded


def test_float16_takes_several_tokens_and_takes_them_back(
    bundle_of: Callable[[str], Path],
) -> None:
    engine = opened(bundle_of("fp16"), dtype="fp16")
    prompt = Prompt(tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist())
    engine.prefill(prompt)
    one_by_one = np.stack([engine.step(token) for token in (40, 41, 42, 43)])
    engine.prefill(prompt)
    engine.step(40)
    engine.extend([7, 8, 9])
    engine.forget(3)
    assert_close(engine.extend([41, 42, 43]), one_by_one[1:], HALF)


def test_a_precision_that_a_bundle_has_no_graph_for_is_refused(
    bundle_of: Callable[[str], Path],
) -> None:
    for precision, dtype, known in (
        ("fp32", "fp16", "computes in fp32:"),
        ("fp16", "bf16", "computes in fp32 or fp16:"),
    ):
        with pytest.raises(EngineError, match=known):
            opened(bundle_of(precision), dtype=dtype)


# --- devices -------------------------------------------------------------------------------------


def test_devices_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "DmlExecutionProvider", CPU])
    assert find_device("auto") == find_device("CPU") == Device(CPU)
    assert find_device("cuda:1") == find_device(f"{CUDA}:1") == Device(CUDA, 1)
    assert find_device("cuda").kind == "cuda" and find_device("dml").kind == "dml"
    assert find_device("cpu").kind == "cpu"
    for name in ("cpu:1", "cuda:", "cuda:one", "cuda:-1"):
        with pytest.raises(EngineError, match="such as cuda:1"):
            find_device(name)
    with pytest.raises(EngineError, match=r"offers: auto, cpu, cuda, dml$"):
        find_device("coreml")


class Card:
    """What the CPU says when it is asked as if it were a card."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []  # options of the provider, of every session
        self.loads = True
        self.broken = ""  # what is said of every call

    def session(self, path: Path, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback
        (name, chosen), *_ = providers
        self.asked.append(chosen)
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
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(onnx_devices.ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnx_devices.ort, "InferenceSession", card.session)
    monkeypatch.setattr(onnx_devices.ort, "preload_dlls", lambda: None)
    copy = lambda self, array: ort.OrtValue.ortvalue_from_numpy(array.copy())  # noqa: E731
    monkeypatch.setattr(Device, "tensor", copy)
    return card


def test_a_card_computes_in_float16_unless_told_otherwise(
    bundle_of: Callable[[str], Path], card: Card
) -> None:
    for precision, dtype, half in (
        ("int8", None, True),
        ("int8", "fp32", False),
        ("fp32", None, False),
    ):
        engine = opened(bundle_of(precision), device="cuda:1", dtype=dtype, max_memory=10**9)
        assert isinstance(engine, OnnxEngine)
        asked = card.asked.pop()
        assert asked["device_id"] == "1"
        assert asked["enable_cuda_graph"] == str(int(half))
        assert asked["use_tf32"] == str(int(half))  # fp32 is asked for where the numbers matter
        assert int(asked["gpu_mem_limit"]) < 10**9
        assert answers(engine, "p1").dtype == np.float32


def test_a_provider_that_does_not_start_is_an_error(
    bundle_of: Callable[[str], Path], card: Card
) -> None:
    """ONNX Runtime itself would go on, on the CPU."""
    card.loads = False
    with pytest.raises(EngineError, match=f"cannot start {CUDA}.*expected NVIDIA's driver"):
        opened(bundle_of("int8"), device="cuda")


@pytest.mark.parametrize("form", ["fp16", "int4", "prefix"])
def test_recorded_steps(bundle_of: Callable[[str], Path], card: Card, form: str) -> None:
    """They find new tokens, positions and lengths where the first ones lay, in every answer."""
    plain = opened(bundle_of(form), dtype="fp16")
    engine = opened(bundle_of(form), device="cuda")
    assert isinstance(engine, OnnxEngine)
    for name in ("p1", "p8_long", "p0"):
        np.testing.assert_array_equal(answers(engine, name), answers(plain, name))
        assert engine._recorded is not None and engine._recorded.proven
        engine.reset()
        plain.reset()
    engine.close()


def test_steps_that_come_out_otherwise_are_not_recorded(
    bundle_of: Callable[[str], Path],
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(opened(bundle_of("fp16"), dtype="fp16"), "p1")
    engine = opened(bundle_of("fp16"), device="cuda")
    assert isinstance(engine, OnnxEngine)
    monkeypatch.setattr(onnx_devices.Recorded, "run", lambda *_: np.full((1, 1), np.nan))
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
def test_a_card_without_memory_says_what_would_fit(
    bundle_of: Callable[[str], Path], card: Card, said: str
) -> None:
    engine = create(
        "onnx",
        bundle_of("int4"),
        read_manifest(bundle_of("int4")),
        context=1024,
        options=EngineOptions(device="cuda"),
    )
    expected = answers(engine, "p1")
    card.broken = said
    with pytest.raises(MemoryPlanError, match=r"card's memory is short.*--context 512"):
        answers(engine, "p1")
    card.broken = ""
    np.testing.assert_array_equal(answers(engine, "p1"), expected)  # the next answer is whole


def test_bytes_are_multiplied_a_few_tokens_at_a_time(
    bundle_of: Callable[[str], Path], card: Card
) -> None:
    """More, and a card would make floats of all of them."""
    lengths: list[int] = []
    engine = opened(bundle_of("int8"), device="cuda")
    assert isinstance(engine, OnnxEngine)
    call = engine._call
    engine._call = lambda feeds, rows: lengths.append(rows) or call(feeds, rows)
    prompt = Prompt(tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist())
    engine.prefill(prompt)
    lengths.clear()
    found = engine.extend(list(range(40, 50)))
    assert lengths == [4, 4, 2]
    plain = opened(bundle_of("int8"), dtype="fp16")
    plain.prefill(prompt)
    assert_close(found, plain.extend(list(range(40, 50))), HALF)


# --- load() --------------------------------------------------------------------------------------


def test_the_plan_for_a_card_is_not_the_machine_s(
    bundle_of: Callable[[str], Path], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seechat_lite.memory.available_memory", lambda: 1)
    sl.load(bundle_of("fp16"), device="cuda").close()
    with pytest.raises(MemoryPlanError, match="the budget is"):
        sl.load(bundle_of("fp16"), device="cuda", max_memory=1_000_000)
    with pytest.raises(MemoryPlanError, match="are free"):
        sl.load(bundle_of("fp16"))
