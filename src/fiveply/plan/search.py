"""The best layouts for a job, by best-first branch and bound over every legal one.

Bounds are tightened step by step, and always the most promising choice is looked at next:

1. a split (`space.py`): the seconds of its products, attention and elementwise operations, shared perfectly;
2. the split with a pipeline and a division of the layers (`stages.py`): the slowest path through the stages;
3. with a state of the data-parallel ranks: what of its reductions and of its optimiser nothing can hide;
4. that layout, simulated.

A layout leaves the queue only once nothing left in it can be faster, so what is found is the best, in order. Where the
budget of simulations ends first, the least bound left says how much better anything else could be at most (`gap`). What can't
fit is dropped by a bound of its memory before it is priced.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable
from functools import lru_cache
from itertools import count
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.pipeline_schedule import Kind, build
from fiveply.plan import cost, footprint, traffic, units, workload
from fiveply.plan.predict import ORDERS, Job, Predictor
from fiveply.plan.simulate import StageSeconds, bound
from fiveply.plan.space import Limits, Splits, pipelines, splits, states
from fiveply.plan.stages import Weights, balance
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import stage_units

RISK = 0.05
"""A layout fits where the probability of running out of memory is at most this."""
BUDGET = 1500
"""Layouts priced exactly."""


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


def search(job: Job, world: int, limits: Limits = Limits(), *, wanted: int = 12, budget: int = BUDGET) -> Searched:  # noqa: B008
    """Layouts of exactly `world` ranks. Raises InputError for a batch that no layout can have."""
    return _Search(job, world, limits).run(wanted, budget)


Level = Literal["split", "pipeline", "state", "found"]


class _Search:
    def __init__(self, job: Job, world: int, limits: Limits) -> None:
        self.job, self.world, self.limits = job, world, limits
        self.spec = job.spec
        self.splits: Splits = splits(
            self.spec, world, sequence=job.sequence, global_batch=job.global_batch, limits=limits
        )
        self.predictors = {order: Predictor(msgspec.structs.replace(job, order=order)) for order in ORDERS}
        bias, deviation = cost.memory_error(job.machine, job.software)
        room = job.machine.memory_bytes - job.software.context_bytes
        self.capacity = max(0.0, room) * math.exp(-bias - deviation * NormalDist().inv_cdf(1 - RISK))
        """Most predicted bytes that fit at RISK."""
        self.parts = list(workload.kinds(self.spec))
        """Of the whole model, in forward order."""
        self._numbers = count()
        self._queue: list[tuple[float, int, Level, Any]] = []
        self._bare: dict[Hashable, tuple[float, float]] = {}
        self._kept: dict[Hashable, tuple[int, int]] = {}
        self._states: dict[Hashable, _Shared] = {}
        self._beyond: dict[Hashable, NDArray[np.float64]] = {}
        kinds = workload.kinds(self.spec)
        first = {kind: part for part, kind in reversed(kinds.items())}
        self.alike = Counter(first[kind] for kind in kinds.values())
        """One part of each kind, with how many there are."""
        self.unit_of = units.alike(self.spec)
        self.units = list(dict.fromkeys(self.unit_of.values()))
        """One unit of each kind of state."""
        self.times = np.array([sum(first == unit for first in self.unit_of.values()) for unit in self.units])
        self.is_layer = np.array([unit.startswith("layers") for unit in self.units])

    def run(self, wanted: int, budget: int) -> Searched:
        legal, fit = self._open()
        priced = 0
        choices: dict[tuple[int, ...], Choice] = {}
        while self._queue and len(choices) < wanted and priced < budget:
            _, _, level, payload = heapq.heappop(self._queue)
            if level == "found":
                choices.setdefault(degrees(payload.layout), payload)
            elif level == "split":
                self._pipelines(*payload)
            elif level == "pipeline":
                self._open_states(*payload)
            elif degrees(payload[0][0][1]) not in choices:
                self._price(*payload)
                priced += 1
        for _, _, level, payload in sorted(self._queue, key=lambda entry: entry[:2]):
            if level == "found" and len(choices) < wanted:
                choices.setdefault(degrees(payload.layout), payload)
        ordered = sorted(choices.values(), key=lambda choice: choice.seconds)
        left = min((entry[0] for entry in self._queue if entry[2] != "found"), default=math.inf)
        gap = max(0.0, ordered[0].seconds / left - 1) if ordered else 0.0
        return Searched(tuple(ordered), legal, fit, priced, gap)

    def _push(self, least: float, level: Level, payload: Any) -> None:
        heapq.heappush(self._queue, (least, next(self._numbers), level, payload))

    # 1. splits

    def _open(self) -> tuple[int, int]:
        """Queue every split that may fit; how many layouts are legal, and how many may fit."""
        columns = self.splits.columns
        legal = fit = 0
        degrees_of = np.stack([columns[key] for key in ("pp", "dp", "cp")], axis=1) if len(self.splits) else np.empty((0, 3))
        for pp, dp, cp in np.unique(degrees_of, axis=0).astype(int).tolist():
            rows = np.flatnonzero((degrees_of == (pp, dp, cp)).all(axis=1))
            orders, kinds = pipelines(self.spec, pp, self.limits), states(dp, cp, self.limits)
            legal += len(rows) * len(orders) * len(kinds)
            if not orders or not kinds:
                continue
            may = self._may_fit(rows, pp, orders, kinds)
            fit += int(may.sum())
            for row in rows[may.any(axis=(1, 2))].tolist():
                self._open_split(row, pp, dp)
        return legal, fit

    def _open_split(self, row: int, pp: int, dp: int) -> None:
        layout = self.splits.layout(row)
        busy, once = self._compute(layout)
        micro_batches = self.job.global_batch // dp // layout.micro_batch
        least = max(micro_batches * busy / pp, once)
        outer = pp > 1 and dp > 1 and layout.tp * layout.cp < self.job.machine.joined < self.world
        for order in ORDERS if outer else ORDERS[:1]:
            self._push(least, "split", (layout, order))

    def _compute(self, layout: Layout) -> tuple[float, float]:
        """Least seconds of one micro-batch through the whole model: computing, and one after the other without its weight
        gradients. Without recomputation, and as sequence parallelism would have it: both only add."""
        key = (layout.tp, layout.cp, layout.ep, layout.etp, layout.micro_batch)
        if key not in self._bare:
            job = self.job
            bare = msgspec.structs.replace(layout, sp=-1, recompute="none", cp_kind="gather")
            how = {"sequence": job.sequence, "software": job.software, "precision": job.precision}
            busy = once = 0.0
            for part, times in self.alike.items():
                work = workload.work(self.spec, bare, part, **how)
                priced = cost.part_seconds(work, (), job.machine, job.software, job.precision, {})
                busy += times * (priced.forward + priced.input + priced.weight)
                once += times * (priced.forward + priced.input)
            self._bare[key] = busy * SURE, once * SURE
        return self._bare[key]

    # memory

    def _may_fit(
        self, rows: NDArray[np.int64], pp: int, orders: list[tuple[str, int]], kinds: list[tuple[int, int]]
    ) -> NDArray[np.bool_]:
        """[split, pipeline, state]: whether the layers could be dealt to ranks such that all fit, layers being divisible.

        A rank r with n(r) layers holds n(r) (s + a(r) k): s is a layer's state, k what it keeps of a micro-batch, a(r) the
        micro-batches alive. The least possible maximum is L / sum(1 / (s + a(r) k)). Embedding and head are left out at
        pp > 1; ranks are taken in a few groups, each at its least a(r).
        """
        layouts = [self.splits.layout(row) for row in rows.tolist()]
        kept = np.array([self._kept_bytes(layout) for layout in layouts])
        bytes_of = np.array([self._shared(layout, ORDERS[0]).table[:, :, 0] for layout in layouts])  # [split, state, unit]
        inside = bytes_of[:, :, self.is_layer] @ self.times[self.is_layer]
        outside = bytes_of[:, :, ~self.is_layer] @ self.times[~self.is_layer]
        if pp == 1:
            held = kept.sum(axis=1)[:, None] + inside + outside
            return np.repeat((held <= self.capacity)[:, None, :], len(orders), axis=1)
        layers = int(self.times[self.is_layer].sum())
        layer_kept, layer_state = kept[:, 0] / layers, inside / layers
        micro_batches = self.job.global_batch // self.splits.columns["dp"][rows] // self.splits.columns["micro_batch"][rows]
        may = np.zeros((len(rows), len(orders), len(kinds)), bool)
        for each in np.unique(micro_batches).tolist():
            here = np.flatnonzero(micro_batches == each)
            for index, (name, vp) in enumerate(orders):
                relief = np.zeros(layer_state[here].shape)
                for alive, ranks in zip(*_groups(name, pp, vp or CHUNKS.get(name, 1), each), strict=True):
                    relief += ranks / (layer_state[here] + alive * layer_kept[here, None])
                may[here, index] = layers / relief <= self.capacity
        return may

    def _kept_bytes(self, layout: Layout) -> tuple[int, int]:
        """What all layers, and what the other parts, keep of one micro-batch. Proportional to its rows."""
        key = (layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.ep, layout.etp, layout.recompute, layout.offload)
        if key not in self._kept:
            job = self.job
            one = msgspec.structs.replace(layout, micro_batch=1)
            inside = outside = 0
            for part, times in self.alike.items():
                kept = workload.work(
                    self.spec, one, part, sequence=job.sequence, software=job.software, precision=job.precision
                ).kept_bytes
                layer = part.startswith("layers")
                inside, outside = inside + times * kept * layer, outside + times * kept * (not layer)
            self._kept[key] = inside, outside
        inside, outside = self._kept[key]
        return (0 if layout.offload == "activations" else inside) * layout.micro_batch, outside * layout.micro_batch

    def _shared(self, layout: Layout, order: str) -> _Shared:
        """The tables of all states of the layout's degrees."""
        key = (layout.tp, layout.cp, layout.dp, layout.pp, layout.ep, layout.etp, layout.offload, order)
        if key not in self._states:
            self._states[key] = self._tabulate(layout, order)
        return self._states[key]

    def _tabulate(self, layout: Layout, order: str) -> _Shared:
        job, predictor = self.job, self.predictors[order]
        kinds = states(layout.dp, layout.cp, self.limits)
        table = np.zeros((len(kinds), len(self.units), 6))
        for row, (zero, shard) in enumerate(kinds):
            chosen = msgspec.structs.replace(layout, zero=zero, dp_shard=shard)
            for column, unit in enumerate(self.units):
                held = footprint.state(self.spec, chosen, [unit], software=job.software)
                early = late = gather = largest = 0.0
                for call in traffic.unit_step_traffic(self.spec, chosen, unit, software=job.software):
                    seconds = predictor.call(call, chosen) * call.count
                    if call.phase == "step":
                        gather, largest = gather + seconds, max(largest, seconds)
                    elif call.hides:
                        early += seconds
                    else:
                        late += seconds
                owned = 0 if job.software.optimizer_bytes == 0 else held.optimizer / job.software.optimizer_bytes
                table[row, column] = held.total, owned, early, late, gather, largest
        return _Shared(kinds, table)

    # 2. pipelines

    def _pipelines(self, layout: Layout, order: str) -> None:
        predictor = self.predictors[order]
        micro_batches = predictor.micro_batches(layout)
        weights = self._weights(layout, order)
        for name, vp in pipelines(self.spec, layout.pp, self.limits):
            chosen = msgspec.structs.replace(layout, schedule=name, vp=vp)
            divisions: set[tuple[int, ...]] = set()
            wanted = self.limits.fixed.get("stages")
            for ahead in (0.0, 1.0 / chosen.chunks) if layout.pp > 1 else (0.0,):
                found = wanted or balance(
                    msgspec.structs.replace(weights, ahead=ahead), layout.pp, chosen.chunks, micro_batches,
                    folded=name == "zbv",
                )  # fmt: skip
                if found and len(found) == chosen.stage_count:
                    divisions.add(found)
            for stages in divisions:
                divided = msgspec.structs.replace(chosen, stages=stages)
                seconds = [stage.seconds for stage in predictor.stages(divided)]
                least = bound(name, layout.pp, chosen.chunks, micro_batches, seconds)
                self._push(least, "pipeline", (divided, order, seconds, least))

    def _weights(self, layout: Layout, order: str) -> Weights:
        whole = msgspec.structs.replace(layout, zero=0, dp_shard=0, stages=(self.spec.layers,))
        busy = {part: _busy(self.predictors[order].part(whole, part)) for part in self.parts}
        layers = [busy[part] for part in self.parts if part.startswith("layers.")][: self.spec.layers]
        first = busy["embed"] + busy.get("positions", 0.0)
        return Weights(tuple(layers), first, sum(busy.values()) - sum(layers) - first)

    # 3. states

    def _open_states(self, layout: Layout, order: str, seconds: list[StageSeconds], least: float) -> None:
        """Queue the states that fit, the most promising first; where none does, divide the layers by memory."""
        predictor, shared = self.predictors[order], self._shared(layout, order)
        counts = self._counts(layout)
        held = self._bytes(layout, shared, counts)
        fits = (held <= self.capacity).all(axis=1)
        if not fits.any() and layout.pp > 1 and "stages" not in self.limits.fixed:
            divided = self._divide_by_memory(layout, held[held.max(axis=1).argmin()], order)
            if divided is None:
                return
            layout, counts = divided, self._counts(divided)
            fits = (self._bytes(layout, shared, counts) <= self.capacity).all(axis=1)
            seconds = [stage.seconds for stage in predictor.stages(layout)]
            least = bound(layout.schedule, layout.pp, layout.chunks, predictor.micro_batches(layout), seconds)
        ends = self._ends(layout, shared, counts, seconds, least)
        found = [
            (float(ends[row]), msgspec.structs.replace(layout, zero=zero, dp_shard=shard))
            for row, (zero, shard) in enumerate(shared.kinds)
            if fits[row]
        ]
        found.sort(key=lambda item: item[0])
        if found:
            self._push(found[0][0], "state", (found, 0, order))

    def _counts(self, layout: Layout) -> NDArray[np.int64]:
        """[rank, unit]: how many units of each kind a pipeline rank holds."""
        counts = np.zeros((layout.pp, len(self.units)), np.int64)
        for rank in range(layout.pp):
            for unit in traffic.held_units(self.spec, layout, rank):
                counts[rank, self.units.index(self.unit_of[unit])] += 1
        return counts

    def _bytes(self, layout: Layout, shared: _Shared, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """[state, rank]: bytes at the worst moment."""
        state = shared.table[:, :, 0] @ counts.T
        beyond = {zero: self._beyond_state(layout, zero) for zero in sorted({zero for zero, _ in shared.kinds})}
        return state + np.array([beyond[zero] for zero, _ in shared.kinds])

    def _beyond_state(self, layout: Layout, zero: int) -> NDArray[np.float64]:
        """By rank, bytes beside the state. Of zero they depend only on what is gathered and reduced whole for a moment; beyond
        a few rounds not on the number of micro-batches."""
        plain = msgspec.structs.replace(layout, zero=max(1, zero) if zero > 1 else 0, dp_shard=0)
        if plain not in self._beyond:
            job = self.job
            rows = job.global_batch // layout.dp
            if layout.schedule != "gpipe":
                rows = min(rows, layout.micro_batch * 4 * layout.pp)
            found = footprint.by_rank(
                self.spec, plain, sequence=job.sequence, global_batch=rows * layout.dp, software=job.software,
                precision=job.precision,
            )  # fmt: skip
            self._beyond[plain] = np.array([one.activations + one.working + one.buffers for one in found], float)
        return self._beyond[plain]

    def _divide_by_memory(self, layout: Layout, held: NDArray[np.float64], order: str) -> Layout | None:
        """The division of layers that is fastest among those whose bytes, taken as proportional to layers, fit."""
        layers = np.zeros(layout.pp)
        for stage, number in enumerate(layout.stages):
            rank = stage % layout.pp if layout.schedule != "zbv" else min(stage, 2 * layout.pp - 1 - stage)
            layers[rank] += number
        most = np.floor(np.maximum(layers, 1) * self.capacity / held).astype(int).tolist()
        weights = self._weights(layout, order)
        found = balance(weights, layout.pp, layout.chunks, self.predictors[order].micro_batches(layout),
                        folded=layout.schedule == "zbv", most=most)  # fmt: skip
        return None if found is None else msgspec.structs.replace(layout, stages=found)

    def _ends(
        self, layout: Layout, shared: _Shared, counts: NDArray[np.int64], seconds: list[StageSeconds], least: float
    ) -> NDArray[np.float64]:
        """By state, the least end of a step: after the pipeline's, what of the first stage's reductions and of each rank's
        update nothing can hide."""
        software, machine = self.job.software, self.job.machine
        _, owned, early, late, gather, largest = np.moveaxis(shared.table, 2, 0)
        first = self._counts_of(traffic_units(self.spec, layout, 0))
        stage = seconds[0]
        tail = late @ first + early[:, self.units.index(self.unit_of["embed"])]
        exposed = np.maximum((early + late) @ first - stage.reduce_early, tail)
        if layout.pp > 1 and layout.schedule in ("zb", "zbv"):  # the first rank need not be the last to end
            exposed = np.zeros_like(exposed)
        optimizer = owned @ counts.T * (cost.optimizer_seconds(10**9, machine, software) / 1e9)
        beside = np.zeros(layout.pp)
        for number, one in enumerate(seconds):
            rank = number % layout.pp if layout.schedule != "zbv" else min(number, 2 * layout.pp - 1 - number)
            beside[rank] += one.forward
        gathered = gather @ counts.T
        hidden = np.minimum(gathered * software.overlap_parameters, beside / software.contention)
        waiting = np.maximum(gathered - hidden + hidden * (software.contention - 1), largest.max(axis=1)[:, None] * (gathered > 0))
        ends = (least + exposed + (optimizer + waiting).max(axis=1)) * SURE
        return np.array([end + cost.residual(end, machine, software, layout) for end in ends.tolist()])

    def _counts_of(self, names: list[str]) -> NDArray[np.int64]:
        counts = np.zeros(len(self.units), np.int64)
        for name in names:
            counts[self.units.index(self.unit_of[name])] += 1
        return counts

    # 4. layouts

    def _price(self, found: list[tuple[float, Layout]], index: int, order: str) -> None:
        layout = found[index][1]
        seconds = self.predictors[order].seconds(layout)
        self._push(seconds, "found", Choice(layout, order, seconds))
        if index + 1 < len(found):
            self._push(found[index + 1][0], "state", (found, index + 1, order))


SURE = 0.999
"""Against rounding of shares in a bound."""


CHUNKS = {"interleaved": 2, "zbv": 2}
"""Of a rank, where `vp` is left to its default."""


class _Shared(NamedTuple):
    """What data-parallel ranks share, by state: `kinds` of (zero, dp_shard); `table` [state, unit kind, (bytes, elements that
    the optimiser owns, seconds of reductions that may hide, of those that may not, of gathers, of the longest gather)]."""

    kinds: list[tuple[int, int]]
    table: NDArray[np.float64]


def _busy(part: cost.PartSeconds) -> float:
    return part.forward + part.input + part.weight


def traffic_units(spec: ModelSpec, layout: Layout, stage: int) -> list[str]:
    """Units of one stage."""
    return stage_units(spec, layout.stages, stage)


def degrees(layout: Layout) -> tuple[int, ...]:
    return (layout.dp, layout.tp, layout.pp, layout.cp, layout.ep)


@lru_cache(maxsize=4096)
def _groups(name: str, pp: int, vp: int, micro_batches: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Ranks in up to four groups of neighbours: the least number of micro-batches alive in each, and its ranks."""
    alive = _alive(name, pp, vp, micro_batches)
    pieces = np.array_split(alive, min(4, pp))
    return tuple(float(piece.min()) for piece in pieces), tuple(len(piece) for piece in pieces)


@lru_cache(maxsize=4096)
def _alive(name: str, pp: int, vp: int, micro_batches: int) -> NDArray[np.float64]:
    """By rank, whole micro-batches of its layers alive at the most, until the input gradient (what is kept for the weight
    gradient is less)."""
    enough = min(micro_batches, 4 * pp) if name != "gpipe" else min(micro_batches, 1)
    schedule = build(name, pp, enough, vp)
    found = np.zeros(pp)
    for rank, actions in enumerate(schedule.ranks):
        now = most = 0
        for action in actions:
            now += (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.INPUT))
            most = max(most, now)
        found[rank] = most / vp
    return found * micro_batches if name == "gpipe" else found
