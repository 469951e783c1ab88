"""The published files themselves: tokenizers, configurations, indexes, encodings.

The models' licence forbids passing the tokenizers on: they, and what else is not ours to copy, are
read from the folder that SEECHAT_REFERENCE names (default: shared/reference beside the checkout),
and skipped where it is absent. chatglm.cpp's data is in tests/data under its own licence.
"""

import hashlib
import json
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from networks import prefixed_cache
from reference import data, manifest
from seechat_export.export import export_bundle
from seechat_export.reference_chatglm import ChatGLM, KVCache
from seechat_lite.prompt import position_ids
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.config import LMConfig
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.identify import identify
from seechat_weights.lm.chatglm import lm_config, lm_shapes
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.tokenizer_file import completed
from seechat_weights.vision.blip_names import map_visualglm, visualglm_overlay

_BESIDE = Path(__file__).parents[1].parent / "shared" / "reference"
REAL = Path(os.environ.get("SEECHAT_REFERENCE", _BESIDE)) / "real"
FAMILY = REAL / "family"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no published files in {REAL}")

LATER = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
CODES = {"float16": "F16", "float32": "F32"}
BYTES = {"float16": 2, "float32": 4}


def load(path: str) -> Any:
    return json.loads((REAL / path).read_text("utf-8"))


@pytest.fixture(scope="module")
def ice() -> Tokenizer:
    return Tokenizer(REAL / "tokenizer/ice_text.model")


# --- tokenizers


@needs_real
def test_the_first_tokenizer_becomes_the_later_one_byte_for_byte() -> None:
    first = (REAL / "tokenizer/ice_text.v0.model").read_bytes()
    made = completed(first)
    assert hashlib.sha256(made).hexdigest() == LATER
    assert completed(made) == made
    assert made == (REAL / "tokenizer/ice_text.model").read_bytes()


@needs_real
def test_a_changed_first_tokenizer_is_left_alone() -> None:
    changed = bytearray((REAL / "tokenizer/ice_text.v0.model").read_bytes())
    changed[1000] ^= 1
    assert completed(bytes(changed)) == bytes(changed)


@needs_real
@pytest.mark.parametrize("name", ["ice_text.model", "ice_text.v0.model"])
@pytest.mark.parametrize("shift", [0, 20000])
def test_both_tokenizers_are_those_of_the_published_configurations(name: str, shift: int) -> None:
    folder = "chatglm-6b_150528" if shift else "chatglm-6b_130528"
    config = lm_config(load(f"family/{folder}/config.json"))
    tokenizer = Tokenizer(REAL / "tokenizer" / name, num_image_tokens=shift)
    tokenizer.check(config)
    assert tokenizer.vocab_size == 130344 + shift
    assert identify(REAL / "tokenizer" / name).kind == "tokenizer"


@needs_real
def test_published_encodings(ice: Tokenizer) -> None:
    cases = load("transcripts/golden_tokens.json")["encodings"]
    assert len(cases) == 16
    for case in cases:
        ids, text = case["ids"], case["text"]
        tail = [ice.gmask_id, ice.bos_id] if ids[-2:] == [ice.gmask_id, ice.bos_id] else []
        tail = [ice.eos_id] if ids[-1] == ice.eos_id else tail
        assert ice.encode(text) + tail == ids, text
        # full-width punctuation becomes ASCII
        assert ice.decode(ids) == unicodedata.normalize("NFKC", text), text


@needs_real
def test_published_positions() -> None:
    config = LMConfig()
    for case in load("transcripts/golden_tokens.json")["positions"]:
        found = position_ids(
            case["ids"], gmask_id=config.gmask_id, mask_id=config.mask_id, bos_id=config.bos_id
        )
        assert found.tolist() == case["position_ids"], case["source"]


# --- configurations and indexes


@needs_real
def test_every_published_configuration_is_read() -> None:
    configs = [*FAMILY.glob("*/config.json"), *FAMILY.glob("*/*.config.json")]
    assert len(configs) == 17
    shapes: Counter[tuple[int, int]] = Counter()
    for path in configs:
        config = lm_config(json.loads(path.read_text("utf-8")), where=str(path))
        assert (config.hidden_size, config.num_layers, config.num_heads) == (4096, 28, 32), path
        assert (config.inner_size, config.layernorm_epsilon) == (16384, 1e-5), path
        assert config.bos_id + 1 == config.eos_id and config.mask_id + 1 == config.gmask_id, path
        shapes[config.vocab_size, config.bos_id] += 1
    assert set(shapes) == {(130528, 130004), (150528, 150004)}


def numbers_of(index: dict[str, Any], name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """What every tensor of an index is: names from it, shapes and dtypes as published."""
    shapes = manifest(name)
    found = {key: shapes[key] for key in index["weight_map"] if key in shapes}
    layer = next(key for key in shapes if key.endswith("rotary_emb.inv_freq"))
    for key in index["weight_map"]:
        if key.endswith("rotary_emb.inv_freq"):
            found.setdefault(key, shapes[layer])
    assert found.keys() == index["weight_map"].keys()
    return found


def size_of(tensors: dict[str, tuple[tuple[int, ...], str]]) -> int:
    return sum(int(np.prod(shape)) * BYTES[dtype] for shape, dtype in tensors.values())


def write_holes(path: Path, tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """A file of those tensors that takes no room on the disk."""
    header, end = {}, 0
    for key, (shape, dtype) in tensors.items():
        size = int(np.prod(shape)) * BYTES[dtype]
        header[key] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(f.tell() + end)


def write_published(folder: Path, source: Path, tensors: dict[str, Any]) -> Path:
    """A download of the published layout, of which only what `source` holds has contents."""
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin.index.json"):
        shutil.copy(source / name, folder)
    shards: dict[str, dict[str, Any]] = {}
    for key, file in json.loads((source / "pytorch_model.bin.index.json").read_text("utf-8"))[
        "weight_map"
    ].items():
        shards.setdefault(file, {})[key] = tensors[key]
    for file, own in shards.items():
        write_holes(folder / file, own)
    return folder


@needs_real
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("chatglm-6b_130528", "chatglm-6b"),
        ("chatglm-6b_150528", "chatglm-6b-150528"),
        ("medicalgpt-zh", "chatglm-6b-150528"),
    ],
)
def test_chatglm_indexes(folder: str, name: str, tmp_path: Path) -> None:
    """Names, shards, dtypes, sizes; the new vocabulary's index states the old one's total."""
    index = load(f"family/{folder}/pytorch_model.bin.index.json")
    tensors = numbers_of(index, name)
    old = size_of(numbers_of(index, "chatglm-6b-150528"))
    assert index["metadata"]["total_size"] == old == 13_744_473_856
    expected = 13_744_473_856 if "150528" in name else 13_416_793_856
    assert size_of(tensors) == expected
    for key, (_, dtype) in tensors.items():
        assert dtype == ("float32" if "layernorm" in key else "float16"), key
    lm = open_lm(write_published(tmp_path / "lm", FAMILY / folder, tensors))
    assert lm.config.vocab_size == (150528 if "150528" in name else 130528)
    assert {k: v.shape for k, v in lm.shapes.items()} == lm_shapes(lm.config)
    assert set(lm.ignored["lm"].values()) == {"computed from the head size"}
    assert len(lm.ignored["lm"]) == 28


@needs_real
def test_published_shards_have_the_sizes_of_their_pointers() -> None:
    """What every shard weighs is what its tensors take, and some 10 kB of names."""
    pointers = (FAMILY / "pointers/chatglm-6b_main_lfs_pointers.txt").read_text("utf-8")
    sizes = [int(line.split()[1]) for line in pointers.splitlines() if line.startswith("size")]
    index = load("family/chatglm-6b_130528/pytorch_model.bin.index.json")
    tensors, shards = numbers_of(index, "chatglm-6b"), dict[str, dict[str, Any]]()
    for key, file in index["weight_map"].items():
        shards.setdefault(file, {})[key] = tensors[key]
    for file, size in zip(sorted(shards), sizes, strict=True):
        assert 0 < size - size_of(shards[file]) < 30_000, file


@needs_real
def test_visualglm_index(tmp_path: Path) -> None:
    """Its vision and all norms are float32: the only dtypes that give the total of its index."""
    index = load("family/visualglm-6b_hf/pytorch_model.bin.index.json")
    lm = {f"transformer.{k}": s for k, s in lm_shapes(LMConfig()).items() if k != "lm_head.weight"}
    shapes = {"lm_head.weight": (130528, 4096), **lm, **visualglm_vision()}
    tensors = {}
    for key in index["weight_map"]:
        shape = (32,) if key.endswith("inv_freq") else shapes[key]
        full = key.startswith("image_encoder.") or "layernorm" in key
        tensors[key] = (shape, "float32" if full else "float16")
    assert size_of(tensors) == index["metadata"]["total_size"] == 17_793_851_136
    folder = write_published(tmp_path / "lm", FAMILY / "visualglm-6b_hf", tensors)
    lm = open_lm(folder)
    assert (lm.conversation, lm.config.vocab_size) == ("visualglm", 130528)
    source = visualglm_overlay(open_checkpoint(folder))
    assert source
    names = map_visualglm(source)
    assert (names.network.layers, names.network.query_layers, names.queries) == (39, 12, 32)
    assert (names.network.width, names.network.query_width, names.outputs) == (1408, 768, 4096)
    used = {key for part in names.used.values() for key in part.names}
    assert used | set(names.ignored) == {k for k in tensors if k.startswith("image_encoder.")}


def visualglm_vision() -> dict[str, tuple[int, ...]]:
    """VisualGLM-6B's vision tensors at its configuration's sizes, in SAT's names."""
    config = load("family/visualglm-6b_hf/config.json")
    eva, query = config["eva_config"], config["qformer_config"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(key: str, outputs: int, inputs: int) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (outputs, inputs), (outputs,)

    def norm(key: str, width: int) -> None:
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (width,)

    vit, qformer = "image_encoder.vit", "image_encoder.qformer"
    h, inner = eva["hidden_size"], eva["inner_hidden_size"]
    shapes[f"{vit}.transformer.word_embeddings.weight"] = (1, h)
    shapes[f"{vit}.transformer.position_embeddings.weight"] = (257, h)
    shapes[f"{vit}.mixins.patch_embedding.proj.weight"] = (h, 3, 14, 14)
    shapes[f"{vit}.mixins.patch_embedding.proj.bias"] = (h,)
    norm(f"{vit}.mixins.cls.ln_vision", h)
    for i in range(eva["num_layers"]):
        layer = f"{vit}.transformer.layers.{i}"
        norm(f"{layer}.input_layernorm", h)
        linear(f"{layer}.attention.query_key_value", 3 * h, h)
        linear(f"{layer}.attention.dense", h, h)
        norm(f"{layer}.post_attention_layernorm", h)
        linear(f"{layer}.mlp.dense_h_to_4h", inner, h)
        linear(f"{layer}.mlp.dense_4h_to_h", h, inner)
    q = query["hidden_size"]
    shapes[f"{qformer}.transformer.word_embeddings.weight"] = (32, q)
    norm(f"{qformer}.transformer.final_layernorm", q)
    norm(f"{qformer}.mixins.bert-final.layernorm", q)
    for i in range(query["num_layers"]):
        layer = f"{qformer}.transformer.layers.{i}"
        norm(f"{layer}.input_layernorm", q)
        linear(f"{layer}.attention.query_key_value", 3 * q, q)
        linear(f"{layer}.attention.dense", q, q)
        norm(f"{layer}.post_attention_layernorm", q)
        linear(f"{layer}.mlp.dense_h_to_4h", 4 * q, q)
        linear(f"{layer}.mlp.dense_4h_to_h", q, 4 * q)
        if query["is_decoder"][i]:
            norm(f"{layer}.post_cross_attention_layernorm", q)
            linear(f"{layer}.cross_attention.query", q, q)
            linear(f"{layer}.cross_attention.key_value", 2 * q, h)
            linear(f"{layer}.cross_attention.dense", q, q)
    linear("image_encoder.glm_proj", 4096, q)
    return shapes


# --- chatglm.cpp's model


def read_chatglm_cpp(file: str, *, prefix: bool) -> tuple[ChatGLM, Any, list[np.ndarray]]:
    """The model, its prefix [1, 2, 8, 5, 4] if any, and the last hidden states of 3, 1, 1 tokens.

    The file holds arrays one after the other: the prefix in float16, the weights, then ids and
    hidden states in turn.
    """
    config = LMConfig(
        vocab_size=5, hidden_size=32, num_layers=1, num_heads=8, inner_size=128,
        mask_id=0, gmask_id=1, bos_id=2, eos_id=3,
    )  # fmt: skip
    raw, at = data(f"chatglm_cpp/{file}").read_bytes(), 0

    def take(shape: tuple[int, ...], dtype: str = "<f4") -> np.ndarray:
        nonlocal at
        array = np.frombuffer(raw, dtype, int(np.prod(shape)), at).reshape(shape)
        at += array.nbytes
        return array.copy()

    before = torch.from_numpy(take((1, 2, 8, 5, 4), "<f2")).float() if prefix else None
    shapes = lm_shapes(config)
    head = shapes.pop("lm_head.weight")
    state = {key: torch.from_numpy(take(shape)) for key, shape in shapes.items()}
    state["lm_head.weight"] = torch.zeros(head)  # it has none: hidden states are compared
    with torch.device("meta"):
        model = ChatGLM(config)
    model.load_state_dict(state, assign=True)
    model.rotary = ChatGLM(config).rotary
    expected = []
    for ids in ([0, 1, 2], [3], [4]):
        assert take((len(ids),), "<i4").tolist() == ids
        expected.append(take((len(ids), 32)))
    assert at == len(raw)
    return model.eval().requires_grad_(False), before, expected


@pytest.mark.parametrize("prefix", [False, True])
def test_chatglm_cpp(prefix: bool) -> None:
    file = "glm_ptuning_v2_model.data" if prefix else "glm_model.data"
    model, before, expected = read_chatglm_cpp(file, prefix=prefix)
    ids, config = torch.arange(5), model.config
    positions = torch.from_numpy(
        position_ids(
            ids.tolist(), gmask_id=config.gmask_id, mask_id=config.mask_id, bos_id=config.bos_id
        )
    )
    cache = KVCache.empty(model, 5) if before is None else prefixed_cache(model, 10, before)
    found = []
    for start, end in ((0, 2), (2, 3), (3, 4), (4, 5)):  # the context, and what follows
        x = model.word_embeddings(ids[start:end])[None]
        states = model.hidden_states(x, positions[None, :, start:end], cache=cache)
        found.append(states[-1][0])
    np.testing.assert_allclose(torch.cat(found), np.concatenate(expected), atol=1e-5)


@needs_real
def test_an_export_writes_the_later_tokenizer(tmp_path: Path) -> None:
    """Of a small model with the published vocabulary and the first tokenizer."""
    config = load("family/chatglm-6b_130528/config.json")
    config |= {"hidden_size": 16, "inner_hidden_size": 32, "num_layers": 1}
    config["num_attention_heads"] = 2
    lm = tmp_path / "lm"
    lm.mkdir()
    (lm / "config.json").write_text(json.dumps(config))
    shutil.copyfile(REAL / "tokenizer/ice_text.v0.model", lm / "ice_text.model")
    generator = torch.Generator().manual_seed(0)
    state = {
        key if key == "lm_head.weight" else f"transformer.{key}": torch.randn(
            shape, generator=generator
        )
        for key, shape in lm_shapes(lm_config(config)).items()
    }
    torch.save(state, lm / "pytorch_model.bin")
    out = tmp_path / "bundle"
    export_bundle(lm=lm, out=out, precision="fp32")
    assert hashlib.sha256((out / "ice_text.model").read_bytes()).hexdigest() == LATER
