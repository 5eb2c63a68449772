"""What happened in a step, as data: the one record of an event, a step recorded on every rank, and where its time went.

The pipeline schedule's simulator, the recorder of a running step, the report and the Perfetto trace share `Event`. Spans of
the lane `compute` nest, as calls do: a backward holds the waits for the collectives inside it. The lane `communication`
holds each collective and transfer from its call to the moment it was seen done; those overlap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from fiveply.spec.errors import InputError

COMPUTE_KINDS: tuple[str, ...] = ("forward", "backward", "input", "weight")
"""The actions of a schedule that compute; see `pipeline_schedule.Kind`."""
SHARES: tuple[str, ...] = ("compute", "communication", "bubble", "data", "optimizer", "rest")


class Event(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A span of time on one rank. Numbers are -1, texts empty, where they don't apply.

    kind: an action of the schedule (forward, receive_backward, reduce ...); `step`, `data`, `sums`, `optimizer` around
    them; `wait`, blocked until a collective or transfer is done; `issue`, inside the call that starts one; in the lane
    `communication`, `collective` or `transfer`.
    start, end: seconds from the step's start, or the unit of a simulation's costs.
    rank, peer: global in a record; pipeline ranks in a simulation. bytes: of the whole tensor, at one rank.
    number: which call over this axis, counted from the run's start; equal on all its ranks.
    """

    rank: int
    kind: str
    chunk: int
    micro_batch: int
    start: float
    end: float
    lane: Literal["compute", "communication"] = "compute"
    stage: int = -1
    axis: str = ""
    operation: str = ""
    bytes: int = 0
    peer: int = -1
    number: int = -1

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Lane(msgspec.Struct, frozen=True):
    """A rank of a recorded step: its coordinates, and its own step's start and end on the common clock."""

    rank: int
    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0
    start: float = 0.0
    end: float = 0.0


class RecordedStep(msgspec.Struct, frozen=True):
    """One step on every rank. Times are seconds from the moment that the first rank began it."""

    step: int
    layout: str
    schedule: str
    pp: int
    vp: int
    micro_batches: int
    ranks: list[Lane]
    events: list[Event]
    device: str = "cpu"

    @property
    def seconds(self) -> float:
        return max(lane.end for lane in self.ranks)

    def by_rank(self) -> dict[int, list[Event]]:
        """Each rank's events in the order of their starts, outer spans first."""
        found: dict[int, list[Event]] = {lane.rank: [] for lane in self.ranks}
        for event in sorted(self.events, key=lambda e: (e.start, -e.end)):
            found[event.rank].append(event)
        return found


def write(recorded: RecordedStep, folder: Path) -> Path:
    """`folder` is the run's directory."""
    path = folder / "timeline" / f"step-{recorded.step:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_bytes(msgspec.json.encode(recorded))
    aside.replace(path)
    return path


def read(path: Path) -> RecordedStep:
    """Raises InputError where the file is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RecordedStep)
    except msgspec.DecodeError as error:
        raise InputError(f"damaged ({error})", where=str(path), fix="remove it, and record a step anew") from None


def recorded_steps(folder: Path) -> list[Path]:
    """The steps that the run in `folder` recorded, ascending."""
    return sorted((folder / "timeline").glob("step-*.json"))


def shares(recorded: RecordedStep) -> dict[int, dict[str, float]]:
    """Seconds of each rank's step by SHARES; they sum to the step's time on that rank.

    compute: the schedule's forwards and backwards, less the waits inside. communication: waiting in a collective or inside
    the call that starts one. bubble: waiting for a pipeline transfer, and any wait after the rank's last computation
    while another rank of its pipeline still computes. data: preparing micro-batches. rest: what else the step does.
    """
    last: dict[int, float] = {lane.rank: lane.start for lane in recorded.ranks}
    for event in recorded.events:
        if event.lane == "compute" and event.kind in COMPUTE_KINDS:
            last[event.rank] = max(last[event.rank], event.end)
    drained: dict[tuple[int, int, int], float] = defaultdict(float)
    for lane in recorded.ranks:
        drained[lane.tp, lane.cp, lane.dp] = max(drained[lane.tp, lane.cp, lane.dp], last[lane.rank])
    by_rank = recorded.by_rank()
    return {
        lane.rank: _shares(lane, by_rank[lane.rank], last[lane.rank], drained[lane.tp, lane.cp, lane.dp])
        for lane in recorded.ranks
    }


def _shares(lane: Lane, events: Iterable[Event], last: float, drained: float) -> dict[str, float]:
    totals = dict.fromkeys(SHARES, 0.0)
    for event, low, high in innermost([e for e in events if e.lane == "compute"]):
        low, high = max(low, lane.start), min(high, lane.end)
        if high <= low:
            continue
        idle = max(0.0, min(high, drained) - max(low, last)) if event.kind == "wait" else 0.0
        totals["bubble"] += idle
        totals[_share(event)] += high - low - idle
    totals["rest"] += lane.end - lane.start - sum(totals.values())
    return totals


def _share(event: Event) -> str:
    if event.kind in COMPUTE_KINDS:
        return "compute"
    if event.kind == "wait" and event.operation == "receive":
        return "bubble"
    named = {"wait": "communication", "issue": "communication", "data": "data", "optimizer": "optimizer"}
    return named.get(event.kind, "rest")


def transfers(events: Iterable[Event]) -> list[tuple[Event, Event]]:
    """The two ends, (send, receive), of each transfer among all ranks' events: the sends from one rank to another and the
    receives there are in one order."""
    sides: dict[str, dict[tuple[int, int], list[Event]]] = {"send": defaultdict(list), "receive": defaultdict(list)}
    for event in sorted(events, key=lambda e: (e.start, e.number)):
        if event.lane == "communication" and event.kind == "transfer":
            pair = (event.rank, event.peer) if event.operation == "send" else (event.peer, event.rank)
            sides[event.operation][pair].append(event)
    return [both for pair, sends in sides["send"].items() for both in zip(sends, sides["receive"][pair], strict=False)]


def matched(events: Iterable[Event]) -> list[Event]:
    """All ranks' events, with each transfer of a pipeline drawn alike at both ends: from its send to its being taken.

    By itself a rank knows only when it posted a receive, ahead of need, and not when its send arrived.
    """
    events = list(events)
    drawn: dict[int, Event] = {}
    for send, receive in transfers(events):
        end = max(send.start, receive.end)
        for event in (send, receive):
            drawn[id(event)] = msgspec.structs.replace(event, start=send.start, end=end)
    return [drawn.get(id(event), event) for event in events]


def innermost(events: Sequence[Event]) -> list[tuple[Event, float, float]]:
    """Cut nested spans, sorted by start with outer ones first, into pieces (innermost span, start, end) in order."""
    pieces: list[tuple[Event, float, float]] = []
    stack: list[Event] = []
    at = 0.0

    def upto(time: float) -> None:
        nonlocal at
        if stack and time > at:
            pieces.append((stack[-1], at, time))
        at = max(at, time)

    for event in events:
        while stack and stack[-1].end <= event.start:
            upto(stack[-1].end)
            stack.pop()
        upto(event.start)
        stack.append(event)
    while stack:
        upto(stack[-1].end)
        stack.pop()
    return pieces
