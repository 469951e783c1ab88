"""The rules for a manifest's values: each refuses what it is for, and names the field."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle import manifest as module
from seechat_weights.bundle.manifest import MANIFEST, Manifest
from seechat_weights.errors import BundleError
from seechat_weights.vision.network import PUBLISHED_VISION

# of each field, values that no bundle has
WRONG: dict[str, list[Any]] = {
    "lm.vocab_size": [0, -1],
    "lm.hidden_size": [0],
    "lm.num_layers": [0, 1025],
    "lm.num_heads": [0, 3, 256],
    "lm.inner_size": [0],
    "lm.max_sequence_length": [0],
    "lm.pad_id": [-1, 4112],
    "lm.mask_id": [-1, 4112],
    "lm.gmask_id": [-1, 4112],
    "lm.bos_id": [-1, 4112],
    "lm.eos_id": [-1, 4112],
    "lm.family": ["gpt", ""],
    "lm.num_kv_heads": [-1, 3],
    "lm.rope_theta": [0.0, 1e12],
    "lm.rope_factor": [0.0, float("inf")],
    "lm.rope_original": [-1, 7],
    "lm.layernorm_epsilon": [0.0, 1.0, float("nan")],
    "decoder.embeddings_dtype": ["object"],
    "decoder.precision": ["int3"],
    "decoder.block_size": [0, 48, -32],
    "decoder.prefix_tokens": [0, -1, 2048],
    "tokenizer.num_image_tokens": [-1, 4112],
    "tokenizer.kind": ["spm", ""],
    "sampling.max_temperature": [-1.0, 101.0, float("nan")],
    "sampling.max_repetition_penalty": [0.0, -1.0, float("nan")],
    "sampling.temperature": [-1.0, 101.0, float("nan")],
    "sampling.top_p": [-0.1, 1.1, float("nan")],
    "sampling.top_k": [-1],
    "sampling.repetition_penalty": [0.0, -1.0, float("nan")],
    "vision.question": [{"graph": "vision_question.onnx", "vocabulary": "vocab.txt", "pieces": 8}],
    "vision.tokens": [0],
    "vision.precision": ["int3"],
    "pixels.image_size": [0, 4097],
    "pixels.resize": ["stretch"],
    "pixels.interpolation": ["box"],
    "pixels.mean": [[0.0, float("nan"), 0.0]],
    "pixels.std": [[1.0, 0.0, 1.0], [1.0, 1.0, float("inf")]],
    "pixels.background": [[0, 0, 256], [-1, 0, 0]],
    "vision.tower": ["resnet"],
    "vision.bridge": ["mlp"],
    "vision.network.activation": ["relu"],
    "vision.network.layernorm_epsilon": [0.0, 1.0, float("nan")],
    "vision.network.patch_size": [0, -14, 15],
    "vision.network.width": [0],
    "vision.network.inner_size": [0],
    "vision.network.layers": [0, 1025],
    "vision.network.heads": [0, 5],
    "vision.network.query_width": [0, -1],
    "vision.network.query_inner_size": [0, -1],
    "vision.network.query_layers": [0, -1, 1025],
    "vision.network.query_heads": [0, -1, 5],
    "vision.network.query_words": [-1, 7],
    "vision.network.query_positions": [-1, 7],
}
FILES = {"bytes": 1, "sha256": "0"}
QUESTION_FILES = ("vision_question.onnx", "vision_question.onnx.data", "vocab.txt")


def manifest(tower: str) -> dict[str, Any]:
    """The built-in model's manifest with a published vision network and a prefix of 4 tokens."""
    found = json.loads((BUILTIN / MANIFEST).read_text("utf-8"))
    vision = dataclasses.asdict(PUBLISHED_VISION[tower]) | {"graph": "vision.onnx"}
    lm = found["lm"]
    found["decoder"] |= {"prefix": "prefix.bin", "prefix_tokens": 4}
    size = 2 * lm["num_layers"] * lm["hidden_size"] * 4 * 2
    found["files"] |= {"prefix.bin": FILES | {"bytes": size}, "vision.onnx.data": FILES}
    found["files"] |= dict.fromkeys(QUESTION_FILES, FILES)
    return json.loads(json.dumps(found | {"vision": vision}))


def refused(changed: dict[str, Any]) -> str:
    with pytest.raises(BundleError) as error:
        Manifest.from_json(json.dumps(changed), "m")
    return str(error.value)


def changed(tower: str, name: str, value: Any) -> dict[str, Any]:
    """A manifest with another value in one field."""
    found = at = manifest(tower)
    *parts, last = (f"vision.{name}" if name.startswith("pixels.") else name).split(".")
    for part in parts:
        at = at[part]
    at[last] = value
    return found


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_value_that_makes_no_sense(name: str, value: Any) -> None:
    assert refused(changed("eva", name, value)).startswith(f"m: {name} is ")


@pytest.mark.parametrize("field", ["width", "inner_size", "layers", "heads"])
def test_only_a_qformer_has_queries(field: str) -> None:
    name = f"vision.network.query_{field}"
    assert "0 with the bridge linear" in refused(changed("clip", name, 12))


def test_files() -> None:
    """Their names, their sizes, and that those in use are listed."""
    broken = manifest("eva")
    broken["files"]["../x"] = FILES
    assert "a file name is '../x'" in refused(broken)
    for name, size in (("decoder.onnx", -1), ("embeddings.bin", 5), ("prefix.bin", 5)):
        broken = manifest("eva")
        broken["files"][name]["bytes"] = size
        assert f"files.{name}.bytes is {size}" in refused(broken)
    for name in ("decoder.onnx", "embeddings.bin", "ice_text.model", "prefix.bin", "vision.onnx"):
        broken = manifest("eva")
        del broken["files"][name]
        assert f"a file in use is '{name}'" in refused(broken)


def test_every_rule_is_tried() -> None:
    """These manifests are read, and the table above has every field that they make a rule for."""

    def fields(tower: str) -> Iterator[str]:
        read = Manifest.from_json(json.dumps(manifest(tower)), "m")
        yield from (name for name, *_ in module._rules(read))

    found = {*fields("eva"), *fields("clip")}
    others = {name for name in found if name.startswith(("a file", "files."))}
    assert found - others == WRONG.keys()
