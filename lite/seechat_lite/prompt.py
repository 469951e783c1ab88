"""Builds prompts: token ids, the places of pictures among them, and GLM's two position rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from seechat_lite.conversation import ImageSlot
from seechat_lite.written import Text
from seechat_weights.errors import ContextError

if TYPE_CHECKING:  # engines take prompts but need no tokenizer
    from seechat_lite.tokenizers import TextTokenizer


@dataclass(frozen=True, eq=False)
class Prompt:
    """What an engine is asked to prefill.

    ids: token ids; ChatGLM's prompts for an answer end with [gMASK] <sop>.
    images: for every picture the index in `ids` where it begins, and its embeddings, float32
        [tokens, hidden]; they replace the word embeddings there.

    Raises ContextError if a picture reaches beyond the ids, overlaps another, or is not a float32
    matrix.
    """

    ids: list[int]
    images: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.ids:
            raise ContextError("prompt: no ids; expected at least one: build it from a turn")
        end = 0
        for start, embeds in sorted(self.images, key=lambda image: image[0]):
            if not isinstance(embeds, np.ndarray) or embeds.dtype != np.float32 or embeds.ndim != 2:
                found = (
                    f"{embeds.dtype} {list(embeds.shape)}"
                    if isinstance(embeds, np.ndarray)
                    else type(embeds).__name__
                )
                raise ContextError(
                    f"prompt: embeddings of the picture at {start} are {found}; expected a numpy "
                    "float32 array [tokens, hidden]: pass one row of what encode_image returned"
                )
            if start < end or start + len(embeds) > len(self.ids):
                raise ContextError(
                    f"prompt: a picture takes ids {start} to {start + len(embeds)}; expected a "
                    f"place from {end} on and within {len(self.ids)} ids: let no pictures overlap"
                )
            end = start + len(embeds)


def build(
    tokenizer: "TextTokenizer",
    segments: Sequence[str | ImageSlot],
    image_embeds: Mapping[str, np.ndarray],
    *,
    specials: bool = False,
    begins: bool = True,
) -> Prompt:
    """Tokenize each text segment alone, put pictures into their slots, and frame all of it.

    The frame is the model's: ChatGLM's prompts end with [gMASK] <sop>, LLaMA's begin with <s>.

    tokenizer: the model's tokenizer.
    segments: from conversation.render.
    image_embeds: float32 [tokens, hidden] by picture key; a slot takes as many ids as rows.
    specials: the format's; False (safe) keeps literal names such as "<sop>" in what people wrote
        from becoming tokens; only those that a format writes itself do. With True all become
        tokens, as in the published tokenizers; position_ids() and context_length() still take the
        final [gMASK] <sop> for the real ones, so the dialogue stays sound.
    begins: the format's; whether the ids stand first with which the model's prompts begin.

    Raises ContextError if a picture has no embeddings.
    """
    ids: list[int] = [*tokenizer.prompt_begin] if begins else []
    images: list[tuple[int, np.ndarray]] = []
    for segment in segments:
        if isinstance(segment, Text) and not specials:
            ids += tokenizer.encode_parts(segment.parts)
            continue
        if isinstance(segment, str):
            ids += tokenizer.encode(segment, specials=specials)
            continue
        embeds = image_embeds.get(segment.key)
        if embeds is None:
            raise ContextError(
                f"prompt: no embeddings for picture {segment.key[:12]}; expected those of every "
                "picture in the conversation: encode it before the prompt is built"
            )
        images.append((len(ids), embeds))
        ids += [segment.token_id] * len(embeds)
    return Prompt([*ids, *tokenizer.prompt_end], images)


def context_length(ids: Sequence[int], *, bos_id: int) -> int:
    """Number of ids before the <sop> that begins the answer; these ids see each other both ways.

    The published code takes the first <sop>. If the ids end with <sop>, this function takes that
    last one; they differ only if somebody's text put another <sop> before it.

    ids: the prompt.
    bos_id: the id of <sop>.

    Raises ContextError if there is no <sop>.
    """
    if ids and ids[-1] == bos_id:
        return len(ids) - 1
    return _first(ids, bos_id, "<sop>")


def position_ids(ids: Sequence[int], *, gmask_id: int, mask_id: int, bos_id: int) -> np.ndarray:
    """GLM's two position rows, int64 [2, len(ids)].

    Row 0 counts the context and then stays at the position of the mask to fill. Row 1 is 0 in the
    context and counts the answer from 1, beginning with <sop>. The mask is the first [gMASK], or
    else the first [MASK]. Ids that end with [gMASK] <sop> begin an answer and use that last
    [gMASK]. (The published code always takes the first, so a literal "<sop>" or "[gMASK]" in a
    user's words would move all positions of the answer.)

    ids: the prompt.
    gmask_id: the id of [gMASK].
    mask_id: the id of [MASK].
    bos_id: the id of <sop>.

    Raises ContextError if there is no mask or no <sop>.
    """
    context = context_length(ids, bos_id=bos_id)
    if context == len(ids) - 1 and context and ids[context - 1] == gmask_id:
        mask = context - 1
    elif gmask_id in ids:
        mask = ids.index(gmask_id)
    else:
        mask = _first(ids, mask_id, "[gMASK] or [MASK]")
    positions = np.zeros((2, len(ids)), np.int64)
    positions[0, :context] = np.arange(context)
    positions[0, context:] = mask
    positions[1, context:] = np.arange(1, len(ids) - context + 1)
    return positions


def _first(ids: Sequence[int], token_id: int, name: str) -> int:
    try:
        return ids.index(token_id)
    except ValueError:
        raise ContextError(
            f"prompt: {len(ids)} ids without {name}; expected them to end with [gMASK] <sop>: "
            "add both after the tokenized text"
        ) from None
