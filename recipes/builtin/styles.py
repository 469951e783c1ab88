"""Training drawings in other hands: outlined, in flat colours, as a pencil sketch, in grey.

The sets of the training draw much alike, in filled shapes without lines. A set with outlines was
named right half as often as one that does not. None of its drawings is needed: lines can be drawn
where a drawing's colours meet.
"""

import numpy as np
from PIL import Image, ImageFilter

STYLES = ("outlined", "lines", "flat", "sketch", "grey")


def shapes(rgb: np.ndarray, alpha: np.ndarray, colours: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawing reduced to a few colours without specks, and where two of them meet.

    rgb: uint8 [s, s, 3]; alpha: uint8 [s, s]. Returns uint8 [s, s, 3] and bool [s, s].
    """
    on_white = Image.new("RGB", (rgb.shape[1], rgb.shape[0]), (255, 255, 255))
    on_white.paste(Image.fromarray(rgb), (0, 0), Image.fromarray(alpha))
    few = on_white.quantize(colours, dither=Image.Dither.NONE)
    smooth = np.asarray(Image.fromarray(np.asarray(few)).filter(ImageFilter.ModeFilter(5)))
    palette = np.array(few.getpalette(), np.uint8).reshape(-1, 3)
    inside = alpha > 127
    edge = np.zeros(inside.shape, bool)
    for values in (smooth, inside):
        edge[:, 1:] |= values[:, 1:] != values[:, :-1]
        edge[1:] |= values[1:] != values[:-1]
    return palette[smooth], edge


def thick(mask: np.ndarray, width: int) -> np.ndarray:
    """A mask's lines widened to an odd number of pixels."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(
        ImageFilter.MaxFilter(width)
    )) > 127  # fmt: skip


def restyle(rng: np.random.Generator, icon: np.ndarray, style: str | None = None) -> np.ndarray:
    """A drawing in another style, by chance if none is named; RGBA uint8 [s, s, 4] both."""
    style = style or str(rng.choice(STYLES, p=[0.5, 0.12, 0.16, 0.1, 0.12]))
    rgb, alpha = icon[..., :3], icon[..., 3]
    if style == "grey":
        grey = np.asarray(Image.fromarray(rgb).convert("L"))
        return np.dstack([grey, grey, grey, alpha])
    if style == "sketch":
        on_white = Image.new("L", (rgb.shape[1], rgb.shape[0]), 255)
        on_white.paste(Image.fromarray(rgb).convert("L"), (0, 0), Image.fromarray(alpha))
        grey = np.asarray(on_white, np.float32)
        soft = np.asarray(
            on_white.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4))), np.float32
        )
        shade = (255 * (grey + 20) / (soft + 20)).clip(0, 255)  # dark where darker than around
        shade = 255 - (255 - shade) * rng.uniform(1.5, 3.5)
        return np.dstack([*[shade.clip(0, 255)] * 3, thick(alpha > 127, 3) * 255]).astype(np.uint8)
    if style == "flat":
        return np.dstack([shapes(rgb, alpha, int(rng.integers(4, 10)))[0], alpha])
    # few colours and thick lines taught more than many and thin ones
    flat, edge = shapes(rgb, alpha, int(rng.integers(3, 8)))
    line = thick(edge, int(rng.choice([3, 5, 5])))
    if style == "lines":
        flat = np.full_like(flat, 255)
    elif rng.random() < 0.5:  # paler than the original, as felt pens are
        flat = (255 - (255 - flat.astype(np.float32)) * rng.uniform(0.4, 0.9)).astype(np.uint8)
    ink = rng.integers(0, 50, 3) if rng.random() < 0.3 else np.zeros(3)
    drawn = np.where(line[..., None], ink, flat)
    return np.dstack([drawn, np.maximum(alpha, line * 255)]).astype(np.uint8)
