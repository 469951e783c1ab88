"""What the runtime must know of each LM family: where tokens stand, and which see each other.

Positions are int64 [rows, tokens], with one row of the rotary tables' positions for each piece of a
head: two for ChatGLM, one for LLaMA. The last row counts the tokens that are appended to a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from seechat_lite.prompt import context_length, position_ids
from seechat_lite.rotary import llama_tables, rotary_tables
from seechat_weights.config import LMConfig
from seechat_weights.lm.families import LM_FAMILIES


class Tables(Protocol):
    def __call__(self, lm: LMConfig, length: int, *, rounded: bool = False) -> np.ndarray: ...


@dataclass(frozen=True)
class Traits:
    """Where a family's tokens stand, and how much a layer holds.

    tables: the rotary tables, float32 [2 (cos, sin), length, head_size / 2 / rows]; `rounded` as
        in rotary.rotary_tables.
    positions: those of a prompt's tokens.
    context: how many of a prompt's first tokens see each other both ways; the rest is causal.
    rows: how many rows positions have.
    inner: how many times the inner size a layer's MLP holds for each token.
    """

    tables: Tables
    positions: Callable[[Sequence[int], LMConfig], np.ndarray]
    context: Callable[[Sequence[int], LMConfig], int]
    rows: int
    inner: int


def _chatglm_tables(lm: LMConfig, length: int, *, rounded: bool = False) -> np.ndarray:
    return rotary_tables(lm.head_size, length, rounded=rounded)


def _llama_tables(lm: LMConfig, length: int, *, rounded: bool = False) -> np.ndarray:
    return llama_tables(lm, length, rounded=rounded)


def _chatglm_positions(ids: Sequence[int], lm: LMConfig) -> np.ndarray:
    return position_ids(ids, gmask_id=lm.gmask_id, mask_id=lm.mask_id, bos_id=lm.bos_id)


def _llama_positions(ids: Sequence[int], lm: LMConfig) -> np.ndarray:
    return np.arange(len(ids))[None]


def _chatglm_context(ids: Sequence[int], lm: LMConfig) -> int:
    return context_length(ids, bos_id=lm.bos_id)


def _llama_context(ids: Sequence[int], lm: LMConfig) -> int:
    return 0


TRAITS = {
    "chatglm": Traits(_chatglm_tables, _chatglm_positions, _chatglm_context, rows=2, inner=2),
    "llama": Traits(_llama_tables, _llama_positions, _llama_context, rows=1, inner=4),
}


def framed(ids: Sequence[int], lm: LMConfig) -> list[int]:
    """The ids of a prompt's text with those that its family puts before and behind.

    ids: of the text.
    lm: the decoder's shape.
    """
    family = LM_FAMILIES[lm.family]
    begin, end = ([getattr(lm, name) for name in names] for names in (family.begin, family.end))
    return [*begin, *ids, *end]


def ordinary_ids(lm: LMConfig) -> range:
    """Ids of words: none of them begins, ends or structures a prompt.

    lm: the decoder's shape.
    """
    special = {lm.bos_id, lm.eos_id, lm.mask_id, lm.gmask_id, *lm.other_eos}
    first = min(5, lm.vocab_size - 1)
    return range(first, min((i for i in special if i > first), default=lm.vocab_size))
