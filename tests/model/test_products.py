"""Linear layers' products: each library's equal to torch's own, forward and backward, and deferred ones too."""

import pytest
import torch
import torch.nn.functional as F

from fiveply.model.products import OneDnnProducts, Products
from fiveply.parallel.split_backward import WeightQueue

onednn = pytest.param(
    OneDnnProducts(),
    torch.float32,
    marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
    id="onednn",
)


@pytest.mark.parametrize(("products", "dtype"), [pytest.param(Products(), torch.float64, id="torch"), onednn])
@pytest.mark.parametrize("sizes", [(5,), (7, 3, 3), (3, 11)])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_torch(products: Products, dtype: torch.dtype, sizes: tuple[int, ...], strided: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 9, dtype=dtype, requires_grad=True)
    weights = [torch.randn(size, 9, dtype=dtype, requires_grad=True) for size in sizes]
    grads = [torch.randn(size, 6, dtype=dtype).T if strided else torch.randn(6, size, dtype=dtype) for size in sizes]
    expected = torch.autograd.grad([F.linear(x, w) for w in weights], [x, *weights], grads)
    outputs = products.linears(x, weights)
    found = torch.autograd.grad(outputs, [x, *weights], grads)
    for output, weight in zip(outputs, weights, strict=True):
        torch.testing.assert_close(output, F.linear(x, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_input_or_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    Products().linears(x, [weight.requires_grad_()])[0].sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    weight = weight.detach()
    Products().linears(x.requires_grad_(), [weight])[0].sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("products", [Products(), OneDnnProducts()], ids=["torch", "onednn"])
def test_weight_gradients_wait_until_asked_for(products: Products) -> None:
    if isinstance(products, OneDnnProducts) and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    x = torch.randn(6, 9, requires_grad=True)
    weights = [torch.randn(size, 9, requires_grad=True) for size in (4, 4, 12)]
    expected = torch.autograd.grad([F.linear(x, w).square().sum() for w in weights], [x, *weights])
    queue = WeightQueue(products)
    torch.stack([y.square().sum() for y in queue.linears(x, weights)]).sum().backward()
    queue.close_micro_batch()
    assert all(weight.grad is None for weight in weights)
    arrived: dict[int, torch.Tensor] = {}
    queue.run(lambda weight, grad: arrived.update({id(weight): grad}))
    torch.testing.assert_close(x.grad, expected[0])
    for weight, grad in zip(weights, expected[1:], strict=True):
        torch.testing.assert_close(arrived[id(weight)], grad)


@pytest.mark.parametrize("products", [Products(), OneDnnProducts()], ids=["torch", "onednn"])
def test_a_weight_gradient_is_added_in_place(products: Products) -> None:
    if isinstance(products, OneDnnProducts) and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    total, grad, x = torch.randn(5, 9), torch.randn(6, 5), torch.randn(6, 9)
    expected = total + grad.T @ x
    products.add_grad_weight(total, grad, x)
    torch.testing.assert_close(total, expected)
