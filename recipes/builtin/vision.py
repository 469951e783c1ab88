"""Pixels to embeddings: frozen expert, fixed region pooling and colour statistics, learned bridge.

A picture becomes 12 tokens, one a region: the whole, its halves, its quarters and its thirds from
left to right. Each holds what the expert sees there, which colours the foreground has there and
how full every part of the picture is. The bridge, an MLP, turns each into a vector among the
language model's words.
"""

import torch
from colours import COLOURS, colour_masks
from torch import Tensor, nn
from torch.nn import functional as F
from tower import FEATURES, MEAN, STD, EfficientNetLite0

CELLS = 8  # the colour statistics' grid
REGIONS: tuple[tuple[float, float, float, float], ...] = (
    (0, 0, 1, 1),
    (0, 0, 0.5, 1),
    (0.5, 0, 1, 1),
    (0, 0, 1, 0.5),
    (0, 0.5, 1, 1),
    *((x, y, x + 0.5, y + 0.5) for y in (0, 0.5) for x in (0, 0.5)),
    *((x / 3, 0, (x + 1) / 3, 1) for x in range(3)),
)
TOKENS = len(REGIONS)
LOW = len(COLOURS) + 4 + CELLS * CELLS  # colours, how full, mean rgb; how full every cell


def region_weights(grid: int) -> Tensor:
    """Averaging weights [regions, grid * grid]: how much of each cell lies in each region."""

    def overlap(low: float, high: float) -> Tensor:
        edges = torch.arange(grid + 1) / grid
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0)

    rows = [
        torch.outer(overlap(top, bottom), overlap(left, right)).flatten()
        for left, top, right, bottom in REGIONS
    ]
    weights = torch.stack(rows)
    return weights / weights.sum(1, keepdim=True)


def foreground(rgb: Tensor) -> Tensor:
    """1 where rgb [n, 3, 56, 56] differs from a plane through its corners: [n, 1, 56, 56]."""

    def corner(y: int, x: int) -> Tensor:
        return rgb[:, :, y : y + 3, x : x + 3].mean((2, 3))[:, :, None, None]

    ramp = torch.linspace(0, 1, rgb.shape[-1])
    down, across = ramp[:, None], ramp[None, :]
    top = corner(0, 0) * (1 - across) + corner(0, 53) * across
    bottom = corner(53, 0) * (1 - across) + corner(53, 53) * across
    behind = top * (1 - down) + bottom * down
    return ((rgb - behind).abs().amax(1, keepdim=True) > 0.07).to(rgb.dtype)


class Features(nn.Module):
    """pixel_values [n, 3, 224, 224] to features [n, 12, 1280] and statistics [n, 12, LOW]."""

    def __init__(self, expert: EfficientNetLite0) -> None:
        super().__init__()
        self.expert = expert
        self.register_buffer("pool7", region_weights(7))
        self.register_buffer("pool8", region_weights(CELLS))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool7 @ self.cells(pixel_values), self.statistics(pixel_values)

    def cells(self, pixel_values: Tensor) -> Tensor:
        """What the expert sees, [n, 49, 1280]."""
        return self.expert(pixel_values).flatten(2).transpose(1, 2)

    def statistics(self, pixel_values: Tensor) -> Tensor:
        """Colours of the foreground: whatever differs from a plane through the four corners."""
        rgb = F.avg_pool2d(pixel_values * STD + MEAN, 4)  # [n, 3, 56, 56]
        front = foreground(rgb).permute(0, 2, 3, 1)
        rgb = rgb.permute(0, 2, 3, 1)
        maps = torch.cat([colour_masks(rgb) * front, rgb * front, front], -1)
        cells = F.avg_pool2d(maps.permute(0, 3, 1, 2), 56 // CELLS).flatten(2).transpose(1, 2)
        regions = self.pool8 @ cells  # [n, 12, 11 + 3 + 1]
        full = regions[..., -1:]
        inside = regions[..., :-1] / (full + 1e-3)
        everywhere = cells[:, None, :, -1].expand(-1, TOKENS, -1)
        return torch.cat([inside, full, everywhere], -1)


class Bridge(nn.Module):
    """The MLP between expert and language model: [n, 12, 1280 + LOW] to [n, 12, hidden].

    A gate for each region, which looks at how full parts of the picture are and so does not care
    about the style of a drawing, opens where the region shows exactly one thing; where it stays
    shut, the embedding says "nothing" instead.
    """

    def __init__(self, hidden: int, width: int = 384) -> None:
        super().__init__()
        # the expert's features are averages of ReLU6 outputs: bring them to a common scale
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))
        self.expert = nn.Linear(FEATURES, width)
        self.low = nn.Linear(LOW, width, bias=False)
        self.region = nn.Parameter(torch.zeros(TOKENS, width))
        self.out = nn.Linear(width, hidden)
        self.drop = nn.Dropout(0.25)
        self.gate = nn.Sequential(
            nn.Linear(CELLS * CELLS, 128),
            nn.GELU(),
            nn.Linear(128, 128),
            nn.GELU(),
            nn.Linear(128, TOKENS),
        )
        self.nothing = nn.Parameter(torch.randn(hidden) * 0.1)
        self.place = nn.Parameter(torch.zeros(TOKENS, hidden))

    def parts(self, seen: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """What each region would be, [n, 12, hidden], and the gate's logit, [n, 12, 1]."""
        seen = self.drop((seen - self.mean) * self.scale)
        x = self.expert(seen) + self.low(low) + self.region
        gate = self.gate(low[:, 0, -CELLS * CELLS :])  # the map is the same in every region
        return self.out(self.drop(F.gelu(x))), gate[..., None]

    def forward(self, seen: Tensor, low: Tensor) -> Tensor:
        what, gate = self.parts(seen, low)
        return self.join(what, gate)

    def join(self, what: Tensor, gate: Tensor) -> Tensor:
        share = gate.sigmoid()
        return share * what + (1 - share) * self.nothing + self.place


class Vision(nn.Module):
    """The exported graph: pixel_values [n, 3, 224, 224] to image_embeds [n, 12, hidden].

    photos: what sees to photographs (sights.Photos); without it every picture counts as a drawing.
    """

    def __init__(self, features: Features, bridge: Bridge, photos: nn.Module | None = None) -> None:
        super().__init__()
        self.features, self.bridge, self.photos = features, bridge, photos

    def forward(self, pixel_values: Tensor) -> Tensor:
        cells = self.features.cells(pixel_values)
        drawn = self.bridge(self.features.pool7 @ cells, self.features.statistics(pixel_values))
        return drawn if self.photos is None else self.photos(pixel_values, cells, drawn)
