"""`shm` as a backend of torch.distributed, for CPU tensors of ranks on one host.

`dist.new_group(ranks, backend="shm")` gives a `SharedMemoryGroup`, which DistributedDataParallel, fully_shard and DTensor use
unchanged; where shared memory can't serve, a gloo group, and the reason in `Options.fell_back` if they were given.

Notable: a Python subclass of ProcessGroup replaces the group, so the default group should stay gloo: objects and control go
there. A call that waits runs in the calling thread; one that does not is moved on by a compiled thread.

What it does not know: how bytes move (`fiveply.world.shm`), axes and meshes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fiveply.world import shm

_REDUCED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32,
            torch.int64)  # fmt: skip
# By name, for two modules can name one dtype; the order is the same in every rank.
_OTHERS = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)} - set(_REDUCED), key=str)
_DTYPES = {dtype: code for code, dtype in enumerate((*_REDUCED, *_OTHERS))}
_OPS: Any = dist.ReduceOp.RedOpType
_REDUCTIONS = {op: code for code, op in enumerate(
    (_OPS.SUM, _OPS.AVG, _OPS.PRODUCT, _OPS.MIN, _OPS.MAX, _OPS.BAND, _OPS.BOR, _OPS.BXOR))}  # fmt: skip
_OF_BOOLEANS = {_OPS.SUM: _OPS.MAX, _OPS.PRODUCT: _OPS.MIN, _OPS.AVG: None}
_NO_LIMIT = timedelta(0)


@dataclass
class Options:
    """`pg_options` of `dist.new_group`, filled in: why the new group is gloo's, if it is."""

    fell_back: str = ""


def register() -> None:
    """Make `shm` known to torch.distributed; a second time does nothing."""
    if "shm" not in dist.Backend.backend_list:
        dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])


def _create(given: Any, options: Options | None) -> Any:
    options = options or Options()
    rank, size, timeout = given.group_rank, given.group_size, given.timeout
    try:
        ranks = list(given.global_ranks_in_group) or list(range(size))
        channel = shm.join(given.store, rank, ranks, timeout.total_seconds())
    except shm.Unavailable as error:
        options.fell_back = str(error)
        return dist.ProcessGroupGloo(given.store, rank, size, timeout=timeout)
    return SharedMemoryGroup(channel)


class Work(dist.Work):
    """A handle of one operation, or of several that end with it."""

    def __init__(
        self, operation: shm.Operation | None, results: list[Tensor], last: Callable[[], Any] | None = None
    ) -> None:
        """`last`: what remains to be done here once it has ended (a copy into a tensor that is not contiguous)."""
        super().__init__()
        self._operation, self.results, self.last = operation, results, last
        self._error: BaseException | None = None
        self._once = threading.Lock()
        self._future: torch.futures.Future[list[Tensor]] | None = None

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        operation = self._operation
        if operation is not None:
            try:
                operation.channel.finish(operation, max(0.0, timeout.total_seconds()) or None)
            except Exception as error:
                self._error = error
                raise
        with self._once:
            last, self.last = self.last, None
            if last is not None:
                last()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._operation is None or not self._operation.pending()

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[Tensor]:
        return self.results

    def _source_rank(self) -> int:
        assert self._operation is not None
        return self._operation.described()[1]

    source_rank = _source_rank

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        if self._future is None:
            self._future = torch.futures.Future()
            if self.is_completed():
                self._complete()
            else:
                assert self._operation is not None
                _completer(self._operation.channel).submit(self._complete)
        return self._future

    def _complete(self) -> None:
        assert self._future is not None
        try:
            self.wait()
        except Exception as error:
            self._future.set_exception(error)  # pyright: ignore[reportArgumentType]
        else:
            self._future.set_result(self.results)


def _completer(channel: shm.Channel) -> ThreadPoolExecutor:
    """Completes futures in the order of operations: those who ask for one (DistributedDataParallel) can't be called back."""
    if channel.completer is None:
        channel.completer = ThreadPoolExecutor(1, "shm futures")
    return channel.completer


class SharedMemoryGroup(dist.ProcessGroup):
    """Collectives and transfers of CPU tensors between ranks of one host. Reductions run in rank order.

    bfloat16 and float16 are summed in float32 and rounded once; sums of booleans are their disjunction.
    """

    def __init__(self, channel: shm.Channel) -> None:
        super().__init__(channel.rank, len(channel.ranks))  # pyright: ignore[reportCallIssue]
        self.channel, self.n = channel, len(channel.ranks)

    def getBackendName(self) -> str:  # noqa: N802
        return "shm"

    def name(self) -> str:
        return "shm"

    # What torch tells a group and asks it again: a plain ProcessGroup would keep these in backends, of which there are none.

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def shutdown(self) -> None:
        self.channel.leave()

    abort = shutdown

    def set_timeout(self, timeout: timedelta) -> None:
        self.channel.timeout_seconds = timeout.total_seconds()

    def run(self, kind: int, x: Tensor, out: Tensor, part: Tensor, reduction: Any = None, root: int = 0) -> None:
        """Do one collective of contiguous CPU tensors now, with as little around it as can be. `part`: whose size is a part's."""
        dtype, code = _dtype_and_code(part.dtype, reduction)
        self.channel.run(kind, part.nbytes, x.data_ptr(), out.data_ptr(), dtype, code, root)

    def compiled_sum(self, dtype: torch.dtype) -> shm.CompiledSum:
        return self.channel.compiled_sum(*_dtype_and_code(dtype, _OPS.SUM))

    def _do(self, kind: int, ins: list[Tensor], outs: list[Tensor], opts: Any = None, *, part: Tensor | None = None,
            reduction: Any = None, root: int = 0, tag: int | None = None, sizes: tuple[list[int], list[int]] | None = None,
            results: list[Tensor] | None = None) -> Work:  # fmt: skip
        """`ins`, `outs`: one tensor that holds all parts, or a tensor a rank; `sizes`: bytes of uneven parts."""
        for x in (*ins, *outs):
            if not x.is_cpu or x.layout != torch.strided:
                raise NotImplementedError(f"shm moves dense CPU tensors, not {x.layout} on {x.device}")
        scattered = [out for out in outs if not out.is_contiguous()]
        sources = [x if x.is_contiguous() else x.contiguous() for x in ins]
        targets = [out if out.is_contiguous() else out.contiguous() for out in outs]
        part = part if part is not None else (*sources, *targets)[0]
        dtype, code = _dtype_and_code(part.dtype, reduction)
        code = code if tag is None else tag
        parts = _parts(sources, targets, sizes) if sizes or len(ins) > 1 or len(outs) > 1 else None
        source = sources[0].data_ptr() if sources else 0
        target = targets[0].data_ptr() if targets else 0
        last = (lambda: [out.copy_(target) for out, target in zip(outs, targets, strict=True)]) if scattered else None
        arguments = (kind, part.nbytes, source, target, dtype, code, root, parts, (sources, targets, parts))
        if tag is None and not getattr(opts, "asyncOp", True):
            self.channel.run(*arguments)
            operation = None
        else:
            operation = self.channel.start(*arguments)
        return Work(operation, outs if results is None else results, last)

    # the names of ProcessGroup's methods, before and since torch 2.13

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        op = _OPS.SUM if opts is None else opts.reduceOp
        return _all(self._do(shm.ALL_REDUCE, [x], [x], opts, reduction=op) for x in tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        root = opts.rootRank
        return _all(self._do(shm.BROADCAST, [x], [x] if root != self.rank() else [], opts, root=root, results=[x])
                    for x in tensors)  # fmt: skip

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        root, op = opts.rootRank, opts.reduceOp
        return _all(self._do(shm.REDUCE, [x], [x] if root == self.rank() else [], opts, reduction=op, root=root, results=[x])
                    for x in tensors)  # fmt: skip

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        pairs = zip(outputs, inputs, strict=True)
        return _all(self._do(shm.ALL_GATHER, [x], self._each(outs, x), opts, part=x) for outs, x in pairs)

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Work:
        self._check(output, x, "output")
        return self._do(shm.ALL_GATHER, [x], [output], opts, part=x)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        return _all(self.all_gather_single(out, x, opts) for out, x in zip(outputs, inputs, strict=True))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        pairs, op = zip(outputs, inputs, strict=True), opts.reduceOp
        return _all(self._do(shm.REDUCE_SCATTER, self._each(xs, out), [out], opts, part=out, reduction=op)
                    for out, xs in pairs)  # fmt: skip

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any) -> Work:
        self._check(x, output, "input")
        return self._do(shm.REDUCE_SCATTER, [x], [output], opts, part=output, reduction=opts.reduceOp)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Work:
        return _all(self.reduce_scatter_single(out, x, opts) for out, x in zip(outputs, inputs, strict=True))

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Work:
        (x,), root = inputs, opts.rootRank
        outs = self._each(outputs[0], x) if root == self.rank() else []
        return self._do(shm.GATHER, [x], outs, opts, part=x, root=root)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        (out,), root = outputs, opts.rootRank
        ins = self._each(inputs[0], out) if root == self.rank() else []
        return self._do(shm.SCATTER, ins, [out], opts, part=out, root=root)

    def all_to_all_single(
        self, output: Tensor, x: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Work:
        """Sizes are rows of dim 0, none for equal parts."""

        def bytes_of(tensor: Tensor, rows: list[int]) -> list[int]:
            if not rows:
                if tensor.numel() and tensor.shape[0] % self.n:
                    raise ValueError(f"{tensor.shape[0]} rows are no equal parts for {self.n} ranks")
                return [tensor.nbytes // self.n] * self.n
            if sum(rows) != tensor.shape[0]:
                raise ValueError(f"parts of {rows} rows, but {tensor.shape[0]} rows")
            return [count * (tensor.nbytes // max(1, tensor.shape[0])) for count in rows]

        sizes = bytes_of(x, input_sizes), bytes_of(output, output_sizes)
        return self._do(shm.ALL_TO_ALL, [x], [output], opts, sizes=sizes)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        sizes = [x.nbytes for x in inputs], [out.nbytes for out in outputs]
        return self._do(shm.ALL_TO_ALL, inputs, outputs, opts, sizes=sizes)

    def barrier(self, opts: Any = None) -> Work:
        nothing = torch.empty(0, dtype=torch.uint8)
        return self._do(shm.BARRIER, [nothing], [], opts)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        (x,) = tensors
        return self._do(shm.SEND, [x], [], root=to, tag=tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work:
        (out,) = tensors
        return self._do(shm.RECEIVE, [], [out], root=source, tag=tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Work:
        return self.recv(tensors, -1, tag)

    _allgather_base: Any = all_gather_single
    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced
    _reduce_scatter_base: Any = reduce_scatter_single
    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced
    alltoall_base: Any = all_to_all_single

    def _check(self, whole: Tensor, part: Tensor, name: str) -> None:
        if whole.numel() != part.numel() * self.n:
            raise ValueError(f"the {name} has {whole.numel()} elements, not {self.n} x {part.numel()}")
        if whole.dtype != part.dtype:
            raise TypeError(f"input and output differ in dtype: {whole.dtype}, {part.dtype}")

    def _each(self, tensors: list[Tensor], like: Tensor) -> list[Tensor]:
        """A tensor a rank, checked against one of them."""
        if len(tensors) != self.n:
            raise ValueError(f"{len(tensors)} tensors for {self.n} ranks")
        if any(x.numel() != like.numel() or x.dtype != like.dtype for x in tensors):
            raise ValueError("tensors of one collective differ in size or dtype")
        return tensors


def _all(works: Iterable[Work]) -> Work:
    """Of several operations in order: the last one ends last."""
    everything = list(works)
    last = everything[-1]
    copies = [work.last for work in everything if work.last is not None]
    last.results = [x for work in everything for x in work.results]
    last.last = (lambda: [copy() for copy in copies]) if copies else None
    return last


def _dtype_and_code(dtype: torch.dtype, reduction: Any) -> tuple[int, int]:
    """What the library calls a dtype and a reduction. Raises NotImplementedError."""
    if reduction is None:
        return _DTYPES[dtype], 0
    return _reduced(dtype, getattr(reduction, "op", reduction))


@cache
def _reduced(dtype: torch.dtype, op: Any) -> tuple[int, int]:
    if dtype == torch.bool:
        dtype, op = torch.uint8, _OF_BOOLEANS.get(op, op)
    bitwise = op in (_OPS.BAND, _OPS.BOR, _OPS.BXOR)
    if op not in _REDUCTIONS or dtype not in _REDUCED or (bitwise and dtype.is_floating_point):
        raise NotImplementedError(f"shm does not reduce {dtype} by {op}")
    return _DTYPES[dtype], _REDUCTIONS[op]


def _parts(ins: list[Tensor], outs: list[Tensor], sizes: tuple[list[int], list[int]] | None) -> shm.Parts:
    in_sizes, out_sizes = sizes or (None, None)
    return shm.Parts(*map(_array, (_addresses(ins, in_sizes), _addresses(outs, out_sizes), in_sizes, out_sizes)))


def _addresses(tensors: list[Tensor], sizes: list[int] | None) -> list[int] | None:
    """Where each rank's part begins; none if parts are equal and follow each other."""
    if len(tensors) > 1:
        return [x.data_ptr() for x in tensors]
    return [tensors[0].data_ptr() + offset for offset in accumulate(sizes[:-1], initial=0)] if sizes else None


def _array(values: list[int] | None) -> Any:
    return (ctypes.c_int64 * len(values))(*values) if values is not None else None
