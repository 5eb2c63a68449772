"""One layout predicted: counts (`workload`, `traffic`) priced (`cost`), run through the schedule (`simulate`), with its bytes.

The one composition of the planner's layers: search, score and `fiveply plan` all ask here. A `Predictor` prices parts of a
kind once for all layouts that split them alike.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from statistics import NormalDist

import msgspec

from fiveply.plan import cost, footprint, traffic, workload
from fiveply.plan.cost import Computed, Wire
from fiveply.plan.footprint import Footprint
from fiveply.plan.machine import Machine
from fiveply.plan.parts import Case
from fiveply.plan.simulate import Ends, StageSeconds, ends
from fiveply.plan.traffic import Collective
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.plan import Interval

ORDERS = ("tp,cp,dp,pp", "tp,cp,pp,dp")
"""Ranks, fastest axis first: the runtime's own, and the one that keeps a pipeline's neighbours on one node."""
SPLIT = operator.attrgetter("tp", "sp", "cp", "cp_kind", "ep", "etp", "micro_batch", "recompute", "offload")
SHARED = operator.attrgetter("pp", "dp", "zero", "dp_shard")
"""Of a layout, all that a part's seconds depend on: how a micro-batch is computed, and what of it is gathered and reduced each time."""
WALKED = 8
"""Pipeline ranks up to which each one's memory is walked."""
REDUCING = ("dp", "shard", "replica", "edp")
"""Axes over which gradients are summed and parameters gathered."""


class Job(Case, frozen=True, kw_only=True):
    """All but the layout. `global_batch` in rows of `sequence` tokens; `order` one of ORDERS."""

    machine: Machine
    global_batch: int
    order: str = ORDERS[0]


class Prediction(msgspec.Struct, frozen=True):
    """`layout` is resolved. `terms`: seconds by name, of the rank that computes longest; they add up to `seconds.p50`."""

    layout: Layout
    seconds: Interval
    terms: dict[str, float]
    footprints: tuple[Footprint, ...]
    """By pipeline rank: its worst member's."""
    stages: tuple[StageSeconds, ...]
    p_oom: float
    """Probability that the worst rank needs more than a device has."""

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        return tuple(footprint.peak for footprint in self.footprints)


class Rank(msgspec.Struct, frozen=True):
    """A pipeline rank: its stages by chunk, and the terms of what it does once gradients are reduced."""

    stages: tuple[StageSeconds, ...]
    after: dict[str, float]

    @property
    def busy(self) -> float:
        """Seconds of computing one micro-batch."""
        return sum(stage.busy for stage in self.stages)


def predict(job: Job, layout: Layout) -> Prediction:
    """Raises InputError for a layout that is not legal for the model and the batch (whether the runtime has it or not)."""
    layout = resolve(layout, job.spec, sequence=job.sequence, global_batch=job.global_batch, runtime=False)
    return Predictor(job).predict(layout)


class Predictor:
    """Predicts resolved layouts of one job. Remembers prices by what they depend on, not by layout."""

    def __init__(self, job: Job) -> None:
        self.job = msgspec.structs.replace(job, machine=cost.used_by(job.software, job.machine))
        self._kind_of = workload.kinds(job.spec)
        self._parts: dict[Hashable, StageSeconds] = {}
        self._computed: dict[Hashable, Computed] = {}
        self._pieces: dict[Hashable, Computed] = {}
        self._operations: dict[Hashable, float] = {}
        self.wire: Callable[..., Wire] = functools.cache(functools.partial(cost.wire, machine=self.job.machine))
        self._ranks: dict[Hashable, Rank] = {}
        self._ends: dict[Layout, Ends] = {}

    def ordered(self, order: str) -> Predictor:
        """Of the same job with another order of ranks; what computation takes is remembered in common."""
        other = copy.copy(self)
        other.job = msgspec.structs.replace(self.job, order=order)
        other._parts, other._ranks, other._ends = {}, {}, {}
        return other

    def predict(self, layout: Layout) -> Prediction:
        job = self.job
        ranks = self.ranks(layout)
        seconds, terms = self._step(layout, ranks)
        interval = cost.interval(seconds, job.machine, job.software, job.precision, job.spec.experts is not None)
        footprints = self.footprints(layout)
        return Prediction(
            layout, interval, terms, footprints,
            tuple(self.stages(layout)), self.p_oom(max(found.peak for found in footprints)),
        )  # fmt: skip

    def seconds(self, layout: Layout) -> float:
        """The step's middle estimate, without terms and bytes."""
        step = self._simulated(layout, self.stages(layout))
        step += max(sum(rank.after.values()) for rank in self.ranks(layout))
        return step + cost.residual(step, self.job.machine, self.job.software, layout)

    def micro_batches(self, layout: Layout) -> int:
        return self.job.global_batch // layout.dp // layout.micro_batch

    def p_oom(self, peak: int) -> float:
        """That allocated bytes, log-normal around `peak`, exceed a device's memory."""
        machine, software = self.job.machine, self.job.software
        return 1 - NormalDist(sigma=software.memory_spread).cdf(math.log(machine.memory_bytes / peak))

    def footprints(self, layout: Layout) -> tuple[Footprint, ...]:
        """By pipeline rank. Of many, some between the ends are walked, and others take the larger of the walked beside them:
        among ranks that hold alike, bytes rise or fall with the rank."""
        if layout.pp <= WALKED:
            return tuple(self.footprint(layout, rank) for rank in range(layout.pp))
        ends = {0, 1, layout.pp - 2, layout.pp - 1}
        chosen = sorted(ends | {round(i * (layout.pp - 1) / (WALKED - 1)) for i in range(WALKED)})
        walked = {rank: self.footprint(layout, rank) for rank in chosen}
        return tuple(
            walked.get(rank) or max(
                walked[max(one for one in chosen if one < rank)], walked[min(one for one in chosen if one > rank)],
                key=lambda one: one.peak,
            )
            for rank in range(layout.pp)
        )  # fmt: skip

    def footprint(self, layout: Layout, rank: int) -> Footprint:
        """Of a pipeline rank. Beyond a few rounds the number of micro-batches does not matter, but for GPipe."""
        micro_batches = self.micro_batches(layout)
        if layout.schedule != "gpipe" and micro_batches > 3 * layout.pp:
            micro_batches = 2 * layout.pp + micro_batches % layout.pp
        return footprint.footprint(self.job, layout, micro_batches, rank)

    # parts, stages, ranks

    def part(self, layout: Layout, part: str) -> StageSeconds:
        """Seconds of one micro-batch of a part."""
        key = self._part_key(layout, part)
        found = self._parts.get(key)
        if found is None:
            job = self.job
            strides = self.strides(layout)
            calls = traffic.part_traffic(job, layout, part)
            priced = [(one, self._seconds(one, strides[one.axis])) for one in calls]
            found = self._parts[key] = cost.exchanged(
                self.computed(layout, part), priced, job.machine, job.software, layout.offload == "activations"
            )
        return found

    def computed(self, layout: Layout, part: str) -> Computed:
        """The same without collectives."""
        key = self._work_key(layout, part)
        if key not in self._computed:
            job, found = self.job, list[Computed]()
            for name, work in workload.pieces(job, layout, part):
                piece = self._kind_of[part], name
                if piece not in self._pieces:
                    self._pieces[piece] = cost.computed(
                        work, job.machine, job.software, job.precision, self._operations
                    )
                found.append(self._pieces[piece])
            self._computed[key] = functools.reduce(operator.add, found)
        return self._computed[key]

    def _work_key(self, layout: Layout, part: str) -> tuple[Hashable, ...]:
        """All that a part's computation depends on."""
        key = (self._kind_of[part], layout.tp, layout.sp, layout.cp, layout.micro_batch)
        return (*key, layout.cp_kind, layout.recompute, layout.ep, layout.etp) if part.startswith("layers") else key

    def _part_key(self, layout: Layout, part: str) -> Hashable:
        """All that a part's seconds depend on."""
        stride = self._expert_stride(layout) if layout.ep > 1 else 0
        key = (*self._work_key(layout, part), stride, layout.offload == "activations")
        return (*key, *SHARED(layout)) if layout.zero > 1 else key

    def stages(self, layout: Layout) -> list[StageSeconds]:
        """By global stage."""
        found = {
            layout.stage_of(number, chunk): stage
            for number, rank in enumerate(self.ranks(layout))
            for chunk, stage in enumerate(rank.stages)
        }
        return [found[stage] for stage in range(layout.stage_count)]

    def ranks(self, layout: Layout) -> list[Rank]:
        """By pipeline rank; those that hold parts of the same kinds are priced once."""
        common = SPLIT(layout), SHARED(layout)
        found: list[Rank] = []
        for number in range(layout.pp):
            held = [
                workload.parts(self.job.spec, layout.stages, layout.stage_of(number, chunk))
                for chunk in range(layout.chunks)
            ]
            key = (*common, *(tuple(self._kind_of[part] for part in parts) for parts in held))
            if key not in self._ranks:
                self._ranks[key] = self._rank(layout, number, held)
            found.append(self._ranks[key])
        return found

    def _rank(self, layout: Layout, number: int, held: list[list[str]]) -> Rank:
        calls = traffic.step_traffic(self.job, layout, number)
        stages = tuple(self._stage(layout, parts, calls) for parts in held)
        return Rank(stages, self._after(layout, number, held, calls))

    def _stage(self, layout: Layout, parts: list[str], calls: tuple[Collective, ...]) -> StageSeconds:
        priced = [self.part(layout, part) for part in parts]
        forward, back, weight = (
            math.fsum(getattr(one, key) for one in priced) for key in ("forward", "input", "weight")
        )
        terms = cost.summed(one.terms for one in priced)
        action = self.job.machine.action
        forward, back = forward + action, back + action
        if action:
            terms["launch"] += 2 * action
        reduce = tail = 0.0
        for call in calls:
            if call.part in parts and call.axis in REDUCING and call.phase != "step":
                once = (self.call(call, layout) + cost.copied_seconds(call, self.job.machine, each=False)) * call.count
                reduce += once
                if not call.hides or call.part == parts[0]:
                    tail += once
        early = self.job.software.overlap_gradients * (back + weight) * (1 - 1 / len(parts))
        send = self.transfer(layout)
        return StageSeconds(forward, back, weight, send, send, reduce, early, tail, terms)

    def transfer(self, layout: Layout) -> float:
        """Seconds until the neighbouring stage has what this one hands on."""
        if layout.pp == 1:
            return 0.0
        job = self.job
        size = traffic.handed_on(job, layout)
        if job.software.scatter_transfers and not layout.sequence_parallel:  # each tensor rank sends a part
            size //= layout.tp
        return cost.call_seconds("send", size, 2, job.machine, self.strides(layout)["pp"])

    def _after(
        self, layout: Layout, number: int, held: list[list[str]], calls: tuple[Collective, ...]
    ) -> dict[str, float]:
        """Sums, the optimiser, and gathering what it updated, as far as the next forward does not hide that."""
        job, software = self.job, self.job.software
        here, held_units = msgspec.structs.replace(layout, offload="none"), traffic.held_units(job.spec, layout, number)
        state = footprint.state(job, here, held_units)
        owned = round(state.optimizer / software.optimizer_bytes)
        on_host = layout.offload == "optimizer"
        update = cost.optimizer_seconds(owned, job.machine, software, on_host=on_host)
        terms = {"offload" if on_host else "optimizer": update, "sums": cost.sums_seconds(state.gradients, job.machine)}
        gathered = largest = reduced = 0.0
        for call in calls:
            if call.phase == "step":
                seconds = self.call(call, layout)
                if call.axis not in REDUCING:
                    terms["sums"] += seconds * call.count
                elif call.operation == "all-gather":
                    gathered, largest = gathered + seconds * call.count, max(largest, seconds)
                else:
                    reduced += seconds * call.count
        beside = sum(self.part(layout, part).forward for parts in held for part in parts)
        exposed = cost.exposed(gathered, beside, software.overlap_parameters, software.contention)
        terms["dp"] = reduced + (max(largest, exposed) if gathered else 0.0)
        return terms

    def strides(self, layout: Layout) -> Mapping[str, int]:
        """Ranks between neighbours on each axis."""
        inner, etp = layout.tp * layout.cp, layout.expert_tensor
        pp, dp = (inner, inner * layout.pp) if self.job.order == ORDERS[1] else (inner * layout.dp, inner)
        ep = self._expert_stride(layout)
        return {
            "tp": 1, "kv": 1, "etp": 1, "cp": layout.tp, "ep": ep, "dp": dp, "shard": dp,
            "replica": dp * layout.shard_ranks, "edp": max(dp, etp * layout.ep), "pp": pp, "tied": pp,
            "world": 1,
        }  # fmt: skip

    def _expert_stride(self, layout: Layout) -> int:
        """Expert ranks run over tensor, context and then data ranks, which lie far apart where pipelines stand between."""
        inner, etp = layout.tp * layout.cp, layout.expert_tensor
        return inner * layout.pp if layout.ep * etp > inner and self.job.order == ORDERS[1] else etp

    def call(self, collective: Collective, layout: Layout) -> float:
        """Seconds of one call."""
        return self._seconds(collective, self.strides(layout)[collective.axis])

    def _seconds(self, one: Collective, stride: int) -> float:
        return self.wire(one.operation, one.size, stride, copies=one.copies).seconds(one.bytes) if one.size > 1 else 0.0

    # the step

    @property
    def blocking(self) -> bool:
        return self.job.software.overlap_pipeline < 0.5

    def _simulated(self, layout: Layout, stages: list[StageSeconds]) -> float:
        """The end of the step's last reduction. Replicas that share a step's reductions alone share its pipeline."""
        plain = layout if layout.zero > 1 else msgspec.structs.replace(layout, zero=0, dp_shard=0)
        if plain not in self._ends:
            self._ends[plain] = self._pipeline(layout, stages)
        return self._ends[plain].seconds(stages)

    def _pipeline(self, layout: Layout, stages: list[StageSeconds]) -> Ends:
        count = self.micro_batches(layout)
        return ends(layout.schedule, layout.pp, layout.chunks, count, stages, blocking=self.blocking)

    def _step(self, layout: Layout, ranks: list[Rank]) -> tuple[float, dict[str, float]]:
        """The middle estimate and its terms: of the rank that computes longest, and what it waits for."""
        count = self.micro_batches(layout)
        seconds = self.stages(layout)
        still = [msgspec.structs.replace(stage, send=0.0, send_back=0.0) for stage in seconds]
        ended = self._simulated(layout, seconds)
        alone = self._pipeline(layout, still)
        without_sends, without_any = alone.seconds(still), float(alone.ranks.max())
        critical = max(ranks, key=lambda rank: rank.busy)
        terms: dict[str, float] = defaultdict(float)
        for stage in critical.stages:
            for name, value in stage.terms.items():
                terms[name] += count * value
        terms["bubble"] += without_any - count * critical.busy
        terms["transfers"] += ended - without_sends
        terms["dp"] += without_sends - without_any
        for name, value in critical.after.items():
            terms[name] += value
        waited = max(sum(rank.after.values()) for rank in ranks)
        terms["bubble"] += waited - sum(critical.after.values())
        step = ended + waited
        terms["residual"] += cost.residual(step, self.job.machine, self.job.software, layout)
        return step + terms["residual"], {name: value for name, value in terms.items() if value}
