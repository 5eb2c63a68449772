"""Schedules: proofs hold for every shape, closed forms of bubble and memory, and no mutation of a schedule gets past `check`."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.pipeline_schedule import (
    COMPUTE,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    bubble,
    build,
    check,
    compute_costs,
    peak_in_flight,
    picture,
    timeline,
)
from fiveply.spec.layout import Layout

SENDS = {Kind.SEND_FORWARD: 1, Kind.SEND_BACKWARD: -1}
RECEIVES = {Kind.RECEIVE_FORWARD: Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD: Kind.SEND_BACKWARD}
NAMES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4), ("zb", 1), ("zbv", 2)]
UNIT = compute_costs()


@st.composite
def schedules(draw: st.DrawFn, max_pp: int = 8, max_micro_batches: int = 20) -> Schedule:
    name, vp = draw(st.sampled_from(NAMES))
    pp, micro_batches = draw(st.integers(1, max_pp)), draw(st.integers(1, max_micro_batches))
    return build(name, pp, micro_batches, vp, gather=draw(st.booleans()), reduce_each=draw(st.booleans()))


def replay(schedule: Schedule) -> None:
    """What `check` claims, told differently: pass tokens through untagged first-in-first-out channels, one per ordered pair
    of ranks, step by step; and see that every stage did its work once, on what it was meant for."""
    channels: dict[tuple[int, int], deque[tuple[Kind, int, int]]] = defaultdict(deque)
    held: list[set[tuple[object, int, int]]] = [set() for _ in schedule.ranks]  # what a rank has by now
    left = [deque(actions) for actions in schedule.ranks]
    done: Counter[tuple[Kind, int, int]] = Counter()
    last = schedule.stages - 1

    def can_step(rank: int) -> bool:
        return bool(left[rank]) and (left[rank][0].kind not in RECEIVES or bool(channels[left[rank][0].peer, rank]))

    def step(rank: int) -> None:
        kind, chunk, index, peer = left[rank].popleft()
        have = held[rank]
        if kind is Kind.FINISH:
            assert not left[rank]
            return
        stage = schedule.stage_of(rank, chunk)
        if kind in SENDS:
            source = "output" if kind is Kind.SEND_FORWARD else "gradient"
            assert (source, stage, index) in have
            assert schedule.rank_of(stage + SENDS[kind])[0] == peer
            channels[rank, peer].append((kind, stage + SENDS[kind], index))
        elif kind in RECEIVES:
            assert channels[peer, rank].popleft() == (RECEIVES[kind], stage, index)
            have.add(("output", stage - 1, index) if kind is Kind.RECEIVE_FORWARD else ("gradient", stage + 1, index))
        elif kind is Kind.FORWARD:
            assert stage == 0 or ("output", stage - 1, index) in have
            assert not schedule.gather or ("parameters", stage, -1) in have
            have.add(("output", stage, index))
        elif kind in (Kind.BACKWARD, Kind.INPUT):
            assert ("output", stage, index) in have
            assert stage == last or ("gradient", stage + 1, index) in have
            have.add(("gradient", stage, index))
        elif kind is Kind.WEIGHT:
            assert ("gradient", stage, index) in have
        elif kind is Kind.GATHER:
            have.add(("parameters", stage, -1))
        done[kind, stage, index] += 1
        if kind is Kind.REDUCE:
            for covered in range(schedule.micro_batches) if index < 0 else (index,):
                assert done[Kind.BACKWARD, stage, covered] + done[Kind.WEIGHT, stage, covered] == 1

    while any(can_step(rank) for rank in range(schedule.pp)):
        for rank in range(schedule.pp):
            if can_step(rank):
                step(rank)
    assert not any(left)
    assert not any(channels.values())
    for stage in range(schedule.stages):
        assert done[Kind.GATHER, stage, -1] == schedule.gather
        assert done[Kind.REDUCE, stage, -1] == (not schedule.reduce_each)
        for index in range(schedule.micro_batches):
            whole, split, weight = (done[kind, stage, index] for kind in (Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT))
            assert done[Kind.FORWARD, stage, index] == 1
            assert (whole, split, weight) in ((1, 0, 0), (0, 1, 1))
            assert done[Kind.REDUCE, stage, index] == schedule.reduce_each


# Every shape is proven.


@pytest.mark.parametrize(("name", "vp"), NAMES)
@pytest.mark.parametrize("pp", range(1, 9))
def test_every_shape_is_proven(name: str, vp: int, pp: int) -> None:
    for micro_batches in (1, 2, 3, 4, 5, 7, 8, 9, 12, 17):
        schedule = build(name, pp, micro_batches, vp)
        check(schedule)
        replay(schedule)


@settings(deadline=None, max_examples=100)
@given(schedules())
def test_drawn_schedules_are_proven_with_gathers_and_reductions(schedule: Schedule) -> None:
    check(schedule)
    replay(schedule)


@pytest.mark.parametrize(("name", "vp"), NAMES)
def test_a_large_schedule_is_proven(name: str, vp: int) -> None:
    check(build(name, 16, 100, vp, gather=True, reduce_each=True))


@given(schedules(max_micro_batches=2))
def test_placement_is_the_layouts(schedule: Schedule) -> None:
    layout = Layout(pp=schedule.pp, schedule=schedule.name, vp=schedule.vp)  # type: ignore[arg-type]
    for rank in range(schedule.pp):
        for chunk in range(schedule.vp):
            stage = schedule.stage_of(rank, chunk)
            assert stage == layout.stage_of(rank, chunk)
            assert schedule.rank_of(stage) == (rank, chunk)


@pytest.mark.parametrize(("name", "vp"), NAMES)
def test_one_rank_runs_micro_batch_after_micro_batch(name: str, vp: int) -> None:
    schedule = build(name, 1, 3, vp)
    kinds = [Kind.FORWARD] * vp + [Kind.BACKWARD] * vp
    assert [action.kind for action in schedule.ranks[0] if action.kind in COMPUTE] == kinds * 3
    assert peak_in_flight(schedule) == (vp,)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("dualpipe", 2, 4), "choose one of gpipe, 1f1b"),
        (("1f1b", 0, 4), "must be 1 or more"),
        (("1f1b", 2, 0), "must be 1 or more"),
        (("1f1b", 2, 4, 2), "does not run 2 chunks"),
        (("interleaved", 2, 4), "does not run 1 chunks"),
        (("zbv", 2, 4, 3), "does not run 3 chunks"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple[str, int, int], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        build(*arguments)


# Bubble and memory have their closed forms.


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 8, 13, 20])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name: str, pp: int, micro_batches: int) -> None:
    for costs in (UNIT, compute_costs(1, 0.5, 0.75)):
        assert bubble(build(name, pp, micro_batches), costs) == pytest.approx((pp - 1) / micro_batches)


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("vp", [2, 3, 4])
def test_bubble_of_interleaved_from_pp_micro_batches_on(pp: int, vp: int) -> None:
    for micro_batches in range(pp, 21):
        schedule = build("interleaved", pp, micro_batches, vp)
        assert bubble(schedule, UNIT) == pytest.approx((pp - 1) / (vp * micro_batches))


@pytest.mark.parametrize("pp", range(1, 9))
def test_bubble_of_zero_bubble_schedules(pp: int) -> None:
    for micro_batches in range(1, 21):
        one_f_one_b = bubble(build("1f1b", pp, micro_batches), UNIT)
        zb = bubble(build("zb", pp, micro_batches), UNIT)
        zbv = bubble(build("zbv", pp, micro_batches, 2), UNIT)
        assert zbv <= zb + 1e-12
        assert zb <= one_f_one_b
        if micro_batches >= pp:
            assert zb == pytest.approx(one_f_one_b / 3)
        if micro_batches >= 2 * pp - 1:
            assert zbv == pytest.approx(one_f_one_b / 6)


def test_bubble_of_zb_with_uneven_halves_is_the_papers() -> None:
    for forward, input_gradient, weight in ((1, 1.2, 0.7), (1, 1.5, 1)):
        schedule = build("zb", 4, 12)
        idle = (
            bubble(schedule, compute_costs(forward, input_gradient, weight)) * 12 * (forward + input_gradient + weight)
        )
        assert idle == pytest.approx(3 * (forward + input_gradient - weight))


@pytest.mark.parametrize("pp", range(1, 9))
def test_activations_in_flight(pp: int) -> None:
    for micro_batches in range(1, 21):
        gpipe = peak_in_flight(build("gpipe", pp, micro_batches))
        assert gpipe == (micro_batches if pp > 1 else 1,) * pp
        one_f_one_b = peak_in_flight(build("1f1b", pp, micro_batches))
        assert one_f_one_b == tuple(min(micro_batches, pp - rank) for rank in range(pp))
        assert max(peak_in_flight(build("zb", pp, micro_batches))) == min(micro_batches, pp)
        assert max(peak_in_flight(build("zbv", pp, micro_batches, 2))) == 2 * min(micro_batches, pp)


@pytest.mark.parametrize("pp", range(2, 9))
@pytest.mark.parametrize("vp", [2, 3, 4])
def test_activations_in_flight_of_interleaved(pp: int, vp: int) -> None:
    for rounds in (2, 3):  # Megatron's pp * (1 + (pp - 1) / (pp * vp)) stages' worth, here in chunks
        assert max(peak_in_flight(build("interleaved", pp, rounds * pp, vp))) == vp * pp + pp - 1
    for micro_batches in range(1, 21):
        largest_round = -(-micro_batches // max(1, micro_batches // pp))
        bound = min(vp * micro_batches, 2 * pp - 1 + (vp - 1) * largest_round)
        assert max(peak_in_flight(build("interleaved", pp, micro_batches, vp))) == bound


# Where the actions stand.


def test_actions_of_a_small_schedule() -> None:
    schedule = build("1f1b", 2, 2, gather=True, reduce_each=True)
    assert [str(action) for action in schedule.ranks[0]] == [
        "gather chunk 0",
        "forward chunk 0 micro-batch 0",
        "send_forward chunk 0 micro-batch 0 peer 1",
        "forward chunk 0 micro-batch 1",
        "send_forward chunk 0 micro-batch 1 peer 1",
        "receive_backward chunk 0 micro-batch 0 peer 1",
        "backward chunk 0 micro-batch 0",
        "reduce chunk 0 micro-batch 0",
        "receive_backward chunk 0 micro-batch 1 peer 1",
        "backward chunk 0 micro-batch 1",
        "reduce chunk 0 micro-batch 1",
        "finish",
    ]


def test_the_turn_of_the_v_is_handed_over_locally() -> None:
    schedule = build("zbv", 2, 2, 2)
    assert all(action.peer == 0 for action in schedule.ranks[1] if action.peer >= 0)
    transfers = [action for action in schedule.ranks[1] if action.peer >= 0]
    assert Counter(action.kind for action in transfers) == dict.fromkeys([*SENDS, *RECEIVES], 2)
    assert {action.chunk for action in transfers if action.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD)} == {1}
    assert not [action for action in build("zbv", 1, 3, 2).ranks[0] if action.peer >= 0]


@given(schedules())
def test_gathers_stand_one_compute_action_ahead(schedule: Schedule) -> None:
    for actions in schedule.ranks:
        computes = [action for action in actions if action.kind in COMPUTE]
        for chunk in range(schedule.vp) if schedule.gather else ():
            gather = actions.index(Action(Kind.GATHER, chunk, -1))
            before = sum(action.kind in COMPUTE for action in actions[:gather])
            first_use = next(index for index, action in enumerate(computes) if action.chunk == chunk)
            assert before == max(0, first_use - 1)


@given(schedules())
def test_receives_stand_directly_before_their_use_unless_the_peer_sent_more(schedule: Schedule) -> None:
    both_kinds_share_a_pair = schedule.name == "zbv" or (schedule.name == "interleaved" and schedule.pp == 2)
    for actions in schedule.ranks:
        for action, following in pairwise(actions):
            if action.kind in RECEIVES and not both_kinds_share_a_pair:
                assert following[1:3] == action[1:3]
                assert following.kind in COMPUTE
            elif action.kind in RECEIVES:
                assert following.kind in COMPUTE or following.kind in RECEIVES


# Execution.


@settings(deadline=None, max_examples=100)
@given(schedules(), st.data())
def test_timeline_is_the_longest_path_through_the_dependencies(schedule: Schedule, data: st.DataObject) -> None:
    """Receiving in the order of the sends never delays: times are those of the bare dependencies, whatever the costs."""
    speeds = data.draw(st.lists(st.integers(1, 9), min_size=schedule.stages, max_size=schedule.stages))

    def cost(rank: int, action: Action) -> float:
        return UNIT[action.kind] * speeds[schedule.stage_of(rank, action.chunk)] if action.kind in COMPUTE else 0.0

    events = timeline(schedule, cost)
    end = {(event.kind, schedule.stage_of(event.rank, event.chunk), event.micro_batch): event.end for event in events}
    clock = [0.0] * schedule.pp
    for event in events:
        rank, kind, chunk, micro_batch = event.rank, Kind(event.kind), event.chunk, event.micro_batch
        stage = schedule.stage_of(rank, chunk)
        ready = clock[rank]
        if kind is Kind.FORWARD and stage > 0:
            ready = max(ready, end[kind, stage - 1, micro_batch])
        elif kind in (Kind.BACKWARD, Kind.INPUT) and stage < schedule.stages - 1:
            ready = max(ready, end[kind, stage + 1, micro_batch])
        assert event.start == ready
        assert event.seconds == cost(rank, Action(kind, chunk, micro_batch))
        clock[rank] = event.end


def test_transfers_are_listed_when_they_cost() -> None:
    costs = {**UNIT, Kind.SEND_FORWARD: 0.25, Kind.RECEIVE_BACKWARD: 0.5}
    events = timeline(build("gpipe", 2, 1), costs)
    assert [(event.rank, event.kind, event.start, event.end) for event in events] == [
        (0, Kind.FORWARD, 0, 1),
        (0, Kind.SEND_FORWARD, 1, 1.25),
        (0, Kind.RECEIVE_BACKWARD, 4.25, 4.75),
        (0, Kind.BACKWARD, 4.75, 6.75),
        (1, Kind.FORWARD, 1.25, 2.25),
        (1, Kind.BACKWARD, 2.25, 4.25),
    ]


# No mutation gets past `check`.


def with_rank(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    ranks = (*schedule.ranks[:rank], tuple(actions), *schedule.ranks[rank + 1 :])
    return msgspec.structs.replace(schedule, ranks=ranks)


@settings(deadline=None, max_examples=400)
@given(schedules(max_pp=4, max_micro_batches=6), st.sampled_from(["drop", "repeat", "add", "change"]), st.data())
def test_dropped_repeated_added_and_changed_actions_are_caught(
    schedule: Schedule, what: str, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, schedule.pp - 1))
    actions = list(schedule.ranks[rank])
    index = data.draw(st.integers(0, len(actions) - 1))
    if what == "drop":
        del actions[index]
    elif what == "repeat":
        actions.insert(data.draw(st.integers(0, len(actions))), actions[index])
    elif what == "add":
        numbers = st.integers(-1, 2)
        foreign = st.builds(Action, st.sampled_from(list(Kind)), numbers, numbers, numbers)
        actions.insert(index, data.draw(foreign.filter(lambda action: action not in actions)))
    else:
        field = data.draw(st.sampled_from(["kind", "chunk", "micro_batch", "peer"]))
        values = st.sampled_from(list(Kind)) if field == "kind" else st.integers(-1, 7)
        old = getattr(actions[index], field)
        actions[index] = actions[index]._replace(**{field: data.draw(values.filter(lambda value: value != old))})
    with pytest.raises(ScheduleError):
        check(with_rank(schedule, rank, actions))


@settings(deadline=None, max_examples=200)
@given(schedules(max_pp=4, max_micro_batches=6).filter(lambda schedule: schedule.pp > 1), st.data())
def test_swapped_transfers_are_caught(schedule: Schedule, data: st.DataObject) -> None:
    """Two sends swapped are never right; two receives from one peer neither, in both directions together."""
    rank = data.draw(st.integers(0, schedule.pp - 1))
    actions = list(schedule.ranks[rank])
    first = data.draw(st.sampled_from([index for index, action in enumerate(actions) if action.peer >= 0]))
    sending = actions[first].kind in SENDS
    others = [
        index
        for index, action in enumerate(actions)
        if index != first and (action.kind in SENDS if sending else action.kind in RECEIVES)
        if sending or action.peer == actions[first].peer
    ]
    if others:
        second = data.draw(st.sampled_from(others))
        actions[first], actions[second] = actions[second], actions[first]
        with pytest.raises(ScheduleError):
            check(with_rank(schedule, rank, actions))


@settings(deadline=None, max_examples=400)
@given(schedules(max_pp=4, max_micro_batches=5), st.sampled_from(["swap", "move", "exchange"]), st.data())
def test_what_check_accepts_runs(schedule: Schedule, what: str, data: st.DataObject) -> None:
    """Some reorderings are harmless (two weight gradients, say): those that `check` lets pass must run right."""
    rank = data.draw(st.integers(0, schedule.pp - 1))
    actions = list(schedule.ranks[rank])
    first, second = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    if what == "swap":
        actions[first], actions[second] = actions[second], actions[first]
    elif what == "move":
        actions.insert(second, actions.pop(first))
    else:  # another schedule's rank: right by itself, perhaps not beside the others
        name, vp = data.draw(st.sampled_from([pair for pair in NAMES if pair[1] == schedule.vp]))
        other = build(
            name, schedule.pp, schedule.micro_batches, vp, gather=schedule.gather, reduce_each=schedule.reduce_each
        )
        actions = list(other.ranks[rank])
    mutant = with_rank(schedule, rank, actions)
    try:
        check(mutant)
    except ScheduleError:
        return
    replay(mutant)


def test_errors_name_rank_action_and_reason() -> None:
    schedule = build("1f1b", 2, 2, gather=True)
    first = list(schedule.ranks[0])
    with pytest.raises(ScheduleError, match=r"rank 0, action 0 \(forward chunk 0 .*gather chunk 0 must come before it"):
        check(with_rank(schedule, 0, first[1:]))
    with pytest.raises(ScheduleError, match=r"rank 0, action 4 .*expected send_forward chunk 0 micro-batch 1 peer 1"):
        check(with_rank(schedule, 0, first[:4] + first[5:]))
    with pytest.raises(ScheduleError, match=r"rank 0, action \d+: the last action is not finish"):
        check(with_rank(schedule, 0, first[:-1]))
    with pytest.raises(ScheduleError, match=r"rank 0, action \d+ \(finish\): reduce chunk 0 must come before it"):
        check(with_rank(schedule, 0, [action for action in first if action.kind is not Kind.REDUCE]))
    with pytest.raises(ScheduleError, match="1 ranks have actions, pp is 2"):
        check(msgspec.structs.replace(schedule, ranks=schedule.ranks[:1]))


def test_actions_that_belong_to_no_stage_are_caught() -> None:
    schedule = build("zb", 2, 2)
    index = schedule.ranks[0].index(Action(Kind.INPUT, 0, 0))
    for foreign in (Action(Kind.GATHER, 0, -1), Action(Kind.FORWARD, 1, 0), Action(Kind.BACKWARD, 0, 0)):
        actions = [*schedule.ranks[0][:index], foreign, *schedule.ranks[0][index:]]
        with pytest.raises(ScheduleError, match=r"rank 0, action \d+ .*does not belong here"):
            check(with_rank(schedule, 0, actions))


def test_a_mismatch_and_a_deadlock_are_named() -> None:
    gpipe = build("gpipe", 2, 2)
    f0, s0, f1, s1, *rest = gpipe.ranks[0]
    with pytest.raises(ScheduleError, match=r"rank 1, action 0 \(receive_forward .*rank 0 sends something else"):
        check(with_rank(gpipe, 0, [f1, s1, f0, s0, *rest]))
    # Rank 0 waits for the first gradient before it sends the second activation, which rank 1 wants first.
    r0, b0, *rest = rest
    with pytest.raises(ScheduleError, match=r"rank 0, action 2 \(receive_backward .*deadlock"):
        check(with_rank(gpipe, 0, [f0, s0, r0, b0, f1, s1, *rest]))


# The picture.


def test_picture_of_1f1b() -> None:
    assert picture(build("1f1b", 2, 3)).splitlines() == [
        "1f1b: 2 ranks, 3 micro-batches, idle 25.0% of the time",
        "F forward, B backward, I its input gradient, W its weight gradient, . idle",
        "rank 0  F0F1. . B0--F2B1--. B2--",
        "rank 1  . F0B0--F1B1--F2B2--. .",
    ]


def test_picture_of_zbv_marks_chunks_by_case() -> None:
    assert picture(build("zbv", 2, 3, 2)).splitlines()[2:] == [
        "rank 0  F0F1F2f0i0w0f1i1w1I0W0f2i2w2I1W1I2W2.",
        "rank 1  . F0f0F1f1i0w0F2I0W0f2i1w1I1i2I2W1w2W2",
    ]


def test_picture_folds_at_the_width() -> None:
    lines = picture(build("1f1b", 2, 12), width=60).splitlines()
    assert max(map(len, lines[2:])) <= 60
    assert [line[:6] for line in lines[2:]] == ["rank 0", "rank 1", ""] * 2 + ["rank 0", "rank 1"]
