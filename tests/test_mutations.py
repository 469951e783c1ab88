"""Files changed at random: each is refused with an error of ours, or read.

Seeded, so that every run makes the same changes. A crash of the process is a failure as well.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hostile import READ
from reference import data
from seechat_weights.bundle.manifest import Manifest
from seechat_weights.errors import SeechatError
from seechat_weights.files.checkpoint import read_json
from seechat_weights.lm.chatglm import lm_config

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(3).half(),
    "c": torch.ones(2).bfloat16(),
}
ROUNDS = 400  # mutations of a file
TELLING = b"\0\1\x7f\x80\xff.()[]{}RVbcqt"  # bytes that mean something to one of the formats


def saved(*, zipped: bool) -> bytes:
    file = io.BytesIO()
    content = {"model": TENSORS, "optimizer": {"lr": 1e-3}, "config": {"x": [1, None]}, "epoch": 3}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def read_config(path: Path) -> None:
    lm_config(read_json(path))


def read_index(path: Path) -> None:
    READ["checkpoint"](path.parent)


def read_manifest(path: Path) -> None:
    content = path.read_bytes().decode("utf-8", "replace")
    Manifest.from_json(content, str(path))


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes replaced, pieces cut out, repeated, swapped, or the end cut off."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        i, j = chance.randrange(len(changed)), chance.randrange(len(changed))
        n = chance.choice((1, 2, 4, 8, 64, 256))
        what = chance.randrange(13)
        if what < 4:
            changed[i] ^= 1 << chance.randrange(8)
        elif what < 6:
            changed[i] = chance.choice(TELLING)
        elif what < 8:
            del changed[i : i + n]
        elif what < 9:
            changed[i:i] = changed[j : j + n]
        elif what < 11:
            changed[i : i + n], changed[j : j + n] = changed[j : j + n], changed[i : i + n]
        elif what < 12:
            changed[i : i + n] = chance.randbytes(n)
        elif chance.random() < 0.3:
            del changed[i:]
        if not changed:
            break
    return bytes(changed)


INDEX = "pytorch_model.bin.index.json"
WEIGHT_MAP = b'{"weight_map": {"a": "w.bin", "b": "w.bin", "c": "w.bin"}}'
CASES: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], None]]] = {
    "zip": ("a.pth", lambda: saved(zipped=True), READ["checkpoint"]),
    "legacy": ("a.pth", lambda: saved(zipped=False), READ["checkpoint"]),
    "safetensors": ("a.safetensors", lambda: save(TENSORS), READ["checkpoint"]),
    "config": ("config.json", data("chatglm_tiny/config.json").read_bytes, read_config),
    "index": (INDEX, lambda: WEIGHT_MAP, read_index),
    "tokenizer": ("t", data("tokenizer/variant_identity.model").read_bytes, READ["tokenizer"]),
    "png": ("a.png", data("images/04_palette_P_transparent.png").read_bytes, READ["picture"]),
    "png, 16 bits": ("a.png", data("images/06_gray16.png").read_bytes, READ["picture"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")  # about what it will not read
@pytest.mark.parametrize("kind", CASES)
def test_mutations(tmp_path: Path, kind: str) -> None:
    name, make, read = CASES[kind]
    content, chance, file = make(), random.Random(kind), tmp_path / name
    (tmp_path / "w.bin").write_bytes(saved(zipped=True))
    file.write_bytes(content)
    read(file)
    refused = 0
    for i in range(ROUNDS):
        file.write_bytes(mutated(content, chance))
        try:
            read(file)
        except SeechatError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000, (i, e)
            refused += 1
    assert ROUNDS // 20 < refused < ROUNDS  # it does see damage, and not everything is damage
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, "w.bin"})


def test_mutated_manifests(tmp_path: Path, text_bundle: Path) -> None:
    content, chance = (text_bundle / "seechat.json").read_bytes(), random.Random(1)
    file, refused = tmp_path / "seechat.json", 0
    json.loads(content)
    for _ in range(ROUNDS):
        file.write_bytes(mutated(content, chance))
        try:
            read_manifest(file)
        except SeechatError:
            refused += 1
    assert refused > ROUNDS // 20
