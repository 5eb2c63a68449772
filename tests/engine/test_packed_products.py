"""Products of inference: values, parts of a fused matrix, and bits that do not depend on a row's company."""

from __future__ import annotations

import pytest
import torch

from fiveply.engine import kernels
from fiveply.engine.int8 import Int8Products
from fiveply.engine.products import FusedProducts

CPU = torch.device("cpu")
MOST = 16  # rows that the compiled code multiplies together


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 12, MOST, MOST + 1, 90])
@pytest.mark.parametrize("shape", [((5,), 7), ((40, 16, 16), 72), ((33,), 128), ((100, 60), 30)])
def test_products(dtype: torch.dtype, tolerance: float, rows: int, shape: tuple[tuple[int, ...], int]) -> None:
    outs, inner = shape
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(out, inner, generator=generator).to(dtype) for out in outs]
    x = torch.randn(rows, 2 * inner, generator=generator).to(dtype)[:, inner:]  # a part of something wider
    products = FusedProducts(dtype, CPU)
    stands = products.adopt(weights)
    assert [stand.shape for stand in stands] == [weight.shape for weight in weights]
    for y, weight in zip(products.linears(x, stands), weights, strict=True):
        torch.testing.assert_close(
            y.double(), x.double() @ weight.double().T, atol=tolerance * inner**0.5, rtol=tolerance
        )


@pytest.mark.parametrize("made", [FusedProducts, Int8Products])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [78, 96])  # no whole tiles, and three
def test_a_rows_bits_do_not_depend_on_its_company(inner: int, dtype: torch.dtype, made: type[FusedProducts]) -> None:
    products = made(dtype, CPU)
    if isinstance(missing := kernels.library(dtype, products.weights), str):
        pytest.skip(missing)
    x, weight = torch.randn(70, inner).to(dtype), torch.randn(150, inner).to(dtype)
    (stand,) = products.adopt([weight])
    together = products.forward(x, stand)
    for rows in range(1, 70):
        assert torch.equal(products.forward(x[:rows], stand), together[:rows])
        assert torch.equal(products.forward(x[rows:], stand), together[rows:])
