"""Train the built-in model, from downloads to the bundle that ships.

One command does it all, goes on where it was interrupted, and shows what it does:

    python recipes/builtin/train.py            # about three hours on two cores with AVX512-BF16

Stages, each of which leaves its result in the work folder:

1. pictures     download the emoji sets, draw them, compose pictures, run the frozen expert on them
2. tokenizer    train ice_text.model on generated dialogues
3. language     the language model alone, on text
4. alignment    the bridge alone: what a region shows must be readable from its embedding; and the
                router that tells photographs from drawings (see sights.py)
5. instruction  bridges and language model together, on dialogues about drawings and photographs
6. places       where things are, on scenes mixed anew for every question (see places.py)
7. settling     categories, traits and pairs of pictures, in runs whose weights are averaged
8. export       answers made sure enough for a temperature of 1; the folder and the shipped bundle
"""

import argparse
import copy
import json
import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from bank import build_bank, load_icons
from batches import Batch, Sampler, positions
from colours import COLOURS
from concepts import Concept
from emoji_sets import VENDORS, training_photos
from photo_dialogues import PhotoAuthor
from places import TOKEN_OF, Mixer, keep_places, set_matching_head
from publish import publish
from quick import quicken
from render import render
from scenes import Picture
from sights import Looker, PhotoBridge, Photos, Router
from tokenizer import train_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from verdict import Verdicts, load_head, load_verdicts
from vision import CELLS, TOKENS, Bridge

from seechat_export.reference_chatglm import ChatGLM, prefix_mask
from seechat_lite.tokenizer import Tokenizer
from seechat_weights.builtin import BUILTIN
from seechat_weights.config import LMConfig

SLACK = 0.02  # how much less often answers may be right that are drawn at temperature 1
FACTORS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
# Settling, in two rounds: how much of the weights it began with a round keeps, and its runs, each
# from there: share of the rate and steps.
SETTLING = ((0.2, ((1.0, 400), (0.4, 400))), (0.0, ((0.2, 360), (0.3, 260))))


@dataclass
class Settings:
    """What a run is made of; kept beside its checkpoints."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    vocab: int = 3400  # pieces, to which the names are added
    singles: int = 8  # pictures of each drawing alone
    scenes: int = 17_000
    other: int = 5_000  # crops and cut-outs of photos, textures
    language_steps: int = 800
    gate_steps: int = 2_500
    align_steps: int = 2_000
    steps: int = 24_000
    focus_steps: int = 400  # learning places: nothing else
    place_steps: int = 900  # and among everything else
    minutes: float = 0  # instruct for so long, whatever the steps
    batch: int = 32
    rate: float = 1.0e-3
    seed: int = 1
    settling: tuple[tuple[float, tuple[tuple[float, int], ...]], ...] = SETTLING


class Bank:
    """The stored features of all pictures, read by number."""

    def __init__(self, folder: Path) -> None:
        self.seen = np.load(folder / "seen.npy", mmap_mode="r")
        self.low = np.load(folder / "low.npy", mmap_mode="r")
        self.pictures: list[Picture] = pickle.loads((folder / "pictures.pickle").read_bytes())

    def __call__(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(numbers)
        back = np.argsort(order)
        chosen = numbers[order]
        seen, low = self.seen[chosen][back], self.low[chosen][back]
        return torch.from_numpy(seen).float(), torch.from_numpy(low).float()


class Readers(nn.Module):
    """Reads concept and colour off an embedding by the words for them, like the decoder's output.

    The embedding of a region that shows a panda shall point where the words 熊猫 and "panda" are:
    then naming is copying, and finding the panda is comparing.
    """

    def __init__(self, tokenizer: Tokenizer, concepts: list[Concept]) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.full((2,), 2.5))

        self.tokenizer = tokenizer
        self.names = [self.ids(c.zh, c.en) for c in concepts]
        self.colours = [self.ids(zh, en) for _, zh, en in COLOURS]

    def ids(self, zh: str, en: str) -> tuple[list[int], list[int]]:
        """A name's pieces behind another word, without the dummy prefix of a text's start."""
        first = len(self.tokenizer.encode("是"))
        zh_ids, en_ids = self.tokenizer.encode("是" + zh), self.tokenizer.encode(f"是 {en}")
        return zh_ids[first:], en_ids[first:]

    @staticmethod
    def words(table: Tensor, names: list[tuple[list[int], list[int]]]) -> Tensor:
        """[names, hidden]: the mean of the Chinese word's pieces plus that of the English one's."""
        flat = [i for pair in names for ids in pair for i in ids]
        counts = torch.tensor([len(ids) for pair in names for ids in pair])
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        sums = table.new_zeros(len(counts), table.shape[1]).index_add_(0, owner, table[flat])
        return (sums / counts[:, None]).unflatten(0, (-1, 2)).sum(1)

    def loss(
        self,
        what: Tensor,
        pictures: list[Picture],
        table: Tensor,
        *,
        only_colour: bool = False,
    ) -> Tensor:
        """Cross entropy of names and colours, in the regions that show exactly one thing.

        what: [n, 12, hidden], the bridge's parts; table: the word embeddings, [vocab, hidden].
        """
        shown = torch.full(what.shape[:2], -100)
        colours = torch.full(what.shape[:2], -100)
        for row, picture in enumerate(pictures):
            for t in picture.things:
                token = TOKEN_OF[picture.layout, t.place]
                shown[row, token] = t.concept
                colours[row, token] = -100 if t.colour is None else t.colour
        x = F.layer_norm(what, what.shape[-1:])
        scales = self.scales.exp()
        loss = what.new_zeros(())
        coloured, named = colours >= 0, shown >= 0
        if coloured.any():
            shades = scales[0] * x[coloured] @ self.words(table, self.colours).t()
            loss = loss + 0.3 * F.cross_entropy(shades, colours[coloured])
        if only_colour:
            return loss
        if named.any():
            names = scales[1] * x[named] @ self.words(table, self.names).t()
            loss = loss + F.cross_entropy(names, shown[named], label_smoothing=0.05)
        return loss


@dataclass
class Parts:
    """The networks that are trained together."""

    lm: ChatGLM
    bridge: Bridge
    photos: PhotoBridge
    readers: Readers

    def modules(self) -> dict[str, nn.Module]:
        return {
            "lm": self.lm,
            "bridge": self.bridge,
            "photos": self.photos,
            "readers": self.readers,
        }

    def embed(
        self, batch: Batch, features: Callable[[np.ndarray], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [k, 12, hidden] of a batch's pictures, and the bridge's view of the drawn."""
        drawn = torch.from_numpy(batch.pictures >= 0)
        embeds = self.photos(batch.sights)
        if not drawn.any():
            return embeds, None
        what, gate = self.bridge.parts(*features(batch.pictures[batch.pictures >= 0]))
        joined = self.bridge.join(what, gate)
        return embeds.to(joined.dtype).index_put((drawn.nonzero()[:, 0],), joined), what


def new_language_model(config: LMConfig) -> ChatGLM:
    """Random weights fit for this block: the residual is scaled up, so the halves must speak up.

    x = LN(x) * 7.48 + f(LN(x)): with customary small weights f would change x by a hundredth.
    """
    model = ChatGLM(config)
    model.lm_head.weight = model.word_embeddings.weight
    nn.init.normal_(model.word_embeddings.weight, std=0.04)
    h = config.hidden_size
    for layer in model.layers:
        nn.init.normal_(layer.attention.query_key_value.weight, std=h**-0.5)
        nn.init.normal_(layer.attention.dense.weight, std=3 * h**-0.5)
        nn.init.normal_(layer.mlp.dense_h_to_4h.weight, std=h**-0.5)
        nn.init.normal_(layer.mlp.dense_4h_to_h.weight, std=5 * config.inner_size**-0.5)
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    return model


def language_loss(
    lm: ChatGLM, batch: Batch, embeds: Tensor | None, *, smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of the answers. embeds: [pictures of the batch, 12, hidden]"""
    x = lm.word_embeddings(batch.ids)
    if embeds is not None and len(batch.rows):
        x = x.clone()
        at = batch.starts[:, None] + torch.arange(TOKENS)
        x[batch.rows[:, None], at] = embeds.to(x.dtype)
    length = batch.ids.shape[1]
    states = lm.hidden_states(
        x, positions(batch.context, length), mask=prefix_mask(batch.context, length)
    )[-1]
    # only answers need the vocabulary's 4000 logits; a round number of them, again for the shapes
    targets = batch.targets.flatten()
    answers = int((targets >= 0).sum())
    wanted = (targets < 0).argsort(stable=True)[: -(-answers // 128) * 128]
    logits = lm.lm_head(states.flatten(0, 1)[wanted]).float()
    return F.cross_entropy(logits, targets[wanted], label_smoothing=smoothing)


class Trainer:
    """Optimizer, schedule, checkpoints and progress of one stage."""

    def __init__(
        self,
        work: Path,
        stage: str,
        groups: list[dict],
        state: dict[str, nn.Module],
        steps: int,
        minutes: float = 0,
        warm: int = 200,
    ) -> None:
        self.file = work / f"{stage}.pt"
        self.stage, self.modules, self.steps, self.done = stage, state, steps, 0
        self.warm = warm  # steps until the full rate
        self.minutes, self.spent = minutes, 0.0  # a time limit takes the place of the steps
        for g in groups:
            g["peak"] = g["lr"]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        self.groups = groups
        self.losses: list[float] = []
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            for name, module in state.items():
                module.load_state_dict(saved[name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.done, self.spent = saved["done"], saved["spent"]
            print(f"{stage}: continuing after {self.done} of {steps} steps")
        self.began, self.first = time.time() - self.spent * 60, self.done
        self.resumed = time.time()

    @property
    def progress(self) -> float:
        """How much of the stage is done, 0 to 1."""
        self.spent = (time.time() - self.began) / 60
        return self.spent / self.minutes if self.minutes else self.done / self.steps

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def step(self, loss: Tensor) -> None:
        warm = min(1.0, (self.done + 1) / self.warm)
        rate = warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1))))
        for g in self.optimizer.param_groups:
            g["lr"] = g["peak"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.done += 1
        self.losses.append(loss.item())
        if self.done % 100 == 0 or self.finished:
            pace = (time.time() - self.resumed) / (self.done - self.first)
            recent = self.losses[-100:]
            print(
                f"{self.stage}: step {self.done}, {self.progress:.1%} done, "
                f"loss {sum(recent) / len(recent):.3f}, {pace * 1000:.0f} ms a step",
                flush=True,
            )
        if self.done % 500 == 0 or self.finished:
            self.save()

    def save(self) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        part = self.file.with_suffix(".part")
        own = {"optimizer": self.optimizer.state_dict(), "done": self.done, "spent": self.spent}
        torch.save({**state, **own}, part)
        part.replace(self.file)


def fit_scale(bridge: Bridge, bank: Bank) -> None:
    """Bring the expert's features to mean 0, deviation about 1, measured on some pictures."""
    numbers = np.random.default_rng(0).choice(len(bank.pictures), 2000, replace=False)
    seen = bank(np.sort(numbers))[0].flatten(0, 1)
    bridge.mean.copy_(seen.mean(0))
    bridge.scale.copy_(1 / (seen.std(0) + 0.05))


def fit_gate(work: Path, settings: Settings, bank: Bank, bridge: Bridge) -> None:
    """The gates alone, seconds: which regions show exactly one thing? Frozen from then on."""
    low = torch.from_numpy(bank.low[:, 0, -CELLS * CELLS :].copy()).float()
    single = torch.zeros(len(low), TOKENS)
    for row, picture in enumerate(bank.pictures):
        for t in picture.things:
            single[row, TOKEN_OF[picture.layout, t.place]] = 1
    groups = [{"params": list(bridge.gate.parameters()), "lr": 3e-3}]
    trainer = Trainer(work, "gate", groups, {"gate": bridge.gate}, settings.gate_steps)
    generator = torch.Generator().manual_seed(settings.seed)
    while not trainer.finished:
        rows = torch.randint(len(low), (512,), generator=generator)
        trainer.step(F.binary_cross_entropy_with_logits(bridge.gate(low[rows]), single[rows]))
    bridge.gate.requires_grad_(False)


def fit_router(bank: Bank) -> Router:
    """What is a drawing, what a photograph, what nothing: seconds, from what the bank holds."""
    kinds = np.array([p.kind for p in bank.pictures])

    def whole(*chosen: str) -> Tensor:
        numbers = np.flatnonzero(np.isin(kinds, chosen))
        numbers = np.random.default_rng(6).permutation(numbers)[:4000]
        return torch.from_numpy(bank.seen[np.sort(numbers), 0]).float()

    router = Router()
    router.fit(whole("icons"), whole("photo", "cut"), whole("texture"))
    return router.requires_grad_(False)


def name_verdicts(photos: PhotoBridge, readers: Readers, table: Tensor, verdicts: Verdicts) -> None:
    """Let every verdict begin as the words for it, so that naming it is copying."""
    meanings = [m for m in verdicts.meanings if m is not None]
    names = readers.words(table, [readers.ids(m.zh, m.en) for m in meanings])
    names = names - names.mean(0)
    weight = photos.verdict.weight.data
    scale = weight.norm(dim=1).mean() * 2
    weight[: len(names)] = names / names.norm(dim=1, keepdim=True) * scale


def align(
    work: Path, settings: Settings, bank: Bank, lm: ChatGLM, bridge: Bridge, readers: Readers
) -> None:
    """The bridge alone: the expert's view of a region becomes a vector among the words."""
    table = lm.word_embeddings.weight.detach()
    modules = {"bridge": bridge, "readers": readers}
    parameters = [p for p in [*bridge.parameters(), *readers.parameters()] if p.requires_grad]
    groups = [{"params": parameters, "lr": settings.rate * 1.5}]
    trainer = Trainer(work, "alignment", groups, modules, settings.align_steps)
    rng = np.random.default_rng([settings.seed, trainer.done])
    bridge.train()
    while not trainer.finished:
        numbers = rng.choice(len(bank.pictures), 192)
        seen, low = bank(numbers)
        pictures = [bank.pictures[i] for i in numbers]
        with torch.autocast("cpu", torch.bfloat16):
            what, _ = bridge.parts(seen, low)
            # another picture's view with this one's colours: colours must be read from the pixels,
            # not remembered with the thing
            mixed, _ = bridge.parts(seen[:64].flip(0), low[:64])
        loss = readers.loss(what.float(), pictures, table)
        loss = loss + readers.loss(mixed.float(), pictures[:64], table, only_colour=True)
        trainer.step(loss)
    bridge.eval()


def learn_language(work: Path, settings: Settings, lm: ChatGLM, sampler: Sampler) -> None:
    """The language model alone: names, categories, traits, manners; no pictures."""
    groups = [{"params": list(lm.parameters()), "lr": settings.rate}]
    trainer = Trainer(work, "language", groups, {"lm": lm}, settings.language_steps)
    sampler.author.rng = np.random.default_rng([settings.seed, 1, trainer.done])
    batches = sampler.batches(settings.batch)
    while not trainer.finished:
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_loss(lm, next(batches), None)
        trainer.step(loss)


def tuning_groups(settings: Settings, parts: Parts, share: float) -> list[dict]:
    """All of the decoder at the full rate, what may change of the bridges at a share of it."""
    rest = [*parts.bridge.parameters(), *parts.photos.parameters(), *parts.readers.parameters()]
    return [
        {"params": list(parts.lm.parameters()), "lr": settings.rate},
        {"params": [p for p in rest if p.requires_grad], "lr": settings.rate * share},
    ]


def tune(
    trainer: Trainer,
    parts: Parts,
    batch: Batch,
    features: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    picture: Callable[[int], Picture],
) -> None:
    """One step on dialogues about pictures; the readers keep the bridge's view sharp."""
    with torch.autocast("cpu", torch.bfloat16):
        embeds = what = None
        if len(batch.pictures):
            embeds, what = parts.embed(batch, features)
        loss = language_loss(parts.lm, batch, embeds)
    if what is not None:
        shown = [picture(i) for i in batch.pictures if i >= 0]
        table = parts.lm.word_embeddings.weight.detach()
        loss = loss + 0.1 * parts.readers.loss(what.float(), shown, table)
    trainer.step(loss)


def instruct(work: Path, settings: Settings, parts: Parts, bank: Bank, sampler: Sampler) -> None:
    """Bridges and language model together, on dialogues about pictures."""
    groups = tuning_groups(settings, parts, 0.3)
    modules = parts.modules()
    trainer = Trainer(work, "instruction", groups, modules, settings.steps, settings.minutes)
    sampler.author.rng = np.random.default_rng([settings.seed, 2, trainer.done])
    batches = sampler.batches(settings.batch)
    parts.bridge.train()
    while not trainer.finished:
        tune(trainer, parts, next(batches), bank, bank.pictures.__getitem__)
    parts.bridge.eval()


def learn_places(
    work: Path, settings: Settings, parts: Parts, bank: Bank, sampler: Sampler
) -> None:
    """Where things are: a head set up for it, the one question alone, then among all others."""
    parts.bridge.gate.requires_grad_(False)
    mixer = Mixer(sampler, bank)
    if not (work / "focus.pt").exists():
        parts.bridge.eval()
        set_matching_head(parts.lm, parts.bridge, bank, sampler, sampler.author.concepts)
    batches = sampler.batches(settings.batch)
    for stage, steps in (("focus", settings.focus_steps), ("places", settings.place_steps)):
        groups = tuning_groups(settings, parts, 0.15)
        trainer = Trainer(work, stage, groups, parts.modules(), steps)
        sampler.author.rng = np.random.default_rng([settings.seed, 3, steps, trainer.done])
        parts.bridge.train()
        while not trainer.finished:
            turn = trainer.done % 5
            if stage == "focus":
                batch = keep_places(mixer.batch(settings.batch, only_where=True), sampler.tokenizer)
            elif turn in (0, 1, 3):
                batch = mixer.batch(settings.batch, only_where=turn == 0)
            else:
                batch = next(batches)
            tune(trainer, parts, batch, mixer.features, mixer.picture)
    parts.bridge.eval()


def settle(work: Path, settings: Settings, parts: Parts, bank: Bank, sampler: Sampler) -> None:
    """What was asked too seldom before: categories, traits, pairs of pictures.

    Each run learns the training drawings a little too well, and each in its own way: the mean of
    their weights does better on other drawings than any of them.
    """
    modules = parts.modules()
    parts.bridge.gate.requires_grad_(False)
    mixer = Mixer(sampler, bank)
    about = sampler.batches(settings.batch, make=sampler.about)
    pairs = sampler.batches(settings.batch, make=sampler.two_pictures)
    several = sampler.batches(settings.batch, make=sampler.several)
    photos = sampler.batches(settings.batch, make=lambda: sampler.photographs(turns=1))
    everything = sampler.batches(settings.batch)
    # None: scenes
    mixture = (None, about, photos, about, pairs, everything, about, several)
    for number, (keep, runs) in enumerate(settings.settling, 1):
        began = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
        mean = {name: {k: v * keep for k, v in state.items()} for name, state in began.items()}
        for rate, steps in runs:
            for name, module in modules.items():
                module.load_state_dict(began[name])
            share = replace(settings, rate=settings.rate * rate)
            groups = tuning_groups(share, parts, 0.3)
            trainer = Trainer(work, f"settle-{number}-{rate}", groups, modules, steps, warm=40)
            sampler.author.rng = np.random.default_rng([settings.seed, 4, steps, trainer.done])
            parts.bridge.train()
            while not trainer.finished:
                source = mixture[trainer.done % len(mixture)]
                batch = next(source) if source else mixer.batch(settings.batch, only_where=False)
                tune(trainer, parts, batch, mixer.features, mixer.picture)
            for name, module in modules.items():
                for k, v in module.state_dict().items():
                    mean[name][k] += v * ((1 - keep) / len(runs))
        for name, module in modules.items():
            module.load_state_dict(mean[name])
    parts.bridge.eval()


@torch.no_grad()
def calibrate(parts: Parts, bank: Bank, sampler: Sampler, *, seed: int, batches: int = 8) -> float:
    """Let the decoder speak so clearly that sampling at temperature 1 is nearly as right as greedy.

    Its logits are multiplied by the least of some factors for which whole answers are drawn right
    at most SLACK less often than the best ones are; the last norm takes the factor in. Returns it.
    """
    sampler.author.rng = np.random.default_rng([seed, 5])
    source = sampler.batches(32, pool=2)
    lm, found = parts.lm, []
    for _ in range(batches):
        batch = next(source)
        embeds, _ = parts.embed(batch, bank) if len(batch.pictures) else (None, None)
        x = lm.word_embeddings(batch.ids)
        if embeds is not None:
            x = x.index_put(
                (batch.rows[:, None], batch.starts[:, None] + torch.arange(TOKENS)), embeds
            )
        length = batch.ids.shape[1]
        mask = prefix_mask(batch.context, length)
        states = lm.hidden_states(x, positions(batch.context, length), mask=mask)[-1]
        row, at = (batch.targets >= 0).nonzero(as_tuple=True)
        found.append((lm.lm_head(states[row, at]), batch.targets[row, at], row))

    def right(factor: float | None) -> float:
        """How often whole answers are: drawn at temperature 1, or the best without a factor."""
        shares = []
        for logits, targets, row in found:
            if factor is None:
                sure = (logits.argmax(-1) == targets).log()
            else:
                sure = (factor * logits).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            sums = sure.new_zeros(int(row.max()) + 1).index_add_(0, row, sure)
            shares.append(sums.exp())
        return torch.cat(shares).mean().item()

    best = right(None)
    factor = next((f for f in FACTORS if right(f) >= best - SLACK), FACTORS[-1])
    print(f"calibration: {best:.1%} right at best, {right(1.0):.1%} drawn; times {factor}")
    lm.final_layernorm.weight *= factor
    lm.final_layernorm.bias *= factor
    return factor


def language_config(tokenizer: Tokenizer, settings: Settings) -> LMConfig:
    return LMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=settings.hidden,
        num_layers=settings.layers,
        num_heads=settings.heads,
        inner_size=4 * settings.hidden,
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        gmask_id=tokenizer.gmask_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = Path(__file__).parent
    parser.add_argument("--work", type=Path, default=here / "work", help="folder for everything")
    parser.add_argument("--out", type=Path, default=BUILTIN, help="where the shipped bundle goes")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="processor cores to use"
    )
    for name in ("steps", "align_steps", "language_steps", "batch", "scenes", "singles", "other"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name)
        )
    parser.add_argument("--minutes", type=float, default=0, help="instruct so long, not by steps")
    parser.add_argument("--no-export", action="store_true", help="stop after training")
    args = parser.parse_args()
    chosen = {k: v for k, v in vars(args).items() if k in Settings.__dataclass_fields__}
    settings = Settings(**chosen)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(settings.seed)
    quicken()
    (work / "settings.json").write_text(json.dumps(asdict(settings), indent=1))

    render(work)
    icons = load_icons(work, vendors=[v.key for v in VENDORS if v.train])
    bank = Bank(
        build_bank(
            work / "bank",
            icons=icons,
            photos=training_photos(work),
            singles=settings.singles * len(icons.concepts),
            scenes=settings.scenes,
            other=settings.other,
            workers=args.threads,
        )
    )
    model_file = work / "ice_text.model"
    if not model_file.exists():
        train_tokenizer(model_file, vocab_size=settings.vocab)
    tokenizer = Tokenizer(model_file)
    author = PhotoAuthor(np.random.default_rng(settings.seed))
    verdicts = load_verdicts()
    parts = Parts(
        new_language_model(language_config(tokenizer, settings)),
        Bridge(settings.hidden),
        PhotoBridge(len(verdicts.meanings), settings.hidden),
        Readers(tokenizer, author.concepts),
    )
    fit_scale(parts.bridge, bank)

    text = Sampler(author, tokenizer, bank.pictures, text_only=True)
    learn_language(work, settings, parts.lm, text)
    router = fit_router(bank)
    fit_gate(work, settings, bank, parts.bridge)
    align(work, settings, bank, parts.lm, parts.bridge, parts.readers)
    name_verdicts(parts.photos, parts.readers, parts.lm.word_embeddings.weight.detach(), verdicts)
    sampler = Sampler(author, tokenizer, bank.pictures)
    instruct(work, settings, parts, bank, sampler)
    learn_places(work, settings, parts, bank, sampler)
    settle(work, settings, parts, bank, sampler)
    calibrate(parts, bank, sampler, seed=settings.seed)
    if not args.no_export:
        photos = Photos(Looker(load_head()), router, parts.photos)

        def write(out: Path, precision: str, vision: str) -> None:
            publish(work, parts.lm, parts.bridge, photos, out, precision=precision, vision=vision)

        # the shipped precision goes where the package looks for it, the others beside the work
        write(args.out, "int8", "int8")
        write(work / "fp32", "fp32", "fp32")
        write(work / "int4", "int4", "int8")
        print(f"wrote {args.out}; measure it with: python recipes/builtin/evaluate.py")


if __name__ == "__main__":
    main()
