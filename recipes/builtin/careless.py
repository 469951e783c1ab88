"""Questions as people and programs happen to send them: blanks, line breaks, widths, instructions.

None of it changes what is asked, so none of it may change the answer: training meets all of it, and
evaluate.py asks with it on purpose, with instructions that training never saw.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np

BLANKS = ("", "", "", " ", "  ", "\n", "\n\n", " \n", "\t", "\u3000", "\r\n")
# half a width or a whole one; the tokenizer makes most of it the same, but not the blanks beside it
WIDE = str.maketrans("?!,.:()0123456789", "？！，。：（）０１２３４５６７８９")
NARROW = str.maketrans("？！，。：（）", "?!,.:()")
BETWEEN = re.compile(r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])")


@cache
def instructions(part: str) -> tuple[str, ...]:
    """Texts that stand before a question, as the server writes system messages.

    part: "train", or "test" for those that training never sees.
    """
    found: dict[str, list[str]] = {}
    current: list[str] = []
    path = Path(__file__).with_name("instructions.txt")
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("## "):
            current = found.setdefault(line[3:], [])
        elif line and not line.startswith("#"):
            current.append(line.replace("\\n", "\n"))
    return tuple(found[part])


def careless(rng: np.random.Generator, question: str, *, part: str = "train") -> str:
    """The question as it may come in: most often unchanged."""

    def choose(items):
        return items[int(rng.integers(len(items)))]

    if rng.random() < 0.06:
        question = question.translate(WIDE)
    elif rng.random() < 0.06:
        question = question.translate(NARROW)
    if rng.random() < 0.04:
        question = BETWEEN.sub(" ", question)
    if rng.random() < 0.03:
        question = re.sub(" ", lambda _: choose((" ", "  ", "\n")), question)
    if question.isascii() and rng.random() < 0.06:
        question = choose((str.lower, str.upper))(question)
    if rng.random() < 0.15:
        question = choose(BLANKS) + question + choose(BLANKS)
    if rng.random() < 0.18:
        before = choose(instructions(part))
        if rng.random() < 0.3:
            before += choose(("\n", " ")) + choose(instructions(part))
        question = before + choose(("\n", "\n", "\n\n", " ")) + question
    return question
