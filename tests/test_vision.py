"""Vision networks: published checkpoints through torch and through the exported graph."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from networks import run_torch
from reference import data, load_json, run_onnx, tensors
from seechat_export.parity import VisionCheck
from seechat_export.vision_graph import export_vision
from seechat_lite.nn.layer_streaming import Streamed
from seechat_lite.nn.vision import streamed
from seechat_weights.config import PixelSpec, VisionConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.vision.clip_config import clip_settings
from seechat_weights.vision.clip_names import map_clip
from seechat_weights.vision.weights import load_clip

CASE = tensors("vision/case.safetensors")
BRIDGES = ["linear", "mlp2x_gelu"]
OPEN_CLIP = "clip_open_clip/open_clip_config.json"


def projector(bridge: str) -> Path:
    return data(f"vision/mm_projector_{bridge}.bin")


def opened(**files: Any) -> tuple[Streamed, VisionConfig]:
    vision = load_clip(**files)
    return streamed(vision), vision.config


def load(clip: Path, bridge: str = "linear", **settings: Any) -> tuple[Streamed, VisionConfig]:
    return opened(clip=clip, projector=projector(bridge), **settings)


def tower(module: Streamed) -> nn.Module:
    part = module.loaded().tower
    assert isinstance(part, nn.Module)
    return part


@pytest.fixture
def single_file(tmp_path: Path) -> Path:
    """The .bin file, fp16, with its configuration beside it."""
    shutil.copy(data(f"vision/{OPEN_CLIP}"), tmp_path)
    return Path(shutil.copy(data("vision/open_clip_pytorch_model.bin"), tmp_path))


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("form", ["clip_open_clip", "clip_hf", "file"])
def test_published_embeddings(form: str, bridge: str, single_file: Path, tmp_path: Path) -> None:
    clip = single_file if form == "file" else data(f"vision/{form}")
    module, config = load(clip, bridge)
    assert {p.device.type for p in module.parameters()} == {"meta"}  # no weights held
    assert (config.tower, config.bridge, config.tokens) == ("clip", bridge, 16)

    patches, expected = CASE["penultimate_patch_tokens"], CASE[f"projected_{bridge}"]
    np.testing.assert_allclose(run_torch(tower(module), CASE["image"]), patches, atol=1e-4)
    np.testing.assert_allclose(run_torch(module, CASE["image"]), expected, atol=1e-3)

    path = tmp_path / "vision.onnx"
    export_vision(module, config, path, precision="fp32")
    np.testing.assert_allclose(run_onnx(path, CASE["image"]), expected, atol=1e-3)
    for n in (1, 3):
        pixels = np.random.default_rng(n).standard_normal((n, 3, 56, 56), dtype=np.float32)
        found = run_onnx(path, pixels)
        assert found.shape == (n, 16, 64)
        np.testing.assert_allclose(found, run_torch(module, pixels), atol=1e-4)


def test_activation_is_the_configurations(single_file: Path) -> None:
    exact = CASE["penultimate_patch_tokens_if_exact_gelu"]
    module, _ = load(single_file, activation="gelu")
    np.testing.assert_allclose(run_torch(tower(module), CASE["image"]), exact, atol=1e-4)

    config = load_json(f"vision/{OPEN_CLIP}")
    del config["model_cfg"]["quick_gelu"]
    (single_file.parent / "open_clip_config.json").write_text(json.dumps(config))
    module, _ = load(single_file)
    np.testing.assert_allclose(run_torch(tower(module), CASE["image"]), exact, atol=1e-4)


def test_hugging_face_folder_is_what_transformers_reads(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data("vision/clip_hf"), tmp_path / "clip"))
    config = load_json("vision/clip_hf/config.json") | {"intermediate_size": 192}
    (folder / "config.json").write_text(json.dumps(config))  # which states 64 for layers of 192
    published = CLIPVisionModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(CASE["image"])
        expected = published(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].numpy()
    module, _ = load(folder)
    np.testing.assert_allclose(run_torch(tower(module), CASE["image"]), expected, atol=1e-5)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP of another size and activation, written by transformers, and a projector for it."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=96,
        patch_size=32,
        hidden_act="gelu",
    )
    model = CLIPVisionModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / "hf")
    save_file(
        {"weight": torch.randn(24, 128) / 8, "bias": torch.randn(24)}, folder / "p.safetensors"
    )
    return folder


def as_open_clip(folder: Path) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under open_clip's names, written out by hand."""
    published = load_file(folder / "model.safetensors")
    state = {}
    for key, value in published.items():
        key = key.removeprefix("vision_model.").replace("encoder.layers", "transformer.resblocks")
        for old, new in (
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("embeddings.patch_embedding", "conv1"),
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
        ):
            key = key.replace(old, new)
        state[f"visual.{key}"] = value
    for i in range(3):
        for kind in ("weight", "bias"):
            at = f"visual.transformer.resblocks.{i}.attn"
            parts = [state.pop(f"{at}.{x}_proj.{kind}") for x in "qkv"]
            state[f"{at}.in_proj_{kind}"] = torch.cat(parts)
    return state


def test_another_size_in_every_form(other: Path, tmp_path: Path) -> None:
    published = CLIPVisionModel.from_pretrained(other / "hf").eval()
    pixels = np.random.default_rng(0).standard_normal((3, 3, 96, 96), dtype=np.float32)
    with torch.inference_mode():
        states = published(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        expected = states[-2][:, 1:].numpy()

    save_file(as_open_clip(other / "hf"), tmp_path / "lone.safetensors")
    loaded = [
        opened(clip=other / "hf", projector=other / "p.safetensors"),
        opened(
            clip=tmp_path / "lone.safetensors",
            projector=other / "p.safetensors",
            activation="gelu",
        ),
    ]
    for module, config in loaded:
        assert (config.tokens, config.pixels.image_size) == (9, 96)
        np.testing.assert_allclose(run_torch(tower(module), pixels), expected, atol=1e-5)

    module, config = loaded[0]
    expected = run_torch(module, pixels)
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 2e-2)):
        path = tmp_path / f"{precision}.onnx"
        export_vision(module, config, path, precision=precision)
        for n in (1, 3):
            found = run_onnx(path, pixels[:n])
            np.testing.assert_allclose(found, expected[:n], atol=tolerance)


def test_lone_file_cannot_tell_its_activation(other: Path, tmp_path: Path) -> None:
    save_file(as_open_clip(other / "hf"), tmp_path / "lone.safetensors")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json beside it.*clip_activation"):
        opened(clip=tmp_path / "lone.safetensors", projector=other / "p.safetensors")
    shutil.copy(other / "hf/model.safetensors", tmp_path / "hf.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json beside it"):
        opened(clip=tmp_path / "hf.safetensors", projector=other / "p.safetensors")


def test_openais_own_file(tmp_path: Path) -> None:
    """A TorchScript archive; that it is OpenAI's tells its activation, heads and preprocessing."""
    file = tmp_path / "ViT-L-14.pt"
    root = nn.Module()
    published = load_file(data("vision/clip_open_clip/open_clip_model.safetensors"))
    sizes = {"input_resolution": 56, "context_length": 8, "vocab_size": 49}
    for key, value in [*published.items(), *((k, torch.tensor(v)) for k, v in sizes.items())]:
        *path, name = key.split(".")
        module = root
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.register_buffer(name, value.clone())
    root.forward = lambda x: x  # never run
    torch.jit.trace(root, torch.ones(1)).save(str(file))

    with pytest.raises(CheckpointError, match="48 in 0 attention heads"):  # theirs have 64 numbers
        load(file)
    names = map_clip(open_checkpoint(file).shapes, where="file")
    names = dataclasses.replace(names, network=dataclasses.replace(names.network, width=1024))
    settings = clip_settings(file, names, None)
    assert (settings.heads, settings.activation) == (16, "quick_gelu")
    assert settings.pixels == PixelSpec(image_size=56, resize="crop", rgb_first=False)


def test_fp16_rounds_the_matrices_alone(other: Path, tmp_path: Path) -> None:
    """The fp16 graph is exactly the fp32 graph of rounded matrices, in half the space."""
    module, config = opened(clip=other / "hf", projector=other / "p.safetensors")
    pixels = np.random.default_rng(1).standard_normal((1, 3, 96, 96), dtype=np.float32)
    sizes = {}
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.onnx"
        export_vision(module, config, path, precision=precision)
        sizes[precision] = (tmp_path / f"{precision}.onnx.data").stat().st_size
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    rounded = module.loaded()
    for parameter in rounded.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half().float())
    found = run_onnx(tmp_path / "fp16.onnx", pixels)
    np.testing.assert_allclose(found, run_torch(rounded, pixels), atol=1e-4)


def test_int8_keeps_matrices_in_8_bits(other: Path, tmp_path: Path) -> None:
    module, config = opened(clip=other / "hf", projector=other / "p.safetensors")
    path = tmp_path / "vision.onnx"
    export_vision(module, config, path, precision="int8")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    # two layers of six products, and the projector
    assert kinds.count("MatMulNBits") == 2 * 6 + 1 and "MatMul" not in kinds
    pixels = np.random.default_rng(0).standard_normal((2, 3, 96, 96), dtype=np.float32)
    found, expected = run_onnx(path, pixels), run_torch(module, pixels)
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.999
    report = VisionCheck(module, config, 24).report(path, "int8")
    assert report["max_difference"] < 0.2 * report["standard_deviation"]


def test_export_leaves_its_files_and_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, config = load(data("vision/clip_hf"))
    monkeypatch.chdir(tmp_path)
    export_vision(module, config, tmp_path / "vision.onnx", precision="fp16")
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["vision.fp16.onnx", "vision.onnx", "vision.onnx.data"]
    assert capfd.readouterr() == ("", "")
    for name in files[:2]:
        model = onnx.load(tmp_path / name)
        onnx.checker.check_model(tmp_path / name, full_check=True)
        assert [i.name for i in model.graph.input] == ["pixel_values"]
        assert [o.name for o in model.graph.output] == ["image_embeds"]
        assert str(Path(__file__).parent.parent).encode() not in model.SerializeToString()


def test_any_module_exports(tmp_path: Path) -> None:
    """The graph's contract is in pixels and embeddings, not in CLIP."""
    module = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(4, 5)).eval()
    config = VisionConfig("vision.onnx", 8, "conv", "linear", PixelSpec(image_size=8))
    export_vision(module, config, tmp_path / "vision.onnx", precision="fp32")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    found = run_onnx(tmp_path / "vision.onnx", pixels)
    np.testing.assert_allclose(found, run_torch(module, pixels), atol=1e-5)


def test_pixels_are_the_configurations() -> None:
    _, open_clip = load(data("vision/clip_open_clip"))
    assert open_clip.pixels == PixelSpec(image_size=56, resize="crop", rgb_first=False)
    _, hugging_face = load(data("vision/clip_hf"))
    theirs = dataclasses.replace(open_clip.pixels, rgb_first=True, resize="crop_floor")
    assert hugging_face.pixels == theirs


def with_config(folder: Path, file: str, change: dict[str, Any]) -> Path:
    """A copy of a CLIP folder with a changed configuration; {"a.b": 1} sets b within a."""
    source = data(f"vision/{'clip_open_clip' if file.startswith('open_clip') else 'clip_hf'}")
    copy = Path(shutil.copytree(source, folder / "clip"))
    config = json.loads((copy / file).read_text())
    for key, value in change.items():
        *outer, last = key.split(".")
        place = config
        for name in outer:
            place = place[name]
        place[last] = value
    (copy / file).write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("open_clip_config.json", {"preprocess_cfg.resize_mode": "squash"}, {"resize": "squash"}),
        (
            "open_clip_config.json",
            {"preprocess_cfg.resize_mode": "longest"},
            {"resize": "pad", "background": (0, 0, 0)},
        ),
        ("open_clip_config.json", {"preprocess_cfg": {}}, {}),
        (
            "preprocessor_config.json",
            {"size": {"height": 56, "width": 56}, "resample": 2},
            {"resize": "squash", "interpolation": "bilinear"},
        ),
        ("preprocessor_config.json", {"size": 56, "crop_size": 56}, {}),
        (
            "preprocessor_config.json",
            {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
            {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        ),
    ],
)
def test_other_preprocessing(
    tmp_path: Path, file: str, change: dict[str, Any], expected: dict[str, Any]
) -> None:
    _, config = load(with_config(tmp_path, file, change))
    ours = {"rgb_first": False} if file[0] == "o" else {"resize": "crop_floor"}
    usual = dataclasses.replace(PixelSpec(image_size=56, resize="crop"), **ours)
    assert config.pixels == dataclasses.replace(usual, **expected)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("open_clip_config.json", {"model_cfg.vision_cfg.layers": 12}, "layers is 12, but 4"),
        ("open_clip_config.json", {"model_cfg.vision_cfg.image_size": 224}, "image is 224, but 56"),
        ("open_clip_config.json", {"model_cfg.vision_cfg.head_width": 64}, "in 0 attention heads"),
        ("open_clip_config.json", {"model_cfg.vision_cfg.head_width": 9}, "in 5 attention heads"),
        (
            "open_clip_config.json",
            {"model_cfg.vision_cfg.act_kwargs": {"approximate": "tanh"}},
            "activation \"gelu {'approximate'",
        ),
        ("open_clip_config.json", {"preprocess_cfg.resize_mode": "zoom"}, "resize mode 'zoom'"),
        ("open_clip_config.json", {"preprocess_cfg.interpolation": "random"}, "'random'"),
        ("open_clip_config.json", {"preprocess_cfg.std": [1, 1]}, "three numbers each"),
        ("open_clip_config.json", {"preprocess_cfg.std": [1, 0, 1]}, "three numbers each"),
        ("config.json", {"hidden_size": 64, "num_attention_heads": 4}, "width is 64, but 48"),
        ("config.json", {"num_hidden_layers": 24}, "layers is 24, but 4"),
        ("config.json", {"hidden_act": "silu"}, "activation 'silu'"),
        ("config.json", {"num_attention_heads": 5}, "configuration of a CLIP model"),
        ("config.json", {"num_attention_heads": "x"}, "configuration of a CLIP model"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"crop_size": {"height": 224, "width": 224}}, "of 224 pixels"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 64}}, "of 64 pixels"),
    ],
)
def test_configuration_that_does_not_fit(
    tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    folder = with_config(tmp_path, file, change)
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert message in str(e.value) and "\n" not in str(e.value) and "expected" in str(e.value)


def test_projector_of_another_tower(other: Path) -> None:
    with pytest.raises(CheckpointError, match="takes 128 numbers a token; expected 48"):
        opened(clip=data("vision/clip_hf"), projector=other / "p.safetensors")


def test_unknown_precision(tmp_path: Path) -> None:
    module, config = load(data("vision/clip_hf"))
    with pytest.raises(ValueError, match="expected one of fp32, fp16, int8"):
        export_vision(module, config, tmp_path / "vision.onnx", precision="int4")
