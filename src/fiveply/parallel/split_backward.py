"""Split backward for zero-bubble schedules: the input gradient now, the weight gradient when the schedule says so.

A custom linear function queues (weight, input, output gradient) during backward instead of multiplying them. A second
backward pass through a checkpointed block would recompute it; a queue works with recomputation, and it is plain to simulate.
Norms, biases and embeddings are cheap and stay with the input gradient. Qi et al. 2024.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fiveply.model.products import Products

_Work = tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]


class WeightQueue:
    """Weight gradients of one chunk that wait, by micro-batch in the order of their input gradients: `products.Linears` for
    its layers, which multiplies by `products`."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self._current: list[_Work] = []
        self._waiting: deque[list[_Work]] = deque()

    def linears(self, x_TI: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _DeferredLinears.apply(self, x_TI, *weights_OI)  # type: ignore[no-any-return]

    def put(self, weights_OI: Sequence[Tensor], x_TI: Tensor, grads_TO: Sequence[Tensor]) -> None:
        self._current.append((weights_OI, x_TI, grads_TO))

    def close_micro_batch(self) -> None:
        """The input gradients of a micro-batch are complete."""
        self._waiting.append(self._current)
        self._current = []

    @torch.no_grad()
    def run(self, add: Callable[[Tensor, Tensor], None]) -> None:
        """Compute the weight gradients of the oldest waiting micro-batch; `add(weight, gradient)` accumulates each."""
        for weights_OI, x_TI, grads_TO in self._waiting.popleft():
            for weight_OI, grad_OI in zip(weights_OI, self.products.grad_weights(grads_TO, x_TI), strict=True):
                add(weight_OI, grad_OI)


class _DeferredLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queue: WeightQueue, x_TI: Tensor, *weights_OI: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TI)
        # Kept as they are: under recomputation a saved tensor comes back as another object, and the queue needs the parameter.
        ctx.weights, ctx.queue = weights_OI, queue
        return tuple(queue.products.forward(x_TI, weight_OI) for weight_OI in weights_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (x_TI,) = ctx.saved_tensors
        # Detached, since a saved tensor comes back with the graph that made it, whose leaves would wait with it.
        ctx.queue.put(ctx.weights, x_TI.detach(), grads)
        return None, ctx.queue.products.grad_input(grads, ctx.weights), *[None] * len(ctx.weights)
