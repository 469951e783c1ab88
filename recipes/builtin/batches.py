"""Dialogues to training batches, written exactly as the runtime writes its prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from careless import careless
from dialogues import Round
from photo_dialogues import PhotoAuthor, View
from scenes import Picture
from sights import Sight
from torch import Tensor
from vision import TOKENS

from seechat_lite.conversation import FORMATS, Turn, render
from seechat_lite.prompt import build
from seechat_lite.tokenizer import Tokenizer

FORMAT = FORMATS["seechat"]
SIGHT = TOKENS + 3  # the numbers of a sight
PHOTOS = 0.3  # which share of the dialogues is about photographs


@dataclass
class Sample:
    """One dialogue: ids up to the end of its last answer, and where its pictures stand."""

    ids: list[int]
    context: int  # index of <sop>
    images: list[tuple[int, int | Sight]]  # start in ids; number in the bank, or what is seen


@dataclass
class Batch:
    ids: Tensor  # int64 [b, length], padded on the right
    context: Tensor  # int64 [b]
    targets: Tensor  # int64 [b, length]: the next id after each position of an answer, else -100
    rows: Tensor  # int64 [k]: which row of the batch a picture stands in
    starts: Tensor  # int64 [k]
    pictures: np.ndarray  # [k] numbers in the bank; -1 for a photograph
    sights: Tensor  # int64 [k, 15]: what photographs show (Sight.numbers), else 0


def encode(tokenizer: Tokenizer, rounds: list[Round], numbers: Sequence[int | Sight]) -> Sample:
    """A dialogue as the runtime would send it, with its last answer and <eop> appended."""
    turns = [Turn(r.question, r.answer, tuple(str(i) for i in r.pictures)) for r in rounds]
    last = rounds[-1]
    turns[-1] = Turn(last.question, None, turns[-1].images)
    blank = np.zeros((TOKENS, 1), np.float32)
    embeds = {str(i): blank for i in range(len(numbers))}
    prompt = build(tokenizer, render(FORMAT, turns), embeds)
    shown = [i for r in rounds for i in r.pictures]
    images = [(start, numbers[i]) for (start, _), i in zip(prompt.images, shown, strict=True)]
    answer = tokenizer.encode(last.answer)
    ids = [*prompt.ids, *answer, tokenizer.eos_id]
    return Sample(ids, len(prompt.ids) - 1, images)


def collate(samples: list[Sample], pad: int) -> Batch:
    length = max(len(s.ids) for s in samples) - 1  # the last id is only predicted
    length = -(-length // 8) * 8  # few different shapes: kernels are compiled for each
    ids = np.full((len(samples), length), pad)
    targets = np.full((len(samples), length), -100)
    for row, s in enumerate(samples):
        n = len(s.ids) - 1
        ids[row, :n] = s.ids[:-1]
        targets[row, s.context : n] = s.ids[s.context + 1 :]
    images = [(row, start, what) for row, s in enumerate(samples) for start, what in s.images]
    places = [(r, start, -1 if isinstance(w, Sight) else w) for r, start, w in images]
    rows, starts, numbers = np.array(places, np.int64).reshape(-1, 3).T
    sights = [w.numbers() if isinstance(w, Sight) else [0] * SIGHT for *_, w in images]
    return Batch(
        torch.from_numpy(ids),
        torch.tensor([s.context for s in samples]),
        torch.from_numpy(targets),
        torch.from_numpy(rows),
        torch.from_numpy(starts),
        numbers,
        torch.tensor(sights, dtype=torch.int64).reshape(-1, SIGHT),
    )


def positions(context: Tensor, length: int) -> Tensor:
    """GLM's two position rows [b, 2, length] for sequences whose <sop> stands at `context`."""
    index = torch.arange(length)[None]
    sop = context[:, None]
    return torch.stack([index.minimum(sop - 1), (index - sop + 1).clamp(min=0)], 1)


class Sampler:
    """An endless stream of batches over a bank's pictures, of similar lengths each."""

    def __init__(
        self,
        author: PhotoAuthor,
        tokenizer: Tokenizer,
        pictures: list[Picture],
        *,
        text_only: bool = False,
    ) -> None:
        self.author, self.tokenizer, self.pictures = author, tokenizer, pictures
        self.text_only = text_only
        kinds = np.array([len(p.things) for p in pictures])
        self.singles = np.flatnonzero(kinds == 1)
        self.scenes = np.flatnonzero(kinds > 1)
        self.others = np.flatnonzero(kinds == 0)
        concept = [p.things[0].concept if p.things else -1 for p in pictures]
        # concepts with many drawings are not asked about more often than the rest
        weight = 1 / np.bincount(np.array(concept)[self.singles])[np.array(concept)[self.singles]]
        self.cumulative = np.cumsum(weight) / weight.sum()

    def pick_single(self) -> int:
        at = np.searchsorted(self.cumulative, self.author.rng.random())
        return int(self.singles[min(at, len(self.singles) - 1)])

    def sample(self) -> Sample:
        author, rng = self.author, self.author.rng
        roll = rng.random()
        if self.text_only or roll < 0.05:
            return self.written(author.without_picture(), [])
        turns = 1 if roll < 0.72 else int(rng.integers(2, 4))
        if author.chance(PHOTOS):
            return self.photographs(turns=turns)
        kind = rng.random()
        if kind < 0.09:
            return self.two_pictures()
        if kind < 0.13:
            number = int(author.choose(self.others))
        elif kind < 0.70:
            number = int(author.choose(self.scenes))
        else:
            number = self.pick_single()
        return self.written(author.one_picture(self.pictures[number], turns=turns), [number])

    def written(self, rounds: list[Round], numbers: Sequence[int | Sight]) -> Sample:
        """A dialogue as people and programs send it."""
        rng = self.author.rng
        asked = [replace(r, question=careless(rng, r.question)) for r in rounds]
        return encode(self.tokenizer, asked, numbers)

    def photographs(self, *, turns: int) -> Sample:
        """A dialogue about a photograph, or now and then about two to five."""
        author = self.author
        if author.chance(0.15):
            return self.several()
        sight = author.deal()
        return self.written(author.photo(sight, turns=turns), [sight])

    def several(self) -> Sample:
        """A dialogue about two to five pictures: photographs, and drawings of one thing."""
        author = self.author
        views: list[View] = []
        shown: list[int | Sight] = []
        drawings = author.choose((0.0, 0.5, 1.0))  # how many of them are
        for _ in range(int(author.rng.choice([2, 3, 4, 5], p=[0.5, 0.2, 0.15, 0.15]))):
            if views and author.chance(0.08):  # the same once more
                views.append(views[-1])
                shown.append(shown[-1])
            elif author.chance(drawings):
                number = self.pick_single()
                views.append(self.pictures[number].things[0])
                shown.append(number)
            else:
                sight = author.deal()
                views.append(sight)
                shown.append(sight)
        return self.written(author.several(views), shown)

    def two_pictures(self) -> Sample:
        """A dialogue about two pictures of one thing each."""
        numbers = [self.pick_single(), self.pick_single()]
        if self.author.chance(0.1):
            numbers[1] = numbers[0]
        rounds = self.author.two_pictures(*(self.pictures[i] for i in numbers))
        return self.written(rounds, numbers)

    def about(self) -> Sample:
        """A picture of one thing, asked at once for its category, a trait, its colour.

        Or for its name, so that "what is this" does not get the answer to "what category".
        """
        author, number = self.author, self.pick_single()
        lang, thing = author.language(), self.pictures[number].things[0]
        ask = author.naming if author.chance(0.35) else author.about
        return self.written([Round(*ask(thing, lang), (0,))], [number])

    def batches(
        self, size: int, pool: int = 12, make: Callable[[], Sample] | None = None
    ) -> Iterator[Batch]:
        """Sort a pool of samples by length, so that little of a batch is padding."""
        make = make or self.sample
        while True:
            samples = sorted((make() for _ in range(size * pool)), key=lambda s: len(s.ids))
            for i in self.author.rng.permutation(pool):
                yield collate(samples[i * size : (i + 1) * size], self.tokenizer.pad_id)
