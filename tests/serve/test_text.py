"""Pieces of text: the same as the whole, whatever characters and tokens are cut; stop strings across pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import add_tokenizer

from fiveply.corpus.tokenizer import Tokenizer
from fiveply.serve.text import Detokeniser, StopStrings, Text


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None)
@given(prompt=TEXT, answer=TEXT)
def test_pieces_make_the_whole(bytes_tokenizer: Tokenizer, prompt: str, answer: str) -> None:
    detokeniser = Detokeniser(bytes_tokenizer, bytes_tokenizer.encode(prompt).tolist())
    pieces = [detokeniser.add(token) for token in bytes_tokenizer.encode(answer).tolist()]
    assert "".join(pieces) + detokeniser.rest() == answer
    assert not any("�" in piece for piece in pieces if "�" not in answer)


def test_a_prompt_that_ends_inside_a_character(bytes_tokenizer: Tokenizer) -> None:
    before, *after = bytes_tokenizer.encode("é").tolist()
    detokeniser = Detokeniser(bytes_tokenizer, [*bytes_tokenizer.encode("caf").tolist(), before])
    assert [detokeniser.add(token) for token in after] == [""]
    assert detokeniser.rest() == bytes_tokenizer.decode(after)


@given(
    text=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)  # fmt: skip
def test_stop_strings_are_found_however_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    finder, told, stopped = StopStrings(stops), "", False
    for a, b in itertools.pairwise(edges):
        piece, stopped = finder.add(text[a:b])
        told += piece
        if stopped:
            break
    if not stopped:
        told += finder.rest()
    # The stop that is complete first is found: with it the text ends.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert told == text
    else:
        assert text.startswith(told)
        assert not any(stop in told for stop in stops)
        assert any(text[len(told) :].startswith(stop) for stop in stops)


def test_without_a_tokenizer_there_are_tokens_alone() -> None:
    text = Text()
    assert text.encode([5, 6]) == [5, 6]
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        text.encode("a")
    with pytest.raises(ValueError, match="is empty"):
        text.encode([])
