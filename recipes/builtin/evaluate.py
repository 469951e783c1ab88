"""Measure a bundle on drawings of a vendor it never saw, through the public API alone.

    python recipes/builtin/evaluate.py                      # the shipped model, the whole table
    python recipes/builtin/evaluate.py --bundle DIR --json result.json --vendor openmoji
    python recipes/builtin/evaluate.py --asked untrained    # wordings that training never drew
    python recipes/builtin/evaluate.py --asked instructions # with a system prompt before each

    python recipes/builtin/evaluate.py --only naming        # the rows of that name alone
    python recipes/builtin/evaluate.py --every 4            # a quarter of the cases of every row

Downloads and draws the test set by itself (Twemoji). The set and the questions are fixed by a seed;
many of the wordings are among those that training can draw.
"""

import argparse
import json
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import evaluate_photos
import numpy as np
from careless import instructions
from colours import COLOURS
from concepts import Concept, load_concepts
from dialogues import load_wordings
from emoji_sets import VENDORS
from phrases import NUMBERS_ZH, PLACES, YES_NO_ZH
from PIL import Image
from render import render
from scenes import LAYOUTS, Icons, Picture, Thing, compose, texture

import seechat_lite as sl

SEED = 20_000
NAME_ZH = ("这是什么？", "图里有什么？", "请说出图中物体的名称。", "这个图标表示的是什么？")
NAME_EN = (
    "What is this?",
    "what's in the picture",
    "What does this icon show?",
    "Which thing is it?",
)
CATEGORY = ("它属于哪一类？", "这是什么类别？", "它应该归到哪一类？", "这个东西算是哪个类别的？")
COLOUR = ("它是什么颜色的？", "什么颜色？", "图中的东西是什么颜色的呢？", "它的主色是什么？")
COUNT = (
    "图里有几个东西？",
    "How many things are there?",
    "图上一共画了几样东西？",
    "这张图中有几个图标？",
)
WHERE = ("{x}在哪里？", "{x}在什么位置？", "{x}画在哪里？", "你能告诉我{x}在哪儿吗？")
AT = ("{p}是什么？", "{p}有什么？", "图片的{p}画了什么？", "请问{p}那个是什么东西？")
NEXT = ("{p}呢？", "那{p}那个呢？", "{p}的那个又是什么呢？")
ENGLISH = ("用英文怎么说？", "它的英文是什么？", "英语里它叫什么？")
SECOND = ("第二张图是什么？", "第二张图里画了什么？")
WHICH = ("哪一张是{x}？", "哪张图是{x}？", "哪一张图片里是{x}？")
ABILITY = {"food": ("它能吃吗？",), "animal": ("它是动物吗？",), "fly": ("它会飞吗？",)}
ASKED = ("plain", "untrained", "instructions", "blanks")
Ways = dict[tuple[str, str], tuple[str, ...]]  # of asking, by intent and language
PLAIN: Ways = {
    ("name", "zh"): NAME_ZH,
    ("name", "en"): NAME_EN,
    ("category", "zh"): CATEGORY,
    ("colour", "zh"): COLOUR,
    ("count", "zh"): COUNT,
    ("where", "zh"): WHERE,
    ("at", "zh"): AT,
    **{(trait, "zh"): ways for trait, ways in ABILITY.items()},
}


def only_name(answer: str) -> str:
    """The name in "这是苹果。" or "This is an apple."; anything else comes back as it is."""
    text = answer.strip().rstrip("。. ")
    text = re.sub(r"^(是的。|不是。)?(这是|图里有|图里只有|图片里有)", "", text)
    return re.sub(r"^(This is|These are|I see|It is)( an| a| the)? ", "", text)


class Test:
    """The held-out drawings and everything asked about them.

    asked: one of ASKED: with other wordings, or with something careless around each question.
    """

    def __init__(
        self,
        model: sl.Model,
        icons: Icons,
        *,
        asked: str = "plain",
        temperature: float = 0.0,
        every: int = 1,
    ) -> None:
        self.model, self.icons = model, icons
        self.asked, self.temperature, self.every = asked, temperature, every
        self.ways = dict(PLAIN)
        if asked == "untrained":
            apart = load_wordings(Path(__file__).with_name("untrained_wordings.txt"))
            self.ways |= {key: tuple(apart[key]) for key in self.ways}
        self.concepts = load_concepts()
        self.known = [self.concepts[i] for i in icons.known]
        self.rng = np.random.default_rng(SEED)
        self.failures: list[str] = []

    # --- pictures

    def single(self, concept: Concept, *, plain: bool = True) -> tuple[Image.Image, Thing]:
        """The concept's first drawing, alone."""
        image, picture = compose(self.rng, self.icons, "one", [concept.index], plain=plain)
        return Image.fromarray(image), picture.things[0]

    def scene(self, layout: str) -> tuple[Image.Image, Picture]:
        """Different things in a layout, on white."""
        chosen = self.rng.choice(self.icons.known, len(LAYOUTS[layout]), replace=False).tolist()
        image, picture = compose(self.rng, self.icons, layout, chosen, plain=True)
        return Image.fromarray(image), picture

    def any_scene(self) -> tuple[Image.Image, Picture]:
        return self.scene(str(self.rng.choice(["row2", "column2", "row3", "four"])))

    def choose(self, items):
        return items[int(self.rng.integers(len(items)))]

    # --- measuring

    def measure(self, name: str, cases: int, case: Callable[[int], tuple[str, bool]]) -> float:
        """Share of right cases in percent; a case returns what to note down, and whether right."""
        right = 0
        chosen = range(0, cases, self.every)
        for i in chosen:
            note, good = case(i)
            right += good
            if not good:
                self.failures.append(f"{name}: {note}")
        return 100 * right / len(chosen)

    def ask(self, question: str, image=None, chat: sl.Chat | None = None) -> str:
        if self.asked == "instructions":
            before = instructions("test")
            question = f"{before[zlib.crc32(question.encode()) % len(before)]}\n{question}"
        elif self.asked == "blanks":
            question = f" \n{question}\u3000\n\n"
        return (chat or self.model.chat()).ask(
            question, image=image, max_new_tokens=48, temperature=self.temperature, seed=SEED
        )

    def way(self, intent: str, i: int | None = None, lang: str = "zh") -> str:
        """A way of asking: in turn, or by chance without a number."""
        ways = self.ways[intent, lang]
        return self.choose(ways) if i is None else ways[i % len(ways)]

    def naming(self, lang: str, *, plain: bool = True) -> Callable:
        def case(i: int) -> tuple[str, bool]:
            concept = self.known[i]
            image = self.single(concept, plain=plain)[0]
            answer = self.ask(self.way("name", i, lang), image)
            name = concept.name(lang)
            return f"{name} -> {answer}", only_name(answer) == name.removeprefix("the ")

        return case

    def category(self, i: int) -> tuple[str, bool]:
        concept = self.known[i]
        answer = self.ask(self.way("category", i), self.single(concept)[0])
        return f"{concept.zh} -> {answer}", concept.category.zh in answer

    def yes_no(self, i: int) -> tuple[str, bool]:
        concept = self.known[i % len(self.known)]
        trait = self.choose([t for t in ABILITY if t not in concept.unasked])
        answer = self.ask(self.way(trait, i), self.single(concept)[0])
        return f"{concept.zh} {trait} -> {answer}", self.verdict(concept, trait, answer)

    def verdict(self, concept: Concept, trait: str, answer: str) -> bool:
        return answer.startswith(YES_NO_ZH[trait][trait not in concept.traits] + "。")

    def either(self, i: int) -> tuple[str, bool]:
        concept = self.known[i % len(self.known)]
        same = [c for c in self.known if c.category == concept.category and c is not concept]
        pair = [concept.zh, self.choose(same).zh]
        self.rng.shuffle(pair)
        answer = self.ask(f"这是{pair[0]}还是{pair[1]}？", self.single(concept)[0])
        return f"{concept.zh} of {pair} -> {answer}", only_name(answer) == concept.zh

    def colour(self, coloured: list[Concept]) -> Callable[[int], tuple[str, bool]]:
        def case(i: int) -> tuple[str, bool]:
            image, thing = self.single(coloured[i])
            answer = self.ask(self.way("colour", i), image)
            truth = COLOURS[thing.colour or 0][1]
            return f"{coloured[i].zh} {truth} -> {answer}", truth in answer

        return case

    def count(self, i: int) -> tuple[str, bool]:
        layout = ("one", "row2", "column2", "row3", "four", "one", "row3", "four")[i % 8]
        number = len(LAYOUTS[layout])
        image, _ = self.scene(layout)
        question = self.way("count")
        answer = self.ask(question, image)
        wanted = f"{NUMBERS_ZH[number]}个"
        if question.startswith("How"):
            wanted = ("", "one", "two", "three", "four")[number]
        return f"{number} -> {answer}", wanted in answer

    def where(self, i: int) -> tuple[str, bool]:
        image, picture = self.any_scene()
        thing = self.choose(picture.things)
        name = self.concepts[thing.concept].zh
        answer = self.ask(self.way("where", i).format(x=name), image)
        place = PLACES[thing.place][0][0]
        return f"{name} {place} -> {answer}", answer.endswith(f"在{place}。")

    def at(self, i: int) -> tuple[str, bool]:
        image, picture = self.any_scene()
        thing = self.choose(picture.things)
        place, name = PLACES[thing.place][0][0], self.concepts[thing.concept].zh
        answer = self.ask(self.way("at", i).format(p=place), image)
        return f"{place} {name} -> {answer}", answer == f"{place}是{name}。"

    def follow_up(self, i: int) -> tuple[str, bool]:
        """A second question that cannot be understood without the first one and its answer."""
        chat, kind = self.model.chat(), i % 5
        image, picture = self.any_scene()
        first = self.choose(picture.things)
        concept = self.concepts[first.concept]
        place = PLACES[first.place][0][0]
        said = self.ask(self.way("at").format(p=place), image, chat)
        if kind == 0:
            trait = self.choose([t for t in ABILITY if t not in concept.unasked])
            answer = self.ask(self.way(trait, i), chat=chat)
            good = self.verdict(concept, trait, answer)
        elif kind == 1:
            answer = self.ask(self.choose(ENGLISH), chat=chat)
            good = answer == f"英文是 {concept.en}。"
        elif kind == 2:
            answer = self.ask(self.way("category"), chat=chat)
            good = concept.category.zh in answer
        elif kind == 3:
            other = self.choose([t for t in picture.things if t is not first])
            place = PLACES[other.place][0][0]
            answer = self.ask(self.choose(NEXT).format(p=place), chat=chat)
            good = answer == f"{place}是{self.concepts[other.concept].zh}。"
        else:
            answer = self.ask("那它会飞吗？", chat=chat)
            good = "fly" in concept.unasked or self.verdict(concept, "fly", answer)
        return f"{concept.zh} -> {said} -> {answer}", good

    def two_pictures(self, i: int) -> tuple[str, bool]:
        pair = [self.known[int(k)] for k in self.rng.choice(len(self.known), 2, replace=False)]
        images = [self.single(c)[0] for c in pair]
        if i % 2:
            answer = self.ask(self.choose(SECOND), images)
            return f"{pair[1].zh} -> {answer}", answer == f"第二张图是{pair[1].zh}。"
        if pair[0].category == pair[1].category:
            pair_name = pair[i // 2 % 2].zh
        else:
            pair_name = pair[i // 2 % 2].category.zh
        answer = self.ask(self.choose(WHICH).format(x=pair_name), images)
        return f"{pair_name} -> {answer}", answer == ("第一张图。", "第二张图。")[i // 2 % 2]

    def refusal(self, i: int) -> tuple[str, bool]:
        """Noise and textures show nothing."""
        image = Image.fromarray(texture(self.rng))
        answer = self.ask(self.way("name", i) if i % 3 else "What is this?", image)
        return f"texture {i} -> {answer}", "不确定" in answer or "not sure" in answer

    def table(self, only: str = "") -> dict[str, tuple[float, int]]:
        """Name of the measurement to (percent right, cases). only: what the names must contain."""
        everyone = len(self.known)
        coloured = [c for c in self.known if self.single(c)[1].colour is not None]
        rows: list[tuple[str, int, Callable]] = [
            ("naming zh", everyone, self.naming("zh")),
            ("naming en", everyone, self.naming("en")),
            ("naming zh, any background and size", everyone,
             self.naming("zh", plain=False)),
            ("category", everyone, self.category),
            ("yes or no", 300, self.yes_no),
            ("this or that, same category", 300, self.either),
            ("colour", len(coloured), self.colour(coloured)),
            ("counting 1-4", 320, self.count),
            ("position: where is X", 400, self.where),
            ("position: what is on the left", 400, self.at),
            ("follow-ups, two turns", 400, self.follow_up),
            ("two pictures", 200, self.two_pictures),
            ("noise and textures refused", 100, self.refusal),
        ]  # fmt: skip
        result = {}
        for number, (name, cases, case) in enumerate(rows):
            if only not in name:
                continue
            self.rng = np.random.default_rng([SEED, cases, number])
            began = time.time()
            share = self.measure(name, cases, case)
            asked = len(range(0, cases, self.every))
            pace = (time.time() - began) / asked * 1000
            print(f"{name:38} {share:5.1f} %   {asked:4} cases, {pace:4.0f} ms each", flush=True)
            result[name] = (round(share, 1), asked)
        return result


def test_icons(work: Path, vendor: str) -> Icons:
    """Each concept's first drawing of one vendor."""
    render(work)
    data = np.load(work / "icons.npz")
    number = [v.key for v in VENDORS].index(vendor)
    first = {c.index: c.drawings[0] for c in load_concepts()}
    keep = [
        i
        for i in np.flatnonzero(data["vendor"] == number)
        if first[int(data["concept"][i])] == data["code"][i]
    ]
    return Icons(data["pixels"][keep], data["concept"][keep])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bundle", type=Path, help="a bundle folder; the shipped model without it")
    parser.add_argument("--vendor", default="twemoji", help="twemoji, or openmoji: outlines, hard")
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--failures", type=Path, help="write every wrong answer here")
    parser.add_argument("--photos", type=Path, help="photographs as well (see evaluate_photos.py)")
    parser.add_argument("--stamps", type=Path, help="cut-outs on white as well")
    parser.add_argument("--asked", choices=ASKED, default="plain", help="how questions come in")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample at this temperature")
    parser.add_argument("--only", default="", help="only rows whose names contain this")
    parser.add_argument("--every", type=int, default=1, help="ask every so many cases only")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with sl.load(args.bundle, context=512) as model:
        icons = test_icons(args.work, args.vendor)
        test = Test(model, icons, asked=args.asked, temperature=args.temperature, every=args.every)
        precision = model.manifest.decoder.precision
        print(f"{len(test.known)} concepts of {args.vendor}, decoder {precision}")
        result: dict = test.table(args.only)
        shown = evaluate_photos.find(args.photos, args.stamps)
        shown = {name: files[:: args.every] for name, files in shown.items()}
        if shown:
            ways = evaluate_photos.ask_model(model, test.ask)
            result |= evaluate_photos.table(shown, ways, test.failures)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if args.failures:
        args.failures.write_text("\n".join(test.failures) + "\n", "utf-8")


if __name__ == "__main__":
    main()
