"""Published weights as a model that was never exported, for engines that read them directly."""

from pathlib import Path

from seechat_weights.bundle import Decoder, Manifest, TokenizerConfig
from seechat_weights.families import TOKENIZER
from seechat_weights.lm import open_lm
from seechat_weights.names import OLD_IMAGE_TOKENS, OLD_VOCABULARY


def published_manifest(path: Path) -> Manifest:
    """What a bundle's manifest would say of the text model in `path`, which has no files of ours.

    path: whatever open_lm reads, with its tokenizer beside it. Raises CheckpointError.
    """
    lm = open_lm(path)
    tokens = OLD_IMAGE_TOKENS if lm.config.vocab_size == OLD_VOCABULARY else 0
    return Manifest(
        name=path.stem if path.is_file() else path.resolve().name,
        lm=lm.config,
        decoder=Decoder(graph="", embeddings="", precision="fp16"),
        tokenizer=TokenizerConfig(str(lm.folder / TOKENIZER), tokens),
        # its eyes are read by an export alone, and text is asked for in the text model's words
        conversation="chatglm",
        provenance={"sources": [str(f) for files in lm.sources.values() for f in files]},
    )
