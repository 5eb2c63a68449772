"""Split backward for zero-bubble schedules: the input gradient now, the weight gradient when the schedule says so.

A custom linear function queues (weight, input, output gradient) during backward instead of multiplying them. A second
backward pass through a checkpointed block would recompute it; a queue works with recomputation, and it is plain to simulate.
Norms, biases and embeddings are cheap and stay with the input gradient. Qi et al. 2024.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = tuple[Tensor, Tensor, Tensor]


class WeightQueue:
    """Weight gradients of one chunk that wait, by micro-batch in the order of their input gradients."""

    def __init__(self) -> None:
        self._current: list[Work] = []
        self._waiting: deque[list[Work]] = deque()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return _DeferredLinear.apply(x, weight, self)  # type: ignore[no-any-return]

    def put(self, weight: Tensor, x: Tensor, grad: Tensor) -> None:
        self._current.append((weight, x, grad))

    def close_micro_batch(self) -> None:
        """The input gradients of a micro-batch are complete."""
        self._waiting.append(self._current)
        self._current = []

    @torch.no_grad()
    def run(self, add: Callable[[Tensor, Tensor], None]) -> None:
        """Compute the weight gradients of the oldest waiting micro-batch; `add(weight, gradient)` accumulates each."""
        for weight, x, grad in self._waiting.popleft():
            add(weight, grad.flatten(0, -2).T @ x.flatten(0, -2))


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, queue: WeightQueue) -> Tensor:
        ctx.save_for_backward(x)
        # Kept as it is: under recomputation a saved tensor comes back as another object, and the queue needs the parameter.
        ctx.weight, ctx.queue = weight, queue
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        ctx.queue.put(ctx.weight, x, grad)
        return grad @ ctx.weight, None, None
