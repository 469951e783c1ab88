"""Names for colours, decided by one rule: for labels, for questions and inside the vision graph."""

import torch
from torch import Tensor

# key, zh, en
COLOURS = (
    ("red", "红色", "red"),
    ("orange", "橙色", "orange"),
    ("yellow", "黄色", "yellow"),
    ("green", "绿色", "green"),
    ("blue", "蓝色", "blue"),
    ("purple", "紫色", "purple"),
    ("pink", "粉色", "pink"),
    ("brown", "棕色", "brown"),
    ("black", "黑色", "black"),
    ("white", "白色", "white"),
    ("grey", "灰色", "grey"),
)
DOMINANT = 0.5  # a thing "has" a colour where this share of its pixels does


def colour_masks(rgb: Tensor) -> Tensor:
    """One-hot float [..., 11] for rgb [..., 3] in 0..1, in plain arithmetic that ONNX can hold."""
    r, g, b = rgb.unbind(-1)
    high, low = rgb.amax(-1), rgb.amin(-1)
    span = high - low
    safe = span.clamp_min(1e-4)
    hue = torch.where(
        high == r,
        (g - b) / safe,
        torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4),
    )
    hue = torch.where(hue < 0, hue + 6, hue) * 60
    saturation = span / high.clamp_min(1e-4)

    black = (high < 0.26) | ((high < 0.34) & (saturation < 0.25))
    pale = (saturation < 0.12) | ((saturation < 0.18) & (hue > 20) & (hue < 70))
    white = ~black & pale & (high > 0.84)
    dull = (saturation < 0.16) | ((saturation < 0.24) & (high < 0.62))
    grey = ~black & ~white & dull
    rest = ~(black | white | grey)
    warm = rest & (hue >= 10) & (hue < 45)
    brown = warm & ((high < 0.7) | ((saturation < 0.62) & (high < 0.88)))
    orange = warm & ~brown & (hue < 40) & (hue >= 16) & (saturation > 0.35)
    reddish = rest & ((hue < 16) | (hue >= 340)) & ~brown
    pink = (reddish & (saturation < 0.58) & (high > 0.75)) | (rest & (hue >= 295) & (hue < 340))
    red = reddish & ~pink
    yellow = rest & (hue >= 16) & (hue < 68) & ~brown & ~orange
    green = rest & (hue >= 68) & (hue < 168)
    blue = rest & (hue >= 168) & (hue < 250)
    purple = rest & (hue >= 250) & (hue < 295)
    order = (red, orange, yellow, green, blue, purple, pink, brown, black, white, grey)
    return torch.stack([m.to(rgb.dtype) for m in order], -1)


def dominant_colour(rgb: Tensor) -> int | None:
    """Index into COLOURS of the colour that most of rgb [n, 3] (0..1) has; None without one."""
    if len(rgb) < 20:
        return None
    shares = colour_masks(rgb).mean(0)
    best = int(shares.argmax())
    return best if shares[best] >= DOMINANT else None
