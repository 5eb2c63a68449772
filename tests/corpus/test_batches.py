"""Rows are a function of the global sample index alone: coverage, shares, random access, documents, target counts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.corpus.batches import IGNORE, Batches, TokenFile
from fiveply.spec.errors import InputError

BLOCK = 4096


def make_file(length, weight=1.0, first=0, documents=()):
    """Tokens first, first + 1, ..., so that every token tells where it stood."""
    bounds = np.array([0, *sorted(documents), length], dtype=np.int64)
    return TokenFile(f"file{first}", np.arange(first, first + length, dtype=np.uint32), bounds, weight)


def make(files, sequence=8, **changed):
    return Batches(files, **{"sequence": sequence, "global_batch": 4, "seed": 0, **changed})


@st.composite
def files_with_documents(draw):
    files = []
    for number in range(draw(st.integers(1, 3))):
        length = draw(st.integers(9, 150))
        cuts = draw(st.sets(st.integers(1, length - 1), max_size=12))
        files.append(make_file(length, draw(st.floats(0.1, 10)), number * 1000, cuts))
    return files


@settings(deadline=None)
@given(length=st.integers(9, 500), sequence=st.integers(1, 8), seed=st.integers(0, 2**63))
def test_each_epoch_predicts_every_token_once_in_a_new_order(length, sequence, seed):
    batches = make([make_file(length)], sequence, seed=seed)
    epochs = [batches.rows(epoch * len(batches), len(batches)) for epoch in range(2)]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows.targets.ravel()), np.arange(1, len(batches) * sequence + 1))
        np.testing.assert_array_equal(rows.targets, rows.tokens + 1)
        assert rows.documents is None
    if len(batches) > 30:
        assert not np.array_equal(epochs[0].tokens, epochs[1].tokens)
        assert not np.array_equal(epochs[0].tokens, make([make_file(length)], sequence, seed=seed + 1).batch(0).tokens)


@settings(deadline=None)
@given(files=files_with_documents(), start=st.integers(0, 3 * BLOCK), cuts=st.sets(st.integers(1, 23)), data=st.data())
def test_random_access_equals_sequential(files, start, cuts, data):
    """Any slicing, by any other object, in any order: what ranks of any dp do."""
    options = {"respect_documents": data.draw(st.booleans()), "shuffle": data.draw(st.booleans())}
    whole, fresh = make(files, **options).rows(start, 24), make(files, **options)
    bounds = [0, *sorted(cuts), 24]
    for a, b in data.draw(st.permutations(list(itertools.pairwise(bounds)))):
        part = fresh.rows(start + a, b - a)
        assert part.first == start + a
        for got, expected in zip(part[:3], whole[:3], strict=True):
            if expected is not None:
                np.testing.assert_array_equal(got, expected[a:b])
            else:
                assert got is None


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_dp(dp):
    batches = make([make_file(900), make_file(300, first=1000)], global_batch=8)
    expected = make([make_file(900), make_file(300, first=1000)], global_batch=8).batch(5)
    share = 8 // dp
    parts = [batches.rows(5 * 8 + rank * share, share) for rank in range(dp)]
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), expected.tokens)
    assert expected.first == 40
    assert (expected.tokens.dtype, expected.targets.dtype) == (np.int64, np.int64)


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6), block=st.integers(0, 5))
def test_mixture_shares_are_exact_in_every_block(weights, block):
    files = [make_file(50, weight, number * 1000) for number, weight in enumerate(weights)]
    rows = make(files).rows(block * BLOCK, BLOCK)
    counts = np.bincount(rows.tokens[:, 0] // 1000, minlength=len(files))
    shares = np.array(weights) / sum(weights)
    assert counts.min() >= 1
    small = np.sum(shares < 1 / BLOCK)
    np.testing.assert_allclose(counts / BLOCK, shares, atol=(1 + small) / BLOCK)


def test_each_file_of_a_mixture_has_epochs_of_its_own():
    batches = make([make_file(8 * 40 + 1, 3.0), make_file(8 * 10 + 1, 1.0, 1000)])
    firsts = batches.rows(0, 3 * BLOCK).tokens[:, 0]
    for mine, windows in ((firsts[firsts < 1000], 40), (firsts[firsts >= 1000] - 1000, 10)):
        whole = mine[: len(mine) // windows * windows].reshape(-1, windows)
        np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(windows) * 8, (len(whole), 1)))
    firsts = firsts[:64] >= 1000
    assert 4 < firsts.sum() < 32, "mixed within a block, not one file after the other"


def test_order_is_the_same_for_ever():
    """A checkpoint keeps only the cursor: this order may never change, whatever the version of NumPy."""
    rows = make([make_file(4000), make_file(2000, 2.0, 10_000)], seed=7).rows(5000, 10)
    assert rows.tokens[:, 0].tolist() == [11248, 11576, 10120, 11856, 11088, 10704, 3808, 10336, 10048, 11344]


def test_without_shuffle_files_follow_in_order_and_wrap():
    batches = make([make_file(20, 9.0), make_file(30, 1.0, 1000)], shuffle=False)
    assert len(batches) == 2 + 3
    assert batches.rows(0, 7).tokens[:, 0].tolist() == [0, 8, 1000, 1008, 1016, 0, 8]


def test_documents_are_respected():
    file = make_file(17, documents=(3, 8, 9))
    rows = make([file], respect_documents=True, shuffle=False).rows(0, 2)
    assert rows.tokens.tolist() == [list(range(8)), list(range(8, 16))]
    i = IGNORE
    assert rows.targets.tolist() == [[1, 2, i, 4, 5, 6, 7, i], [i, 10, 11, 12, 13, 14, 15, 16]]
    assert rows.documents is not None
    assert rows.documents.dtype == np.int32
    assert rows.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert make([file], shuffle=False).batch(0).targets[0].tolist() == list(range(1, 9))


@settings(deadline=None)
@given(files=files_with_documents(), start=st.integers(0, 2 * BLOCK), count=st.integers(0, 40), shuffle=st.booleans())
def test_target_tokens_counts_what_rows_hold(files, start, count, shuffle):
    for respect in (False, True):
        batches = make(files, respect_documents=respect, shuffle=shuffle)
        assert batches.target_tokens(start, count) == int((batches.rows(start, count).targets != IGNORE).sum())


def test_too_little_text_is_refused_with_the_arithmetic():
    with pytest.raises(
        InputError, match="file0: corpus has 90 tokens, one sample needs 257; give more text or a short"
    ):
        make([make_file(90)], sequence=256)
    with pytest.raises(InputError, match="held_out: no tokens to read"):
        make([])
    assert len(make([make_file(257)], sequence=256)) == 1
