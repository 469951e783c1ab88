"""Writes a scorer from a Chinese-CLIP: two graphs, their weights, the word pieces, a manifest."""

import errno
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seechat_export.export import Progress, stamps
from seechat_export.parity import compare
from seechat_export.vision_graph import Inputs, export_tower
from seechat_export.workplace import Workplace
from seechat_lite.memory import human
from seechat_lite.nn.layer_streaming import Streamed
from seechat_lite.nn.scorer import streamed_towers
from seechat_lite.onnx_runtime import ort
from seechat_weights.arguments import check_choice
from seechat_weights.bundle.manifest import MANIFEST, FileHash, sha256
from seechat_weights.bundle.onnx_graph import check_tower
from seechat_weights.bundle.precisions import VISION_PRECISIONS
from seechat_weights.errors import BundleError
from seechat_weights.files.checkpoint import Opener, open_checkpoint
from seechat_weights.files.reading import local_path
from seechat_weights.files.untrusted import read_file
from seechat_weights.scorer.manifest import (
    IMAGE_GRAPH,
    PARITY,
    PRECISIONS,
    TEXT_GRAPH,
    VOCABULARY,
    ImageTower,
    ScorerManifest,
    TextTower,
    data_of,
)
from seechat_weights.scorer.network import CONTEXT, ResNetSizes
from seechat_weights.scorer.weights import ScorerWeights, open_scorer
from seechat_weights.wordpiece import MAX_BYTES

GRAPHS = (IMAGE_GRAPH, TEXT_GRAPH)
FILES = (*GRAPHS, *map(data_of, GRAPHS), VOCABULARY, PARITY, MANIFEST)


def export_scorer(
    *,
    scorer: str | Path,
    out: str | Path,
    vocabulary: str | Path | None = None,
    precision: str | None = None,
    name: str | None = None,
    provenance: dict[str, Any] | None = None,
    opener: Opener = open_checkpoint,
    progress: Progress = lambda stage, done, total: None,
) -> ScorerManifest:
    """Write a scorer from a Chinese-CLIP.

    scorer: the authors' file (clip_cn_*.pt), or a folder from Hugging Face.
    out: the folder to write; it must not exist.
    vocabulary: the vocab.txt, if it is not beside the weights.
    precision: "fp32" or "fp16", of the stored matrices; None for fp16 if that loses nothing.
    name: what people call it; None for its published size or the folder's name.
    provenance: facts to add to the manifest's provenance.
    opener: opens checkpoints.
    progress: called with what is being done, how much is done, and how much there is.

    Raises CheckpointError, BundleError (`out` exists or cannot be written, the disk is too small,
    or a graph does not agree with its torch network).
    """
    out = local_path(out)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    if out.exists() or out.is_symlink() or out.name in ("", ".."):
        raise BundleError(
            f"{out}: exists already; expected a new folder: remove it or choose another place",
            options={"out": None},
        )
    weights = open_scorer(scorer, vocabulary=vocabulary, opener=opener)
    precision = precision or ("fp16" if weights.halves else "fp32")
    place = Workplace(out, FILES)
    try:
        with place.held():
            place.record(done=0)
            place.clear()
            try:
                return _write(weights, place, precision, name, provenance or {}, progress)
            except BaseException:  # nothing here takes long enough to be worth continuing
                place.discard()
                raise
    except OSError as e:
        if e.errno == errno.ENOSPC:
            size = human(_size(weights, precision))
            raise BundleError(
                f"{place.path}: the disk is full; a scorer takes {size}: free some space and "
                "export it again"
            ) from e
        raise BundleError(
            f"{place.path}: cannot be written ({e.strerror or e}); expected to: check the folder's "
            "permissions or choose another place",
            options={"out": None},
        ) from e


def _size(weights: ScorerWeights, precision: str) -> int:
    """Bytes of the stored matrices, and about those of the rest."""
    sizes = (*weights.image_tower.sizes.values(), *weights.text_tower.sizes.values())
    return sum(math.prod(s) for s in sizes) * VISION_PRECISIONS[precision].bits // 8


def _write(
    weights: ScorerWeights,
    place: Workplace,
    precision: str,
    name: str | None,
    provenance: dict[str, Any],
    progress: Progress,
) -> ScorerManifest:
    folder, halves = place.folder, precision == "fp16"
    image, text = streamed_towers(weights)
    side, words = weights.pixels.image_size, weights.text.vocab_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(4 * 7).reshape(4, 7) % words
    lossless = weights.halves or not halves
    tolerance = VISION_PRECISIONS["fp32" if lossless else "fp16"].tolerance
    report = {}
    jobs = (("image", image, "pixel_values", pixels), ("text", text, "input_ids", ids))
    for done, (part, tower, name_of_input, example) in enumerate(jobs):
        progress("towers", done, len(jobs))
        path = folder / GRAPHS[done]
        inputs = Inputs({name_of_input: example}, longest=CONTEXT, output="features")
        export_tower(tower, inputs, path, halves=halves)
        report[part] = _agrees(part, tower, path, name_of_input, example, tolerance)
    progress("towers", len(jobs), len(jobs))
    (folder / PARITY).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (folder / VOCABULARY).write_bytes(read_file(weights.vocabulary, limit=MAX_BYTES))
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = FileHash(file.stat().st_size, sha256(file))
    described, written = weights.image, weights.text
    if isinstance(described, ResNetSizes):
        network = f"ResNet, {sum(described.stages)} blocks, width {described.width}"
    else:
        network = (
            f"ViT, {described.layers} layers, width {described.width}, patches of "
            f"{described.patch_size}"
        )
    manifest = ScorerManifest(
        name=name or f"Chinese-CLIP {weights.size or f'({place.out.name})'}",
        size=weights.size,
        features=weights.features,
        logit_scale=weights.logit_scale,
        image=ImageTower(IMAGE_GRAPH, weights.pixels, network),
        text=TextTower(
            TEXT_GRAPH,
            VOCABULARY,
            written.vocab_size,
            f"BERT, {written.layers} layers, width {written.width}",
        ),
        precision=precision,
        files=files,
        provenance={
            "scorer": stamps(weights.files),
            "vocabulary": stamps([weights.vocabulary]),
            "ignored": dict(weights.ignored),
            "versions": {p: version(p) for p in ("torch", "transformers", "onnx", "onnxruntime")},
            **provenance,
        },
    )
    for graph in GRAPHS:  # nobody could load a scorer that fails this
        check_tower(folder, manifest, graph, data_of(graph))
    text_of_manifest = manifest.to_json()
    ScorerManifest.from_json(text_of_manifest, str(folder / MANIFEST))
    (folder / MANIFEST).write_text(text_of_manifest, "utf-8")
    place.deliver()
    return manifest


def _agrees(
    part: str, tower: Streamed, path: Path, name: str, example: Tensor, tolerance: float
) -> dict[str, float]:
    """Compare a written graph with its torch network; raises BundleError if they differ."""
    with torch.inference_mode():
        expected = tower(example)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {name: example.numpy()})
    return compare(part, torch.from_numpy(np.asarray(found)), expected, tolerance)
