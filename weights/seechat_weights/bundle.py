"""What a bundle is: the one folder that export writes and the runtime reads.

The manifest (`seechat.json`) describes everything the runtime needs to know: the networks' shapes,
the ONNX graphs, how a picture becomes pixels, which conversation format the model speaks, and a
hash of every file. This module knows nothing about ONNX Runtime or torch.
"""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from seechat_weights.errors import BundleError

MANIFEST = "seechat.json"
FORMAT = "seechat-bundle"
VERSION = 1


@dataclass(frozen=True)
class LMConfig:
    """Shape of a ChatGLM-6B (v1) decoder; the defaults are the published model's."""

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_heads: int = 32
    inner_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    pad_id: int = 3
    mask_id: int = 130000
    gmask_id: int = 130001
    bos_id: int = 130004  # <sop>: the first token of an answer
    eos_id: int = 130005  # <eop>: ends an answer

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class PixelSpec:
    """How a picture becomes the vision graph's input, float32 [n, 3, image_size, image_size].

    resize: "squash" ignores the aspect ratio; "crop" resizes the shorter side and cuts the centre;
    "pad" fits the longer side and fills the rest with `background`.
    exact: do what the published code does, its oddities included (EXIF orientation ignored, alpha
    dropped, 16-bit grey saturated, conversion to RGB before the resize if `rgb_first`, else
    after it); otherwise turn the picture upright, lay alpha over `background`, scale 16 bits.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "squash"
    interpolation: str = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    exact: bool = False
    rgb_first: bool = True


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, bridge and projector, together one graph: pixels to embeddings."""

    graph: str  # ONNX file: pixel_values f32 [n, 3, S, S] -> image_embeds f32 [n, tokens, hidden]
    tokens: int  # embeddings of one picture
    tower: str  # "clip", ...: what was exported, for people
    bridge: str  # "linear", "mlp2x_gelu", ...
    pixels: PixelSpec = PixelSpec()
    precision: str = "fp32"


@dataclass(frozen=True)
class Decoder:
    """The LM's graph and the settings it was written with."""

    graph: str  # ONNX file of the decoder with its key/value cache
    embeddings: str  # raw row-major table [vocab_size, hidden_size] of `embeddings_dtype`
    embeddings_dtype: str = "float16"
    precision: str = "fp32"
    block_size: int = 0  # 0 where the precision has no blocks


@dataclass(frozen=True)
class TokenizerConfig:
    file: str = "ice_text.model"
    num_image_tokens: int = 0  # 20000 in the old vocabulary of 150528 ids


@dataclass(frozen=True)
class FileHash:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle; written as JSON, read strictly."""

    name: str
    lm: LMConfig
    decoder: Decoder
    tokenizer: TokenizerConfig
    conversation: str  # name of the default conversation format
    vision: VisionConfig | None = None
    files: dict[str, FileHash] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # sources, licence, versions
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Parse a manifest; `where` names the file in errors.

        Raises BundleError for anything that is not a manifest of this version, naming the field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise BundleError(
                f"{where}: not valid JSON ({e}); expected a bundle manifest: export the model again"
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(
                f'{where}: expected "format": "{FORMAT}"; this is not a bundle written by '
                "`seechat export`: point --model at the exported folder"
            )
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool):
            raise BundleError(f"{where}: version is {version!r}, expected a number: export again")
        if version > VERSION:
            raise BundleError(
                f"{where}: bundle version {version} is newer than this program reads ({VERSION}): "
                "upgrade with `pip install -U seechat-lite`"
            )
        if version < VERSION:
            raise BundleError(f"{where}: version {version}, expected {VERSION}: export again")
        return _build(cls, data, where, "manifest")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle folder and the presence and size of its files.

    Raises BundleError (missing folder, missing or resized file, bad or newer manifest).
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected a bundle from `seechat export`")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: holds no {MANIFEST}; expected a bundle: make one with `seechat export`"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"{path}: cannot be read ({e}); expected text: export again") from None
    manifest = Manifest.from_json(text, str(path))
    for name in required_files(manifest):
        if name not in manifest.files:
            raise BundleError(f"{path}: uses {name} but lists no hash for it: export again")
    for name, entry in manifest.files.items():
        file = folder / name
        if not _inside(folder, name):
            raise BundleError(f"{path}: file name {name!r} leaves the bundle folder; refused")
        try:
            size = file.stat().st_size
        except OSError:
            raise BundleError(
                f"{file}: missing; the manifest lists it with {entry.bytes} bytes: "
                "copy the bundle again or export again"
            ) from None
        if size != entry.bytes:
            raise BundleError(
                f"{file}: {size} bytes, the manifest says {entry.bytes}: "
                "the file is damaged or was changed; copy the bundle again or export again"
            )
    return manifest


def required_files(manifest: Manifest) -> list[str]:
    """Names of the files that the manifest's own fields point at."""
    names = [manifest.decoder.graph, manifest.decoder.embeddings, manifest.tokenizer.file]
    if manifest.vision:
        names.append(manifest.vision.graph)
    return names


def verify_hashes(folder: Path, manifest: Manifest) -> None:
    """Compare every file of the bundle with its recorded sha256; BundleError on a difference."""
    for name, entry in manifest.files.items():
        digest = sha256(folder / name)
        if digest != entry.sha256:
            raise BundleError(
                f"{folder / name}: sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…: "
                "the file is damaged or was changed; copy the bundle again or export again"
            )


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _inside(folder: Path, name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\\" not in name


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
            raise BundleError(f"{where}: {path} has unknown fields {sorted(unknown)}: export again")
        built = {}
        for name, f in fields.items():
            if name in value:
                built[name] = _build(hints[name], value[name], where, f"{path}.{name}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise BundleError(f"{where}: {path} lacks {name!r}: export again")
        return kind(**built)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # only X | None is used
        return None if value is None else _build(args[0], value, where, path)
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(args):
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
