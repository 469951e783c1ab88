"""Opens what a model is loaded from: a bundle, or weights as they were published.

A path is interpreted here, once. The result is handed on to an engine, to an export or to
`seechat info`.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from seechat_lite.download import fetch, is_hub_id
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import Decoder, Manifest, TokenizerConfig, read_manifest
from seechat_weights.errors import BundleError, CheckpointError, EngineError
from seechat_weights.files.checkpoint import Opener
from seechat_weights.files.in_use import FilesInUse
from seechat_weights.files.reading import local_path
from seechat_weights.identify import identify
from seechat_weights.lm.checkpoint import LM, open_lm
from seechat_weights.lm.tokenizers import describe_tokenizer
from seechat_weights.model_files import Openings, is_bundle
from seechat_weights.vision.bundled import bundled_vision
from seechat_weights.vision.weights import VisionFiles, VisionWeights


@dataclass(frozen=True)
class Source:
    """A model that was found and understood. Made by open_source.

    path: where it is.
    manifest: a bundle's, or what a bundle's would say of published weights.
    tokenizer: the file of its tokenizer.
    lm: published weights; None for a bundle.
    published_vision: the vision network of published weights.
    """

    path: Path
    manifest: Manifest
    tokenizer: Path
    lm: LM | None = None
    published_vision: VisionWeights | None = None

    @cached_property
    def vision(self) -> VisionWeights | None:
        """The vision network and its weights; None if only a bundle's graph describes it.

        Raises BundleError.
        """
        if self.published_vision or self.lm:
            return self.published_vision
        return bundled_vision(self.path, self.manifest)

    def opened_files(self) -> FilesInUse:
        """The files that an engine reads while it answers; whoever opens them closes them.

        Raises BundleError, or CheckpointError for published weights.
        """
        if self.lm is None:
            return FilesInUse((self.path / name for name in self.manifest.files), BundleError)
        found = {file for files in self.lm.sources.values() for file in files}
        if self.published_vision:
            found.update(self.published_vision.files)
        return FilesInUse(sorted(found), CheckpointError)

    @property
    def vocabulary(self) -> Path | None:
        """The file with which questions are read, if pictures' embeddings depend on them."""
        vision = self.manifest.vision
        if vision is None or vision.question is None:
            return None
        published = self.published_vision
        return published.vocabulary if published else self.path / vision.question.vocabulary


def open_source(
    path: str | Path | None = None,
    *,
    vision: VisionFiles | None = None,
    adapter: str | Path | None = None,
    prefix: str | Path | None = None,
    tokenizer: str | Path | None = None,
    only_bundles: bool = False,
    opener: Opener | None = None,
) -> Source:
    """Find out what `path` is and open it; only headers of published weights are read.

    path: a bundle, None for the built-in one, or anything that lm.checkpoint.open_lm reads. If no
        such path exists, a Hub id, which is downloaded (see download.fetch).
    vision: files of the vision network for published weights, if not those they bring.
    adapter: as lm.checkpoint.open_lm takes it.
    prefix: as lm.checkpoint.open_lm takes it.
    tokenizer: the tokenizer's file, if it is not beside the weights.
    only_bundles: refuse published weights; the error says how they can be used.
    opener: opens checkpoints; an Openings, if others have read the same files.

    Raises BundleError if there is neither, CheckpointError for published weights and downloads,
    EngineError for files that are given with a bundle.
    """
    may_be_id = path is not None and is_hub_id(str(path))
    path = BUILTIN if path is None else local_path(path)
    if may_be_id:
        path, _ = fetch(path, only_bundles=only_bundles)
    try:
        if is_bundle(path):
            return _bundle(path, vision)
        if not only_bundles:
            return _published(path, vision or VisionFiles(), adapter, prefix, tokenizer, opener)
        _check_exported(path)
        return _bundle(path, vision)  # its error says what is wrong
    except OSError as e:
        raise BundleError(
            f"{e.filename or path}: cannot be read ({e.strerror or e}); expected a bundle, or "
            "published weights: check its name and who may read it"
        ) from None


def spoken_format(lm: LM, vision: object) -> str:
    """The conversation format of a language model.

    lm: the language model.
    vision: its vision network, or None.
    """
    if lm.config.family == "llama" and isinstance(vision, VisionWeights) and vision.conversation:
        return vision.conversation
    return "seechat" if vision and lm.conversation == "chatglm" else lm.conversation


def described_tokenizer(file: Path, lm: LM, vision: object) -> TokenizerConfig:
    """The tokenizer of a language model, as the code of its vision network uses it.

    file: its file.
    lm: the language model.
    vision: its vision network, or None.

    Raises CheckpointError.
    """
    found = describe_tokenizer(file, lm.config)
    legacy = isinstance(vision, VisionWeights) and vision.legacy_text
    return replace(found, legacy=True) if legacy else found


def _bundle(path: Path, vision: VisionFiles | None) -> Source:
    manifest = read_manifest(path)
    if vision:
        raise EngineError(
            f"{path}: a bundle, which has its own vision or none; expected published weights where "
            "others are given: load it without them, or export the model with them"
        )
    return Source(path, manifest, path / manifest.tokenizer.file)


def _published(
    path: Path,
    files: VisionFiles,
    adapter: str | Path | None,
    prefix: str | Path | None,
    tokenizer: str | Path | None,
    opener: Opener | None,
) -> Source:
    """A model from published weights, with the manifest that its bundle would have."""
    opener = opener or Openings()
    lm = open_lm(path, checkpoint=files.checkpoint, adapter=adapter, prefix=prefix, opener=opener)
    vision = files.open(path, adapter=adapter, opener=opener)
    if vision and vision.outputs != lm.config.hidden_size:
        raise CheckpointError(
            f"{path}: its embeddings are {lm.config.hidden_size} wide, those of its vision "
            f"{vision.outputs}; expected the same: give the projector that was trained with it"
        )
    pieces = local_path(tokenizer) if tokenizer else lm.tokenizer
    manifest = Manifest(
        name=path.stem if path.is_file() else path.resolve().name,
        lm=lm.config,
        decoder=Decoder(graph="", embeddings="", precision="fp16"),
        tokenizer=described_tokenizer(pieces, lm, vision),
        conversation=spoken_format(lm, vision),
        vision=vision.config if vision else None,
        provenance={"sources": [str(f) for sources in lm.sources.values() for f in sources]},
    )
    return Source(path, manifest, pieces, lm, vision)


def _check_exported(path: Path) -> None:
    """Raise BundleError that says what `path` holds and how to go on, if that is known."""
    if not path.exists():
        return
    try:
        found = identify(path)
    except CheckpointError as e:
        if path.is_dir():
            raise BundleError(str(e), options=e.options, calls=e.calls) from None
        return
    if found.missing:
        raise BundleError(
            f"{path}: {found.title}; expected a bundle: complete it, identify() says what it still "
            "needs",
            calls={"identify": {"path": path}},
        )
    if not found.runs:
        raise BundleError(
            f"{path}: {found.title}; expected a bundle: export one of it",
            calls={"export": found.options},
        )
    raise BundleError(
        f"{path}: published weights ({found.title}); expected a bundle: load them as they are with "
        'engine="torch" (which needs pip install "seechat-lite[torch]"), or export them once',
        calls={"load": {"engine": "torch", "model": found.options["lm"]}, "export": found.options},
    )
