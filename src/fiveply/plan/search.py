"""The best layouts for a job, by best-first branch and bound over every legal one.

Bounds are tightened step by step, and always the most promising choice is looked at next:

1. a split (`space.py`): the seconds of its products, attention and elementwise operations, shared perfectly;
2. its collectives as well;
3. with a pipeline and a division of the layers (`stages.py`): the slowest path through the ranks;
4. with a state of the data-parallel ranks: what of their reductions and update nothing hides;
5. that layout, simulated.

The search ends once no bound left in the queue is below the best layout found, which is then proven best. Where its budget ends
first, the least bound left says how much better anything else could be at most (`gap`). What can't fit is dropped by a bound of
its memory before it is priced (`fitting.py`).
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Hashable
from itertools import count
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.plan import cost, traffic
from fiveply.plan.fitting import Fitting
from fiveply.plan.predict import ORDERS, Job, Predictor
from fiveply.plan.simulate import least_end
from fiveply.plan.space import Limits, pipelines, splits, states
from fiveply.plan.stages import Weights, balance, deal, every
from fiveply.spec.layout import Layout

BUDGET = 40_000
"""Of EFFORT."""
SECONDS = 4.0
"""Of processor time, after which the best so far is given with its proven gap."""
WAIT = 0.3
"""A guess: the share of a 1F1B pipeline's bubble that the best schedule leaves."""
FEW = 20
"""Divisions of the layers that are all tried."""
LARGE = 4096
"""Rows of a micro-batch that bounds the efficiency of all smaller ones."""
ROUGHLY, SURELY = 1.02, 0.95
"""An estimate of memory above the first share of what there is excludes a layout before the exact walk; one below the second
needs none."""
SURE = 0.999
"""Against rounding of shares in a bound."""


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


def search(
    job: Job, world: int, limits: Limits | None = None, *, wanted: int = 10, budget: int = BUDGET, seconds: float = SECONDS
) -> Searched:  # fmt: skip
    """Layouts of exactly `world` ranks, within `budget` and `seconds` of processor time. Raises InputError for a batch that no
    layout can have."""
    return _Search(job, world, limits or Limits()).run(wanted, budget, seconds)


Level = Literal["bundle", "split", "division", "state", "found"]
EFFORT: dict[Level, int] = {"bundle": 4, "split": 8, "division": 2, "state": 30, "found": 10}
"""About what it costs to look at one, in tenths of a millisecond."""
HASTE: dict[Level, float] = {"bundle": 1.15, "split": 1.12, "division": 1.05, "state": 1.0, "found": 1.0}
"""By how much bounds are expected to grow, so that at first what is nearly known goes before what is hardly known."""


class _Shared(NamedTuple):
    """What a step costs data-parallel ranks beside its micro-batches, by state (zero, dp_shard) and kind of unit: elements
    that the optimiser owns, seconds of reductions that may hide, of those that may not, of gathers, of the longest gather."""

    owned: NDArray[np.float64]
    early: NDArray[np.float64]
    late: NDArray[np.float64]
    gather: NDArray[np.float64]
    longest: NDArray[np.float64]


class _Search:
    def __init__(self, job: Job, world: int, limits: Limits) -> None:
        self.job, self.world, self.limits, self.spec = job, world, limits, job.spec
        self.splits = splits(self.spec, world, sequence=job.sequence, global_batch=job.global_batch, limits=limits)
        self.predictors = {order: Predictor(msgspec.structs.replace(job, order=order)) for order in ORDERS}
        self.fitting = Fitting(self.predictors[ORDERS[0]])
        self._numbers = count()
        self._queue: list[tuple[float, int, float, Level, Any]] = []
        self._later: list[tuple[float, Level, Any]] = []
        self._haste = True
        self._priced = 0
        self._pipelines: list[tuple[list[tuple[str, int]], NDArray[np.bool_]]] = []
        """By (pp, dp, cp): all pipelines, and [split, pipeline] which may fit."""
        self._places = np.zeros((len(self.splits), 2), np.int64)
        """By split, its place in that."""
        self.choices: dict[tuple[int, ...], Choice] = {}
        self._seconds: dict[Hashable, NDArray[np.float64]] = {}
        self._weighed: dict[Hashable, Weights] = {}
        self._shared: dict[Hashable, _Shared] = {}
        self._states: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def run(self, wanted: int, budget: int, seconds: float) -> Searched:
        """First in haste, until each of `wanted` combinations of degrees has a layout; then what could beat the best of them."""
        until = time.process_time() + seconds
        legal, fit = self._open()
        spent = 0
        while (
            self._queue
            and len(self.choices) < wanted
            and (not self.choices or (spent < budget and time.process_time() < until))
        ):  # until there is one at all
            _, _, least, level, payload = heapq.heappop(self._queue)
            if level != "bundle" and degrees(payload[0]) in self.choices:
                self._later.append((least, level, payload))
            else:
                spent += EFFORT[level]
                self._look(level, payload)
        waiting: list[tuple[float, Level, Any]] = [entry[2:] for entry in self._queue]
        waiting += self._later
        self._queue = []
        self._haste = False
        best = min((choice.seconds for choice in self.choices.values()), default=math.inf)
        for least, level, payload in waiting:
            if least < best:
                self._push(least, level, payload)
        while self._queue and self._queue[0][0] < best and spent < budget and time.process_time() < until:
            _, _, _, level, payload = heapq.heappop(self._queue)
            spent += EFFORT[level]
            self._look(level, payload)
            best = min((choice.seconds for choice in self.choices.values()), default=math.inf)
        left = self._queue[0][0] if self._queue else math.inf
        ordered = tuple(sorted(self.choices.values(), key=lambda choice: choice.seconds))
        return Searched(ordered[:wanted], legal, fit, self._priced, max(0.0, best / left - 1) if ordered else 0.0)

    def _look(self, level: Level, payload: Any) -> None:
        if level == "bundle":
            self._price_bundle(payload)
        elif level == "split":
            self._divide(*payload)
        elif level == "division":
            self._share(*payload)
        elif level == "state":
            self._price(*payload)
        elif self.fitting.fits(payload[0]):
            choice = Choice(*payload)
            known = self.choices.get(degrees(choice.layout))
            if known is None or choice.seconds < known.seconds:
                self.choices[degrees(choice.layout)] = choice

    def _push(self, least: float, level: Level, payload: Any, guess: float = 0.0) -> None:
        """`least`: a bound of all that may come of it; `guess`: what is likely to."""
        key = max(least, guess) * HASTE[level] if self._haste else least
        heapq.heappush(self._queue, (key, next(self._numbers), least, level, payload))

    def _kinds(self, dp: int, cp: int) -> list[tuple[int, int]]:
        """The states of so many data-parallel and context ranks."""
        if (dp, cp) not in self._states:
            self._states[dp, cp] = states(dp, cp, self.limits)
        return self._states[dp, cp]

    # 1. splits

    def _open(self) -> tuple[int, int]:
        """Queue every bundle of splits of which one may fit; how many layouts are legal, and how many may fit."""
        splits, legal, fit = self.splits, 0, 0
        first, place = splits.alike("pp", "dp", "cp")
        may = np.zeros(len(splits), bool)
        for number, row in enumerate(first.tolist()):
            pp, dp, cp = (splits.columns[key][row].item() for key in ("pp", "dp", "cp"))
            rows = np.flatnonzero(place == number)
            orders, kinds = pipelines(self.spec, pp, self.limits), self._kinds(dp, cp)
            legal += len(rows) * len(orders) * len(kinds)
            if orders and kinds:
                fits, found = self.fitting.may_fit(splits, rows, orders, kinds)
                fit += found
                may[rows] = fits.any(axis=1)
                self._pipelines.append((orders, fits))
            else:
                self._pipelines.append((orders, np.zeros((len(rows), 0), bool)))
            self._places[rows, 0], self._places[rows, 1] = number, np.arange(len(rows))
        self._bundle(np.flatnonzero(may))
        return legal, fit

    def _bundle(self, rows: NDArray[np.int64]) -> None:
        """Queue splits that differ in pp and dp alone together: their parts cost the same."""
        splits, job = self.splits, self.job
        if not len(rows):
            return
        first, family = splits.alike("tp", "sp", "cp", "cp_kind", "ep", "etp")
        _, bundle = splits.alike("tp", "sp", "cp", "cp_kind", "ep", "etp", "micro_batch", "recompute", "offload")
        per_row = np.zeros((len(first), 2))
        for one in np.unique(family[rows]).tolist():
            layout = splits.layout(int(first[one]))
            per_row[one] = self._row_seconds(layout, LARGE) * SURE, self._row_seconds(layout, 1)
        columns = {key: splits.columns[key][rows] for key in ("tp", "cp", "pp", "dp", "micro_batch", "recompute")}
        share = job.global_batch * columns["tp"] * columns["cp"] / self.world
        least, single = per_row[family[rows]].T
        again = np.select([columns["recompute"] == "full", columns["recompute"] == "selective"], [1.3, 1.05], 1.0)
        count = job.global_batch // columns["dp"] // columns["micro_batch"]
        guess = (
            share
            * (least + (single - least) / columns["micro_batch"])
            * again
            * (1 + WAIT * (columns["pp"] - 1) / count)
        )
        order = np.argsort(bundle[rows], kind="stable")
        starts = np.flatnonzero(np.diff(bundle[rows][order], prepend=-1))
        least_of, guess_of = (share * least)[order][starts], np.minimum.reduceat(guess[order], starts)
        members = np.split(rows[order], starts[1:])
        for bound_of, likely, own in zip(least_of.tolist(), guess_of.tolist(), members, strict=True):
            self._push(bound_of, "bundle", own.tolist(), likely)

    def _row_seconds(self, layout: Layout, micro_batch: int) -> float:
        """Seconds of a row through the whole model in such a micro-batch, nothing computed again. In a large one, the least of
        all: neither launches nor latencies nor incomplete waves count then."""
        whole = msgspec.structs.replace(layout, micro_batch=micro_batch, recompute="none")
        predictor = self.predictors[ORDERS[0]]
        return sum(times * _busy(predictor.part(whole, part)) for part, times in self.fitting.parts) / micro_batch

    # 2. their collectives and micro-batches

    def _price_bundle(self, rows: list[int]) -> None:
        """Queue the splits of a bundle, in each order of ranks that makes a difference."""
        for row in rows:
            layout = self.splits.layout(row)
            all_orders, fits = self._pipelines[int(self._places[row, 0])]
            may: list[bool] = fits[int(self._places[row, 1])].tolist()
            orders = [one for one, fit in zip(all_orders, may, strict=True) if fit]
            apart = layout.pp > 1 and layout.dp > 1 and layout.tp * layout.cp < self.job.machine.joined < self.world
            for order in ORDERS if apart else ORDERS[:1]:
                weights = self._weights(layout, order)
                whole = sum(weights.layers) + weights.first + weights.last
                busiest = max(whole / layout.pp, min(weights.layers) * -(-self.spec.layers // layout.pp))
                least = max(self._micro_batches(layout) * busiest, self._once(layout, order))
                wait = WAIT * (layout.pp - 1) / self._micro_batches(layout)
                self._push(least * SURE, "split", (layout, order, orders), least * (1 + wait))

    def _once(self, layout: Layout, order: str) -> float:
        """One micro-batch through the whole model, forward and back: no pipeline is faster."""
        each = self._part_seconds(layout, order)
        return float(each[:, :2].sum(axis=1) @ np.array([times for _, times in self.fitting.parts]))

    def _micro_batches(self, layout: Layout) -> int:
        return self.job.global_batch // layout.dp // layout.micro_batch

    # 3. divisions

    def _divide(self, layout: Layout, order: str, orders: list[tuple[str, int]]) -> None:
        """Queue each pipeline with its divisions of the layers: evenly by rank, and for one chunk by the slowest path."""
        weights, micro_batches = self._weights(layout, order), self._micro_batches(layout)
        found: dict[tuple[float, int, bool], tuple[int, ...] | None] = {}
        for name, vp in orders:
            chosen = msgspec.structs.replace(layout, schedule=name, vp=vp)
            chunks, folded = chosen.chunks, name == "zbv"
            divisions = set(every(self.spec.layers, chosen.stage_count, FEW))
            for ahead in (0.0, 1.0) if layout.pp > 1 and chunks == 1 else (0.0,):
                for least in (0 if chunks == 1 else 1, chunks):  # mostly each rank gets enough for its chunks unasked
                    key = ahead, least, folded
                    if key not in found:
                        found[key] = balance(weights, layout.pp, micro_batches, ahead, least=least, folded=folded)
                    ranks = found[key]
                    if ranks and (chunks == 1 or min(ranks) >= chunks):
                        divisions.add(deal(ranks, chunks, folded=folded))
                        break
            if "stages" in self.limits.fixed:
                divisions = {self.limits.fixed["stages"]}
            for stages in divisions:
                if len(stages) == chosen.stage_count:
                    divided = msgspec.structs.replace(chosen, stages=stages)
                    self._push(float(self._pipeline_end(divided, order)) * SURE, "division", (divided, order))

    def _weights(self, layout: Layout, order: str) -> Weights:
        key = self._key(layout, order)
        if key not in self._weighed:
            busy = self._part_seconds(layout, order).sum(axis=1).tolist()
            parts = [(part, busy[kind]) for part, kind in self.fitting.kind_of.items()]
            layers = [seconds for part, seconds in parts if part.startswith("layers.")][: self.spec.layers]
            first = sum(seconds for part, seconds in parts if part in ("embed", "positions"))
            self._weighed[key] = Weights(
                tuple(layers), first, sum(seconds for _, seconds in parts) - sum(layers) - first
            )
        return self._weighed[key]

    def _key(self, layout: Layout, order: str) -> tuple[Hashable, ...]:
        """All that the seconds of parts depend on, what every micro-batch gathers and reduces left out."""
        apart = (layout.pp, order) if self.spec.experts and order != ORDERS[0] else ()
        return (
            layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.ep, layout.etp, layout.micro_batch, layout.recompute,
            layout.offload, *apart,
        )  # fmt: skip

    def _part_seconds(self, layout: Layout, order: str) -> NDArray[np.float64]:
        """[kind of part, (forward, input, weight)] of one micro-batch, what every micro-batch gathers and reduces left out."""
        key = self._key(layout, order)
        if key not in self._seconds:
            plain = msgspec.structs.replace(layout, zero=0, dp_shard=0)
            priced = [self.predictors[order].part(plain, part) for part in self.fitting.kinds]
            self._seconds[key] = np.array([(one.forward, one.input, one.weight) for one in priced])
        return self._seconds[key]

    def _pipeline_end(self, layout: Layout, order: str, more: NDArray[np.float64] | float = 0.0) -> NDArray[np.float64]:
        """The least end of the pipeline's part of a step. `more`: [case, kind of part] seconds by which each takes longer."""
        each, divided = self._part_seconds(layout, order), self.fitting.divided(layout)
        busy = (each.sum(axis=1) + more) @ divided.parts.T
        forward, input_gradient, weight = each.T @ divided.passing[:-1].T
        send = self.predictors[order].transfer(layout)
        return least_end(
            layout.schedule if layout.pp > 1 else "1f1b", self._micro_batches(layout), busy, forward + send,
            input_gradient + weight + send,
        )  # fmt: skip

    # 4. states

    def _share(self, layout: Layout, order: str) -> None:
        """Queue the states of a division that may fit, the most promising first; where it is not sure that any does, of
        another one too, divided by memory."""
        kinds = self._kinds(layout.dp, layout.cp)
        held = self.fitting.estimate(layout, kinds) / self.fitting.capacity
        self._queue_states(layout, order, kinds, held)
        if held.max(axis=1).min() > SURELY and (divided := self._divide_by_memory(layout, held, order)):
            self._queue_states(divided, order, kinds, self.fitting.estimate(divided, kinds) / self.fitting.capacity)

    def _queue_states(
        self, layout: Layout, order: str, kinds: list[tuple[int, int]], held: NDArray[np.float64]
    ) -> None:
        rows = np.flatnonzero((held <= ROUGHLY).all(axis=1)).tolist()
        if rows:
            ends = self._ends(layout, order, kinds, rows)
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
        least, folded = 0 if layout.chunks == 1 else layout.chunks, layout.schedule == "zbv"
        ranks = balance(self._weights(layout, order), layout.pp, self._micro_batches(layout), least=least, folded=folded,
                        most=most)  # fmt: skip
        stages = None if ranks is None else deal(ranks, layout.chunks, folded=folded)
        return None if stages in (None, layout.stages) else msgspec.structs.replace(layout, stages=stages)

    def _ends(self, layout: Layout, order: str, kinds: list[tuple[int, int]], rows: list[int]) -> list[float]:
        """For some of the states, the least end of a step: after the pipeline's, what of the first stage's reductions and of
        each rank's update nothing can hide."""
        software, machine = self.job.software, self.job.machine
        shared, divided = self._tables(layout, order, kinds), self.fitting.divided(layout)
        each = self._part_seconds(layout, order)
        _, back, weight = divided.passing[0] @ each
        early = software.overlap_gradients * (back + weight) * (1 - 1 / divided.passing[0].sum())
        exposed = np.maximum((shared.early + shared.late) @ divided.first - early, shared.late @ divided.first)
        if layout.pp > 1 and layout.schedule in ("zb", "zbv"):  # the first rank need not be the last to end
            exposed = np.zeros_like(exposed)
        after = shared.owned @ divided.units.T * (cost.optimizer_seconds(10**9, machine, software) / 1e9)
        gathered = shared.gather @ divided.units.T
        hidden = np.minimum(gathered * software.overlap_parameters, divided.parts @ each[:, 0] / software.contention)
        after += gathered - hidden + hidden * (software.contention - 1)
        more = np.array([
            self._more(msgspec.structs.replace(layout, zero=kinds[row][0], dp_shard=kinds[row][1]), order) for row in rows
        ])  # fmt: skip
        found = (self._pipeline_end(layout, order, more) + exposed[rows] + after[rows].max(axis=1)) * SURE
        return [end + cost.residual(end, machine, software, layout) for end in found.tolist()]

    def _more(self, layout: Layout, order: str) -> NDArray[np.float64]:
        """By kind of part, seconds by which the gathers and reductions of every micro-batch delay it (zero 2 and 3)."""
        if layout.zero < 2:
            return np.zeros(len(self.fitting.kinds))
        key = (*self._key(layout, order), order, layout.pp, layout.dp, layout.zero, layout.dp_shard)
        if key not in self._seconds:
            predictor = self.predictors[order]
            busy = np.array([_busy(predictor.part(layout, part)) for part in self.fitting.kinds])
            self._seconds[key] = np.maximum(0.0, busy - self._part_seconds(layout, order).sum(axis=1))
        return self._seconds[key]

    def _tables(self, layout: Layout, order: str, kinds: list[tuple[int, int]]) -> _Shared:
        key = (layout.tp, layout.cp, layout.dp, layout.pp, layout.ep, layout.etp, layout.offload, order)
        if key not in self._shared:
            predictor, names = self.predictors[order], self.fitting.units
            table = np.zeros((4, len(kinds), len(names)))
            for row, (zero, shard) in enumerate(kinds):
                chosen = msgspec.structs.replace(layout, zero=zero, dp_shard=shard)
                for column, unit in enumerate(names):
                    for call in traffic.unit_step_traffic(self.spec, chosen, unit, software=self.job.software):
                        seconds = predictor.call(call, chosen) * call.count
                        if call.phase != "step":
                            table[0 if call.hides else 1, row, column] += seconds
                        else:
                            table[2, row, column] += seconds
                            table[3, row, column] = max(table[3, row, column], seconds)
            self._shared[key] = _Shared(self.fitting.owned(layout, kinds), *table)
        return self._shared[key]

    # 5. layouts

    def _price(self, layout: Layout, order: str, others: list[tuple[float, Layout]]) -> None:
        """Queue a layout with its exact time, and the next of its division's states."""
        if others:
            self._push(others[0][0], "state", (others[0][1], order, others[1:]))
        seconds = self.predictors[order].seconds(layout)
        self._priced += 1
        self._push(seconds, "found", (layout, order, seconds))


def _busy(part: cost.PartSeconds) -> float:
    return part.forward + part.input + part.weight
