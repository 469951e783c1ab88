"""What a model is loaded from: a bundle, or weights as they were published.

A path is interpreted here, once. What was opened is handed on: to an engine, to an export, to
`seechat info`.
"""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from seechat_lite.download import fetch, is_hub_id
from seechat_weights.builtin import BUILTIN
from seechat_weights.bundle.manifest import Decoder, Manifest, TokenizerConfig, read_manifest
from seechat_weights.errors import BundleError, CheckpointError, EngineError
from seechat_weights.files.checkpoint import Opener
from seechat_weights.files.reading import local_path
from seechat_weights.identify import identify
from seechat_weights.lm.chatglm import OLD_IMAGE_TOKENS, OLD_VOCABULARY
from seechat_weights.lm.checkpoint import LM, open_lm
from seechat_weights.model_files import Openings, is_bundle
from seechat_weights.vision.bundled import bundled_vision
from seechat_weights.vision.weights import VisionFiles, VisionWeights


@dataclass(frozen=True)
class Source:
    """A model that was found and understood. Made by open_source.

    path: where it is. manifest: a bundle's, or what it would say of published weights. tokenizer:
    its file. lm: published weights; None for a bundle's. published_vision: what they see with.
    """

    path: Path
    manifest: Manifest
    tokenizer: Path
    lm: LM | None = None
    published_vision: VisionWeights | None = None

    @cached_property
    def vision(self) -> VisionWeights | None:
        """The vision network and its weights; None if a bundle's graph alone describes it.

        Raises BundleError.
        """
        if self.published_vision or self.lm:
            return self.published_vision
        return bundled_vision(self.path, self.manifest)


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
    """Find out what `path` is and open it; of published weights only headers are read.

    path: a bundle, None for the built-in one, or whatever lm.checkpoint.open_lm reads, as are
        adapter and prefix; where no such path exists, a Hub id, which is downloaded (see
        download.fetch).
    vision: files that published weights are to see with, if not with what they bring.
    tokenizer: the ice_text.model, if it is not beside them.
    only_bundles: refuse published weights, in words that say how they can be used.
    opener: opens checkpoints, such as an Openings, where others have read the same files.

    Raises BundleError where there is neither, CheckpointError for published weights and downloads,
    EngineError for files that are given to a bundle.
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
        if found := _not_exported(path):
            raise BundleError(found)
        return _bundle(path, vision)  # which says what is wrong
    except OSError as e:
        raise BundleError(
            f"{e.filename or path}: cannot be read ({e.strerror or e}); expected a bundle, or "
            "published weights: check its name and who may read it"
        ) from None


def spoken_format(lm: LM, *, seeing: bool) -> str:
    """The conversation format of a language model that was given a vision network, or not."""
    return "seechat" if seeing and lm.conversation == "chatglm" else lm.conversation


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
    """A model that has no files of ours, with what a bundle's manifest would say of it."""
    opener = opener or Openings()
    lm = open_lm(path, checkpoint=files.checkpoint, adapter=adapter, prefix=prefix, opener=opener)
    vision = files.open(path, opener=opener)
    if vision and vision.outputs != lm.config.hidden_size:
        raise CheckpointError(
            f"{path}: its embeddings are {lm.config.hidden_size} wide, those of its vision "
            f"{vision.outputs}; expected the same: give the projector that was trained with it"
        )
    ice = local_path(tokenizer) if tokenizer else lm.tokenizer
    tokens = OLD_IMAGE_TOKENS if lm.config.vocab_size == OLD_VOCABULARY else 0
    manifest = Manifest(
        name=path.stem if path.is_file() else path.resolve().name,
        lm=lm.config,
        decoder=Decoder(graph="", embeddings="", precision="fp16"),
        tokenizer=TokenizerConfig(ice.name, tokens),
        conversation=spoken_format(lm, seeing=vision is not None),
        vision=vision.config if vision else None,
        provenance={"sources": [str(f) for sources in lm.sources.values() for f in sources]},
    )
    return Source(path, manifest, ice, lm, vision)


def _not_exported(path: Path) -> str | None:
    """What is in `path`, which is no bundle, and how to go on; None where that is not known."""
    if not path.exists():
        return None
    try:
        found = identify(path)
    except CheckpointError as e:
        return str(e) if path.is_dir() else None
    if found.missing:
        info = f"seechat info {shlex.quote(str(path))}"
        return f"{path}: {found.title}; expected a bundle: `{info}` says what it still needs"
    if not found.run:
        return f"{path}: {found.title}; expected a bundle: make one with `seechat export`"
    return (
        f"{path}: published weights ({found.title}); expected a bundle: run them as they are, "
        f'{found.run} (in Python engine="torch"; needs pip install "seechat-lite[torch]"), or '
        f"export them once: {found.command}"
    )
