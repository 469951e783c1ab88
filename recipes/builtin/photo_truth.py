"""What is right about a test photograph, and how an answer compares with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from concepts import Category, Concept
from photo_classes import Kind, _rows, load_classes, load_kinds, load_things

OUTCOMES = ("right", "right kind", "wrong", "refused")
ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp"))


@dataclass(frozen=True)
class Truth:
    """names: right answers; synonyms: other names of what is shown; kinds and categories: keys of
    what is less exact, but not wrong."""

    names: frozenset[str]
    synonyms: frozenset[str]
    kinds: frozenset[str]
    categories: frozenset[str]

    def judge(self, said: Concept | Kind | Category | None) -> str:
        """One of OUTCOMES; None stands for "not sure"."""
        if said is None:
            return "refused"
        if isinstance(said, Category):
            return "right kind" if said.key in self.categories else "wrong"
        if isinstance(said, Kind):
            if self.names & {said.en, said.zh}:
                return "right"
            return "right kind" if said.key in self.kinds else "wrong"
        if self.names & names_of(said) or self.synonyms & {said.en, said.zh}:
            return "right"
        if self.kinds & kinds_of(said.zh):
            return "right kind"
        kind = _kinds_by_name().get(said.zh)  # a drawn dog, of which there are many kinds in photos
        return self.judge(kind) if kind else "wrong"


@cache
def _by_thing() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """By a thing's Chinese name: what else it may be called, also by its kind; its kinds' keys."""
    names: dict[str, set[str]] = {}
    kinds: dict[str, set[str]] = {}
    for c in load_classes():
        names.setdefault(c.zh, set()).update((c.en, *c.also_en, c.kind.en))
        kinds.setdefault(c.zh, set()).add(c.kind.key)
    return names, kinds


@cache
def _kinds_by_name() -> dict[str, Kind]:
    return {k.zh: k for k in load_kinds().values()}


def names_of(thing: Concept) -> frozenset[str]:
    """Names for which this thing is a right answer: its own and less exact ones."""
    return frozenset(_by_thing()[0].get(thing.zh, ())) | {thing.en, thing.zh}


def kinds_of(zh: str) -> frozenset[str]:
    """Keys of the kinds of a thing, by its Chinese name; none for things that are only drawn."""
    return frozenset(_by_thing()[1].get(zh, ()))


def truth(names: str, kinds: str) -> Truth:
    """The truth of one line of test_labels.tsv. Raises ValueError for names that nothing has."""
    things, _ = load_things()
    right = frozenset(names.split(","))
    more = frozenset() if kinds == "-" else frozenset(kinds.split(","))
    if unknown := more - set(load_kinds()):
        raise ValueError(f"unknown kinds {sorted(unknown)}")
    known: set[str] = set()
    keys, categories = set(more), {load_kinds()[k].category.key for k in more}
    synonyms: set[str] = set()  # of what is shown itself
    for c in load_classes():
        called = right & {c.en, *c.also_en}
        known |= called
        if called:
            keys.add(c.kind.key)
            categories.add(c.kind.category.key)
        if c.en in right:
            synonyms.update(c.also_en, c.also_zh)
    for kind in load_kinds().values():
        if kind.en in right:
            known.add(kind.en)
            keys.add(kind.key)
            categories.add(kind.category.key)
    for thing in things:
        if thing.en in right:
            known.add(thing.en)
            categories.add(thing.category.key)
    if right - known:
        raise ValueError(f"nothing is called {sorted(right - known)}")
    return Truth(right, frozenset(synonyms), frozenset(keys), frozenset(categories))


def labels(chosen: str, path: Path | None = None) -> list[tuple[str, Truth]]:
    """File pattern and truth of every line of one set. Raises ValueError naming a wrong line."""
    path = path or Path(__file__).with_name("test_labels.tsv")
    found = []
    for number, row in _rows(path):
        try:
            line = row["file"], truth(row["names"], row["kinds"])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if row["set"] == chosen:
            found.append(line)
    return found


def pictures(folder: Path, chosen: str) -> Iterator[tuple[Path, Truth]]:
    """The files under a folder that a set has a line for, sorted, with what they show.

    A pattern holds for the end of a path: bears/* is for everything in folders called bears.
    """
    lines = labels(chosen)
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in ENDINGS:
            continue
        path = PurePosixPath(file.relative_to(folder).with_suffix("").as_posix())
        fits = [t for p, t in lines if path.match(p)]
        if fits:
            yield file, fits[-1]
