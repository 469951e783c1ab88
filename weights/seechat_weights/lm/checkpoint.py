"""Reads the language model of a checkpoint in any form: our tensors, one at a time.

    base        Hugging Face folder (ChatGLM-6B in fp16, int8, int4, int4-qe; VisualGLM-6B; a LLaMA,
                alone or inside a LLaVA or an InstructBLIP) or SAT
    checkpoint  SEEChat's checkpoint_N.pth, laid over the base: any subset of the LM's tensors
    adapter     PEFT's LoRA, merged into the linears it belongs to
    prefix      a P-tuning prefix; one may also be in the base or in the checkpoint

Nothing is converted on disk or kept. When a tensor is asked for, it is read from its mapped file,
dequantized, merged and put into our order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seechat_weights.config import LMConfig
from seechat_weights.errors import CheckpointError
from seechat_weights.files.accounting import account, few, part
from seechat_weights.files.audit import (
    Place,
    check_gains,
    check_matrix,
    check_numbers,
    check_table,
    is_nothing,
)
from seechat_weights.files.checkpoint import (
    Checkpoint,
    Opener,
    TensorInfo,
    open_checkpoint,
    read_json,
)
from seechat_weights.files.reading import local_path
from seechat_weights.lm.chatglm import FORMS, OLD_IMAGE_TOKENS, OLD_VOCABULARY, map_lm
from seechat_weights.lm.families import LM_FAMILIES, family_of
from seechat_weights.lm.lora import LoRA, check_adapter, check_pairs, open_adapter
from seechat_weights.lm.names import LMNames, Published
from seechat_weights.lm.prefix import read_prefix
from seechat_weights.lm.quantized import Quantized
from seechat_weights.lm.tokenizers import template_format
from seechat_weights.model_files import SAT_CONFIG, SAT_FILE, find_model

ALL = slice(None)
Rows = slice | np.ndarray  # rows of a tensor: a slice, or their numbers

# the prefixes of a prefix encoder's names in the file of a P-tuning run
_ENCODERS = ("transformer.prefix_encoder.", "prefix_encoder.")


@dataclass(frozen=True)
class _Tensor:
    """Where one of our parameters comes from, and how it is changed."""

    role: str
    checkpoint: Checkpoint
    parts: tuple[Published, ...]  # their rows follow each other
    order: np.ndarray | None = None  # the published row of each of our rows, if they differ
    loras: tuple[LoRA, ...] = ()


class LM:
    """A language model from one or several checkpoints. Made by `open_lm`.

    config: its shape.
    settings: its config.json.
    prefix: float32 [layers, 2 (key, value), heads, tokens, head_size], heads as published, or None.
    prefix_place: where the prefix comes from, for errors.
    conversation: the format of its chat template, or that its family speaks.
    tokenizer: the file it should have.
    sources: role ("lm", "checkpoint", "adapter", "prefix") -> files read.
    ignored: role -> tensor -> reason.
    vision_keys: role -> tensors that belong to a vision tower.
    """

    def __init__(
        self,
        config: LMConfig,
        *,
        tokenizer: Path,
        conversation: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.settings = settings or {}
        self.tokenizer = tokenizer
        self.conversation = conversation
        self.prefix: np.ndarray | None = None
        self.prefix_place: Place | None = None
        self.sources: dict[str, list[Path]] = {}
        self.ignored: dict[str, dict[str, str]] = {}
        self.vision_keys: dict[str, list[str]] = {}
        self._expected = LM_FAMILIES[config.family].shapes(config)
        self._tensors: dict[str, _Tensor] = {}
        self._audited: set[Published] = set()
        self._bits: dict[str, int] = {}

    @property
    def shapes(self) -> dict[str, TensorInfo]:
        """Our key -> shape and dtype, as `read` returns them (bfloat16 comes as float32)."""
        return {key: TensorInfo(self._expected[key], _dtype(t)) for key, t in self._tensors.items()}

    def read(self, key: str, rows: Rows = ALL) -> np.ndarray:
        """Read one of our tensors, or some of its rows; may be a view of the mapped file.

        key: our name of the tensor.
        rows: a slice, or the numbers of the rows.

        Returns float16 or float32 as stored; float32 if it is quantized or merged.
        """
        tensor = self._tensors[key]
        if tensor.order is None and not tensor.loras:
            return _published(tensor, rows)
        outputs = self._expected[key][0]
        order = (np.arange(outputs) if tensor.order is None else tensor.order)[rows]
        found = _published(tensor, order)
        if not tensor.loras:
            return found
        merged = found.astype(np.float32)
        for lora in tensor.loras:
            lora.add(merged, order)
        return merged

    def audit(self, key: str) -> None:
        """Check the published numbers of one of our tensors, once; this reads all of it.

        key: our name of the tensor.

        Raises CheckpointError for numbers that no trained model has: see
        seechat_weights.files.audit.
        """
        tensor = self._tensors[key]
        for published in tensor.parts:
            if published not in self._audited:
                self._audit(key, tensor.checkpoint, published)
                self._audited.add(published)

    def _audit(self, key: str, checkpoint: Checkpoint, published: Published) -> None:
        scale = published.scale
        if published.packed:
            scale, bias = f"{published.packed.module}.scales", f"{published.packed.module}.bias"
            if bias in checkpoint.shapes and not is_nothing(checkpoint.read(bias)):
                place = Place(checkpoint.source(bias), bias)
                raise place.error("is no bias of zeros", "a LLaMA, whose linears have none")
        for name in published.keys:
            if name.endswith((".qzeros", ".g_idx")):
                continue  # any numbers are possible
            place, array = Place(checkpoint.source(name), name), checkpoint.read(name)
            check_numbers(array, place)
            if name == scale or key.endswith("layernorm.weight"):
                check_gains(array, place)
            elif key in ("word_embeddings.weight", "lm_head.weight"):
                old = self.config.vocab_size == OLD_VOCABULARY
                check_table(array, place, unused=OLD_IMAGE_TOKENS if old else 0)
            elif array.ndim > 1:
                check_matrix(array, place)

    def place(self, key: str) -> Place:
        """Where one of our tensors comes from, for errors.

        key: our name of the tensor.
        """
        tensor = self._tensors[key]
        first = tensor.parts[0].key
        return Place(tensor.checkpoint.source(first), first)

    def bits(self, key: str) -> int:
        """Bits of a tensor's integers, if they are its authors' and can be kept as they are.

        0 if they quantized it otherwise or not at all, or something is merged.

        key: our name of the tensor.
        """
        if key not in self._bits:
            self._bits[key] = self._kept_bits(key)
        return self._bits[key]

    def _kept_bits(self, key: str) -> int:
        tensor = self._tensors[key]
        bits = {part.bits for part in tensor.parts}
        if tensor.order is not None or tensor.loras or bits == {0} or len(bits) > 1:
            return 0
        packed = [part.packed for part in tensor.parts]
        if any(packed):
            # padded heads would move the inputs of a group
            padded = self.config.padded_head_size != self.config.head_size
            if (padded and "attention" in key) or len({p.group for p in packed if p}) > 1:
                return 0
            if not all(p and p.kept(tensor.checkpoint.read) for p in packed):
                return 0
        return bits.pop()

    def group(self, key: str) -> int:
        """Inputs that share a scale in a tensor that has `bits`; 0: all of a row.

        key: our name of the tensor.
        """
        packed = self._tensors[key].parts[0].packed
        return packed.group if packed else 0

    def ordered(self, key: str) -> bool:
        """Whether integers of a tensor are in groups that do not follow each other ("act-order").

        key: our name of a tensor.
        """
        tensor = self._tensors[key]
        packed = [part.packed for part in tensor.parts]
        return any(p is not None and not p.in_order(tensor.checkpoint.read) for p in packed)

    def has_zeros(self, key: str) -> bool:
        """Whether other integers than the middle of their range stand for 0 in a tensor.

        key: our name of a tensor that has `bits`.
        """
        tensor = self._tensors[key]
        packed = [part.packed for part in tensor.parts]
        return not all(p is None or p.centred(tensor.checkpoint.read) for p in packed)

    def quantized(self, key: str, rows: Rows = ALL) -> Quantized:
        """A tensor as its authors quantized it, or some of its rows.

        key: our name of a tensor that has `bits`.
        rows: a slice, or the numbers of the rows.
        """
        return _quantized(self._tensors[key], rows)

    def _lay(
        self, role: str, checkpoint: Checkpoint, used: Mapping[str, tuple[Published, ...]]
    ) -> None:
        """Take these parameters from `checkpoint`, whichever file they came from before."""
        replaced: list[tuple[str, str, str]] = []
        for key, parts in used.items():
            if old := self._tensors.get(key):
                file = checkpoint.source(parts[0].key).name
                replaced += [(old.role, k, file) for k in _keys(*old.parts)]
            self._tensors[key] = _Tensor(role, checkpoint, parts)
        # word embeddings may still serve as the head if a checkpoint has none
        still = {(t.role, k) for t in self._tensors.values() for k in _keys(*t.parts)}
        for old_role, key, file in replaced:
            if (old_role, key) not in still:
                self.ignored.setdefault(old_role, {})[key] = f"replaced by the one in {file}"
        keys = [k for parts in used.values() for k in _keys(*parts)]
        self._note(role, {checkpoint.source(key) for key in keys})

    def _merge(self, loras: Mapping[str, list[LoRA]]) -> None:
        for key, found in loras.items():
            tensor = self._tensors[key]
            self._tensors[key] = replace(tensor, loras=(*tensor.loras, *found))

    def _note(self, role: str, files: set[Path]) -> None:
        self.sources[role] = sorted({*self.sources.get(role, []), *files})


def open_lm(
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    prefix: str | Path | None = None,
    opener: Opener = open_checkpoint,
) -> LM:
    """Open a language model and account for every tensor; this reads only headers and a prefix.

    path: a Hugging Face folder, or SAT's mp_rank_00_model_states.pt or its folder.
    checkpoint: a checkpoint_N.pth of SEEChat.
    adapter: a PEFT folder.
    prefix: a file or folder of a P-tuning run.
    opener: opens all of them; an Openings, if others read the same files.

    Raises CheckpointError for anything missing, surplus, of another shape or not supported.
    """
    lm, base, names, settings = _open_base(local_path(path), opener)
    _check_tokens(base, names.prefix, settings, str(path))
    # role, checkpoint, the encoder's tensors, where; the last prefix is used
    prefixes = [("lm", base, names.prefix, str(path))]
    if checkpoint is not None:
        laid = opener(local_path(checkpoint))
        ours = part(laid.shapes, "lm", where=str(checkpoint))
        family = LM_FAMILIES[lm.config.family]
        names = family.laid(ours, lm.config, where=str(checkpoint), settings=lm.settings)
        lm.vision_keys["checkpoint"] = [key for key in laid.shapes if key not in ours]
        lm.ignored["checkpoint"] = names.ignored
        lm._lay("checkpoint", laid, names.used)
        prefixes.append(("checkpoint", laid, names.prefix, str(checkpoint)))
    if adapter is not None:
        tuned = open_adapter(local_path(adapter), lm.config, opener=opener)
        own = {ours: tuple(map(Published, keys)) for ours, keys in tuned.replaced.items()}
        lm._lay("adapter", tuned.checkpoint, own)
        check_adapter(tuned, str(adapter))
        lm._merge(tuned.loras)
        lm._note("adapter", set(tuned.files))
    if prefix is not None:
        prefixes.append(_open_prefix(local_path(prefix), opener))
    prefixes = [row for row in prefixes if row[2]]
    for role, _, keys, _ in prefixes[:-1]:
        reason = f"the prefix in {prefixes[-1][3]} takes its place"
        lm.ignored.setdefault(role, {}).update(dict.fromkeys(keys.values(), reason))
    if prefixes:
        role, found, keys, where = prefixes[-1]
        lm.prefix = read_prefix(found, keys, lm.config, where=where)
        first = next(iter(keys.values()))
        lm.prefix_place = Place(found.source(first), first)
        _check_prefix(lm.prefix, lm.prefix_place)
        lm._note(role, {found.source(key) for key in keys.values()})
    elif settings.get("pre_seq_len"):
        raise CheckpointError(
            f"{path}: config.json says that a P-tuning prefix of "
            f"{settings['pre_seq_len']!r:.80} tokens belongs to it, and none is there; expected "
            "its weights: name the folder of its training run as prefix, or take pre_seq_len out "
            "of config.json",
            options={"prefix": None},
        )
    return lm


def _open_base(path: Path, opener: Opener) -> tuple[LM, Checkpoint, LMNames, dict[str, Any]]:
    """The LM with its base laid, the base's checkpoint, the names found in it, and its settings."""
    files = find_model(path)
    file, form = files.weights, files.form
    settings: dict[str, Any] = {"model_type": "chatglm"}
    if files.config:
        settings = read_json(files.config) if form == "huggingface" else _sat_settings(files.config)
    where = str(files.config or file.parent / SAT_CONFIG)
    family = family_of(settings, where=where)
    config = family.config(settings, where=where)
    checkpoint = opener(file)
    if form == "sat" and FORMS["sat"].head not in checkpoint.shapes:
        raise CheckpointError(
            f"{file}: one file, not by SAT; expected a Hugging Face folder with config.json, or "
            f"VisualGLM-6B's {SAT_FILE}: name the folder it is of"
        )
    ours = part(checkpoint.shapes, "lm", where=str(file))
    if form == "sat":
        names = map_lm(ours, config, where=str(file), form="sat")
    else:
        names = family.names(ours, config, where=str(file), settings=settings)
    vision = [key for key in checkpoint.shapes if key not in ours]
    tokenizer = files.tokenizer(*family.tokenizers)
    lm = LM(
        config,
        tokenizer=tokenizer,
        conversation=template_format(tokenizer) or family.conversation(seeing=bool(vision)),
        settings=settings,
    )
    lm.vision_keys["lm"] = vision
    lm.ignored["lm"] = names.ignored
    lm._lay("lm", checkpoint, names.used)
    if form == "sat":
        order = _rows_by_head(config)
        for key, tensor in lm._tensors.items():
            if "query_key_value" in key:
                lm._tensors[key] = replace(tensor, order=order)
        loras = {}
        for key, pairs in names.loras.items():
            shape = lm.shapes[key].shape
            rank, rows = check_pairs(checkpoint, pairs, shape, str(file)), shape[0] // len(pairs)
            loras[key] = [  # SAT's alpha is 1
                LoRA(checkpoint, a, b, 1 / rank, start=i * rows) for i, (a, b) in enumerate(pairs)
            ]
        lm._merge(loras)
    return lm, checkpoint, names, settings if form == "huggingface" else {}


def _sat_settings(path: Path) -> dict[str, Any]:
    """SAT's model_config.json, translated into the settings of ChatGLM-6B's config.json."""
    settings = read_json(path)
    if settings.get("layernorm_order", "post") != "post":
        raise CheckpointError(
            f"{path}: layernorm_order is {settings['layernorm_order']!r:.80}; expected 'post', as "
            "in ChatGLM-6B: name a checkpoint of VisualGLM-6B"
        )
    return {"model_type": "chatglm", **settings}


def _rows_by_head(config: LMConfig) -> np.ndarray:
    """SAT's row for each of our query_key_value rows: SAT has [q | k | v][head], we the reverse."""
    rows = np.arange(3 * config.hidden_size).reshape(3, config.num_heads, config.head_size)
    return rows.transpose(1, 0, 2).ravel()


def _open_prefix(path: Path, opener: Opener) -> tuple[str, Checkpoint, dict[str, str], str]:
    """Open what a P-tuning run saved: the prefix encoder's tensors and nothing else."""
    checkpoint, where = opener(path), str(path)
    keys = list(checkpoint.shapes)
    encoder = next((e for e in _ENCODERS if any(k.startswith(e) for k in keys)), None)
    if encoder is None:
        raise CheckpointError(
            f"{where}: holds no P-tuning prefix ({few(keys)}); expected {_ENCODERS[0]}*: name "
            "the folder or file of a P-tuning run as prefix",
            options={"prefix": None},
        )
    names = {k.removeprefix(encoder): k for k in keys if k.startswith(encoder)}
    account(checkpoint.shapes, names.values(), (), where)
    if (path / "config.json").is_file():
        _check_tokens(checkpoint, names, read_json(path / "config.json"), where)
    return "prefix", checkpoint, names, where


def _check_tokens(
    checkpoint: Checkpoint, names: Mapping[str, str], settings: Mapping[str, Any], where: str
) -> None:
    """Check that a prefix is as long as the config.json beside it says."""
    said, key = settings.get("pre_seq_len"), names.get("embedding.weight")
    if said and key and checkpoint.shapes[key].shape[:1] != (said,):
        raise CheckpointError(
            f"{where}: {key} is {list(checkpoint.shapes[key].shape)}, pre_seq_len in config.json "
            f"is {said!r:.80}; expected as many rows: take both from the same training run"
        )


def _check_prefix(prefix: np.ndarray, place: Place) -> None:
    check_numbers(prefix, place)
    if is_nothing(prefix):
        raise place.error(
            "makes a prefix of zeros", "a trained one", "take the one of a later step, or leave it"
        )


def _keys(*parts: Published) -> list[str]:
    return [key for part in parts for key in part.keys]


def _dtype(tensor: _Tensor) -> str:
    if tensor.loras or any(part.bits for part in tensor.parts):
        return "float32"
    dtypes = {tensor.checkpoint.shapes[part.key].dtype for part in tensor.parts}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _published(tensor: _Tensor, rows: Rows) -> np.ndarray:
    """Rows of a tensor in the published order, dequantized."""
    read, (first, *others) = tensor.checkpoint.read, tensor.parts
    if not others and not first.packed:
        return _quantized(tensor, rows).dequantized() if first.bits else read(first.key)[rows]

    def whole(place: Published) -> np.ndarray:
        return place.packed.dequantized(read) if place.packed else read(place.key)

    if isinstance(rows, slice) and rows == ALL:
        return np.concatenate([whole(place) for place in tensor.parts])
    shapes = [
        p.packed.shape if p.packed else tensor.checkpoint.shapes[p.key].shape for p in tensor.parts
    ]
    order = np.arange(sum(shape[0] for shape in shapes))[rows]
    dtype = np.float16 if _dtype(tensor) == "float16" else np.float32
    found = np.empty((len(order), *shapes[0][1:]), dtype)
    start = 0
    for place, shape in zip(tensor.parts, shapes, strict=True):
        inside = (order >= start) & (order < start + shape[0])
        if inside.any():
            found[inside] = whole(place)[order[inside] - start]
        start += shape[0]
    return found


def _quantized(tensor: _Tensor, rows: Rows) -> Quantized:
    read, parts = tensor.checkpoint.read, tensor.parts
    if parts[0].packed:
        found = [place.packed.quantized(read) for place in parts if place.packed]
        stored = np.concatenate([each.stored for each in found])[rows]
        scales = np.concatenate([each.scales for each in found])[rows]
        zeros = None
        if any(each.zeros is not None for each in found):
            none = [np.zeros(each.scales.shape, np.int16) for each in found]
            pairs = zip(found, none, strict=True)
            zeros = np.concatenate([n if q.zeros is None else q.zeros for q, n in pairs])[rows]
        return Quantized(stored, scales, found[0].bits, found[0].group, zeros)
    scales = read(parts[0].scale)[rows].astype(np.float32)
    return Quantized(read(parts[0].key)[rows], scales, parts[0].bits)
