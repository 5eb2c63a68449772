"""The recorder: spans and calls as events, one clock, and nothing kept while no step is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.timeline import Event
from fiveply.world.launch import launch
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call, Field, Recorder, aligned

CPU = torch.device("cpu")


def calls_of_two_ranks() -> list[list[Event]]:
    mesh = Mesh(Layout.parse("pp=2"), ModelSpec.load("tiny"))
    recorder, world, down = mesh.recorder, mesh.world, mesh.down
    assert world is not None
    assert down is not None
    world.all_reduce(torch.ones(3))  # not recorded
    recorder.start(CPU)
    with recorder.span("forward", chunk=0, micro_batch=2, stage=1):
        world.all_reduce(torch.ones(4))
    pending = world.all_gather(torch.empty(4), torch.ones(2), wait=False)
    assert pending is not None
    pending.wait()
    x = torch.full((5,), float(mesh.rank))
    transfer = down.send(x, 1) if mesh.rank == 0 else down.receive(x, 0)
    with recorder.span("receive_forward", chunk=0, micro_batch=1, stage=1):
        transfer.wait()
    assert x[0] == 0
    events = recorder.stop()
    assert recorder.recording is None
    world.all_reduce(torch.ones(3))
    return world.gather_objects(events)


def test_calls_and_spans_become_events() -> None:
    for rank, events in enumerate(launch(calls_of_two_ranks, 2)):
        facts = [(e.kind, e.axis, e.operation, e.bytes, e.peer, e.number, e.micro_batch, e.stage) for e in events]
        operation, other = ("send", "receive")[rank], 1 - rank
        assert facts == [
            ("wait", "world", "all-reduce", 16, -1, 2, 2, 1),
            ("forward", "", "", 0, -1, -1, 2, 1),
            ("issue", "world", "all-gather", 16, -1, 3, -1, -1),
            ("wait", "world", "all-gather", 16, -1, 3, -1, -1),
            ("issue", "pp", operation, 20, other, 1, -1, -1),
            ("wait", "pp", operation, 20, other, 1, 1, 1),
            ("receive_forward", "", "", 0, -1, -1, 1, 1),
            ("collective", "world", "all-reduce", 16, -1, 2, -1, -1),
            ("collective", "world", "all-gather", 16, -1, 3, -1, -1),
            ("transfer", "pp", operation, 20, other, 1, -1, -1),
        ]
        assert all(e.rank == rank and e.start <= e.end for e in events)
        wait, forward, *_ = events
        assert forward.start <= wait.start <= wait.end <= forward.end


class Axis:
    name, ranks, place = "dp", [0, 1], 0


class Work:
    """Done when told."""

    done = False

    def wait(self) -> None:
        self.done = True

    def is_completed(self) -> bool:
        return self.done


def call(recorder: Recorder, work: Any, *, wait: bool) -> Any:
    return Call(recorder, Axis(), "all-reduce", 8, -1).begin(lambda: work, wait=wait)


def test_an_asynchronous_call_ends_when_it_is_seen_done() -> None:
    recorder, first, second = Recorder(), Work(), Work()
    recorder.start(CPU)
    a = call(recorder, first, wait=False)
    assert a.end is None
    first.done = True
    b = call(recorder, second, wait=False)
    assert a.end is not None
    assert b.end is None
    assert call(recorder, None, wait=True).is_completed(), "a transport that is done when it returns gives no work"
    ends = [e.end for e in recorder.stop() if e.lane == "communication"]
    assert ends == [a.end, max(ends), ends[2]], "what is not seen done ends with the recording"


def test_without_recording_no_clock_is_read_and_nothing_is_kept() -> None:
    recorder, work = Recorder(), Work()
    with recorder.span("forward", micro_batch=1) as outer:
        assert recorder.current is outer
        pending = call(recorder, work, wait=False)
        assert (outer.start, pending.start) == (None, None)
    assert recorder.current is None
    assert recorder.board[Field.MOVES] == 4
    assert recorder.board[Field.ISSUED] == 1


def test_a_profiler_sees_calls_that_are_none_of_torchs() -> None:
    recorder = Recorder()
    call(recorder, None, wait=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        pending = call(recorder, Work(), wait=False)
        pending.wait()
        call(recorder, None, wait=True)
    call(recorder, None, wait=True)
    assert [event.name for event in profiled.events()] == ["all-reduce over dp"] * 3, (
        "an issue, a wait, one that is both"
    )


def test_a_failing_action_leaves_no_span_behind() -> None:
    recorder = Recorder()
    try:
        with recorder.span("forward"):
            raise ValueError
    except ValueError:
        pass
    assert recorder.current is None


def test_clocks_of_one_machine_are_one_clock() -> None:
    assert aligned([("a", 5.0), ("a", 5.2), ("b", 105.0), ("b", 105.1)]) == [0, 0, -100.0, -100.1 + 0.0]
