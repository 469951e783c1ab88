"""Dialogues about photographs: sights dealt out of the head's list, and what follows from them.

What holds for drawings holds here: every answer follows from what the decoder is shown, one plain
form each. New is that it may be shown less than a name: a kind ("这是一种狗。"), a category, or
nothing sure, and then it says so, and which colour the picture mostly has.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from colours import COLOURS
from concepts import TRAITS, Category, Concept
from dialogues import Author, Round
from photo_classes import PHOTO_TRAITS, Kind, load_classes, load_things
from phrases import PLACES, YES_NO_ZH, join, noun
from scenes import Thing
from sights import LIGHTS, NO_COLOUR, Sight
from verdict import load_verdicts
from vision import TOKENS

Meaning = Concept | Kind | Category | None
View = Thing | Sight  # one of several pictures: what is drawn in it alone, or a photograph
SIZE = tuple(t for t in PHOTO_TRAITS if t not in TRAITS)  # wheels, and bigger than a person
# which regions tell of a place, and which places are asked about together
SIDES = {"left": (1, 5, 7, 9), "right": (2, 6, 8, 11), "top": (3, 5, 6), "bottom": (4, 7, 8)}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
REGION_OF = {"left": 1, "right": 2, "top": 3, "bottom": 4}
# every place that can be asked about, and the region that tells of it
PART = {
    **REGION_OF, "middle": 10, "top left": 5, "top right": 6, "bottom left": 7, "bottom right": 8,
}  # fmt: skip
# how pictures shown together are counted
ORDINALS_ZH = ("第一张图", "第二张图", "第三张图", "第四张图", "第五张图")
ORDINALS_EN = ("first", "second", "third", "fourth", "fifth")
MOST = len(ORDINALS_ZH)


class PhotoAuthor(Author):
    """An author who knows all things, and writes about photographs as well as drawings."""

    def __init__(self, rng: np.random.Generator) -> None:
        things, _ = load_things()
        super().__init__(rng, things)
        self.verdicts = load_verdicts()
        self.number = {m: i for i, m in enumerate(self.verdicts.meanings)}
        self.measure = {c.zh: c.measure for c in load_classes()}
        self.kind_of = {c.zh: c.kind for c in load_classes()}
        self.class_of = {c.zh: c for c in load_classes()}
        self.members: dict[str, list[Concept]] = {}
        for meaning in self.verdicts.meanings[: self.verdicts.levels[0]]:
            assert isinstance(meaning, Concept)
            self.members.setdefault(self.kind_of[meaning.zh].key, []).append(meaning)

    # --- sights

    def deal(self) -> Sight:
        """A sight as photographs give them: mostly one thing, seen in many of its regions."""
        things, kinds, categories = self.verdicts.levels
        roll = self.rng.random()
        if roll < 0.62:
            whole = int(self.rng.integers(things))
        elif roll < 0.80:
            whole = things + int(self.rng.integers(kinds))
        elif roll < 0.88:
            whole = things + kinds + int(self.rng.integers(categories))
        else:
            whole = self.verdicts.unsure
        seen = [whole] * TOKENS
        faint = self.rng.random()  # how little of the thing the regions show
        for region in range(1, TOKENS):
            if self.chance(faint):
                seen[region] = self.related(whole) if self.chance(0.3) else self.verdicts.unsure
        if self.chance(0.3):  # something else on one side
            place = self.choose(list(SIDES))
            other = int(self.rng.integers(things))
            if self.chance(0.3):
                other = things + int(self.rng.integers(kinds))
            for region in SIDES[place]:
                if region == REGION_OF[place] or self.chance(0.6):
                    seen[region] = other
            for region in SIDES[OPPOSITE[place]]:
                if self.chance(0.7):
                    seen[region] = whole
            if self.chance(0.3):  # neither is the whole
                seen[0] = self.verdicts.unsure
        colour = NO_COLOUR if self.chance(0.35) else int(self.rng.integers(NO_COLOUR))
        ground = NO_COLOUR if self.chance(0.35) else int(self.rng.integers(NO_COLOUR))
        light = int(self.rng.choice(len(LIGHTS), p=[0.2, 0.6, 0.2]))
        return Sight(tuple(seen), colour, ground, light)

    def related(self, verdict: int) -> int:
        """What a region may say besides: another of the kind, the kind, the category."""
        meaning = self.verdicts.meanings[verdict]
        if isinstance(meaning, Concept):
            kind = self.kind_of[meaning.zh]
            near = [*self.members[kind.key], kind, kind.category]
            return self.number[self.choose(near)]
        if isinstance(meaning, Kind):
            return self.number[self.choose([*self.members[meaning.key], meaning.category])]
        if isinstance(meaning, Category):
            inside = [k for k in self.number if isinstance(k, Kind) and k.category == meaning]
            return self.number[self.choose(inside)]
        return int(self.rng.integers(len(self.verdicts.meanings)))

    def meaning(self, sight: Sight, region: int = 0) -> Meaning:
        return self.verdicts.meanings[sight.verdicts[region]]

    def main(self, sight: Sight) -> Meaning:
        """What the picture is of: the whole's verdict."""
        return self.meaning(sight)

    def things_in(self, sight: Sight) -> list[Concept]:
        """Things by name: the whole's first, then those that at least two regions show."""
        found = [self.meaning(sight)]
        for verdict in dict.fromkeys(sight.verdicts[1:]):
            if sight.verdicts[1:].count(verdict) > 1:
                found.append(self.verdicts.meanings[verdict])
        return list(dict.fromkeys(m for m in found if isinstance(m, Concept)))

    def covers(self, wide: Meaning, narrow: Meaning) -> bool:
        """Is everything that is `narrow` also `wide`?"""
        if wide == narrow:
            return True
        if isinstance(wide, Category):
            return isinstance(narrow, Concept | Kind) and narrow.category == wide
        if isinstance(wide, Kind) and isinstance(narrow, Concept):
            return self.kind_of.get(narrow.zh) == wide
        # a drawn dog, of which photographs show many kinds
        return isinstance(wide, Concept) and isinstance(narrow, Concept | Kind) and (
            wide.zh == (narrow.zh if isinstance(narrow, Kind) else self.kind_name(narrow))
        )  # fmt: skip

    def kind_name(self, thing: Concept) -> str:
        kind = self.kind_of.get(thing.zh)
        return kind.zh if kind else ""

    # --- answers

    def say_seen(self, sight: Sight, lang: str) -> str:
        """The answer to "what is this"."""
        meaning = self.main(sight)
        if isinstance(meaning, Concept):
            return self.say_name(meaning, lang)
        if isinstance(meaning, Kind):
            if lang == "zh":
                return f"这是一种{meaning.zh}。"
            return f"This is a kind of {meaning.en}."
        if isinstance(meaning, Category):
            if lang == "zh":
                return f"这属于{meaning.zh}。"
            return f"This is something of the category {meaning.en}."
        return self.say_unsure(sight, lang)

    def say_unsure(self, sight: Sight, lang: str) -> str:
        """Not sure, and what can be said all the same."""
        colour = self.say_ground(sight, lang, of="picture")
        if lang == "zh":
            return f"我不确定这是什么。{colour}"
        return f"I am not sure what this is. {colour}".strip()

    def say_ground(self, sight: Sight, lang: str, *, of: str) -> str:
        """The colour of the surroundings, and how light the picture is if that is notable."""
        light = LIGHTS[sight.light]
        parts = []
        if sight.ground != NO_COLOUR:
            _, zh, en = COLOURS[sight.ground]
            what = ("背景" if of == "ground" else "图片") if lang == "zh" else of
            what = "background" if what == "ground" else what
            parts.append(f"{what}主要是{zh}。" if lang == "zh" else f"The {what} is mostly {en}.")
        if light[0] != "medium":
            parts.append(f"图片比较{light[1]}。" if lang == "zh" else f"The picture is {light[0]}.")
        return ("" if lang == "zh" else " ").join(parts)

    def counted(self, meaning: Meaning, lang: str) -> str:
        """一只金毛寻回犬 / a golden retriever"""
        if isinstance(meaning, Kind):
            return f"一种{meaning.zh}" if lang == "zh" else f"a kind of {meaning.en}"
        assert isinstance(meaning, Concept)
        if lang == "zh":
            return f"一{self.measure.get(meaning.zh, '个')}{meaning.zh}"
        return noun(meaning.en)

    def shown(self, sight: Sight) -> list[Meaning]:
        """What the picture shows: things, and the whole's kind if no thing is of it."""
        shown: list[Meaning] = list(self.things_in(sight))
        main = self.main(sight)
        if isinstance(main, Kind) and not any(self.covers(main, t) for t in shown):
            shown.insert(0, main)
        return shown

    def say_shown(self, sight: Sight, lang: str) -> str:
        """Everything that is seen, in one sentence."""
        if not (shown := self.shown(sight)):
            if self.main(sight) is None:
                return self.say_unsure(sight, lang)
            return self.say_seen(sight, lang)
        names = join([self.counted(m, lang) for m in shown], lang)
        return f"图里有{names}。" if lang == "zh" else f"The picture shows {names}."

    def describe(self, sight: Sight, lang: str) -> str:
        """The whole picture in one or two sentences."""
        first = self.say_shown(sight, lang)
        if not self.shown(sight) and self.main(sight) is None:
            return first  # it speaks of the colours already
        ground = self.say_ground(sight, lang, of="ground")
        return f"{first}{ground}" if lang == "zh" else f"{first} {ground}".strip()

    def say_rest(self, sight: Sight, known: Meaning, lang: str) -> str:
        """What else there is besides what is known."""
        rest = [m for m in self.shown(sight) if m != known]
        if not rest:
            return "没看到别的。" if lang == "zh" else "I see nothing else."
        names = join([self.counted(m, lang) for m in rest], lang)
        return f"还有{names}。" if lang == "zh" else f"There is also {names}."

    def spot(self, sight: Sight, meaning: Meaning) -> str | None:
        """Where something is that is seen: the one side or corner that shows it, else the middle.

        None if no part of the picture shows it.
        """
        sides = [p for p in REGION_OF if self.meaning(sight, REGION_OF[p]) == meaning]
        if len(sides) == 1:
            return sides[0]
        across = [p for p in sides if p in ("left", "right")]
        down = [p for p in sides if p in ("top", "bottom")]
        if len(across) == len(down) == 1:
            return f"{down[0]} {across[0]}"
        if not sides:
            parts = [p for p in PART if self.meaning(sight, PART[p]) == meaning]
            if len(parts) == 1:
                return parts[0]
            if not parts and self.main(sight) != meaning:
                return None
        return "middle"

    def say_spot(self, sight: Sight, asked: Meaning, lang: str) -> str:
        """The answer to "where is X"."""
        name = self.called(asked, lang)
        place = self.spot(sight, asked)
        if place is None:
            if self.main(sight) is None and not self.shown(sight):
                return self.say_unsure(sight, lang)
            return f"没看到{name}。" if lang == "zh" else f"I see no {name}."
        where = PLACES[place][lang == "en"][0]
        return f"{name}在{where}。" if lang == "zh" else f"The {name} is {where}."

    def say_photo_trait(self, sight: Sight, trait: str, lang: str) -> str:
        """Yes or no, with the reason; not sure where even the category is not."""
        meaning = self.main(sight)
        if isinstance(meaning, Concept):
            if trait in SIZE:  # concepts.txt does not speak of it
                meaning = replace(meaning, traits=self.class_of[meaning.zh].traits)
            return self.say_trait(meaning, trait, lang)
        if isinstance(meaning, Kind) and trait not in meaning.unasked:
            yes = trait in meaning.traits
            if lang == "zh":
                return f"{YES_NO_ZH[trait][not yes]}。这是一种{meaning.zh}。"
            return f"{'Yes' if yes else 'No'}. It is a kind of {meaning.en}."
        return self.say_unsure(sight, lang) if meaning is None else self.hedge(sight, lang)

    def hedge(self, sight: Sight, lang: str) -> str:
        """What a kind or category leaves open."""
        return ("我不确定。" if lang == "zh" else "I am not sure. ") + self.say_seen(sight, lang)

    def say_photo_category(self, sight: Sight, lang: str) -> str:
        meaning = self.main(sight)
        if isinstance(meaning, Concept):
            return self.say_category(meaning, lang)
        if isinstance(meaning, Kind):
            if lang == "zh":
                return f"这是一种{meaning.zh}。它属于{meaning.category.zh}。"
            return f"It is a kind of {meaning.en}, category {meaning.category.en}."
        return self.say_seen(sight, lang)

    def say_photo_colour(self, sight: Sight, lang: str) -> str:
        if self.main(sight) is None:
            return self.say_unsure(sight, lang)
        if sight.colour == NO_COLOUR:
            return "它有好几种颜色。" if lang == "zh" else "It has several colours."
        _, zh, en = COLOURS[sight.colour]
        return f"它是{zh}的。" if lang == "zh" else f"It is {en}."

    def say_is(self, sight: Sight, asked: Meaning, lang: str) -> str:
        """Is it an asked thing or kind? "Perhaps" where only its kind is known."""
        meaning = self.main(sight)
        seen = self.say_seen(sight, lang)
        if meaning is None:
            return seen
        if self.covers(asked, meaning):
            return ("是的。" if lang == "zh" else "Yes. ") + seen
        if self.covers(meaning, asked):
            return ("可能是。" if lang == "zh" else "Perhaps. ") + seen
        return ("不是。" if lang == "zh" else "No. ") + seen

    # --- questions

    def asked_thing(self, sight: Sight) -> Meaning:
        """A thing or kind to ask about: what is there, what is near it, or anything."""
        meaning = self.main(sight)
        roll = self.rng.random()
        if meaning is None or isinstance(meaning, Category) or roll < 0.3:
            return self.choose(self.verdicts.meanings[: sum(self.verdicts.levels[:2])])
        if roll < 0.65:
            return meaning
        kind = meaning if isinstance(meaning, Kind) else self.kind_of[meaning.zh]
        return self.choose([*self.members[kind.key], kind])

    def photo_trait(self, meaning: Meaning) -> str:
        """A trait worth asking about, a true one in a third of the cases."""
        if isinstance(meaning, Concept):
            asked = [t for t in SIZE if t not in self.class_of[meaning.zh].unasked]
            return self.choose(asked) if asked and self.chance(0.15) else self.pick_trait(meaning)
        known = [t for t in YES_NO_ZH if t in PHOTO_TRAITS]
        true = [t for t in known if isinstance(meaning, Kind) and t in meaning.traits]
        if true and self.chance(0.35):
            return self.choose(true)
        return self.choose(["animal", "food", "fly", "plant"] if self.chance(0.6) else known)

    def photo_round(self, sight: Sight, lang: str, *, first: bool) -> tuple[str, str]:
        """One question about a photograph with its answer."""
        meaning = self.main(sight)
        roll = self.rng.random() if first else self.rng.uniform(0.42, 1)
        if roll < 0.28:
            return self.ask("name", lang), self.say_seen(sight, lang)
        if roll < 0.40:
            return self.ask("describe", lang), self.describe(sight, lang)
        if roll < 0.42:
            return self.ask("list", lang), self.say_shown(sight, lang)
        if roll < 0.50:
            return self.ask("category", lang), self.say_photo_category(sight, lang)
        if roll < 0.64:
            trait = self.photo_trait(meaning)
            return self.ask(trait, lang), self.say_photo_trait(sight, trait, lang)
        if roll < 0.71:
            if isinstance(meaning, Concept | Kind) and self.chance(0.2):
                question = self.ask("colour_x", lang, x=self.called(meaning, lang))
                return question, self.say_photo_colour(sight, lang)
            return self.ask("colour", lang), self.say_photo_colour(sight, lang)
        if roll < 0.75:
            ground = self.say_ground(sight, lang, of="ground")
            if sight.ground == NO_COLOUR:
                ground = (
                    "背景有好几种颜色。" if lang == "zh" else "The background has several colours."
                )
            return self.ask("ground", lang), ground
        if roll < 0.81:
            asked = self.asked_thing(sight)
            question = self.ask("is_x", lang, x=self.called(asked, lang))
            return question, self.say_is(sight, asked, lang)
        if roll < 0.86:
            return self.either_photo(sight, lang)
        if roll < 0.90:
            return self.exists_photo(sight, lang)
        if roll < 0.925:
            return self.at_photo(sight, lang, first=first)
        if roll < 0.945:
            return self.where_photo(sight, lang)
        if roll < 0.965:
            return self.rest_photo(sight, lang)
        if roll < 0.985:
            if self.chance(0.4):
                asked = self.called(self.asked_thing(sight), lang)
                return self.ask("count_x", lang, x=asked), self.say_uncounted(sight, lang)
            return self.ask("count", lang), self.say_uncounted(sight, lang)
        if not isinstance(meaning, Concept):
            return self.ask("name", lang), self.say_seen(sight, lang)
        to = "en" if lang == "zh" else "zh"
        return self.ask(f"to_{to}", lang), self.say_translation(meaning, to, lang)

    def called(self, meaning: Meaning, lang: str) -> str:
        assert meaning is not None
        return meaning.zh if lang == "zh" else meaning.en

    def say_uncounted(self, sight: Sight, lang: str) -> str:
        """Photographs are not counted: what is there is said instead."""
        if not self.things_in(sight):
            return self.say_unsure(sight, lang)
        names = join([self.the(t, lang) for t in self.things_in(sight)], lang)
        if lang == "zh":
            return f"照片里的东西我数不准。我看到{names}。"
        return f"I cannot count things in photos. I see {names}."

    def either_photo(self, sight: Sight, lang: str) -> tuple[str, str]:
        """Which of two? One of them is right, or none if not even the kind is known."""
        meaning = self.main(sight)
        if isinstance(meaning, Concept):
            wrong = self.other(meaning.index)
        else:
            wrong = self.choose(self.concepts)
        right = meaning if isinstance(meaning, Concept | Kind) else self.choose(self.concepts)
        pair = [self.called(right, lang), self.called(wrong, lang)]
        self.rng.shuffle(pair)
        return self.ask("either", lang, a=pair[0], b=pair[1]), self.say_seen(sight, lang)

    def exists_photo(self, sight: Sight, lang: str) -> tuple[str, str]:
        """Is there a dog in it? Also in a region alone."""
        asked = self.asked_thing(sight)
        named = self.things_in(sight)
        if named and self.chance(0.4):
            asked = self.choose(named)
        question = self.ask("exists", lang, x=self.called(asked, lang))
        seen = [*named, self.main(sight)]
        hits = [m for m in seen if m is not None and self.covers(asked, m)]
        if hits:
            hit = hits[0]
            what = self.counted(hit, lang) if not isinstance(hit, Category) else hit.zh
            return question, f"有。图里有{what}。" if lang == "zh" else f"Yes. I see {what}."
        if self.main(sight) is None:
            return question, self.say_unsure(sight, lang)
        if self.covers(self.main(sight), asked):
            perhaps = "可能有。" if lang == "zh" else "Perhaps. "
            return question, perhaps + self.say_seen(sight, lang)
        no = "没看到。" if lang == "zh" else "I do not see that. "
        return question, no + self.say_seen(sight, lang)

    def at_photo(self, sight: Sight, lang: str, *, first: bool) -> tuple[str, str]:
        """What is on a side of the picture, in its middle, in a corner?"""
        place = self.choose(list(REGION_OF) if self.chance(0.7) else list(PART))
        intent = "at" if first or self.chance(0.5) else "at_next"
        question = self.ask(intent, lang, p=self.choose(PLACES[place][lang == "en"]))
        meaning = self.meaning(sight, PART[place])
        if not isinstance(meaning, Concept | Kind):
            return question, self.hedge(sight, lang) if self.main(sight) else self.say_unsure(
                sight, lang
            )
        if isinstance(meaning, Concept):
            return question, self.say_at(place, [Thing(meaning.index, place, None)], lang)
        if lang == "zh":
            return question, f"{PLACES[place][0][0]}是一种{meaning.zh}。"
        where = PLACES[place][1][0]
        return question, f"{where[0].upper()}{where[1:]} I see a kind of {meaning.en}."

    def where_photo(self, sight: Sight, lang: str) -> tuple[str, str]:
        """Where is something that is seen, or now and then something that is not?"""
        shown = self.shown(sight)
        asked = self.choose(shown) if shown and self.chance(0.85) else self.asked_thing(sight)
        if isinstance(asked, Concept | Kind):
            hits = [m for m in shown if self.covers(asked, m)]
            asked = hits[0] if hits else asked  # asked for a dog, it tells where the beagle is
        question = self.ask("where", lang, x=self.called(asked, lang))
        return question, self.say_spot(sight, asked, lang)

    def rest_photo(self, sight: Sight, lang: str) -> tuple[str, str]:
        """What else is there, besides the thing or kind that the whole shows?"""
        shown = self.shown(sight)
        if not shown:
            return self.ask("else", lang, x=self.choose(self.concepts).name(lang)), self.say_seen(
                sight, lang
            )
        question = self.ask("else", lang, x=self.called(shown[0], lang))
        return question, self.say_rest(sight, shown[0], lang)

    # --- several pictures

    def seen_in(self, view: View) -> Meaning:
        return self.concepts[view.concept] if isinstance(view, Thing) else self.main(view)

    def say_nth(self, views: Sequence[View], n: int, lang: str) -> str:
        """What one of several pictures shows."""
        meaning = self.seen_in(views[n])
        if lang == "zh":
            which = ORDINALS_ZH[n]
            if meaning is None:
                return f"我不确定{which}是什么。"
            if isinstance(meaning, Category):
                return f"{which}属于{meaning.zh}。"
            return f"{which}是{'一种' if isinstance(meaning, Kind) else ''}{meaning.zh}。"
        which = f"{ORDINALS_EN[n]} picture"
        if meaning is None:
            return f"I am not sure what the {which} shows."
        if isinstance(meaning, Category):
            return f"The {which} shows something of the category {meaning.en}."
        return f"The {which} shows {self.as_seen(meaning, lang)}."

    def as_seen(self, meaning: Concept | Kind, lang: str) -> str:
        """金毛寻回犬, 一种狗 / a golden retriever, a kind of dog"""
        if isinstance(meaning, Kind):
            return f"一种{meaning.zh}" if lang == "zh" else f"a kind of {meaning.en}"
        return self.the(meaning, lang)

    def say_all(self, views: Sequence[View], lang: str) -> str:
        said = [self.say_nth(views, n, lang) for n in range(len(views))]
        return ("" if lang == "zh" else " ").join(said)

    def say_same(self, views: Sequence[View], lang: str) -> str:
        """Do two pictures show the same? Not sure where less than a name is known of one."""
        one, two = (self.seen_in(v) for v in views)
        if isinstance(one, Concept) and one == two:
            what = self.as_seen(one, lang)
            return f"一样。都是{what}。" if lang == "zh" else f"Yes. Both show {what}."
        if isinstance(one, Kind) and one == two:
            what = self.as_seen(one, lang)
            return (
                f"我不确定。都是{what}。" if lang == "zh" else f"I am not sure. Both show {what}."
            )
        if one is None or two is None or self.covers(one, two) or self.covers(two, one):
            unsure = "我不确定。" if lang == "zh" else "I am not sure. "
            return unsure + self.say_all(views, lang)
        return ("不一样。" if lang == "zh" else "No. ") + self.say_all(views, lang)

    def say_which(self, views: Sequence[View], asked: Meaning, lang: str) -> str:
        """Which of the pictures show a thing, a kind, something of a category?"""
        hits = [n for n, v in enumerate(views) if self.covers(asked, self.seen_in(v))]
        if not hits:
            return "都不是。" if lang == "zh" else "None of them."
        if len(hits) == len(views):
            if len(hits) == 2:
                return "两张都是。" if lang == "zh" else "Both of them."
            return "全都是。" if lang == "zh" else "All of them."
        if lang == "zh":
            return join([ORDINALS_ZH[n] for n in hits], lang) + "。"
        names = join([ORDINALS_EN[n] for n in hits], lang)
        return f"The {names} picture{'s' if len(hits) > 1 else ''}."

    def ask_nth(self, n: int, lang: str) -> str:
        if n < 2 and self.chance(0.5):
            return self.ask(("first", "second")[n], lang)
        number = self.choose((ORDINALS_ZH[n][1], str(n + 1)))
        return self.ask("nth", lang, n=number if lang == "zh" else ORDINALS_EN[n])

    def about_several(self, views: Sequence[View], lang: str) -> tuple[str, str, View | None]:
        """A question about several pictures with its answer, and the picture it leads to."""
        roll = self.rng.random()
        if roll < 0.5:
            n = int(self.rng.integers(len(views)))
            return self.ask_nth(n, lang), self.say_nth(views, n, lang), views[n]
        if roll < 0.66:
            intent = "both" if len(views) == 2 and self.chance(0.7) else "all"
            if self.chance(0.3):
                intent = self.choose(["name", "list", "describe"])
            elif len(views) == 2 and self.chance(0.3):
                intent = "differ"
            return self.ask(intent, lang), self.say_all(views, lang), None
        if roll < 0.76 and len(views) == 2:
            return self.ask("same", lang), self.say_same(views, lang), None
        asked = self.seen_in(self.choose(list(views)))
        if isinstance(asked, Concept) and self.chance(0.5):
            kind = self.kind_of.get(asked.zh)
            asked = kind if kind and self.chance(0.5) else asked.category
        if asked is None or self.chance(0.1):
            asked = self.choose(self.verdicts.meanings[: sum(self.verdicts.levels[:2])])
        question = self.ask("which", lang, x=self.called(asked, lang))
        return question, self.say_which(views, asked, lang), None

    # --- whole dialogues

    def photo(self, sight: Sight, *, turns: int) -> list[Round]:
        """1 to 4 rounds about one photograph."""
        lang = self.language()
        rounds: list[Round] = []
        for i in range(turns):
            if i and self.chance(0.06):
                lang = "en" if lang == "zh" else "zh"
            question, answer = self.photo_round(sight, lang, first=i == 0)
            rounds.append(Round(question, answer, (0,) if i == 0 else ()))
        return rounds

    def several(self, views: Sequence[View]) -> list[Round]:
        """Two to five pictures, photographs or drawings of one thing, at once or one by one."""
        lang = self.language()
        rounds: list[Round] = []
        at_once = len(views) > 3 or self.chance(0.65)
        if not at_once:
            for n, view in enumerate(views):
                if isinstance(view, Thing):
                    answer = self.say_name(view, lang)
                else:
                    answer = self.say_seen(view, lang)
                rounds.append(Round(self.ask("name", lang), answer, (n,)))
        question, answer, view = self.about_several(views, lang)
        rounds.append(Round(question, answer, tuple(range(len(views))) if at_once else ()))
        if self.chance(0.35):
            if view is not None and self.chance(0.4):
                if isinstance(view, Thing):
                    rounds.append(Round(*self.about(view, lang)))
                else:
                    trait = self.photo_trait(self.main(view))
                    answer = self.say_photo_trait(view, trait, lang)
                    rounds.append(Round(self.ask(trait, lang), answer))
            else:
                rounds.append(Round(*self.about_several(views, lang)[:2]))
        return rounds
