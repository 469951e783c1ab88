"""Measure what is said about photographs: right, right kind, wrong, refused.

    python recipes/builtin/evaluate_photos.py --photos DIR --stamps DIR   # the shipped model
    python recipes/builtin/evaluate_photos.py --photos DIR --expert       # the expert: a ceiling

The pictures are not part of this repository: a folder of photographs named as test_labels.tsv says,
and the cut-outs on white of Debian's package tuxpaint-stamps-default (GPL; for measuring alone):

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb DIR
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from concepts import Category, Concept, load_concepts
from photo_classes import PERSON, Kind, load_kinds, load_things
from photo_truth import OUTCOMES, Truth, pictures
from PIL import Image

import seechat_lite as sl

Said = Concept | Kind | Category | None
QUESTIONS = {"zh": "这是什么？", "en": "What is this?"}
UNSURE = ("不确定", "not sure")
SETS = ("photos", "scenes", "stamps")
STAMPS = "usr/share/tuxpaint/stamps"  # inside the unpacked package
# how an answer begins that names a kind alone (dialogues.py writes them so)
KIND = re.compile(r"^(?:这|图里|它)是一种(.+?)。|a kind of (.+?)\.")
CATEGORY = re.compile(r"^这属于(.+?)。|something of the category (.+?)\.")
GRID = ((0.3, 0.4, 0.5), (0.4, 0.5, 0.6), (0.5, 0.6, 0.7), (0.6, 0.7, 0.8), (0.7, 0.8, 0.9))


@cache
def _names() -> tuple[dict[str, Concept], dict[str, Kind], dict[str, Category], re.Pattern[str]]:
    def spellings(zh: str, en: str) -> tuple[str, ...]:
        return zh, en, f"{en}s", f"{en}es", f"{en.removesuffix('y')}ies"

    things = {name: t for t in load_things()[0] for name in spellings(t.zh, t.en)}
    kinds = {name: k for k in load_kinds().values() for name in spellings(k.zh, k.en)}
    every = {c.category.key: c.category for c in load_concepts()} | {PERSON.key: PERSON}
    categories = {name: c for c in every.values() for name in spellings(c.zh, c.en)}
    longest = sorted((*things, *kinds, *categories), key=len, reverse=True)
    # English names begin and end where words do, or a cat is found in a catamaran
    spelled = (rf"\b{re.escape(n)}\b" if n.isascii() else re.escape(n) for n in longest)
    return things, kinds, categories, re.compile("|".join(spelled))


def what_was_said(answer: str) -> Said:
    """The thing, kind or category that an answer names first; None if it says "not sure"."""
    if any(word in answer for word in UNSURE):
        return None
    things, kinds, categories, spelled = _names()
    for form, known in ((KIND, kinds), (CATEGORY, categories)):
        if (found := form.search(answer)) and (name := found[1] or found[2]) in known:
            return known[name]
    if match := spelled.search(answer):
        return next(known[match[0]] for known in (things, kinds, categories) if match[0] in known)
    return None


def on_white(image: Image.Image) -> Image.Image:
    """A picture without its transparency."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def padded(image: Image.Image, size: int = 224) -> np.ndarray:
    """A picture as the runtime shows it to the vision graph: uint8 [size, size, 3], on white."""
    scale = size / max(image.size)
    w, h = (max(1, round(v * scale)) for v in image.size)
    square = Image.new("RGB", (size, size), (255, 255, 255))
    square.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((size - w) // 2, (size - h) // 2))
    return np.asarray(square)


def shares(outcomes: list[str]) -> dict[str, float]:
    """Percent of each outcome."""
    return {o: round(100 * outcomes.count(o) / max(len(outcomes), 1), 1) for o in OUTCOMES}


def ask_model(
    model: sl.Model, ask: Callable[[str, Image.Image], str] | None = None
) -> Iterator[tuple[str, Callable[[Image.Image], Said]]]:
    """One way of answering a language. ask: another way to put a question than as it is."""

    def plainly(question: str, image: Image.Image) -> str:
        return model.chat().ask(question, image=image, max_new_tokens=64)

    for lang, question in QUESTIONS.items():

        def said(image: Image.Image, question: str = question) -> Said:
            return what_was_said((ask or plainly)(question, image))

        yield lang, said


def ask_expert(grid=GRID) -> Iterator[tuple[str, Callable[[Image.Image], Said]]]:
    """One way of answering a triple of thresholds; every picture is looked at once."""
    import torch
    from bank import to_pixel_values
    from tower import load_expert
    from verdict import load_head

    expert, head = load_expert(), load_head()
    meanings = head.verdicts.meanings
    looked: dict[bytes, torch.Tensor] = {}

    @torch.no_grad()
    def look(image: Image.Image) -> torch.Tensor:
        pixels = padded(image)
        if (key := pixels.tobytes()) not in looked:
            features = expert(to_pixel_values(pixels[None])).mean((2, 3))
            looked[key] = head.shares(features)[0]
        return looked[key]

    for thresholds in grid:

        def said(image: Image.Image, thresholds=thresholds) -> Said:
            head.thresholds = thresholds
            return meanings[int(head.decide(look(image)))]

        yield "name {} kind {} category {}".format(*thresholds), said


def measure(
    shown: list[tuple[Path, Truth]], said: Callable[[Image.Image], Said], failures: list[str]
) -> dict[str, float]:
    """Percent of each outcome; what was wrong is noted down."""
    outcomes = []
    for file, truth in shown:
        with Image.open(file) as image:
            answer = said(on_white(image))
        outcomes.append(truth.judge(answer))
        if outcomes[-1] == "wrong":
            failures.append(f"{file.name}: {answer.en if answer else None}")
    return shares(outcomes)


def find(photos: Path | None, stamps: Path | None) -> dict[str, list[tuple[Path, Truth]]]:
    """The pictures of every set of which a folder is given; stamps: also the unpacked package's."""
    if stamps and (stamps / STAMPS).is_dir():
        stamps = stamps / STAMPS
    folders = {"photos": photos, "scenes": photos, "stamps": stamps}
    return {name: list(pictures(folder, name)) for name, folder in folders.items() if folder}


def table(
    shown: dict[str, list[tuple[Path, Truth]]],
    ways: Iterator[tuple[str, Callable[[Image.Image], Said]]],
    failures: list[str],
) -> dict[str, dict[str, dict[str, float]]]:
    """Percent of each outcome, by set and way of answering; printed as it is found."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for way, said in ways:
        for name, files in shown.items():
            row = measure(files, said, failures)
            result.setdefault(name, {})[way] = row
            figures = "  ".join(f"{o} {row[o]:5.1f} %" for o in OUTCOMES)
            print(f"{name:7} {len(files):4}  {way:32} {figures}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs and scenes")
    parser.add_argument("--stamps", type=Path, help="folder of tuxpaint's package, unpacked")
    parser.add_argument("--bundle", type=Path, help="a bundle folder; the shipped model without it")
    parser.add_argument("--expert", action="store_true", help="the bare head at several thresholds")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--failures", type=Path, help="write every wrong answer here")
    args = parser.parse_args()
    shown = find(args.photos, args.stamps)
    if not any(shown.values()):
        parser.error("no picture of test_labels.tsv found: give --photos or --stamps")
    failures: list[str] = []
    if args.expert:
        result = table(shown, ask_expert(), failures)
    else:
        with sl.load(args.bundle, context=512) as model:
            result = table(shown, ask_model(model), failures)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if args.failures:
        args.failures.write_text("\n".join(failures) + "\n", "utf-8")


if __name__ == "__main__":
    main()
