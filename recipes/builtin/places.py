"""Teach "where is X": compare the asked word with what every region shows.

Left to itself the decoder learns by heart where things are in the training scenes and says any
place of the layout to new ones. Two things change that. Scenes are mixed anew for every question,
each place filled from another picture of the same layout, so that there is nothing to remember. And
a head of the first layer is set up to look from a word to the region that shows the thing of that
name and to bring back which region it is; training then finds what to do with it within minutes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from batches import Batch, Sampler, collate
from concepts import Concept
from dialogues import Round
from scenes import Picture
from torch import Tensor
from vision import TOKENS, Bridge

from seechat_export.reference_chatglm import ChatGLM
from seechat_lite.tokenizer import Tokenizer

# which token shows a thing at a place, by layout
TOKEN_OF = {
    ("one", "middle"): 0,
    ("row2", "left"): 1, ("row2", "right"): 2,
    ("column2", "top"): 3, ("column2", "bottom"): 4,
    ("four", "top left"): 5, ("four", "top right"): 6,
    ("four", "bottom left"): 7, ("four", "bottom right"): 8,
    ("row3", "left"): 9, ("row3", "middle"): 10, ("row3", "right"): 11,
}  # fmt: skip

MATCH = 8.0  # how much more the head scores the region that shows the asked thing
IMAGE = 16.0  # how much more it scores regions than words
GAIN = 40.0  # how loud it speaks: the other heads' outputs have norms of about 20


@dataclass(frozen=True)
class Mixed:
    """A scene of one layout whose things come from several pictures of the bank."""

    numbers: np.ndarray  # [12]: whose features each token takes
    picture: Picture  # what it shows


class Mixer:
    """Scenes that nobody has seen before, at the cost of looking features up."""

    def __init__(self, sampler: Sampler, bank) -> None:
        self.sampler, self.bank = sampler, bank
        self.by_layout: dict[str, list[int]] = {}
        for i in sampler.scenes:
            self.by_layout.setdefault(bank.pictures[i].layout, []).append(int(i))
        self.made: list[Mixed] = []  # of the batch in the making; numbered after the bank's

    def _pick(self, layout: str) -> int:
        pool = self.by_layout[layout]
        return pool[int(self.sampler.author.rng.integers(len(pool)))]

    def mix(self) -> int:
        """Make a scene of different things; returns its number."""
        layout = str(self.sampler.author.rng.choice(list(self.by_layout)))
        base = self._pick(layout)
        numbers, things = np.full(TOKENS, base), []
        for place in [t.place for t in self.bank.pictures[base].things]:
            for _ in range(20):
                number = self._pick(layout)
                thing = next(t for t in self.bank.pictures[number].things if t.place == place)
                if thing.concept not in [t.concept for t in things]:
                    break
            things.append(thing)
            numbers[TOKEN_OF[layout, place]] = number
        self.made.append(Mixed(numbers, Picture("icons", layout, tuple(things))))
        return len(self.bank.pictures) + len(self.made) - 1

    def batch(self, size: int, *, only_where: bool) -> Batch:
        """Dialogues about mixed scenes, or the one question where a thing is."""
        self.made.clear()
        author, samples = self.sampler.author, []
        for _ in range(size):
            number = self.mix()
            picture = self.picture(number)
            if not only_where:
                turns = 1 if author.chance(0.7) else 2
                rounds = author.one_picture(picture, turns=turns)
            else:
                lang = "zh" if author.chance(0.8) else author.language()
                concept = author.concepts[author.choose(picture.things).concept]
                question = author.ask("where", lang, x=concept.name(lang))
                answer = author.say_where(concept, picture.things, lang)
                rounds = [Round(question, answer, (0,))]
            samples.append(self.sampler.written(rounds, [number]))
        return collate(samples, self.sampler.tokenizer.pad_id)

    def picture(self, number: int) -> Picture:
        known = len(self.bank.pictures)
        if number < known:
            return self.bank.pictures[number]
        return self.made[number - known].picture

    def features(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features [n, 12, 1280] and statistics [n, 12, LOW] of pictures, mixed ones among them."""
        known = len(self.bank.pictures)
        if not len(numbers) or max(numbers) < known:
            return self.bank(numbers)
        rows = [np.full(TOKENS, n) if n < known else self.made[n - known].numbers for n in numbers]
        different, at = np.unique(np.stack(rows).reshape(-1), return_inverse=True)
        seen, low = self.bank(different)
        which = torch.from_numpy(at).view(len(numbers), TOKENS), torch.arange(TOKENS)
        return seen[which], low[which]


def keep_places(batch: Batch, tokenizer: Tokenizer) -> Batch:
    """Leave only the first token after 在 to be learned: the place itself."""
    at = tokenizer.encode("是在")[-1]
    for row, ids in enumerate(batch.ids):
        hits = ((ids == at) & (batch.targets[row] >= 0)).nonzero().flatten()
        if len(hits):  # English answers are learned as a whole
            target = int(batch.targets[row, hits[0]])
            batch.targets[row] = -100
            batch.targets[row, hits[0]] = target
    return batch


@torch.no_grad()
def set_matching_head(
    lm: ChatGLM, bridge: Bridge, bank, sampler: Sampler, concepts: list[Concept], *, head: int = 3
) -> None:
    """Turn a head of the first layer into one that finds what a word names.

    Its query and key see a word and a region through the directions in which the names and the
    regions that show the named things correlate most (canonical correlation), in the half of the
    head that does not turn with the position in the context; one more direction tells regions from
    words. Its value tells the twelve regions apart.
    """
    heads, size = lm.config.num_heads, lm.config.head_size
    half = size // 2
    norm, attention = lm.layers[0].input_layernorm, lm.layers[0].attention
    words = norm(lm.word_embeddings.weight)
    last = [
        [sampler.tokenizer.encode(t)[-1] for t in ("是" + c.zh, f"是 {c.en}")] for c in concepts
    ]
    numbers = np.sort(np.random.default_rng(4).choice(sampler.scenes, 4000))
    regions = torch.cat([norm(bridge(*bank(part))) for part in np.array_split(numbers, 8)])
    named, shown = [], []
    for row, number in enumerate(numbers):
        picture = bank.pictures[number]
        for thing in picture.things:
            for word in last[thing.concept]:
                named.append(words[word])
                shown.append(regions[row, TOKEN_OF[picture.layout, thing.place]])
    x, y = torch.stack(named), torch.stack(shown)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    white_x, white_y = _whiten(x), _whiten(y)
    u, _, v = torch.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y)
    query, key = u[:, : half - 1].T @ white_x, v[: half - 1] @ white_y
    scores = (x @ query.T) * (y @ key.T)
    others = (x @ query.T) * (y @ key.T).roll(7, 0)
    scale = (MATCH / (scores.sum(1).mean() - others.sum(1).mean()) * size**0.5) ** 0.5

    flat = regions.flatten(0, 1)
    mean_region, mean_word = flat.mean(0), words[: sampler.tokenizer.vocab_size].mean(0)
    spread = torch.cov(flat.T) + torch.cov(words.T)
    spread += torch.eye(len(spread)) * 0.05 * spread.diag().mean()
    image = torch.linalg.solve(spread, mean_region - mean_word)
    image /= (mean_region - mean_word) @ image  # regions and words are 1 apart

    centred = flat - mean_region
    codes = torch.eye(TOKENS).repeat(len(regions), 1) - 1 / TOKENS
    covariance = centred.T @ centred / len(flat) + torch.eye(len(spread)) * 0.01
    tell = torch.linalg.solve(covariance, centred.T @ codes / len(flat))  # [hidden, 12]

    weight = attention.query_key_value.weight.view(heads, 3, size, -1)[head]
    bias = attention.query_key_value.bias.view(heads, 3, size)[head]
    weight.zero_(), bias.zero_()
    weight[0, half : size - 1], bias[0, half : size - 1] = scale * query, -scale * query @ mean_x
    weight[1, half : size - 1], bias[1, half : size - 1] = scale * key, -scale * key @ mean_y
    bias[0, size - 1] = size**0.5
    weight[1, size - 1] = IMAGE * image
    bias[1, size - 1] = -IMAGE * (mean_region + mean_word) @ image / 2
    weight[2, :TOKENS], bias[2, :TOKENS] = tell.T, -tell.T @ mean_region
    dense = attention.dense.weight.view(-1, heads, size)[:, head]
    dense.zero_()
    generator = torch.Generator().manual_seed(1)
    dense[:, :TOKENS] = (
        GAIN * torch.linalg.qr(torch.randn(len(dense), TOKENS, generator=generator))[0]
    )


def _whiten(x: Tensor) -> Tensor:
    """The inverse square root of x's covariance, held back in directions of little variance."""
    covariance = x.T @ x / len(x)
    covariance += torch.eye(len(covariance)) * covariance.diag().mean() * 0.3
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag(values**-0.5) @ vectors.T
