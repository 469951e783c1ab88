"""What a model is loaded from: a bundle or, by engines that read them, published weights."""

import shlex
from pathlib import Path

from seechat_lite.errors import BundleError, CheckpointError, EngineError
from seechat_lite.eyes import EyeFiles
from seechat_weights.bundle import MANIFEST, Decoder, Manifest, TokenizerConfig, read_manifest
from seechat_weights.families import TOKENIZER
from seechat_weights.identify import identify
from seechat_weights.lm import LM, open_lm
from seechat_weights.names import OLD_IMAGE_TOKENS, OLD_VOCABULARY


def model_manifest(path: Path, *, engine: str, eyes: EyeFiles | None = None) -> Manifest:
    """A bundle's manifest or, for the engine "torch", what it would say of published weights.

    eyes: files that published weights are to see with. Raises BundleError where `engine` can load
    nothing from `path`, CheckpointError for published weights, EngineError for eyes that are given
    to a bundle.
    """
    try:
        return _manifest(path, engine, eyes)
    except OSError as e:
        raise BundleError(
            f"{e.filename or path}: cannot be read ({e.strerror or e}); expected a bundle, or "
            "published weights: check its name and who may read it"
        ) from None


def _manifest(path: Path, engine: str, eyes: EyeFiles | None) -> Manifest:
    if (path / MANIFEST).exists():
        if eyes:
            raise EngineError(
                f"{path}: a bundle, which has its own eyes or none; expected published weights "
                "where others are given: load it without them, or export the model with them"
            )
        return read_manifest(path)
    if engine == "torch":
        return published_manifest(path, eyes)
    if found := _not_exported(path):
        raise BundleError(found)
    return read_manifest(path)  # which says what is wrong


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


def published_manifest(path: Path, files: EyeFiles | None = None) -> Manifest:
    """What a bundle's manifest would say of the model in `path`, which has no files of ours.

    path: whatever open_lm reads, with its tokenizer beside it. files: what it sees with, if not
    with its own eyes. Raises CheckpointError.
    """
    files = files or EyeFiles()
    lm, eyes = open_lm(path, checkpoint=files.checkpoint), files.open(path)
    if eyes and eyes.outputs != lm.config.hidden_size:
        raise CheckpointError(
            f"{path}: its embeddings are {lm.config.hidden_size} wide, those of its vision "
            f"{eyes.outputs}; expected the same: give the projector that was trained with it"
        )
    tokens = OLD_IMAGE_TOKENS if lm.config.vocab_size == OLD_VOCABULARY else 0
    return Manifest(
        name=path.stem if path.is_file() else path.resolve().name,
        lm=lm.config,
        decoder=Decoder(graph="", embeddings="", precision="fp16"),
        tokenizer=TokenizerConfig(str(lm.folder / TOKENIZER), tokens),
        conversation=spoken_format(lm, seeing=eyes is not None),
        vision=eyes.config if eyes else None,
        provenance={"sources": [str(f) for sources in lm.sources.values() for f in sources]},
    )


def spoken_format(lm: LM, *, seeing: bool) -> str:
    """The conversation format of a language model that was given eyes, or not."""
    return "seechat" if seeing and lm.conversation == "chatglm" else lm.conversation
