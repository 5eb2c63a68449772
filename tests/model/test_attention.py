"""RowsAttention against explicit softmax over explicit masks: rows, documents, windows, grouped heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiveply.model.attention import RowsAttention

HEAD = 6


def packed(tokens: int, heads: int = 6, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(tokens, n, HEAD, generator=generator, dtype=torch.float64) for n in sizes)
    return q, k, v


def explicit(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, may_look_TT: Tensor) -> Tensor:
    """Softmax attention written down, head by head."""
    group = q_THd.shape[1] // k_TKd.shape[1]
    heads = []
    for head in range(q_THd.shape[1]):
        scores_TT = q_THd[:, head] @ k_TKd[:, head // group].T / HEAD**0.5
        heads.append(scores_TT.masked_fill(~may_look_TT, -torch.inf).softmax(-1) @ v_TKd[:, head // group])
    return torch.stack(heads, 1)


def may_look(rows: int, length: int, window: int, documents_T: Tensor | None) -> Tensor:
    """The mask over packed tokens, pair by pair."""
    tokens = rows * length
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(i + 1):
            near = not window or i - j < window
            together = documents_T is None or documents_T[i] == documents_T[j]
            mask[i, j] = i // length == j // length and near and bool(together)
    return mask


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 12),
    window=st.integers(0, 14),
    heads=st.sampled_from([(1, 1), (6, 6), (6, 3), (6, 2), (6, 1)]),
    cuts=st.none() | st.lists(st.booleans(), min_size=36, max_size=36),
)
def test_equals_softmax_over_the_written_mask(
    rows: int, length: int, window: int, heads: tuple[int, int], cuts: list[bool] | None
) -> None:
    q, k, v = packed(rows * length, *heads)
    documents_T = None if cuts is None else torch.tensor(cuts[: rows * length]).cumsum(0)
    got = RowsAttention(rows, documents_T)(q, k, v, layer=0, window=window)
    want = explicit(q, k, v, may_look(rows, length, window, documents_T))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("window", [0, 4])
def test_each_document_is_as_if_alone(window: int) -> None:
    lengths = [5, 1, 9, 3, 6]  # over two rows of 12
    q, k, v = packed(sum(lengths))
    documents_T = torch.repeat_interleave(torch.tensor([7, -1, 7000, 0, 3]), torch.tensor(lengths))
    got = RowsAttention(2, documents_T)(q, k, v, layer=0, window=window)
    start = 0
    for row_end in (12, 24):
        while start < row_end:
            end = min(row_end, start + int((documents_T[start:] == documents_T[start]).sum()))
            alone = RowsAttention(1)(q[start:end], k[start:end], v[start:end], layer=0, window=window)
            torch.testing.assert_close(got[start:end], alone, rtol=1e-12, atol=1e-13)
            start = end


def test_gradients_stay_within_documents_and_windows() -> None:
    q, k, v = (x.requires_grad_() for x in packed(12))
    documents_T = torch.tensor([0] * 7 + [1] * 5)
    out = RowsAttention(1, documents_T)(q, k, v, layer=0, window=3)
    (grad_k, grad_v) = torch.autograd.grad(out[9].sum(), (k, v))
    for grad in (grad_k, grad_v):
        touched = grad.abs().amax((1, 2)) > 0
        assert touched.nonzero().flatten().tolist() == [7, 8, 9]


def test_windows_of_different_layers_do_not_mix() -> None:
    """Masks are kept by window, so one object serves a model whose layers differ."""
    q, k, v = packed(20)
    attention = RowsAttention(2)
    for window in (3, 0, 5, 3, 10, 11):
        got = attention(q, k, v, layer=window, window=window)
        assert torch.equal(got, RowsAttention(2)(q, k, v, layer=0, window=window))


def test_a_window_of_the_rows_length_is_none() -> None:
    q, k, v = packed(20)
    whole = RowsAttention(2)(q, k, v, layer=0, window=0)
    assert torch.equal(RowsAttention(2)(q, k, v, layer=0, window=10), whole)
    assert not torch.allclose(RowsAttention(2)(q, k, v, layer=0, window=9), whole)


def test_a_window_of_one_returns_the_own_value() -> None:
    q, k, v = packed(9)
    got = RowsAttention(1)(q, k, v, layer=0, window=1)
    torch.testing.assert_close(got, v.repeat_interleave(3, dim=1))


def test_dropout_zeroes_at_its_rate() -> None:
    """With values of one, undropped attention returns one everywhere; dropped, its mean stays and it scatters."""
    torch.manual_seed(0)
    q, k, v = packed(600, 4, 4)
    out = RowsAttention(3, dropout=0.3)(q, k, torch.ones_like(v), layer=0, window=0)[:, :, 0]
    first_T = out[::200].flatten()  # a row's first token sees itself alone: dropped or scaled
    assert set(first_T.round(decimals=6).tolist()) <= {0.0, round(1 / 0.7, 6)}
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert out.std() > 0.01
