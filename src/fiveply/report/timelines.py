"""Recorded steps as the values that the page draws: spans by rank, the plan beside them, shares of time, calls.

`timeline.js` draws the spans; `page.html` the tables. Nothing here knows how wide a picture is.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fiveply import pipeline_schedule, timeline
from fiveply.pipeline_schedule import Action, ScheduleError
from fiveply.report.text import coordinates
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.timeline import COMPUTE_KINDS, Event, RecordedStep, innermost

MOST_STEPS = 4  # recorded steps on a page: the last of each of the latest layouts
MOST_SPANS, MOST_RANKS = 12_000, 32  # of one step's picture; beyond, ranks are left out, whole pipelines first in
SHARE_TEXT = {
    "compute": "compute", "communication": "exposed communication", "bubble": "bubble", "data": "input",
    "optimizer": "optimiser", "rest": "rest",
}  # fmt: skip
_SAME_GROUP = {
    "world": (),
    "model": ("dp",),
    "tied": ("tp", "cp", "dp"),
    "tp": ("cp", "dp", "pp"),
    "dp": ("tp", "cp", "pp"),
    "shard": ("tp", "cp", "pp", "replica"),
    "replica": ("tp", "cp", "pp", "shard"),
}
"""Coordinates that ranks of one group of an axis have in common (`world.mesh.Mesh`)."""


def chosen(directory: Path) -> list[RecordedStep]:
    """The last recorded step of each layout of the run in `directory`, newest first. Raises InputError for a damaged file."""
    steps: dict[str, RecordedStep] = {}
    for path in reversed(timeline.recorded_steps(directory)):
        step = timeline.read(path)
        steps.setdefault(step.layout, step)
        if len(steps) == MOST_STEPS:
            break
    return list(steps.values())


def drawn(recorded: RecordedStep) -> dict[str, Any]:
    """One step: `picture` for `timeline.js`, the rest for the template. Times are in seconds, shares sum to 1."""
    shares = timeline.shares(recorded)
    plan = planned(recorded)
    return {
        "step": recorded.step,
        "layout": recorded.layout,
        "ran": plan.ran,
        "planned": plan.seconds,
        "picture": _picture(recorded, plan),
        "shares": [
            {"rank": lane.rank, "place": place(recorded, lane.rank), "seconds": lane.end - lane.start,
             "shares": {name: seconds / (lane.end - lane.start) for name, seconds in shares[lane.rank].items()}}
            for lane in recorded.ranks
        ],
        "share_text": SHARE_TEXT,
        "calls": calls(recorded),
    }  # fmt: skip


def place(recorded: RecordedStep, rank: int) -> str:
    """`dp 0, pp 1`: the axes above one rank."""
    lane = next(lane for lane in recorded.ranks if lane.rank == rank)
    return coordinates(lane, recorded.ranks)


class Plan(NamedTuple):
    """`events` are of the pipeline's ranks, and begin at 0. `begin`: when the recorded step's first computation did; `ran`:
    from there to the end of its last."""

    events: list[Event]
    begin: float
    ran: float

    @property
    def seconds(self) -> float:
        return max((event.end for event in self.events), default=0.0)


def planned(recorded: RecordedStep) -> Plan:
    """The schedule as simulated, each computation at the mean time that its kind took on its stage, transfers at none.

    What was recorded took longer by transfers, by waits for other ranks, and by actions that were slower than their mean.
    """
    took: dict[tuple[str, int], list[float]] = defaultdict(list)
    computed = [event for event in recorded.events if event.lane == "compute" and event.kind in COMPUTE_KINDS]
    for event in computed:
        took[event.kind, event.stage].append(event.seconds)
    mean = {key: fmean(values) for key, values in took.items()}
    try:
        schedule = pipeline_schedule.build(recorded.schedule, recorded.pp, recorded.micro_batches, recorded.vp)
    except ScheduleError as error:
        where = f"the timeline of step {recorded.step}"
        raise InputError(str(error), where=where, key="schedule", fix="remove it, and record a step anew") from None

    def cost(rank: int, action: Action) -> float:
        return mean.get((action.kind, schedule.stage_of(rank, action.chunk)), 0.0)

    events = [
        msgspec.structs.replace(event, stage=schedule.stage_of(event.rank, event.chunk))
        for event in pipeline_schedule.timeline(schedule, cost)
        if event.kind in COMPUTE_KINDS
    ]
    begin = min((event.start for event in computed), default=0.0)
    return Plan(events, begin, max((event.end for event in computed), default=0.0) - begin)


def calls(recorded: RecordedStep) -> list[dict[str, Any]]:
    """For each axis and operation, means over the ranks that called it: calls, bytes, and seconds summed over the calls.

    `flight`: from call to being seen done. `beside`: the part of it in which the rank computed. `waited`: the rank stood
    in the call or waited for it.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0] * 5))
    for rank, events in recorded.by_rank().items():
        pieces = innermost([event for event in events if event.lane == "compute"])
        computed = [(low, high) for event, low, high in pieces if event.kind in COMPUTE_KINDS]
        lows, highs = np.array(computed).reshape(-1, 2).T
        for event in events:
            if event.lane == "communication":
                beside = np.minimum(highs, event.end) - np.maximum(lows, event.start)
                new = (1, event.bytes, event.seconds, float(beside.clip(0).sum()), 0)
            elif event.kind in ("wait", "issue"):
                new = (0, 0, 0, 0, event.seconds)
            else:
                continue
            sums = found[event.axis, event.operation][rank]
            sums[:] = [a + b for a, b in zip(sums, new, strict=True)]
    names = ("calls", "bytes", "flight", "beside", "waited")
    return [
        {"axis": axis, "operation": operation, "ranks": len(ranks)}
        | {name: fmean(column) for name, column in zip(names, zip(*ranks.values(), strict=True), strict=True)}
        for (axis, operation), ranks in sorted(found.items())
    ]


# the picture

FIELDS = (
    "kind", "start", "end", "level", "stage", "chunk", "micro_batch", "axis", "operation", "bytes", "peer", "link"
)  # fmt: skip
"""Of a span. Times in whole microseconds; texts as indices into `names`; `level`: depth of nesting in the lane of compute,
from 0, or the strip, from 0, in the lane of communication; `link`: the same on spans of one transfer or collective, or -1."""


def _picture(recorded: RecordedStep, plan: Plan) -> dict[str, Any]:
    names: dict[str, int] = {}

    def name(text: str) -> int:
        return names.setdefault(text, len(names))

    def span(event: Event, level: int, link: int = -1) -> list[int]:
        return [name(event.kind), _micro(event.start), _micro(event.end), level, event.stage, event.chunk,
                event.micro_batch, name(event.axis), name(event.operation), event.bytes, event.peer, link]  # fmt: skip

    links = _links(recorded)
    by_rank = recorded.by_rank()
    # A pipeline's ranks stand below each other.
    order = sorted(recorded.ranks, key=lambda lane: (lane.dp, lane.cp, lane.tp, lane.pp))
    rows: list[dict[str, Any]] = []
    spans = 0
    for lane in order:
        events = by_rank[lane.rank]
        spans += len(events)
        if rows and (spans > MOST_SPANS or len(rows) == MOST_RANKS):
            break
        compute = [event for event in events if event.lane == "compute"]
        communication = [event for event in events if event.lane == "communication"]
        strips = stacked(communication)
        rows.append({
            "rank": lane.rank, "pp": lane.pp, "place": place(recorded, lane.rank),
            "compute": [span(event, level) for event, level in zip(compute, depths(compute), strict=True)],
            "communication": [span(event, strip, links.get(id(event), -1))
                              for event, strip in zip(communication, strips, strict=True)],
            "strips": 1 + max(strips, default=-1),
        })  # fmt: skip
    by_pp: dict[int, list[list[int]]] = {rank: [] for rank in range(recorded.pp)}
    for event in plan.events:
        by_pp[event.rank].append([
            name(event.kind), _micro(plan.begin + event.start), _micro(plan.begin + event.end), event.stage, event.chunk,
            event.micro_batch,
        ])  # fmt: skip
    return {"rows": rows, "ranks": len(recorded.ranks), "planned": [by_pp[rank] for rank in range(recorded.pp)],
            "vp": recorded.vp, "seconds": recorded.seconds, "names": list(names)}  # fmt: skip


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


def depths(events: list[Event]) -> list[int]:
    """How many spans each of nested ones, sorted by start with outer ones first, lies within."""
    found: list[int] = []
    ends: list[float] = []
    for event in events:
        while ends and ends[-1] <= event.start:
            ends.pop()
        found.append(len(ends))
        ends.append(event.end)
    return found


def stacked(events: list[Event]) -> list[int]:
    """A strip for each of spans, sorted by start, that may overlap: the first in which nothing still runs."""
    found: list[int] = []
    ends: list[float] = []
    for event in events:
        strip = next((index for index, end in enumerate(ends) if end <= event.start), len(ends))
        ends[strip : strip + 1] = [event.end]
        found.append(strip)
    return found


def _links(recorded: RecordedStep) -> dict[int, int]:
    """A number for each transfer and collective, by the identity of the events at its ranks."""
    links: dict[int, int] = {}
    for number, both in enumerate(timeline.transfers(recorded.events)):
        links.update((id(event), number) for event in both)
    layout = Layout.parse(recorded.layout)
    at = {lane.rank: layout.coordinates(lane.rank) for lane in recorded.ranks}
    known: dict[tuple[Any, ...], int] = {}
    for event in recorded.events:
        if event.kind == "collective" and event.axis in _SAME_GROUP:
            group = tuple(getattr(at[event.rank], axis) for axis in _SAME_GROUP[event.axis])
            links[id(event)] = known.setdefault((event.axis, event.number, group), len(links))
    return links
