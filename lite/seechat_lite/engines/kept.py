"""Decides what an engine's caches keep of earlier prompts, for models whose every token is causal.

Keys and values of a causal model depend only on the tokens before them. So a prompt that begins as
an earlier one, as a conversation's next question does, needs only its rest to be read. Several
conversations have a cache each, as long as all of them together stay within a number of bytes; the
one that was used longest ago leaves. Nothing here knows what a cache is made of.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from seechat_lite.prompt import Prompt

Cache = TypeVar("Cache")


@dataclass
class Content:
    """The tokens that stand at the beginning of a cache.

    ids: token ids.
    pictures: where each picture begins, its tokens, and a hash of its embeddings.
    """

    ids: list[int] = field(default_factory=list)
    pictures: list[tuple[int, int, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: Prompt) -> "Content":
        """The content of a prompt.

        prompt: the prompt.
        """
        pictures = []
        for start, embeds in prompt.images:
            same = hashlib.blake2b(np.ascontiguousarray(embeds).data).digest()
            pictures.append((start, len(embeds), same))
        return cls(list(prompt.ids), sorted(pictures))

    def shared(self, other: "Content") -> int:
        """How many first tokens are the same here and there.

        other: what is compared.
        """
        pairs = list(zip(self.ids, other.ids, strict=False))
        end = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        # a picture's tokens count only together with the same picture
        for start, _, _ in set(self.pictures) ^ set(other.pictures):
            end = min(end, start)
        return end

    def cut(self, length: int) -> None:
        """Forget all but the first tokens.

        length: how many stay.
        """
        del self.ids[length:]
        self.pictures = [p for p in self.pictures if p[0] + p[1] <= length]


@dataclass(eq=False)
class Kept(Generic[Cache]):
    """One cache and what it holds.

    most: the most tokens that it has held: so much memory it has touched.
    """

    cache: Cache
    content: Content = field(default_factory=Content)
    most: int = 0


class KeptCaches(Generic[Cache]):
    """The caches of one engine; the last one that was used is the last of `caches`.

    make: makes an empty cache.
    copy: copies the first tokens of a cache to another one.
    token_bytes: of keys and values of one token.
    budget: bytes that all caches may have touched together. The one in use may always grow.
    single: have one cache only, because something needs it to stay where it is.
    """

    def __init__(
        self,
        make: Callable[[], Cache],
        copy: Callable[[Cache, Cache, int], None],
        *,
        token_bytes: int,
        budget: int,
        single: bool = False,
    ) -> None:
        self._make, self._copy = make, copy
        self._token_bytes, self._budget, self._single = token_bytes, budget, single
        self.caches: list[Kept[Cache]] = []
        self._wanted = Content()  # of the prompt that is being read

    def begin(self, prompt: Prompt) -> tuple[Cache, int]:
        """The cache to read a prompt into, and how many of its first tokens are there already.

        At least the last token has to be read, because its logits are wanted.

        prompt: the prompt.
        """
        self._wanted = wanted = Content.of(prompt)
        found = [(kept.content.shared(wanted), kept) for kept in self.caches]
        shared, best = max(found, key=lambda pair: pair[0], default=(0, None))
        shared = min(shared, len(wanted.ids) - 1)
        # pictures are kept whole or not at all
        for start, tokens, _ in wanted.pictures:
            if start < shared < start + tokens:
                shared = start
        if best is None:
            kept = Kept(self._make())
        elif self._single or 2 * shared >= len(best.content.ids):
            kept = best
            self.caches.remove(best)
            kept.content.cut(shared)
        else:  # another conversation, which may only begin alike
            kept = Kept(self._make())
            self._copy(best.cache, kept.cache, shared)
            kept.content = Content(wanted.ids[:shared], list(wanted.pictures))
            kept.content.cut(shared)
        self.caches.append(kept)
        self._reserve(len(wanted.ids))
        return kept.cache, shared

    def read(self) -> None:
        """Note that the cache in use now holds all of the prompt that it was begun with."""
        self.caches[-1].content = self._wanted

    def append(self, ids: Sequence[int]) -> None:
        """Note that tokens were appended to the cache in use.

        ids: the tokens.
        """
        content = self.caches[-1].content
        content.ids += ids
        self._reserve(len(content.ids))

    def rewind(self, tokens: int) -> None:
        """Note that the last tokens of the cache in use were taken back.

        tokens: how many.
        """
        content = self.caches[-1].content
        content.cut(len(content.ids) - tokens)

    def clear(self) -> None:
        """Let all caches go."""
        self.caches.clear()

    def _reserve(self, tokens: int) -> None:
        """Make room for the cache in use to hold so many tokens; others leave for it."""
        used = self.caches[-1]
        used.most = max(used.most, tokens)
        while len(self.caches) > 1 and self._taken() > self._budget:
            del self.caches[0]

    def _taken(self) -> int:
        return sum(kept.most for kept in self.caches) * self._token_bytes
