"""Bundles: whatever is damaged, foreign or forged is refused with a readable error."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import seechat_lite as sl
from reference import data
from seechat_export.export import export_bundle
from seechat_lite.engines.onnx.memory import bundle_plan as plan
from seechat_weights.bundle.manifest import MANIFEST, Manifest, read_manifest, verify_hashes

FILES = [
    *("decoder.onnx", "decoder.onnx.data", "embeddings.bin", "ice_text.model"),
    *("vision.onnx", "vision.onnx.data"),
]
PICTURE = Image.linear_gradient("L")


@pytest.fixture
def bundle(vision_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(vision_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def record(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file's new content, as a forger would."""
    content = (bundle / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(bundle, lambda m: m["files"].update({name: entry}))


def refusal(bundle: Path) -> str:
    """The message of the error that loading raises."""
    with pytest.raises(sl.BundleError) as error, sl.load(bundle):
        pass
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


# --- files


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    message = refusal(bundle)
    assert name in message and "sha256" in message and "copy the bundle again" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert f"{name}: missing" in refusal(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(bundle: Path, name: str) -> None:
    os.truncate(bundle / name, 1000)
    assert "1000 bytes, the manifest says" in refusal(bundle)


def test_something_else_in_a_files_place(bundle: Path) -> None:
    (bundle / "embeddings.bin").unlink()
    (bundle / "embeddings.bin").mkdir()
    assert "not a file" in refusal(bundle)
    if hasattr(os, "mkfifo"):
        (bundle / "embeddings.bin").rmdir()
        os.mkfifo(bundle / "embeddings.bin")  # opening it would wait for ever
        assert "not a file" in refusal(bundle)


def test_links_of_a_download_cache_are_followed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for name in [*FILES, MANIFEST]:
        (bundle / name).rename(tmp_path / "blobs" / name)
        (bundle / name).symlink_to(tmp_path / "blobs" / name)
    sl.load(bundle).close()


def test_no_bundle(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "holds no seechat.json" in refusal(tmp_path)
    (tmp_path / "file").write_text("x")
    assert "a file; expected a bundle, which is a folder" in refusal(tmp_path / "file")


def test_a_pointer_instead_of_the_tokenizer(bundle: Path) -> None:
    (bundle / "ice_text.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:5e97\nsize 2706249\n"
    )
    assert "the manifest says" in refusal(bundle)
    record(bundle, "ice_text.model")
    assert "Git LFS pointer" in refusal(bundle)


# --- files of another model


def foreign_model(tmp_path: Path) -> Path:
    source = Path(shutil.copytree(data("chatglm_tiny28"), tmp_path / "source"))
    shutil.copy(data("chatglm_tiny/ice_text.model"), source)
    export_bundle(lm=source, out=tmp_path / "foreign", precision="fp32")
    return tmp_path / "foreign"


def test_the_decoder_of_another_model(bundle: Path, tmp_path: Path) -> None:
    foreign = foreign_model(tmp_path)
    for name in ("decoder.onnx", "decoder.onnx.data"):
        shutil.copy(foreign / name, bundle / name)
        record(bundle, name)
    assert "decoder.onnx: the graph has a tensor 'layers.0." in refusal(bundle)
    shutil.copy(bundle / "vision.onnx", bundle / "decoder.onnx")
    record(bundle, "decoder.onnx")
    assert "decoder.onnx: the graph has " in refusal(bundle)


def test_the_vision_of_another_model(bundle: Path) -> None:
    shutil.copy(bundle / "decoder.onnx", bundle / "vision.onnx")
    record(bundle, "vision.onnx")
    with sl.load(bundle) as model:  # pictures are loaded when the first is shown
        with pytest.raises(sl.BundleError, match=r"vision\.onnx: the graph has control flow"):
            model.chat().ask("?", PICTURE)
        assert model.chat().ask("你好", max_new_tokens=2)


@pytest.mark.parametrize("name", ["decoder.onnx", "vision.onnx"])
def test_a_graph_that_is_none(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"not a graph")
    record(bundle, name)
    with pytest.raises(sl.BundleError, match="the graph has a field of an unknown kind") as error:
        sl.load(bundle).chat().ask("?", PICTURE)
    assert "\n" not in str(error.value)


def test_the_embeddings_of_another_model(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(foreign_model(tmp_path) / "embeddings.bin", bundle)
    record(bundle, "embeddings.bin")
    assert "files.embeddings.bin.bytes" in refusal(bundle)


def test_the_tokenizer_of_another_model(bundle: Path) -> None:
    edit(bundle, lambda m: m["lm"].update(gmask_id=1999))
    assert "gmask_id is 2001, the model expects 1999" in refusal(bundle)
    edit(bundle, lambda m: (m["lm"].update(gmask_id=2001), m["tokenizer"].update(file=MANIFEST)))
    assert "a file in use is 'seechat.json'" in refusal(bundle)
    edit(bundle, lambda m: m["tokenizer"].update(file="ice_text.model", num_image_tokens=200))
    assert "mask_id is 2200" in refusal(bundle)


# --- manifests


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (2, "newer than this program reads (1): upgrade with `pip install -U seechat-lite`"),
        (10**30, "newer"),
        (0, "version 0, expected 1"),
        (-1, "version -1, expected 1"),
        (1.0, "version is 1.0, expected a number"),
        ("1", "version is '1', expected a number"),
        (True, "version is True"),
        (None, "version is None"),
    ],
)
def test_versions(bundle: Path, version: Any, expected: str) -> None:
    edit(bundle, lambda m: m.update(version=version))
    assert expected in refusal(bundle)


def test_a_newer_version_may_have_fields_we_do_not_know(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(version=2, attention="linear"))
    assert "upgrade" in refusal(bundle)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": "seechat-bundle", "version": 1, "name": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"format": "seechat-bundle", "version": ' + b"1" * 5000 + b"}",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=range(10),
)
def test_a_manifest_that_is_none(bundle: Path, text: bytes) -> None:
    (bundle / MANIFEST).write_bytes(text)
    assert MANIFEST in refusal(bundle)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/hostname", "a/../../x", "..\\x", "C:x", "", ".", "..", "a//b", "a\0b", "\ud800"],
)
def test_names_that_leave_the_folder(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    assert "within the bundle folder" in refusal(bundle)
    edit(bundle, lambda m: (m["files"].pop(name), m["tokenizer"].update(file=name)))
    assert "to be listed under files" in refusal(bundle)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("lm", dict(num_heads=0)),
        ("lm", dict(num_heads=5)),
        ("lm", dict(num_heads=32)),
        ("lm", dict(num_layers=10**9)),
        ("lm", dict(vocab_size=-1)),
        ("lm", dict(eos_id=2432)),
        ("lm", dict(layernorm_epsilon=float("nan"))),
        ("lm", dict(layernorm_epsilon=10**400)),
        ("decoder", dict(embeddings_dtype="object")),
        ("decoder", dict(precision="int3")),
        ("decoder", dict(block_size=-32)),
        ("decoder", dict(block_size=48)),
        ("decoder", dict(precision="int8", block_size=0)),
        ("vision", dict(tokens=0)),
        (
            "vision",
            dict(network=dict(patch_size=14, width=48, inner_size=96, heads=4, layers=10**9)),
        ),
        ("vision", dict(pixels=dict(image_size=10**6))),
        ("vision", dict(pixels=dict(std=[0, 1, 1]))),
        ("vision", dict(pixels=dict(mean=[0, 1]))),
        ("vision", dict(pixels=dict(resize="stretch"))),
        ("vision", dict(pixels=dict(background=[0, 0, 256]))),
        ("vision", "clip"),
    ],
)
def test_values_that_make_no_sense(bundle: Path, part: str, values: Any) -> None:
    change = {part: values} if isinstance(values, str) else {part: None}
    if isinstance(values, dict):
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
        change = {part: manifest[part] | values}
    edit(bundle, lambda m: m.update(change))
    assert "export again" in refusal(bundle)


def test_an_unknown_conversation_format(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(conversation="llama"))
    assert "conversation format 'llama' is unknown" in refusal(bundle)


def test_round_trip(vision_bundle: Path) -> None:
    manifest = read_manifest(vision_bundle)
    assert Manifest.from_json(manifest.to_json(), "again") == manifest
    verify_hashes(vision_bundle, manifest)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON tree."""
    found = [path] if path else []
    if isinstance(tree, dict | list):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += places(child, (*path, key))
    return found


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2**63, 10**400, 1e308, "", "../x", "fp16", "seechat"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(random=st.randoms(use_true_random=False), value=JSON, remove=st.booleans())
@settings(max_examples=800)
@example(random=None, value=None, remove=False)
def test_mutated_manifests(vision_bundle: Path, random: Any, value: Any, remove: bool) -> None:
    manifest = json.loads((vision_bundle / MANIFEST).read_text("utf-8"))
    if random is not None:
        *path, last = random.choice(places(manifest))
        parent = manifest
        for key in path:
            parent = parent[key]
        if remove:
            del parent[last]
        else:
            parent[last] = copy.deepcopy(value)
    text = json.dumps(manifest)
    try:
        read = Manifest.from_json(text, "mutated")
    except sl.BundleError as e:
        assert str(e).startswith("mutated: ")
    else:  # whatever is read can be planned for and written
        assert plan(read, context=2048).total > 0
        again = Manifest.from_json(read.to_json(), "again")
        assert again == read or "nan" in read.to_json().lower()
