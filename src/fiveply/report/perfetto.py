"""Recorded steps in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

A process a rank; in it a thread for compute and as many for communication as calls overlap. A flow leads from each send to
its receive. Several recorded steps stand one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fiveply import timeline
from fiveply.report.timelines import place, stacked
from fiveply.spec.errors import RunError
from fiveply.timeline import Event, RecordedStep

GAP = 0.1  # between steps, of the step before
COMPUTE_THREAD, COMMUNICATION_THREAD = 1, 2


def write(steps: list[RecordedStep], path: Path) -> Path:
    """Write the trace. Raises RunError where that can't be done."""
    events, start = list[dict[str, Any]](), 0.0
    for step in sorted(steps, key=lambda step: step.step):
        events += trace_events(step, start)
        start += step.seconds * (1 + GAP)
    try:
        path.write_bytes(msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events}))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; make the run's directory writable") from None
    return path


def trace_events(recorded: RecordedStep, start: float) -> Iterator[dict[str, Any]]:
    """One step's, beginning `start` seconds into the trace: metadata, complete events, flows. Times are in microseconds."""
    threads: dict[int, int] = {}
    for rank, events in recorded.by_rank().items():
        calls = [event for event in events if event.lane == "communication"]
        strips = stacked(calls)
        threads |= {id(event): COMMUNICATION_THREAD + strip for event, strip in zip(calls, strips, strict=True)}
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        yield _thread_name(rank, COMPUTE_THREAD, "compute")
        for strip in range(1 + max(strips, default=-1)):
            yield _thread_name(rank, COMMUNICATION_THREAD + strip, "communication")
        for event in events:
            thread = threads.get(id(event), COMPUTE_THREAD)
            args = _args(event)
            if event.kind == "step":
                args |= {"step": recorded.step, "layout": recorded.layout, "place": place(recorded, rank)}
            yield {"ph": "X", "name": title(event), "cat": event.lane, "pid": rank, "tid": thread,
                   "ts": 1e6 * (start + event.start), "dur": 1e6 * event.seconds, "args": args}  # fmt: skip
    for number, (send, receive) in enumerate(timeline.transfers(recorded.events)):
        flow = {"name": "transfer", "cat": "flow", "id": f"{recorded.step}.{number}"}
        # Both ends of a transfer are drawn alike (`timeline.matched`), and a flow binds to the slice around its time.
        for phase, event in (("s", send), ("f", receive)):
            yield flow | {"ph": phase, "bp": "e", "pid": event.rank, "tid": threads[id(event)],
                          "ts": 1e6 * (start + event.start)}  # fmt: skip


def _thread_name(rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}


def title(event: Event) -> str:
    """`forward 3`, `wait for all-reduce dp`."""
    if event.operation:
        call = f"{event.operation} {event.axis}"
        return {"wait": f"wait for {call}", "issue": f"start {call}"}.get(event.kind, call)
    return f"{event.kind} {event.micro_batch}" if event.micro_batch >= 0 else event.kind


def _args(event: Event) -> dict[str, Any]:
    """What applies of it."""
    numbers = {"stage": event.stage, "chunk": event.chunk, "micro_batch": event.micro_batch, "peer": event.peer,
               "number": event.number}  # fmt: skip
    texts = {"axis": event.axis, "operation": event.operation, "bytes": event.bytes}
    return {key: value for key, value in numbers.items() if value >= 0} | {k: v for k, v in texts.items() if v}
