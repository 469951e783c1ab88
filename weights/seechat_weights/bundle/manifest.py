"""Reads, checks and writes the manifest of a bundle, the folder that export writes and lite reads.

The manifest (`seechat.json`) holds everything that the runtime needs to know: the networks' shapes,
the ONNX graphs, how a picture becomes pixels, the conversation format that the model speaks, and a
hash of every file. This module knows nothing about ONNX Runtime or torch.
"""

import dataclasses
import hashlib
import json
import math
import stat
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from seechat_weights.bundle.precisions import BLOCK_SIZES, PRECISIONS, VISION_PRECISIONS
from seechat_weights.config import (
    MAX_LAYERS,
    RESIZES,
    LMConfig,
    PixelSpec,
    VisionConfig,
    half_graph,
)
from seechat_weights.errors import BundleError
from seechat_weights.files.reading import MAX_JSON, decoded, line
from seechat_weights.files.untrusted import open_file, read_file
from seechat_weights.lm.families import LM_FAMILIES
from seechat_weights.vision.network import (
    ACTIVATIONS,
    JOINED,
    JOINED_PATCHES,
    NETWORKS,
    QFORMERS,
    QUESTION_QFORMER,
)

MANIFEST = "seechat.json"
FORMAT, SCORER_FORMAT = "seechat-bundle", "seechat-scorer"
_FORMATS = {FORMAT: "a model's bundle", SCORER_FORMAT: "a scorer of captions"}
VERSION = 1
# kinds of tokenizers, and the name of the file that each has in a bundle
TOKENIZER_KINDS = {"ice": "ice_text.model", "llama": "tokenizer.model", "json": "tokenizer.json"}
EMBEDDINGS_DTYPES = {"float16": 2, "float32": 4}  # bytes of a number
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_HASHED_AT_ONCE = 1 << 22  # bytes
MAX_IMAGE_SIZE = 4096  # pixels; vision towers take a few hundred


@dataclass(frozen=True)
class Decoder:
    """The LM's graph and the settings it was written with."""

    graph: str  # ONNX file of the decoder with its key/value cache
    embeddings: str  # raw row-major table [vocab_size, hidden_size] of `embeddings_dtype`
    embeddings_dtype: str = "float16"
    precision: str = "fp32"
    block_size: int = 0  # 0 where the precision has no blocks
    head_bits: int = 0  # of lm_head, where it has more than the other weights
    # a P-tuning prefix that the cache begins with: raw `embeddings_dtype`,
    # [layers, 2 (key, value), heads, prefix_tokens, head size of the graph], heads in its order
    prefix: str | None = None
    prefix_tokens: int = 0
    zeros: bool = False  # whether blocks, except of lm_head, have integers of their own for 0

    @property
    def half(self) -> str:
        """The file of the same decoder in float16, for GPUs; it uses the same weights.

        Manifest.files lists it if the bundle has it.
        """
        return half_graph(self.graph)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's file, its vocabulary, and how text becomes its pieces.

    kind: "ice" (ChatGLM-6B), "llama" (sentencepiece) or "json" (a tokenizer.json).
    legacy: of "llama": see seechat_lite.llama_tokenizer.
    added: tokens behind those of the file: text -> id.
    """

    file: str = "ice_text.model"
    num_image_tokens: int = 0  # 20000 in the old vocabulary of 150528 ids
    kind: str = "ice"
    legacy: bool = True
    added: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How a model is asked by those who leave it open, and what it bears; None for no word on it.

    Chat programs send every model the same, and small models fall apart sooner.
    """

    max_temperature: float | None = None  # a higher one is taken for this
    max_repetition_penalty: float | None = None  # likewise
    # what a client that sends none gets; without them the likeliest token is taken
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class FileHash:
    """The size of a file in bytes and its sha256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle. It is written as JSON and read strictly."""

    name: str
    lm: LMConfig
    decoder: Decoder
    tokenizer: TokenizerConfig
    conversation: str  # name of the default conversation format
    vision: VisionConfig | None = None
    sampling: Sampling | None = None
    files: dict[str, FileHash] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # sources, licence, versions
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The manifest as JSON, as from_json reads it."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Parse a manifest.

        text: the JSON.
        where: the file's name, for errors.

        Raises BundleError for anything that is not a manifest of this version; it names the field.
        """
        manifest = parse(cls, text, where, format=FORMAT, version=VERSION)
        check_rules(_rules(manifest), where)
        return manifest


_SAMPLING_RANGES = (
    ("max_temperature", 0, 100),
    ("max_repetition_penalty", 0.01, 100),
    ("temperature", 0, 100),
    ("top_p", 0.001, 1),
    ("top_k", 0, 2**31),
    ("repetition_penalty", 0.01, 100),
)

Kind = TypeVar("Kind")
Rule = tuple[str, Any, bool, str]  # field, value, whether it is allowed, what is expected


def parse(kind: type[Kind], text: str, where: str, *, format: str, version: int) -> Kind:
    """Build a manifest from its JSON; its values are not checked yet.

    kind: the manifest's dataclass.
    text: the JSON.
    where: the file's name, for errors.
    format, version: what it must say of itself.

    Raises BundleError.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BundleError(
            f"{where}: not valid JSON ({e}); expected a bundle manifest: export the model again"
        ) from None
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != format:
        what = _FORMATS.get(found if isinstance(found, str) else "", "not what an export wrote")
        raise BundleError(
            f'{where}: {what}; expected "format": "{format}", which is {_FORMATS[format]}: name '
            "the folder of one"
        )
    given = data.get("version")
    if not isinstance(given, int) or isinstance(given, bool):
        raise BundleError(f"{where}: version is {given!r}, expected a number: export again")
    if given > version:
        raise BundleError(
            f"{where}: bundle version {given} is newer than this program reads ({version}): "
            "upgrade with `pip install -U seechat-lite`"
        )
    if given < version:
        raise BundleError(f"{where}: version {given}, expected {version}: export again")
    try:
        return _build(kind, data, where, "manifest")
    except (RecursionError, OverflowError) as e:  # absurd nesting, a number beyond float
        raise BundleError(
            f"{where}: not a manifest ({e}); expected one that an export wrote: export again"
        ) from None


def check_rules(rules: Iterable[Rule], where: str) -> None:
    """Refuse a manifest with a value that is not allowed.

    rules: about its values.
    where: the file's name, for errors.

    Raises BundleError.
    """
    for name, found, ok, expected in rules:
        if not ok:
            raise BundleError(
                f"{where}: {name} is {found!r:.80}, expected {expected}: export again"
            )


def pixel_rules(pixels: PixelSpec) -> Iterator[Rule]:
    """The rules for how pictures become pixels.

    pixels: what a manifest says of it.
    """
    side, what = pixels.image_size, f"1 to {MAX_IMAGE_SIZE}"
    yield "pixels.image_size", side, 0 < side <= MAX_IMAGE_SIZE, what
    how = pixels.resize
    yield "pixels.resize", how, how in RESIZES, f"one of {', '.join(RESIZES)}"
    filter_, known = pixels.interpolation, ", ".join(INTERPOLATIONS)
    yield "pixels.interpolation", filter_, filter_ in INTERPOLATIONS, f"one of {known}"
    yield "pixels.mean", pixels.mean, all(map(math.isfinite, pixels.mean)), "finite numbers"
    sound = all(0 < s < math.inf for s in pixels.std)
    yield "pixels.std", pixels.std, sound, "positive numbers"
    colour = pixels.background
    yield "pixels.background", colour, all(0 <= c < 256 for c in colour), "0 to 255"


def file_rules(files: Mapping[str, FileHash], used: Iterable[str]) -> Iterator[Rule]:
    """The rules for the files that a manifest lists.

    files: the files.
    used: the names that its other fields point at.
    """
    for name, entry in files.items():
        yield "a file name", name, _inside(name), "a plain name within the bundle folder"
        yield f"files.{name}.bytes", entry.bytes, entry.bytes >= 0, "0 or more"
    for name in used:
        yield "a file in use", name, name in files, "to be listed under files"


def _rules(manifest: Manifest) -> Iterator[Rule]:
    """The rules for a manifest's values: field, value, whether it holds, what is expected."""
    lm, decoder, tokenizer = manifest.lm, manifest.decoder, manifest.tokenizer
    for name in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "inner_size",
        "max_sequence_length",
    ):
        value = getattr(lm, name)
        yield f"lm.{name}", value, value > 0, "a positive number"
    for name in ("pad_id", "mask_id", "gmask_id", "bos_id", "eos_id"):
        value = getattr(lm, name)
        yield f"lm.{name}", value, 0 <= value < lm.vocab_size, f"0 to {lm.vocab_size - 1}"
    yield "lm.num_layers", lm.num_layers, lm.num_layers <= MAX_LAYERS, f"at most {MAX_LAYERS}"
    known = ", ".join(LM_FAMILIES)
    yield "lm.family", lm.family, lm.family in LM_FAMILIES, f"one of {known}"
    pieces = len(LM_FAMILIES[lm.family].turned)
    fits = lm.hidden_size % lm.num_heads == 0 and lm.head_size % pieces == 0
    what = f"{lm.hidden_size} to split into multiples of {pieces}"
    yield "lm.num_heads", lm.num_heads, fits, what
    fits = lm.num_kv_heads >= 0 and lm.num_heads % lm.kv_heads == 0
    yield "lm.num_kv_heads", lm.num_kv_heads, fits, f"0, or to divide {lm.num_heads}"
    for name in ("rope_theta", "rope_factor"):
        value = getattr(lm, name)
        yield f"lm.{name}", value, 0 < value < 1e12, "a positive number"
    sound = lm.rope_original == 0 or (lm.rope_original > 0 and 0 < lm.rope_low < lm.rope_high < 1e6)
    yield "lm.rope_original", lm.rope_original, sound, "0, or with 0 < rope_low < rope_high"
    for i in lm.other_eos:
        yield "lm.other_eos", i, 0 <= i < lm.vocab_size, f"0 to {lm.vocab_size - 1}"
    epsilon = lm.layernorm_epsilon
    yield "lm.layernorm_epsilon", epsilon, 0 < epsilon < 1, "between 0 and 1"
    dtype, known = decoder.embeddings_dtype, ", ".join(EMBEDDINGS_DTYPES)
    yield "decoder.embeddings_dtype", dtype, dtype in EMBEDDINGS_DTYPES, f"one of {known}"
    precision = decoder.precision
    yield (
        "decoder.precision",
        precision,
        precision in PRECISIONS,
        f"one of {', '.join(PRECISIONS)} (or upgrade seechat-lite)",
    )
    sizes = BLOCK_SIZES if PRECISIONS[precision].block else (0,)
    known = " or ".join(map(str, sizes))
    yield "decoder.block_size", decoder.block_size, decoder.block_size in sizes, known
    shift = tokenizer.num_image_tokens
    yield "tokenizer.num_image_tokens", shift, 0 <= shift < lm.vocab_size, "less than the ids"
    kind, known = tokenizer.kind, ", ".join(TOKENIZER_KINDS)
    yield "tokenizer.kind", kind, kind in TOKENIZER_KINDS, f"one of {known}"
    for text, i in tokenizer.added.items():
        yield "tokenizer.added", {text: i}, bool(text) and 0 <= i < lm.vocab_size, "texts and ids"
    yield from file_rules(manifest.files, required_files(manifest))
    table = manifest.files[decoder.embeddings].bytes
    size = lm.vocab_size * lm.hidden_size * EMBEDDINGS_DTYPES[dtype]
    yield f"files.{decoder.embeddings}.bytes", table, table == size, f"{size} for the ids and width"
    if manifest.sampling:
        for name, least, most in _SAMPLING_RANGES:
            value = getattr(manifest.sampling, name)
            sound = value is None or least <= value <= most
            yield f"sampling.{name}", value, sound, f"{least:g} to {most:g}"
    tokens = decoder.prefix_tokens
    sound = 0 < tokens < lm.max_sequence_length if decoder.prefix else tokens == 0
    yield "decoder.prefix_tokens", tokens, sound, "0, or the tokens of decoder.prefix"
    if decoder.prefix:
        found = manifest.files[decoder.prefix].bytes
        heads = lm.num_heads * lm.padded_head_size
        size = 2 * lm.num_layers * heads * tokens * EMBEDDINGS_DTYPES[dtype]
        yield f"files.{decoder.prefix}.bytes", found, found == size, f"{size} for its tokens"
    if manifest.vision:
        vision, pixels = manifest.vision, manifest.vision.pixels
        yield "vision.tokens", vision.tokens, vision.tokens > 0, "a positive number"
        seen, known = vision.precision, ", ".join(VISION_PRECISIONS)
        yield "vision.precision", seen, seen in VISION_PRECISIONS, f"one of {known}"
        side = pixels.image_size
        yield from pixel_rules(pixels)
        if question := vision.question:
            reads = vision.bridge == QUESTION_QFORMER and vision.network is not None
            yield "vision.question", question, reads, f"none with the bridge {vision.bridge}"
            longest = vision.network.query_positions if vision.network else 0
            found, what = question.pieces, f"3 to {longest}"
            yield "vision.question.pieces", found, 3 <= found <= longest, what
        if network := vision.network:
            reads = (vision.bridge == QUESTION_QFORMER) == (vision.question is not None)
            yield "vision.question", vision.question, reads, "one, as the bridge reads it"
            tower, known = vision.tower, ", ".join(NETWORKS)
            yield "vision.tower", tower, tower in NETWORKS, f"one of {known}"
            bridge, known = vision.bridge, NETWORKS[tower]
            yield "vision.bridge", bridge, bridge in known, f"one of {', '.join(known)}"
            found, known = network.activation, ", ".join(ACTIVATIONS)
            yield "vision.network.activation", found, found in ACTIVATIONS, f"one of {known}"
            found = network.layernorm_epsilon
            yield "vision.network.layernorm_epsilon", found, 0 < found < 1, "between 0 and 1"
            for name in ("query_width", "query_inner_size", "query_layers", "query_heads"):
                value = getattr(network, name)
                fits, what = (value > 0, "positive") if bridge in QFORMERS else (value == 0, "0")
                yield f"vision.network.{name}", value, fits, f"{what} with the bridge {bridge}"
            for name in ("query_words", "query_positions"):
                value, reads = getattr(network, name), bridge == QUESTION_QFORMER
                fits, what = (value > 0, "positive") if reads else (value == 0, "0")
                yield f"vision.network.{name}", value, fits, f"{what} with the bridge {bridge}"
            if bridge == JOINED:
                patches = (side // max(network.patch_size, 1)) ** 2
                fits, what = patches % JOINED_PATCHES == 0, f"{JOINED_PATCHES} patches to a token"
                yield "vision.tokens", vision.tokens, fits, what
            for name in ("patch_size", "width", "inner_size", "layers", "heads"):
                value = getattr(network, name)
                yield f"vision.network.{name}", value, value > 0, "a positive number"
            for name in ("layers", "query_layers"):
                value = getattr(network, name)
                yield f"vision.network.{name}", value, value <= MAX_LAYERS, f"at most {MAX_LAYERS}"
            patch, fits = network.patch_size, side % network.patch_size == 0
            yield "vision.network.patch_size", patch, fits, f"{side} pixels to split into patches"
            for what, width in (("heads", network.width), ("query_heads", network.query_width)):
                value = getattr(network, what)
                fits = width % value == 0 if value else width == 0
                yield f"vision.network.{what}", value, fits, f"{width} to split into them"


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and check its values and the presence and size of its files.

    folder: the bundle's folder.

    Raises BundleError for a missing folder, a missing or resized file, a bad or newer manifest.
    """
    folder = Path(folder)
    manifest = Manifest.from_json(manifest_text(folder), str(folder / MANIFEST))
    check_sizes(folder, manifest.files)
    return manifest


def manifest_text(folder: Path) -> str:
    """The text of a bundle's manifest, of whichever kind.

    folder: the bundle's folder.

    Raises BundleError.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise BundleError(f"{folder}: a file; expected a bundle, which is a folder: name that")
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such folder; expected a bundle: check the path, or export one there"
        )
    try:
        return decoded(read_file(path, limit=MAX_JSON))
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: holds no {MANIFEST}; expected a bundle: export the weights to make one",
            calls={"export": {}},
        ) from None
    except (OSError, ValueError) as e:
        said = (e.strerror if isinstance(e, OSError) else None) or line(e)
        raise BundleError(
            f"{path}: cannot be read ({said}); expected text in UTF-8: copy the bundle or export "
            "it again"
        ) from None


def check_sizes(folder: Path, files: Mapping[str, FileHash]) -> None:
    """Check that the files of a manifest are there, with the sizes that it says.

    folder: the bundle's folder.
    files: the files.

    Raises BundleError.
    """
    for name, entry in files.items():
        file = folder / name
        try:
            status = file.stat()
        except OSError:
            raise BundleError(
                f"{file}: missing; the manifest lists it with {entry.bytes} bytes: "
                "copy the bundle again or export again"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{file}: not a file; expected one: copy the bundle again")
        if status.st_size != entry.bytes:
            raise BundleError(
                f"{file}: {status.st_size} bytes, the manifest says {entry.bytes}: "
                "the file is damaged or was changed, copy the bundle again or export again"
            )


def required_files(manifest: Manifest) -> list[str]:
    """The names of the files that the manifest's own fields point at."""
    names = [manifest.decoder.graph, manifest.decoder.embeddings, manifest.tokenizer.file]
    if manifest.decoder.prefix:
        names.append(manifest.decoder.prefix)
    if manifest.vision:
        names.append(manifest.vision.graph)
        if manifest.vision.network:
            names.append(manifest.vision.weights)
        if question := manifest.vision.question:
            names += [question.graph, question.weights, question.vocabulary]
    return names


class Hashed(Protocol):
    """A manifest of any kind."""

    @property
    def files(self) -> Mapping[str, FileHash]: ...


def verify_hashes(
    folder: Path, manifest: Hashed, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compare every file of a bundle with its recorded sha256.

    folder: the bundle's folder.
    manifest: its manifest.
    progress: called with the bytes read so far and the bytes of all files.

    Raises BundleError for the first file that differs or cannot be read.
    """
    done, total = 0, sum(entry.bytes for entry in manifest.files.values())

    def read(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    for name, entry in manifest.files.items():
        try:
            digest = sha256(folder / name, read)
        except OSError as e:
            raise BundleError(
                f"{folder / name}: cannot be read ({e.strerror or e}); expected a readable file: "
                "check its permissions, or copy the bundle again"
            ) from None
        if digest != entry.sha256:
            raise BundleError(
                f"{folder / name}: sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…: "
                "the file is damaged or was changed, copy the bundle again or export again"
            )


def sha256(path: Path, read: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hexadecimal.

    path: the file.
    read: called with the size, in bytes, of every part that was read.
    """
    digest, part = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
    with open_file(path) as f:
        while size := f.readinto(part):
            digest.update(part[:size])
            if read:
                read(size)
    return digest.hexdigest()


def _inside(name: str) -> bool:
    """Whether a file's name stays in the bundle folder, on every system.

    Symbolic links are followed wherever they lead, because download caches are made of them. The
    hash checks what such a file holds.
    """
    parts = name.split("/")
    plain = name.isprintable() and not any(c in name for c in "\\:")
    return plain and all(part not in ("", ".", "..") for part in parts)


def _build(kind: Any, value: Any, where: str, path: str) -> Any:
    """Build `kind` (a dataclass, a container of them or a plain type) from JSON, strictly."""

    def fail(expected: str) -> BundleError:
        return BundleError(f"{where}: {path} is {value!r:.80}, expected {expected}: export again")

    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise fail("an object")
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        unknown = value.keys() - fields.keys()
        if unknown:
            raise BundleError(
                f"{where}: {path} has unknown fields {sorted(unknown)}; expected the known ones "
                "alone: export again"
            )
        built = {}
        for name, f in fields.items():
            if name in value:
                built[name] = _build(hints[name], value[name], where, f"{path}.{name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise BundleError(f"{where}: {path} lacks {name!r}; expected it: export again")
        return kind(**built)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # only X | None is used
        return None if value is None else _build(args[0], value, where, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise fail("a list")
        if args[-1] is ...:
            args = args[:1] * len(value)
        if len(value) != len(args):
            raise fail(f"a list of {len(args)}")
        return tuple(
            _build(a, v, where, f"{path}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise fail("an object")
        return {k: _build(args[1], v, where, f"{path}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise fail(f"a {kind.__name__}")
    return value
