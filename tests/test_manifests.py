"""Checkpoints of exactly the published names, shapes and dtypes: read, accounted for, exported."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reference import lm_error, manifest
from seechat_export.export import export_bundle
from seechat_export.synthetic import write_tokenizer
from seechat_weights.accounting import Shapes, part
from seechat_weights.bundle import LMConfig
from seechat_weights.lm import LM, open_lm
from seechat_weights.names import OLD_VOCABULARY

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


def few_layers(shapes: Shapes, layers: int) -> Shapes:
    def kept(key: str) -> bool:
        found = re.search(r"\.layers\.(\d+)\.", key)
        return found is None or "Qformer" in key or int(found[1]) < layers

    return {k: v for k, v in shapes.items() if kept(k)}


def accounted(lm: LM, role: str) -> set[str]:
    """The tensors that the LM's parameters and prefix come from, and those it ignores."""
    used = [t.published for t in lm._tensors.values() if t.role == role]
    return {k for p in used for k in (p.key, p.scale) if k} | set(lm.ignored.get(role, {}))


@pytest.mark.parametrize("name", [*BASES, *CHECKPOINTS, PREFIX])
def test_full_size_is_accounted_for(tmp_path: Path, name: str) -> None:
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
        eyes = part(shapes, "vision", where="")
        assert accounted(opened, "checkpoint") == set(ours)
        assert set(ours) | set(eyes) == set(shapes) and not set(ours) & set(eyes)
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


def write_small(path: Path, shapes: Shapes, *, seed: int) -> None:
    """The same names and dtypes, narrower and with fewer layers, filled with sound numbers."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, (shape, name) in few_layers(shapes, LAYERS).items():
        sizes = tuple(WIDTHS.get(n, n) for n in shape)
        dtype = getattr(torch, name)
        if dtype == torch.int8:
            state[key] = torch.randint(-128, 128, sizes, generator=generator, dtype=dtype)
            continue
        value = torch.randn(sizes, generator=generator) * 0.1
        if key.endswith("weight_scale"):
            value = value.abs() / 10
        if key.endswith("layernorm.weight"):
            value += 1
        state[key] = value.to(dtype)
    save_file(state, path)


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
