"""Published weights as a model that was never exported, for engines that read them directly."""

from pathlib import Path

from seechat_lite.errors import CheckpointError
from seechat_lite.eyes import EyeFiles
from seechat_weights.bundle import Decoder, Manifest, TokenizerConfig
from seechat_weights.families import TOKENIZER
from seechat_weights.lm import LM, open_lm
from seechat_weights.names import OLD_IMAGE_TOKENS, OLD_VOCABULARY


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
        provenance={"sources": [str(f) for files in lm.sources.values() for f in files]},
    )


def spoken_format(lm: LM, *, seeing: bool) -> str:
    """The conversation format of a language model that was given eyes, or not."""
    return "seechat" if seeing and lm.conversation == "chatglm" else lm.conversation
