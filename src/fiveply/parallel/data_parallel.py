"""Data parallelism, ZeRO 0 to 3 and hybrid sharding by one mechanism: a flat buffer per unit, reduced and gathered whole.

A *unit* (embedding, one block, norm, head) is a set of parameters that are views of one flat buffer. Over the shard axis (n
ranks) the buffer is cut into n equal parts, and this rank *owns* one:

    zero   parameters        gradients                                      optimiser
    0      whole             whole, all-reduced once a step                 whole
    1      whole             whole, reduce-scattered once a step            owned part
    2      whole             owned part, reduce-scattered per micro-batch   owned part
    3      owned part, gathered around each use, then freed                 owned part

With hybrid sharding (dp_shard < dp) the owned parts are then summed over the replica axis. ZeRO: Rajbhandari et al. 2020.

Gradients that other axes must add (tensor ranks that saw part of the tokens or heads, the two copies of a tied embedding)
are summed on the owned parts at the end of a step: parameters that need it stand first in a unit, and all ranks cut alike.

It does not know schedules or optimisers: `GradientReducer` is told when a chunk's gradients are complete, and hands out
`Segment`s to whoever steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fiveply.spec.placement import Placed
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call


@dataclass(frozen=True)
class Dtypes:
    """Of the parameters that compute, of gradients as they are accumulated and reduced, and of what the optimiser updates."""

    compute: torch.dtype
    reduce: torch.dtype
    optimizer: torch.dtype


@dataclass(frozen=True)
class Entry:
    """A parameter's place in its unit's flat buffer: elements [low, high)."""

    placed: Placed
    parameter: nn.Parameter
    low: int
    high: int


@dataclass(frozen=True)
class Segment:
    """The part of one parameter that this rank owns: elements [low, high) of its local slice, row-major.

    `value` is what the optimiser updates (its own precision), `grad` the reduced gradient; both are flat views.
    """

    placed: Placed
    low: int
    high: int
    value: Tensor
    grad: Tensor


class Unit:
    """Parameters that are gathered, reduced and freed together, as views of one flat buffer."""

    def __init__(
        self, name: str, parameters: Sequence[tuple[Placed, Tensor]], longest: int, mesh: Mesh, dtypes: Dtypes
    ) -> None:
        """`parameters`: this rank's slices with their initial values; `longest`: elements of the largest tensor rank."""
        layout = mesh.layout
        self.name, self.zero, self.mesh = name, layout.zero, mesh
        self.dtypes = dtypes
        shards = layout.shard_ranks
        # What other axes must add stands first, so that its place is the same on all of them.
        ordered = sorted(parameters, key=lambda item: -item[0].tp_sum)
        self.part = -(-longest // shards)
        self.owned = (mesh.at.shard * self.part, (mesh.at.shard + 1) * self.part)
        device = ordered[0][1].device
        exact = torch.zeros(self.part * shards, dtype=dtypes.optimizer, device=device)
        offset = 0
        for _, value in ordered:
            exact[offset : offset + value.numel()].copy_(value.detach().reshape(-1))
            offset += value.numel()
        own = slice(*self.owned)
        self.full = exact.to(dtypes.compute)
        self.values = self.full[own].clone() if self.zero == 3 else self.full[own]
        self.master = self.values if dtypes.optimizer == dtypes.compute else exact[own].clone()
        self.entries: list[Entry] = []
        offset = 0
        for placed, value in ordered:
            low, high = offset, offset + value.numel()
            view, parameter = self.full[low:high].view(value.shape), value
            if isinstance(parameter, nn.Parameter):
                parameter.data = view  # a user's own: whatever refers to it keeps doing so
            else:
                parameter = nn.Parameter(view)
            self.entries.append(Entry(placed, parameter, low, high))
            offset = high

        self.full_grad: Tensor | None = None
        if self.zero <= 1:
            self.full_grad = torch.zeros(self.full.shape, dtype=dtypes.reduce, device=device)
            if dtypes.reduce == dtypes.compute:  # autograd accumulates straight into the flat buffer
                for entry in self.entries:
                    entry.parameter.grad = self.full_grad[entry.low : entry.high].view(entry.parameter.shape)
        alone = self.full_grad if shards == 1 else None
        self.grad = torch.zeros(self.part, dtype=dtypes.reduce, device=device) if alone is None else alone
        self._gathering: Call | None = None
        self.is_full = True
        if self.zero == 3:
            self.release()

    def segments(self) -> Iterator[Segment]:
        first, last = self.owned
        for entry in self.entries:
            low, high = max(entry.low, first), min(entry.high, last)
            if low < high:
                own = slice(low - first, high - first)
                yield Segment(entry.placed, low - entry.low, high - entry.low, self.master[own], self.grad[own])

    def zero_grad(self) -> None:
        self.grad.zero_()
        if self.full_grad is not None:
            self.full_grad.zero_()

    def store(self, entry: Entry) -> None:
        """Move a gradient that was just accumulated into the flat buffer, where the types differ."""
        parameter = entry.parameter
        if self.full_grad is not None and self.dtypes.reduce != self.dtypes.compute and parameter.grad is not None:
            self.full_grad[entry.low : entry.high].add_(parameter.grad.reshape(-1))
            parameter.grad = None

    def flat_gradients(self) -> Tensor:
        """The whole unit's gradients in one buffer of the reduction's type; those of zero 2 and 3 are taken away."""
        if self.full_grad is not None:
            return self.full_grad
        flat = torch.zeros(self.full.shape, dtype=self.dtypes.reduce, device=self.grad.device)
        for entry in self.entries:
            if entry.parameter.grad is not None:
                flat[entry.low : entry.high].copy_(entry.parameter.grad.reshape(-1))
                entry.parameter.grad = None
        return flat

    def updated(self) -> None:
        """After the optimiser changed `master`: refresh the parameters that this rank computes with."""
        if self.master is not self.values:
            self.values.copy_(self.master)
        if self.zero in (1, 2) and self.mesh.shard is not None:
            self.mesh.shard.all_gather(self.full, self.values.clone())

    # zero 3: parameters exist only around their use

    def start_gather(self) -> None:
        if self.zero != 3 or self.is_full or self._gathering is not None:
            return
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
        # `.data` has a version counter of its own: refilling the storage is no modification in autograd's eyes.
        if self.mesh.shard is not None:
            self._gathering = self.mesh.shard.all_gather(self.full.data, self.values, wait=False)
        else:
            self.full.data.copy_(self.values)
            self.is_full = True

    def wait_gather(self) -> None:
        self.start_gather()
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering, self.is_full = None, True

    def release(self) -> None:
        if self.zero == 3 and (self.is_full or self._gathering is not None):
            self.wait_gather()
            self.full.untyped_storage().resize_(0)
            self.is_full = False


class GradientReducer:
    """Reduces the gradients of all units of a rank, bounded by `start` of a chunk and `finish` of the step."""

    def __init__(self, units: Sequence[Unit], mesh: Mesh, *, average_gradients: bool = True) -> None:
        """`average_gradients=False`: replicas step alone and nothing is reduced over dp (`train.sync_every`)."""
        self.units, self.mesh, self.average = list(units), mesh, average_gradients
        # Units whose gradients this backward completes: each is reduced as its last gradient arrives, beside the rest of it.
        # All ranks start them in one order, backward through the model, whatever order gradients arrive in; None: not told.
        self._waiting: list[Unit] | None = None
        self._missing: dict[str, int] = {}
        self._pending: list[tuple[Unit, Call, Tensor, Tensor]] = []
        for unit in self.units:
            for entry in unit.entries:
                entry.parameter.register_post_accumulate_grad_hook(self._hook(unit, entry))

    def _hook(self, unit: Unit, entry: Entry) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            unit.store(entry)
            if self._waiting:
                self._missing[unit.name] = self._missing.get(unit.name, 0) - 1
                while self._waiting and self._missing[self._waiting[0].name] == 0:
                    self._start(self._waiting.pop(0))

        return arrived

    def add(self, unit: Unit, entry: Entry, grad: Tensor) -> None:
        """Accumulate a weight gradient that was computed outside autograd."""
        parameter = entry.parameter
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad += grad
        unit.store(entry)

    def completes(self, units: Iterable[Unit]) -> None:
        """The next backward completes the gradients of these units, given in forward order."""
        self._waiting = list(units)[::-1]
        self._missing = {unit.name: len(unit.entries) for unit in self._waiting}

    def start(self, units: Iterable[Unit]) -> None:
        """The gradients of these units are complete: start reducing those that were not started during backward."""
        for unit in list(units)[::-1] if self._waiting is None else self._waiting:
            self._start(unit)
        self._waiting = None

    def _start(self, unit: Unit) -> None:
        if unit.zero >= 2:
            # One transfer in flight bounds the transient buffers to two units.
            self._drain(keep=1)
        flat = unit.flat_gradients()
        if unit.zero == 3:
            unit.release()
        if not self.average:
            return
        axis = self.mesh.dp if unit.zero == 0 else self.mesh.shard
        if axis is None:
            self._deliver(unit, flat)
        elif unit.zero == 0:
            self._pending.append((unit, axis.all_reduce(flat, wait=False), flat, unit.grad))
        else:
            out = torch.empty_like(unit.grad)
            self._pending.append((unit, axis.reduce_scatter(out, flat, wait=False), flat, out))

    def _deliver(self, unit: Unit, out: Tensor) -> None:
        if out is not unit.grad:
            unit.grad.add_(out)

    def _drain(self, keep: int = 0) -> None:
        while len(self._pending) > keep:
            unit, work, _flat, out = self._pending.pop(0)
            work.wait()
            self._deliver(unit, out)

    def finish(self) -> None:
        """Wait for all reductions; then every owned gradient is the sum over the whole world's micro-batches."""
        self._drain()
        if self.average and self.mesh.replica is not None and self.mesh.layout.zero > 0:
            works = [self.mesh.replica.all_reduce(unit.grad, wait=False) for unit in self.units]
            for work in works:
                work.wait()
        self._sum_shared(self.mesh.tp, lambda placed: placed.tp_sum == self.mesh.layout.tp)
        self._sum_shared(self.mesh.kv, lambda placed: 1 < placed.tp_sum < self.mesh.layout.tp)
        self._sum_shared(self.mesh.tied, lambda placed: placed.tied_copy)

    def _sum_shared(self, axis: Axis | None, belongs: Callable[[Placed], bool]) -> None:
        """One all-reduce over `axis` of all owned gradients whose parameter `belongs`."""
        if axis is None:
            return
        shared = [s.grad for unit in self.units for s in unit.segments() if belongs(s.placed)]
        if not shared:
            return
        flat = torch.cat(shared)
        axis.all_reduce(flat)
        for grad, total in zip(shared, flat.split([g.numel() for g in shared]), strict=True):
            grad.copy_(total)
