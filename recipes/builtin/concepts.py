"""The concepts: names in two languages, categories and traits, read from concepts.txt."""

import re
from dataclasses import dataclass, field
from pathlib import Path

TRAITS = (
    "animal",
    "plant",
    "food",
    "drink",
    "fly",
    "swim",
    "wear",
    "vehicle",
    "music",
    "building",
    "electric",
)


@dataclass(frozen=True)
class Category:
    key: str
    zh: str
    en: str


@dataclass(frozen=True)
class Concept:
    """One thing the model can name; `drawings` are code points, FE0F stripped, "-" between."""

    index: int
    zh: str
    en: str
    category: Category
    drawings: tuple[str, ...]
    traits: frozenset[str]  # what holds
    unasked: frozenset[str] = field(default=frozenset())  # traits that people would argue about

    def name(self, lang: str) -> str:
        return self.zh if lang == "zh" else self.en


def hexcode(emoji: str) -> str:
    return "-".join(f"{ord(c):X}" for c in emoji if c != "\ufe0f")


def split_emoji(text: str) -> list[str]:
    """Cut a run of emoji into single ones; a zero-width joiner ties two together."""
    return re.findall(r"[^\u200d\ufe0f](?:\ufe0f?\u200d[^\u200d\ufe0f])*\ufe0f?", text)


def load_concepts(path: Path | None = None) -> list[Concept]:
    """All concepts in file order. Raises ValueError naming the line that cannot be read."""
    path = path or Path(__file__).with_name("concepts.txt")
    concepts: list[Concept] = []
    category, inherited = None, frozenset[str]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("## "):
            match = re.fullmatch(r"## (\w+) ([^|]+)\|([^:]+?)(?: : (.+))?", line)
            if not match:
                raise ValueError(f"{path}:{number}: expected '## key zh|en : traits', got {line!r}")
            category = Category(*match.groups()[:3])
            inherited = frozenset((match[4] or "").split())
        elif line and not line.startswith("#"):
            match = re.fullmatch(r"(\S+) ([^|]+)\|(.+?)((?: [-+?]\w+)*)", line)
            if not match or category is None:
                raise ValueError(f"{path}:{number}: expected 'drawings zh|en', got {line!r}")
            emoji, zh, en, marks = match.groups()
            by_sign = {s: frozenset(m[1:] for m in marks.split() if m[0] == s) for s in "-+?"}
            drawings = tuple(hexcode(e) for e in split_emoji(emoji))
            traits = (inherited | by_sign["+"]) - by_sign["-"]
            unknown = (by_sign["-"] | by_sign["+"] | by_sign["?"]) - set(TRAITS)
            if unknown:
                raise ValueError(f"{path}:{number}: unknown traits {sorted(unknown)}")
            index = len(concepts)
            concepts.append(Concept(index, zh, en, category, drawings, traits, by_sign["?"]))
    return concepts
