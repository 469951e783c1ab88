"""Checkpoints of exactly the published names, shapes and dtypes: read, accounted for, exported.

The vision networks are exported narrow here. At their published sizes, which takes 7 GB of disk, 5
GB of memory and some minutes: SEECHAT_FULL_SIZE=1 pytest tests/test_manifests.py -k published_sizes
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from networks import run_torch
from reference import lm_error, manifest, random_array, run_onnx
from seechat_export.export import export_bundle
from seechat_export.synthetic import write_tokenizer
from seechat_export.vision_graph import export_vision
from seechat_lite.nn.vision import streamed
from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shapes, part
from seechat_weights.lm import checkpoint as lm_module
from seechat_weights.lm.chatglm import OLD_VOCABULARY
from seechat_weights.lm.checkpoint import LM, open_lm
from seechat_weights.vision import weights as vision_weights
from seechat_weights.vision.blip_names import BlipSettings
from seechat_weights.vision.weights import VisionWeights, load_clip, load_seechat

BASES = ["chatglm-6b", "chatglm-6b-150528", "chatglm-6b-int4", "chatglm-6b-int4-150528"]
CHECKPOINTS = ["seechat_full_keys", "seechat_checkpoint_100"]
PREFIX = "chatglm-6b-ptuning128"
CODES = {"float16": "F16", "float32": "F32", "int8": "I8", "int64": "I64"}
# the published widths and those of the exported copies; vocabularies stay as they are
WIDTHS = {4096: 64, 12288: 192, 16384: 256, 2048: 32, 8192: 128, 32: 4, 229376: 256}
LAYERS = 2


def write_holes(path: Path, shapes: Shapes) -> Path:
    """A safetensors file of the full size that takes no room on the disk: all zeros, unwritten."""
    header, end = {}, 0
    for key, (shape, dtype) in shapes.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[key] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(f.tell() + end)
    return path


def write_config(folder: Path, name: str, **changes: int) -> Path:
    """A config.json as published with these weights: the old one names no ids."""
    folder.mkdir(exist_ok=True)
    config: dict[str, object] = {"model_type": "chatglm", "position_encoding_2d": True, **changes}
    if "150528" in name:
        config["vocab_size"] = OLD_VOCABULARY
    if "int4" in name:
        config |= {"quantization_bit": 4, "quantization_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def open_full(folder: Path, name: str, shapes: Shapes) -> tuple[Path, dict[str, Path]]:
    """What open_lm takes for a file of these tensors, with a base where it is not one itself."""
    base = name if name in BASES else "chatglm-6b"
    layers = {"num_layers": 2} if name == "seechat_full_keys" else {}
    lm = write_config(folder / "lm", base, **layers)
    model = lm / "model.safetensors"
    if name in BASES:
        write_holes(model, shapes)
        return lm, {}
    if not model.exists():
        write_holes(model, few_layers(manifest(base), layers.get("num_layers", 28)))
    file = write_holes(folder / "file.safetensors", shapes)
    return lm, {"prefix" if name == PREFIX else "checkpoint": file}


@pytest.fixture
def unaudited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take zeros for weights: files of holes stand for those of the published sizes."""
    monkeypatch.setattr(lm_module, "is_nothing", lambda array: False)
    monkeypatch.setattr(vision_weights, "check_vision", lambda array, place: None)


def few_layers(shapes: Shapes, layers: int) -> Shapes:
    def kept(key: str) -> bool:
        found = re.search(r"\b(layers?|blocks|resblocks)\.(\d+)\.", key)
        return found is None or int(found[2]) < layers

    return {k: v for k, v in shapes.items() if kept(k)}


def accounted(lm: LM, role: str) -> set[str]:
    """The tensors that the LM's parameters and prefix come from, and those it ignores."""
    used = [p for t in lm._tensors.values() if t.role == role for p in t.parts]
    return {k for p in used for k in (p.key, p.scale) if k} | set(lm.ignored.get(role, {}))


@pytest.mark.parametrize("name", [*BASES, *CHECKPOINTS, PREFIX])
def test_full_size_is_accounted_for(tmp_path: Path, unaudited: None, name: str) -> None:
    """All names at the published sizes: every tensor used or ignored, and readable."""
    shapes = manifest(name)
    lm, options = open_full(tmp_path, name, shapes)
    opened = open_lm(lm, **options)
    if name in BASES:
        assert accounted(opened, "lm") == set(shapes)
        assert len(opened.ignored["lm"]) == 28
        assert opened.config.vocab_size == (OLD_VOCABULARY if "150528" in name else 130528)
        weight = opened.read("layers.27.mlp.dense_4h_to_h.weight", slice(3, 5))
        assert weight.shape == (2, 16384) and not weight.any()
        assert opened.bits("layers.0.attention.dense.weight") == (4 if "int4" in name else 0)
    elif name in CHECKPOINTS:
        ours = part(shapes, "lm", where="")
        vision = part(shapes, "vision", where="")
        assert accounted(opened, "checkpoint") == set(ours)
        assert set(ours) | set(vision) == set(shapes) and not set(ours) & set(vision)
        assert len(opened.shapes) == 4 + 12 * opened.config.num_layers
    else:
        assert opened.prefix is not None and opened.prefix.shape == (28, 2, 32, 128, 128)


@pytest.mark.parametrize("name", [*BASES, *CHECKPOINTS, PREFIX])
def test_one_key_too_few_or_too_many_or_misshapen(tmp_path: Path, name: str) -> None:
    shapes = manifest(name)
    ours = [k for k in part(shapes, "lm", where="") if not k.endswith("inv_freq")]

    def error(changed: Shapes) -> str:
        lm, options = open_full(tmp_path, name, changed)
        return lm_error(lm, **options)

    for key in ours[:: max(1, len(ours) // 5)]:
        if name in BASES:  # of the others any part may be there
            assert f"1 missing ({key})" in error({k: v for k, v in shapes.items() if k != key})
        shape, dtype = shapes[key]
        # a prefix may be of any length
        wrong = (*shape[:-1], shape[-1] + 1) if name == PREFIX else (shape[0] + 1, *shape[1:])
        message = error(shapes | {key: (wrong, dtype)})
        assert f"{key} is {list(wrong)} instead of {list(shape)}" in message
    body = "llama_model." if name in CHECKPOINTS else ""
    for surplus in (f"{body}transformer.layers.28.attention.dense.bias", "surprise.weight"):
        message = error(shapes | {surplus: ((4096,), "float16")})
        assert f"1 not known ({surplus})" in message


@pytest.fixture(scope="module")
def ice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the published ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "ice_text.model"
    write_tokenizer(path)
    return path


def write_random(path: Path, shapes: Shapes, widths: dict[int, int], *, seed: int) -> Path:
    """The same names and dtypes, of other widths, filled with sound numbers."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, (shape, name) in shapes.items():
        sizes = tuple(widths.get(n, n) for n in shape)
        dtype = getattr(torch, name)
        if not dtype.is_floating_point:
            end = 1 if dtype == torch.int64 else 128
            state[key] = torch.randint(-end, end, sizes, generator=generator, dtype=dtype)
            continue
        value = torch.empty(sizes, dtype=dtype if len(sizes) > 1 else torch.float32)
        value.normal_(generator=generator).mul_(0.1 if widths else 0.02)
        if key.endswith("weight_scale"):
            value = value.abs() / 10
        if re.search(r"(layernorm|LayerNorm|norm\d|ln_\w+)\.weight$", key):
            value += 1
        state[key] = value.to(dtype)
    save_file(state, path)
    return path


def write_small(path: Path, shapes: Shapes, *, seed: int) -> None:
    """Narrow, and with fewer layers."""
    write_random(path, few_layers(shapes, LAYERS), WIDTHS, seed=seed)


@pytest.mark.parametrize("name", [*BASES, *CHECKPOINTS, PREFIX])
def test_export(tmp_path: Path, ice: Path, name: str) -> None:
    base = name if name in BASES else "chatglm-6b"
    small = {"num_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4}
    lm = write_config(tmp_path / "lm", base, **small, inner_hidden_size=256)
    write_small(lm / "model.safetensors", manifest(base), seed=1)
    options = {}
    if name not in BASES:
        options["prefix" if name == PREFIX else "checkpoint"] = tmp_path / "file.safetensors"
        write_small(tmp_path / "file.safetensors", manifest(name), seed=2)
    out = tmp_path / "bundle"
    written = export_bundle(lm=lm, tokenizer=ice, out=out, precision="int4", **options)
    assert written.lm.vocab_size == (OLD_VOCABULARY if "150528" in name else 130528)
    assert written.tokenizer.num_image_tokens == (20000 if "150528" in name else 0)
    assert written.decoder.prefix_tokens == (128 if name == PREFIX else 0)
    if name == "seechat_full_keys":  # the checkpoint's own words
        table = np.memmap(out / "embeddings.bin", np.float16).reshape(-1, 64)
        opened = open_lm(lm, **options)
        np.testing.assert_array_equal(table[:99], opened.read("word_embeddings.weight")[:99])
        replaced = [k for k in written.provenance["ignored"]["lm"].values() if "replaced" in k]
        assert len(replaced) == len(opened.shapes)
    assert written.lm == LMConfig(
        **{k: getattr(written.lm, k) for k in ("vocab_size", "pad_id", "mask_id", "gmask_id")},
        bos_id=written.lm.bos_id,
        eos_id=written.lm.eos_id,
        hidden_size=64,
        num_heads=4,
        num_layers=LAYERS,
        inner_size=256,
    )


# --- vision: the files of each network, and narrower widths for each

VISION = {
    "seechat": {
        "eva": ("eva_vit_g", {1408: 32, 4224: 96, 6144: 64}),
        "qformer": ("blip2_pretrained_flant5xxl", {1408: 32, 768: 24, 3072: 48}),
        "checkpoint": ("seechat_checkpoint_100", {768: 24} | WIDTHS),
    },
    "clip": {
        "clip": ("open_clip_ViT-L-14_visual", {1024: 64, 3072: 192, 4096: 256}),
        "projector": ("llava-1.5_mm_projector", {1024: 64, 4096: 64}),
    },
}
VISION["seechat, all of it in the checkpoint"] = VISION["seechat"] | {
    "checkpoint": (
        "seechat_full_keys",
        VISION["seechat"]["eva"][1] | {768: 24, 3072: 48} | WIDTHS,
    )
}


def open_vision(files: dict[str, Path], *, blocks: int | None = None) -> VisionWeights:
    if "clip" in files:
        return load_clip(**files, activation="quick_gelu")
    return load_seechat(**files, settings=BlipSettings(blocks=blocks))


@pytest.mark.parametrize("name", VISION)
def test_full_size_vision_is_accounted_for(tmp_path: Path, unaudited: None, name: str) -> None:
    """At the published sizes: all tensors are known and readable, and none is to spare."""
    shapes = {role: manifest(file) for role, (file, _) in VISION[name].items()}
    files = {r: write_holes(tmp_path / f"{r}.safetensors", s) for r, s in shapes.items()}
    vision = open_vision(files)
    assert set(vision.files) == set(files.values())
    for parameter in list(vision.sizes)[::97]:
        value = vision.read(parameter)
        assert value.shape == vision.sizes[parameter] and not value.any()

    def error(role: str, changed: Shapes) -> str:
        file = write_holes(tmp_path / "changed.safetensors", changed)
        with pytest.raises(CheckpointError) as e:
            open_vision(files | {role: file})
        return str(e.value)

    for role, keys in shapes.items():
        message = error(role, keys | {"visual_encoder.x": ((1,), "float16")})
        assert "1 not known (visual_encoder.x)" in message
        # of a checkpoint of SEEChat any part may be there
        for key in list(keys)[1::37] if role != "checkpoint" else ():
            if key not in vision.ignored:
                message = error(role, {k: v for k, v in keys.items() if k != key})
                assert "1 missing" in message and f"{key})" in message


@pytest.mark.parametrize(("name", "tokens"), [*zip(VISION, (32, 256, 4), strict=True)])
def test_export_of_vision(tmp_path: Path, ice: Path, name: str, tokens: int) -> None:
    small = {"num_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4}
    lm = write_config(tmp_path / "lm", "chatglm-6b", **small, inner_hidden_size=256)
    write_small(lm / "model.safetensors", manifest("chatglm-6b"), seed=1)
    files = {
        role: write_random(
            tmp_path / f"{role}.safetensors", few_layers(manifest(file), LAYERS), widths, seed=2
        )
        for role, (file, widths) in VISION[name].items()
    }
    written = export_bundle(
        lm=lm,
        checkpoint=files.get("checkpoint"),
        tokenizer=ice,
        out=tmp_path / "bundle",  # checked against the torch networks before it is written
        vision=open_vision(files, blocks=LAYERS),
    )
    assert written.vision and written.vision.tokens == tokens
    # of two layers the last file holds all
    taken = ["checkpoint"] if "all of it" in name else files
    assert written.provenance["vision"].keys() == {f"{role}.safetensors" for role in taken}


@pytest.mark.skipif("SEECHAT_FULL_SIZE" not in os.environ, reason="minutes, 7 GB of disk")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["seechat", "clip"])
def test_vision_of_published_sizes(tmp_path: Path, name: str) -> None:
    files = {
        role: write_random(tmp_path / f"{role}.safetensors", manifest(file), {}, seed=3)
        for role, (file, _) in VISION[name].items()
    }
    vision, pixels = open_vision(files), random_array(1, 3, 224, 224)
    network = streamed(vision)
    export_vision(network, vision.config, tmp_path / vision.config.graph, precision="fp16")
    expected = run_torch(network, pixels)
    assert expected.shape == (1, 32 if name == "seechat" else 256, 4096)
    error = np.abs(run_onnx(tmp_path / vision.config.graph, pixels) - expected)
    assert error.max() < 0.02 * expected.std()
