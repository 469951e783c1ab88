"""Guesses the next tokens of an answer from what was said before (prompt lookup).

Running several tokens at once reads the weights once, so it costs little more than running one. An
answer may repeat its prompt or itself (names, code, quotations, lists). Its last tokens are then
looked up earlier in the conversation, and what followed there is the guess. The sampler still
decides every token, from the same logits: guesses change the speed of an answer, not its text. The
only exception is rounding: sums of several rows differ in the last bits, so of two tokens that are
almost equally likely the other one may be taken.
"""

from collections.abc import Sequence

NGRAM = 3  # tokens that must agree
LONGEST = 12  # tokens guessed at once
PAUSE = 64  # tokens without a guess, at most


class PromptLookup:
    """Makes guesses for one answer, and counts how many were right.

    prompt_ids: the prompt's ids.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.guessed = 0
        self.right = 0
        self._ids: list[int] = []
        # n-gram -> index of the token that last followed it
        self._next: dict[tuple[int, ...], int] = {}
        self._length = 4  # tokens of the next guess
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
        for i in range(min(self._length, room)):  # after the last token, the guess repeats itself
            guess.append(self._ids[start + i % period])
        return guess

    def learn(self, guessed: int, right: int) -> None:
        """Note how the last guess went: guess more while it pays, and pause when it does not.

        guessed: tokens that were guessed.
        right: how many of them were right.
        """
        self.guessed += guessed
        self.right += right
        if right:
            self._failures = self._pause = 0
            self._length = min(LONGEST, 2 * guessed) if right == guessed else max(2, right + 1)
        else:
            self._failures += 1
            self._pause = min(PAUSE, 2**self._failures)
