"""Compose pictures: one to four drawings on a background, and things that are no drawings."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from colours import dominant_colour
from PIL import Image, ImageFilter
from styles import restyle

SIZE = 224
STYLED = 0.45  # which share of drawings is drawn in another style (styles.py)
# position key -> box (left, top, right, bottom) in parts of the picture
LAYOUTS: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "one": {"middle": (0, 0, 1, 1)},
    "row2": {"left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1)},
    "column2": {"top": (0, 0, 1, 0.5), "bottom": (0, 0.5, 1, 1)},
    "row3": {
        "left": (0, 0, 1 / 3, 1),
        "middle": (1 / 3, 0, 2 / 3, 1),
        "right": (2 / 3, 0, 1, 1),
    },
    "four": {
        "top left": (0, 0, 0.5, 0.5),
        "top right": (0.5, 0, 1, 0.5),
        "bottom left": (0, 0.5, 0.5, 1),
        "bottom right": (0.5, 0.5, 1, 1),
    },
}


@dataclass(frozen=True)
class Thing:
    """One drawing in a picture: which concept, where, and its colour as shown (COLOURS index)."""

    concept: int
    place: str
    colour: int | None


@dataclass(frozen=True)
class Picture:
    """What a picture shows. kind: "icons", "photo", "cut" or "texture"; only icons hold things."""

    kind: str
    layout: str
    things: tuple[Thing, ...]


@dataclass
class Icons:
    """Drawings of some vendors: pixels uint8 [n, s, s, 4], concepts int [n]."""

    pixels: np.ndarray
    concepts: np.ndarray

    def __post_init__(self) -> None:
        order = np.argsort(self.concepts, kind="stable")
        self.pixels, self.concepts = self.pixels[order], self.concepts[order]
        self.start = np.searchsorted(self.concepts, np.arange(self.concepts.max() + 2))
        self.known = np.unique(self.concepts)

    def pick(self, rng: np.random.Generator, concept: int) -> int:
        return int(rng.integers(self.start[concept], self.start[concept + 1]))


def background(rng: np.random.Generator) -> Image.Image:
    """Mostly white, else light, any, dark, or a soft gradient."""
    kind = rng.random()
    if kind < 0.55:
        return Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    if kind < 0.75:
        colour = rng.integers(200, 256, 3)
    elif kind < 0.85:
        colour = rng.integers(0, 256, 3)
    elif kind < 0.93:
        colour = rng.integers(0, 60, 3)
    else:
        corners = rng.integers(90, 256, (2, 2, 3)).astype(np.uint8)
        return Image.fromarray(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in colour))


def jitter(rng: np.random.Generator, rgb: np.ndarray) -> np.ndarray:
    """Change a drawing's colours, mostly a little, sometimes by turning the hue; uint8."""
    x = rgb.astype(np.float32)
    if rng.random() < 0.7:
        x = (x - 128) * rng.uniform(0.85, 1.15) + 128 + rng.uniform(-12, 12)
        grey = x.mean(-1, keepdims=True)
        x = grey + (x - grey) * rng.uniform(0.7, 1.2)
    if rng.random() < 0.12:  # turn the colour wheel: shape must count as well
        turn = np.deg2rad(rng.uniform(-50, 50))
        c, s = np.cos(turn), np.sin(turn) / np.sqrt(3)
        a, b1, b2 = c + (1 - c) / 3, (1 - c) / 3 - s, (1 - c) / 3 + s
        x = x @ np.array([[a, b2, b1], [b1, a, b2], [b2, b1, a]], np.float32)
    return x.clip(0, 255).astype(np.uint8)


def place(
    rng: np.random.Generator,
    canvas: Image.Image,
    icon: np.ndarray,
    box: tuple[float, float, float, float],
    *,
    plain: bool,
) -> int | None:
    """Paste one drawing into a box. Returns its dominant colour as it now shows."""
    left, top, right, bottom = (v * SIZE for v in box)
    room = min(right - left, bottom - top)
    size = int(room * (0.86 if plain else rng.uniform(0.62, 0.98)))
    if plain:
        drawing = Image.fromarray(icon)
    else:
        if rng.random() < STYLED:
            icon = restyle(rng, icon)
        drawing = Image.fromarray(np.dstack([jitter(rng, icon[..., :3]), icon[..., 3]]))
        if rng.random() < 0.4:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        width = int(drawing.width * rng.uniform(0.85, 1))  # a little narrower or lower
        stretch = (width, drawing.height) if rng.random() < 0.5 else (drawing.width, width)
        drawing = drawing.resize(stretch, Image.Resampling.BILINEAR)
        if rng.random() < 0.6:
            drawing = drawing.rotate(rng.uniform(-16, 16), Image.Resampling.BICUBIC, expand=True)
    scale = size / max(drawing.size)
    w, h = (max(1, round(v * scale)) for v in drawing.size)
    drawing = drawing.resize((w, h), Image.Resampling.BICUBIC)
    share_x, share_y = (0.5, 0.5) if plain else rng.uniform(0.1, 0.9, 2)
    x, y = int(left + (right - left - w) * share_x), int(top + (bottom - top - h) * share_y)
    canvas.paste(drawing, (x, y), drawing)
    pixels = np.asarray(drawing)
    shown = pixels[pixels[..., 3] > 150][:, :3]
    return dominant_colour(torch.from_numpy(shown[::3].astype(np.float32) / 255))


def degrade(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Now and then blur, compress or add noise, as pictures from the wild have suffered."""
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.4)))
    if rng.random() < 0.12:
        small = int(SIZE * rng.uniform(0.4, 0.9))
        image = image.resize((small, small)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.12:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
        image = Image.open(buffer).convert("RGB")
    if rng.random() < 0.08:
        noise = rng.normal(0, rng.uniform(2, 10), (SIZE, SIZE, 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def compose(
    rng: np.random.Generator,
    icons: Icons,
    layout: str,
    concepts: list[int],
    *,
    plain: bool = False,
) -> tuple[np.ndarray, Picture]:
    """A picture of `concepts` in a layout, uint8 [224, 224, 3]; plain: white, upright, centred."""
    canvas = Image.new("RGB", (SIZE, SIZE), (255, 255, 255)) if plain else background(rng)
    things = []
    for (where, box), concept in zip(LAYOUTS[layout].items(), concepts, strict=True):
        icon = icons.pixels[icons.pick(rng, concept)]
        things.append(Thing(concept, where, place(rng, canvas, icon, box, plain=plain)))
    image = canvas if plain else degrade(rng, canvas)
    return np.asarray(image), Picture("icons", layout, tuple(things))


def random_scene(
    rng: np.random.Generator, icons: Icons, *, plain: bool = False
) -> tuple[np.ndarray, Picture]:
    """Two to four things; in every third picture a thing occurs more than once."""
    layout = str(rng.choice(["row2", "column2", "row3", "four"], p=[0.3, 0.22, 0.2, 0.28]))
    count = len(LAYOUTS[layout])
    kinds = count if rng.random() < 0.67 else int(rng.integers(1, count))
    chosen = rng.choice(icons.known, kinds, replace=False).tolist()
    concepts = chosen + [chosen[int(rng.integers(kinds))] for _ in range(count - kinds)]
    rng.shuffle(concepts)
    return compose(rng, icons, layout, concepts, plain=plain)


def texture(rng: np.random.Generator) -> np.ndarray:
    """Something that shows nothing: noise, stripes, checks, gradients, blobs, scribbles."""
    kind = int(rng.integers(8))
    a, b = rng.integers(0, 256, (2, 3)).astype(np.float32)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    if kind == 0:
        scale = int(rng.choice([1, 2, 4, 8, 16]))
        n = -(-SIZE // scale)
        channels = int(rng.choice([1, 3]))
        out = rng.integers(0, 256, (n, n, channels)).repeat(scale, 0).repeat(scale, 1)
        return np.broadcast_to(out[:SIZE, :SIZE], (SIZE, SIZE, 3)).astype(np.uint8).copy()
    if kind in (1, 2):
        period, angle = rng.uniform(6, 60), rng.uniform(0, np.pi)
        mix = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period) / 2 + 0.5
        mix = mix.round() if kind == 1 else mix
    elif kind == 3:
        period = rng.uniform(8, 60)
        mix = (x // period + y // period) % 2
    elif kind == 4:
        mix = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / SIZE
        mix = (mix - mix.min()) / max(float(np.ptp(mix)), 1e-3)
    elif kind == 5:  # clouds
        n = int(rng.integers(3, 24))
        seeds = Image.fromarray((rng.random((n, n)) * 255).astype(np.uint8))
        mix = np.asarray(seeds.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
    elif kind == 6:  # one flat colour
        mix = np.zeros_like(x)
    else:  # grain on clouds
        n = int(rng.integers(3, 60))
        seeds = Image.fromarray((rng.random((n, n)) * 255).astype(np.uint8))
        mix = np.asarray(seeds.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
        mix = mix + rng.normal(0, rng.uniform(0.02, 0.3), mix.shape)
    out = a + (b - a) * mix[..., None]
    if rng.random() < 0.4:
        out = out + rng.normal(0, rng.uniform(1, 25), out.shape)
    return out.clip(0, 255).astype(np.uint8)


def crop_photo(rng: np.random.Generator, photo: Image.Image) -> np.ndarray:
    """A random part of a photo, sometimes mirrored, grey or padded to a square."""
    side = int(min(photo.size) * rng.uniform(0.25, 1))
    x = int(rng.integers(photo.width - side + 1))
    y = int(rng.integers(photo.height - side + 1))
    part = photo.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.2:
        part = part.convert("L").convert("RGB")
    if rng.random() < 0.35:  # a photo that is not square is padded with white
        canvas = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
        short = int(SIZE * rng.uniform(0.55, 0.95))
        box = (short, SIZE) if rng.random() < 0.5 else (SIZE, short)
        canvas.paste(part.resize(box), ((SIZE - box[0]) // 2, (SIZE - box[1]) // 2))
        part = canvas
    pixels = jitter(rng, np.asarray(part)) if rng.random() < 0.5 else np.asarray(part)
    return np.asarray(degrade(rng, Image.fromarray(pixels)))


def cut_out(rng: np.random.Generator, photo: Image.Image, silhouette: np.ndarray) -> np.ndarray:
    """Part of a photo in a drawing's silhouette, uint8 [s, s]: like a thing cut out on white."""
    size = int(SIZE * rng.uniform(0.6, 1))
    part = Image.fromarray(crop_photo(rng, photo)).resize((size, size), Image.Resampling.BICUBIC)
    mask = Image.fromarray(silhouette).resize((size, size), Image.Resampling.BICUBIC)
    canvas = background(rng)
    canvas.paste(part, ((SIZE - size) // 2,) * 2, mask)
    return np.asarray(degrade(rng, canvas))
