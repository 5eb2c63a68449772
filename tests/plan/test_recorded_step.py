"""The simulator against steps that a running pipeline recorded: same actions, same dependencies, same end.

A replay is compared and not a forecast: each action gets the seconds that it took, whatever slowed it down, so nothing here
depends on the machine's load. It is exact only if the simulator makes each action wait for what it waited for in the run, and
for nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import pytest
from short_run import train

from fiveply import timeline
from fiveply.pipeline_schedule import COMPUTE, Kind, Schedule, build
from fiveply.plan.simulate import StageSeconds, simulate
from fiveply.timeline import Event, RecordedStep
from fiveply.world.device import find

LAYOUTS = (
    "pp=2,schedule=gpipe,micro_batch=2", "pp=2,micro_batch=1", "dp=2,pp=2,zero=2,micro_batch=1", "pp=4,micro_batch=1",
    "pp=4,schedule=interleaved,micro_batch=2", "pp=2,schedule=zb,micro_batch=1", "pp=4,schedule=zbv,micro_batch=1",
)  # fmt: skip
KINDS = {kind.value for kind in Kind}
RECEIVES = (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)
Key = tuple[str, int, int]
"""Kind, stage, micro-batch."""


class Pipeline(NamedTuple):
    """One pipeline of a recorded step: the actions of each pipeline rank, in order."""

    schedule: Schedule
    actions: list[list[Event]]
    place: dict[int, int]
    """Pipeline rank by global rank."""

    def ended(self) -> dict[Key, Event]:
        return {(e.kind, e.stage, e.micro_batch): e for actions in self.actions for e in actions if e.micro_batch >= 0}

    def producer(self, event: Event) -> tuple[Key, Key] | None:
        """Of a computation that needs another rank's: that one, and the receive that it comes by."""
        if event.kind == Kind.WEIGHT:
            return None
        step, receive = (-1, Kind.RECEIVE_FORWARD) if event.kind == Kind.FORWARD else (1, Kind.RECEIVE_BACKWARD)
        other = event.stage + step
        if not 0 <= other < self.schedule.stages or self.schedule.rank_of(other)[0] == self.place[event.rank]:
            return None
        return (event.kind, other, event.micro_batch), (receive, event.stage, event.micro_batch)


@pytest.fixture(scope="module", params=LAYOUTS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RecordedStep:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(find()), "threads_for", lambda self, ranks: 1)
        run = train(tmp_path_factory.mktemp("runs"), request.param, "recorded")
    (path,) = timeline.recorded_steps(run)
    return timeline.read(path)


def pipelines(step: RecordedStep) -> list[Pipeline]:
    schedule = build(step.schedule, step.pp, step.micro_batches, step.vp, reduce_each="zero=2" in step.layout)
    ranks: dict[int, list[int]] = defaultdict(list)
    for lane in sorted(step.ranks, key=lambda lane: lane.pp):
        ranks[lane.dp].append(lane.rank)
    by_rank = step.by_rank()
    return [
        Pipeline(schedule, [[e for e in by_rank[rank] if e.lane == "compute" and e.kind in KINDS] for rank in own],
                 {rank: place for place, rank in enumerate(own)})
        for own in ranks.values()
    ]  # fmt: skip


def test_each_rank_ran_the_actions_that_are_simulated(recorded: RecordedStep) -> None:
    for pipeline in pipelines(recorded):
        schedule, place = pipeline.schedule, pipeline.place | {-1: -1}
        stages = [StageSeconds(1.0, 1.0, 1.0, send=0.5, send_back=0.5)] * schedule.stages
        simulated = simulate(schedule, stages).events
        for rank, actions in enumerate(pipeline.actions):
            ran = [(e.kind, e.chunk, e.micro_batch, place[e.peer]) for e in actions]
            assert ran == [tuple(action) for action in schedule.ranks[rank]]
            computed = [(e.kind, e.stage, e.micro_batch) for e in actions if e.kind in COMPUTE]
            assert computed == [
                (e.kind, e.stage, e.micro_batch) for e in simulated if e.rank == rank and e.kind in COMPUTE
            ]


def test_every_receive_takes_what_its_peer_sent(recorded: RecordedStep) -> None:
    """Between each two ranks, by the actions and by the calls."""
    for pipeline in pipelines(recorded):
        sent: dict[tuple[int, int], list[Key]] = defaultdict(list)
        taken: dict[tuple[int, int], list[Key]] = defaultdict(list)
        for event in (event for actions in pipeline.actions for event in actions):
            if event.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                forward = event.kind == Kind.SEND_FORWARD
                receive = RECEIVES[0 if forward else 1]
                sent[event.rank, event.peer].append((receive, event.stage + (1 if forward else -1), event.micro_batch))
            elif event.kind in RECEIVES:
                taken[event.peer, event.rank].append((event.kind, event.stage, event.micro_batch))
        assert sent
        assert sent == taken
        at = [e for e in recorded.events if e.rank in pipeline.place]
        both = timeline.transfers(at)
        assert len(both) == sum(map(len, sent.values()))
        assert all((send.axis, send.bytes) == (take.axis, take.bytes) for send, take in both)


def replayed(pipeline: Pipeline) -> list[StageSeconds]:
    """What each action and transfer took, by stage and micro-batch. An action's seconds begin when its rank was free and its
    input there; where its rank had to wait, what the input came later than it was computed is the transfer's."""
    ended = pipeline.ended()
    seconds: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for actions in pipeline.actions:
        free = 0.0
        for event in (event for event in actions if event.kind in COMPUTE):
            start, source = free, pipeline.producer(event)
            if source is not None and (made := ended[source[0]]).end > free:
                start = ended[source[1]].end
                way = "send" if event.kind == Kind.FORWARD else "send_back"
                seconds[made.stage, made.micro_batch][way] = start - made.end
            part = "input" if event.kind in (Kind.BACKWARD, Kind.INPUT) else event.kind
            seconds[event.stage, event.micro_batch][part] = event.end - start
            free = event.end
    schedule = pipeline.schedule
    return [
        StageSeconds(**({"forward": 0.0, "input": 0.0, "weight": 0.0} | seconds[stage, micro_batch]))
        for stage in range(schedule.stages) for micro_batch in range(schedule.micro_batches)
    ]  # fmt: skip


def test_a_replay_ends_every_action_when_it_ended(recorded: RecordedStep) -> None:
    for pipeline in pipelines(recorded):
        stages = replayed(pipeline)
        assert all(
            value >= 0 for one in stages for value in (one.forward, one.input, one.weight, one.send, one.send_back)
        )
        found = simulate(pipeline.schedule, stages)
        ended = {key: event.end for key, event in pipeline.ended().items() if key[0] in COMPUTE}
        got = {(e.kind, e.stage, e.micro_batch): e.end for e in found.events if e.kind in COMPUTE}
        assert got == pytest.approx(ended, abs=1e-9)
        assert found.seconds == pytest.approx(max(ended.values()), abs=1e-9)


def test_an_action_begins_after_what_it_needs_in_the_run_and_in_its_simulation(recorded: RecordedStep) -> None:
    for pipeline in pipelines(recorded):
        found = simulate(pipeline.schedule, replayed(pipeline))
        simulated: dict[Key, Event] = {(e.kind, e.stage, e.micro_batch): e for e in found.events if e.kind in COMPUTE}
        ran = pipeline.ended()
        for key, event in simulated.items():
            source = pipeline.producer(ran[key])
            if source is not None:
                assert ran[key].start >= ran[source[1]].end >= ran[source[0]].end
                assert event.start >= simulated[source[0]].end - 1e-9
