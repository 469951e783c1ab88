"""Says which published model, or which part of one, a folder or file holds.

It judges by tensors, configuration and first bytes, never by the name of the path. It reads only
headers.
"""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from seechat_weights.bundle.manifest import MANIFEST, Manifest, read_manifest
from seechat_weights.errors import CheckpointError
from seechat_weights.files.checkpoint import (
    WEIGHT_SUFFIXES,
    NoWeightsError,
    Opener,
    SeveralFilesError,
    open_checkpoint,
)
from seechat_weights.files.reading import (
    LFS_POINTER,
    first_bytes,
    local_path,
    read_json,
    shown,
    unreadable,
)
from seechat_weights.files.tensor_view import ITEM_BYTES
from seechat_weights.files.untrusted import open_file, read_file
from seechat_weights.lm.checkpoint import open_lm
from seechat_weights.lm.families import LM_FAMILIES
from seechat_weights.lm.lora import ADAPTER_CONFIG, check_adapter, config_like, open_adapter
from seechat_weights.lm.tokenizer_file import MAX_BYTES, completed
from seechat_weights.model_files import CONFIG, TOKENIZER, is_bundle, model_place
from seechat_weights.published_models import (
    CHATGLM_HUB,
    RECOGNIZERS,
    VISUALGLM_HUB,
    Identity,
    Shapes,
    later,
    llama_hub,
    llama_missing,
    need,
    whole,
)
from seechat_weights.scorer.manifest import ScorerManifest, is_scorer_folder, read_scorer
from seechat_weights.vision.llava import PROJECTOR_FILE

__all__ = ["Identity", "check_given", "describe_bundle", "describe_scorer", "identify"]

# the kinds that each argument of an export takes; the first one with a kind is its own
_OPTIONS = {
    "lm": ("ChatGLM-6B, VisualGLM-6B or a LLaMA", ("chatglm", "visualglm", "llama")),
    "adapter": ("a LoRA adapter", ("lora",)),
    "prefix": ("a P-tuning prefix", ("ptuning",)),
    "tokenizer": (f"the file {TOKENIZER} or tokenizer.model", ("tokenizer",)),
    "eva": ("EVA ViT-g", ("eva",)),
    "qformer": ("BLIP-2's Q-Former", ("qformer", "instructblip")),
    "checkpoint": (
        "a checkpoint of SEEChat, MiniGPT-4 or InstructBLIP",
        ("seechat", "minigpt4", "instructblip", "qformer"),
    ),
    "clip": ("a CLIP vision tower", ("clip", "chinese-clip")),
    "scorer": ("a Chinese-CLIP", ("chinese-clip",)),
    "projector": ("a projector", ("projector", "seechat", "minigpt4")),
}
_ROLES = ("lm", "checkpoint", "adapter", "prefix", "vision", "tokenizer")  # of a bundle's sources


def identify(path: str | Path, *, opener: Opener = open_checkpoint) -> Identity:
    """Say what a file or folder is.

    path: the file or folder.
    opener: opens checkpoints; an Openings, if others will read the same files.

    Raises CheckpointError: unreadable, damaged or unsafe.
    """
    path = local_path(path)
    try:
        if not path.exists():
            raise CheckpointError(
                f"{path}: no such file or folder; expected a bundle, or published weights or a "
                "part of them: check the path"
            )
        if path.is_dir():
            return _identify_folder(path, opener)
    except OSError as e:  # no permission to look into it
        raise unreadable(path, e) from None
    try:
        head = first_bytes(path, 16)
    except CheckpointError:
        if pointer := _pointer(path):
            return pointer
        raise
    if head.startswith(b"\x0a") and head[8:9] != b"{" and (pieces := _tokenizer(path)):
        return pieces
    if head.lstrip().startswith(b"{"):
        return _by_config(path, read_json(path), {})
    return _by_tensors(path, {}, opener)


def check_given(option: str, path: Path, *, opener: Opener = open_checkpoint) -> None:
    """Check that a path given as one argument of an export does not belong to another one.

    A path of an unknown kind passes: the option's own reader tells more.

    option: the option's name, without dashes.
    path: what was given.
    opener: see identify.

    Raises CheckpointError.
    """
    expected, kinds = _OPTIONS[option]
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected {expected} as {option}: check the path, "
            "or name it on the Hub as owner/name",
            options={option: None},
        )
    if option == "adapter" and (path / "adapter_config.json").is_file():
        return  # something else that a training run left in its folder
    if option == "projector" and (path / PROJECTOR_FILE).is_file():
        return  # with LLaVA's config.json, which says how it is to be used
    found = identify(path, opener=opener)
    owner = next((name for name, (_, own) in _OPTIONS.items() if found.kind in own), None)
    options: dict[str, Path] = {}
    if found.kind == "bundle":
        do = "a bundle is exported already, load it as the model"
    elif option == "tokenizer" and (path / TOKENIZER).is_file():
        do, options = f"name {path / TOKENIZER}", {option: path / TOKENIZER}
    elif owner and found.kind not in kinds:
        do, options = f"name it as {owner}", {owner: path}
    else:
        return
    raise CheckpointError(
        f"{path}: is {found.title}; expected {expected} as {option}: {do}", options=options
    )


def _identify_folder(folder: Path, opener: Opener) -> Identity:
    if is_bundle(folder):
        if is_scorer_folder(folder):
            return describe_scorer(folder, read_scorer(folder))
        return describe_bundle(folder, read_manifest(folder))
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    lost = _lost_shards(folder)
    if lost:
        found = _by_config(folder, config, {})
        hub = _hub(config) if found.usable else "its publisher"
        if not config:
            found = _with(found, title="weights of which some are missing", missing={CONFIG: hub})
        return _with(found, missing=dict.fromkeys(lost, hub) | found.missing)
    if (folder / ADAPTER_CONFIG).is_file():  # beside an optimizer and similar files
        adapters = [
            p for p in sorted(folder.glob("adapter_model.*")) if p.suffix in WEIGHT_SUFFIXES
        ]
        if adapters:
            return _with(_by_tensors(adapters[-1], config, opener), path=folder)
    if (folder / PROJECTOR_FILE).is_file():  # LLaVA's, whose config.json says how to use it
        found = _by_tensors(folder / PROJECTOR_FILE, config, opener)
        return _with(found, path=folder, options=dict(found.options) | {"projector": folder})
    try:
        return _by_tensors(folder, config, opener)
    except NoWeightsError:
        pass  # not this kind
    except SeveralFilesError as e:
        return Identity(
            folder, "several", "several files of weights", {"files": str(e)}, usable=False
        )
    if config:
        return _by_config(folder, config, {"weights": _hub(config)})
    if (folder / TOKENIZER).is_file():
        return identify(folder / TOKENIZER)
    inside = [shown(str(inner)) for inner in _inner_folders(folder)]
    do = f"name {' or '.join(inside[:4])}" if inside else "name another folder, or the file itself"
    raise CheckpointError(
        f"{folder}: holds no {MANIFEST}, weights or tokenizer; expected a bundle or a checkpoint: "
        f"{do}"
    )


def _inner_folders(folder: Path) -> list[Path]:
    """Folders one or two levels down that hold a model or a part of one."""
    looked_at = islice(chain(folder.glob("*/"), folder.glob("*/*/")), 1000)
    names = (MANIFEST, CONFIG, TOKENIZER)
    return [inner for inner in looked_at if any((inner / name).is_file() for name in names)]


def describe_bundle(folder: Path, manifest: Manifest) -> Identity:
    """Describe a bundle by its manifest.

    folder: the bundle's folder.
    manifest: its manifest.
    """
    lm, decoder, vision, said = manifest.lm, manifest.decoder, manifest.vision, manifest.provenance
    facts = {
        "language model": f"{lm.num_layers} layers, hidden {lm.hidden_size}, {lm.vocab_size} ids",
        "precision": decoder.precision
        + (f", blocks of {decoder.block_size}" if decoder.block_size else "")
        + (f"; the head int{decoder.head_bits}" if decoder.head_bits else "")
        + f"; embeddings {decoder.embeddings_dtype}",
        "prefix": f"P-tuning, {decoder.prefix_tokens} tokens" if decoder.prefix else "none",
        "vision": f"{vision.tower} + {vision.bridge}, {vision.precision}" if vision else "none",
    }
    if vision:
        side = vision.pixels.image_size
        facts["a picture"] = (
            f"{side}×{side} pixels ({vision.pixels.resize}), {vision.tokens} tokens"
        )
    facts["conversation"] = manifest.conversation
    facts["trained with"] = f"{lm.max_sequence_length} tokens of prompt and answer at most"
    files = [f"{role} {name}" for role in _ROLES for name in _names(said.get(role))]
    if files:
        facts["made from"] = ", ".join(files)
    for option, origin in _items(said.get("downloads")):
        facts[f"downloaded {option}"] = " at ".join(shown(value) for _, value in _items(origin))
    facts["licence"] = shown(said.get("license", "as that of the weights it was made from"))
    title, options = f"a bundle: {manifest.name}", {"model": folder}
    return Identity(folder, "bundle", title, facts, options=options, runs=True)


def describe_scorer(folder: Path, manifest: ScorerManifest) -> Identity:
    """Describe a scorer by its manifest.

    folder: the scorer's folder.
    manifest: its manifest.
    """
    side = manifest.image.pixels.image_size
    facts = {
        "pictures": f"{manifest.image.network}, {side}×{side} pixels",
        "texts": f"{manifest.text.network}, {manifest.text.context} tokens at most",
        "precision": manifest.precision,
        "made from": ", ".join(_names(manifest.provenance.get("scorer"))) or "unknown",
    }
    title = f"a scorer of captions: {manifest.name}"
    return Identity(folder, "scorer", title, facts, options={"scorer": folder})


def _items(value: Any) -> list[tuple[str, Any]]:
    """The items of a manifest's object, made printable: anybody may have written the provenance."""
    return [(shown(k), v) for k, v in value.items()] if isinstance(value, dict) else []


def _names(files: Any) -> list[str]:
    """The files of one role; for many shards, the first and their number."""
    names = [name for name, _ in _items(files)]
    return names if len(names) < 4 else [f"{names[0]} … ({len(names)} files)"]


def _by_tensors(path: Path, config: Mapping[str, Any], opener: Opener) -> Identity:
    checkpoint = opener(path)
    shapes = checkpoint.shapes
    files = {checkpoint.source(k) for k in shapes}
    sizes: Counter[str] = Counter()
    for shape, dtype in shapes.values():
        sizes[dtype] += _count(shape) * ITEM_BYTES[dtype]
    total = max(sum(sizes.values()), 1)
    facts = {
        "files": f"{len(files)}, {_human(sum(f.stat().st_size for f in files))}",
        "tensors": f"{len(shapes)}, {sum(_count(s) for s, _ in shapes.values()) / 1e6:.4g} million "
        "numbers",
        "stored as": ", ".join(f"{d} {n / total:.0%}" for d, n in sizes.most_common(3)),
    }
    for recognize in RECOGNIZERS:
        if found := recognize(path, shapes, config):
            return _tried(_with(found, facts=facts | found.facts), path, shapes, opener)
    kind = config.get("model_type")
    title = f"a {shown(kind)} model, not of this family" if kind else "not of this family"
    names = ", ".join(shown(k) for k in list(shapes)[:3])
    return Identity(path, "other", title, facts | {"tensors like": names}, usable=False)


def _tried(found: Identity, path: Path, shapes: Shapes, opener: Opener) -> Identity:
    """The same identity if an export would take it; else the identity says why not."""
    try:
        if found.kind in _OPTIONS["lm"][1] and CONFIG not in found.missing:
            open_lm(model_place(path), opener=opener)
        elif found.kind == "lora" and ADAPTER_CONFIG not in found.missing:
            check_adapter(open_adapter(path, config_like(shapes), opener=opener), str(path))
    except CheckpointError as e:
        facts = found.facts | {"cannot be used": str(e)}
        return _with(found, facts=facts, options={}, runs=False, usable=False)
    return found


def _by_config(path: Path, config: Mapping[str, Any], missing: dict[str, str]) -> Identity:
    """Identify by the configuration alone, because the weights are not there."""
    kind = config.get("model_type")
    if any(n in config for n in ("padded_vocab_size", "multi_query_attention", "rmsnorm")):
        return later(path, config)
    if kind in LM_FAMILIES["llama"].model_types:
        return _llama_by_config(path, config, missing)
    if kind != "chatglm":
        name = f"a {shown(kind)} model" if kind else "JSON"
        return Identity(path, "other", f"{name}, not of this family", usable=False)
    seeing = "eva_config" in config or "image_length" in config
    bits = config.get("quantization_bit") or None
    facts = {
        "language model": f"{shown(config.get('num_layers'))} layers, "
        f"hidden {shown(config.get('hidden_size'))}",
        "vocabulary": f"{shown(config.get('vocab_size'))} ids",
        "precision": f"int{shown(bits)}, the authors' own" if bits else "float16",
    }
    folder = path if path.is_dir() else path.parent
    if not whole(folder / TOKENIZER):
        missing = missing | {TOKENIZER: _hub(config)}
    title = ("VisualGLM-6B" if seeing else "ChatGLM-6B") + ", its weights not (all) there"
    return Identity(folder, "visualglm" if seeing else "chatglm", title, facts, missing)


def _llama_by_config(path: Path, config: Mapping[str, Any], missing: dict[str, str]) -> Identity:
    inner = config.get("text_config")
    sizes = inner if isinstance(inner, dict) else config
    facts = {
        "language model": f"{shown(sizes.get('num_hidden_layers'))} layers, "
        f"hidden {shown(sizes.get('hidden_size'))}",
        "vocabulary": f"{shown(sizes.get('vocab_size'))} ids",
    }
    folder = path if path.is_dir() else path.parent
    missing = missing | llama_missing(folder, config)
    return Identity(folder, "llama", "a LLaMA, its weights not (all) there", facts, missing)


def _hub(config: Mapping[str, Any]) -> str:
    """Where a configuration's weights are published."""
    if config.get("model_type") in LM_FAMILIES["llama"].model_types:
        return llama_hub(config)
    if "eva_config" in config or "image_length" in config:
        return VISUALGLM_HUB
    bits = config.get("quantization_bit")
    embeddings = "-qe" if config.get("quantization_embeddings") else ""
    return f"{CHATGLM_HUB}-int{bits}{embeddings}" if bits in (4, 8) else CHATGLM_HUB


def _lost_shards(folder: Path) -> list[str]:
    """Files that an index names and that are missing, or are only Git LFS pointers."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        single = folder / index.removesuffix(".index.json")
        if (folder / index).is_file() and not single.exists():
            weight_map = read_json(folder / index).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else ()
            plain = {n for n in names if isinstance(n, str) and not set(n) & set("/\\\0")}
            return sorted(n for n in plain if not whole(folder / n))
    return []


def _tokenizer(path: Path) -> Identity | None:
    """Recognizes a tokenizer of sentencepiece by its special tokens: ChatGLM's or LLaMA's."""
    try:
        data = completed(read_file(path, limit=MAX_BYTES))
    except OSError:
        return None
    facts = {"size": _human(len(data))}
    if all(special in data for special in (b"[gMASK]", b"<sop>", b"<eop>")):
        needed = need("a ChatGLM-6B folder")
        return Identity(path, "tokenizer", "ChatGLM-6B's tokenizer", facts, needed)
    if all(special in data for special in (b"<unk>", b"<s>", b"</s>", b"<0xFF>")):
        needed = need("a LLaMA folder")
        return Identity(path, "tokenizer", "a LLaMA's tokenizer", facts, needed)
    return None


def _pointer(path: Path) -> Identity | None:
    """Recognizes a Git LFS pointer, and says what it points to."""
    if not path.is_file():
        return None
    with open_file(path) as f:
        text = f.read(1024)
    if not text.startswith(LFS_POINTER):
        return None
    size = re.search(rb"size (\d{1,15})", text)
    facts = {"stands for": f"a file of {int(size[1])} bytes"} if size else {}
    where = "run `git lfs pull`, or download it from the model page"
    return Identity(
        path, "lfs-pointer", "a Git LFS pointer, not the file itself", facts,
        {"the file itself": where}, usable=False,
    )  # fmt: skip


def _with(found: Identity, **changes: Any) -> Identity:
    return Identity(**{**vars(found), **changes})


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _human(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
