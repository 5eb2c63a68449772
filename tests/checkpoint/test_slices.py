"""Flat ranges of local slices become few rectangles, and come back as they were."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from fiveply.checkpoint.slices import overlap, read_flat, rectangles, slices_of, window
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.placement import Parameter, Placed

sizes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@given(st.data())
def test_rectangles_tile_the_flat_range_in_order(data: st.DataObject) -> None:
    size = data.draw(sizes)
    start = tuple(data.draw(st.integers(0, 4)) for _ in size)
    total = math.prod(size)
    lo = data.draw(st.integers(0, total))
    hi = data.draw(st.integers(lo, total))
    local = torch.arange(total).view(size)
    pieces = rectangles(start, size, lo, hi)
    assert len(pieces) <= (1, 1, 3, 5)[len(size)]
    assert [lo, *(piece[3] for piece in pieces)] == [*(piece[2] for piece in pieces), hi]
    for block_start, block_size, block_lo, block_hi in pieces:
        assert block_lo < block_hi
        block = local[window(block_start, block_size, start)]
        assert block.flatten().tolist() == list(range(block_lo, block_hi))


def test_rectangles_of_a_matrix_read_as_expected() -> None:
    assert rectangles((10, 20), (4, 5), 3, 17) == [
        ((10, 23), (1, 2), 3, 5),
        ((11, 20), (2, 5), 5, 15),
        ((13, 20), (1, 2), 15, 17),
    ]
    assert rectangles((10, 20), (4, 5), 6, 8) == [((11, 21), (1, 2), 6, 8)]
    assert rectangles((7,), (9,), 2, 5) == [((9,), (3,), 2, 5)]
    assert rectangles((0, 0), (4, 5), 0, 20) == [((0, 0), (4, 5), 0, 20)]


@given(st.integers(0, 18), st.integers(0, 18))
def test_what_slices_of_cuts_read_flat_joins(one: int, other: int) -> None:
    lo, hi = sorted((one, other))
    whole = torch.arange(60).view(6, 10)
    placed = Placed(Parameter("fc.weight", (6, 10), "fc"), (2, 3), (3, 6))
    flat = whole[2:5, 3:9].flatten()[lo:hi]
    stored = torch.full_like(whole, -1)
    for piece in slices_of(placed, lo, flat, "optimizer.m."):
        assert (piece.name, piece.shape) == ("optimizer.m.fc.weight", (6, 10))
        stored[window(piece.start, tuple(piece.tensor.shape), (0, 0))] = piece.tensor
    assert (stored != -1).sum() == hi - lo
    joined = read_flat(lambda at, shape: stored[window(at, shape, (0, 0))], placed, lo, hi)
    assert torch.equal(joined, flat)


def test_slices_of_gpt2_are_transposed_and_fused() -> None:
    spec = ModelSpec.from_config({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11})
    key = Parameter("model.layers.0.self_attn.k_proj.weight", (8, 8), "layers.0")
    (piece,) = slices_of(Placed(key, (4, 0), (2, 8)), 0, torch.arange(16), spec=spec)
    assert (piece.name, piece.shape, piece.start) == ("transformer.h.0.attn.c_attn.weight", (8, 24), (0, 12))
    assert torch.equal(piece.tensor, torch.arange(16).view(2, 8).t())


def test_overlap() -> None:
    assert overlap((0, 0), (4, 4), (2, 3), (9, 9)) == ((2, 3), (2, 1))
    assert overlap((0, 0), (4, 4), (4, 0), (1, 4)) is None
    assert overlap((), (), (), ()) == ((), ())
