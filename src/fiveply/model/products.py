"""The matrix products of linear layers, forward and backward, and which library computes them.

Notable: layers that share an input (query, key and value; gate and up) are one function, whose backward sums their input
gradients inside the products and reads the input once. And torch's CPU builds give float32 products to MKL, which keeps
processors that are not Intel's at 256-bit vectors; the oneDNN that the same builds carry does not, and is more than twice as
fast there (`docs/dev-log.md`). Its one entry for plain tensors is a linear layer, x W^T with a contiguous x and a W of any
strides, so the gradients are phrased as linear layers too.

Shape suffixes: T tokens, I columns of the input, O columns of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Linears(Protocol):
    """What a layer asks for."""

    def linears(self, x_TI: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x W^T for each weight, differentiable."""
        ...


class Products:
    """torch's own products."""

    def linears(self, x_TI: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x W^T for each weight, differentiable."""
        return _Linears.apply(self, x_TI, *weights_OI)  # type: ignore[no-any-return]

    def forward(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        return x_TI @ weight_OI.T

    def grad_input(self, grads_TO: Sequence[Tensor], weights_OI: Sequence[Tensor]) -> Tensor:
        """The sum of all layers' input gradients."""
        total_TI = grads_TO[0] @ weights_OI[0]
        for grad_TO, weight_OI in zip(grads_TO[1:], weights_OI[1:], strict=True):
            total_TI.addmm_(grad_TO, weight_OI)
        return total_TI

    def grad_weights(self, grads_TO: Sequence[Tensor], x_TI: Tensor) -> list[Tensor]:
        return [grad_TO.T @ x_TI for grad_TO in grads_TO]

    def add_grad_weight(self, total_OI: Tensor, grad_TO: Tensor, x_TI: Tensor) -> None:
        """One layer's weight gradient, added in place."""
        total_OI.addmm_(grad_TO.T, x_TI)


class OneDnnProducts(Products):
    """oneDNN's float32 products on a CPU."""

    def forward(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")

    def grad_input(self, grads_TO: Sequence[Tensor], weights_OI: Sequence[Tensor]) -> Tensor:
        total_TI = self.forward(grads_TO[0], weights_OI[0].T)
        for grad_TO, weight_OI in zip(grads_TO[1:], weights_OI[1:], strict=True):
            total_TI = torch.ops.mkldnn._linear_pointwise.binary(grad_TO, total_TI, weight_OI.T, None, "add")
        return total_TI

    def grad_weights(self, grads_TO: Sequence[Tensor], x_TI: Tensor) -> list[Tensor]:
        # The first factor is copied to be contiguous: let it be the smaller one, and shared. Plain transposing copies are
        # quick, where adding a transposed gradient to the others would not be.
        x_IT: Tensor | None = None
        gradients: list[Tensor] = []
        for grad_TO in grads_TO:
            if x_TI.shape[1] > grad_TO.shape[1]:
                gradients.append(self.forward(grad_TO.T, x_TI.T))
            else:
                x_IT = x_TI.T.contiguous() if x_IT is None else x_IT
                gradients.append(self.forward(x_IT, grad_TO.T).T.contiguous())
        return gradients

    def add_grad_weight(self, total_OI: Tensor, grad_TO: Tensor, x_TI: Tensor) -> None:
        total_OI += self.grad_weights([grad_TO], x_TI)[0]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Products, x_TI: Tensor, *weights_OI: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TI, *weights_OI)
        ctx.products = products
        return tuple(products.forward(x_TI, weight_OI) for weight_OI in weights_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_TI, *weights_OI = ctx.saved_tensors
        grad_x = ctx.products.grad_input(grads, weights_OI) if ctx.needs_input_grad[1] else None
        wanted = ctx.needs_input_grad[2]
        grad_weights = ctx.products.grad_weights(grads, x_TI) if wanted else [None] * len(weights_OI)
        return None, grad_x, *grad_weights
