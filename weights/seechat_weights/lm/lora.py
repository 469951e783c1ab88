"""Reads LoRA: small matrices that a fine-tuning added to some linears; they are merged when read.

A linear's weight becomes W + scaling * B @ A. PEFT keeps its matrices in a folder of their own
(adapter_config.json, adapter_model.*). SAT keeps them beside the weights they belong to.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import Shape, account, check_shapes, few
from seechat_weights.files.audit import Place, check_numbers, is_nothing
from seechat_weights.files.checkpoint import (
    Checkpoint,
    Opener,
    TensorInfo,
    open_checkpoint,
    read_json,
)
from seechat_weights.files.reading import shown
from seechat_weights.lm.families import LM_FAMILIES

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PEFT = "base_model.model."
# PEFT puts these between the name of a module and that of its tensor
_WRAPPING = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# initializations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ change them too
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# PEFT settings with which an adapter is more than a product beside each of some linears
_UNLIKE_LORA = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config", "monteclora_config"),
    *("arrow_config", "layer_replication"),
    "alora_invocation_tokens",  # affects only the end of a prompt
    "enable_lora",  # before PEFT 0.3: one matrix for two thirds of the rows
)
_MODULE = re.compile(r"\^?[\w.]+")  # a key of alpha_pattern; "^" means the beginning of the name
_MERGE = (
    "merge the adapter with PEFT (merge_and_unload, save_pretrained) and name the merged "
    "checkpoint as lm"
)


@dataclass(frozen=True)
class LoRA:
    """What is added to some rows of one linear [outputs, inputs].

    checkpoint: holds the matrices.
    a, b: the names of A [r, inputs] and B [rows, r].
    scaling: the factor of their product.
    start: the first of the rows.
    """

    checkpoint: Checkpoint
    a: str
    b: str
    scaling: float
    start: int = 0

    def add(self, weight: np.ndarray, rows: np.ndarray) -> None:
        """Add the product to some rows of the published weight.

        weight: float32 [rows, inputs]; changed in place.
        rows: the numbers of its rows.
        """
        mine = rows - self.start
        inside = (mine >= 0) & (mine < self.checkpoint.shapes[self.b].shape[0])
        part = self.checkpoint.read(self.b)[mine[inside]].astype(np.float32)
        delta = part @ self.checkpoint.read(self.a).astype(np.float32)
        weight[inside] += delta * np.float32(self.scaling)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter, checked against its LM."""

    checkpoint: Checkpoint
    files: tuple[Path, ...]
    loras: dict[str, list[LoRA]]  # our linear -> what is added
    # our parameter -> the adapter's own (biases, modules_to_save), in the order of its rows
    replaced: dict[str, tuple[str, ...]]


def check_pairs(
    checkpoint: Checkpoint, pairs: list[tuple[str, str]], shape: Shape, where: str
) -> int:
    """Check that matrices fit their linear and each other; returns their rank.

    checkpoint: holds the matrices.
    pairs: names of A and B.
    shape: of the linear, [outputs, inputs].
    where: the checkpoint's path, for errors.

    Raises CheckpointError.
    """
    outputs, inputs = shape
    found = checkpoint.shapes[pairs[0][0]].shape
    rank = found[0] if found else 0
    if rank < 1 or outputs % len(pairs):
        raise CheckpointError(
            f"{where}: {pairs[0][0]} is {list(found)} in {len(pairs)} parts of [{outputs}, "
            f"{inputs}]; expected [rank, {inputs}]: take model and adapter of the same kind"
        )
    expected: dict[str, Shape] = {}
    for a, b in pairs:
        expected |= {a: (rank, inputs), b: (outputs // len(pairs), rank)}
    check_shapes(checkpoint.shapes, expected, where)
    return rank


def open_adapter(folder: Path, config: LMConfig, *, opener: Opener = open_checkpoint) -> Adapter:
    """Open a PEFT LoRA adapter for a language model.

    folder: the adapter's folder, or its file of weights with the settings beside it.
    config: the LM's shape.
    opener: opens the checkpoint.

    Raises CheckpointError: no adapter, another method than LoRA, tensors that are missing, surplus
    or of another shape.
    """
    given = folder
    if folder.is_file():  # one of a run's files, with its settings beside it
        folder = folder.parent
    names = [folder / name for name in _ADAPTER_FILES if (folder / name).exists()]
    # else any name: trainers other than PEFT's own choose others
    source = names[0] if names and given is folder else given
    if not (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{given}: no PEFT adapter; expected a folder with {ADAPTER_CONFIG} and "
            f"{' or '.join(_ADAPTER_FILES)}: name the folder that save_pretrained wrote as adapter",
            options={"adapter": None},
        )
    settings = read_json(folder / ADAPTER_CONFIG)
    _refuse_other_methods(settings, str(folder / ADAPTER_CONFIG))
    checkpoint, where = opener(source), str(source)
    published = _places(config)
    matrices: dict[str, dict[str, str]] = {}
    replaced: dict[str, dict[int, str]] = {}
    for key in checkpoint.shapes:
        name = _WRAPPING.sub("", key.removeprefix(_PEFT))
        matrix = _MATRIX.fullmatch(name)
        module = f"{matrix[1]}.weight" if matrix else name
        if module not in published or not key.startswith(_PEFT):
            continue  # named by account() below
        if matrix:
            matrices.setdefault(module, {})[matrix[2]] = key
        else:
            replaced.setdefault(published[module].ours, {})[published[module].number] = key
    needed = [
        pair.get(part, f"{next(iter(pair.values()))} (its lora_{part})")
        for pair in matrices.values()
        for part in "AB"
    ]
    own = [key for keys in replaced.values() for key in keys.values()]
    advice = f"download it again, or {_MERGE}"
    account(checkpoint.shapes, [*needed, *own], (), where, advice=advice)
    for ours, keys in replaced.items():
        parts = [place for place in published.values() if place.ours == ours]
        shapes = {place.number: place.shape for place in parts}
        check_shapes(checkpoint.shapes, {key: shapes[i] for i, key in keys.items()}, where)
        if keys.keys() != shapes.keys():
            raise CheckpointError(
                f"{where}: replaces a part of {ours} ({few(list(keys.values()))}); expected all "
                f"of it: {_MERGE}"
            )
    loras: dict[str, list[LoRA]] = {}
    for module, pair in matrices.items():
        place = published[module]
        rank = check_pairs(checkpoint, [(pair["A"], pair["B"])], place.shape, where)
        scaling = _scaling(settings, module.removesuffix(".weight"), rank, where)
        found = LoRA(checkpoint, pair["A"], pair["B"], scaling, place.start)
        loras.setdefault(place.ours, []).append(found)
    files = sorted({checkpoint.source(key) for key in checkpoint.shapes})
    whole = {ours: tuple(keys[i] for i in sorted(keys)) for ours, keys in replaced.items()}
    return Adapter(checkpoint, (folder / ADAPTER_CONFIG, *files), loras, whole)


@dataclass(frozen=True)
class _Place:
    """The rows of one of our parameters that a published tensor is."""

    ours: str
    number: int  # of the part
    start: int
    shape: Shape


def _places(config: LMConfig) -> dict[str, _Place]:
    """Published names of the LM's tensors, in each form that its family has."""
    found = {}
    for form in LM_FAMILIES[config.family].parts(config):
        for ours, parts in form.items():
            start = 0
            for number, part in enumerate(parts):
                found.setdefault(part.key, _Place(ours, number, start, part.shape))
                start += part.shape[0]
    return found


def config_like(shapes: Mapping[str, TensorInfo]) -> LMConfig:
    """The sizes of a language model that an adapter's matrices could fit.

    shapes: the adapter's tensors.
    """
    chatglm = any(".transformer.layers." in key for key in shapes)
    layers, sizes = 0, dict[str, int]()
    for key, (shape, _) in shapes.items():
        if len(shape) == 2 and re.search(
            r"\.(lm_head|word_embeddings|embed_tokens)\.(?!lora)", key
        ):
            sizes["vocab_size"] = shape[0]
        if not (found := re.search(r"\.layers\.(\d{1,3})\.\w+\.(\w+)\.lora_([AB])\.", key)):
            continue
        layers = max(layers, int(found[1]) + 1)
        size = shape[-1 if found[3] == "A" else 0] if len(shape) == 2 else 0
        if field := _SIZES.get((found[2], found[3])):
            sizes[field] = size
    config = LMConfig(num_heads=1)
    if not chatglm:
        config = LMConfig(family="llama", num_layers=32, inner_size=11008, vocab_size=32000)
        # heads of one number each: a matrix of keys tells its rows alone
        sizes["num_heads"] = sizes.get("hidden_size", config.hidden_size)
    return replace(config, **sizes, num_layers=max(layers, config.num_layers))


_TABLES = re.compile(r"\.(lm_head|word_embeddings|embed_tokens)\.(?!lora)")
# what a matrix of an adapter tells: of A the inputs, of B the outputs
_SIZES = {
    ("query_key_value", "A"): "hidden_size",
    ("dense", "A"): "hidden_size",
    ("dense_h_to_4h", "A"): "hidden_size",
    ("dense_4h_to_h", "A"): "inner_size",
    ("dense_h_to_4h", "B"): "inner_size",
    ("q_proj", "A"): "hidden_size",
    ("k_proj", "A"): "hidden_size",
    ("v_proj", "A"): "hidden_size",
    ("gate_proj", "A"): "hidden_size",
    ("up_proj", "A"): "hidden_size",
    ("down_proj", "B"): "hidden_size",
    ("o_proj", "B"): "hidden_size",
    ("gate_proj", "B"): "inner_size",
    ("up_proj", "B"): "inner_size",
    ("down_proj", "A"): "inner_size",
    ("k_proj", "B"): "num_kv_heads",
    ("v_proj", "B"): "num_kv_heads",
}


def check_adapter(adapter: Adapter, where: str) -> None:
    """Read all of an adapter.

    adapter: the adapter.
    where: its path, for errors.

    Raises CheckpointError for NaN, or if it would change nothing.
    """
    checkpoint, nothing = adapter.checkpoint, []
    products = [lora for loras in adapter.loras.values() for lora in loras]
    for lora in products:
        matrices = {key: checkpoint.read(key) for key in (lora.a, lora.b)}
        for key, matrix in matrices.items():
            check_numbers(matrix, Place(checkpoint.source(key), key))
        nothing += [key for key, matrix in matrices.items() if is_nothing(matrix)][-1:]
    for keys in adapter.replaced.values():
        for key in keys:
            check_numbers(checkpoint.read(key), Place(checkpoint.source(key), key))
    if nothing and len(nothing) == len(products) and not adapter.replaced:
        raise CheckpointError(
            f"{where}: changes nothing: of all its {len(nothing)} products one matrix is zeros, "
            f"such as {nothing[0]}; expected a trained adapter: take the one of a later step, or "
            "leave it out"
        )
    if nothing:
        log.warning(
            "%s: %d of its %d products change nothing, such as %s",
            where, len(nothing), len(products), nothing[0],
        )  # fmt: skip


def _refuse_other_methods(settings: Mapping[str, Any], where: str) -> None:
    method, start = settings.get("peft_type"), settings.get("init_lora_weights")
    other = next((name for name in _UNLIKE_LORA if settings.get(name)), None)
    patterns = settings.get("alpha_pattern") or {}
    if method != "LORA":
        found = f"peft_type is {shown(method)}"
    elif other:
        found = f"{other} is {shown(settings[other])}"
    elif start not in _STARTS:
        found = f"init_lora_weights is {shown(start)}, which may change the base weights as well"
    elif not isinstance(patterns, dict) or not all(map(_MODULE.fullmatch, patterns)):
        # PEFT reads them as regular expressions, and somebody could write one that runs for ever
        found = f"alpha_pattern is {shown(patterns)}, not names of modules"
    else:
        return
    raise CheckpointError(f"{where}: {found}; expected plain LoRA: {_MERGE}")


def _scaling(settings: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """alpha / rank; for rank-stabilized LoRA alpha / sqrt(rank).

    fan_in_fan_out needs no care: it says how the base model stores its weights. ChatGLM-6B's are
    [outputs, inputs], as is B @ A.
    """
    named = (
        alpha
        for name, alpha in (settings.get("alpha_pattern") or {}).items()
        if f".{module}".endswith(f".{name}") or name == f"^{module}"
    )
    alpha = next(named, settings.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise CheckpointError(
            f"{where}: lora_alpha of {module} is {alpha!r:.80} in {ADAPTER_CONFIG}; expected a "
            "number: take both files from the same training run"
        )
    if not settings.get("rank_pattern") and settings.get("r") != rank:
        raise CheckpointError(
            f"{where}: the matrices of {module} have rank {rank}, expected r = "
            f"{settings.get('r')!r:.80} of {ADAPTER_CONFIG}: take both from the same training run"
        )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
