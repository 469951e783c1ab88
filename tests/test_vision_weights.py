"""Vision that is no graph: the torch engine's pictures, from bundles and from published files."""

import dataclasses
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import seechat_lite as sl
from reference import data, run_onnx, tensors
from seechat_export.vision_graph import export_vision
from seechat_lite.cli.main import main
from seechat_lite.engines import EngineOptions, create
from seechat_lite.engines.onnx.vision import OnnxVision
from seechat_lite.engines.torch.engine import TorchEngine
from seechat_lite.engines.torch.vision import TorchVision
from seechat_lite.nn.vision import streamed, vision_network
from seechat_lite.source import open_source
from seechat_weights.bundle.manifest import MANIFEST, Manifest, read_manifest
from seechat_weights.config import VisionConfig
from seechat_weights.errors import BundleError, CheckpointError, EngineError, MemoryPlanError
from seechat_weights.vision import weights
from seechat_weights.vision.blip_names import BlipSettings
from seechat_weights.vision.bundled import bundled_vision
from seechat_weights.vision.weights import VisionFiles, VisionWeights, load_clip, load_seechat

TINY = BlipSettings(blocks=3, heads=4, query_heads=4)
LM = data("chatglm_tiny")
CPU = torch.device("cpu")
CAT = data("images/01_rgb.png")
CLIP = {"clip": data("vision/clip_open_clip"), "projector": data("vision/mm_projector_linear.bin")}
SEECHAT = {
    "eva": data("vision/eva_vit_tiny.pth"),
    "qformer": data("vision/blip2_tiny_flant5.pth"),
    "checkpoint": data("vision/checkpoint_100.pth"),
}


def clip(bridge: str = "linear") -> VisionWeights:
    projector = data(f"vision/mm_projector_{bridge}.bin")
    return load_clip(clip=CLIP["clip"], projector=projector)


def seechat() -> VisionWeights:
    return load_seechat(**SEECHAT, settings=TINY)


def vision(
    weights: VisionWeights, *, keep: bool | None = True, dtype: torch.dtype = torch.float32
) -> TorchVision:
    return TorchVision(weights, device=CPU, dtype=dtype, keep=keep)


def recorded(form: str) -> tuple[VisionWeights, np.ndarray, np.ndarray]:
    """Weights, pixels, and what the published code makes of them."""
    if form == "seechat":
        case = tensors("vision/seechat_case_q32.safetensors")
        return seechat(), case["image"], case["encode_img"]
    case = tensors("vision/case.safetensors")
    return clip(form), case["image"], case[f"projected_{form}"]


@pytest.mark.parametrize("keep", [True, False])
def test_numbers_that_float16_cannot_hold(keep: bool) -> None:
    weights, image, _ = recorded("linear")
    large = next(name for name in weights.sizes if name.endswith("norm1.weight"))

    def read(name: str) -> np.ndarray:
        return np.full(weights.sizes[name], 70_000, "f4") if name == large else weights.read(name)

    sees = vision(dataclasses.replace(weights, read=read), keep=keep, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=rf"clip.*{large} has numbers beyond 65504"):
        sees.encode(image)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", ["linear", "mlp2x_gelu", "seechat"])
def test_published_embeddings(form: str, keep: bool) -> None:
    """Also layer by layer, with nothing held between pictures; and rounded as on a GPU."""
    weights, image, expected = recorded(form)
    for dtype, atol in ((torch.float32, 5e-4), (torch.float16, 0.1)):
        sees = vision(weights, keep=keep, dtype=dtype)
        for _ in range(2):
            np.testing.assert_allclose(sees.encode(image), expected, rtol=0, atol=atol)
        assert sees.held == (weights.numbers * dtype.itemsize if keep else 0)
        assert isinstance(sees._network, nn.Module)
        assert {p.device.type for p in sees._network.parameters()} == {"cpu" if keep else "meta"}


@pytest.mark.parametrize("form", ["clip", "seechat"])
def test_nothing_is_left_on_another_device(form: str) -> None:
    """Told by a device that computes nothing."""
    weights, there = seechat() if form == "seechat" else clip(), torch.device("meta")
    network = streamed(weights, there, torch.float16)
    for sees in (network, network.loaded()):
        seen = sees(torch.zeros(1, 3, 56, 56, dtype=torch.float16, device=there))
        assert (seen.device, seen.dtype) == (there, torch.float16)
        assert {t.device for t in (*sees.parameters(), *sees.buffers())} == {there}


def test_large_vision_is_not_held_on_a_cpu() -> None:
    weights = dataclasses.replace(clip(), sizes={"x": (70_000_000,)})
    assert vision(weights, keep=None).held == 0 and vision(clip(), keep=None).held > 0


@pytest.mark.parametrize(
    ("form", "precision"),
    [("mlp", "fp32"), ("mlp", "int8"), ("seechat", "fp16"), ("seechat", "int8")],
)
def test_a_bundle_keeps_its_weights_under_their_names(
    form: str, precision: str, tmp_path: Path, vision_bundle: Path
) -> None:
    weights = seechat() if form == "seechat" else clip("mlp2x_gelu")
    path = tmp_path / "vision.onnx"
    export_vision(streamed(weights), weights.config, path, precision=precision)
    manifest = dataclasses.replace(read_manifest(vision_bundle), vision=weights.config)
    found = bundled_vision(tmp_path, manifest)
    assert found and found.sizes == weights.sizes
    for name, shape in weights.sizes.items():
        written, published = (np.asarray(e.read(name), np.float32) for e in (found, weights))
        assert written.shape == shape
        if precision == "fp16" and published.ndim > 1:
            published = published.astype(np.float16).astype(np.float32)
        # no more than a step between two codes
        atol = np.abs(published).max() / 127 if precision == "int8" else 0
        np.testing.assert_allclose(written, published, rtol=0, atol=atol)
    size = weights.config.pixels.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32)
    seen, expected = vision(found).encode(pixels), run_onnx(path, pixels)
    if precision == "int8":  # ONNX Runtime also rounds what the weights are multiplied by
        assert np.corrcoef(seen.ravel(), expected.ravel())[0, 1] > 0.999
    else:
        np.testing.assert_allclose(seen, expected, rtol=0, atol=5e-4)


def engine(folder: Path, **chosen: Any) -> TorchEngine:
    options = EngineOptions(device="cpu", **chosen)
    made = create("torch", open_source(folder), context=300, options=options)
    assert isinstance(made, TorchEngine)
    return made


def random_pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)


def test_pictures_of_a_bundle_need_no_onnxruntime(vision_bundle: Path) -> None:
    sees = engine(vision_bundle)
    assert isinstance(sees._vision, TorchVision)
    found = sees.encode_image(random_pixels())
    expected = create("onnx", open_source(vision_bundle), context=300)
    np.testing.assert_allclose(found, expected.encode_image(random_pixels()), rtol=0, atol=5e-4)
    sees.close()
    assert sees._vision._network is None
    with pytest.raises(EngineError, match="closed"):
        sees.encode_image(random_pixels())


def without_network(bundle: Path, folder: Path) -> Path:
    """A bundle as it was written before the manifest told what the network is built with."""
    copy = Path(shutil.copytree(bundle, folder / "old"))
    manifest = json.loads((copy / MANIFEST).read_text("utf-8"))
    del manifest["vision"]["network"]
    (copy / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return copy


def test_a_graph_that_nobody_described_is_run_as_it_is(vision_bundle: Path, tmp_path: Path) -> None:
    sees = engine(without_network(vision_bundle, tmp_path))
    assert isinstance(sees._vision, OnnxVision)
    found = sees.encode_image(random_pixels())
    np.testing.assert_allclose(
        found, engine(vision_bundle).encode_image(random_pixels()), atol=5e-4
    )


@pytest.mark.parametrize("bundled", [True, False])
def test_a_dialogue_about_a_picture(
    bundled: bool, vision_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answers from ONNX Runtime, and from torch with and without an export."""

    def talk(model: sl.Model) -> list[str]:
        chat = model.chat()
        return [
            chat.ask("图里有什么?", image=CAT, max_new_tokens=8),
            chat.ask("为什么?", max_new_tokens=8),
        ]

    with sl.load(vision_bundle, context=300) as model:
        expected = talk(model)
    path, files = (vision_bundle, None) if bundled else (LM, sl.VisionFiles(**CLIP))
    with sl.load(path, engine="torch", device="cpu", context=300, vision=files) as model:
        assert model.manifest.conversation == "seechat"
        assert talk(model) == expected
    command = ["ask", CAT, "图里有什么?", "--model", path, "--engine", "torch", "--device", "cpu"]
    command += [] if bundled else ["--clip", CLIP["clip"], "--projector", CLIP["projector"]]
    assert main([*map(str, command), "--context", "300", "--max-new-tokens", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == expected[0]


def test_seechat_as_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint brings the projector, and would bring a part of the language model."""
    monkeypatch.setattr(weights, "load_seechat", partial(load_seechat, settings=TINY))
    case = tensors("vision/seechat_case_q32.safetensors")
    with sl.load(LM, engine="torch", device="cpu", vision=VisionFiles(**SEECHAT)) as model:
        seen = model.engine.encode_image(case["image"])
    np.testing.assert_allclose(seen, case["encode_img"], rtol=0, atol=5e-4)


def test_vision_of_another_language_model(tmp_path: Path) -> None:
    weights = {"weight": np.zeros((24, 48), np.float32), "bias": np.zeros(24, np.float32)}
    save_file(weights, tmp_path / "p.safetensors")
    files = VisionFiles(clip=CLIP["clip"], projector=tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="64 wide, those of its vision 24"):
        sl.load(LM, engine="torch", vision=files)


def test_a_bundle_takes_no_other_vision(vision_bundle: Path) -> None:
    with pytest.raises(sl.OptionError, match="vision: not for the engine 'auto'"):
        sl.load(vision_bundle, vision=VisionFiles(**CLIP))
    with pytest.raises(EngineError, match="a bundle, which has its own vision"):
        sl.load(vision_bundle, engine="torch", vision=VisionFiles(**CLIP))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clip", "x", "--eva", "y", "--engine", "torch"), "expected one"),
        (("--image-size", "84", "--engine", "torch"), "goes with --eva"),
    ],
)
def test_wrong_usage(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(["ask", "你好", *options])
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_the_plan_counts_what_is_held(vision_bundle: Path) -> None:
    held, released = engine(vision_bundle), engine(vision_bundle, keep_vision=False)
    assert isinstance(held._vision, TorchVision)
    assert held._plan.vision == held._vision.held > 0 == released._plan.vision
    room = held._plan.total - 1
    with pytest.raises(MemoryPlanError, match=r"vision .*load it with keep_vision=False"):
        engine(vision_bundle, max_memory=room)
    engine(vision_bundle, max_memory=room, keep_vision=False)


def test_out_of_memory_over_a_picture(vision_bundle: Path) -> None:
    sees = engine(vision_bundle)
    expected = sees.encode_image(random_pixels())

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert isinstance(sees._vision, TorchVision) and sees._vision._network
    sees._vision._network.register_forward_pre_hook(full)
    with pytest.raises(MemoryPlanError, match=r"2.00 GiB.*keep_vision=False"):
        sees.encode_image(random_pixels())
    np.testing.assert_array_equal(sees.encode_image(random_pixels()), expected)


def test_a_device_for_pictures_that_is_not_there(vision_bundle: Path) -> None:
    with pytest.raises(EngineError, match="device 'tpu' is not there"):
        engine(vision_bundle, vision_device="tpu")


def test_without_transformers(vision_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sees = engine(vision_bundle)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EngineError, match=r"transformers is not installed.*\[torch\]"):
        sees.encode_image(random_pixels())


# --- bundles that are damaged, or newer


def changed(bundle: Path, folder: Path, **change: np.ndarray | None) -> tuple[Path, Manifest]:
    copy = Path(shutil.copytree(bundle, folder / "changed"))
    weights = {**load_file(copy / "vision.onnx.data"), **change}
    save_file({k: v for k, v in weights.items() if v is not None}, copy / "vision.onnx.data")
    return copy, read_manifest(bundle)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bridge.bias", None, r"1 missing \(bridge.bias\)"),
        ("bridge.extra", np.zeros(1, np.float32), r"1 not known \(bridge.extra\)"),
        ("bridge.bias", np.zeros(7, np.float32), r"bridge.bias is \[7\] instead of \[64\]"),
    ],
)
def test_weights_that_do_not_fit(
    key: str, value: np.ndarray | None, message: str, vision_bundle: Path, tmp_path: Path
) -> None:
    folder, manifest = changed(vision_bundle, tmp_path, **{key: value})
    with pytest.raises(BundleError, match=message) as e:
        bundled_vision(folder, manifest)
    assert "\n" not in str(e.value) and "export the bundle again" in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tower": "siglip"}, "siglip and linear"), ({"bridge": "cabs"}, "clip and cabs")],
)
def test_networks_of_a_newer_version(change: dict[str, str], message: str) -> None:
    config: VisionConfig = dataclasses.replace(clip().config, **change)
    with pytest.raises(EngineError, match=f"{message}; expected clip with"):
        vision_network(config, 64)


def test_older_names_still_work_and_say_so(vision_bundle: Path) -> None:
    with pytest.warns(DeprecationWarning, match="EyeFiles is now VisionFiles"):
        files = sl.EyeFiles(**CLIP)
    assert isinstance(files, sl.VisionFiles)
    with (
        pytest.warns(DeprecationWarning, match=r"load\(vision="),
        pytest.raises(sl.SeechatError, match="has its own vision"),
    ):
        sl.load(vision_bundle, engine="torch", eyes=files)
