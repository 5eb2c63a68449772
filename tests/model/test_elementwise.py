"""Norm, rotation and gated activation: derivatives against finite differences, values against torch's and in 16 bits."""

import pytest
import torch
import torch.nn.functional as F

from fiveply.model.elementwise import ACTIVATIONS, gated, rms_norm
from fiveply.model.rotary import rotate


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 4)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = _random(*shape), _random(shape[-1])
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name: str) -> None:
    activation = ACTIVATIONS[name]
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (_random(4, 5), _random(4, 5)))


def test_rotate() -> None:
    angles = torch.randn(4, 1, 3, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    x = _random(4, 2, 6)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[..., 0], x[..., 0] * cos[..., 0] - x[..., 3] * sin[..., 0])
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(rotate(strided, cos, sin), turned)


def test_sixteen_bits_round_once() -> None:
    x, weight, grad = (
        _random(64, 32, dtype=torch.bfloat16),
        _random(32, dtype=torch.bfloat16),
        torch.randn(64, 32).bfloat16(),
    )
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    rms_norm(exact_x, exact_weight, 1e-5).backward(grad.double())
    rms_norm(x, weight, 1e-5).backward(grad)
    for found, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert found is not None
        assert exact is not None
        assert float((found.double() - exact).abs().max() / exact.abs().max()) < 2**-8
