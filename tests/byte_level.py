"""Small tokenizer.json files of byte-level BPE, made as those of published models are."""

from pathlib import Path
from typing import Any

from seechat_lite.json_tokenizer import PATTERNS

LLAMA_3 = {"begin": "<|begin_of_text|>", "end": "<|eot_id|>", "more": [
    "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>",
]}  # fmt: skip
CHATML = {"begin": "", "end": "<|im_end|>", "more": ["<|endoftext|>", "<|im_start|>"]}
KINDS: dict[str, dict[str, Any]] = {
    "llama3": {**LLAMA_3, "pattern": PATTERNS[0]},
    "qwen2": {**CHATML, "pattern": PATTERNS[1], "normalizer": True},
    "smollm2": {**CHATML, "pattern": None},
    # the vocabulary has the names as words, as `ignore_merges` may find them
    "words": {**CHATML, "pattern": None, "words": True},
}
TEXT = (
    "The quick brown fox, 1234567 times: don't you'll we've it's!\n\n\tdef f(x):\n    return x\n"
    "图里有一只猫，它在睡觉。这是什么？你好！ 🐼🐼 naïve café e\u0301 Ärger über Straße\r\n"
    "user system assistant im_start im_end <|im_ end|> start_header_id eot_id <| |> "
)


def make(kind: str, path: Path) -> Path:
    """Write a tokenizer.json of a kind.

    kind: of KINDS.
    path: the file.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    said = KINDS[kind]
    made = Tokenizer(models.BPE(ignore_merges=bool(said.get("words"))))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=said["pattern"] is None)
    if said.get("words"):  # no splitting: a whole text may be one word
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = bytes_
    elif said["pattern"] is None:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), bytes_]
        )
    else:
        split = pre_tokenizers.Split(Regex(said["pattern"]), behavior="isolated", invert=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    if said.get("normalizer"):
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    specials = [*filter(None, (said["begin"], said["end"])), *said["more"]]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=specials if said.get("words") else [],
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_special_tokens(specials)
    made.add_tokens(["<tool_call>"])
    if said["begin"]:
        begin = said["begin"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
        )
    made.save(str(path))
    return path
