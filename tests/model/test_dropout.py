"""Keyed dropout: the mask is a function of (seed, step, site, global token, column) and looks like independent draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiveply.model.dropout import KeyedDropout

KEY: dict[str, Any] = {"rate": 0.1, "seed": 0, "step": 3, "site": "layers.0.mlp"}


def mask(tokens_T: Tensor, columns: int, **changed: Any) -> Tensor:
    """What dropout makes of ones, float64."""
    key = KEY | changed
    dropout = KeyedDropout(key["rate"], key["seed"], key["step"], tokens_T)
    return dropout(torch.ones(len(tokens_T), columns, dtype=torch.float64), key["site"])


WHOLE = mask(torch.arange(512), 64)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 511), min_size=1, max_size=40), columns=st.integers(1, 64))
def test_any_rows_in_any_order_draw_the_same(tokens: list[int], columns: int) -> None:
    """So it is the same under every dp, micro-batch and sequence-parallel cut."""
    assert torch.equal(mask(torch.tensor(tokens), columns), WHOLE[tokens][:, :columns])


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("first", [0, 2**31 - 100, 2**40])
def test_rate_and_scale(rate: float, first: int) -> None:
    values = mask(torch.arange(first, first + 2000), 128, rate=rate)
    assert torch.unique(values).tolist() == [0.0, 1 / (1 - rate)]
    dropped, error = (values == 0).double(), math.sqrt(rate * (1 - rate))
    assert dropped.mean().item() == pytest.approx(rate, abs=4 * error / math.sqrt(values.numel()))
    # Rows and columns alike: their shares scatter as those of independent draws do.
    for dim, n in ((0, 2000), (1, 128)):
        shares = dropped.mean(dim)
        assert (shares - rate).abs().max() < 5 * error / math.sqrt(n)
        assert shares.std().item() == pytest.approx(error / math.sqrt(n), rel=0.35)
    assert values.mean().item() == pytest.approx(1, abs=4 * math.sqrt(rate / (1 - rate) / values.numel()))


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of independent draws."""
    both = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))
    return abs(both[0, 1].item()) * math.sqrt(a.numel())


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"seed": -1}, {"step": 4}, {"step": 33}, {"site": "layers.0.attention"}, {"site": "layers.1.mlp"}],
    ids=str,
)
def test_another_key_draws_independently(changed: dict[str, Any]) -> None:
    other = mask(torch.arange(512), 64, **changed)
    assert not torch.equal(other, WHOLE)
    assert correlation(other, WHOLE) < 4.5


@pytest.mark.parametrize("shift", [1, 2, 7, 64, 256])
def test_neighbours_are_independent(shift: int) -> None:
    assert correlation(WHOLE[shift:], WHOLE[:-shift]) < 4.5
    if shift < 64:
        assert correlation(WHOLE[:, shift:], WHOLE[:, :-shift]) < 4.5


def test_tokens_beyond_32_bits_have_rows_of_their_own() -> None:
    far = mask(torch.arange(512) + 2**32, 64)
    assert correlation(far, WHOLE) < 4.5


def test_rate_zero_is_the_identity() -> None:
    x = torch.randn(9, 5)
    assert torch.equal(KeyedDropout(0.0, 0, 0, torch.arange(9))(x, "embedding"), x)


def test_gradient_is_the_mask() -> None:
    x = torch.randn(512, 64, dtype=torch.float64, requires_grad=True)
    KeyedDropout(KEY["rate"], KEY["seed"], KEY["step"], torch.arange(512))(x, KEY["site"]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, WHOLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_type_drops_the_same_elements_and_stays_itself(dtype: torch.dtype) -> None:
    dropout = KeyedDropout(KEY["rate"], KEY["seed"], KEY["step"], torch.arange(512))
    out = dropout(torch.ones(512, 64, dtype=dtype), KEY["site"])
    assert out.dtype == dtype
    assert torch.equal(out == 0, WHOLE == 0)


def test_the_mask_is_pinned() -> None:
    """A resumed run draws what it would have drawn: changing this breaks every run that is under way."""
    dropped = [row.eq(0).nonzero().flatten().tolist() for row in mask(torch.tensor([0, 1, 12345678901]), 40, rate=0.25)]
    assert dropped == [
        [6, 11, 16, 20, 26],
        [4, 5, 6, 7, 13, 16, 17, 22, 32, 33],
        [5, 7, 8, 16, 17, 27, 30, 33, 36, 38],
    ]
