"""LLaVA in all its published forms, against the original code's own numbers."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import llama_reference as golden
from seechat_lite.images import pixels
from seechat_lite.pictures.reduce import MAX_PIXELS
from seechat_weights.config import PixelSpec
from seechat_weights.errors import CheckpointError, OptionError
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.vision.bridge_names import map_bridge
from seechat_weights.vision.clip_names import map_clip
from seechat_weights.vision.weights import VisionFiles, load_llava

pytestmark = golden.needs_llama_reference


@pytest.mark.parametrize("form", golden.RECORDED_PIXELS)
def test_pixels(form: str) -> None:
    spec = golden.LLAVAS[form].weights().config.pixels
    recorded = golden.arrays(f"llava_tiny/{golden.RECORDED_PIXELS[form]}/case_pixels.safetensors")
    assert recorded
    for key, expected in recorded.items():
        name, _, kind = key.rpartition(".")
        if kind == "u8":
            np.testing.assert_array_equal(golden.published_levels(name, spec), expected, key)
        else:
            found = golden.published_pixels(name, spec)[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("form", ["llava_v1", "llava_v15"])
def test_tower_and_projector(form: str) -> None:
    weights = golden.LLAVAS[form].weights()
    recorded = golden.arrays(f"llava_tiny/{form}/case_features.safetensors")
    assert recorded
    for key, expected in recorded.items():
        name, _, kind = key.rpartition(".")
        part = (lambda n, x: n.tower(x)) if kind == "tower" else (lambda n, x: n(x))
        found = golden.module_outputs(weights, part, name)
        assert golden.largest_difference(found, expected) < 1e-5, key


@pytest.mark.parametrize("form", golden.LLAVAS)
def test_what_the_configuration_says(form: str) -> None:
    weights = golden.LLAVAS[form].weights()
    config = weights.config
    patches = (config.pixels.image_size // config.network.patch_size) ** 2
    assert config.tokens == patches and not config.network.class_token
    assert config.pixels.resize == ("crop_floor" if form == "llava_v1" else "square")
    assert config.marks == (("<im_start>", "<im_end>") if form == "llava_v1" else ("", ""))
    assert config.pixels.background == (122, 116, 104)


def test_both_hugging_face_forms_are_one_network() -> None:
    old, new = (golden.LLAVAS[form].weights() for form in ("hf_old", "hf_new"))
    assert old.config == new.config and old.sizes == new.sizes
    for name in old.sizes:
        np.testing.assert_array_equal(old.read(name), new.read(name), name)


def test_a_tuned_tower_counts_only_where_the_configuration_says_so(tmp_path: Path) -> None:
    tuned = golden.LLAVAS["llava_v15"].weights()
    folder = shutil.copytree(golden.LLAVA / "llava_v15", tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config | {"unfreeze_mm_vision_tower": False}))
    clip = golden.LLAVA / config["mm_vision_tower"]
    frozen = load_llava(folder, clip=clip)
    towers = [name for name in tuned.sizes if name.startswith("tower.")]
    assert any(not np.array_equal(tuned.read(n), frozen.read(n)) for n in towers)
    published = open_checkpoint(clip)
    for name in towers:
        theirs = published.read("vision_model." + name.removeprefix("tower.clip."))
        np.testing.assert_array_equal(frozen.read(name), theirs)


def test_a_tower_that_is_not_there(tmp_path: Path) -> None:
    folder = shutil.copytree(golden.LLAVA / "llava_v1", tmp_path / "llava")
    file = folder / "config.json"
    file.chmod(0o644)
    config = json.loads(file.read_text())
    for name, place in {
        "openai/clip-vit-large-patch14": "https://huggingface.co/openai/clip-vit-large-patch14",
        "/home/somebody/clip": "its publisher",
        "../../etc": "its publisher",
    }.items():
        file.write_text(json.dumps(config | {"mm_vision_tower": name}))
        with pytest.raises(CheckpointError, match="name it as clip") as error:
            VisionFiles().open(folder)
        assert place in str(error.value) and "clip" in error.value.options
    assert VisionFiles(clip=golden.LLAVA / "clip_v1").open(folder) is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "LLaVA 1 or 1.5"),
        ({"mm_resampler_type": "qformer"}, "LLaVA 1 or 1.5"),
        ({"mm_vision_tower": 5}, "LLaVA 1 or 1.5"),
        ({"mm_vision_select_layer": [-2, -3]}, "expected one number"),
        ({"mm_vision_select_layer": 9}, "expected one of a layer's outputs"),
        ({"mm_vision_select_layer": 0}, "expected one of a layer's outputs"),
        ({"mm_vision_select_feature": "cls"}, "expected one of patch"),
    ],
)
def test_settings_that_are_not_supported(
    changed: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(golden.LLAVA / "llava_v1", tmp_path / "llava")
    file = folder / "config.json"
    file.chmod(0o644)
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(CheckpointError, match=message):
        VisionFiles(clip=golden.LLAVA / "clip_v1").open(folder)


@pytest.mark.parametrize(
    ("layer", "class_token"), [(-1, False), (-2, True), (1, True), (-3, False)]
)
def test_other_layers_and_the_class_token(layer: int, class_token: bool, tmp_path: Path) -> None:
    """As transformers' hidden_states of the whole tower have them."""
    import torch
    from transformers import CLIPVisionModel

    folder = shutil.copytree(golden.LLAVA / "llava_v1", tmp_path / "llava")
    file = folder / "config.json"
    file.chmod(0o644)
    said = {
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "cls_patch" if class_token else "patch",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    weights = load_llava(folder, clip=golden.LLAVA / "clip_v1")
    assert weights is not None
    found = golden.module_outputs(weights, lambda n, x: n.tower(x), "odd.png")
    published = CLIPVisionModel.from_pretrained(golden.LLAVA / "clip_v1", torch_dtype=torch.float32)
    given = torch.from_numpy(golden.published_pixels("odd.png", weights.config.pixels))
    with torch.inference_mode():
        states = published(given, output_hidden_states=True).hidden_states
    expected = states[layer][0, 0 if class_token else 1 :].numpy()
    assert golden.largest_difference(found, expected) < 1e-5
    assert weights.config.tokens == len(expected)


def test_a_tower_or_a_projector_alone(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((8, 32), np.float32)}, tmp_path / "p.safetensors")
    lm = golden.LLAMA / "vicuna_real_vocab"
    for files in (
        VisionFiles(clip=golden.LLAVA / "clip_v1"),
        VisionFiles(projector=tmp_path / "p.safetensors"),
    ):
        with pytest.raises(OptionError, match="go together"):
            files.open(lm)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 4000), (4000, 1), (3, 70_000), (90_000, 2), (1, 3_000_000), (301, 200)]
)
def test_a_square_is_never_made_whole(size: tuple[int, int], exact: bool) -> None:
    """A thread of a picture would need its length squared."""
    import tracemalloc

    from PIL import Image

    spec = PixelSpec(image_size=56, resize="square", background=(122, 116, 104), exact=exact)
    image = Image.new("RGB", size, (250, 0, 0))
    tracemalloc.start()
    begun = time.process_time()
    found = pixels(image, spec)
    assert time.process_time() - begun < 8  # seconds of the processor, as for any picture
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (3, 56, 56) and np.isfinite(found).all()
    assert most < MAX_PIXELS


def test_projectors_of_every_form() -> None:
    for form in ("llava_lora/non_lora_trainables.bin", "llava_projector_only/mm_projector.bin"):
        file = golden.LLAVA / form
        assert map_bridge(open_checkpoint(file).shapes, where=form).name == "mlp2x_gelu"
    tower = open_checkpoint(golden.LLAVA / "clip_v15").shapes
    assert map_clip(tower, where="clip").network.layers == 2
