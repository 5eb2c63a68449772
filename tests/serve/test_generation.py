"""An answer on its way: what steps give, one or several tokens at a time, until an end, a stop string or the limit."""

from __future__ import annotations

import asyncio

import pytest
from random_models import add_tokenizer

from fiveply.corpus.tokenizer import Tokenizer
from fiveply.serve.generation import Generation, Piece
from fiveply.serve.messages import Outcome, Score
from fiveply.serve.scheduler import Request
from fiveply.serve.text import Text
from fiveply.spec.errors import RunError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def answer(
    tokenizer: Tokenizer, tokens: list[int], cuts: list[int], stops: list[str], most: int = 100
) -> tuple[list[Piece], list[int]]:
    """The pieces of an answer that comes in groups of `cuts` tokens, and the request's tokens at the end."""
    request = Request(0, [50, 51], most)
    generation = Generation(request, Text(tokenizer), frozenset([0]), stops)
    left, ended = list(tokens), False
    for cut in cuts:
        some, left = left[:cut], left[cut:]
        request.tokens += some
        ended = generation.take(Outcome(0, list(some), [Score(-float(token)) for token in some]))
        if ended:
            break

    async def read() -> list[Piece]:
        pieces = []
        while not generation._pieces.empty():
            pieces.append(await anext(generation.pieces()))
        return pieces

    pieces = asyncio.run(read())
    assert ended == bool(pieces and pieces[-1].finish)
    return pieces, request.tokens


@pytest.mark.parametrize("cuts", [[1] * 9, [9], [2, 5, 2], [4, 4, 1]])
def test_any_groups_say_the_same(tokenizer: Tokenizer, cuts: list[int]) -> None:
    tokens = tokenizer.encode("ship\u00e9 sea").tolist()

    def told(stops: list[str], most: int = 100, end_at: int | None = None) -> tuple[str, str, int]:
        given = tokens if end_at is None else [*tokens[:end_at], 0, *tokens[end_at:]]
        pieces, held = answer(tokenizer, given, [*cuts, 1], stops, most)
        assert [token for piece in pieces for token in piece.tokens] == held[2:]
        assert [score.logprob for piece in pieces for score in piece.scores] == [-float(token) for token in held[2:]]
        return "".join(piece.text for piece in pieces), pieces[-1].finish, len(held) - 2

    assert told([]) == ("ship\u00e9 sea", "", 10)
    assert told(["\u00e9 s"]) == ("ship", "stop", 8)
    assert told([], most=5) == ("ship\ufffd", "length", 5)
    assert told(["never"], end_at=3) == ("shi", "stop", 4)


def test_a_problem_ends_it(tokenizer: Tokenizer) -> None:
    generation = Generation(Request(0, [5], 9), Text(tokenizer), frozenset(), [])
    assert generation.take(Outcome(0, problem="broken"))
    with pytest.raises(RunError, match="broken"):
        asyncio.run(anext(generation.pieces()))
