"""Every operation and dtype over shared memory gives what gloo gives, in any order and at once; errors name their cause."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fiveply.world import shm
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups
from fiveply.world.shm_backend import SharedMemoryGroup

ReduceOp = dist.ReduceOp
REDUCED = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)
COPIED = (*REDUCED, torch.int16, torch.bool, torch.complex64, torch.float8_e4m3fn)
SLOT = shm._SLOT_BYTES
SIZES = (0, 1, 7, 1000, 3 * SLOT // 4 + 5, 7 * SLOT // 4 + 3)
"""Elements: none, one, odd, within a slot, and more than all four slots hold at 4 bytes each."""


def shared(names: str = "") -> SharedMemoryGroup:
    group = Groups("shm").get(list(range(dist.get_world_size())), name=names)
    assert isinstance(group, SharedMemoryGroup)
    return group


def over_shm(function: Callable[[SharedMemoryGroup], Any], ranks: int, **more: Any) -> Any:
    return launch(lambda: function(shared("tp")), ranks, backend="gloo", **{"timeout_seconds": 60, **more})


def values(size: int, dtype: torch.dtype, rank: int, salt: int = 0) -> Tensor:
    """Small whole numbers, whose sums and products over four ranks are exact in every dtype."""
    x = torch.arange(size).mul(7).add(3 * rank + salt).remainder(4)
    return x.bool() if dtype == torch.bool else x.to(torch.float32).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x.to(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def fold(xs: list[Tensor], op: Any) -> Tensor:
    """The reduction in rank order, in float32 for 16-bit floats."""
    kind = xs[0].dtype
    total = xs[0].float() if kind in (torch.bfloat16, torch.float16) else xs[0].clone()
    combine: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
        ReduceOp.SUM: torch.add, ReduceOp.AVG: torch.add, ReduceOp.PRODUCT: torch.mul, ReduceOp.MIN: torch.minimum,
        ReduceOp.MAX: torch.maximum, ReduceOp.BAND: torch.bitwise_and, ReduceOp.BOR: torch.bitwise_or,
        ReduceOp.BXOR: torch.bitwise_xor,
    }  # fmt: skip
    for x in xs[1:]:
        total = combine[op](total, x.to(total.dtype))
    return (total / len(xs) if op == ReduceOp.AVG else total).to(kind)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_reductions(ranks: int) -> None:
    def check(group: SharedMemoryGroup) -> None:
        me = group.rank()
        for size, dtype, op in itertools.product(SIZES, REDUCED, (ReduceOp.SUM, ReduceOp.MAX)):
            xs = [values(size, dtype, rank) for rank in range(ranks)]
            x = xs[me].clone()
            dist.all_reduce(x, op, group=group)
            assert same(x, fold(xs, op)), (size, dtype, op)
            x = xs[me].clone()
            dist.reduce(x, size % ranks, op, group=group)
            assert same(x, fold(xs, op) if me == size % ranks else xs[me]), (size, dtype, op)
            parts = [[values(size, dtype, rank, salt) for salt in range(ranks)] for rank in range(ranks)]
            expected = fold([row[me] for row in parts], op)
            out = torch.empty(size, dtype=dtype)
            group.reduce_scatter_single(out, torch.cat(parts[me]), options(op)).wait()
            assert same(out, expected), (size, dtype, op)
            out.zero_()
            dist.reduce_scatter(out, parts[me], op, group=group)
            assert same(out, expected), (size, dtype, op)
        for op in (ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.AVG, ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR):
            for dtype in (torch.float64, torch.bfloat16, torch.int16, torch.uint8):
                if dtype.is_floating_point != (op == ReduceOp.AVG) and op not in (ReduceOp.PRODUCT, ReduceOp.MIN):
                    continue
                xs = [values(1001, dtype, rank) for rank in range(ranks)]
                dist.all_reduce(x := xs[me].clone(), op, group=group)
                assert same(x, fold(xs, op)), (dtype, op)
        xs = [values(99, torch.bool, rank) for rank in range(ranks)]
        dist.all_reduce(x := xs[me].clone(), group=group)
        assert torch.equal(x, torch.stack(xs).any(0))

    over_shm(check, ranks)


def options(op: Any) -> Any:
    made = dist.distributed_c10d.ReduceScatterOptions()
    made.reduceOp = op
    return made


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_copies(ranks: int) -> None:
    def check(group: SharedMemoryGroup) -> None:
        me = group.rank()
        for size, dtype in itertools.product(SIZES, COPIED):
            root, what = size % ranks, (size, dtype)
            xs = [values(size, dtype, rank) for rank in range(ranks)]
            mine, empty = xs[me], lambda: [torch.empty_like(xs[0]) for _ in range(ranks)]  # noqa: B023
            dist.all_gather(outs := empty(), mine, group=group)
            assert all(map(same, outs, xs)), what
            group.all_gather_single(whole := torch.empty(ranks * size, dtype=dtype), mine).wait()
            assert same(whole, torch.cat([bits(x) for x in xs]).view(dtype) if size else whole), what
            dist.broadcast(x := mine.clone(), root, group=group)
            assert same(x, xs[root]), what
            dist.gather(mine, outs := (empty() if me == root else None), root, group=group)
            assert outs is None or all(map(same, outs, xs)), what
            dist.scatter(x := torch.empty_like(mine), xs if me == root else None, root, group=group)
            assert same(x, mine), what
            parts = [[values(size + 3 * a + b, dtype, a, b) for b in range(ranks)] for a in range(ranks)]
            outs = [torch.empty_like(parts[a][me]) for a in range(ranks)]
            dist.all_to_all(outs, parts[me], group=group)
            assert all(same(outs[a], parts[a][me]) for a in range(ranks)), what
            after, before = (me + 1) % ranks, (me - 1) % ranks
            works = [dist.irecv(x := torch.empty_like(mine), before, group=group), dist.isend(mine, after, group=group)]
            assert all(work is not None and work.wait() for work in works)
            assert same(x, xs[before]), what
        dist.barrier(group=group)

    over_shm(check, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_all_of_uneven_rows(ranks: int) -> None:
    def check(group: SharedMemoryGroup) -> None:
        me = group.rank()
        for width in (1, 5000):
            counts = [[(a * b + a) % 5 * 7 for b in range(ranks)] for a in range(ranks)]  # some are none
            x = torch.randn(sum(counts[me]), width)
            ours, theirs = (torch.empty(sum(row[me] for row in counts), width) for _ in range(2))
            splits = [row[me] for row in counts]
            dist.all_to_all_single(ours, x, splits, counts[me], group=group)
            dist.all_to_all_single(theirs, x, splits, counts[me])
            assert torch.equal(ours, theirs)
        x = torch.randn(2 * ranks, 3)
        dist.all_to_all_single(ours := torch.empty_like(x), x, group=group)
        dist.all_to_all_single(theirs := torch.empty_like(x), x)
        assert torch.equal(ours, theirs)

    over_shm(check, ranks)


def test_tensors_that_are_not_contiguous() -> None:
    def check(group: SharedMemoryGroup) -> None:
        me, peer = group.rank(), 1 - group.rank()
        x = values(60, torch.float32, me).view(6, 10).t()
        both = [values(60, torch.float32, rank).view(6, 10).t() for rank in (0, 1)]
        dist.all_reduce(total := x.clone(memory_format=torch.preserve_format), group=group)
        assert not total.is_contiguous()
        assert torch.equal(total, both[0] + both[1])
        outs = [torch.zeros(6, 10).t() for _ in range(2)]
        dist.all_gather(outs, x, group=group)
        assert all(map(torch.equal, outs, both))
        out = torch.zeros(6, 10).t()
        works = [dist.irecv(out, peer, group=group), dist.isend(x, peer, group=group)]
        assert all(work is not None and work.wait() for work in works)
        assert torch.equal(out, both[peer])

    over_shm(check, 2)


def test_sums_are_rounded_once_and_the_same_everywhere() -> None:
    def check(group: SharedMemoryGroup) -> list[bool]:
        good = []
        for dtype, size in itertools.product(
            (torch.float32, torch.float64, torch.bfloat16, torch.float16), (1000, 3 * SLOT)
        ):
            xs = [
                torch.randn(size, generator=torch.Generator().manual_seed(rank)).mul(100).to(dtype) for rank in range(4)
            ]
            dist.all_reduce(x := xs[group.rank()].clone(), group=group)
            good.append(same(x, fold(xs, ReduceOp.SUM)))
        # every half there is: subnormal, infinite, not a number
        halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
        dist.all_reduce(x := halves.clone() if group.rank() == 0 else torch.zeros_like(halves), group=group)
        good.append(torch.equal(x.nan_to_num(7), (halves + 0).nan_to_num(7)))
        for dtype in (torch.float16, torch.bfloat16):  # and roundings of sums, overflow too
            a, b = (torch.randn(10_000, generator=torch.Generator().manual_seed(9 + i)) for i in range(2))
            xs = [(a * 10.0 ** (6 * b)).to(dtype), (b * 10.0 ** (6 * a)).to(dtype)]
            dist.all_reduce(x := xs[group.rank()].clone() if group.rank() < 2 else torch.zeros_like(xs[0]), group=group)
            good.append(torch.equal(x.nan_to_num(7), (xs[0].float() + xs[1].float()).to(dtype).nan_to_num(7)))
        return good

    assert all(over_shm(check, 4))


def test_many_operations_at_once_and_transfers_that_cross() -> None:
    def check(group: SharedMemoryGroup) -> None:
        me, ranks = group.rank(), group.size()
        others = [rank for rank in range(ranks) if rank != me]
        for size in (10, SLOT):
            received = {(rank, i): torch.empty(size) for rank in others for i in range(4)}
            receives = [dist.irecv(out, rank, group=group) for (rank, _), out in received.items()]  # posted long before
            sums = [torch.full((size,), float(me + i)) for i in range(6)]
            works = [dist.all_reduce(x, group=group, async_op=True) for x in sums[:3]]
            sent = [(rank, torch.full((size,), float(10 * me + i))) for i in range(4) for rank in others]
            sends = [dist.isend(x, rank, group=group) for rank, x in sent]
            gathered = torch.empty(ranks * size)
            works.append(group.all_gather_single(gathered, torch.full((size,), float(me))))
            works += [dist.all_reduce(x, group=group, async_op=True) for x in sums[3:]]
            dist.barrier(group=group)  # waits behind all of them
            assert all(work is not None and work.is_completed() for work in works)
            for work in reversed([*works, *receives, *sends]):
                assert work is not None
                assert work.wait()
            for i, x in enumerate(sums):
                assert torch.equal(x, torch.full((size,), float(sum(range(ranks)) + ranks * i)))
            assert torch.equal(gathered, torch.arange(float(ranks)).repeat_interleave(size))
            assert all(bool((out == 10 * rank + i).all()) for (rank, i), out in received.items())

    over_shm(check, 4)


def test_an_operation_moves_on_while_nobody_waits() -> None:
    """Both ranks start a large one and only ask, so the thread must have done it."""

    def check(group: SharedMemoryGroup) -> bool:
        x = torch.ones(8 * SLOT)
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None
        for _ in range(2000):
            if work.is_completed():
                return bool((x == 2).all())
            time.sleep(0.001)  # no barrier: the ranks see the end a moment apart, and the first leaves
        return False

    assert over_shm(check, 2)


def test_what_is_on_its_way_outlives_its_callers_interest() -> None:
    """Its tensors stay in place, though nobody but the group knows them; its memory is let go once it has ended."""

    def check(group: SharedMemoryGroup) -> None:
        me, size = group.rank(), 3 * SLOT  # of float32: more than the ring holds
        x = values(size, torch.float32, 1)
        held = weakref.ref(x)
        if me:
            dist.isend(x, 0, group=group)
            del x
            gc.collect()
            assert held() is not None
            dist.barrier()
        else:
            dist.barrier()
            dist.recv(out := torch.empty(size), 1, group=group)
            assert torch.equal(out, x)
        x = torch.ones(size)
        held = weakref.ref(x)
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None
        work.wait()
        del x, work
        assert held() is None
        alone = Groups("shm").get([0, 1], lane=1)
        assert isinstance(alone, SharedMemoryGroup)
        alone.recv([torch.empty(1)], 1 - me, 0)  # never sent
        dist.barrier()

    over_shm(check, 2)


def test_tags_and_any_source() -> None:
    def check(group: SharedMemoryGroup) -> None:
        me, x = group.rank(), torch.empty(1)
        if me:
            works = [dist.isend(torch.tensor([float(10 * me + tag)]), 0, group=group, tag=tag) for tag in (1, 2)]
        else:
            works = []
            for tag in (1, 2):
                sources = {dist.recv(x, None, group=group, tag=tag): x.item() for _ in range(2)}
                assert sources == {1: 10.0 + tag, 2: 20.0 + tag}
        assert all(work is not None and work.wait() for work in works)

    over_shm(check, 3)


def test_objects_futures_and_coalesced_calls() -> None:
    def check(group: SharedMemoryGroup) -> None:
        me = group.rank()
        objects: list[Any] = [None, None]
        dist.all_gather_object(objects, {"rank": me}, group=group)
        assert objects == [{"rank": 0}, {"rank": 1}]
        x = torch.ones(4 * SLOT)
        work = group.allreduce([x])
        assert torch.equal(work.get_future().wait()[0], torch.full_like(x, 2))
        assert torch.equal(work.get_future().wait()[0], x)
        xs = [torch.full((3,), float(i)) for i in range(3)]
        assert all(bool((x == 2 * i).all()) for i, x in enumerate(group.allreduce_coalesced(xs).get_future().wait()))

    over_shm(check, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.allreduce([torch.zeros(3, dtype=torch.complex64)]), "NotImplementedError: shm does not reduce torch.comp"),
        (lambda g: g.allreduce([torch.zeros(2, 2).to_sparse()]), "NotImplementedError: shm moves dense CPU tensors"),
        (lambda g: g.all_gather_single(torch.empty(5), torch.empty(3)), "ValueError: the output has 5 elements, not 2 x 3"),
        (lambda g: g.all_gather_single(torch.empty(6, dtype=torch.int32), torch.empty(3)), "TypeError: input and output diff"),
        (lambda g: g.allgather([[torch.empty(3)]], [torch.empty(3)]), "ValueError: 1 tensors for 2 ranks"),
        (lambda g: dist.all_to_all_single(torch.empty(3), torch.empty(3), group=g), "ValueError: 3 rows are no equal parts"),
    ],
)  # fmt: skip
def test_what_it_can_not_do_is_refused(call: Callable[[SharedMemoryGroup], Any], message: str) -> None:
    def outcome(group: SharedMemoryGroup) -> str:
        try:
            call(group)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    assert over_shm(outcome, 2).startswith(message)
