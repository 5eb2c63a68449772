"""A pipeline's step by its own schedule: the actions that the runtime executes, with each stage's seconds.

A rank computes in the order of its actions, and reduces beside that what is complete. A transfer takes its seconds between
the end of what it sends and the start of what needs it, and holds the sender up only where the system sends synchronously
(`blocking`).

`simulate` executes every computation and says when it was; it also replays a step of which each one's seconds are known.
`ends` finds the same end of the step in milliseconds for any number of micro-batches: with constant seconds a schedule
becomes periodic (it is a linear system over maximum and plus; Baccelli et al. 1992, Synchronization and Linearity), so a
short step and its increment are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.pipeline_schedule import COMPUTE, Action, Kind, Schedule, ScheduleError, build
from fiveply.plan.bounds import Lanes, least_end
from fiveply.timeline import Event


class StageSeconds(msgspec.Struct, frozen=True):
    """Seconds of one stage, or of a part. `forward`, `input`, `weight`: one micro-batch; a whole backward is `input + weight`."""

    forward: float
    input: float
    weight: float
    send: float = 0.0
    """From the end of a forward until the next stage has its output."""
    send_back: float = 0.0
    """From the end of a backward until the previous stage has its gradient."""
    reduce: float = 0.0
    """Of its gradients, each time that the schedule says so."""
    reduce_early: float = 0.0
    """How long before the end of the last backward the first gradients are ready to be reduced."""
    reduce_tail: float = 0.0
    """Of the bucket that is ready last: it can't begin before the backward ends."""
    terms: dict[str, float] = {}
    """What the first three consist of: they add up to the same."""

    @property
    def busy(self) -> float:
        """Computing one micro-batch."""
        return self.forward + self.input + self.weight


class Simulated(msgspec.Struct, frozen=True):
    """A step. `busy`: computing, by pipeline rank; `events`: each rank's computations in order."""

    seconds: float
    busy: tuple[float, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Idle over busy time, all ranks together: (pp - 1) / micro-batches for 1F1B of equal stages."""
        return len(self.busy) * self.seconds / sum(self.busy) - 1


_Entry: TypeAlias = tuple[Action, int, int, int, int, bool]
"""What the loop reads of a computation: its rank and stage; `need`, `out`: slots of arrival times (0 arrives at once, 1 is needed by
none); and whether it is handed to another rank."""


class _Program(NamedTuple):
    """`steps`: (rank, what, need, out, travel). `what` is a place in the table of costs, by kind of computation and stage; `travel`
    one in the table of transfers, 0 for none."""

    steps: tuple[tuple[int, int, int, int, int], ...]
    slots: int


_CODES = {kind: code for code, kind in enumerate(COMPUTE)}


def simulate(schedule: Schedule, stages: Sequence[StageSeconds], *, blocking: bool = False) -> Simulated:
    """Execute the schedule event by event. `stages` by global stage, or where micro-batches differ, by stage and micro-batch
    (all of a stage stand together). Raises ScheduleError if it deadlocks."""
    entries = _entries(schedule)
    each = len(stages) // schedule.stages
    ended, clock = _run(_program(schedule, entries, each), schedule.pp, stages, blocking)
    busy, gradients = [0.0] * schedule.pp, np.zeros(schedule.stages)
    events: list[Event] = []
    for (action, rank, stage, _, _, _), end in zip(entries, ended, strict=True):
        one = stages[_place(stage, action.micro_batch, each)]
        seconds = (one.forward, one.input + one.weight, one.input, one.weight)[_CODES[action.kind]]
        busy[rank] += seconds
        gradients[stage] = end
        events.append(Event(rank, action.kind, action.chunk, action.micro_batch, end - seconds, end, stage=stage))
    whole = Ends(np.array(clock), gradients, _home(schedule)).seconds(stages[::each])
    return Simulated(whole, tuple(busy), tuple(sorted(events, key=lambda event: (event.rank, event.start))))


TOLERANCE = 1e-3
"""Of a step's end where its stages have not settled."""


class Ends(NamedTuple):
    """When each pipeline rank has computed all that it computes in a step, and when each stage has its last gradient; `home`: its
    rank."""

    ranks: NDArray[np.float64]
    stages: NDArray[np.float64]
    home: tuple[int, ...]

    def seconds(self, stages: Sequence[StageSeconds]) -> float:
        """The end of the step once gradients are reduced, in the order in which a rank's chunks have them."""
        lanes = [0.0] * len(self.ranks)
        for stage in sorted(range(len(self.home)), key=lambda stage: self.stages[stage]):
            one, ready, rank = stages[stage], float(self.stages[stage]), self.home[stage]
            lanes[rank] = max(max(lanes[rank], ready - one.reduce_early) + one.reduce, ready + one.reduce_tail)
        return max(*lanes, float(self.ranks.max()))


def ends(
    name: str, pp: int, vp: int, micro_batches: int, stages: Sequence[StageSeconds], *, blocking: bool = False
) -> Ends:
    """A step's ends as `simulate` would give them, reductions left out: exactly once a short step has become periodic.

    Where stages still drift apart (nearly equal ones do for long), the end lies between two bounds, and a step twice as
    long is tried until they are within TOLERANCE; the lower one is returned.
    """

    def run(count: int) -> tuple[Ends, NDArray[np.float64]]:
        """The ends, and [micro-batch, stage] when each gradient is there."""
        program, gradients, home = _compiled(name, pp, vp, count)
        times, clock = _run(program, pp, stages, blocking)
        found = np.array(times)[gradients]
        return Ends(np.array(clock), found.max(axis=0), home), found

    def later(found: Ends, seconds: float) -> Ends:
        return Ends(found.ranks + seconds, found.stages + seconds, found.home)

    if name == "gpipe":  # its forwards all stand before its backwards, so one trajectory does not show the increment
        if micro_batches <= 3 * pp:
            return run(micro_batches)[0]
        last, before = run(3 * pp)[0], run(3 * pp - 1)[0]
        return later(last, (micro_batches - 3 * pp) * float(last.ranks.max() - before.ranks.max()))
    rounds, least = (pp, 3 * pp + micro_batches % pp * (pp + 1)) if name == "interleaved" else (1, 3 * pp)
    drain = 2 * pp if vp > 1 else pp
    count = least + drain + pp
    while count < micro_batches:
        short = count - (count - micro_batches) % rounds
        found, gradients = run(short)
        if period := _period(gradients[: short - drain], rounds, pp):
            step, slowest, fastest = period
            fitting = short + (micro_batches - short) % step
            found = found if fitting == short else run(fitting)[0]
            left = (micro_batches - fitting) // step
            end = float(found.ranks.max())
            low = max(end + left * fastest, bound(name, pp, vp, micro_batches, stages, blocking=blocking))
            if end + left * slowest <= low * (1 + TOLERANCE):
                return later(found, low - end)
        count *= 2
    return run(micro_batches)[0]


def _period(trajectory: NDArray[np.float64], step: int, pp: int) -> tuple[int, float, float] | None:
    """(micro-batches, seconds) after which each stage repeats, in the last 2 * pp of `trajectory`; None before that.

    Of the slowest stage and the fastest: while these differ, the slow one has yet to hold up the others.
    """
    window = trajectory[-2 * pp :]
    close = 1e-9 * window[-1].max()
    for period in range(step, pp + 1, step):
        increments = window[period:] - window[:-period]
        if np.ptp(increments, axis=0).max() <= close:
            return period, float(increments[-1].max()), float(increments[-1].min())
    return None


def bound(
    name: str, pp: int, vp: int, micro_batches: int, stages: Sequence[StageSeconds], *, blocking: bool = False
) -> float:
    """A step cannot end earlier (`bounds.least_end`)."""
    last, split = pp * vp - 1, name in ("zb", "zbv")
    turn = pp - 1 if name == "zbv" else -1
    busy = np.zeros(pp)
    for number, one in enumerate(stages):
        rank = last - number if name == "zbv" and number >= pp else number % pp
        sent = one.send * (number < last and number != turn) + one.send_back * (number > 0 and number != turn + 1)
        busy[rank] += one.busy + (sent if blocking and pp > 1 else 0.0)
    first = stages[:pp]
    lanes = Lanes(
        busy,
        np.array([one.forward for one in first]),
        np.array([one.input + (0.0 if split else one.weight) for one in first]),
        np.array([*(one.send for one in first[:-1]), 0.0]),
        np.array([0.0, *(one.send_back for one in first[1:])]),
    )
    return float(least_end(name, micro_batches, lanes, blocking=blocking))


@lru_cache(maxsize=256)
def _compiled(name: str, pp: int, vp: int, micro_batches: int) -> tuple[_Program, NDArray[np.int64], tuple[int, ...]]:
    """A schedule's program, [micro-batch, stage] where in it each gradient is complete, and each stage's rank."""
    schedule = build(name, pp, micro_batches, vp, transfers=False)
    entries = _entries(schedule)
    gradients = np.zeros((micro_batches, schedule.stages), np.int64)
    for place, (action, _, stage, _, _, _) in enumerate(entries):
        if action.kind is Kind.BACKWARD or action.kind is Kind.WEIGHT:
            gradients[action.micro_batch, stage] = place
    return _program(schedule, entries), gradients, _home(schedule)


def _home(schedule: Schedule) -> tuple[int, ...]:
    """Each stage's rank."""
    return tuple(schedule.rank_of(stage)[0] for stage in range(schedule.stages))


def _entries(schedule: Schedule) -> list[_Entry]:
    """All computations, each after what it needs. Raises ScheduleError for a deadlock."""
    stages, count, home = schedule.stages, schedule.micro_batches, _home(schedule)
    held = [[schedule.stage_of(rank, chunk) for chunk in range(schedule.vp)] for rank in range(schedule.pp)]
    forward, backward, input_gradient = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT
    position = [0] * schedule.pp
    made = {0, 1}
    waiting: dict[int, int] = {}
    entries: list[_Entry] = []
    runnable = list(range(schedule.pp))
    while runnable:
        rank = runnable.pop()
        actions = schedule.ranks[rank]
        at = position[rank]
        while at < len(actions):
            action = actions[at]
            kind, chunk, micro_batch, _ = action
            stage = held[rank][chunk] if chunk >= 0 else -1
            need, out, crosses = 0, 1, False
            if kind is forward:
                need = 2 + (stage - 1) * count + micro_batch if stage else 0
                out = 2 + stage * count + micro_batch
                crosses = stage + 1 < stages and home[stage + 1] != rank
            elif kind is backward or kind is input_gradient:
                need = 2 + (stages + stage + 1) * count + micro_batch if stage + 1 < stages else 0
                out = 2 + (stages + stage) * count + micro_batch
                crosses = stage > 0 and home[stage - 1] != rank
            if need not in made:
                waiting[need] = rank
                break
            at += 1
            if kind in _CODES:
                entries.append((action, rank, stage, need, out, crosses))
            if out > 1:
                made.add(out)
                if out in waiting:
                    runnable.append(waiting.pop(out))
        position[rank] = at
    for rank, actions in enumerate(schedule.ranks):
        if position[rank] < len(actions):
            raise ScheduleError(
                f"rank {rank}, action {position[rank]} ({actions[position[rank]]}): deadlock: what it waits for is never sent"
            )
    return entries


def _place(stage: int, micro_batch: int, each: int) -> int:
    """Of an action's seconds, where each stage has `each` of them."""
    return stage * each + (micro_batch if each > 1 else 0)


def _program(schedule: Schedule, entries: list[_Entry], each: int = 1) -> _Program:
    count = schedule.stages * each
    steps: list[tuple[int, int, int, int, int]] = []
    for action, rank, number, need, out, crosses in entries:
        code, stage = _CODES[action.kind], _place(number, action.micro_batch, each)
        travel = 0 if not crosses else 1 + stage + (count if code in (1, 2) else 0)
        steps.append((rank, code * count + stage, need, out, travel))
    return _Program(tuple(steps), 2 + 2 * schedule.stages * schedule.micro_batches)


def _run(program: _Program, pp: int, stages: Sequence[StageSeconds], blocking: bool) -> tuple[list[float], list[float]]:
    """The end of each entry, and when each rank has computed all."""
    costs = [
        *(stage.forward for stage in stages), *(stage.input + stage.weight for stage in stages),
        *(stage.input for stage in stages), *(stage.weight for stage in stages),
    ]  # fmt: skip
    travels = [0.0, *(stage.send for stage in stages), *(stage.send_back for stage in stages)]
    clock = [0.0] * pp
    arrival = [0.0] * program.slots
    ended: list[float] = []
    note = ended.append
    for rank, what, need, out, travel in program.steps:
        start = clock[rank]
        if (arrived := arrival[need]) > start:
            start = arrived
        clock[rank] = end = start + costs[what]
        arrival[out] = end + travels[travel]
        if blocking:
            clock[rank] = arrival[out]
        note(end)
    return ended, clock
