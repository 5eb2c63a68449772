"""A user's own loop around his module: forward, backward, step, as under DistributedDataParallel.

At the end of each backward the gradients of the replicas are added, each weighted by its share of the rows, so `.grad` is
that of the global mean loss at zero 0 and 1, clipping and logging included. Gradients accumulate until `zero_grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fiveply.parallel.data_parallel import Unit
from fiveply.parallel.parallelize_module import ModuleBatch, ParallelModule


class OwnLoop:
    """Hooks on the module and its optimiser; silent while `paused` (the executor runs instead)."""

    def __init__(
        self,
        model: ParallelModule,
        optimizer: torch.optim.Optimizer,
        share: Callable[[int], tuple[ModuleBatch, float]],
        steps: Callable[[], int],
        stepped: Callable[[], None],
    ) -> None:
        """`share(rows)`: what the loader knows of a batch of so many rows here, and its share of the global one. `steps`:
        how many are done; `stepped` is told of another."""
        assert model.module is not None
        self.model, self.share, self.steps, self.stepped, self.paused = model, share, steps, stepped, False
        self._queued, self._weight = False, 1.0
        model.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        for unit in model.units:
            for entry in unit.entries:
                entry.parameter.register_post_accumulate_grad_hook(self._arrived)
        plain_zero_grad = optimizer.zero_grad

        def zero_grad(set_to_none: bool = True) -> None:
            plain_zero_grad(set_to_none)
            for unit in model.units:
                bind(unit)
                unit.zero_grad()

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        optimizer.register_step_post_hook(self._stepped)

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.paused:
            return
        rows = next((x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), 1)
        batch, self._weight = self.share(rows)
        self.model.enter(batch, self.steps(), {})
        self.model.now.share = self._weight

    def _arrived(self, _parameter: Tensor) -> None:
        if not self.paused and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        for unit in self.model.units:
            bind(unit)
            flat = unit.flat_gradients()
            if self.model.mesh.dp is not None:
                flat.mul_(self._weight)
                self.model.mesh.dp.all_reduce(flat)
            if unit.grad is not flat:
                unit.grad.copy_(flat[slice(*unit.owned)])

    def _stepped(self, *_: Any) -> None:
        if not self.paused:
            self.stepped()


@torch.no_grad()
def bind(unit: Unit) -> None:
    """Make each `.grad` its place in the flat buffer again, where the user has set it to None or to another tensor."""
    for entry in unit.entries if unit.full_grad is not None else ():
        assert unit.full_grad is not None
        place, grad = unit.full_grad[entry.low : entry.high].view(entry.parameter.shape), entry.parameter.grad
        if grad is None:
            place.zero_()
        elif grad.data_ptr() != place.data_ptr():
            place.copy_(grad)
        entry.parameter.grad = place
