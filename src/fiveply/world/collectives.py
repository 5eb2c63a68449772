"""Every collective and transfer between ranks: an `Axis` with plain operations, and differentiable functions over it.

Notable: the differentiable ones are the conjugate pairs of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022 for
sequence parallelism): what is identity forward is a sum backward, and so on. torch's own differentiable all-reduce sums the
gradient again, which is wrong for a loss that every rank holds. An axis of size one never reaches this file's callers.

Rows that an axis does not divide are padded to equal parts for the transfer and cut afterwards; padding rows carry zero
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fiveply.spec.placement import part
from fiveply.world import shm
from fiveply.world.recorder import Call, Recorder
from fiveply.world.shm_backend import SharedMemoryGroup

Function = TypeVar("Function", bound=Callable[..., Any])

# torch 2.13 renamed these two; older releases have the long names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Axis:
    """One axis of the mesh as one rank sees it: its group, size, and own index on it. The only place that calls collectives."""

    def __init__(
        self, name: str, ranks: list[int], group: dist.ProcessGroup, rank: int, recorder: Recorder | None = None
    ) -> None:
        self.name, self.ranks, self.group = name, ranks, group
        self.size, self.index = len(ranks), ranks.index(rank)
        self._shared = group if isinstance(group, SharedMemoryGroup) else None
        self._recorder = recorder or Recorder(rank)
        self.place = self._recorder.add_axis(name, ranks)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, *, wait: bool = True) -> Call:
        """In place."""
        shared = (shm.ALL_REDUCE, x, x, x, op)
        return self._call("all-reduce", x, wait, lambda: dist.all_reduce(x, op, self.group, async_op=True), shared)

    def compiled_sum(self, dtype: torch.dtype) -> shm.CompiledSum | None:
        """What lets compiled code do `all_reduce` of contiguous tensors by itself, unseen by the recorder, where it can."""
        return None if self._shared is None else self._shared.compiled_sum(dtype)

    def complete(self, sum_: shm.CompiledSum, x: Tensor) -> None:
        """What compiled code has left pending of a sum of `x`."""
        assert self._shared is not None
        self._shared.channel.complete(sum_, x.nbytes)

    def all_gather(self, out: Tensor, x: Tensor, *, wait: bool = True) -> Call:
        """`out` is `size` times as long as `x` on dim 0."""
        shared = (shm.ALL_GATHER, x, out, x)
        return self._call("all-gather", out, wait, lambda: _all_gather(out, x, self.group, async_op=True), shared)

    def reduce_scatter(self, out: Tensor, x: Tensor, *, wait: bool = True) -> Call:
        """`x` is `size` times as long as `out` on dim 0."""
        shared = (shm.REDUCE_SCATTER, x, out, out, dist.ReduceOp.SUM)
        return self._call(
            "reduce-scatter", x, wait, lambda: _reduce_scatter(out, x, group=self.group, async_op=True), shared
        )

    def send(self, x: Tensor, to: int) -> Call:
        """`to` is an index on this axis. The tensor must stay unchanged until the returned work is done."""
        peer = self.ranks[to]
        return self._call("send", x, False, lambda: dist.isend(x, peer, group=self.group), peer=peer)

    def receive(self, out: Tensor, source: int) -> Call:
        peer = self.ranks[source]
        return self._call("receive", out, False, lambda: dist.irecv(out, peer, group=self.group), peer=peer)

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's small Python value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        self._call("gather of objects", None, True, lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def collect_objects(self, value: Any) -> list[Any]:
        """Each rank's Python value, in rank order, on the axis's first rank; others get none."""
        first = self.index == 0
        values: list[Any] | None = [None] * self.size if first else None
        collect = lambda: dist.gather_object(value, values, dst=self.ranks[0], group=self.group)  # noqa: E731
        self._call("gather of objects", None, True, collect)
        return values or []

    def _call(
        self, operation: str, x: Tensor | None, wait: bool, issue: Callable[[], dist.Work | None],
        shared: tuple[Any, ...] | None = None, peer: int = -1,
    ) -> Call:  # fmt: skip
        """Start what `issue` starts, seen by the recorder; `x` is the larger of its tensors.

        `shared`: how shared memory does it. A call that waits then skips torch's dispatch, which takes five times as long
        as the exchange of a small tensor.
        """
        group = self._shared
        if wait and shared is not None and group is not None:
            issue = lambda: group.run(*shared)  # noqa: E731
        return Call(self._recorder, self, operation, 0 if x is None else x.nbytes, peer).begin(issue, wait=wait)


def rows_per_rank(rows: int, axis: Axis) -> int:
    return -(-rows // axis.size)


def local_rows(x_T: Tensor, axis: Axis) -> Tensor:
    """This rank's equal part of the rows, zero-padded at the end. Not differentiable: for indices."""
    part = rows_per_rank(x_T.shape[0], axis)
    mine = x_T[axis.index * part : (axis.index + 1) * part]
    return mine if mine.shape[0] == part else torch.cat((mine, mine.new_zeros(part - mine.shape[0], *mine.shape[1:])))


def _gather(x: Tensor, axis: Axis, rows: int) -> Tensor:
    out = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    axis.all_gather(out, x.contiguous())
    return out[:rows]


def _scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    part = rows_per_rank(x.shape[0], axis)
    missing = part * axis.size - x.shape[0]
    if missing:
        x = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
    out = x.new_empty(part, *x.shape[1:])
    axis.reduce_scatter(out, x.contiguous())
    return out


def _sum(x: Tensor, axis: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    axis.all_reduce(total)
    return total


def _gather_columns(x: Tensor, axis: Axis, columns: int) -> Tensor:
    widest = part(columns, axis.size, 0)[1]
    x_RC = x.reshape(-1, x.shape[-1])
    x_RC = F.pad(x_RC, (0, widest - x_RC.shape[1])).contiguous()
    out = x.new_empty(axis.size * x_RC.shape[0], widest)
    axis.all_gather(out, x_RC)
    parts = out.view(axis.size, -1, widest)
    whole = torch.cat([parts[rank, :, : part(columns, axis.size, rank)[1]] for rank in range(axis.size)], dim=1)
    return whole.view(*x.shape[:-1], columns)


def _own_columns(x: Tensor, axis: Axis) -> Tensor:
    return x.narrow(-1, *part(x.shape[-1], axis.size, axis.index)).contiguous()


class _Conjugate(torch.autograd.Function):
    """`forward(x)`, whose gradient is `backward` of the output's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Any) -> Tensor:
        ctx.of_gradient = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.of_gradient(grads[0]), None, None


def _conjugate(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    return _Conjugate.apply(x, forward, backward)  # type: ignore[no-any-return]


def _eager(function: Function) -> Function:
    """Keep a collective out of compiled graphs: the graph breaks there, and both sides stay compiled."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@_eager
def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Identity forward; backward sums the gradient over the axis (the paper's f)."""
    return _conjugate(x, lambda x: x.view_as(x), lambda grad: _sum(grad, axis))


@_eager
def sum_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis forward; identity backward (the paper's g)."""
    return _conjugate(x, lambda x: _sum(x, axis), lambda grad: grad)


@_eager
def gather_rows(x: Tensor, axis: Axis, rows: int) -> Tensor:
    """(T / n, ...) to (rows, ...): all-gather forward, reduce-scatter backward."""
    return _conjugate(x, lambda x: _gather(x, axis, rows), lambda grad: _scatter_sum(grad, axis))


@_eager
def scatter_sum_rows(x: Tensor, axis: Axis) -> Tensor:
    """(T, ...) to (T / n, ...): reduce-scatter forward, all-gather backward."""
    rows = x.shape[0]
    return _conjugate(x, lambda x: _scatter_sum(x, axis), lambda grad: _gather(grad, axis, rows))


@_eager
def gather_columns(x: Tensor, axis: Axis, columns: int) -> Tensor:
    """(..., this rank's part of `columns`) to (..., columns): all-gather forward, own slice backward."""
    return _conjugate(x, lambda x: _gather_columns(x, axis, columns), lambda grad: _own_columns(grad, axis))


@_eager
def take_columns(x: Tensor, axis: Axis) -> Tensor:
    """(..., C) to (..., this rank's part of C): own slice forward, all-gather backward."""
    columns = x.shape[-1]
    return _conjugate(x, lambda x: _own_columns(x, axis), lambda grad: _gather_columns(grad, axis, columns))


@_eager
def sum_over(x: Tensor, axis: Axis, share: float) -> Tensor:
    """Sum over ranks whose losses differ: forward and backward sum. A rank's loss counts `share` in the global one, and its
    gradients are multiplied by that later."""

    def backward(grad: Tensor) -> Tensor:
        total = _sum(grad * share, axis)
        return total / share if share else torch.zeros_like(total)

    return _conjugate(x, lambda x: _sum(x, axis), backward)
