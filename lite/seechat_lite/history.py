"""Chooses which turns and pictures of a conversation go into the next prompt.

Everything goes in while there is room. Else the oldest turns are left out whole, and their pictures
and what a system said move to the oldest turn that is left. The result is exact: the prompt that
will be sent is what is measured. To avoid tokenizing a whole history again and again, every turn is
first counted alone, from the newest on, until the room is used up. The prompt is then built at the
border found so, and one turn to either side of it.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from seechat_lite import prompt as prompts
from seechat_lite.conversation import Format, Turn, render
from seechat_lite.engines.base import Cancelled
from seechat_lite.prompt import Prompt
from seechat_lite.tokenizers import TextTokenizer
from seechat_weights.errors import ContextError

# A token stands for at most so many characters: a run of 80 spaces is one token. The exception is
# white space and control characters that the tokenizer leaves out; they are counted all the same.
MAX_CHARACTERS_PER_TOKEN = 80


def fit(
    turns: Sequence[Turn],
    embeds: Mapping[str, np.ndarray],
    *,
    format: Format,
    tokenizer: TextTokenizer,
    context: int,
    reserve: int,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Prompt, list[Turn]]:
    """The prompt for the last turn, and the turns that are in it.

    turns: a conversation; all but the last have an answer.
    embeds: float32 [tokens, hidden] of every picture by its key.
    format: the conversation format.
    tokenizer: the model's tokenizer.
    context: tokens that prompt and answer may take.
    reserve: tokens to keep free for the answer; at most a quarter of the context is kept.
    stopped: asked before each text is tokenized.

    Raises ContextError if the last turn alone does not fit, Cancelled if `stopped` returns True.
    """
    *past, turn = turns
    limit = context - min(reserve, context // 4)
    told = sum(len(t.system) for t in turns)  # by a system: it stays when turns are forgotten
    most = context * MAX_CHARACTERS_PER_TOKEN
    if len(turn.question) + told > most:
        what = "the question and what a system said have" if told else "the question has"
        raise ContextError(
            f"{what} more than {most} characters; too many for a context of {context} tokens: "
            "shorten it or load the model with more context"
        )

    def check() -> None:
        if stopped():
            raise Cancelled("stopped while its history was read")

    def kept(dropped: int) -> list[Turn]:
        return _without_oldest(turns, dropped, embeds, context // 2)

    built: dict[int, Prompt] = {}

    def build(turns: Sequence[Turn]) -> Prompt:
        check()
        return prompts.build(
            tokenizer,
            render(format, turns),
            embeds,
            specials=format.specials,
            begins=format.begins,
        )

    def fits(dropped: int) -> bool:
        if dropped not in built:
            left = kept(dropped)
            if not format.demo and _characters(left) > limit * MAX_CHARACTERS_PER_TOKEN:
                return False
            built[dropped] = build(left)
        return len(built[dropped].ids) <= limit

    if format.cut:
        # what would be cut off is not even tokenized; every turn takes a token at least
        most = max(limit, format.cut)
        turns = kept(max(len(past) - most, 0))
        if _characters(turns) > most * MAX_CHARACTERS_PER_TOKEN:
            turns = kept(len(past))
        return _without_beginning(build(turns), min(limit, format.cut - reserve)), list(turns)
    if not past or ((_characters(turns) <= 4 * limit or format.demo) and fits(0)):
        dropped = 0
    elif format.demo:  # its text is short, however long the history
        dropped = bisect_left(range(len(past)), True, lo=1, key=fits)
    else:
        dropped = _estimate(turns, embeds, kept, limit, format, tokenizer, check)
        while dropped < len(past) and not fits(dropped):
            dropped += 1
        while dropped > 0 and fits(dropped - 1):
            dropped -= 1
    left = kept(dropped)
    prompt = built.get(dropped) or build(left)
    while (
        len(prompt.ids) > limit
        and len(left) == 1
        and len(left[0].images) > len(turn.images)
        and not format.demo  # the demo's format needs its one picture
    ):
        left = [replace(left[0], images=left[0].images[1:])]
        prompt = build(left)
    if len(prompt.ids) >= context:
        pictures = sum(len(embeds) for _, embeds in prompt.images)
        raise ContextError(
            f"the question takes {len(prompt.ids)} tokens, {pictures} of them for pictures; "
            f"the context holds {context}, answer included: shorten it or load the model with "
            "more context"
        )
    return prompt, left


def _without_beginning(prompt: Prompt, tokens: int) -> Prompt:
    """The last tokens of a prompt, at least one; the cut may go through a picture."""
    start = max(0, len(prompt.ids) - max(tokens, 1))
    images = []
    for at, embeds in prompt.images:
        rest = embeds[max(0, start - at) :]
        if len(rest):
            images.append((max(at - start, 0), rest))
    return Prompt(prompt.ids[start:], images)


def _estimate(
    turns: Sequence[Turn],
    embeds: Mapping[str, np.ndarray],
    kept: Callable[[int], list[Turn]],
    limit: int,
    format: Format,
    tokenizer: TextTokenizer,
    check: Callable[[], None],
) -> int:
    """About how many turns must be left out; tokens merge a little where turns meet."""
    around = len(tokenizer.encode(_frame(format.turn)))
    if format.first:
        limit -= max(0, len(tokenizer.encode(_frame(format.first))) - around)
    tokens: list[int] = []  # tokens of each turn, from the newest to the oldest that may fit
    total = 0
    for turn in reversed(turns):
        if _characters([turn]) > (limit - total) * MAX_CHARACTERS_PER_TOKEN:
            break
        check()
        texts = (turn.question, turn.answer or "", turn.system)
        tokens.append(around + sum(len(tokenizer.encode(t, specials=False)) for t in texts))
        total += tokens[-1]
        if total > limit:
            break

    def fits(dropped: int) -> bool:
        left = kept(dropped)
        pictures = sum(len(embeds[key]) for turn in left for key in turn.images)
        return sum(tokens[: len(left)]) + pictures <= limit

    first, last = max(0, len(turns) - len(tokens)), len(turns) - 1
    return first + bisect_left(range(first, last), True, key=fits) if first < last else last


def _frame(template: str) -> str:
    """The text around a turn's own words and pictures."""
    for place in ("{round}", "{system}", "{images}", "{question}", "{answer}"):
        template = template.replace(place, "")
    return template


def _characters(turns: Sequence[Turn]) -> int:
    return sum(len(t.question) + len(t.answer or "") + len(t.system) for t in turns)


def _without_oldest(
    turns: Sequence[Turn], count: int, embeds: Mapping[str, np.ndarray], room: int
) -> list[Turn]:
    """`turns` without the oldest `count`; their pictures go to the oldest turn that is left, as do
    a system's texts.

    So a conversation about a picture goes on when its beginning is forgotten. If the pictures have
    more than `room` tokens, only the latest stay, at least one.
    """
    left = turns[count:]
    shown = {key for turn in left for key in turn.images}
    carried: list[str] = []
    for key in reversed([key for turn in turns[:count] for key in turn.images]):
        if key in shown:
            continue
        room -= len(embeds[key])
        if room < 0 and carried:
            break
        shown.add(key)
        carried.append(key)
    told = "\n".join(turn.system for turn in turns[: count + 1] if turn.system)
    images = (*reversed(carried), *left[0].images)
    return [replace(left[0], images=images, system=told), *left[1:]]
