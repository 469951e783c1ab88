"""What the decoder is shown of a photograph: verdicts by region, colours and light.

A picture that does not look like a drawing goes this way: the expert's head says what the whole
and every region show (verdict.py), and the pixels say which colour the thing has, which its
surroundings, and how light the picture is. Each of these is a number, and each number an embedding
of a learned table. So training deals sights out of the head's own list and sees no photograph.
"""

from dataclasses import dataclass

import torch
from colours import COLOURS, colour_masks
from torch import Tensor, nn
from torch.nn import functional as F
from tower import FEATURES, MEAN, STD
from verdict import Head
from vision import TOKENS, foreground, region_weights

DRAWING, PHOTO, NOTHING = range(3)  # what a picture can be
MARGIN = (0.5, 0.0, 1.0)  # how much surer the router must be of a drawing, or of nothing
SURE = 0.7  # where the head gives one thing so much probability,
SURE_MARGIN = 1.5  # the router must be so much surer of a drawing
GRID = 7  # the expert's cells
NO_COLOUR = len(COLOURS)  # no colour has enough of it
CORE = (
    0.6  # cells belong to the thing that speak for its class at least so much, from least to most
)
OWN = 0.35  # a thing "has" a colour where this share of its cells does
GROUND = 0.4  # a background "has" a colour where this share of it does
LIGHTS = (("dark", "暗", 0.25), ("medium", "适中", 0.7), ("bright", "亮", 1.0))  # below which mean


@dataclass(frozen=True)
class Sight:
    """One photograph as the decoder is shown it."""

    verdicts: tuple[int, ...]  # numbers of Verdicts, one a region (vision.REGIONS)
    colour: int = NO_COLOUR  # of the thing: index of COLOURS, or NO_COLOUR
    ground: int = NO_COLOUR  # of what surrounds it
    light: int = 1  # index of LIGHTS

    def numbers(self) -> list[int]:
        return [*self.verdicts, self.colour, self.ground, self.light]

    @classmethod
    def of(cls, numbers: list[int]) -> "Sight":
        return cls(tuple(numbers[:TOKENS]), *numbers[TOKENS:])


def without_padding(rgb: Tensor) -> Tensor:
    """0 in rows and columns of rgb [n, 3, 56, 56] that are white all through: [n, 1, 56, 56].

    A picture that is not square is padded with white, which is not its background. White on all
    four sides is: then nothing is left out.
    """
    darkest = rgb.amin(1, keepdim=True)
    rows = (darkest.amin(3, keepdim=True) < 0.99).to(rgb.dtype)  # [n, 1, 56, 1]
    columns = (darkest.amin(2, keepdim=True) < 0.99).to(rgb.dtype)  # [n, 1, 1, 56]
    cut_out = (1 - rows.amin(2, keepdim=True)) * (1 - columns.amin(3, keepdim=True))
    return (rows * columns).maximum(cut_out)


class Looker(nn.Module):
    """Pixel values [n, 3, 224, 224] and cells of the expert [n, 49, 1280] to sights [n, 15]."""

    pool: Tensor
    limits: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("pool", region_weights(GRID))
        self.register_buffer("limits", torch.tensor([limit for *_, limit in LIGHTS[:-1]]))

    def forward(self, pixel_values: Tensor, cells: Tensor) -> Tensor:
        verdicts, best = self.head(self.pool @ cells)  # [n, 12] each
        # where the class is that the head finds most likely: the cells that speak for it
        row = self.head.linear.weight[best[:, 0]]  # [n, 1280]
        speaks = (cells @ row[..., None])[..., 0]  # [n, 49]
        low, high = speaks.amin(-1, keepdim=True), speaks.amax(-1, keepdim=True)
        inside = (speaks >= low + CORE * (high - low)).to(cells.dtype)[:, None]  # [n, 1, 49]

        rgb = F.avg_pool2d(pixel_values * STD + MEAN, 4)  # [n, 3, 56, 56]
        shown = without_padding(rgb)
        masks = colour_masks(rgb.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [n, 11, 56, 56]
        maps = torch.cat([masks, rgb.mean(1, keepdim=True), torch.ones_like(shown)], 1) * shown
        maps = torch.cat([maps, maps * foreground(rgb)], 1)
        cells_of = F.avg_pool2d(maps, 56 // GRID).flatten(2).transpose(1, 2)  # [n, 49, 2 * 13]
        whole, front = cells_of.split(NO_COLOUR + 2, -1)
        thing = (inside @ front)[:, 0]  # [n, 13]: colours, light, how much
        around = ((1 - inside) @ whole)[:, 0]
        thing = thing[:, :NO_COLOUR] / (thing[:, -1:] + 1e-3)
        around = around[:, :NO_COLOUR] / (around[:, -1:] + 1e-3)
        ground = self._named(around, around, GROUND)
        # the leaves around a strawberry are seen in its cells as well
        colour = self._named(thing - around / 2, thing, OWN)
        light = whole[..., -2].sum(-1, keepdim=True) / (whole[..., -1].sum(-1, keepdim=True) + 1e-3)
        shade = (light >= self.limits).sum(-1)
        return torch.cat([verdicts, torch.stack([colour, ground, shade], -1)], -1)

    @staticmethod
    def _named(scores: Tensor, shares: Tensor, enough: float) -> Tensor:
        """The best colour of [n, 11] if its share is enough, else NO_COLOUR."""
        colour = scores.argmax(-1)
        share = shares.gather(-1, colour[:, None])[:, 0]
        return torch.where(share >= enough, colour, NO_COLOUR)


class Router(nn.Module):
    """What a picture is: logits of DRAWING, PHOTO and NOTHING from features of the whole.

    Features [n, 1280] to [n, 3]. It is a plain regression, because it must carry over to
    photographs of which it has seen none: it is fitted on crops of a few, whole and cut out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 3)

    def forward(self, whole: Tensor) -> Tensor:
        return self.linear(whole)

    def fit(self, *examples: Tensor, decay: float = 0.2) -> None:
        """Features [n, 1280] of drawings, of photographs, of nothing; each weighs the same.

        decay: how much large weights cost; with little of it, unknown photographs are lost.
        """
        x = torch.cat(examples)
        mean, scale = x.mean(0), 1 / (x.std(0) + 0.05)
        x = (x - mean) * scale
        sizes = torch.tensor([len(e) for e in examples])
        target = torch.arange(len(examples)).repeat_interleave(sizes)
        weight = (1 / sizes / len(sizes)).repeat_interleave(sizes)
        w = torch.zeros(len(examples), x.shape[1], requires_grad=True)
        b = torch.zeros(len(examples), requires_grad=True)
        optimizer = torch.optim.LBFGS([w, b], max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (F.cross_entropy(x @ w.t() + b, target, reduction="none") * weight).sum()
            value = value + decay * w.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            self.linear.weight.copy_(w * scale)
            self.linear.bias.copy_(b - w @ (mean * scale))


class PhotoBridge(nn.Module):
    """Sights, int64 [n, 15], to embeddings [n, 12, hidden]."""

    def __init__(self, verdicts: int, hidden: int) -> None:
        super().__init__()
        self.verdict = nn.Embedding(verdicts, hidden)
        self.colour = nn.Embedding(NO_COLOUR + 1, hidden)
        self.ground = nn.Embedding(NO_COLOUR + 1, hidden)
        self.light = nn.Embedding(len(LIGHTS), hidden)
        self.place = nn.Parameter(torch.zeros(TOKENS, hidden))
        nn.init.normal_(self.verdict.weight, std=0.1)
        for table in (self.colour, self.ground, self.light):
            nn.init.normal_(table.weight, std=0.04)  # fainter than what is shown

    def forward(self, sights: Tensor) -> Tensor:
        what = self.verdict(sights[:, :TOKENS]) + self.place
        colour, ground, light = sights[:, TOKENS:].unbind(-1)
        shade = self.colour(colour) + self.ground(ground) + self.light(light)
        # the shades belong to the whole picture, the first token
        return torch.cat([what[:, :1] + shade[:, None], what[:, 1:]], 1)


def margins(head: Head, whole: Tensor) -> Tensor:
    """How much surer the router must be, [n, 3], of what features [n, 1280] are of."""
    named = head.shares(whole)[:, : head.verdicts.levels[0]].amax(-1) >= SURE
    sure = whole.new_tensor((SURE_MARGIN, *MARGIN[1:]))
    return torch.where(named[:, None], sure, whole.new_tensor(MARGIN))


class Photos(nn.Module):
    """The way of photographs: where the router says so, it takes the place of the drawings'."""

    def __init__(self, looker: Looker, router: Router, bridge: PhotoBridge) -> None:
        super().__init__()
        self.looker, self.router, self.bridge = looker, router, bridge

    def forward(self, pixel_values: Tensor, cells: Tensor, drawn: Tensor) -> Tensor:
        """Pixels, cells [n, 49, 1280], embeddings of a drawing [n, 12, hidden]: the embeddings."""
        sights = self.looker(pixel_values, cells)
        whole = cells.mean(1)
        logits = self.router(whole) - margins(self.looker.head, whole)
        kind = logits.argmax(-1)[:, None]  # [n, 1]
        unsure = self.looker.head.verdicts.unsure
        verdicts = torch.where(kind == NOTHING, unsure, sights[:, :TOKENS])
        shown = self.bridge(torch.cat([verdicts, sights[:, TOKENS:]], 1))
        return torch.where(kind[..., None] == DRAWING, drawn, shown)
