"""The simulator against closed forms, against the schedule's own timeline, and against a runtime's recorded step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply import pipeline_schedule
from fiveply.pipeline_schedule import COMPUTE, Action, Kind, Schedule, ScheduleError, build
from fiveply.plan.simulate import StageSeconds, bound, ends, simulate

EVEN = StageSeconds(1.0, 1.0, 1.0)
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb", 1), ("zbv", 2)]

seconds = st.floats(0.1, 2.0)
stage = st.builds(StageSeconds, seconds, seconds, seconds, send=st.floats(0, 0.5), send_back=st.floats(0, 0.5))


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (2, 7), (4, 4), (4, 16), (8, 64)])
def test_the_bubble_of_even_stages_is_the_closed_form(pp: int, micro_batches: int) -> None:
    """(p-1)/m for GPipe and 1F1B (Narayanan et al. 2021), (p-1)/(vm) interleaved; a third of it for zero-bubble at F=I=W."""
    for name in ("gpipe", "1f1b"):
        found = simulate(build(name, pp, micro_batches), [EVEN] * pp)
        assert found.bubble == pytest.approx((pp - 1) / micro_batches)
    for vp in (2, 4):
        found = simulate(build("interleaved", pp, micro_batches, vp), [EVEN] * pp * vp)
        assert found.bubble == pytest.approx((pp - 1) / (vp * micro_batches))
    zero_bubble = simulate(build("zb", pp, micro_batches), [EVEN] * pp)
    assert zero_bubble.bubble == pytest.approx((pp - 1) / (3 * micro_batches))


@pytest.mark.parametrize("pp", [2, 4])
def test_a_long_v_has_no_bubble_but_its_fill(pp: int) -> None:
    """ZB-V of even stages (Qi et al. 2024): a rank idles only until its first input has passed the stages before it."""
    found = simulate(build("zbv", pp, 4 * pp, 2), [EVEN] * 2 * pp)
    assert found.seconds == pytest.approx(found.busy[0] + pp - 1)


def costs_of(name: str, pp: int, stages: Sequence[StageSeconds]) -> pipeline_schedule.Costs:
    shape = build(name, pp, 1, len(stages) // pp)

    def cost(rank: int, action: Action) -> float:
        if action.kind not in COMPUTE:
            return 0.0
        one = stages[shape.stage_of(rank, action.chunk)]
        return {"forward": one.forward, "backward": one.input + one.weight, "input": one.input, "weight": one.weight}[
            action.kind
        ]

    return cost


@given(st.sampled_from(SCHEDULES), st.integers(1, 4), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=60)
def test_every_action_ends_as_in_the_schedules_own_timeline(
    schedule: tuple[str, int], pp: int, micro_batches: int, data: st.DataObject
) -> None:
    name, vp = schedule
    stages = [StageSeconds(*data.draw(st.tuples(seconds, seconds, seconds))) for _ in range(pp * vp)]
    built = build(name, pp, micro_batches, vp)
    expected = {
        (e.rank, e.kind, e.chunk, e.micro_batch): (e.start, e.end)
        for e in pipeline_schedule.timeline(built, costs_of(name, pp, stages))
    }
    found = simulate(built, stages)
    got = {(e.rank, e.kind, e.chunk, e.micro_batch): (e.start, e.end) for e in found.events if e.kind in COMPUTE}
    assert got.keys() == expected.keys()
    for key, times in got.items():
        assert times == pytest.approx(expected[key])


@given(st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(1, 70), st.booleans(), st.data())
@settings(deadline=None, max_examples=80)
def test_a_short_step_and_its_increment_give_the_end_of_a_long_one(
    schedule: tuple[str, int], pp: int, micro_batches: int, blocking: bool, data: st.DataObject
) -> None:
    name, vp = schedule
    stages = data.draw(st.lists(stage, min_size=pp * vp, max_size=pp * vp))
    plain = simulate(build(name, pp, micro_batches, vp), stages, blocking=blocking).seconds
    quick = ends(name, pp, vp, micro_batches, stages, blocking=blocking).seconds(stages)
    assert plain * (1 - 1.001e-3) <= quick <= plain * (1 + 1e-9)
    assert bound(name, pp, vp, micro_batches, stages, blocking=blocking) <= plain * (1 + 1e-9)


@pytest.mark.parametrize(("name", "vp"), SCHEDULES)
def test_even_stages_of_a_large_step_are_exact(name: str, vp: int) -> None:
    stages = [StageSeconds(1.0, 1.25, 0.75, send=0.1, send_back=0.1)] * 8 * vp
    plain = simulate(build(name, 8, 256, vp), stages).seconds
    assert ends(name, 8, vp, 256, stages).seconds(stages) == pytest.approx(plain, rel=1e-9)


def test_a_slow_stage_sets_the_pace_and_transfers_delay_only_the_fill() -> None:
    slow = StageSeconds(2.0, 2.0, 2.0)
    found = simulate(build("1f1b", 2, 10), [EVEN, slow])
    assert found.seconds == pytest.approx(1 + 60 + 2)
    sending = [StageSeconds(1.0, 1.0, 1.0, send=0.5, send_back=0.5)] * 2
    free = simulate(build("1f1b", 2, 10), [EVEN] * 2).seconds
    assert (
        free
        < simulate(build("1f1b", 2, 10), sending).seconds
        < simulate(build("1f1b", 2, 10), sending, blocking=True).seconds
    )


def test_a_reduction_hides_behind_the_last_backward_as_far_as_it_may() -> None:
    def end(**changes: float) -> float:
        return simulate(build("1f1b", 1, 4), [StageSeconds(1.0, 1.0, 1.0, **changes)]).seconds

    assert end() == 12
    assert end(reduce=1.5) == pytest.approx(13.5)
    assert end(reduce=1.5, reduce_early=1.5, reduce_tail=0.25) == pytest.approx(12.25)
    assert end(reduce=3.0, reduce_early=1.5, reduce_tail=0.25) == pytest.approx(13.5)


def test_a_schedule_that_waits_for_ever_is_refused() -> None:
    schedule = build("1f1b", 2, 2)
    never = tuple(action for action in schedule.ranks[0] if (action.kind, action.micro_batch) != (Kind.FORWARD, 1))
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(Schedule("1f1b", 2, 1, 2, (never, *schedule.ranks[1:])), [EVEN] * 2)
