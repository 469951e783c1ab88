"""Guesses the next tokens of an answer from what was said before (prompt lookup).

Running several tokens at once reads the weights once, so it costs little more than running one. An
answer may repeat its prompt or itself (names, code, quotations, lists). Its last tokens are then
looked up earlier in the conversation, and what followed there is the guess. The sampler still
decides every token, from the same logits: guesses change the speed of an answer, not its text. The
only exception is rounding: sums of several rows differ in the last bits, so of two tokens that are
almost equally likely the other one may be taken.
"""

import statistics
from collections import deque
from collections.abc import Sequence

NGRAM = 3  # tokens that must agree
LONGEST = 16  # tokens guessed at once
PAUSE = 64  # tokens without a guess, at most
MEMORY = 8  # guessed tokens after which what went before counts for half
BEFORE = (3.0, 4.0)  # right ones of guessed ones that every answer begins with
# what a further token costs, in steps: measured on AVX-512 VNNI, on AVX2, and slower than both
ROW_COSTS = (0.13, 0.35, 0.7)
ENOUGH = 3  # measurements of each kind


class RowCost:
    """What one more token in a call costs, in steps of one token.

    The first calls of a loaded model tell. The result is one of a few values that are far from each
    other, so that the same machine always finds the same one: how long guesses are may move sums by
    their last bits, and answers should come out alike.
    """

    def __init__(self) -> None:
        self.value = ROW_COSTS[0]
        self.known = False
        self._steps: deque[float] = deque(maxlen=3 * ENOUGH)  # seconds
        self._costs: list[float] = []

    def note(self, tokens: int, seconds: float) -> None:
        """Note how long a call took.

        tokens: how many were run together.
        seconds: that it took.
        """
        if self.known:
            return
        if tokens == 1:
            self._steps.append(seconds)
        elif tokens > 2 and len(self._steps) >= ENOUGH:  # two cost about what the noise does
            self._costs.append((seconds / statistics.median(self._steps) - 1) / (tokens - 1))
            if len(self._costs) == ENOUGH:
                # a busy moment only ever makes a call slower
                self.value = min(ROW_COSTS, key=lambda c: abs(c - min(self._costs)))
                self.known = True


class PromptLookup:
    """Makes guesses for one answer, and counts how many were right.

    prompt_ids: the prompt's ids.
    cost: what tokens cost where the answer is made; measured on.
    """

    def __init__(self, prompt_ids: Sequence[int], cost: RowCost | None = None) -> None:
        self.guessed = 0
        self.right = 0
        self.cost = cost or RowCost()
        self._ids: list[int] = []
        # n-gram -> index of the token that last followed it
        self._next: dict[tuple[int, ...], int] = {}
        self._seen = BEFORE  # tokens that were right, of those that decided a guess
        self._failures = 0  # guesses in a row without a right token
        self._pause = 0  # tokens until the next guess
        for token in prompt_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Note the next token.

        token: its id.
        """
        if len(self._ids) >= NGRAM:
            self._next[tuple(self._ids[-NGRAM:])] = len(self._ids)
        self._ids.append(token)
        self._pause -= 1

    def guess(self, room: int) -> list[int]:
        """The tokens that may come next; often none.

        room: how many at most.
        """
        if self._pause > 0:
            return []
        start = self._next.get(tuple(self._ids[-NGRAM:]))
        if start is None:
            return []
        guess, period = [], len(self._ids) - start
        for i in range(min(self._length(), room)):  # after the last token, the guess repeats itself
            guess.append(self._ids[start + i % period])
        return guess

    def learn(self, guessed: int, right: int) -> None:
        """Note how the last guess went: guess more while it pays, and pause when it does not.

        guessed: tokens that were guessed.
        right: how many of them were right.
        """
        self.guessed += guessed
        self.right += right
        decided = right + (right < guessed)  # nothing is known of those behind the first wrong one
        fade = MEMORY / (MEMORY + decided)
        self._seen = self._seen[0] * fade + right, self._seen[1] * fade + decided
        if right:
            self._failures = self._pause = 0
        else:
            self._failures += 1
            self._pause = min(PAUSE, 2**self._failures)

    def _length(self) -> int:
        """Tokens of the next guess: those that bring most tokens for their cost, at least one.

        A guess of one token, where none pays, finds out when they pay again; pauses bound its cost.
        """
        right, seen = self._seen
        hope, tokens, best, length = right / seen, 1.0, 1.0, 1
        for n in range(1, LONGEST + 1):
            tokens += hope**n  # a token counts if all before it were right
            if (gain := tokens / (1 + self.cost.value * n)) > best:
                best, length = gain, n
        return length
