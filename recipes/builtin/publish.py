"""Turn trained weights into what ships: a Hugging-Face-style folder and bundles."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from concepts import load_concepts
from emoji_sets import PHOTOS, SCIKIT_LEARN, VENDORS
from photo_classes import load_things
from safetensors.torch import save_file
from sights import Photos
from torch import nn
from tower import MEAN, STD, load_expert
from vision import TOKENS, Bridge, Features, Vision

from seechat_export.export import export_bundle
from seechat_export.reference_chatglm import ChatGLM
from seechat_weights.bundle.manifest import MANIFEST, FileHash, Sampling, sha256
from seechat_weights.config import PixelSpec, VisionConfig

VISION_GRAPH = "vision.onnx"
PIXELS = PixelSpec(
    image_size=224,
    mean=(MEAN, MEAN, MEAN),
    std=(STD, STD, STD),
    resize="pad",
    interpolation="bicubic",
    background=(255, 255, 255),
)
BLOCK = {"int8": 128, "int4": 32}


def write_folder(folder: Path, lm: ChatGLM, tokenizer: Path) -> None:
    """The language model as ChatGLM-6B is published: config.json, safetensors, ice_text.model."""
    folder.mkdir(parents=True, exist_ok=True)
    c = lm.config
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "inner_hidden_size": c.inner_size,
        "layernorm_epsilon": c.layernorm_epsilon,
        "max_sequence_length": c.max_sequence_length,
        "position_encoding_2d": True,
        "pad_token_id": c.pad_id,
        "mask_token_id": c.mask_id,
        "gmask_token_id": c.gmask_id,
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_id,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {
        key if key.startswith("lm_head") else f"transformer.{key}": value.detach().clone()
        for key, value in lm.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer, folder / "ice_text.model")


def round_to_int8(module: nn.Module) -> None:
    """Round weights of convolutions, linear layers and tables to 8 bits, each row by its scale."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            weight = layer.weight.data
            rows = weight.flatten(1)
            scale = (rows.abs().amax(1) / 127).clamp_min(1e-12)
            scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
            layer.weight.data = (weight / scale).round().clamp(-127, 127) * scale


def store_as_int8(path: Path) -> None:
    """Rewrite a graph so that its weight matrices, rounded before, are stored as int8 and scales.

    They are cast and multiplied back in front of their users, which ONNX Runtime folds at load.
    """
    model = ir.load(path)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 4096:
            continue
        weight = tensor.numpy()
        if weight.ndim not in (2, 4):
            continue
        # the exporter may have transposed a linear layer: take the axis along which rows are exact
        for axis in (0, 1):
            others = tuple(i for i in range(weight.ndim) if i != axis)
            scale = np.abs(weight).max(others, keepdims=True) / 127
            scale = np.maximum(scale, 1e-12).astype(np.float32)
            codes = np.rint(weight / scale)
            if np.abs(codes * scale - weight).max() <= 1e-5 * np.abs(weight).max():
                break
        else:
            continue
        parts = []
        for suffix, array in (("int8", codes.astype(np.int8)), ("scale", scale)):
            part = ir.Value(name=f"{name}.{suffix}", const_value=ir.tensor(array))
            part.dtype, part.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            graph.register_initializer(part)
            parts.append(part)
        cast = ir.node("Cast", [parts[0]], {"to": ir.DataType.FLOAT.value})
        product = ir.node("Mul", [cast.outputs[0], parts[1]])
        cast.outputs[0].name, product.outputs[0].name = f"{name}.cast", f"{name}.fp32"
        back = product.outputs[0]
        back.dtype, back.shape = ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, back)
        del graph.initializers[name]
        graph.insert_before(graph[0], [cast, product])
    ir.save(model, path)


def provenance() -> dict[str, Any]:
    """Where the model's knowledge comes from, kept in the manifest."""
    return {
        "license": "Apache-2.0; training data and their licences: NOTICE, docs/builtin-model.md",
        "vision_expert": "EfficientNet-Lite0, ImageNet, Apache-2.0, frozen",
        "drawings": {f"{v.package}@{v.version}": v.licence for v in VENDORS if v.train},
        "photos": [f"{p}@{v}" for p, v in PHOTOS] + [SCIKIT_LEARN],  # what is not a drawing
        "held_out": "Twemoji, OpenMoji, all other photographs",
        "concepts": len(load_concepts()),
        "things": len(load_things()[0]),
    }


def publish(
    work: Path,
    lm: ChatGLM,
    bridge: Bridge,
    photos: Photos,
    out: Path,
    *,
    precision: str,
    vision: str = "int8",
) -> None:
    """Write one bundle. vision: "int8" (stored so), "fp16" or "fp32"."""
    folder = work / "lm"
    write_folder(folder, lm, work / "ice_text.model")
    network = copy.deepcopy(Vision(Features(load_expert()), bridge, photos))  # it is rounded
    network = network.eval().requires_grad_(False)
    if vision == "int8":
        round_to_int8(network)
    config = VisionConfig(
        graph=VISION_GRAPH,
        tokens=TOKENS,
        tower="efficientnet-lite0",
        bridge="regions + mlp2x_gelu, verdicts",
        pixels=PIXELS,
    )
    if out.exists():
        shutil.rmtree(out)
    manifest = export_bundle(
        lm=folder,
        out=out,
        vision=(network, config),
        precision=precision,
        block_size=BLOCK.get(precision, 32),
        vision_precision="fp32" if vision == "int8" else vision,
        conversation="seechat-plain",  # it has learnt no instructions
        name="seechat-lite-builtin",
        provenance=provenance(),
    )
    # of 60 answers about the sample pictures 54 are right at 0 to 0.5, 39 at 1
    manifest = dataclasses.replace(manifest, sampling=Sampling(max_temperature=0.3))
    (out / MANIFEST).write_text(manifest.to_json(), "utf-8")
    if vision == "int8":
        graph = out / VISION_GRAPH
        store_as_int8(graph)
        assert manifest.vision
        files = {**manifest.files, VISION_GRAPH: FileHash(graph.stat().st_size, sha256(graph))}
        described = dataclasses.replace(manifest.vision, precision="int8")
        manifest = dataclasses.replace(manifest, vision=described, files=files)
        (out / MANIFEST).write_text(manifest.to_json(), "utf-8")
