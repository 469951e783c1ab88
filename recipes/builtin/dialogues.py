"""Questions and answers about pictures, in Chinese and English, without end.

Every answer follows from what a picture shows (scenes.Picture) and from concepts.txt; the ways of
asking come from wordings.txt. Answers keep one plain form each, and Chinese ones use no comma,
because the tokenizer's NFKC would turn a full-width comma into a half-width one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from colours import COLOURS
from concepts import TRAITS, Concept
from phrases import (
    BEGINNINGS_EN,
    BEGINNINGS_ZH,
    ENDINGS_EN,
    ENDINGS_ZH,
    NO_PICTURE,
    NUMBERS_EN,
    NUMBERS_ZH,
    PLACES,
    PLURAL,
    UNSURE,
    YES_NO_ZH,
    join,
    noun,
)
from scenes import LAYOUTS, Picture, Thing

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Round:
    """One question with its answer. pictures: numbers of the sample's pictures shown with it."""

    question: str
    answer: str
    pictures: tuple[int, ...] = ()


def load_wordings(path: Path | None = None) -> dict[tuple[str, str], list[str]]:
    """(intent, language) to ways of asking; "talk" maps from the answer in small_talk.txt."""
    path = path or Path(__file__).with_name("wordings.txt")
    wordings: dict[tuple[str, str], list[str]] = {}
    current: list[str] = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("## "):
            intent, lang = line[3:].split(" ", 1)
            current = wordings.setdefault((intent, lang), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return wordings


class Author:
    """Writes dialogues about pictures with one random generator."""

    def __init__(self, rng: np.random.Generator, concepts: list[Concept]) -> None:
        self.rng, self.concepts = rng, concepts
        self.wordings = load_wordings()
        self.talk = load_wordings(Path(__file__).with_name("small_talk.txt"))
        self.weights: dict[tuple[str, str], np.ndarray] = {}
        self.siblings: dict[str, list[Concept]] = {}
        for c in concepts:
            self.siblings.setdefault(c.category.key, []).append(c)

    # --- small pieces

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def choose(self, items: Sequence):
        return items[int(self.rng.integers(len(items)))]

    def ask(self, intent: str, lang: str, **fill: str) -> str:
        """A way of asking, with a beginning and punctuation as people happen to use."""
        text = self.wording(intent, lang)
        while "{x}" in text and "x" not in fill:  # "what else" can do without a name
            text = self.wording(intent, lang)
        for key, value in fill.items():
            text = text.replace("{" + key + "}", value)
        return self.dress(text, lang)

    def wording(self, intent: str, lang: str) -> str:
        """One line of wordings.txt, its alternatives decided; lines with many count for more."""
        key = (intent, lang)
        if key not in self.weights:
            many = np.array([1 + 2 * line.count("[") for line in self.wordings[key]], float)
            self.weights[key] = np.cumsum(many / many.sum())
        at = int(np.searchsorted(self.weights[key], self.rng.random()))
        text = self.wordings[key][min(at, len(self.wordings[key]) - 1)]
        text = ALTERNATIVES.sub(lambda m: self.choose(m[1].split("|")), text)
        return " ".join(text.split())

    def dress(self, text: str, lang: str) -> str:
        if lang == "zh":
            if self.chance(0.1):
                text = self.choose(BEGINNINGS_ZH) + text
            if self.chance(0.05):
                return text + self.choose(ENDINGS_ZH)
            return text + self.choose(["？", "？", "？", "?", "", "", "。", "？？"])
        if self.chance(0.08):
            text = self.choose(BEGINNINGS_EN) + text
        if self.chance(0.65):
            text = text[0].upper() + text[1:]
        if self.chance(0.05):
            return text + self.choose(ENDINGS_EN)
        return text + self.choose(["?", "?", "?", "", "", ".", "？", " ?"])

    def name(self, thing: Thing | Concept, lang: str) -> str:
        concept = thing if isinstance(thing, Concept) else self.concepts[thing.concept]
        return concept.name(lang)

    def the(self, thing: Thing | Concept, lang: str) -> str:
        name = self.name(thing, lang)
        return name if lang == "zh" else noun(name)

    def other(self, concept: int, *, near: float = 0.5) -> Concept:
        """Another concept, with probability `near` one of the same category."""
        mine = self.concepts[concept]
        pool = self.siblings[mine.category.key] if self.chance(near) else self.concepts
        for _ in range(20):
            found = self.choose(pool)
            if found.index != concept:
                return found
        return self.concepts[(concept + 1) % len(self.concepts)]

    def by_name(self, intent: str, concept: Concept) -> str:
        """A Chinese question about a thing's name in place of "it": no picture needed."""
        text = ""
        while not text.startswith("它"):
            text = self.wording(intent, "zh")
        return self.dress(text.replace("它", concept.zh, 1), "zh")

    # --- answers

    def say_name(self, thing: Thing | Concept, lang: str) -> str:
        if lang == "zh":
            return f"这是{self.name(thing, lang)}。"
        plural = self.name(thing, lang) in PLURAL
        return f"{'These are' if plural else 'This is'} {self.the(thing, lang)}."

    def say_list(self, things: Sequence[Thing], lang: str) -> str:
        names = list(dict.fromkeys(self.the(t, lang) for t in things))
        return f"图里有{join(names, lang)}。" if lang == "zh" else f"I see {join(names, lang)}."

    def say_at(self, place: str, things: Sequence[Thing], lang: str) -> str:
        names = join(list(dict.fromkeys(self.the(t, lang) for t in things)), lang)
        if lang == "zh":
            return f"{PLACES[place][0][0]}是{names}。"
        where = PLACES[place][1][0]
        return f"{where[0].upper()}{where[1:]} I see {names}."

    def say_where(self, concept: Concept, things: Sequence[Thing], lang: str) -> str:
        spots = [PLACES[t.place][lang == "en"][0] for t in things if t.concept == concept.index]
        name = concept.name(lang)
        if not spots:
            return f"图里没有{name}。" if lang == "zh" else f"I see no {name}."
        where = join(spots, lang)
        return f"{name}在{where}。" if lang == "zh" else f"The {name} is {where}."

    def say_colour(self, thing: Thing, lang: str) -> str:
        _, zh, en = COLOURS[thing.colour or 0]
        return f"它是{zh}的。" if lang == "zh" else f"It is {en}."

    def say_trait(self, thing: Thing | Concept, trait: str, lang: str) -> str:
        concept = thing if isinstance(thing, Concept) else self.concepts[thing.concept]
        yes = trait in concept.traits
        if lang == "zh":
            verdict = YES_NO_ZH[trait][not yes]
            return f"{verdict}。{concept.zh}属于{concept.category.zh}。"
        return (
            f"{'Yes' if yes else 'No'}. It is {noun(concept.en)}, category {concept.category.en}."
        )

    def say_category(self, thing: Thing | Concept, lang: str) -> str:
        concept = thing if isinstance(thing, Concept) else self.concepts[thing.concept]
        if lang == "zh":
            return f"{concept.zh}属于{concept.category.zh}。"
        return f"It is {noun(concept.en)}, category {concept.category.en}."

    def say_count(self, number: int, lang: str) -> str:
        if lang == "zh":
            return f"图里有{NUMBERS_ZH[number]}个东西。"
        if number == 1:
            return "There is one thing."
        return f"There are {NUMBERS_EN[number]} things."

    def say_translation(self, concept: Concept, to: str, lang: str) -> str:
        if to == "en":
            return f"英文是 {concept.en}。"
        return f"中文是{concept.zh}。" if lang == "zh" else f"In Chinese it is {concept.zh}."

    # --- single rounds: question and answer about one thing

    def pick_trait(self, concept: Concept) -> str:
        """A trait worth asking about, a true one in a third of the cases.

        More, and a thing is learned to deserve a yes whatever is asked of it.
        """
        possible = [t for t in TRAITS if t not in concept.unasked]
        true = [t for t in possible if t in concept.traits]
        common = [t for t in ("animal", "food", "fly", "plant") if t in possible]
        roll = self.rng.random()
        if true and roll < 0.35:
            return self.choose(true)
        return self.choose(common if roll < 0.8 and common else possible)

    def naming(self, thing: Thing, lang: str) -> tuple[str, str]:
        """Ask for a thing's name, in half of the cases as plainly as people mostly do."""
        if self.chance(0.5):
            return self.ask("name", lang), self.say_name(thing, lang)
        plain = [line for line in self.wordings["name", lang] if "[" not in line]
        return self.dress(self.choose(plain), lang), self.say_name(thing, lang)

    def about(self, thing: Thing, lang: str) -> tuple[str, str]:
        """Ask about a thing's category, traits, colour or its name in the other language."""
        concept = self.concepts[thing.concept]
        roll = self.rng.random()
        if roll < 0.3:
            return self.ask("category", lang), self.say_category(thing, lang)
        if roll < 0.62:
            trait = self.pick_trait(concept)
            return self.ask(trait, lang), self.say_trait(thing, trait, lang)
        if roll < 0.84 and thing.colour is not None:
            return self.ask("colour", lang), self.say_colour(thing, lang)
        if lang == "zh":
            return self.ask("to_en", "zh"), self.say_translation(concept, "en", lang)
        return self.ask("to_zh", "en"), self.say_translation(concept, "zh", lang)

    def single(self, picture: Picture, lang: str) -> tuple[str, str, Thing | None]:
        """A first question about a picture of one thing."""
        thing = picture.things[0]
        concept = self.concepts[thing.concept]
        roll = self.rng.random()
        if roll < 0.05:
            return self.ask("describe", lang), self.say_list(picture.things, lang), thing
        if roll < 0.42:
            return self.ask("name", lang), self.say_name(thing, lang), thing
        if roll < 0.52:
            return self.ask("category", lang), self.say_category(thing, lang), thing
        if roll < 0.62 and thing.colour is not None:
            intent = "colour"
            fill = {}
            if self.chance(0.2):
                intent, fill = "colour_x", {"x": concept.name(lang)}
            return self.ask(intent, lang, **fill), self.say_colour(thing, lang), thing
        if roll < 0.74:
            return *self.about(thing, lang), thing
        if roll < 0.82:
            other = self.other(thing.concept)
            pair = [concept.name(lang), other.name(lang)]
            self.rng.shuffle(pair)
            question = self.ask("either", lang, a=pair[0], b=pair[1])
            return question, self.say_name(thing, lang), thing
        if roll < 0.89:
            asked = concept if self.chance(0.5) else self.other(thing.concept)
            yes = asked is concept
            question = self.ask("is_x", lang, x=asked.name(lang))
            if lang == "zh":
                return question, ("是的。" if yes else "不是。") + self.say_name(thing, lang), thing
            return question, ("Yes. " if yes else "No. ") + self.say_name(thing, lang), thing
        if roll < 0.93:
            return self.ask("count", lang), self.say_count(1, lang), thing
        if roll < 0.95:
            return *self.count_x(picture, lang), None
        if roll < 0.97:
            return *self.exists(picture, lang), None
        if roll < 0.985:
            place = self.choose(list(PLACES))
            only = "图里只有" + self.the(thing, lang) + "。"
            only = only if lang == "zh" else f"I see only {self.the(thing, lang)}."
            question = self.ask("at", lang, p=self.choose(PLACES[place][lang == "en"]))
            if place == "middle":
                return question, self.say_at(place, picture.things, lang), thing
            return question, only, thing
        none = "没有别的了。" if lang == "zh" else "Nothing else."
        return self.ask("else", lang, x=concept.name(lang)), none, thing

    def count_x(self, picture: Picture, lang: str) -> tuple[str, str]:
        shown = self.choose(picture.things)
        asked = self.concepts[shown.concept] if self.chance(0.75) else self.other(shown.concept)
        number = sum(t.concept == asked.index for t in picture.things)
        question = self.ask("count_x", lang, x=asked.name(lang))
        if lang == "zh":
            return (
                question,
                f"有{NUMBERS_ZH[number]}个{asked.zh}。" if number else f"没有{asked.zh}。",
            )
        return question, f"I count {NUMBERS_EN[number] if number else 'none'}."

    def exists(self, picture: Picture, lang: str) -> tuple[str, str]:
        shown = self.choose(picture.things)
        asked = self.concepts[shown.concept] if self.chance(0.55) else self.other(shown.concept)
        there = [t for t in picture.things if t.concept == asked.index]
        question = self.ask("exists", lang, x=asked.name(lang))
        if lang == "zh":
            return question, f"有。{self.say_where(asked, there, lang)}" if there else "没有。"
        return question, f"Yes. {self.say_where(asked, there, lang)}" if there else "No."

    def places(self, picture: Picture) -> dict[str, list[Thing]]:
        """What can be asked about by place: the layout's places, and sides that hold two."""
        found = {t.place: [t] for t in picture.things}
        if picture.layout == "four":
            for side in ("left", "right", "top", "bottom"):
                found[side] = [t for t in picture.things if side in t.place.split()]
        return found

    def scene(self, picture: Picture, lang: str) -> tuple[str, str, Thing | None]:
        """A first question about a picture of several things."""
        roll = self.rng.random()
        things = picture.things
        if roll < 0.24:
            places = self.places(picture)
            place = self.choose(list(LAYOUTS[picture.layout]) * 2 + list(places))
            question = self.ask("at", lang, p=self.choose(PLACES[place][lang == "en"]))
            focus = places[place][0] if len(places[place]) == 1 else None
            return question, self.say_at(place, places[place], lang), focus
        if roll < 0.60:
            shown = self.choose(things)
            concept = self.concepts[shown.concept]
            if self.chance(0.08):
                concept = self.other(shown.concept, near=0)
            question = self.ask("where", lang, x=concept.name(lang))
            return question, self.say_where(concept, things, lang), shown
        if roll < 0.64:
            return self.ask("count", lang), self.say_count(len(things), lang), None
        if roll < 0.70:
            return *self.count_x(picture, lang), None
        if roll < 0.81:
            intent = "describe" if self.chance(0.25) else "list"
            return self.ask(intent, lang), self.say_list(things, lang), None
        if roll < 0.90:
            return *self.exists(picture, lang), None
        if roll < 0.95:
            shown = self.choose(things)
            question = self.ask("else", lang, x=self.name(shown, lang))
            while self.name(shown, lang) not in question:
                question = self.ask("else", lang, x=self.name(shown, lang))
            return question, self.say_else(picture, [shown], lang), None
        coloured = [t for t in things if t.colour is not None]
        unique = [t for t in coloured if sum(t.concept == o.concept for o in things) == 1]
        if unique and self.chance(0.5):
            thing = self.choose(unique)
            question = self.ask("colour_x", lang, x=self.name(thing, lang))
            return question, self.say_colour(thing, lang), thing
        if coloured:
            thing = self.choose(coloured)
            place = self.choose(PLACES[thing.place][lang == "en"])
            return self.ask("colour_p", lang, p=place), self.say_colour(thing, lang), thing
        return self.ask("list", lang), self.say_list(things, lang), None

    def say_else(self, picture: Picture, known: Sequence[Thing], lang: str) -> str:
        seen = {t.concept for t in known}
        rest = [t for t in picture.things if t.concept not in seen]
        if not rest:
            return "没有别的了。" if lang == "zh" else "Nothing else."
        names = join(list(dict.fromkeys(self.the(t, lang) for t in rest)), lang)
        return f"还有{names}。" if lang == "zh" else f"There is also {names}."

    # --- whole dialogues; each returns rounds and how many pictures they use

    def language(self) -> str:
        return "zh" if self.chance(0.58) else "en"

    def one_picture(self, picture: Picture, *, turns: int) -> list[Round]:
        """1 to 4 rounds about one picture; later ones lean on what was said before."""
        lang = self.language()
        if picture.kind != "icons":
            return self.refusal(lang, turns=turns)
        first = self.single if len(picture.things) == 1 else self.scene
        question, answer, focus = first(picture, lang)
        if turns > 1 and len(picture.things) > 1:
            for _ in range(4):  # a first question that singles one thing out
                if focus is not None:
                    break
                question, answer, focus = first(picture, lang)
        rounds = [Round(question, answer, (0,))]
        places = self.places(picture)
        for _ in range(turns - 1):
            if self.chance(0.06):
                lang = "en" if lang == "zh" else "zh"
            scene = len(picture.things) > 1
            if scene and self.chance(0.38):
                place = self.choose(list(LAYOUTS[picture.layout]))
                focus = places[place][0]
                question = self.ask("at_next", lang, p=self.choose(PLACES[place][lang == "en"]))
                answer = self.say_at(place, [focus], lang)
            elif scene and focus is not None and self.chance(0.15):
                question, answer = self.else_after(rounds, picture, focus, lang)
            elif focus is not None and (not scene or self.chance(0.8)):
                question, answer = self.about(focus, lang)
            else:
                question, answer, new = first(picture, lang)
                focus = new or focus
            rounds.append(Round(question, answer))
        return rounds

    def else_after(
        self, rounds: list[Round], picture: Picture, focus: Thing, lang: str
    ) -> tuple[str, str]:
        """ "还有什么": what the dialogue has not named yet."""
        said = " ".join(r.answer for r in rounds)
        known = [
            t for t in picture.things if self.name(t, "zh") in said or self.name(t, "en") in said
        ]
        return self.ask("else", lang), self.say_else(picture, known or [focus], lang)

    def refusal(self, lang: str, *, turns: int) -> list[Round]:
        rounds = []
        concept = self.choose(self.concepts)
        intents: list[Callable[[], str]] = [
            lambda: self.ask("name", lang), lambda: self.ask("name", lang),
            lambda: self.ask("list", lang), lambda: self.ask("category", lang),
            lambda: self.ask("describe", lang),
            lambda: self.ask("colour", lang), lambda: self.ask(self.choose(TRAITS), lang),
            lambda: self.ask("is_x", lang, x=concept.name(lang)),
            lambda: self.ask("count", lang),
            lambda: self.ask("where", lang, x=concept.name(lang)),
            lambda: self.ask("at", lang, p=PLACES[self.choose(list(PLACES))][lang == "en"][0]),
        ]  # fmt: skip
        for i in range(turns):
            rounds.append(Round(self.choose(intents)(), UNSURE[lang], (0,) if i == 0 else ()))
        return rounds

    def two_pictures(self, one: Picture, two: Picture) -> list[Round]:
        """Questions about two pictures of one thing each, shown together or one after the other."""
        lang = self.language()
        a, b = one.things[0], two.things[0]
        both = {
            "zh": f"第一张图是{self.name(a, 'zh')}。第二张图是{self.name(b, 'zh')}。",
            "en": f"The first picture shows {self.the(a, 'en')}. "
            f"The second picture shows {self.the(b, 'en')}.",
        }
        say = {
            "first": {
                "zh": f"第一张图是{self.name(a, 'zh')}。",
                "en": both["en"].split(". ")[0] + ".",
            },
            "second": {
                "zh": f"第二张图是{self.name(b, 'zh')}。",
                "en": f"The second picture shows {self.the(b, 'en')}.",
            },
        }

        def question() -> tuple[str, str, Thing | None]:
            roll = self.rng.random()
            if roll < 0.25:
                return self.ask("first", lang), say["first"][lang], a
            if roll < 0.5:
                return self.ask("second", lang), say["second"][lang], b
            if roll < 0.65:
                return self.ask(self.choose(["both", "differ"]), lang), both[lang], None
            if roll < 0.75:
                if a.concept == b.concept:
                    answer = (
                        f"一样。都是{self.name(a, 'zh')}。"
                        if lang == "zh"
                        else (f"Yes. Both show {self.the(a, 'en')}.")
                    )
                else:
                    answer = ("不一样。" if lang == "zh" else "No. ") + both[lang]
                return self.ask("same", lang), answer, None
            return *self.which(a, b, lang), None

        if self.chance(0.55):
            text, answer, focus = question()
            rounds = [Round(text, answer, (0, 1))]
        else:
            rounds = [
                Round(self.ask("name", lang), self.say_name(a, lang), (0,)),
                Round(self.ask("name", lang), self.say_name(b, lang), (1,)),
            ]
            focus = b
            if self.chance(0.25):
                return rounds
        if len(rounds) == 2 or self.chance(0.35):
            if focus is not None and self.chance(0.3):
                rounds.append(Round(*self.about(focus, lang)))
            else:
                rounds.append(Round(*question()[:2]))
        return rounds

    def which(self, a: Thing, b: Thing, lang: str) -> tuple[str, str]:
        """Which of the two pictures is a certain thing, or of a certain category?"""
        shown = self.concepts[self.choose([a, b]).concept]
        ca, cb = self.concepts[a.concept], self.concepts[b.concept]
        if self.chance(0.5):
            asked = shown.category.zh if lang == "zh" else shown.category.en
            hits = [ca.category == shown.category, cb.category == shown.category]
        else:
            asked = shown.name(lang)
            hits = [ca is shown, cb is shown]
        question = self.ask("which", lang, x=asked)
        if all(hits):
            return question, "两张都是。" if lang == "zh" else "Both of them."
        first = hits[0]
        if lang == "zh":
            return question, "第一张图。" if first else "第二张图。"
        return question, "The first picture." if first else "The second picture."

    def without_picture(self) -> list[Round]:
        """Text alone: small talk, names in both languages, categories and traits by name."""
        roll = self.rng.random()
        lang = self.language()
        concept = self.choose(self.concepts)
        if roll < 0.3:
            answers = [key for key in self.talk if key[0] == lang]
            key = self.choose(answers)
            return [Round(self.dress(self.choose(self.talk[key]), lang), key[1])]
        if roll < 0.45:
            intent = self.choose(["name", "category", "colour", "count", "list", "food", "animal"])
            return [Round(self.ask(intent, lang), NO_PICTURE[lang])]
        if roll < 0.6:
            question = self.ask("to_en_x", "zh", x=concept.zh)
            return [Round(question, self.say_translation(concept, "en", "zh"))]
        if roll < 0.75:
            question = self.ask("to_zh_x", lang, x=concept.en)
            return [Round(question, self.say_translation(concept, "zh", lang))]
        trait = self.pick_trait(concept)
        if roll < 0.86:
            question = self.by_name("category", concept)
            return [Round(question, self.say_category(concept, "zh"))]
        question = self.by_name(trait, concept)
        return [Round(question, self.say_trait(concept, trait, "zh"))]
