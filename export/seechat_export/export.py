"""Writes a bundle from a checkpoint: one folder with everything that the runtime reads.

The weights file is written one tensor at a time into `OUT.partial/bundle`, beside a journal of what
is finished. The next run continues a run that was interrupted. Only a complete, checked bundle is
renamed to OUT.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from seechat_export import parity
from seechat_export.calibration import Calibrator, examples
from seechat_export.chatglm_graph import ChatGLMGraph
from seechat_export.llama_graph import LlamaGraph
from seechat_export.plan import PROBE, ExportPlan, Parts, check_room, make_plan
from seechat_export.quantize import stored_arrays
from seechat_export.workplace import Workplace
from seechat_lite.conversation import FORMATS
from seechat_lite.memory import human
from seechat_lite.nn.block_quantization import FRACTIONS
from seechat_lite.source import Source as ModelSource
from seechat_lite.source import described_tokenizer, spoken_format
from seechat_lite.tokenizers import TextTokenizer, open_tokenizer
from seechat_weights.arguments import check_choice, refuse
from seechat_weights.bundle.layout import TensorLayout, decoder_layout, reordered_prefix
from seechat_weights.bundle.manifest import (
    MANIFEST,
    TOKENIZER_KINDS,
    Decoder,
    FileHash,
    Manifest,
    sha256,
)
from seechat_weights.bundle.onnx_graph import check_graphs
from seechat_weights.bundle.precisions import BLOCK_SIZES, PRECISIONS, VISION_PRECISIONS, Precision
from seechat_weights.config import LMConfig, QuestionConfig, VisionConfig, half_graph
from seechat_weights.errors import BundleError, CheckpointError, SeechatError
from seechat_weights.files.audit import check_half
from seechat_weights.files.reading import local_path
from seechat_weights.files.untrusted import read_file
from seechat_weights.lm.checkpoint import ALL, LM, Rows, open_lm
from seechat_weights.lm.quantized import Quantized
from seechat_weights.lm.tokenizer_file import MAX_BYTES, completed, is_first_form
from seechat_weights.vision.weights import GRAPH as VISION_GRAPH
from seechat_weights.vision.weights import VisionWeights

log = logging.getLogger(__name__)

GRAPH, WEIGHTS, EMBEDDINGS = "decoder.onnx", "decoder.onnx.data", "embeddings.bin"
PREFIX = "prefix.bin"
PARITY = "parity.json"
FILES = (
    *(GRAPH, half_graph(GRAPH), WEIGHTS, EMBEDDINGS, PREFIX, *TOKENIZER_KINDS.values()),
    *(PARITY, MANIFEST, PROBE),
)
_QUESTION = QuestionConfig()
VISION_FILES = (
    *(VISION_GRAPH, f"{VISION_GRAPH}.data", half_graph(VISION_GRAPH)),
    *(_QUESTION.graph, _QUESTION.weights, _QUESTION.half, _QUESTION.vocabulary),
)
ROWS = 4096  # rows of the embedding table written at a time
VISION_WORK = 450_000_000  # bytes; EVA ViT-g at fp16 was measured to take 400 MB

GRAPHS = {"chatglm": ChatGLMGraph, "llama": LlamaGraph}
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


def export_bundle(
    *,
    lm: str | Path | ModelSource,
    out: str | Path,
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    prefix: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vision: VisionWeights | tuple[nn.Module, VisionConfig] | None = None,
    precision: str = "int4",
    block_size: int = 128,
    vision_precision: str | None = None,
    conversation: str | None = None,
    calibrate: bool | str | Path = False,
    name: str | None = None,
    provenance: dict[str, Any] | None = None,
    announce: Callable[[ExportPlan], None] = lambda plan: None,
    progress: Progress = lambda stage, done, total: None,
) -> Manifest:
    """Write a bundle from a checkpoint and, optionally, a vision network.

    lm: as lm.checkpoint.open_lm takes it, or what open_source returned.
    out: the folder to write; it must not exist.
    checkpoint, adapter, prefix: as lm.checkpoint.open_lm takes them.
    tokenizer: the tokenizer's file, if it is not beside the weights.
    vision: weights; or a module in eval mode, from float32 pixels [n, 3, S, S] to embeddings [n,
        tokens, hidden], and its description.
    precision: a name of precisions.PRECISIONS.
    block_size: inputs that share a scale.
    vision_precision: "fp32", "fp16" or "int8"; None for fp32 in an fp32 bundle, else fp16.
    conversation: the default format; None for the one that the LM speaks, or for ChatGLM-6B with a
        vision tower of its own "seechat".
    calibrate: round the LM's weights for the inputs that its layers see: True with dialogues that
        come with this, or a text (.txt, .md), a picture, or a folder of them. Only at int4.
    name: the bundle's name.
    provenance: facts to add to the manifest's provenance.
    announce: called with the plan once all sources are checked, before the work begins.
    progress: called with what is being done, how much is done, and how much there is.

    Raises CheckpointError (sources), BundleError (`out` exists or cannot be written, the disk is
    too small, or the finished bundle does not agree with the torch networks), MemoryPlanError.
    """
    out = local_path(out)
    check_choice("precision", precision, PRECISIONS)
    if PRECISIONS[precision].block and block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        refuse("block_size", block_size, f"one of {sizes}", "pass one of these")
    if conversation is not None:
        check_choice("conversation", conversation, FORMATS)
    if vision_precision is not None:
        check_choice("vision_precision", vision_precision, VISION_PRECISIONS)
    given = None if isinstance(calibrate, bool) else local_path(calibrate)
    if calibrate and precision != "int4":
        refuse("calibrate", calibrate, f"none at {precision}", "export at int4 to calibrate")
    if os.path.lexists(out) or out.name in ("", ".."):  # a broken link, too
        raise BundleError(
            f"{out}: exists already; expected a new folder: remove it or choose another place",
            options={"out": None},
        )
    vision_precision = vision_precision or ("fp32" if PRECISIONS[precision].exact else "fp16")
    if not isinstance(lm, ModelSource):
        model = open_lm(lm, checkpoint=checkpoint, adapter=adapter, prefix=prefix)
    elif lm.lm:
        model, tokenizer = lm.lm, lm.tokenizer
    else:
        raise CheckpointError(
            f"{lm.path}: a bundle, which is exported already; expected published weights: name "
            "those that it was made from"
        )
    source = Source(model, tokenizer, vision=vision)
    if conversation is None:
        conversation = spoken_format(model, vision)
    described, network, ignored = None, None, {}
    if isinstance(vision, VisionWeights):
        # this needs transformers, which takes seconds to import
        from seechat_lite.nn.vision import streamed

        network, described, ignored = streamed(vision), vision.config, vision.ignored
    elif vision:
        network, described = vision
    seen = None
    if network and described:
        described = dataclasses.replace(described, precision=vision_precision)
        seen = parity.VisionCheck(network, described, source.config.hidden_size)
    form = source.form(PRECISIONS[precision])
    calibrator = None
    if calibrate:
        kept = sum(0 < model.bits(key) <= PRECISIONS[precision].bits for key in model.shapes)
        if kept:
            refuse(
                "calibrate",
                calibrate,
                "weights that are still floats",
                f"leave it out: {kept} of them are kept as their authors quantized them",
            )
        found = examples(
            given,
            tokenizer=source.opened_tokenizer(),
            lm=source.config,
            conversation=conversation,
            network=network,
            vision=described,
        )
        items = decoder_layout(source.config, form, block_size)
        calibrator = Calibrator(source, found, items, block_size)
    graphs = (described.graph, described.weights, described.half) if described else ()
    place = Workplace(out, {*FILES, *VISION_FILES, *graphs})
    writer = _Writer(source, place, form, block_size if form.block else 0, progress, calibrator)
    with writer.opened():
        announce(writer.plan(network, vision_precision))
        writer.weights()
        writer.embeddings()
        if model.prefix is not None:
            writer.prefix(model.prefix)
        source.write_tokenizer(writer.folder / source.tokenizer_config.file)
        if network and described:
            from seechat_export.vision_graph import export_vision  # slow to import, too

            progress("vision", 0, 1)
            path = writer.folder / described.graph
            export_vision(network, described, path, precision=vision_precision)
            if described.question and isinstance(vision, VisionWeights) and vision.vocabulary:
                words = read_file(vision.vocabulary, limit=MAX_BYTES)
                (writer.folder / described.question.vocabulary).write_bytes(words)
            progress("vision", 1, 1)
        licence = vision.licence if isinstance(vision, VisionWeights) else ""
        manifest = Manifest(
            name=name or out.name,
            lm=source.config,
            decoder=Decoder(
                GRAPH,
                EMBEDDINGS,
                writer.embeddings_dtype,
                precision,
                writer.block_size,
                form.head_bits,
                prefix=PREFIX if model.prefix is not None else None,
                prefix_tokens=writer.prefix_tokens,
                zeros=form.zeros,
            ),
            tokenizer=source.tokenizer_config,
            conversation=conversation,
            vision=described,
            provenance={
                **source.fingerprint(),
                **({"vision": stamps(vision.files)} if isinstance(vision, VisionWeights) else {}),
                "ignored": source.ignored(ignored, seeing=vision is not None),
                "versions": {p: version(p) for p in ("torch", "onnx", "onnxruntime")},
                **({"license": licence} if licence else {}),
                **({"calibration": calibrator.described()} if calibrator else {}),
                **(provenance or {}),
            },
        )
        try:
            report = parity.check(source, writer.folder, manifest, seen, progress)
        except BundleError:
            writer.place.discard()
            raise
        (writer.folder / PARITY).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return writer.finish(manifest)


class Source:
    """The LM to export and its tokenizer, as the writer and the check need them.

    lm: the published weights.
    tokenizer: the tokenizer's file, if it is not beside them.
    vision: the vision network, if there is one.

    Raises CheckpointError or BundleError (tokenizer) if something does not fit.
    """

    def __init__(
        self, lm: LM, tokenizer: str | Path | None = None, *, vision: object = None
    ) -> None:
        self.lm = lm
        self.config: LMConfig = lm.config
        self.tokenizer = local_path(tokenizer) if tokenizer else lm.tokenizer
        self.tokenizer_config = described_tokenizer(self.tokenizer, lm, vision)
        self.opened_tokenizer()

    def opened_tokenizer(self) -> TextTokenizer:
        """The tokenizer, loaded."""
        return open_tokenizer(self.tokenizer, self.tokenizer_config, self.config)

    def write_tokenizer(self, path: Path) -> None:
        """Write the tokenizer's file; an early form becomes the form that is published now.

        path: the file to write.
        """
        found = read_file(self.tokenizer, limit=MAX_BYTES)
        if is_first_form(found):
            log.info(
                "%s: as published before 6 April 2023, without its special pieces; the bundle gets "
                "the later file",
                self.tokenizer,
            )
        path.write_bytes(completed(found))

    def tensor(self, key: str, rows: Rows = ALL) -> Tensor:
        """Read one of our tensors, or some of its rows.

        key: our name of the tensor.
        rows: a slice, or the numbers of the rows.
        """
        return torch.from_numpy(self.lm.read(key, rows))

    def weight(self, item: TensorLayout, block_size: int) -> Tensor | Quantized:
        """Read an item's tensor, as its authors quantized it if the item can hold that.

        item: says how it is to be stored.
        block_size: inputs that share a scale.
        """
        if item.bits and self.lm.ordered(item.key):
            log.warning(
                "%s: its groups have an order of their own (act-order), which blocks cannot have: "
                "its weights are rounded again. One made without act-order is kept as it is",
                item.key,
            )
        if 0 < self.lm.bits(item.key) <= item.bits:
            group = self.lm.group(item.key)
            if not group % block_size:  # of one scale a row, as well
                return self.lm.quantized(item.key)
            log.warning(
                "%s: its integers share a scale in groups of %d, and blocks of %d cannot hold "
                "them: they are rounded again. A smaller block size keeps them",
                item.key, group, block_size,
            )  # fmt: skip
        return self.tensor(item.key)

    def form(self, precision: Precision) -> Precision:
        """The precision, with a head of 8 bits if its authors quantized everything except the head.

        With 4 bits the head would be all that such a bundle loses, and it would lose a lot. Blocks
        get zeros if those of the authors are not all the middle of the range.

        precision: the precision that was asked for.
        """
        kept = [key for key in self.lm.shapes if 0 < self.lm.bits(key) <= precision.bits]
        if not precision.block or not kept:
            return precision
        precision = dataclasses.replace(precision, zeros=any(map(self.lm.has_zeros, kept)))
        if precision.bits == 8 or self.lm.bits("lm_head.weight"):
            return precision
        return dataclasses.replace(precision, head_bits=8)

    def ignored(self, vision: Mapping[str, str], *, seeing: bool) -> dict[str, dict[str, str]]:
        """Tensors that no part of the bundle is made of, by source, each with the reason.

        vision: those of the vision network's checkpoints.
        seeing: whether the bundle has vision.
        """
        ignored = {role: dict(reasons) for role, reasons in self.lm.ignored.items()}
        ignored["vision"] = dict(vision)
        if not seeing:
            reason = "part of the vision tower, which this bundle is without"
            for role, keys in self.lm.vision_keys.items():
                ignored[role] |= dict.fromkeys(keys, reason)
        return {role: reasons for role, reasons in ignored.items() if reasons}

    def fingerprint(self) -> dict[str, Any]:
        """The files that the weights come from: names, sizes and times of the last change."""
        roles = {**self.lm.sources, "tokenizer": [self.tokenizer]}
        return {role: stamps(files) for role, files in roles.items()}


class _Writer:
    """Writes a bundle in `out.partial`, continues where an earlier run stopped, then renames it."""

    def __init__(
        self,
        source: Source,
        place: Workplace,
        precision: Precision,
        block_size: int,
        progress: Progress,
        calibrator: Calibrator | None = None,
    ) -> None:
        self.source = source
        self.calibrator = calibrator
        self.place = place
        self.out, self.folder = place.out, place.folder
        self.precision = precision
        self.block_size = block_size
        self.progress = progress
        prefix = source.lm.prefix
        self.prefix_tokens = 0 if prefix is None else prefix.shape[3]
        self.items = decoder_layout(source.config, precision, block_size)
        self.size = self.items[-1].end
        wide = precision.exact and source.lm.shapes["word_embeddings.weight"].dtype != "float16"
        self.embeddings_dtype = "float32" if wide else "float16"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the place to write in for this process alone, cleared if it is another export's."""
        try:
            with self.place.held():
                self._begin()
                try:
                    yield
                except CheckpointError:  # other files are needed, so there is nothing to continue
                    self.place.discard()
                    raise
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise BundleError(
                    f"{self.place.path}: cannot be written ({e.strerror or e}); expected to: "
                    "check the folder's permissions or choose another place",
                    options={"out": None},
                ) from e
            raise BundleError(
                f"{self.place.path}: the disk is full; the weights take {human(self.size)}: "
                "free some space and run the same command again, it continues where it stopped"
            ) from e

    def plan(self, vision: nn.Module | None, vision_precision: str) -> ExportPlan:
        """Plan the rest of the work; raises MemoryPlanError or BundleError if it cannot be done."""
        lm, done = self.source.config, self._done()
        form = VISION_PRECISIONS[vision_precision]
        numbers = sum(p.numel() for p in vision.parameters()) if vision else 0
        parts = Parts(
            weights=self.size,
            embeddings=lm.vocab_size * lm.hidden_size * np.dtype(self.embeddings_dtype).itemsize,
            vision=numbers * form.bits // 8,
        )
        plan = make_plan(
            self.source,
            self.items,
            self.folder,
            precision=self.precision,
            block_size=self.block_size,
            parts=parts,
            done=done,
            # traced, written and run a layer at a time; only the int8 kernels hold it whole
            vision_memory=VISION_WORK + (parts.vision if form.integers else 0) if vision else 0,
        )
        if self.calibrator:
            # of a layer that is partly written, all is rounded again
            begun = {i.key.split(".")[1] for i in self.items[:done] if i.key.startswith("layers.")}
            seconds = self.calibrator.seconds(layers=lm.num_layers - max(len(begun) - 1, 0))
            plan = dataclasses.replace(
                plan,
                seconds=plan.seconds + seconds,
                memory=max(plan.memory, self.calibrator.memory()),
            )
        try:
            check_room(plan, lm, self.precision, out=self.out)
        except SeechatError:
            if not done:
                self.place.discard()
            raise
        return plan

    def weights(self) -> None:
        """Write the decoder's weights file, tensor by tensor, then its graph."""
        done = self._done()
        log.info("%s: %d of %d tensors are there already", self.folder, done, len(self.items))
        path = self.folder / WEIGHTS
        with path.open("r+b" if path.exists() else "w+b") as f:
            f.truncate(self.items[done - 1].end if done else 0)
            for i, item in enumerate(self.items[done:], start=done):
                self.progress("weights", self.items[i - 1].end if i else 0, self.size)
                self.source.lm.audit(item.key)
                arrays = self._arrays(item, f)
                for stored, array in zip(item.stored, arrays, strict=True):
                    if array.dtype == torch.float16:
                        check_half(array.numpy(), self.source.lm.place(item.key))
                    f.seek(stored.offset)
                    f.write(array.contiguous().numpy().data)
                if item.kind == "linear":  # vectors are too small to be worth a sync
                    f.flush()
                    os.fsync(f.fileno())
                    self._record(i + 1)
            f.truncate(self.size)
        self.progress("weights", self.size, self.size)
        save_graphs(
            self.folder,
            self.source.config,
            self.precision,
            self.block_size,
            prefix_tokens=self.prefix_tokens,
        )

    def _arrays(self, item: TensorLayout, file: IO[bytes]) -> list[Tensor]:
        """The arrays of an item; `file` holds those of the items before it."""
        if self.calibrator and item.bits:

            def written(item: TensorLayout) -> list[np.ndarray]:
                found = []
                for span in item.stored:
                    file.seek(span.offset)
                    data = np.frombuffer(file.read(span.nbytes), span.dtype)
                    found.append(data.reshape(span.shape))
                return found

            return self.calibrator.arrays(item, written)
        return stored_arrays(
            item,
            self.source.weight(item, self.block_size),
            self.source.config,
            self.precision,
            self.block_size,
        )

    def embeddings(self) -> None:
        """Write the word embedding table, raw, as the runtime maps it."""
        key, dtype = "word_embeddings.weight", getattr(torch, self.embeddings_dtype)
        self.source.lm.audit(key)
        rows, width = self.source.lm.shapes[key].shape
        total = rows * width * dtype.itemsize
        with (self.folder / EMBEDDINGS).open("wb") as f:
            for i in range(0, rows, ROWS):
                chunk = self.source.tensor(key, slice(i, i + ROWS)).to(dtype).contiguous()
                if dtype == torch.float16:
                    check_half(chunk.numpy(), self.source.lm.place(key))
                f.write(chunk.numpy().data)
                self.progress("embeddings", f.tell(), total)

    def prefix(self, prefix: np.ndarray) -> None:
        """Write a P-tuning prefix [layers, 2, heads, tokens, head_size] as the cache holds it."""
        with np.errstate(over="ignore"):
            stored = reordered_prefix(prefix, self.source.config).astype(self.embeddings_dtype)
        if stored.dtype == np.float16 and self.source.lm.prefix_place:
            check_half(stored, self.source.lm.prefix_place)
        (self.folder / PREFIX).write_bytes(stored.tobytes())

    def finish(self, manifest: Manifest) -> Manifest:
        """Hash all files, write the manifest, and give the folder its final name."""
        files = sorted(self.folder.iterdir())
        sizes = {f: f.stat().st_size for f in files}
        done, hashes = 0, {}
        for file, size in sizes.items():
            self.progress("hash", done, sum(sizes.values()))
            hashes[file.name] = FileHash(size, sha256(file))
            done += size
        self.progress("hash", done, done)
        manifest = dataclasses.replace(manifest, files=hashes)
        check_graphs(self.folder, manifest)  # nobody could load a bundle that fails this
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as f:
            f.write(manifest.to_json())
            f.flush()
            os.fsync(f.fileno())
        self.place.deliver()
        return manifest

    def _begin(self) -> None:
        """Keep what an earlier run of the same export wrote; clear everything else of ours."""
        same = self.place.journal().get("fingerprint") == self._fingerprint()
        keep = same and (self.folder / WEIGHTS).exists()
        if not keep:
            self._record(0)  # first: if this is interrupted, what is left counts as nothing
        self.place.clear(*([WEIGHTS] if keep else []))  # the rest is quick to write again

    def _fingerprint(self) -> str:
        """What must be the same for a run to continue an earlier one."""
        facts = {
            "files": self.source.fingerprint(),
            "config": dataclasses.asdict(self.source.config),
            "precision": dataclasses.asdict(self.precision),
            "block_size": self.block_size,
            "fractions": FRACTIONS,
            "tensors": [dataclasses.asdict(i) for i in self.items],
        }
        if self.calibrator:
            facts["calibration"] = self.calibrator.fingerprint()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _done(self) -> int:
        """How many tensors are on the disk."""
        done = self.place.journal().get("done")
        return done if isinstance(done, int) and 0 <= done <= len(self.items) else 0

    def _record(self, done: int) -> None:
        """Note that the first `done` tensors are on the disk."""
        self.place.record(fingerprint=self._fingerprint(), done=done)


def save_graphs(
    folder: Path, config: LMConfig, precision: Precision, block_size: int, *, prefix_tokens: int = 0
) -> None:
    """Write the decoder's graph, and the graph for GPUs unless the weights are float32.

    folder: where to write.
    config: the decoder's shape.
    precision: how its weights are stored.
    block_size: inputs that share a scale.
    prefix_tokens: length of a P-tuning prefix.
    """
    for half in (False,) if precision.exact else (False, True):
        graph = GRAPHS[config.family](
            config, precision, block_size, WEIGHTS, prefix_tokens=prefix_tokens, half=half
        )
        ir.save(graph.build(), folder / (half_graph(GRAPH) if half else GRAPH))


def stamps(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Name -> size and time of the last change.

    files: the files.
    """
    stats = {file.name: file.stat() for file in files}
    return {n: {"bytes": s.st_size, "modified": s.st_mtime_ns} for n, s in stats.items()}
