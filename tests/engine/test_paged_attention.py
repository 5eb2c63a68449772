"""Paged attention against attention over the whole sequence, however tokens come: all at once, in chunks, mixed, windowed."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiveply.engine import gathered_attention, kernels
from fiveply.engine.paged_attention import PagedAttention, Span
from fiveply.model.attention import RowsAttention
from fiveply.serve.messages import BLOCK
from fiveply.world import compiled

CPU = torch.device("cpu")
COMPILED = [False] if isinstance(kernels.library(torch.float64), str) else [True, False]


def whole(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return RowsAttention(1)(q, k, v, layer=0, window=window)


def make(lengths: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(n, h, size, generator=generator, dtype=torch.float64).to(dtype)
            for h in (heads, kv_heads, kv_heads)
        ]
        for n in lengths
    ]


def tables(lengths: list[int], seed: int) -> tuple[list[list[int]], int]:
    """Scattered blocks for each sequence, and some that nobody has."""
    counts = [-(-n // BLOCK) for n in lengths]
    total = sum(counts) + 3
    order = iter(np.random.default_rng(seed).permutation(total).tolist())
    return [[next(order) for _ in range(count)] for count in counts], total


def run_in_steps(
    sequences: list[list[Tensor]],
    cuts: list[list[int]],
    attention: PagedAttention,
    blocks: list[list[int]],
    window: int,
) -> list[Tensor]:
    """Each sequence in its own chunks, packed with what the others bring to the same step."""
    done, outs = [0] * len(sequences), [[] for _ in sequences]
    for step in range(max(map(len, cuts))):
        rows = [row for row, cut in enumerate(cuts) if step < len(cut)]
        spans = [Span(done[row], cuts[row][step], blocks[row]) for row in rows]
        positions = attention.begin(spans)
        assert positions.tolist() == [p for s in spans for p in range(s.start, s.start + s.count)]
        packed = [
            torch.cat([sequences[row][part][s.start : s.start + s.count] for row, s in zip(rows, spans, strict=True)])
            for part in range(3)
        ]
        out = attention(*packed, layer=0, window=window)
        for row, piece in zip(rows, out.split([span.count for span in spans]), strict=True):
            outs[row].append(piece)
            done[row] += piece.shape[0]
    return [torch.cat(out) for out in outs]


def cut(length: int, at: list[int]) -> list[int]:
    edges = sorted({0, length, *(a % length for a in at)})
    return [b - a for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("compiled", COMPILED)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    at=st.lists(st.integers(0, 300), max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    size=st.sampled_from([2, 8, 17, 64, 80, 96]),
    window=st.sampled_from([0, 1, 7, 16, 130]),
    seed=st.integers(0, 1000),
)
def test_any_chunks_give_what_the_whole_gives(
    compiled: bool, lengths: list[int], at: list[int], heads: tuple[int, int], size: int, window: int, seed: int
) -> None:
    sequences = make(lengths, *heads, size, torch.float64, seed)
    blocks, total = tables(lengths, seed)
    attention = PagedAttention([0], *heads, size, total, torch.float64, CPU, compiled_kernels=compiled)
    inner = attention.gathered
    assert (inner is None) == compiled
    keys, values = (inner.keys_XKd, inner.values_XKd) if inner else (attention.keys_NKdB, attention.values_NKBP)
    for cache in (keys, values):
        cache[0].fill_(torch.nan)  # what was never written must not be read
    outs = run_in_steps(sequences, [cut(n, at) for n in lengths], attention, blocks, window)
    for out, sequence in zip(outs, sequences, strict=True):
        torch.testing.assert_close(out, whole(*sequence, window), atol=1e-12, rtol=1e-12)


def test_sequences_whose_copies_are_too_large_attend_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "GATHERED", 5 * BLOCK * 2 * 8)  # five blocks
    lengths = [40, 33, 70, 20, 5]
    sequences = make(lengths, 4, 2, 8, torch.float64, 1)
    blocks, total = tables(lengths, 1)
    attention = PagedAttention([0], 4, 2, 8, total, torch.float64, CPU, compiled_kernels=False)
    cuts = [[length - 4, *[1] * 4] for length in lengths]
    for out, sequence in zip(run_in_steps(sequences, cuts, attention, blocks, 0), sequences, strict=True):
        torch.testing.assert_close(out, whole(*sequence, 0), atol=1e-12, rtol=1e-12)
    assert attention.gathered is not None
    assert [group.rows for group in attention.gathered._groups] == [1] * 5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
def test_other_types(dtype: torch.dtype, tolerance: float) -> None:
    lengths = [260, 1, 45]
    sequences = make(lengths, 8, 2, 64, dtype, 3)
    blocks, total = tables(lengths, 3)
    for native in (True, False):
        attention = PagedAttention([0], 8, 2, 64, total, dtype, CPU, compiled_kernels=native)
        outs = run_in_steps(sequences, [[100, *[1] * 160], [1], [45]], attention, blocks, 0)
        for out, sequence in zip(outs, sequences, strict=True):
            exact = whole(*(x.double() for x in sequence), 0)
            torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


def test_large_scores_keep_their_place() -> None:
    q, k, v = (x * 30 for x in make([200], 2, 2, 16, torch.float32, 1)[0])
    attention = PagedAttention([0], 2, 2, 16, 13, torch.float32, CPU)
    (out,) = run_in_steps([[q, k, v]], [[200]], attention, [list(range(13))], 0)
    exact = whole(q.double(), k.double(), v.double(), 0)
    torch.testing.assert_close(out.double(), exact, atol=2e-4, rtol=2e-4)


@pytest.mark.skipif(isinstance(kernels.library(torch.float32), str), reason=str(kernels.library(torch.float32)))
def test_a_rows_bits_do_not_depend_on_chunks_or_company() -> None:
    lengths = [400, 77]
    sequences = make(lengths, 4, 2, 32, torch.float32, 2)
    blocks, total = tables(lengths, 2)

    def run(cuts: list[list[int]], rows: list[int]) -> list[Tensor]:
        attention = PagedAttention([0], 4, 2, 32, total, torch.float32, CPU)
        return run_in_steps([sequences[r] for r in rows], cuts, attention, [blocks[r] for r in rows], 0)

    together = run([[390, *[1] * 10], [30, 40, 7]], [0, 1])
    assert torch.equal(together[0], run([[129, 1, 200, 70]], [0])[0])
    assert torch.equal(together[1], run([[77]], [1])[0])


def test_parts_of_a_fused_product_are_read_in_place() -> None:
    fused = torch.randn(5, 4 * 8 + 2 * 8 + 2 * 8)
    q, k, v = (x.view(5, -1, 8) for x in fused.split([32, 16, 16], -1))
    attention = PagedAttention([0], 4, 2, 8, 1, torch.float32, CPU)
    attention.begin([Span(0, 5, [0])])
    out = attention(q, k, v, layer=0, window=0)
    torch.testing.assert_close(out, whole(q.contiguous(), k.contiguous(), v.contiguous(), 0), atol=1e-6, rtol=1e-6)


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {")
    assert re.match(r".*c\+\+ failed: .*error", str(compiled.library(source, ())))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert compiled.library(source, ()) == "no C++ compiler was found (c++, g++ or clang++)"
