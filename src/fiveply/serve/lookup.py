"""Guesses at a request's next tokens: what followed the last time that its latest tokens stood in it (prompt look-up decoding,
Saxena 2023). Costs nothing but rows of a step; good where an answer repeats its prompt: summaries, code, extraction.

Whether a guess is right the ranks say: a token's random number depends on seed and position alone, so a guess is taken exactly
if it is the token that would have been chosen, and the text is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (3, 2)
"""Of the beginnings that are looked up, the first that is found."""


class Lookup:
    """The index of one request's tokens."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0
        self._rate = 1.0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which have only grown since the last call; fewer where few of the
        last guesses were right."""
        for end in range(max(1, self._seen), len(tokens)):
            for length in LENGTHS:
                if end >= length:
                    self._after[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        count = min(most, max(1, round(most * self._rate)))
        for length in LENGTHS:
            at = self._after.get(tuple(tokens[-length:]), 0)
            if at:
                return list(tokens[at : at + count])
        return []

    def judge(self, guessed: int, right: int) -> None:
        self._rate += 0.3 * (right / guessed - self._rate)
