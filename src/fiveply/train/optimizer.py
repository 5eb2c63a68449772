"""The optimiser over owned segments: torch's AdamW or SGD, the learning-rate schedule, and the true global gradient norm.

Each rank updates only what it owns (`parallel/data_parallel.py`), so state is sharded as the layout says and nothing here
knows how. The norm counts every element of the model once: by the placement table's `counted`, and by one replica.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from fiveply.parallel.data_parallel import Segment
from fiveply.parallel.parallelize import ParallelModel
from fiveply.parallel.pipeline_parallel import Model
from fiveply.spec.placement import Placed
from fiveply.spec.run import Optimizer

STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class Segments:
    """What this rank updates of a model."""

    def __init__(self, model: Model) -> None:
        self.segments, self.mesh = [segment for unit in model.units for segment in unit.segments()], model.mesh
        self._counts = model.mesh.at.replica == 0 or not model.reducer.average
        self._device = model.device

    def square_norm(self) -> Tensor:
        """Sum of squares of the owned gradients that this rank counts, float64: summed over the world it covers the model once."""
        grads = [segment.grad for segment in self.segments if self._counts and segment.placed.counted]
        if not grads:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack(torch._foreach_norm(grads)).double().square().sum()

    def pieces(self, kind: Literal["values", "gradients"]) -> list[tuple[Placed, int, Tensor]]:
        """What `slices.assembled` takes of those that this rank speaks for: copies, since a view travels with all that it views."""
        return [(each.placed, each.low, (each.value if kind == "values" else each.grad).detach().cpu().clone())
                for each in self.segments if self.mesh.speaks_for(each.placed)]  # fmt: skip


class SegmentOptimizer(Segments):
    """`torch.optim` over this rank's segments."""

    def __init__(self, model: ParallelModel, spec: Optimizer) -> None:
        super().__init__(model)
        self.model, self.spec = model, spec
        self._values = [segment.value.detach().requires_grad_() for segment in self.segments]
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for segment, value in zip(self.segments, self._values, strict=True):
            (decayed if segment.placed.parameter.decay or spec.decay_all else plain).append(value)
        groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if spec.name == "sgd":
            self.torch = torch.optim.SGD(groups, lr=spec.lr)
        else:
            self.torch = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)

    def step(self, scale: float, rate: float) -> None:
        """Multiply the gradients by `scale` (1 / target tokens, and clipping), then update at learning rate `rate`."""
        grads = [segment.grad for segment in self.segments]
        torch._foreach_mul_(grads, scale)
        for value, grad in zip(self._values, grads, strict=True):
            value.grad = grad if grad.dtype == value.dtype else grad.to(value.dtype)
        for group in self.torch.param_groups:
            group["lr"] = rate
        self.torch.step()
        self.model.updated()

    def zero_grad(self) -> None:
        for unit in self.model.units:
            unit.zero_grad()

    def state(self) -> Iterator[tuple[str, Segment, Tensor]]:
        """(name, segment, values) of the optimiser's state: the updated values as `master`, and its moments."""
        for segment, value in zip(self.segments, self._values, strict=True):
            yield "master", segment, value.detach()
            for key in STATE[self.spec.name]:
                yield key, segment, self._moment(value, key)

    def _moment(self, value: Tensor, key: str) -> Tensor:
        state = self.torch.state[value]
        if key not in state:
            state[key] = torch.zeros_like(value)
        return state[key]

    def load(self, steps: int, read: Callable[[str, Segment], Tensor]) -> None:
        """Fill values and moments by `read(name, segment) -> flat tensor`, as after `steps` steps."""
        for segment, value in zip(self.segments, self._values, strict=True):
            value.detach().copy_(read("master", segment))
            for key in STATE[self.spec.name]:
                self._moment(value, key).copy_(read(key, segment))
            if self.spec.name == "adamw":
                self.torch.state[value]["step"] = torch.tensor(float(steps))
        self.model.updated()


def learning_rate(spec: Optimizer, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then constant, cosine, or warm-up-stable-decay."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    if spec.schedule == "constant":
        return spec.lr
    done = (step - spec.warmup) / max(1, steps - spec.warmup)
    low = spec.final_share
    if spec.schedule == "cosine":
        return spec.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    left = min(1.0, (1 - done) / spec.decay_share) if spec.decay_share else 1.0
    return spec.lr * (low + (1 - low) * max(0.0, left))
