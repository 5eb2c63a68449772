"""One answer on its way: what steps give to a request becomes pieces of text, until an end, a stop string or the limit.

It knows nothing of replicas, ranks or HTTP: the driver feeds it, a client reads it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

from fiveply.serve.messages import GRAMMAR, Outcome, Score
from fiveply.serve.scheduler import Request
from fiveply.serve.text import Detokeniser, StopStrings, Text
from fiveply.spec.errors import RunError


class GrammarFailed(RunError):  # noqa: N818
    """What constrains the answer became too complex on the way."""


class Piece(NamedTuple):
    """A part of an answer."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    scores: tuple[Score, ...] = ()
    """Of the tokens, where asked for."""
    finish: Literal["", "stop", "length"] = ""


class Generation:
    """One answer on its way: an iterator over its pieces."""

    def __init__(self, request: Request, text: Text, ends: frozenset[int], stops: Sequence[str]) -> None:
        self.request, self._ends = request, ends
        self.arrived = time.monotonic()
        self.first_token_at = 0.0
        self.prompt_scores: list[Score] = []
        """Of the prompt's tokens from the second on, where asked for."""
        self.embedding: list[float] = []
        self.finish: Literal["", "stop", "length"] = ""
        self.losses = 0
        self._detokeniser = Detokeniser(text.tokenizer, request.tokens) if text.tokenizer else None
        self._stops = StopStrings(stops)
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises what `fail` was given where the answer can't be completed."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish:
                return

    def take(self, outcome: Outcome) -> bool:
        """What a step gave; whether this was the last. Its tokens stand in `request.tokens`, and those after an end are cut off."""
        request = self.request
        if outcome.prompt_scores:
            del self.prompt_scores[outcome.scored_from - 1 :]
            self.prompt_scores += outcome.prompt_scores
        if outcome.problem and not outcome.tokens:
            self.fail((GrammarFailed if outcome.problem.startswith(GRAMMAR) else RunError)(outcome.problem))
            return True
        if not outcome.tokens:
            if request.left:
                return False  # part of a prompt
            self.embedding = outcome.embedding
            self._tell(Piece(finish="length"))
            return True
        self.first_token_at = self.first_token_at or time.monotonic()
        texts: list[str] = []
        known = len(request.tokens) - len(outcome.tokens)
        taken = 0
        for taken, token in enumerate(outcome.tokens, 1):
            text, finish = self._one(token, full=known + taken - request.prompt >= request.max_tokens)
            texts.append(text)
            if finish:
                break
        del request.tokens[known + taken :]
        self._tell(Piece("".join(texts), tuple(outcome.tokens[:taken]), tuple(outcome.scores[:taken]), finish))
        return bool(finish)

    def _one(self, token: int, full: bool) -> tuple[str, Literal["", "stop", "length"]]:
        """The text that a token makes certain, and why it is the last."""
        text, stopped = "", token in self._ends
        if self._detokeniser is not None:
            piece = "" if stopped else self._detokeniser.add(token)
            text, found = self._say(self._detokeniser, piece, last=stopped or full)
            stopped = stopped or found
        return text, "stop" if stopped else "length" if full else ""

    def _say(self, detokeniser: Detokeniser, piece: str, last: bool) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was found."""
        text, found = self._stops.add(piece)
        if last and not found:
            more, found = self._stops.add(detokeniser.rest())
            text += more if found else more + self._stops.rest()
        return text, found

    def fail(self, error: Exception) -> None:
        self._pieces.put_nowait(error)

    def _tell(self, piece: Piece) -> None:
        self.finish = piece.finish
        self._pieces.put_nowait(piece)
