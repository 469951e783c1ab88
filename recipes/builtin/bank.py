"""Compose the training pictures once and keep what the frozen expert sees in them.

The expert never changes, so its features are computed a single time; everything after trains on
them. A bank is a folder of features and statistics (float16) and what each picture shows.
"""

import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from emoji_sets import VENDORS
from PIL import Image
from scenes import Icons, Picture, compose, crop_photo, cut_out, random_scene, texture
from tower import FEATURES, MEAN, STD, load_expert
from vision import LOW, TOKENS, Features

BATCH = 32


def load_icons(work: Path, *, vendors: list[str]) -> Icons:
    """The rendered drawings of some vendors."""
    data = np.load(work / "icons.npz")
    numbers = [i for i, v in enumerate(VENDORS) if v.key in vendors]
    keep = np.isin(data["vendor"], numbers)
    return Icons(data["pixels"][keep], data["concept"][keep])


def to_pixel_values(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, 224, 224, 3] to the vision graph's input."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN) / STD


class Extractor:
    """The expert in bfloat16 where the processor has it; statistics always in float32."""

    def __init__(self) -> None:
        self.features = Features(load_expert()).eval()
        self.fast = load_expert().to(torch.bfloat16).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = to_pixel_values(images)
        y = self.fast(x.to(torch.bfloat16).to(memory_format=torch.channels_last)).float()
        seen = self.features.pool7 @ y.flatten(2).transpose(1, 2)
        return seen.half().numpy(), self.features.statistics(x).half().numpy()


def picture_at(seed: int, icons: Icons, photos: list[Image.Image], singles: int, scenes: int):
    """Picture number `seed` of the bank: singles in turn through all drawings, scenes, the rest."""
    rng = np.random.default_rng([17, seed])
    if seed < singles:
        drawing = seed % len(icons.concepts)
        one = Icons(icons.pixels[drawing : drawing + 1], np.zeros(1, int))
        image, picture = compose(rng, one, "one", [0], plain=rng.random() < 0.1)
        thing = picture.things[0]
        named = type(thing)(int(icons.concepts[drawing]), thing.place, thing.colour)
        return image, Picture("icons", "one", (named,))
    if seed < singles + scenes:
        return random_scene(rng, icons)
    kind = rng.random()
    if kind < 0.75 and photos:
        photo = photos[int(rng.integers(len(photos)))]
        if kind < 0.4:
            return crop_photo(rng, photo), Picture("photo", "one", ())
        silhouette = icons.pixels[int(rng.integers(len(icons.pixels)))][..., 3]
        return cut_out(rng, photo, silhouette), Picture("cut", "one", ())
    return texture(rng), Picture("texture", "one", ())


class Worker:
    """What a worker process holds: set once, then asked for batches by their first number."""

    extract: Extractor
    plan: tuple

    @classmethod
    def start(cls, *plan) -> None:
        torch.set_num_threads(1)
        cls.extract, cls.plan = Extractor(), plan

    @classmethod
    def batch(cls, span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, list[Picture]]:
        made = [picture_at(i, *cls.plan) for i in range(*span)]
        return *cls.extract(np.stack([image for image, _ in made])), [p for _, p in made]


def build_bank(
    target: Path,
    *,
    icons: Icons,
    photos: list[Image.Image],
    singles: int,
    scenes: int,
    other: int,
    workers: int,
) -> Path:
    """Fill a folder with singles, scenes and other pictures; an interrupted run is continued."""
    target.mkdir(parents=True, exist_ok=True)
    total = singles + scenes + other
    list_file = target / "pictures.pickle"
    pictures = pickle.loads(list_file.read_bytes()) if list_file.exists() else []
    if len(pictures) == total:
        return target
    maps = {}
    for key, width in (("seen", FEATURES), ("low", LOW)):
        file = target / f"{key}.npy"
        mode = "r+" if pictures else "w+"
        maps[key] = np.lib.format.open_memmap(
            file, mode=mode, dtype=np.float16, shape=(total, TOKENS, width)
        )
    spans = [(i, min(i + BATCH, total)) for i in range(len(pictures), total, BATCH)]
    plan = (icons, photos, singles, scenes)
    with ProcessPoolExecutor(workers, initializer=Worker.start, initargs=plan) as pool:
        # a window of tasks, not all at once: results wait in memory until they are written
        for first in range(0, len(spans), 64):
            window = spans[first : first + 64]
            for (start, end), done in zip(window, pool.map(Worker.batch, window), strict=True):
                maps["seen"][start:end], maps["low"][start:end] = done[:2]
                pictures += done[2]
            for m in maps.values():
                m.flush()
            list_file.write_bytes(pickle.dumps(pictures))
            print(f"pictures: {len(pictures)}/{total}", flush=True)
    return target
