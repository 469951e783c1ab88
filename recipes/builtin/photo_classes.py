"""The thousand classes of the expert's own head: names, kinds, categories and traits.

Read from photo_classes.tsv and photo_kinds.tsv, and joined with the drawn concepts to one list of
things: a panda is the same panda in a photograph and in a drawing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from concepts import TRAITS, Category, Concept, load_concepts

CLASSES = 1000
# what can be asked about photographs besides: has it wheels, is it usually bigger than a person
PHOTO_TRAITS = (*TRAITS, "wheels", "big")
PERSON = Category("person", "人", "person")  # the one category without drawings
NOTHING = "-"  # what a cell holds where there is nothing to say
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """What several classes have in common, and how it is called: "a kind of bird"."""

    key: str
    zh: str
    en: str
    category: Category
    measure: str  # 一只, 一辆
    traits: frozenset[str]
    unasked: frozenset[str]  # traits that people would argue about

    def name(self, lang: str) -> str:
        return self.zh if lang == "zh" else self.en


@dataclass(frozen=True)
class PhotoClass:
    """One output of the expert's head."""

    index: int
    zh: str
    en: str
    kind: Kind
    measure: str
    traits: frozenset[str]
    unasked: frozenset[str]
    also_zh: tuple[str, ...]  # other names that are right
    also_en: tuple[str, ...]

    def name(self, lang: str) -> str:
        return self.zh if lang == "zh" else self.en


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column. Raises ValueError naming the line that cannot be read."""
    header: list[str] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("#"):
            continue
        cells = line.split("\t")
        if not header:
            header = cells
            continue
        if len(cells) != len(header) or not all(c and c == c.strip() for c in cells):
            raise ValueError(f"{path}:{number}: expected {len(header)} cells, none empty: {line!r}")
        yield number, dict(zip(header, cells, strict=True))


def _marks(text: str, where: str) -> dict[str, frozenset[str]]:
    """Traits by sign: "" holds, "+" holds, "-" does not, "?" is not to be asked."""
    signs: dict[str, set[str]] = {"+": set(), "-": set(), "?": set()}
    for mark in () if text == NOTHING else text.split():
        sign, trait = (mark[0], mark[1:]) if mark[0] in signs else ("+", mark)
        if trait not in PHOTO_TRAITS:
            raise ValueError(f"{where}: unknown trait {trait!r}")
        signs[sign].add(trait)
    return {sign: frozenset(traits) for sign, traits in signs.items()}


@cache
def load_kinds(path: Path = HERE / "photo_kinds.tsv") -> dict[str, Kind]:
    """Kinds by key. Raises ValueError naming the line that cannot be read."""
    categories = {c.category.key: c.category for c in load_concepts()} | {PERSON.key: PERSON}
    kinds = {}
    for number, row in _rows(path):
        if row["category"] not in categories:
            raise ValueError(f"{path}:{number}: unknown category {row['category']!r}")
        marks = _marks(row["traits"], f"{path}:{number}")
        category = categories[row["category"]]
        names = (row["key"], row["zh"], row["en"])
        kinds[row["key"]] = Kind(*names, category, row["measure"], marks["+"], marks["?"])
    return kinds


@cache
def load_classes(path: Path = HERE / "photo_classes.tsv") -> tuple[PhotoClass, ...]:
    """All classes in the order of the head. Raises ValueError naming the line that is wrong."""

    def names(cell: str) -> tuple[str, ...]:
        return () if cell == NOTHING else tuple(cell.split(","))

    kinds = load_kinds()
    classes: list[PhotoClass] = []
    for number, row in _rows(path):
        if row["kind"] not in kinds:
            raise ValueError(f"{path}:{number}: unknown kind {row['kind']!r}")
        if row["index"] != str(len(classes)):
            raise ValueError(f"{path}:{number}: expected class {len(classes)}, got {row['index']}")
        kind = kinds[row["kind"]]
        marks = _marks(row["marks"], f"{path}:{number}")
        classes.append(
            PhotoClass(
                len(classes),
                row["zh"],
                row["en"],
                kind,
                kind.measure if row["measure"] == NOTHING else row["measure"],
                (kind.traits | marks["+"]) - marks["-"],
                # a mark of the class itself settles what its kind leaves open
                (kind.unasked - marks["+"] - marks["-"]) | marks["?"],
                names(row["also_zh"]),
                names(row["also_en"]),
            )
        )
    if len(classes) != CLASSES:
        raise ValueError(f"{path}: expected {CLASSES} classes, got {len(classes)}")
    return tuple(classes)


def load_things() -> tuple[list[Concept], list[int]]:
    """Everything that has a name: the drawn concepts, then the classes that are none of them.

    Returns the things and, for each class of the head, the number of its thing. A drawn concept
    keeps its own traits; it is not asked for those that concepts.txt does not speak of.
    """
    things = load_concepts()
    by_name = {c.zh: c.index for c in things}
    of_class = []
    for c in load_classes():
        if c.zh not in by_name:
            by_name[c.zh] = len(things)
            things.append(
                Concept(len(things), c.zh, c.en, c.kind.category, (), c.traits, c.unasked)
            )
        of_class.append(by_name[c.zh])
    return things, of_class
