"""Root-mean-square norm, rotation of heads and the gated activation, each with its backward pass written out.

Notable: such functions cost what they read and write, so each passes over memory as few times as it can and keeps for
backward only what it must (the gated activation its two inputs, not the product's factors): 3 to 5 times quicker than the
composed operations on a CPU (`docs/dev-log.md`). Below float32 they compute in float32 and round once. A compiler fuses the
composed operations itself, and gets those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the output, input) -> gradient of the input."""


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
}


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    if torch.compiler.is_compiling():
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    return _RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-any-return]


def rotate(x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    """Rotate the pairs (column i, column i + head size / 2) of every head by the angles of its token."""
    if torch.compiler.is_compiling():
        first, second = x_THd.chunk(2, -1)
        return torch.cat((first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h), -1)
    return _Rotate.apply(x_THd, cos_T1h, sin_T1h)  # type: ignore[no-any-return]


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up (Shazeer 2020)."""
    if torch.compiler.is_compiling():
        return activation.forward(gate) * up
    return _Gated.apply(gate, up, activation)  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        size = x.shape[-1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = (length.square_() / size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight_D, scale = ctx.saved_tensors
        (grad,) = grads
        weight_D = weight_D.to(scale.dtype)
        size = x.shape[-1]
        unit_ND = (x * scale).view(-1, size)
        shares_ND = grad.reshape(-1, size) * unit_ND
        grad_weight_D = shares_ND.sum(0)
        along_N1 = (shares_ND @ weight_D).div_(size)[:, None]
        grad_ND = (grad.reshape(-1, size) * weight_D).addcmul_(unit_ND, along_N1, value=-1).mul_(scale.view(-1, 1))
        return grad_ND.view(x.shape).to(x.dtype), grad_weight_D.to(grad.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1h, sin_T1h)
        return _rotated(x_THd, cos_T1h, sin_T1h, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cos_T1h, sin_T1h = ctx.saved_tensors
        return _rotated(grads[0], cos_T1h, sin_T1h, -1), None, None


def _rotated(x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor, sign: int) -> Tensor:
    out_THd = torch.empty(x_THd.shape, dtype=x_THd.dtype, device=x_THd.device)
    (first, second), (out_first, out_second) = x_THd.chunk(2, -1), out_THd.chunk(2, -1)
    torch.mul(first, cos_T1h, out=out_first).addcmul_(second, sin_T1h, value=-sign)
    torch.mul(second, cos_T1h, out=out_second).addcmul_(first, sin_T1h, value=sign)
    return out_THd


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.forward(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_up = ctx.activation.forward(gate).mul_(grads[0])
        return ctx.activation.backward(grads[0] * up, gate), grad_up, None
