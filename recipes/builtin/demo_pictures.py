"""Draw docs/images: pictures of the held-out vendor that the shipped model answers correctly.

The photographs there are asked about as well; they are of others, and none was trained on.

    python recipes/builtin/demo_pictures.py

Every picture is asked about with the shipped bundle; one that is answered wrongly is left out, and
how many were tried is written down with the others.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from concepts import Concept, load_concepts
from evaluate import test_icons
from phrases import PLACES
from PIL import Image
from scenes import LAYOUTS, Icons, compose

import seechat_lite as sl

DOCS = Path(__file__).parents[2] / "docs" / "images"


@dataclass(frozen=True)
class Demo:
    """A picture to draw, what to ask about it, and the true answer."""

    file: str
    layout: str
    names: tuple[str, ...]  # English names of what it shows
    question: str
    answer: str


GCOMPRIS = "gcompris-qt-data 3.1, {}"
# whose photographs they are, where a file comes from, and its licence
BY = {
    "polar-bear.jpg": ("unknown", GCOMPRIS.format("polar_bear"), "public domain"),
    "koala.jpg": ("BurningWell", GCOMPRIS.format("koala"), "public domain"),
    "macaw.jpg": ("Dcoetzee", GCOMPRIS.format("scarlet_macaw"), "CC0"),
    "bison.jpg": ("Kurt Kaiser", GCOMPRIS.format("bison"), "CC0"),
    "clownfish.jpg": ("Jan Derk", GCOMPRIS.format("fish9"), "public domain"),
    "blowfish.jpg": ("Bernard Spragg", GCOMPRIS.format("fish28"), "CC0"),
    "espresso.jpg": ("Rachel Michetti", "scikit-image 0.26.0, coffee", "CC0"),
    "baseball.jpg": ("Cody escadron delta", GCOMPRIS.format("baseball"), "public domain"),
    "hammer.jpg": ("Evan-Amos", GCOMPRIS.format("hammer5"), "public domain"),
    "moose.jpg": ("Ryan Hagerty", GCOMPRIS.format("moose"), "public domain"),
}
PHOTOGRAPHS = (
    ("polar-bear.jpg", "这是什么？", "这是北极熊。"),
    ("koala.jpg", "它是什么颜色的？", "它是灰色的。"),
    ("macaw.jpg", "它会飞吗？", "会飞。鹦鹉属于鸟类。"),
    ("bison.jpg", "What is this?", "This is a bison."),
    ("clownfish.jpg", "这是什么？", "这是热带鱼。"),
    ("blowfish.jpg", "它会游泳吗？", "会游泳。河豚属于海洋动物。"),
    ("espresso.jpg", "它能喝吗？", "能喝。咖啡属于饮料。"),
    ("baseball.jpg", "What colour is it?", "It is white."),
    ("hammer.jpg", "这是锤子还是斧头？", "这是锤子。"),
    ("moose.jpg", "这是什么？", "我不确定。我只认识图标类的图片。"),
)  # file, question and answer


def demos(concepts: dict[str, Concept]) -> list[Demo]:
    """Single things first, then scenes."""
    single = (
        "panda", "elephant", "penguin", "owl", "frog", "butterfly", "octopus", "sunflower",
        "cactus", "banana", "strawberry", "pineapple", "carrot", "hamburger", "pizza", "bicycle",
        "rocket", "umbrella", "guitar", "basketball", "scissors", "microscope",
    )  # fmt: skip
    found = [
        Demo(
            f"{name.replace(' ', '-')}.png",
            "one",
            (name,),
            "这是什么？",
            f"这是{concepts[name].zh}。",
        )
        for name in single
    ]
    scenes = (
        ("row2", ("panda", "bicycle"), "left"),
        ("row2", ("banana", "rocket"), "right"),
        ("four", ("penguin", "guitar", "strawberry", "butterfly"), "top right"),
        ("column2", ("umbrella", "elephant"), "bottom"),
    )
    for layout, names, place in scenes:
        where = PLACES[place][0][0]
        shown = concepts[names[list(LAYOUTS[layout]).index(place)]].zh
        question, answer = f"{where}是什么？", f"{where}是{shown}。"
        found.append(Demo(f"{'-'.join(names)}.png", layout, names, question, answer))
    return found


def draw(icons: Icons, demo: Demo, concepts: dict[str, Concept]) -> Image.Image:
    numbers = [concepts[name].index for name in demo.names]
    pixels, _ = compose(np.random.default_rng(0), icons, demo.layout, numbers, plain=True)
    return Image.fromarray(pixels)


def main() -> None:
    concepts = {c.en: c for c in load_concepts()}
    icons = test_icons(Path(__file__).with_name("work"), "twemoji")
    DOCS.mkdir(parents=True, exist_ok=True)
    rows, wanted = [], demos(concepts)
    with sl.load() as model:
        for demo in wanted:
            image = draw(icons, demo, concepts)
            answer = model.chat().ask(demo.question, image=image, max_new_tokens=48)
            good = answer == demo.answer
            print("right" if good else "WRONG", demo.file, answer)
            if good:
                image.quantize(128).save(DOCS / demo.file, optimize=True)
                # what is shipped is what was asked about: the saved file must be answered as well
                saved = model.chat().ask(demo.question, image=DOCS / demo.file, max_new_tokens=48)
                assert saved == demo.answer, (demo.file, saved)
                codes = ", ".join(f"U+{concepts[n].drawings[0].split('-')[0]}" for n in demo.names)
                rows.append(
                    f"| [{demo.file}]({demo.file}) | {demo.question} | {answer} | {codes} |"
                )
        for file, question, right in PHOTOGRAPHS:
            answer = model.chat().ask(question, image=DOCS / file, max_new_tokens=48)
            assert answer == right, (file, answer)
    head = f"""# Pictures to try the built-in model with

Drawings of [Twemoji](https://github.com/jdecked/twemoji) (Copyright Twitter, Inc and other
contributors, [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)), rendered on white. The
model never saw drawings of this set in training. {len(wanted)} pictures were drawn and asked about;
these {len(rows)} are answered correctly and kept. How often the model is right over all it knows is
in [the model card](../builtin-model.md); made by `recipes/builtin/demo_pictures.py`.

| picture | question | answer | Twemoji |
| --- | --- | --- | --- |
"""
    taken = "\n".join(
        f"| [{file}]({file}) | {question} | {right} | {' | '.join(BY[file])} |"
        for file, question, right in PHOTOGRAPHS
    )
    photographs = f"""
## Photographs

By the people named here, reduced to at most 320 pixels; in the public domain or under
[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/). None was trained on. They were
chosen from some thirty for being known; the moose is not.

| photograph | question | answer | by | from | licence |
| --- | --- | --- | --- | --- | --- |
{taken}
"""
    (DOCS / "README.md").write_text(head + "\n".join(rows) + "\n" + photographs, "utf-8")


if __name__ == "__main__":
    main()
