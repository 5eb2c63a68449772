"""The best layouts for a job, by best-first branch and bound over every legal one.

Bounds are tightened step by step, and always the most promising choice is looked at next:

1. a split (`space.py`): the seconds of its products, attention and elementwise operations, shared perfectly;
2. a split with a pipeline and a division of the layers (`stages.py`), its collectives included: its slowest path;
3. the same with transfers, and with each state of the data-parallel ranks: what of reductions and update nothing hides;
4. that layout, simulated.

A layout leaves the queue only once nothing left in it can be faster, so what is found is the best, in order. Where the
budget of simulations ends first, the least bound left says how much better anything else could be at most (`gap`). What can't
fit is dropped by a bound of its memory before it is priced (`fitting.py`).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable
from itertools import count
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.plan import cost, traffic, units, workload
from fiveply.plan.fitting import Fitting
from fiveply.plan.predict import ORDERS, Job, Predictor
from fiveply.plan.simulate import bound
from fiveply.plan.space import Limits, pipelines, splits, states
from fiveply.plan.stages import Weights, balance, slowest
from fiveply.spec.layout import Layout

BUDGET = 1500
"""Layouts priced exactly."""
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


def search(job: Job, world: int, limits: Limits | None = None, *, wanted: int = 10, budget: int = BUDGET) -> Searched:
    """Layouts of exactly `world` ranks. Raises InputError for a batch that no layout can have."""
    return _Search(job, world, limits or Limits()).run(wanted, budget)


Level = Literal["split", "division", "state", "found"]


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
        self.fitting = Fitting(job)
        kinds = workload.kinds(self.spec)
        first = {kind: part for part, kind in reversed(kinds.items())}
        self.parts = {part: first[kind] for part, kind in kinds.items()}
        """Every part in forward order, with the first of its kind."""
        self.unit_of = units.alike(self.spec)
        self._numbers = count()
        self._queue: list[tuple[float, int, Level, Any]] = []
        self._bare: dict[Hashable, tuple[float, float]] = {}
        self._shared: dict[Hashable, _Shared] = {}

    def run(self, wanted: int, budget: int) -> Searched:
        legal, fit = self._open()
        choices: dict[tuple[int, ...], Choice] = {}
        priced = 0
        while self._queue and len(choices) < wanted and priced < budget:
            _, _, level, payload = heapq.heappop(self._queue)
            if level == "found":
                choices.setdefault(degrees(payload.layout), payload)
            elif level == "split":
                self._divide(*payload)
            elif level == "division":
                self._share(*payload)
            elif degrees(payload[0][0][1]) not in choices:
                priced += self._price(*payload)
        left = min((entry[0] for entry in self._queue if entry[2] != "found"), default=math.inf)
        for choice in sorted((entry[3] for entry in self._queue if entry[2] == "found"), key=lambda c: c.seconds):
            if len(choices) < wanted:
                choices.setdefault(degrees(choice.layout), choice)
        ordered = tuple(sorted(choices.values(), key=lambda choice: choice.seconds))
        gap = max(0.0, ordered[0].seconds / left - 1) if ordered else 0.0
        return Searched(ordered, legal, fit, priced, gap)

    def _push(self, least: float, level: Level, payload: Any) -> None:
        heapq.heappush(self._queue, (least, next(self._numbers), level, payload))

    # 1. splits

    def _open(self) -> tuple[int, int]:
        """Queue every split that may fit; how many layouts are legal, and how many may fit."""
        legal = fit = 0
        for (pp, dp, cp), layouts in self.splits.by_degrees():
            orders, kinds = pipelines(self.spec, pp, self.limits), states(dp, cp, self.limits)
            legal += len(layouts) * len(orders) * len(kinds)
            if orders and kinds:
                may = self.fitting.may_fit(layouts, orders, kinds)
                fit += int(may.sum())
                for layout, fits in zip(layouts, may.any(axis=(1, 2)).tolist(), strict=True):
                    if fits:
                        self._open_split(layout)
        return legal, fit

    def _open_split(self, layout: Layout) -> None:
        busy, once = self._compute(layout)
        least = max(self._micro_batches(layout) * busy / layout.pp, once)
        apart = layout.pp > 1 and layout.dp > 1 and layout.tp * layout.cp < self.job.machine.joined < self.world
        for order in ORDERS if apart else ORDERS[:1]:
            self._push(least, "split", (layout, order))

    def _micro_batches(self, layout: Layout) -> int:
        return self.job.global_batch // layout.dp // layout.micro_batch

    def _compute(self, layout: Layout) -> tuple[float, float]:
        """Least seconds of one micro-batch through the whole model: computing, and one after the other without its weight
        gradients. Without recomputation, and as sequence parallelism would have it: both only add."""
        key = (layout.tp, layout.cp, layout.ep, layout.etp, layout.micro_batch)
        if key not in self._bare:
            job = self.job
            bare = msgspec.structs.replace(layout, sp=-1, recompute="none", cp_kind="gather")
            busy = once = 0.0
            for part, times in Counter(self.parts.values()).items():
                work = workload.work(
                    self.spec, bare, part, sequence=job.sequence, software=job.software, precision=job.precision
                )
                priced = cost.part_seconds(work, (), job.machine, job.software, job.precision, {})
                busy += times * _busy(priced)
                once += times * (priced.forward + priced.input)
            self._bare[key] = busy * SURE, once * SURE
        return self._bare[key]

    # 2. divisions

    def _divide(self, layout: Layout, order: str) -> None:
        """Queue each pipeline with its divisions of the layers: evenly by rank, and by the slowest path."""
        weights, micro_batches = self._weights(layout, order), self._micro_batches(layout)
        fixed = self.limits.fixed.get("stages")
        for name, vp in pipelines(self.spec, layout.pp, self.limits):
            chosen = msgspec.structs.replace(layout, schedule=name, vp=vp)
            shape = layout.pp, chosen.chunks, micro_batches
            folded = name == "zbv"
            divisions = {fixed} if fixed else {
                balance(weights, *shape, ahead, folded=folded)
                for ahead in ((0.0, 1.0 / chosen.chunks) if layout.pp > 1 else (0.0,))
            }  # fmt: skip
            for stages in divisions:
                if stages and len(stages) == chosen.stage_count:
                    split = folded or name == "zb"  # what a rank puts off may fill its wait
                    least = 0.0 if split else slowest(weights, stages, *shape, folded=folded)
                    least = max(least, self._busiest(weights, stages, *shape, folded=folded))
                    self._push(least * SURE, "division", (msgspec.structs.replace(chosen, stages=stages), order))

    def _busiest(
        self, weights: Weights, stages: tuple[int, ...], pp: int, vp: int, micro_batches: int, *, folded: bool
    ) -> float:
        """The longest that a rank computes."""
        return micro_batches * max(
            slowest(weights, stages, pp, vp, 1, folded=folded) / (pp + 1), (sum(weights.layers) + weights.first + weights.last) / pp
        )

    def _weights(self, layout: Layout, order: str) -> Weights:
        predictor = self.predictors[order]
        whole = msgspec.structs.replace(layout, zero=0, dp_shard=0, stages=(self.spec.layers,))
        priced = {part: _busy(predictor.part(whole, part)) for part in dict.fromkeys(self.parts.values())}
        busy = {part: priced[first] for part, first in self.parts.items()}
        layers = [busy[part] for part in self.parts if part.startswith("layers.")][: self.spec.layers]
        first = busy["embed"] + busy.get("positions", 0.0)
        return Weights(tuple(layers), first, sum(busy.values()) - sum(layers) - first)

    # 3. states

    def _share(self, layout: Layout, order: str) -> None:
        """Queue the states of a division that may fit, the most promising first; where none does, divide by memory."""
        kinds = states(layout.dp, layout.cp, self.limits)
        held = self.fitting.least_bytes(layout, kinds)
        fits = (held <= self.fitting.capacity).all(axis=1)
        if not fits.any():
            divided = self._divide_by_memory(layout, held[held.max(axis=1).argmin()], order)
            if divided is None:
                return
            layout = divided
            fits = (self.fitting.least_bytes(layout, kinds) <= self.fitting.capacity).all(axis=1)
        ends = self._ends(layout, order, kinds)
        found = [
            (end, msgspec.structs.replace(layout, zero=zero, dp_shard=shard))
            for end, fit, (zero, shard) in zip(ends, fits.tolist(), kinds, strict=True)
            if fit
        ]
        if found:
            found.sort(key=lambda item: item[0])
            self._push(found[0][0], "state", (found, 0, order))

    def _divide_by_memory(self, layout: Layout, held: NDArray[np.float64], order: str) -> Layout | None:
        """The fastest division of the layers whose bytes, taken as proportional to layers, fit; None where there is none."""
        if layout.pp == 1 or "stages" in self.limits.fixed:
            return None
        layers = np.zeros(layout.pp)
        for rank in range(layout.pp):
            layers[rank] = sum(layout.stages[layout.stage_of(rank, chunk)] for chunk in range(layout.chunks))
        most = np.floor(np.maximum(layers, 1) * self.fitting.capacity / held).astype(int).tolist()
        found = balance(self._weights(layout, order), layout.pp, layout.chunks, self._micro_batches(layout),
                        folded=layout.schedule == "zbv", most=most)  # fmt: skip
        return None if found is None else msgspec.structs.replace(layout, stages=found)

    def _ends(self, layout: Layout, order: str, kinds: list[tuple[int, int]]) -> list[float]:
        """By state, the least end of a step: after the pipeline's, what of the first stage's reductions and of each rank's
        update nothing can hide."""
        predictor, software, machine = self.predictors[order], self.job.software, self.job.machine
        seconds = [stage.seconds for stage in predictor.stages(layout)]
        least = bound(layout.schedule, layout.pp, layout.chunks, self._micro_batches(layout), seconds)
        shared, counts = self._tables(layout, order, kinds), self.fitting.counts(layout)
        first = self.fitting.count(self.fitting.stage_units(layout, 0))
        opening = self.fitting.units.index(self.unit_of["embed"])
        exposed = np.maximum(
            (shared.early + shared.late) @ first - seconds[0].reduce_early, shared.late @ first + shared.early[:, opening]
        )
        if layout.pp > 1 and layout.schedule in ("zb", "zbv"):  # the first rank need not be the last to end
            exposed = np.zeros_like(exposed)
        after = shared.owned @ counts.T * (cost.optimizer_seconds(10**9, machine, software) / 1e9)
        gathered = shared.gather @ counts.T
        beside = np.zeros(layout.pp)
        for rank in range(layout.pp):
            beside[rank] = sum(seconds[layout.stage_of(rank, chunk)].forward for chunk in range(layout.chunks))
        hidden = np.minimum(gathered * software.overlap_parameters, beside / software.contention)
        after += np.maximum(gathered - hidden + hidden * (software.contention - 1), shared.longest.min(axis=1)[:, None])
        ends = (least + exposed + after.max(axis=1)) * SURE
        return [end + cost.residual(end, machine, software, layout) for end in ends.tolist()]

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

    # 4. layouts

    def _price(self, found: list[tuple[float, Layout]], index: int, order: str) -> int:
        """Queue a layout with its exact time, if it fits, and the next of its states; how many were simulated."""
        if index + 1 < len(found):
            self._push(found[index + 1][0], "state", (found, index + 1, order))
        layout = found[index][1]
        if not self.fitting.fits(layout):
            return 0
        seconds = self.predictors[order].seconds(layout)
        self._push(seconds, "found", Choice(layout, order, seconds))
        return 1


def _busy(part: cost.PartSeconds) -> float:
    return part.forward + part.input + part.weight
