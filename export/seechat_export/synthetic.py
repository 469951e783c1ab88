"""Writes checkpoints and bundles of the published shapes with random weights, to measure with.

The real weights are large, and not everybody may pass them on. The time of an export and the speed
of a bundle depend only on shapes. Weights are drawn so that activations stay near unit scale:
vanishing ones would become denormal numbers, which make processors several times slower.
"""

import importlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from seechat_export.export import (
    EMBEDDINGS,
    FILES,
    GRAPH,
    VISION_FILES,
    WEIGHTS,
    Progress,
    save_graphs,
)
from seechat_export.workplace import Workplace
from seechat_lite.nn.attention import vit_settings
from seechat_weights.bundle.layout import ArraySpan, TensorLayout, decoder_layout
from seechat_weights.bundle.manifest import (
    MANIFEST,
    TOKENIZER_KINDS,
    Decoder,
    FileHash,
    Manifest,
    TokenizerConfig,
    sha256,
)
from seechat_weights.bundle.precisions import PRECISIONS, Precision
from seechat_weights.config import LMConfig, PixelSpec, VisionConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.lm.chatglm import OLD_VOCABULARY, lm_shapes
from seechat_weights.vision.network import PUBLISHED_VISION, parameters
from seechat_weights.vision.weights import GRAPH as VISION_GRAPH
from seechat_weights.vision.weights import VisionWeights

SHARD_BYTES = 2_000_000_000  # size of the published shards, cut when the vocabulary was the old one
BASE_PIECES = 130_000  # pieces of the tokenizer before the special ones
PUBLISHED = LMConfig()
POOL = 1 << 24  # random bytes drawn at a time


def write_synthetic(
    folder: Path,
    *,
    layers: int = 28,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write `folder`/chatglm-6b, `folder`/clip-vit-large-patch14 and `folder`/mm_projector.bin.

    The LM is laid out as published: .bin shards in half precision with float32 layer norms, an
        index, config.json, and a tokenizer of the ICE layout with the published ids. With all 28
        layers it takes 13.4 GB.

    folder: must not exist.
    layers: layers of the LM.
    seed: of the random weights.
    progress: called with what is being done, how much is done, and how much there is.

    Raises CheckpointError if the folder already exists.
    """
    if os.path.lexists(folder):
        raise CheckpointError(
            f"{folder}: exists already; expected a new folder: remove it or choose another place",
            options={"out": None},
        )
    config = LMConfig(num_layers=layers)
    generator = torch.Generator().manual_seed(seed)
    lm = folder / "chatglm-6b"
    lm.mkdir(parents=True)
    (lm / "config.json").write_text(json.dumps(_published_config(config), indent=1), "utf-8")
    write_tokenizer(lm / "ice_text.model")
    _write_shards(lm, config, generator, progress)
    _write_vision(folder, config.hidden_size, generator)


def write_tokenizer(path: Path) -> None:
    """Write a sentencepiece model of ChatGLM-6B's layout and size: 130344 pieces, published ids.

    Its pieces are ASCII characters, Chinese characters and pairs of them, so that ordinary Chinese
    takes about as many tokens as with the real model.

    path: the file to write.
    """
    # protobuf makes these classes at import: type checkers cannot see them
    pb: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    kinds = pb.ModelProto.SentencePiece
    control = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    pieces = [("<unk>", 0.0, kinds.UNKNOWN), ("<s>", 0.0, kinds.CONTROL)]
    pieces += [("</s>", 0.0, kinds.CONTROL), ("<pad>", 0.0, kinds.CONTROL)]
    pieces += [("<n>", 0.0, kinds.USER_DEFINED)]
    for text in _texts(BASE_PIECES - len(pieces)):
        pieces.append((text, -10.0 if len(text) > 1 else -12.0, kinds.NORMAL))
    pieces += [(name, 0.0, kinds.CONTROL) for name in control]
    blanks = ["<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
    pieces += [(name, 0.0, kinds.USER_DEFINED) for name in blanks]
    pieces += [(f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)]
    model = pb.ModelProto()
    model.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id = 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    path.write_bytes(model.SerializeToString())


def write_llama_tokenizer(path: Path, count: int) -> None:
    """Write a sentencepiece model of LLaMA's layout: BPE with byte fallback, the published ids.

    Its pieces are characters and pairs of them, so that text takes about as many tokens as with the
    real model.

    path: the file to write.
    count: how many pieces.
    """
    # protobuf makes these classes at import: type checkers cannot see them
    pb: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    kinds = pb.ModelProto.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    letters = [chr(c) for c in range(33, 127)]
    pairs = dict.fromkeys(
        a + b for a in ("▁", *letters) for b in letters if (a + b).isascii() or a == "▁"
    )
    texts = [*pairs, "▁", *letters, *(chr(c) for c in range(0x4E00, 0xA000))]
    pieces += [(text, kinds.NORMAL) for text in texts[: count - len(pieces)]]
    pieces += [(f"▁{10 + i}", kinds.NORMAL) for i in range(count - len(pieces))]
    model = pb.ModelProto()
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for i, (text, kind) in enumerate(pieces):
        model.pieces.add(piece=text, score=-float(i) if kind == kinds.NORMAL else 0.0, type=kind)
    path.write_bytes(model.SerializeToString())


def _texts(count: int) -> list[str]:
    common = [chr(c) for c in range(0x4E00, 0xA000)]
    singles = ["▁", *(chr(c) for c in range(33, 127)), *common]
    # each pair once, spread over the whole block; the second character moves by a growing step
    pairs = (
        common[i] + common[(i * 7 + step * 131) % len(common)]
        for step in range(1, 9)
        for i in range(len(common))
    )
    texts = dict.fromkeys(singles)
    for pair in pairs:
        if len(texts) == count:
            break
        texts[pair] = None
    return list(texts)


def _published_config(config: LMConfig) -> dict[str, Any]:
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "inner_hidden_size": config.inner_size,
        "layernorm_epsilon": config.layernorm_epsilon,
        "max_sequence_length": config.max_sequence_length,
        "pad_token_id": config.pad_id,
        "mask_token_id": config.mask_id,
        "gmask_token_id": config.gmask_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "position_encoding_2d": True,
        "torch_dtype": "float16",
    }


def _write_shards(
    folder: Path, config: LMConfig, generator: torch.Generator, progress: Progress
) -> None:
    plan = list(_shards(config))
    shapes = lm_shapes(config)
    total = sum(_bytes(k, s) for k, s in shapes.items())
    done, weight_map = 0, {}
    embeddings = torch.Generator().manual_seed(generator.initial_seed() + 1)
    for number, keys in enumerate(plan, start=1):
        file = f"pytorch_model-{number:05}-of-{len(plan):05}.bin"
        state = {}
        for key in keys:
            # the head equals the word embeddings: both are drawn from the same state
            tied = key in ("word_embeddings.weight", "lm_head.weight")
            source = embeddings.manual_seed(generator.initial_seed() + 1) if tied else generator
            published = key if key == "lm_head.weight" else f"transformer.{key}"
            state[published] = _random(key, shapes[key], source)
            if key.endswith("attention.query_key_value.weight"):  # this buffer is published with it
                buffer = published.replace("query_key_value.weight", "rotary_emb.inv_freq")
                state[buffer] = torch.ones(config.head_size // 4, dtype=torch.float16)
            done += _bytes(key, shapes[key])
            progress("weights", done, total)
        torch.save(state, folder / file)
        weight_map |= dict.fromkeys(state, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1), "utf-8")


def _shards(config: LMConfig) -> Iterator[list[str]]:
    """Which tensors share a file; the files are cut as published, for the old vocabulary."""
    old = lm_shapes(replace(config, vocab_size=OLD_VOCABULARY))
    shard, size = [], 0
    for key, shape in old.items():
        if shard and size + _bytes(key, shape) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += _bytes(key, shape)
    yield shard


def _bytes(key: str, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * (4 if "layernorm" in key else 2)


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One tensor: unit layer norms, zero biases, matrices that keep the scale of their input."""
    if "layernorm" in key:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    if key.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    # logits with a standard deviation of about 2, so that answers are neither flat nor stuck
    scale = (2.0 if len(shape) == 2 and shape[0] > 100_000 else 1.0) * shape[1] ** -0.5
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(scale).half()


def _write_vision(folder: Path, hidden: int, generator: torch.Generator) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(generator.initial_seed())
    clip = PUBLISHED_VISION["clip"]
    network = clip.network
    assert network
    # with the last layer, which no bridge reads
    whole = replace(network, layers=network.layers + 1)
    config = CLIPVisionConfig(**vit_settings(whole, clip.pixels.image_size))
    tower = folder / "clip-vit-large-patch14"
    config.save_pretrained(tower)
    save_file(CLIPVisionModel(config).half().state_dict(), tower / "model.safetensors")
    weight = _random("mm_projector.weight", (hidden, network.width), generator)
    state = {"mm_projector.weight": weight, "mm_projector.bias": weight.new_zeros(hidden)}
    torch.save(state, folder / "mm_projector.bin")


@dataclass(frozen=True)
class Synthetic:
    """A model of a published shape, to be written with random weights.

    name: what it is called.
    lm: the decoder's shape.
    conversation: its format.
    vision: describes its vision network; None for a model without.
    """

    name: str
    lm: LMConfig
    conversation: str
    vision: VisionConfig | None = None


_LLAMA_7B = LMConfig(
    family="llama",
    vocab_size=32000,
    num_layers=32,
    inner_size=11008,
    max_sequence_length=4096,
    pad_id=0,
    mask_id=0,
    gmask_id=0,
    bos_id=1,
    eos_id=2,
)
_CLIP, _EVA = PUBLISHED_VISION["clip"], PUBLISHED_VISION["eva"]
MODELS = {
    m.name: m
    for m in (
        Synthetic("chatglm-6b", PUBLISHED, "chatglm"),
        Synthetic("llama-7b", _LLAMA_7B, "vicuna_v1"),
        Synthetic(
            "llava-1.5-7b",
            _LLAMA_7B,
            "vicuna_v1",
            replace(
                _CLIP,
                graph=VISION_GRAPH,
                tokens=576,
                bridge="mlp2x_gelu",
                pixels=PixelSpec(image_size=336, resize="square", background=(122, 116, 104)),
            ),
        ),
        Synthetic(
            "minigpt4-7b",
            replace(_LLAMA_7B, max_sequence_length=2048, layernorm_epsilon=1e-6),
            "minigpt4",
            replace(_EVA, graph=VISION_GRAPH),
        ),
    )
}


def write_llama(folder: Path, **options: Any) -> None:
    """write_synthetic_bundle of a LLaMA-7B."""
    write_synthetic_bundle(folder, model=MODELS["llama-7b"], **options)


def write_llava(folder: Path, **options: Any) -> None:
    """write_synthetic_bundle of a LLaVA-1.5-7B, its vision network included."""
    write_synthetic_bundle(folder, model=MODELS["llava-1.5-7b"], **options)


def write_minigpt4(folder: Path, **options: Any) -> None:
    """write_synthetic_bundle of a MiniGPT-4 on Vicuna-7B, its vision network included."""
    write_synthetic_bundle(folder, model=MODELS["minigpt4-7b"], **options)


def write_synthetic_bundle(
    folder: Path,
    *,
    precision: str = "int4",
    block_size: int = 128,
    layers: int | None = None,
    model: Synthetic = MODELS["chatglm-6b"],
    shape: LMConfig | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write directly what `seechat export` would make of a synthetic model.

    Its quantized weights are random codes and one scale, so this takes only the time to write 3.5
    GB. It is atomic: `folder` appears when it is complete.

    folder: must not exist.
    precision: a name of precisions.PRECISIONS.
    block_size: inputs that share a scale.
    layers: layers of the LM; None for all.
    model: what to write.
    shape: other sizes of the LM than the model's.
    progress: called with what is being done, how much is done, and how much there is.
    """
    config, form = shape or model.lm, PRECISIONS[precision]
    config = replace(config, num_layers=layers or config.num_layers)
    block_size = block_size if form.block else 0
    place = Workplace(folder, {*FILES, *VISION_FILES})
    with place.held():
        partial = place.folder
        place.record()
        place.clear()
        save_graphs(partial, config, form, block_size)
        items = decoder_layout(config, form, block_size)
        size = items[-1].end
        generator = np.random.default_rng(0)
        with (partial / WEIGHTS).open("wb") as f:
            for item in items:
                progress("weights", item.stored[0].offset, size)
                for stored in item.stored:
                    f.seek(stored.offset)
                    for block in _random_blocks(stored, item, form, generator):
                        f.write(block)
            f.truncate(size)
        progress("weights", size, size)
        table = generator.standard_normal((1024, config.hidden_size), np.float32)
        rows = (table * (2 * config.hidden_size**-0.5)).astype(np.float16)
        with (partial / EMBEDDINGS).open("wb") as f:
            for start in range(0, config.vocab_size, len(rows)):
                f.write(rows[: config.vocab_size - start].data)
        tokenizer = TokenizerConfig()
        if config.family == "llama":
            tokenizer = TokenizerConfig(TOKENIZER_KINDS["llama"], kind="llama")
            write_llama_tokenizer(partial / tokenizer.file, config.vocab_size)
        else:
            write_tokenizer(partial / tokenizer.file)
        vision = model.vision
        if vision:
            vision = replace(vision, precision="fp32" if form.exact else "fp16")
            _write_vision_graph(partial, vision, config.hidden_size, progress)
        files = sorted(partial.iterdir())
        manifest = Manifest(
            name=f"synthetic {model.name}, {config.num_layers} layers",
            lm=config,
            decoder=Decoder(GRAPH, EMBEDDINGS, "float16", precision, block_size),
            tokenizer=tokenizer,
            conversation=model.conversation,
            vision=vision,
            files={f.name: FileHash(f.stat().st_size, sha256(f)) for f in files},
            provenance={"note": "random weights: measures speed and memory, says nothing"},
        )
        (partial / MANIFEST).write_text(manifest.to_json(), "utf-8")
        place.deliver()


def _write_vision_graph(
    folder: Path, config: VisionConfig, hidden: int, progress: Progress
) -> None:
    """Write a vision network of random weights; only a layer of them exists at a time."""
    from seechat_export.vision_graph import export_vision
    from seechat_lite.nn.vision import streamed

    sizes = parameters(config, hidden)

    def read(name: str) -> np.ndarray:
        shape = sizes[name]
        if len(shape) == 1:
            one = name.endswith(".weight")  # a norm's
            return np.full(shape, float(one), np.float32)
        drawn = np.random.default_rng([*shape, len(name)]).standard_normal(shape, np.float32)
        return drawn * np.float32(math.prod(shape[1:]) ** -0.5)

    progress("vision", 0, 1)
    network = streamed(VisionWeights(config, hidden, sizes, read))
    export_vision(network, config, folder / config.graph, precision=config.precision)
    progress("vision", 1, 1)


def _random_blocks(
    stored: ArraySpan, item: TensorLayout, precision: Precision, generator: np.random.Generator
) -> Iterator[bytes | memoryview]:
    """Yield an array's bytes, piece by piece, with the scale that keeps activations near unit.

    No two weights are the same: ONNX Runtime keeps equal ones only once, and would seem frugal and
        fast.
    """
    if item.kind == "vector":
        value = 1.0 if item.key.endswith("norm.weight") else 0.0
        yield np.full(stored.shape, value, np.float32).data
    elif stored.name.endswith(".scales"):
        # codes spread evenly over 2**bits steps have a deviation of 2**bits / sqrt(12)
        scale = item.shape[1] ** -0.5 * 12**0.5 / 2**precision.bits
        yield np.full(stored.shape, scale, stored.dtype).data
    elif precision.block:
        for start in range(0, stored.nbytes, POOL):
            yield generator.bytes(min(POOL, stored.nbytes - start))
    else:
        size = np.dtype(stored.dtype).itemsize
        for start in range(0, stored.nbytes, POOL * size):
            codes = generator.bytes(min(POOL, (stored.nbytes - start) // size))
            spread = np.frombuffer(codes, np.uint8).astype(np.float32) - 127.5
            yield (spread / 73.9 * item.shape[1] ** -0.5).astype(stored.dtype).data
