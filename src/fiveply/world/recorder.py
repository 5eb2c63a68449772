"""What this rank is doing now, always; and, while a step is recorded, when each thing that it did began and ended.

`Span`s nest: an action of the schedule, inside it the wait for a collective. Each writes where the rank stands to a
`Board`, a few integers of memory that the watchdog, other ranks of the host included, can read at any moment, even of a
process that is stopped. That costs 0.6 us a span and 1.2 us a call, so it stays on; clocks are read in a recorded step alone.

On GPUs kernels run behind the Python that starts them, so a recorded step's clock readings are CUDA events on the current
stream, and waits are what the stream waits. The board shows where Python stands: with NCCL that is the place where it next
needs a value, which can lie after the collective that is stuck.

It does not know tensors' meaning, schedules or files.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd import profiler
from torch.profiler import record_function

from fiveply.timeline import Event
from fiveply.world.device import read

KINDS = (
    "", "step", "data", "forward", "backward", "input", "weight", "send_forward", "receive_forward", "send_backward",
    "receive_backward", "gather", "reduce", "finish", "sums", "optimizer", "evaluation", "checkpoint",
)  # fmt: skip
OPERATIONS = ("", "all-reduce", "all-gather", "reduce-scatter", "send", "receive", "gather of objects")
"""What `Field.KIND` and `Field.OPERATION` count; the first stands for nothing, and for names that are not here."""
_KIND_CODES = {name: code for code, name in enumerate(KINDS)}
_OPERATION_CODES = {name: code for code, name in enumerate(OPERATIONS)}


class Field(IntEnum):
    """Places on a board; from ISSUED on, how many calls were started over each axis."""

    MOVES = 0  # how often the position has changed
    STEP = 1
    KIND = 2  # of the innermost span that is no call
    MICRO_BATCH = 3
    STAGE = 4
    OPERATION = 5  # of the call that is waited for, 0 for none
    AXIS = 6
    NUMBER = 7
    BYTES = 8
    PEER = 9
    ISSUED = 16


BOARD_BYTES = 8 * 64
# Plain integers: an enumeration's members take ten times as long to index with.
_MOVES, _STEP, _KIND, _MICRO_BATCH, _STAGE, _OPERATION, _AXIS, _NUMBER, _BYTES, _PEER, _ISSUED = map(int, Field)

MOST_EVENTS = 50_000
"""Of one rank in a recorded step; what comes after is not recorded."""


class AxisLike(Protocol):
    """`place`: among the recorder's axes."""

    name: str
    ranks: list[int]
    place: int


class Span:
    """A context in which this rank does one thing."""

    __slots__ = ("call", "chunk", "code", "kind", "micro_batch", "outer", "peer", "profiled", "recorder", "stage",
                 "start")  # fmt: skip

    def __init__(
        self,
        recorder: Recorder,
        kind: str,
        chunk: int = -1,
        micro_batch: int = -1,
        stage: int = -1,
        peer: int = -1,
        call: Call | None = None,
    ) -> None:
        self.recorder, self.kind, self.chunk, self.micro_batch = recorder, kind, chunk, micro_batch
        self.stage, self.peer, self.call = stage, peer, call
        self.code = _KIND_CODES.get(kind, 0)
        self.outer: Span | None = None
        self.start: Any = None
        self.profiled: record_function | None = None

    def __enter__(self) -> Span:
        recorder, call = self.recorder, self.call
        self.outer = recorder.current
        recorder.current = self
        board = recorder.board
        board[_MOVES] += 1
        if call is None:
            board[_KIND], board[_MICRO_BATCH], board[_STAGE] = self.code, self.micro_batch, self.stage
        else:
            board[_AXIS], board[_NUMBER], board[_BYTES], board[_PEER] = call.place, call.number, call.bytes, call.peer
            board[_OPERATION] = call.code
            if profiler._is_profiler_enabled:  # which does not see what skips torch's dispatch, nor waiting
                self.profiled = record_function(f"{call.operation} over {call.axis.name}")
                self.profiled.__enter__()
        if recorder.recording is not None:
            self.start = recorder.recording.now()
        return self

    def __exit__(self, *error: object) -> None:
        recorder, outer = self.recorder, self.outer
        recorder.current = outer
        board = recorder.board
        board[_MOVES] += 1
        if self.call is not None:
            board[_OPERATION] = 0
            if self.profiled is not None:
                self.profiled.__exit__(None, None, None)
        elif outer is None:
            board[_KIND], board[_MICRO_BATCH], board[_STAGE] = 0, -1, -1
        else:
            board[_KIND], board[_MICRO_BATCH], board[_STAGE] = outer.code, outer.micro_batch, outer.stage
        if self.start is not None and recorder.recording is not None:
            recorder.recording.spans.append((self, self.start, recorder.recording.now()))


class Call:
    """A collective or transfer that has been started: a `dist.Work` whose waiting is seen."""

    __slots__ = ("axis", "bytes", "code", "end", "number", "operation", "peer", "place", "recorder", "start", "work")

    def __init__(self, recorder: Recorder, axis: AxisLike, operation: str, size: int, peer: int) -> None:
        self.recorder, self.axis, self.operation, self.bytes, self.peer = recorder, axis, operation, size, peer
        self.code, self.place = _OPERATION_CODES.get(operation, 0), axis.place
        recorder.board[_ISSUED + self.place] += 1
        self.number: int = recorder.board[_ISSUED + self.place]
        self.work: dist.Work | None = None
        self.start: Any = None
        self.end: Any = None

    def begin(self, issue: Callable[[], dist.Work | None], *, wait: bool) -> Call:
        """Start it, by `issue`, and wait until it is done unless told not to; a synchronous transport may return no work."""
        recording = self.recorder.recording
        if recording is not None:
            self.start = recording.now()
            recording.add(self, pending=not wait)
        with Span(self.recorder, "wait" if wait else "issue", call=self):
            self.work = issue()
            if wait and self.work is not None:
                self.work.wait()
        if wait:
            self.work = None
            self._done()
        elif recording is not None:
            recording.poll()
        return self

    def wait(self) -> None:
        if self.work is not None:
            with Span(self.recorder, "wait", call=self):
                self.work.wait()
            self.work = None  # a recorded step keeps its calls, and would keep their tensors
        self._done()

    def is_completed(self) -> bool:
        done = self.work is None or self.work.is_completed()
        if done:
            self._done()
        return done

    def _done(self) -> None:
        recording = self.recorder.recording
        if recording is not None and self.end is None:
            self.end = recording.now()


class Recorder:
    """One rank's. `current`: the innermost span. `axes`: all that this rank calls over, (name, ranks), by their place.
    `stages`: what those that this rank holds consist of, in words."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.current: Span | None = None
        self.axes: list[tuple[str, tuple[int, ...]]] = []
        self.stages: dict[int, str] = {}
        self.recording: _Recording | None = None
        self.board: memoryview[int] = memoryview(bytearray(BOARD_BYTES)).cast("q")
        self.board[_MICRO_BATCH] = self.board[_STAGE] = -1

    @property
    def step(self) -> int:
        """Counted from 1; 0 before the first."""
        return self.board[_STEP]

    @step.setter
    def step(self, number: int) -> None:
        self.board[_STEP] = number

    def add_axis(self, name: str, ranks: list[int]) -> int:
        """Its place; an axis met again, as in a second mesh, keeps its own."""
        axis = name, tuple(ranks)
        if axis not in self.axes:
            self.axes.append(axis)
        return self.axes.index(axis)

    def move_to(self, memory: memoryview[int]) -> None:
        """Write to this board from here on."""
        memory[:] = self.board
        self.board = memory

    def span(self, kind: str, chunk: int = -1, micro_batch: int = -1, stage: int = -1, peer: int = -1) -> Span:
        """`with recorder.span("optimizer"):`; kinds are `timeline.Event`'s."""
        return Span(self, kind, chunk, micro_batch, stage, peer)

    def start(self, device: torch.device) -> _Recording:
        """Record from here on."""
        self.recording = _Recording(device)
        return self.recording

    def stop(self) -> list[Event]:
        """Events since `start`, in seconds of `time.perf_counter`, which is one clock for all processes of a machine."""
        recording, self.recording = self.recording, None
        assert recording is not None
        return recording.events(self.rank)


class _Recording:
    def __init__(self, device: torch.device) -> None:
        self.spans: list[tuple[Span, Any, Any]] = []
        self.calls: list[Call] = []
        self._pending: list[Call] = []
        self._base: torch.cuda.Event | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._base = self._mark()
        self._began = time.perf_counter()
        self.now: Callable[[], Any] = time.perf_counter if self._base is None else self._mark

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, call: Call, *, pending: bool) -> None:
        self.calls.append(call)
        if pending:
            self._pending.append(call)

    def poll(self) -> None:
        """Notice which calls have ended meanwhile: an asynchronous one does not say so by itself."""
        self._pending = [call for call in self._pending if call.end is None and not call.is_completed()]

    def events(self, rank: int) -> list[Event]:
        if self._base is not None:
            torch.cuda.synchronize()
        end = self.now()
        return [
            *(self._span(rank, *ended) for ended in self.spans[:MOST_EVENTS]),
            *(self._call(rank, call, end) for call in self.calls[:MOST_EVENTS]),
        ]

    def _span(self, rank: int, span: Span, start: Any, end: Any) -> Event:
        within = _action_around(span)
        facts: dict[str, Any] = _facts(span.call) if span.call else {"peer": span.peer}
        times = self._seconds(start), self._seconds(end)
        return Event(rank, span.kind, within.chunk, within.micro_batch, *times, stage=within.stage, **facts)

    def _call(self, rank: int, call: Call, end: Any) -> Event:
        kind = "transfer" if call.operation in ("send", "receive") else "collective"
        times = self._seconds(call.start), self._seconds(end if call.end is None else call.end)
        return Event(rank, kind, -1, -1, *times, lane="communication", **_facts(call))

    def _seconds(self, mark: Any) -> float:
        if self._base is None:
            return mark
        return self._began + self._base.elapsed_time(mark) / 1000


def _facts(call: Call) -> dict[str, Any]:
    return {"axis": call.axis.name} | {key: getattr(call, key) for key in ("operation", "bytes", "peer", "number")}


def _action_around(span: Span) -> Span:
    """The span itself, or the nearest around it that has a micro-batch: a wait belongs to its action."""
    around: Span | None = span
    while around is not None and around.micro_batch < 0:
        around = around.outer
    return around or span


def aligned(clocks: Sequence[tuple[str, float]]) -> list[float]:
    """What to add to each rank's clock so that all show rank 0's, from (machine, reading just after a barrier) by rank.

    Processes of one machine share the clock, which is better than any barrier.
    """
    machine, zero = clocks[0]
    return [0.0 if other == machine else zero - reading for other, reading in clocks]


def machine() -> str:
    """Names the running kernel: its processes share a clock, and can look at each other."""
    return read("/proc/sys/kernel/random/boot_id") or platform.node()
