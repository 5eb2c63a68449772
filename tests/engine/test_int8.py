"""Weights in 8 bits: products, logits and greedy tokens are those of a model whose weights were rounded to what int8 has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lone_stage import CPU
from random_models import save_random
from rounded_models import greedy_agree, logits_apart
from torch import Tensor

from fiveply.engine import int8, kernels
from fiveply.engine.int8 import Int8Products

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [((5,), 7), ((40, 16, 16), 72), ((1,), 33), ((33,), 128), ((100, 60), 30)]


def rounded(weight: Tensor) -> Tensor:
    """What int8 has of it, exactly; a row of zeros stays."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight.float() / scale).round().double() * scale


def error(dtype: torch.dtype, rows: int, outs: tuple[int, ...], inner: int) -> float:
    """Of products beside those with rounded weights, in tolerances."""
    generator = torch.Generator().manual_seed(rows)
    matrices = [torch.randn(out, inner, generator=generator).to(dtype) for out in outs]
    matrices[0][-1] = 0
    x = torch.randn(rows, 2 * inner, generator=generator).to(dtype)[:, inner:]  # a part of something wider
    products = Int8Products(dtype, CPU)
    stands = products.adopt(matrices)
    assert [stand.shape for stand in stands] == [matrix.shape for matrix in matrices]
    assert sum(whole.nbytes for whole, _ in products._whole_of.values()) <= (sum(outs) + 15) * (inner + 4)
    worst = 0.0
    for y, matrix in zip(products.linears(x, stands), matrices, strict=True):
        assert y.dtype == dtype
        wanted = x.double() @ rounded(matrix).T
        allowed = TOLERANCES[dtype] * (inner**0.5 + wanted.abs())
        worst = max(worst, float(((y.double() - wanted).abs() / allowed).max()))
    return worst


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8, 17, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_rounded_weights(
    dtype: torch.dtype, rows: int, shape: tuple[tuple[int, ...], int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda *_: "no compiler")
        monkeypatch.setattr(int8, "WIDENED", 64)
    assert error(dtype, rows, *shape) < 1


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_wrong_scale_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight_OI: Tensor, axis: Any = None, right: Any = int8.quantize) -> tuple[Tensor, Tensor]:
        numbers_OI, scales_O = right(weight_OI, axis)
        scales_O[2] *= 1.3
        return numbers_OI, scales_O

    monkeypatch.setattr(int8, "quantize", wrong)
    assert error(dtype, 3, (33,), 128) > 1


def test_ranks_that_share_a_row_round_it_as_one_rank_does() -> None:
    weight = torch.randn(20, 30)
    left, right = weight.split((17, 13), 1)
    axis: Any = SimpleNamespace(all_reduce=lambda x, op: x.copy_(torch.maximum(x, right.abs().amax(1))))
    numbers, scales = int8.quantize(weight)
    own, own_scales = int8.quantize(left, axis)
    assert torch.equal(own, numbers[:, :17])
    assert torch.equal(own_scales, scales)
    assert not torch.equal(int8.quantize(left)[0], own)


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm", "gpt2"])
def test_logits_are_those_of_rounded_weights(family: str, tmp_path: Path) -> None:
    model = save_random(family, tmp_path / "hf")
    from_rounded, from_plain = logits_apart(model, "int8", rounded)
    assert from_rounded < 1e-5
    assert from_plain > 1e-3  # else they were not rounded


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "dp=1"), ("llama", "tp=3,pp=2"), ("qwen2", "tp=2"), ("gpt2", "dp=2,pp=2")]
)
def test_greedy_tokens_are_the_same_at_every_layout(family: str, layout: str, tmp_path: Path) -> None:
    model = save_random(family, tmp_path / "hf")
    assert all(greedy_agree(model, "int8", layout, rounded))
