"""Weights in 4 bits: products, logits and greedy tokens are those of a model whose weights were rounded to what int4 has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lone_stage import CPU
from random_models import save_random
from rounded_models import greedy_agree, logits_apart
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fiveply import service
from fiveply.engine import int4
from fiveply.engine.int4 import Int4Products
from fiveply.spec.errors import InputError

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [((5,), 64), ((40, 16, 16), 96), ((33,), 128), ((100, 60), 32)]
SIZES = {
    "llama": {"hidden_size": 288, "intermediate_size": 192},
    "qwen2": {"hidden_size": 192, "intermediate_size": 128},
    "gpt2": {"n_embd": 192, "n_inner": 128},
}
"""Whole groups of 32 columns, on each of as many tensor ranks as are asked for here."""


def rounded(weight: Tensor) -> Tensor:
    """What int4 has of it: of every 32 columns 16 levels, from the least to the greatest."""
    out = weight.detach().double().clone()
    for start in range(0, weight.shape[1], 32):
        group = out[:, start : start + 32]
        least, greatest = group.min(1, keepdim=True).values, group.max(1, keepdim=True).values
        step = ((greatest - least) / 15).clamp(min=1e-37)
        scale, zero = step.to(weight.dtype).double(), (least + 8 * step).to(weight.dtype).double()
        group.copy_(((group - zero) / scale).round().clamp(-8, 7) * scale + zero)
    return out


def error(dtype: torch.dtype, rows: int, outs: tuple[int, ...], inner: int, device: torch.device = CPU) -> float:
    """Of products beside those with rounded weights, in tolerances."""
    generator = torch.Generator().manual_seed(rows)
    matrices = [torch.randn(out, inner, generator=generator).to(dtype) for out in outs]
    matrices[0][-1] = 0
    matrices[0][0, :32] = 0.25
    x = torch.randn(rows, 2 * inner, generator=generator).to(dtype)[:, inner:]  # a part of something wider
    products = Int4Products(dtype, device)
    stands = products.adopt([matrix.to(device) for matrix in matrices])
    assert [stand.shape for stand in stands] == [matrix.shape for matrix in matrices]
    assert sum(whole.nbytes for whole, _ in products._whole_of.values()) <= (sum(outs) + 15) * inner / 2
    worst = 0.0
    for y, matrix in zip(products.linears(x.to(device), stands), matrices, strict=True):
        assert y.dtype == dtype
        wanted = x.double() @ rounded(matrix).T
        allowed = TOLERANCES[dtype] * (inner**0.5 + wanted.abs())
        worst = max(worst, float(((y.cpu().double() - wanted).abs() / allowed).max()))
    return worst


@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_rounded_weights(
    dtype: torch.dtype, rows: int, shape: tuple[tuple[int, ...], int], operators: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not operators:
        begun = Int4Products.__init__

        def without(self: Any, *given: Any) -> None:
            begun(self, *given)
            self._operators = False

        monkeypatch.setattr(Int4Products, "__init__", without)
        monkeypatch.setattr(int4, "WIDENED", 640)
    assert error(dtype, rows, *shape) < 1


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_wrong_scale_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight_OI: Tensor, right: Any = int4.quantize) -> tuple[Tensor, Tensor]:
        numbers_OI, pairs_GO2 = right(weight_OI)
        pairs_GO2[1, 2, 0] *= 1.3
        return numbers_OI, pairs_GO2

    monkeypatch.setattr(int4, "quantize", wrong)
    assert error(dtype, 3, (33,), 128) > 1


@pytest.mark.parametrize("inner", [32, 64, 128, 576])
def test_operators_of_gpus_take_what_they_are_given(inner: int) -> None:
    """On a device without numbers torch checks types and shapes alone."""
    meta = torch.device("meta")
    with FakeTensorMode():
        products = Int4Products(torch.bfloat16, meta)
        matrices = [torch.empty(out, inner, dtype=torch.bfloat16, device=meta) for out in (40, 3)]
        x = torch.empty(2, inner, dtype=torch.bfloat16, device=meta)
        assert [y.shape for y in products.linears(x, products.adopt(matrices))] == [(2, 40), (2, 3)]
    assert [whole.dtype for whole, _ in products._whole_of.values()] == [torch.int32]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its operators are not run")
@pytest.mark.parametrize("rows", [1, 3, 17, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_on_a_gpu(rows: int, shape: tuple[tuple[int, ...], int]) -> None:
    for dtype in TOLERANCES:
        assert error(dtype, rows, *shape, torch.device("cuda")) < 1


@pytest.mark.parametrize("family", SIZES)
def test_logits_are_those_of_rounded_weights(family: str, tmp_path: Path) -> None:
    model = save_random(family, tmp_path / "hf", **SIZES[family])
    from_rounded, from_plain = logits_apart(model, "int4", rounded)
    assert from_rounded < 1e-5
    assert from_plain > 1e-2  # else they were not rounded


@pytest.mark.parametrize(("family", "layout"), [("llama", "tp=3,pp=2"), ("qwen2", "tp=2"), ("gpt2", "dp=2,pp=2")])
def test_greedy_tokens_are_the_same_at_every_layout(family: str, layout: str, tmp_path: Path) -> None:
    model = save_random(family, tmp_path / "hf", **SIZES[family])
    assert all(greedy_agree(model, "int4", layout, rounded))


def test_what_cuts_groups_is_refused_with_the_reason(tmp_path: Path) -> None:
    for sizes, layout, line in (
        ({}, "dp=1", "72 hidden columns do not go into groups of 32, each of which has a scale in 4 bits; take int8"),
        ({"hidden_size": 192, "intermediate_size": 160}, "tp=2",
         "tp: 160 MLP columns / tp=2 do not go into groups of 32, each of which has a scale in 4 bits; tp in {1} does"),
    ):  # fmt: skip
        save_random("qwen2", tmp_path / layout, **sizes)
        with pytest.raises(InputError) as caught:
            service.Served.load(tmp_path / layout, layout, "float32", quantize="int4")
        assert str(caught.value) == f"--quantize int4: {line}"
