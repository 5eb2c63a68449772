"""What this rank is doing now, always; and, while a step is recorded, when each thing that it did began and ended.

`Span`s nest: an action of the schedule, inside it the wait for a collective. Entering and leaving one costs 0.3 us when nothing is
recorded and a call 0.7 us (attributes are set, no clock is read), so they stay on: the watchdog reads `current` and
`moves` from another thread. A recorded step keeps clock readings beside them.

On GPUs kernels run behind the Python that starts them, so a recorded step's clock readings are CUDA events on the current
stream, and waits are what the stream waits. The position read by the watchdog is Python's: with NCCL that is the place
where Python next needs a value, which can lie after the collective that is stuck.

It does not know tensors' meaning, schedules or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fiveply.timeline import Event

MOST_EVENTS = 50_000
"""Of one rank in a recorded step; what comes after is not recorded."""


class AxisLike(Protocol):
    name: str
    ranks: list[int]


class Span:
    """A context in which this rank does one thing."""

    __slots__ = ("call", "chunk", "kind", "micro_batch", "outer", "peer", "recorder", "stage", "start")

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
        self.outer: Span | None = None
        self.start: Any = None

    def __enter__(self) -> Span:
        recorder = self.recorder
        self.outer = recorder.current
        recorder.current = self
        recorder.moves += 1
        if recorder.recording is not None:
            self.start = recorder.recording.now()
        return self

    def __exit__(self, *error: object) -> None:
        recorder = self.recorder
        recorder.current = self.outer
        recorder.moves += 1
        if self.start is not None and recorder.recording is not None:
            recorder.recording.spans.append((self, self.start, recorder.recording.now()))


class Call:
    """A collective or transfer that has been started: a `dist.Work` whose waiting is seen."""

    __slots__ = ("axis", "bytes", "end", "number", "operation", "peer", "recorder", "start", "work")

    def __init__(self, recorder: Recorder, axis: AxisLike, operation: str, size: int, peer: int, number: int) -> None:
        self.recorder, self.axis, self.operation = recorder, axis, operation
        self.bytes, self.peer, self.number = size, peer, number
        self.work: dist.Work | None = None
        self.start: Any = None
        self.end: Any = None

    def begin(self, issue: Callable[[], dist.Work | None], *, wait: bool) -> Call | None:
        """Start it, by `issue`, and wait until it is done unless told not to; a synchronous transport may return no work."""
        recording = self.recorder.recording
        if recording is not None:
            self.start = recording.now()
            recording.add(self, pending=not wait)
        with Span(self.recorder, "wait" if wait else "issue", call=self):
            self.work = issue()
            if wait and self.work is not None:
                self.work.wait()
        if not wait:
            if recording is not None:
                recording.poll()
            return self
        self._done()
        return None

    def wait(self) -> None:
        if self.work is not None:
            with Span(self.recorder, "wait", call=self):
                self.work.wait()
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
    """One rank's. `current`: the innermost span; `moves`: how often it has changed; `step`: counted from 1."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.step = 0
        self.moves = 0
        self.current: Span | None = None
        self.recording: _Recording | None = None

    def span(self, kind: str, chunk: int = -1, micro_batch: int = -1, stage: int = -1, peer: int = -1) -> Span:
        """`with recorder.span("optimizer"):`; kinds are `timeline.Event`'s."""
        return Span(self, kind, chunk, micro_batch, stage, peer)

    def start(self, device: torch.device) -> None:
        """Record from here on."""
        self.recording = _Recording(device)

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
    return {
        "axis": call.axis.name,
        "operation": call.operation,
        "bytes": call.bytes,
        "peer": call.peer,
        "number": call.number,
    }


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
