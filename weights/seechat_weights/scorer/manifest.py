"""Reads, checks and writes the manifest of a scorer, a folder that an export makes.

It has the name and the rules of a model's manifest (bundle.manifest), and another format.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from seechat_weights.bundle.manifest import (
    MANIFEST,
    SCORER_FORMAT,
    FileHash,
    Rule,
    check_rules,
    check_sizes,
    file_rules,
    manifest_text,
    parse,
    pixel_rules,
)
from seechat_weights.config import PixelSpec
from seechat_weights.errors import BundleError
from seechat_weights.scorer.network import CONTEXT

VERSION = 1
PRECISIONS = ("fp32", "fp16")  # how matrices are stored; all arithmetic is float32
IMAGE_GRAPH, TEXT_GRAPH, VOCABULARY, PARITY = "image.onnx", "text.onnx", "vocab.txt", "parity.json"
MAX_FEATURES = 1 << 14  # published ones have 512 to 1024
MAX_VOCABULARY = 1 << 20


def data_of(graph: str) -> str:
    """The file of a graph's weights."""
    return f"{graph}.data"


@dataclass(frozen=True)
class ImageTower:
    """The graph from pixels to features."""

    graph: str  # pixel_values float32 [n, 3, S, S] -> features float32 [n, features]
    pixels: PixelSpec
    network: str  # for people


@dataclass(frozen=True)
class TextTower:
    """The graph from ids to features."""

    graph: str  # input_ids int64 [n, tokens] -> features float32 [n, features]; nothing is padding
    vocabulary: str
    vocab_size: int
    network: str  # for people
    context: int = CONTEXT  # tokens of a text, with [CLS] and [SEP]


@dataclass(frozen=True)
class ScorerManifest:
    """Everything about a scorer. It is written as JSON and read strictly.

    name: what people call it.
    size: the name of the published size; "" for another one.
    features: numbers of a picture's or a text's features.
    logit_scale: the logarithm of the factor of cosines in training; scores do not need it.
    """

    name: str
    size: str
    features: int
    logit_scale: float
    image: ImageTower
    text: TextTower
    precision: str = "fp32"
    files: dict[str, FileHash] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = SCORER_FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The manifest as JSON, as from_json reads it."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Parse a manifest.

        text: the JSON.
        where: the file's name, for errors.

        Raises BundleError for anything that is not a scorer's manifest of this version.
        """
        manifest = parse(cls, text, where, format=SCORER_FORMAT, version=VERSION)
        check_rules(_rules(manifest), where)
        return manifest


def _rules(manifest: ScorerManifest) -> Iterator[Rule]:
    image, text = manifest.image, manifest.text
    features, what = manifest.features, f"1 to {MAX_FEATURES}"
    yield "features", features, 0 < features <= MAX_FEATURES, what
    scale = manifest.logit_scale
    yield "logit_scale", scale, math.isfinite(scale), "a finite number"
    precision, known = manifest.precision, ", ".join(PRECISIONS)
    yield "precision", precision, precision in PRECISIONS, f"one of {known}"
    yield from pixel_rules(image.pixels)
    ids, what = text.vocab_size, f"4 to {MAX_VOCABULARY}"
    yield "text.vocab_size", ids, 4 <= ids <= MAX_VOCABULARY, what
    yield "text.context", text.context, 2 < text.context <= 512, "3 to 512"
    yield from file_rules(manifest.files, required_files(manifest))


def required_files(manifest: ScorerManifest) -> list[str]:
    """The names of the files that the manifest's own fields point at."""
    graphs = (manifest.image.graph, manifest.text.graph)
    return [*graphs, *map(data_of, graphs), manifest.text.vocabulary]


def read_scorer(folder: Path) -> ScorerManifest:
    """Read a scorer's manifest and check its values and the presence and size of its files.

    folder: the scorer's folder.

    Raises BundleError.
    """
    folder = Path(folder)
    if folder.is_dir() and not (folder / MANIFEST).exists():
        raise BundleError(
            f"{folder}: holds no {MANIFEST}; expected a scorer of captions: export a Chinese-CLIP "
            "to make one",
            calls={"export": {"scorer": None}},
        )
    manifest = ScorerManifest.from_json(manifest_text(folder), str(folder / MANIFEST))
    check_sizes(folder, manifest.files)
    return manifest


def is_scorer_folder(folder: Path) -> bool:
    """Whether a folder's manifest says that it is a scorer.

    folder: a folder with a manifest.

    Raises BundleError if the manifest cannot be read.
    """
    try:
        data = json.loads(manifest_text(folder))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == SCORER_FORMAT
