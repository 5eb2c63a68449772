"""Shared memory between the ranks of one host: the compiled library, the block they map, and who is still there.

Notable:
- The block is an anonymous file (`memfd_create`) that peers open as /proc/PID/fd/N and that is closed once all have it: it
  has no name, so nothing is left behind however its ranks die, and /dev/shm's size does not matter. All of it is reserved
  at the start, so that shortage is an error then and not a bus error later.
- Every member says what it found through the group's store, and the first gives the verdict: all use the block or none.
- The library (`shm_native/`) moves bytes and never waits for long; time-outs, dead peers and their names are here.

What it does not know: tensors, process groups, meshes (`fiveply.world.shm_backend`).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fiveply.world import compiled
from fiveply.world.device import read

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "broadcast", "reduce", "gather", "scatter", "all-to-all", "barrier",
    "send", "receive",
)  # fmt: skip
(ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, GATHER, SCATTER, ALL_TO_ALL, BARRIER,
 SEND, RECEIVE) = range(len(KINDS))  # fmt: skip

PENDING, DONE, MISMATCH, CANCELLED = range(4)  # of an operation
_PRESENT, _LEFT, _FAILED = range(3)  # a member's status

_NATIVE = Path(__file__).with_name("shm_native")
_FLAGS = ("-fwrapv", "-ffp-contract=off", "-pthread")
_SLICE_NS = 200_000_000  # how long a wait stays in compiled code: then signals are taken and peers looked at
_SLOT_BYTES = 256 * 1024  # a rank has four slots: a mebibyte for collectives
_RINGS_BYTES = 1024 * 1024  # of what a rank sends to its peers
_SMALL_BYTES = 32 * 1024  # up to here every rank reduces everything


class Unavailable(Exception):  # noqa: N818
    """Shared memory can't serve; the message says why."""


class Parts(ctypes.Structure):
    """Arrays with a part a rank, each or none: pointers, and sizes in bytes where they differ."""

    _fields_ = tuple((name, ctypes.POINTER(ctypes.c_int64)) for name in ("ins", "outs", "in_sizes", "out_sizes"))


class CompiledSum(ctypes.Structure):
    """All that other compiled code needs to sum in place; `pending`: an operation that it leaves to `Channel.complete`."""

    _fields_ = (
        ("start", ctypes.c_void_p), ("group", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "dtype", "reduction", "limit_ns")), ("pending", ctypes.c_void_p),
    )  # fmt: skip


@lru_cache(maxsize=1)
def build() -> ctypes.CDLL | str:
    """The library, compiled at its first use on this machine and kept in the user's cache; else why there is none.

    A launcher calls this before it forks, so that its ranks find it loaded.
    """
    if sys.platform != "linux":
        return f"{platform.system()} has no futex and no memfd_create"
    library = compiled.library(*sources())
    return library if isinstance(library, str) else _declare(library)


def sources() -> tuple[Path, tuple[str, ...], list[Path]]:
    """What `compiled.library` takes."""
    return _NATIVE / "group.cpp", _FLAGS, sorted(_NATIVE.glob("*.hpp"))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, *arguments in (
        ("shm_size", i64, i32, i64, i64),
        ("shm_open_group", pointer, i32, i32, i32, i64, i64, i64),
        ("shm_start", pointer, pointer, i32, i32, i32, i32, i64, pointer, pointer, ctypes.POINTER(Parts), i64),
        ("shm_wait", i32, pointer, pointer, i64),
        ("shm_state", i32, pointer),
        ("shm_free", None, pointer),
        ("shm_moves", i64, pointer),
        ("shm_describe", None, pointer, pointer),
        ("shm_waits_for", None, pointer, pointer, pointer),
        ("shm_status", i32, pointer, i32),
        ("shm_leave", None, pointer, i32),
        ("shm_close", None, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _born(pid: int) -> str:
    """When a process started, in ticks, which tells it from a later one of the same number; empty for a dead one."""
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _host() -> str:
    return f"{socket.gethostname()} {read('/proc/sys/kernel/random/boot_id')}"


class Operation:
    """One operation on its way. What it reads and writes must stay in place until `Channel.finish` returns or raises."""

    __slots__ = ("bytes", "channel", "handle", "holds", "kind")

    def __init__(self, channel: Channel, handle: int, kind: int, size: int, holds: Any) -> None:
        self.channel, self.handle, self.kind, self.bytes, self.holds = channel, handle, kind, size, holds

    def pending(self) -> bool:
        return self.channel.library.shm_state(self.handle) == PENDING

    def described(self) -> list[int]:
        """Sequence number, rank blamed, and what that one does: sequence, kind, dtype, reduction, root, bytes."""
        values = (ctypes.c_int64 * 8)()
        self.channel.library.shm_describe(self.handle, values)
        return list(values)

    def __del__(self) -> None:
        if not self.pending():  # else its channel ends with it, in any order: what still moves it must not lose it
            self.channel.library.shm_free(self.handle)


class Channel:
    """The shared block as one rank of `ranks` (global numbers, in group order) sees it."""

    def __init__(
        self, library: ctypes.CDLL, fd: int, rank: int, ranks: Sequence[int], members: Sequence[dict[str, Any]],
        timeout_seconds: float,
    ) -> None:  # fmt: skip
        """Raises Unavailable."""
        self.library, self.rank, self.ranks, self.members = library, rank, list(ranks), members
        self.timeout_seconds = timeout_seconds
        self.names: dict[str, None] = {}  # of the axes that it serves: for messages, in order
        slot, ring = _sizes(len(ranks))
        group = library.shm_open_group(fd, rank, len(ranks), slot, ring, _SMALL_BYTES)
        if not group:
            raise Unavailable("the block could not be mapped")
        self.group = group
        self._lost: Exception | None = None
        # What these read and write stays in place, even if their callers forget them.
        self._underway: list[Operation] = []
        self.completer: Any = None  # of futures, where any were asked for

    def run(self, kind: int, size: int, source: int, target: int, dtype: int = 0, reduction: int = 0, root: int = 0,
            parts: Any = None, holds: Any = None) -> None:  # fmt: skip
        """Do it now. `size`: bytes of one part; `source`, `target`: addresses. Raises ConnectionError, RuntimeError."""
        if self._lost is not None:
            raise self._lost
        handle = self.library.shm_start(
            self.group, kind, dtype, reduction, root, size, source, target, parts, _SLICE_NS
        )
        if handle:
            self.finish(self._kept(Operation(self, handle, kind, size, holds)))

    def start(self, kind: int, size: int, source: int, target: int, dtype: int = 0, reduction: int = 0, root: int = 0,
              parts: Any = None, holds: Any = None) -> Operation:  # fmt: skip
        """Begin it; `holds` is kept until it has ended."""
        if self._lost is not None:
            raise self._lost
        handle = self.library.shm_start(self.group, kind, dtype, reduction, root, size, source, target, parts, 0)
        return self._kept(Operation(self, handle, kind, size, holds))

    def compiled_sum(self, dtype: int, reduction: int) -> CompiledSum:
        start = ctypes.cast(self.library.shm_start, ctypes.c_void_p).value
        return CompiledSum(start, self.group, ALL_REDUCE, dtype, reduction, _SLICE_NS, None)

    def complete(self, sum_: CompiledSum, size: int) -> None:
        """Wait for the end of the operation that it has left pending, of `size` bytes. Raises as `run`."""
        if sum_.pending is not None:
            self.finish(self._kept(Operation(self, sum_.pending, sum_.kind, size, None)))
            sum_.pending = None

    def _kept(self, operation: Operation) -> Operation:
        self._underway = [other for other in (*self._underway, operation) if other.pending()]
        return operation

    def finish(self, operation: Operation, timeout_seconds: float | None = None) -> None:
        """Wait for its end. Raises ConnectionError where a peer died, left or is silent, RuntimeError on a mismatch."""
        wait, limit = self.library.shm_wait, timeout_seconds or self.timeout_seconds
        moves, since = -1, time.monotonic()
        while (state := wait(self.group, operation.handle, min(_SLICE_NS, int(limit * 1e9)))) == PENDING:
            now, seen = time.monotonic(), self.library.shm_moves(self.group)
            if seen != moves:
                moves, since = seen, now
            awaited = self._awaited(operation)
            problem = next((f"rank {self.ranks[q]} {how}" for q in awaited if (how := self._gone(q))), "")
            if problem and wait(self.group, operation.handle, 1) == PENDING:  # what it did before is taken first
                self._fail(f"{problem} during {self._name(operation)}")
            elif now - since >= limit:
                silent = [str(self.ranks[q]) for q in awaited] or ["this one"]
                who = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(silent)} have"
                self._fail(f"{who} been silent for {limit:g} s in {self._name(operation)}")
        operation.holds = None  # the channel may remember the operation until it starts the next
        if state == MISMATCH:
            self._fail(self._mismatch(operation), RuntimeError)
        if state == CANCELLED:
            raise self._lost or ConnectionError(f"the group was closed during {self._name(operation)}")

    def _awaited(self, operation: Operation) -> list[int]:
        waits = (ctypes.c_ubyte * len(self.ranks))()
        self.library.shm_waits_for(self.group, operation.handle, waits)
        return [q for q, awaited in enumerate(waits) if awaited]

    def _gone(self, q: int) -> str:
        status = self.library.shm_status(self.group, q)
        if status != _PRESENT:
            return "had left the group" if status == _LEFT else "had given up"
        return "" if _born(self.members[q]["pid"]) == self.members[q]["born"] else "died"

    def _name(self, operation: Operation) -> str:
        sequence = operation.described()[0]
        group = f"{'/'.join(self.names)} {self.ranks}".strip()
        return f"{KINDS[operation.kind]} ({operation.bytes} bytes, operation {sequence + 1} of group {group})"

    def _mismatch(self, operation: Operation) -> str:
        _, blamed, their_sequence, kind, *_, size = operation.described()
        mine = f"rank {self.ranks[self.rank]} is in {self._name(operation)}"
        if operation.kind == RECEIVE:
            return f"{mine}, but rank {self.ranks[blamed]} sent {size} bytes, or of another dtype"
        detail = "" if (kind, size) != (operation.kind, operation.bytes) else " with another dtype, reduction or root"
        return f"{mine}, but rank {self.ranks[blamed]} in {KINDS[kind]} ({size} bytes, operation {their_sequence + 1}){detail}"

    def _fail(self, message: str, kind: type[Exception] = ConnectionError) -> None:
        """Nothing can be relied on after this: end all that is on its way, and tell the peers."""
        self._lost = self._lost or ConnectionError(message)
        self.library.shm_leave(self.group, _FAILED)
        raise kind(message)

    def leave(self) -> None:
        """Peers that still need this rank are told so; what they can read remains."""
        self._lost = self._lost or ConnectionError("this group was destroyed")
        self.library.shm_leave(self.group, _LEFT)

    def __del__(self) -> None:
        if hasattr(self, "group") and os.getpid() == self.members[self.rank]["pid"]:  # not in a child that inherited it
            self.library.shm_leave(self.group, _LEFT)
            self.library.shm_close(self.group)


def _sizes(n: int) -> tuple[int, int]:
    """Bytes of a slot and of the ring of one ordered pair: multiples of a cache line, and a slot of that for each rank."""
    return max(_SLOT_BYTES // (64 * n), 4) * 64 * n, max(_RINGS_BYTES // (64 * n), 16) * 64


def join(store: dist.Store, rank: int, ranks: Sequence[int], timeout_seconds: float) -> Channel:
    """Meet the other members through `store`, whose keys are this group's alone. All raise Unavailable, or none does."""
    library = build()
    me = {"host": _host() if sys.platform == "linux" else "", "pid": os.getpid(), "born": _born(os.getpid())}
    _tell(store, f"member/{rank}", me | {"problem": library if isinstance(library, str) else ""})
    members = [_told(store, f"member/{q}") for q in range(len(ranks))]
    problem = next((f"rank {r}: {m['problem']}" for r, m in zip(ranks, members, strict=True) if m["problem"]), "")
    if not problem and len({member["host"] for member in members}) > 1:
        problem = "the ranks are on several hosts"
    if problem or isinstance(library, str):
        raise Unavailable(problem)
    fd = -1
    try:
        channel = None
        try:
            fd = _block(library, store, rank, members[0]["pid"], len(ranks))
            channel = Channel(library, fd, rank, ranks, members, timeout_seconds)
        except (OSError, Unavailable) as error:
            problem = f"rank {ranks[rank]}: {error}"
        _tell(store, f"mapped/{rank}", problem)
        problems = [problem for q in range(len(ranks)) if (problem := _told(store, f"mapped/{q}"))]
        if problems or channel is None:
            raise Unavailable(problems[0])
        return channel
    finally:
        if fd >= 0:
            os.close(fd)


def _block(library: ctypes.CDLL, store: dist.Store, rank: int, owner: int, n: int) -> int:
    """A descriptor of the group's memory: made by the first member, opened through its process by the others."""
    if rank:
        told = _told(store, "block")
        if not isinstance(told, int):
            raise Unavailable(told)
        return os.open(f"/proc/{owner}/fd/{told}", os.O_RDWR)
    fd = -1
    try:
        fd = os.memfd_create("fiveply")
        os.posix_fallocate(fd, 0, library.shm_size(n, *_sizes(n)))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        problem = f"{library.shm_size(n, *_sizes(n)) >> 20} MiB could not be reserved ({error.strerror})"
        _tell(store, "block", problem)
        raise Unavailable(problem) from error
    _tell(store, "block", fd)
    return fd


def _tell(store: dist.Store, key: str, value: Any) -> None:
    store.set(f"shm/{key}", json.dumps(value))


def _told(store: dist.Store, key: str) -> Any:
    return json.loads(store.get(f"shm/{key}"))
