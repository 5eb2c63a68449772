"""A pipeline's step by its own schedule: the actions that the runtime executes, with each stage's seconds.

Each rank has a lane that computes, in the order of its actions, and one that gathers and reduces meanwhile. A transfer
takes its seconds between the end of what it sends and the start of what needs it, and holds the sender up only where the
system sends synchronously (`blocking`).

`simulate` executes every action and says all that happened. `step_seconds` finds the same end of the step in milliseconds
for any number of micro-batches: with constant seconds a schedule becomes periodic (it is a linear system over maximum and
plus; Baccelli et al. 1992, Synchronization and Linearity), so a short step and its increment are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.pipeline_schedule import COMPUTE, Action, Kind, Schedule, ScheduleError, build
from fiveply.timeline import Event


class StageSeconds(msgspec.Struct, frozen=True):
    """Seconds of one stage. `forward`, `input`, `weight`: one micro-batch; a whole backward is `input + weight`."""

    forward: float
    input: float
    weight: float
    send: float = 0.0
    """From the end of a forward until the next stage has its output."""
    send_back: float = 0.0
    """From the end of a backward until the previous stage has its gradient."""
    gather: float = 0.0
    """Of the parameters that the first forward needs (zero 3)."""
    reduce: float = 0.0
    """Of its gradients, each time that the schedule says so."""
    reduce_early: float = 0.0
    """How long before the end of the last backward the first gradients are ready to be reduced."""
    reduce_tail: float = 0.0
    """Of the bucket that is ready last: it can't begin before the backward ends."""

    @property
    def busy(self) -> float:
        """Computing one micro-batch."""
        return self.forward + self.input + self.weight


class Simulated(msgspec.Struct, frozen=True):
    """A step. By pipeline rank: `busy` computing, `exposed` waiting at its end for reductions, `finish` after that."""

    seconds: float
    busy: tuple[float, ...]
    exposed: tuple[float, ...]
    finish: tuple[float, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Idle over busy time, all ranks together: (pp - 1) / micro-batches for 1F1B of equal stages."""
        return len(self.busy) * self.seconds / sum(self.busy) - 1


class _Entry(msgspec.Struct, frozen=True):
    """What the loop reads of an action. `need`, `out`: slots of arrival times; 0 arrives at once, 1 is needed by none."""

    action: Action
    rank: int
    stage: int
    need: int
    out: int
    crosses: bool
    """Whether it is handed to another rank."""


_Program = tuple[tuple[int, int, int, int, int, bool], ...]
"""(code, rank, stage, need, out, crosses): codes 0 to 3 compute, as COMPUTE; then what follows."""
_FIRST_FORWARD, _GATHER, _REDUCE, _FINISH = 4, 5, 6, 7


def simulate(schedule: Schedule, stages: Sequence[StageSeconds], *, blocking: bool = False) -> Simulated:
    """Execute the schedule event by event; `stages` by global stage. Raises ScheduleError if it deadlocks."""
    entries = _entries(schedule)
    spans, finish, exposed = _run(_program(schedule, entries), schedule.pp, schedule.stages, stages, blocking)
    busy = [0.0] * schedule.pp
    events: list[Event] = []
    for entry, (start, end) in zip(entries, spans, strict=True):
        kind, chunk, micro_batch, _ = entry.action
        if kind in COMPUTE:
            busy[entry.rank] += end - start
            events.append(Event(entry.rank, kind, chunk, micro_batch, start, end, stage=entry.stage))
            if entry.crosses:
                back = kind is not Kind.FORWARD
                travel = stages[entry.stage].send_back if back else stages[entry.stage].send
                peer = schedule.rank_of(entry.stage + (-1 if back else 1))[0]
                events.append(Event(entry.rank, "transfer", chunk, micro_batch, end, end + travel, "communication",
                                    entry.stage, "pp", "send", peer=peer))  # fmt: skip
        elif end > start:
            lane = "compute" if kind is Kind.FINISH else "communication"
            name = "wait" if kind is Kind.FINISH else "collective"
            operation = {Kind.GATHER: "all-gather", Kind.REDUCE: "reduce-scatter"}.get(kind, "")
            events.append(Event(entry.rank, name, chunk, micro_batch, start, end, lane, entry.stage, "dp", operation))
    ordered = sorted(events, key=lambda event: (event.rank, event.lane, event.start))
    return Simulated(max(finish), tuple(busy), tuple(exposed), tuple(finish), tuple(ordered))


def step_seconds(
    name: str, pp: int, vp: int, micro_batches: int, stages: Sequence[StageSeconds], *,
    blocking: bool = False, gather: bool = False, reduce_each: bool = False, tolerance: float = 1e-3,
) -> float:  # fmt: skip
    """The end of the step as `simulate` would give it: exactly once a short step has become periodic.

    Where stages still drift apart (nearly equal ones do for long), the end lies between two bounds, and a step twice as
    long is tried until they are within `tolerance`; the lower one is returned.
    """

    def ends(count: int) -> tuple[float, list[list[float]]]:
        """The step's end, and by micro-batch the end of its gradient on each stage."""
        program, gradients = _compiled(name, pp, vp, count, gather, reduce_each)
        spans, finish, _ = _run(program, pp, pp * vp, stages, blocking)
        return max(finish), [[spans[place][1] for place in places] for places in gradients]

    if name == "gpipe":  # its forwards all stand before its backwards, so one trajectory does not show the increment
        if micro_batches <= 3 * pp:
            return ends(micro_batches)[0]
        last, before = ends(3 * pp)[0], ends(3 * pp - 1)[0]
        return last + (micro_batches - 3 * pp) * (last - before)
    rounds, least = (pp, 3 * pp + micro_batches % pp * (pp + 1)) if name == "interleaved" else (1, 3 * pp)
    drain = 2 * pp if vp > 1 else pp
    count = least + drain + pp
    while count < micro_batches:
        short = count - (count - micro_batches) % rounds
        seconds, gradients = ends(short)
        if found := _period(gradients[: short - drain], rounds, pp):
            period, slowest, fastest = found
            fitting = short + (micro_batches - short) % period
            seconds = seconds if fitting == short else ends(fitting)[0]
            left = (micro_batches - fitting) // period
            low = max(seconds + left * fastest, bound(name, pp, vp, micro_batches, stages))
            if seconds + left * slowest <= low * (1 + tolerance):
                return low
        count *= 2
    return ends(micro_batches)[0]


def _period(trajectory: list[list[float]], step: int, pp: int) -> tuple[int, float, float] | None:
    """(micro-batches, seconds) after which each stage repeats, in the last 2 * pp of `trajectory`; None before that.

    Of the slowest stage and the fastest: while these differ, the slow one has yet to hold up the others.
    """
    window = np.array(trajectory[-2 * pp :])
    close = 1e-9 * window[-1].max()
    for period in range(step, pp + 1, step):
        increments = window[period:] - window[:-period]
        if np.ptp(increments, axis=0).max() <= close:
            return period, float(increments[-1].max()), float(increments[-1].min())
    return None


def bound(name: str, pp: int, vp: int, micro_batches: int, stages: Sequence[StageSeconds]) -> float:
    """A step cannot end earlier: each rank must wait for its first input, compute, and pass its last gradient back."""
    last = 2 * pp - 1
    busy = [
        sum(stages[last - rank if name == "zbv" and chunk else chunk * pp + rank].busy for chunk in range(vp))
        for rank in range(pp)
    ]
    passing = [(stage.forward + stage.send, stage.input + stage.weight) for stage in stages[: pp - 1]]
    forward, backward = np.array(passing).reshape(-1, 2).T
    return least_end(name, micro_batches, np.array(busy), forward, backward + np.array([s.send_back for s in stages[1:pp]]))


def least_end(
    name: str, micro_batches: int, busy: NDArray[np.float64], forward: NDArray[np.float64], backward: NDArray[np.float64]
) -> float:
    """`bound` from what it depends on: seconds of one micro-batch on each rank, and of passing it on, and back, through the
    first chunk of each rank but the last.

    Under split backwards what a rank puts off may outlast the way back, so it is left out.
    """
    reached = np.concatenate(((0.0,), np.cumsum(forward)))
    if name not in ("zb", "zbv"):
        reached[1:] += np.cumsum(backward)
    return float((reached + micro_batches * busy).max())


@lru_cache(maxsize=256)
def _compiled(name: str, pp: int, vp: int, micro_batches: int, gather: bool, each: bool) -> tuple[_Program, list[list[int]]]:
    """A schedule's program, and by micro-batch where in it each stage's last gradient stands."""
    schedule = build(name, pp, micro_batches, vp, gather=gather, reduce_each=each, transfers=False)
    entries = _entries(schedule)
    gradients = [[0] * schedule.stages for _ in range(micro_batches)]
    for place, entry in enumerate(entries):
        if entry.action.kind in (Kind.BACKWARD, Kind.WEIGHT):
            gradients[entry.action.micro_batch][entry.stage] = place
    return _program(schedule, entries), gradients


def _entries(schedule: Schedule) -> list[_Entry]:
    """All actions but transfers, each after what it needs. Raises ScheduleError for a deadlock."""
    stages, count = schedule.stages, schedule.micro_batches
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
            stage = schedule.stage_of(rank, chunk) if chunk >= 0 else -1
            need, out, crosses = 0, 1, False
            if kind is Kind.FORWARD:
                need = 2 + (stage - 1) * count + micro_batch if stage else 0
                out = 2 + stage * count + micro_batch
                crosses = stage + 1 < stages and schedule.rank_of(stage + 1)[0] != rank
            elif kind is Kind.BACKWARD or kind is Kind.INPUT:
                need = 2 + (stages + stage + 1) * count + micro_batch if stage + 1 < stages else 0
                out = 2 + (stages + stage) * count + micro_batch
                crosses = stage > 0 and schedule.rank_of(stage - 1)[0] != rank
            if need not in made:
                waiting[need] = rank
                break
            at += 1
            if kind in _CODES:
                entries.append(_Entry(action, rank, stage, need, out, crosses))
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


_CODES = {kind: code for code, kind in enumerate(COMPUTE)} | {
    Kind.GATHER: _GATHER, Kind.REDUCE: _REDUCE, Kind.FINISH: _FINISH,
}  # fmt: skip


def _program(schedule: Schedule, entries: list[_Entry]) -> _Program:
    gathered: set[int] = set()
    program: list[tuple[int, int, int, int, int, bool]] = []
    for entry in entries:
        code = _CODES[entry.action.kind]
        if code == 0 and schedule.gather and entry.stage not in gathered:
            gathered.add(entry.stage)
            code = _FIRST_FORWARD
        program.append((code, entry.rank, entry.stage, entry.need, entry.out, entry.crosses))
    return tuple(program)


def _run(
    program: _Program, pp: int, count: int, stages: Sequence[StageSeconds], blocking: bool
) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    """(start, end) of each entry; when each rank is done, and how long it then waited for its other lane."""
    backward = [stage.input + stage.weight for stage in stages]
    forward = [stage.forward for stage in stages]
    costs = (forward, backward, [s.input for s in stages], [s.weight for s in stages], forward)
    none = [0.0] * count
    travels = ([s.send for s in stages], back := [s.send_back for s in stages], back, none, [s.send for s in stages])
    clock, lane, exposed = [0.0] * pp, [0.0] * pp, [0.0] * pp
    gathered = [0.0] * count
    arrival = [0.0] * (2 + max(entry[4] for entry in program))
    spans: list[tuple[float, float]] = []
    note = spans.append
    for code, rank, stage, need, out, crosses in program:
        start = clock[rank]
        if code <= _FIRST_FORWARD:
            if (arrived := arrival[need]) > start:
                start = arrived
            if code == _FIRST_FORWARD and gathered[stage] > start:
                start = gathered[stage]
            clock[rank] = end = start + costs[code][stage]
            if crosses:
                arrival[out] = end + travels[code][stage]
                if blocking:
                    clock[rank] = arrival[out]
            else:
                arrival[out] = end
            if out == 1:
                arrival[1] = 0.0
        elif code == _GATHER:
            start = max(start, lane[rank])
            lane[rank] = gathered[stage] = end = start + stages[stage].gather
        elif code == _REDUCE:
            seconds = stages[stage]
            ready, start = start, max(lane[rank], start - seconds.reduce_early)
            lane[rank] = end = max(start + seconds.reduce, ready + seconds.reduce_tail)
        else:
            end = max(start, lane[rank])
            exposed[rank] = end - start
            clock[rank] = end
        note((start, end))
    return spans, clock, exposed


def memory(schedule: Schedule, simulated: Simulated, kept: Sequence[int]) -> list[list[tuple[float, int]]]:
    """By rank, (time, bytes alive from there on) of activations; `kept`: bytes of one micro-batch, by global stage.

    Alive from the start of a forward to the end of its backward, or of its weight gradient.
    """
    changes: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in range(schedule.pp)]
    for event in simulated.events:
        if event.kind == Kind.FORWARD:
            changes[event.rank].append((event.start, kept[event.stage]))
        elif event.kind in (Kind.BACKWARD, Kind.WEIGHT):
            changes[event.rank].append((event.end, -kept[event.stage]))
    curves: list[list[tuple[float, int]]] = []
    for of_rank in changes:
        of_rank.sort()
        alive, curve = 0, []
        for time, change in of_rank:
            alive += change
            curve.append((time, alive))
        curves.append(curve)
    return curves
