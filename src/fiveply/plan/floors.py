"""What layouts take at least, in seconds: bounds for the search, from prices that are remembered by what they depend on.

They tighten as more of a layout is known: its split (for any pipeline and any division of the layers), with its pipeline and
a division, with the state of its data-parallel ranks. Exact seconds are `Predictor.seconds`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.plan import cost, traffic, units
from fiveply.plan.bounds import Lanes, Model, least_end, least_of_any
from fiveply.plan.cost import Wire
from fiveply.plan.fitting import Fitting
from fiveply.plan.predict import ORDERS, SPLIT, Job, Predictor
from fiveply.plan.space import Kinds, chunks_of
from fiveply.plan.stages import Weights
from fiveply.spec.layout import Layout

Array = NDArray[np.float64]
LARGE = 4096
"""Rows of a micro-batch that bounds the efficiency of all smaller ones."""
SURE = 0.999
"""Against rounding of shares in a bound."""


class Step(NamedTuple):
    """What a step costs data-parallel ranks beside its micro-batches, by state (zero, dp_shard) and kind of unit: elements
    that the optimiser owns, seconds of reductions that may hide, of those that may not, of gathers."""

    owned: Array
    early: Array
    late: Array
    gather: Array


class Floors:
    """Of one job."""

    def __init__(self, job: Job, world: int) -> None:
        self.job, self.spec, self._all = job, job.spec, Layout(dp=world)
        first = Predictor(msgspec.structs.replace(job, order=ORDERS[0]))
        self.predictors = {ORDERS[0]: first, ORDERS[1]: first.ordered(ORDERS[1])}
        self.fitting = Fitting(first)
        self.blocking = first.blocking
        parts = list(self.fitting.kind_of)
        begin = parts.index("layers.0")
        end = begin + self.spec.layers  # layers that only predict a further token stand behind, with norm and head
        self._opening, self._layers, self._closing = map(
            self.fitting.counted, (parts[:begin], parts[begin:end], parts[end:])
        )
        self._seconds: dict[Hashable, Array] = {}
        self._models: dict[Hashable, Model] = {}
        self._steps: dict[Hashable, Step] = {}
        self._each: dict[Hashable, list[tuple[str, str, Array]]] = {}

    # of a split

    def seconds(self, layout: Layout, order: str) -> Array:
        """[kind of part, (forward, input, weight)] of one micro-batch, what every micro-batch gathers and reduces left out."""
        key = self._key(layout, order)
        if key not in self._seconds:
            plain = msgspec.structs.replace(layout, zero=0, dp_shard=0)
            priced = [self.predictors[order].part(plain, part) for part in self.fitting.kinds]
            self._seconds[key] = np.array([(one.forward, one.input, one.weight) for one in priced])
        return self._seconds[key]

    def _key(self, layout: Layout, order: str) -> tuple[Hashable, ...]:
        apart = (layout.pp, order) if self.spec.experts and order != ORDERS[0] else ()
        return SPLIT(layout), apart

    def model(self, layout: Layout, order: str = ORDERS[0]) -> Model:
        """One micro-batch through the whole model."""
        key = self._key(layout, order)
        if key not in self._models:
            self._models[key] = Model(*map(float, self._model(self.seconds(layout, order))))
        return self._models[key]

    def large(self, layouts: Sequence[Layout]) -> Array:
        """[layout, (nothing computed again, all layers in full), field of Model]: the least of a row through the whole model. In a
        large micro-batch neither launches nor latencies nor incomplete waves count."""
        whole = [msgspec.structs.replace(one, micro_batch=LARGE, recompute="none") for one in layouts]
        each, predictor = np.array([self.seconds(one, ORDERS[0]) for one in whole]) / LARGE, self.predictors[ORDERS[0]]
        again = each.copy()
        for kind, part in enumerate(self.fitting.kinds):
            if self._layers[kind]:
                again[:, kind, 1] += [predictor.computed(one, part).phases["forward"] / LARGE for one in whole]
        return np.stack([np.stack(self._model(one), axis=-1) for one in (each, again)], axis=1)

    def _model(self, each: Array) -> Model:
        """From seconds [..., kind of part, phase]."""
        busy, layer = each.sum(axis=-1), self._layers > 0
        share = each[..., layer, 0] / busy[..., layer]
        return Model(
            busy @ self._opening, busy @ self._closing, busy @ self._layers,
            each[..., :2].sum(axis=-1) @ (self._opening + self._layers + self._closing),
            busy[..., layer].min(axis=-1), each[..., layer, 0].min(axis=-1), share.max(axis=-1), share.min(axis=-1),
        )  # fmt: skip

    def pipelines(
        self, layout: Layout, kinds: Kinds, orders: list[tuple[str, int]], busiest: NDArray[np.int64], send: float
    ) -> Array:  # fmt: skip
        """The least end of a step of a split by pipeline (schedule, vp), with any division, in any state that may fit and any order
        of ranks; infinite where none does. `busiest`: of `Fitting.busiest`; `send`: seconds of a transfer."""
        model, order = self.model(layout), ORDERS[0]  # where experts' ranks lie closest
        plain = np.array([zero < 2 for zero, _ in kinds])
        least_busy = busiest[plain].min(axis=0, initial=self.spec.layers + 1)
        if (least_busy <= -(-self.spec.layers // layout.pp)).all():  # no other state could be faster
            busiest = least_busy[None]
        else:
            more = self._more(layout, order, kinds)
            layers = more[:, self._layers > 0]
            model = model._replace(
                opening=model.opening + (more @ self._opening)[:, None],
                closing=model.closing + (more @ self._closing)[:, None],
                layers=model.layers + (more @ self._layers)[:, None],
                layer=model.layer + layers.min(axis=1)[:, None],
                most=np.where(layers.max(axis=1) > 0, max(model.most, 0.5), model.most)[:, None],
                least=model.least * (model.layer / (model.layer + layers.max(axis=1)))[:, None],
            )
        names = np.array(["1f1b" if name == "gpipe" else name for name, _ in orders])  # which gpipe can't beat
        chunks = np.array([chunks_of(name, vp) for name, vp in orders])
        least, count = np.full(busiest.shape, np.inf), self.predictors[order].micro_batches(layout)
        for name in np.unique(names).tolist():
            some = names == name
            bound = self.any_division(name, chunks[some], layout.pp, count, busiest[:, some], model, send)
            least[:, some] = bound
        return np.where(busiest <= self.spec.layers, least, np.inf).min(axis=0)

    def any_division(
        self, name: str, vp: Any, pp: Any, micro_batches: Any, busiest: Any, model: Model, send: Any
    ) -> Any:
        """Of one pipeline, or of arrays of splits."""
        least = least_of_any(name, vp, pp, micro_batches, busiest, model, send, blocking=self.blocking)
        return self.whole(least * SURE)

    def whole(self, seconds: Any) -> Any:
        """With what no term explains."""
        return seconds + cost.residual(seconds, self.job.machine, self.job.software, self._all)

    def shape(self, layout: Layout, order: str) -> tuple[int, ...]:
        """Seconds of each kind of part in thousandths of the least layer's."""
        busy = self.seconds(layout, order).sum(axis=1)
        return tuple((busy * (1000 / self.model(layout, order).layer)).round().astype(int).tolist())

    def weights(self, layout: Layout, order: str) -> Weights:
        model, busy = self.model(layout, order), self.seconds(layout, order).sum(axis=1)
        layers = tuple(busy[self.fitting.kind_of[f"layers.{number}"]] for number in range(self.spec.layers))
        return Weights(layers, model.opening, model.closing)

    # of a division

    def _pipeline(self, layout: Layout, order: str, more: Array | float = 0.0) -> Array:
        """The least end of the pipeline's part of a step. `more`: [case, kind of part] seconds by which each takes longer."""
        each, divided = self.seconds(layout, order), self.fitting.divided(layout)
        send = self.predictors[order].transfer(layout)
        forward, input_gradient, weight = each.T @ divided.passing.T
        name = layout.schedule if layout.pp > 1 else "1f1b"
        there = np.append(np.full(layout.pp - 1, send), 0.0)
        lanes = Lanes(
            (each.sum(axis=1) + more) @ divided.parts.T + (send * divided.crossings if self.blocking else 0.0),
            forward, input_gradient + (0.0 if name in ("zb", "zbv") else weight), there, there[::-1],
        )  # fmt: skip
        return least_end(name, self.predictors[ORDERS[0]].micro_batches(layout), lanes, blocking=self.blocking)

    # of a state

    def states(self, layout: Layout, order: str, kinds: Kinds, rows: list[int]) -> list[float]:
        """For some of the states, the least end of a step: after the pipeline's, what of the first stage's reductions and of
        each rank's update nothing can hide."""
        software = self.job.software
        step, divided = self._step(layout, order, kinds), self.fitting.divided(layout)
        each = self.seconds(layout, order)
        _, back, weight = divided.passing[0] @ each
        early = software.overlap_gradients * (back + weight) * (1 - 1 / divided.passing[0].sum())
        exposed = np.maximum((step.early + step.late) @ divided.first - early, step.late @ divided.first)
        if layout.pp > 1 and layout.schedule in ("zb", "zbv"):  # the first rank need not be the last to end
            exposed = np.zeros_like(exposed)
        update = cost.optimizer_seconds(10**9, self.job.machine, software, on_host=layout.offload == "optimizer") / 1e9
        after = step.owned @ divided.units.T * update
        gathered, beside = step.gather @ divided.units.T, divided.parts @ each[:, 0]
        after += cost.exposed(gathered, beside, software.overlap_parameters, software.contention, np.minimum)
        deferred = any(kinds[row][0] > 1 for row in rows)
        found = self._pipeline(layout, order, self._more(layout, order, kinds)[rows] if deferred else 0.0)
        return self.whole((found + exposed[rows] + after[rows].max(axis=1)) * SURE).tolist()

    def _step(self, layout: Layout, order: str, kinds: Kinds) -> Step:
        key = (layout.tp, layout.cp, layout.dp, layout.pp, layout.ep, layout.etp, layout.offload, order, kinds)
        if key not in self._steps:
            early, late, gather = np.zeros((3, len(kinds), len(self.fitting.units)))
            for zero, elements, shards, replicas, strides in self._buffers(layout, order, kinds):
                for call in traffic.step_calls(zero, shards, replicas, -(-elements // shards), self.job.software):
                    ranks, stride = (shards, strides[0]) if call.shards else (replicas, strides[1])
                    seconds = self._calls(call.operation, ranks, stride, call.bytes) * call.made
                    table = gather if call.phase == "step" else early if call.hides else late
                    table += seconds
            self._steps[key] = Step(self.fitting.owned(layout, kinds), early, late, gather)
        return self._steps[key]

    def _buffers(self, layout: Layout, order: str, kinds: Kinds) -> Any:
        """Of a unit's two flat buffers: zero, elements by unit, ranks that share it and that have the same, and the strides of
        both, by state."""
        held = [units.held(self.spec, layout, unit) for unit in self.fitting.units]
        strides, (zero, dense, experts) = self.predictors[order].strides(layout), self.fitting.shards(layout, kinds)
        shared = np.array(
            [msgspec.structs.replace(layout, zero=one, dp_shard=shard).shard_ranks for one, shard in kinds]
        )
        shard = np.full_like(dense, strides["dp"])
        replicas = units.data_ranks(layout) // dense
        yield zero, np.array([one.longest for one in held]), dense, replicas, (shard, shard * shared[:, None])
        if self.spec.experts:
            edp = np.full_like(dense, strides["edp"])
            yield zero, np.array([one.experts for one in held]), experts, layout.expert_data // experts, (edp, edp)

    def _calls(self, operation: str, ranks: NDArray[np.int64], strides: NDArray[np.int64], size: Array) -> Array:
        """Seconds of calls of `size` bytes [state, unit], by ranks and strides of each state; of no bytes, none."""
        wire = self.predictors[ORDERS[0]].wire
        found = [wire(operation, *pair) for pair in zip(ranks[:, 0].tolist(), strides[:, 0].tolist(), strict=True)]
        return Wire(*np.array(found).T[:, :, None]).seconds(size) * (size > 0)

    def _more(self, layout: Layout, order: str, kinds: Kinds) -> Array:
        """[state, kind of part]: seconds by which what every micro-batch gathers and reduces delays it (zero 2 and 3)."""
        software, parts = self.job.software, self.fitting.kinds
        more = np.zeros((len(kinds), len(parts)))
        key = (layout.tp, layout.cp, layout.dp, layout.pp, layout.ep, layout.etp, order, kinds)
        if key not in self._each:
            self._each[key] = self._each_micro_batch(layout, order, kinds)
        priced = [
            self.predictors[order].part(msgspec.structs.replace(layout, zero=0, dp_shard=0), part) for part in parts
        ]
        phases = [self.predictors[order].computed(layout, part).phases for part in parts]
        for phase, operation, seconds in self._each[key]:
            beside, share = np.array([one[phase] for one in phases]), cost.overlap("shard", operation, software)
            more += cost.exposed(seconds, beside, share, software.contention, np.minimum)
        idle = np.array([one.terms.get("launch", 0.0) for one in priced])  # the host's lead may hide it
        return np.maximum(0.0, more - idle)

    def _each_micro_batch(self, layout: Layout, order: str, kinds: Kinds) -> list[tuple[str, str, Array]]:
        """What `_more` adds, before anything hides it: phase, operation, seconds by state and kind of part."""
        software, parts, found = self.job.software, self.fitting.kinds, list[tuple[str, str, Array]]()
        places = [self.fitting.units.index(self.fitting.unit_of(part)) for part in parts]
        again = np.array([traffic.gathers_again(part, software) for part in parts])
        reduced = np.array([part != "head" or not self.spec.tied for part in parts])
        for zero, elements, shards, _, strides in self._buffers(layout, order, kinds):
            whole = -(-elements[places] // shards) * shards
            gather = self._calls("all-gather", shards, strides[0], whole * software.gather_bytes)
            gather *= (zero == 3) & (shards > 1)
            reduce = self._calls("reduce-scatter", shards, strides[0], whole * software.reduce_bytes)
            reduce *= (zero >= 2) & (shards > 1) & reduced
            found += [("forward", "all-gather", gather), ("input", "all-gather", gather * again)]
            found.append(("weight", "reduce-scatter", reduce))
        return found
