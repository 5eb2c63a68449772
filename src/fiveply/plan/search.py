"""The best layouts for a job, by best-first branch and bound over every legal one.

Bounds are tightened step by step, and always the most promising choice is looked at next:

1. a family of splits (`space.py`) that compute a micro-batch alike: priced at a large micro-batch, then at its own ones from the
   largest down, each of which bounds the smaller; with every pipeline's bubble over any division of the layers (`bounds.py`);
2. a split, with each order of ranks and the collectives of that;
3. a pipeline with its divisions of the layers (`stages.py`): before what its schedule cannot end;
4. with a state of the data-parallel ranks: what of their reductions and update nothing hides;
5. that layout, simulated.

The search ends once no bound left in the queue is below the best layout found, which is then proven best. Where its effort ends
first, the least bound left says how much better anything else could be at most (`gap`). What can't fit is dropped by a bound of
its memory before it is priced (`fitting.py`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import heapq
import math
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.plan.bounds import Model
from fiveply.plan.floors import Floors
from fiveply.plan.predict import ORDERS, Job
from fiveply.plan.space import Kinds, Limits, chunks_of, pipelines, splits, states
from fiveply.plan.stages import balance, deal, every
from fiveply.spec.layout import Layout

BUDGET = 30_000
"""Of EFFORT, about three seconds of a core."""
HASTY, PROOF = 0.15, 0.8
"""The shares of it until which something good is looked for in haste, and what could beat it."""
FEW = 20
"""Divisions of the layers that are all tried."""
ROUGHLY, SURELY = 1.02, 0.95
"""An estimate of memory above the first share of what there is excludes a layout before the exact walk; one below the second
needs none."""
FAMILY = ("tp", "sp", "cp", "cp_kind", "ep", "etp", "offload")
"""What splits have in common that differ in micro-batch, recomputation, pipeline and data ranks."""


class Choice(msgspec.Struct, frozen=True):
    """A resolved layout, the order of its ranks, and the middle estimate of its step."""

    layout: Layout
    order: str
    seconds: float


class Searched(msgspec.Struct, frozen=True):
    """`choices`: the best layout of each combination of degrees, fastest first. `legal`: layouts in the space; `fit`: those
    that the bound of memory does not exclude; `priced`: those simulated. `gap`: by which share anything that was not
    simulated could be faster than the first choice, at most."""

    choices: tuple[Choice, ...]
    legal: int
    fit: int
    priced: int
    gap: float


def degrees(layout: Layout) -> tuple[int, ...]:
    return (layout.dp, layout.tp, layout.pp, layout.cp, layout.ep)


Level = Literal["family", "split", "pipeline", "state", "found"]
EFFORT: dict[Level, int] = {"family": 8, "split": 6, "pipeline": 3, "state": 15, "found": 20}
"""About what it costs to look at one, in tenths of a millisecond; what grows with the pipeline comes on top."""
HASTE: dict[Level, float] = {
    "family": 1.25, "split": 1.1, "pipeline": 1.05, "state": 1.0, "found": 1.0,
}  # fmt: skip
"""By how much bounds are expected to grow, so that at first what is nearly known goes before what is hardly known."""


@contextlib.contextmanager
def _uncollected() -> Generator[None]:
    """Prices are kept, so that collecting garbage finds next to none, in a fifth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Pipeline(NamedTuple):
    """A schedule and its chunks a rank for a layout, with the least end of a step in it."""

    least: float
    name: str
    vp: int


class Search:
    """Of one job on `world` ranks. Prices are remembered from one `run` to the next."""

    def __init__(self, job: Job, world: int) -> None:
        self.job, self.world, self.spec = job, world, job.spec
        self.floors = Floors(job, world)
        self.fitting = self.floors.fitting
        self.predictors = self.floors.predictors
        self._divisions: dict[Any, tuple[int, ...] | None] = {}

    def run(self, limits: Limits | None = None, *, wanted: int = 10, budget: int = BUDGET) -> Searched:
        """Layouts of exactly `world` ranks, within `budget`: something good in haste, what could beat it, a layout of each of `wanted`
        combinations of degrees in haste, and what could beat those. Raises InputError for a batch that no layout can have."""
        with _uncollected():
            return self._run(limits or Limits(), wanted, budget)

    def _run(self, limits: Limits, wanted: int, budget: int) -> Searched:
        self.limits, self.wanted = limits, wanted
        self.choices: dict[tuple[int, ...], Choice] = {}
        self._queue: list[tuple[float, int, float, Level, Any]] = []
        self._later: list[tuple[float, Level, Any]] = []
        self._numbers, self._haste, self._spent, self._priced = count(), 1, 0, 0
        self._best = self._limit = math.inf
        """Seconds of the best layout found, and of the last of the wanted ones."""
        legal, fit = self._open()
        self._hurry(lambda: bool(self.choices) and self._spent >= budget * HASTY)
        self._prove(lambda: self._best, round(budget * PROOF))
        left = self._queue[0][0] if self._queue else math.inf
        if len(self.choices) < wanted:
            self._sort(haste=3)
            self._hurry(lambda: self._spent >= budget)
        self._prove(lambda: self._limit, budget)
        ordered = tuple(sorted(self.choices.values(), key=lambda choice: choice.seconds))
        gap = max(0.0, self._best / left - 1) if self.choices else 0.0
        return Searched(ordered[:wanted], legal, fit, self._priced, gap)

    def _hurry(self, enough: Callable[[], bool]) -> None:
        """Find layouts of degrees that have none yet."""
        while self._queue and len(self.choices) < self.wanted and not enough():
            _, _, least, level, payload = heapq.heappop(self._queue)
            if level != "family" and self._known(level, payload) < math.inf:
                self._later.append((least, level, payload))
            else:
                self._look(level, payload)

    def _prove(self, limit: Callable[[], float], budget: int) -> None:
        """Look at all that could take less."""
        if self._haste:
            self._sort(haste=0)
        while self._queue and self._queue[0][0] < limit() and self._spent < budget:
            _, _, least, level, payload = heapq.heappop(self._queue)
            if level == "family" or least < self._known(level, payload):
                self._look(level, payload)

    def _sort(self, *, haste: int) -> None:
        """Queue all that waits by what it takes at least, in haste by what it is likely to: the more, the deeper it looks first."""
        waiting = self._later + [entry[2:] for entry in self._queue]
        self._queue, self._later, self._haste = [], [], haste
        for least, level, payload in waiting:
            self._push(least, level, payload)

    def _look(self, level: Level, payload: Any) -> None:
        self._spent += EFFORT[level]
        looks: dict[Level, Callable[..., None]] = {
            "family": self._price_family, "split": self._open_split, "pipeline": self._divide, "state": self._price,
            "found": self._choose,
        }  # fmt: skip
        looks[level](*payload)

    def _actions(self, layout: Layout) -> int:
        """About how many are run to find the end of its step."""
        return 3 * layout.stage_count * min(self.predictors[ORDERS[0]].micro_batches(layout), 6 * layout.pp)

    def _known(self, level: Level, payload: Any) -> float:
        """Seconds of the best layout found of the same degrees."""
        known = self.choices.get(degrees(self.splits.layout(payload[0]) if level == "split" else payload[0]))
        return known.seconds if known else math.inf

    def _push(self, least: float, level: Level, payload: Any) -> None:
        """`least`: a bound of all that may come of it."""
        if least < self._limit:
            if self._haste and level == "split" and self._spare(payload[0]):
                self._later.append((least, level, payload))
                return
            key = least * HASTE[level] ** self._haste
            heapq.heappush(self._queue, (key, next(self._numbers), least, level, payload))

    def _spare(self, row: int) -> bool:
        """Whether it recomputes attention that is fused: that frees next to nothing."""
        software = self.job.software
        return (
            software.flash and software.selective == ("core",) and self.splits.columns["recompute"][row] == "selective"
        )

    # 1. families

    def _open(self) -> tuple[int, int]:
        """Queue every family of which a split may fit; how many layouts are legal, and how many may fit."""
        job, limits = self.job, self.limits
        self.splits = splits(self.spec, self.world, sequence=job.sequence, global_batch=job.global_batch, limits=limits)
        self._orders = {pp: pipelines(self.spec, pp, limits) for pp in np.unique(self.splits.columns["pp"]).tolist()}
        names = dict.fromkeys(name for orders in self._orders.values() for name, _ in orders)
        self._chunks = {name: np.zeros(max(self._orders) + 1, np.int64) for name in names}
        """By schedule, the most chunks a rank by pp; 0 where it is none."""
        for pp, orders in self._orders.items():
            for name, vp in orders:
                self._chunks[name][pp] = max(self._chunks[name][pp], chunks_of(name, vp))
        self._kinds = functools.cache(functools.partial(states, limits=limits))
        legal, fit, may = 0, 0, np.zeros(len(self.splits), bool)
        self._busiest = np.zeros(len(self.splits), np.int64)
        """By split, layers that its busiest rank must take at least."""
        first, place = self.splits.alike("pp", "dp", "cp")
        for number, row in enumerate(first.tolist()):
            pp, dp, cp = (self.splits.columns[key][row].item() for key in ("pp", "dp", "cp"))
            rows = np.flatnonzero(place == number)
            orders, kinds = len(self._orders[pp]), self._kinds(dp, cp)
            legal += len(rows) * orders * len(kinds)
            if orders and kinds:
                fits, self._busiest[rows] = self.fitting.may_fit(self.splits, rows, kinds)
                fit += int(fits.sum()) * orders
                may[rows] = fits.any(axis=1)
        self._queue_families(np.flatnonzero(may))
        return legal, fit

    def _queue_families(self, rows: NDArray[np.int64]) -> None:
        if not len(rows):
            return
        first, family = self.splits.alike(*FAMILY)
        family = family[rows]
        some, family = np.unique(family, return_inverse=True)
        large = self.floors.large([self.splits.layout(int(row)) for row in first[some].tolist()])
        full = (self.splits.columns["recompute"][rows] == "full").astype(int)
        least = self._least(rows, large[family, full] * self.splits.columns["micro_batch"][rows][:, None])
        order = np.lexsort((-self.splits.columns["micro_batch"][rows], family))
        starts = np.flatnonzero(np.diff(family[order], prepend=-1))[1:]
        for members, bounds in zip(np.split(rows[order], starts), np.split(least[order], starts), strict=True):
            self._push(float(bounds.min()), "family", (members, bounds))

    def _least(self, rows: NDArray[np.int64], models: NDArray[np.float64]) -> NDArray[np.float64]:
        """The least end of a step of each split, in any pipeline with any division, transfers left out; `models`: [split, field of
        Model]."""
        columns, model = self.splits.columns, models.T
        pp, busiest = columns["pp"][rows], self._busiest[rows]
        micro_batches = self.job.global_batch // columns["dp"][rows] // columns["micro_batch"][rows]
        least = np.full(len(rows), np.inf)
        for name, chunks in self._chunks.items():
            some = chunks[pp] > 0
            if some.any():
                bound = self.floors.any_division(
                    name, chunks[pp][some], pp[some], micro_batches[some], busiest[some], Model(*model[:, some]), 0.0
                )
                least[some] = np.minimum(least[some], bound)
        return least

    def _price_family(self, rows: NDArray[np.int64], least: NDArray[np.float64]) -> None:
        """Queue the splits of the largest micro-batch, and the others with what that says of them."""
        rows = rows[least < self._limit]
        if not len(rows):
            return
        micro_batch, recompute = (self.splits.columns[key][rows] for key in ("micro_batch", "recompute"))
        largest, layout = micro_batch[0].item(), self.splits.layout(int(rows[0]))
        models = np.zeros((len(rows), len(Model._fields)))
        full = recompute == "full"
        # What recomputes a part takes no less than what recomputes nothing.
        for some, name in ((full, "full"), (~full, "none")):
            if some.any():
                models[some] = self.floors.model(msgspec.structs.replace(layout, recompute=name))
        least, here = self._least(rows, models * (micro_batch / largest)[:, None]), micro_batch == largest
        for bound, row in zip(least[here].tolist(), rows[here].tolist(), strict=True):
            self._push(bound, "split", (row,))
        if not here.all():
            self._push(float(least[~here].min()), "family", (rows[~here], least[~here]))

    # 2. splits

    def _open_split(self, row: int) -> None:
        """Queue its pipelines, in each order of ranks that makes a difference."""
        layout, machine = self.splits.layout(row), self.job.machine
        orders, kinds = self._orders[layout.pp], self._kinds(layout.dp, layout.cp)
        busiest = self.fitting.busiest(layout, orders, kinds)
        apart = layout.pp > 1 and layout.dp > 1 and layout.tp * layout.cp < machine.joined < self.world
        ranks = ORDERS if apart else ORDERS[:1]
        send = min(self.predictors[order].transfer(layout) for order in ranks)
        least = self.floors.pipelines(layout, kinds, orders, busiest, send).tolist()
        found = sorted(Pipeline(bound, *one) for bound, one in zip(least, orders, strict=True) if bound < math.inf)
        for order in ranks:
            self._queue_pipelines(layout, order, found)

    def _queue_pipelines(self, layout: Layout, order: str, found: list[Pipeline]) -> None:
        if found:
            self._push(found[0].least, "pipeline", (layout, order, found))

    # 3. divisions

    def _divide(self, layout: Layout, order: str, found: list[Pipeline]) -> None:
        """Queue the first pipeline with its divisions of the layers, evenly by rank, and for one chunk by the slowest path; and the
        other pipelines."""
        self._spent += layout.pp // 4
        self._queue_pipelines(layout, order, found[1:])
        chosen = msgspec.structs.replace(layout, schedule=found[0].name, vp=found[0].vp)
        chunks = chosen.chunks
        divisions = set(every(self.spec.layers, chosen.stage_count, FEW))
        for ahead in (0.0, 1.0) if layout.pp > 1 and chunks == 1 else (0.0,):
            for least in (0 if chunks == 1 else 1, chunks):  # mostly each rank gets enough for its chunks unasked
                ranks = self._balanced(chosen, order, ahead, least)
                if ranks and (chunks == 1 or min(ranks) >= chunks):
                    divisions.add(deal(ranks, chunks, folded=chosen.schedule == "zbv"))
                    break
        if "stages" in self.limits.fixed:
            divisions = {self.limits.fixed["stages"]}
        for stages in divisions:
            if len(stages) == chosen.stage_count:
                divided = msgspec.structs.replace(chosen, stages=stages)
                self._share(divided, order)

    def _balanced(
        self, layout: Layout, order: str, ahead: float, least: int, most: list[int] | None = None
    ) -> tuple[int, ...] | None:
        """Without `most`, remembered by what of it counts: seconds to a thousandth of a layer's."""
        count, folded = self.predictors[order].micro_batches(layout) if ahead else 1, layout.schedule == "zbv"
        key = (self.floors.shape(layout, order), layout.pp, count, ahead, least, folded)
        if most is not None or key not in self._divisions:
            weights = self.floors.weights(layout, order)
            found = balance(weights, layout.pp, count, ahead, least=least, folded=folded, most=most)
            if most is not None:
                return found
            self._divisions[key] = found
        return self._divisions[key]

    # 4. states

    def _share(self, layout: Layout, order: str) -> None:
        """Queue the states of a division that may fit, the most promising first; where it is not sure that any does, of
        another one too, divided by memory."""
        kinds = self._kinds(layout.dp, layout.cp)
        held = self.fitting.estimate(layout, kinds) / self.fitting.capacity
        self._queue_states(layout, order, kinds, held)
        if held.max(axis=1).min() > SURELY and (divided := self._divide_by_memory(layout, held, order)):
            self._queue_states(divided, order, kinds, self.fitting.estimate(divided, kinds) / self.fitting.capacity)

    def _queue_states(self, layout: Layout, order: str, kinds: Kinds, held: NDArray[np.float64]) -> None:
        rows = np.flatnonzero((held <= ROUGHLY).all(axis=1)).tolist()
        if rows:
            ends = self.floors.states(layout, order, kinds, rows)
            found = sorted(
                ((end, msgspec.structs.replace(layout, zero=kinds[row][0], dp_shard=kinds[row][1]))
                 for end, row in zip(ends, rows, strict=True)), key=lambda item: item[0],
            )  # fmt: skip
            self._push(found[0][0], "state", (found[0][1], order, found[1:]))

    def _divide_by_memory(self, layout: Layout, held: NDArray[np.float64], order: str) -> Layout | None:
        """The fastest division of the layers whose bytes, taken as proportional to layers, surely fit in the state that holds
        least (`held`: [state, rank], shares of the capacity); None where there is none."""
        if layout.pp == 1 or "stages" in self.limits.fixed:
            return None
        of_rank = held[held.max(axis=1).argmin()]
        layers = [
            sum(layout.stages[layout.stage_of(rank, chunk)] for chunk in range(layout.chunks))
            for rank in range(layout.pp)
        ]
        most = np.floor(np.maximum(layers, 1) * SURELY / of_rank).astype(int).tolist()
        ranks = self._balanced(layout, order, 0.0, 0 if layout.chunks == 1 else layout.chunks, most)
        stages = None if ranks is None else deal(ranks, layout.chunks, folded=layout.schedule == "zbv")
        return None if stages in (None, layout.stages) else msgspec.structs.replace(layout, stages=stages)

    # 5. layouts

    def _price(self, layout: Layout, order: str, others: list[tuple[float, Layout]]) -> None:
        """Queue a layout with its exact time, and the next of its division's states."""
        if others:
            self._push(others[0][0], "state", (others[0][1], order, others[1:]))
        self._spent += self._actions(layout) // 300
        seconds = self.predictors[order].seconds(layout)
        self._priced += 1
        self._push(seconds, "found", (layout, order, seconds))

    # 6. choices

    def _choose(self, layout: Layout, order: str, seconds: float) -> None:
        """Keep the best layout of its degrees, if it fits."""
        self._spent += self._actions(layout) // 100
        if self.fitting.fits(layout) and seconds < self._known("found", (layout,)):
            self.choices[degrees(layout)] = Choice(layout, order, seconds)
            times = sorted(known.seconds for known in self.choices.values())
            self._best = times[0]
            self._limit = times[self.wanted - 1] if len(times) >= self.wanted else math.inf
