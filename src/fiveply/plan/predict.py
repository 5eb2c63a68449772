"""One layout predicted: counts (`workload`, `traffic`) priced (`cost`), run through the schedule (`simulate`), with its bytes.

The one composition of the planner's layers: search, score and `fiveply plan` all ask here. A `Predictor` prices parts of a
kind once for all layouts that split them alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from statistics import NormalDist

import msgspec

from fiveply.pipeline_schedule import Schedule, build
from fiveply.plan import cost, footprint, traffic, workload
from fiveply.plan.cost import PartSeconds
from fiveply.plan.footprint import Footprint
from fiveply.plan.machine import Machine
from fiveply.plan.simulate import Simulated, StageSeconds, simulate, step_seconds
from fiveply.plan.software import Software
from fiveply.plan.traffic import Collective
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.plan import Interval

ORDERS = ("tp,cp,dp,pp", "tp,cp,pp,dp")
"""Ranks, fastest axis first: the runtime's own, and the one that keeps a pipeline's neighbours on one node."""
REDUCING = ("dp", "shard", "replica", "edp")
"""Axes over which gradients are summed and parameters gathered."""


class Job(msgspec.Struct, frozen=True):
    """All but the layout. `global_batch` in rows of `sequence` tokens; `order` one of ORDERS."""

    spec: ModelSpec
    machine: Machine
    software: Software
    sequence: int
    global_batch: int
    precision: str = "bf16"
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


class Stage(msgspec.Struct, frozen=True):
    """One stage's seconds, and what those of one micro-batch consist of."""

    seconds: StageSeconds
    terms: dict[str, float]


def predict(job: Job, layout: Layout) -> Prediction:
    """Raises InputError for a layout that is not legal for the model and the batch (whether the runtime has it or not)."""
    layout = resolve(layout, job.spec, sequence=job.sequence, global_batch=job.global_batch, runtime=False)
    return Predictor(job).predict(layout)


class Predictor:
    """Predicts resolved layouts of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.kinds = workload.kinds(job.spec)
        self._parts: dict[Hashable, PartSeconds] = {}

    def predict(self, layout: Layout) -> Prediction:
        job, micro_batches = self.job, self.micro_batches(layout)
        stages = self.stages(layout)
        seconds, terms = self._step(layout, stages)
        footprints = footprint.by_rank(
            job.spec, layout, sequence=job.sequence, global_batch=layout.dp * layout.micro_batch * micro_batches,
            software=job.software, precision=job.precision,
        )  # fmt: skip
        interval = Interval(*cost.interval(seconds, job.machine, job.software))
        worst = max(found.peak for found in footprints)
        return Prediction(
            layout, interval, terms, footprints, tuple(stage.seconds for stage in stages), self.p_oom(worst)
        )

    def micro_batches(self, layout: Layout) -> int:
        return self.job.global_batch // layout.dp // layout.micro_batch

    def p_oom(self, peak: int) -> float:
        """That allocated bytes, log-normal around `peak`, and what lies outside tensors exceed a device's memory."""
        bias, deviation = cost.memory_error(self.job.machine, self.job.software)
        room = self.job.machine.memory_bytes - self.job.software.context_bytes
        return 1.0 if room <= 0 else 1 - NormalDist(bias, deviation).cdf(math.log(room / peak))

    def schedule(self, layout: Layout) -> Schedule:
        """Compute and transfers as the runtime executes them; what is gathered and reduced for every micro-batch is part of
        its computation here, what is reduced once stands at the end of each chunk's last gradient."""
        return build(layout.schedule, layout.pp, self.micro_batches(layout), layout.chunks)

    def simulate(self, layout: Layout) -> Simulated:
        """Every event of the step."""
        return simulate(
            self.schedule(layout), [stage.seconds for stage in self.stages(layout)], blocking=self._blocking
        )

    def seconds(self, layout: Layout) -> float:
        """The step's middle estimate, without terms and bytes."""
        stages = self.stages(layout)
        step = self._simulated(layout, [stage.seconds for stage in stages])
        step += max(sum(self.after(layout, rank).values()) for rank in range(layout.pp))
        return step + cost.residual(step, self.job.machine, self.job.software, layout)

    # stages

    def part(self, layout: Layout, part: str) -> PartSeconds:
        """Seconds of one micro-batch of a part."""
        key = (
            self.kinds[part], layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.ep, layout.etp,
            layout.micro_batch, layout.recompute, layout.offload, *self.strides(layout).values(),
        )  # fmt: skip
        found = self._parts.get(key)
        if found is None:
            job = self.job
            how = {"sequence": job.sequence, "software": job.software, "precision": job.precision}
            found = self._parts[key] = cost.part_seconds(
                workload.work(job.spec, layout, part, **how), traffic.part_traffic(job.spec, layout, part, **how),
                job.machine, job.software, job.precision, self.strides(layout),
            )  # fmt: skip
        return found

    def stages(self, layout: Layout) -> list[Stage]:
        """By global stage."""
        found: list[Stage | None] = [None] * layout.stage_count
        for rank in range(layout.pp):
            calls = self._step_traffic(layout, rank)
            for chunk in range(layout.chunks):
                stage = layout.stage_of(rank, chunk)
                found[stage] = self._stage(layout, stage, calls)
        return [stage for stage in found if stage is not None]

    def _stage(self, layout: Layout, stage: int, calls: tuple[Collective, ...]) -> Stage:
        job = self.job
        parts = workload.parts(job.spec, layout.stages, stage)
        priced = [self.part(layout, part) for part in parts]
        forward, back, weight = (math.fsum(getattr(one, key) for one in priced) for key in ("forward", "input", "weight"))
        terms: dict[str, float] = defaultdict(float)
        for one in priced:
            for name, seconds in one.terms.items():
                terms[name] += seconds
        reductions = [call for call in calls if call.part in parts and call.axis in REDUCING and call.phase != "step"]
        reduce = sum(self.call(call, layout) * call.count for call in reductions)
        tail = max((self.call(call, layout) for call in reductions if call.part == parts[0]), default=0.0)
        share = job.software.overlap_gradients
        send, send_back = self._transfers(layout, stage)
        seconds = StageSeconds(
            forward, back, weight, send, send_back, reduce=reduce,
            reduce_early=share * (back + weight) * (1 - 1 / len(parts)), reduce_tail=tail,
        )  # fmt: skip
        return Stage(seconds, dict(terms))

    def _transfers(self, layout: Layout, stage: int) -> tuple[float, float]:
        """Seconds until the next stage has this one's output, and the previous one its gradient."""
        if layout.pp == 1:
            return 0.0, 0.0
        job = self.job
        size = traffic.handed_on(job.spec, layout, sequence=job.sequence, precision=job.precision)
        seconds = cost.call_seconds("send", size, 2, job.machine, self.strides(layout)["pp"])
        return seconds, seconds

    def _step_traffic(self, layout: Layout, rank: int) -> tuple[Collective, ...]:
        return traffic.step_traffic(self.job.spec, layout, pp_rank=rank, software=self.job.software)

    def strides(self, layout: Layout) -> Mapping[str, int]:
        """Ranks between neighbours on each axis."""
        inner = layout.tp * layout.cp
        pp, dp = (inner, inner * layout.pp) if self.job.order == ORDERS[1] else (inner * layout.dp, inner)
        etp = layout.expert_tensor
        # Expert ranks run over tensor, context and then data ranks: under the other order the last of these lie far apart.
        ep = dp if layout.ep * etp > inner and self.job.order == ORDERS[1] else etp
        return {
            "tp": 1, "kv": 1, "etp": 1, "cp": layout.tp, "ep": ep, "dp": dp, "shard": dp,
            "replica": dp * layout.shard_ranks, "edp": max(dp, etp * layout.ep), "pp": pp, "tied": pp,
            "world": 1, "model": 1,
        }  # fmt: skip

    def call(self, collective: Collective, layout: Layout) -> float:
        """Seconds of one call."""
        return cost.collective_seconds(collective, self.job.machine, self.strides(layout)[collective.axis])

    # the step

    @property
    def _blocking(self) -> bool:
        return self.job.software.overlap_pipeline < 0.5

    def _simulated(self, layout: Layout, stages: list[StageSeconds]) -> float:
        return step_seconds(
            layout.schedule, layout.pp, layout.chunks, self.micro_batches(layout), stages, blocking=self._blocking
        )

    def after(self, layout: Layout, rank: int) -> dict[str, float]:
        """Terms of what a pipeline rank does once its gradients are reduced: sums, the optimiser, gathering its result."""
        job, software = self.job, self.job.software
        parts = [
            part
            for chunk in range(layout.chunks)
            for part in workload.parts(job.spec, layout.stages, layout.stage_of(rank, chunk))
        ]
        state = footprint.state(job.spec, layout, parts, software=software)
        owned = state.optimizer / software.optimizer_bytes
        terms: dict[str, float] = {"optimizer": cost.optimizer_seconds(int(owned), job.machine, software)}
        gathered = largest = sums = 0.0
        for call in self._step_traffic(layout, rank):
            if call.phase != "step":
                continue
            seconds = self.call(call, layout)
            if call.axis in REDUCING and call.operation == "all-gather":
                gathered += seconds * call.count
                largest = max(largest, seconds)
            elif call.axis in REDUCING:
                terms["dp"] = terms.get("dp", 0.0) + seconds * call.count
            else:
                sums += seconds * call.count
        terms["sums"] = sums
        if gathered:
            beside = sum(self.part(layout, part).forward for part in parts)
            terms["dp"] = terms.get("dp", 0.0) + max(
                largest, _exposed(gathered, beside, software.overlap_parameters, software.contention)
            )
        return terms

    def _step(self, layout: Layout, stages: list[Stage]) -> tuple[float, dict[str, float]]:
        """The middle estimate and its terms."""
        job, count = self.job, self.micro_batches(layout)
        seconds = [stage.seconds for stage in stages]
        ends = self._simulated(layout, seconds)
        still = [msgspec.structs.replace(stage, send=0.0, send_back=0.0) for stage in seconds]
        alone = [
            msgspec.structs.replace(stage, reduce=0.0, reduce_early=0.0, reduce_tail=0.0) for stage in still
        ]
        without_sends = self._simulated(layout, still) if layout.pp > 1 else ends
        without_any = self._simulated(layout, alone)

        def busy(rank: int) -> float:
            return sum(seconds[layout.stage_of(rank, chunk)].busy for chunk in range(layout.chunks))

        critical = max(range(layout.pp), key=busy)
        terms: dict[str, float] = defaultdict(float)
        for chunk in range(layout.chunks):
            for name, value in stages[layout.stage_of(critical, chunk)].terms.items():
                terms[name] += count * value
        terms["bubble"] += without_any - count * busy(critical)
        terms["transfers"] += ends - without_sends
        terms["dp"] += without_sends - without_any
        afters = [self.after(layout, rank) for rank in range(layout.pp)]
        for name, value in afters[critical].items():
            terms[name] += value
        waited = max(sum(after.values()) for after in afters)
        terms["bubble"] += waited - sum(afters[critical].values())
        step = ends + waited
        terms["residual"] += cost.residual(step, job.machine, job.software, layout)
        return step + terms["residual"], {name: value for name, value in terms.items() if value}


def _exposed(seconds: float, beside: float, share: float, contention: float) -> float:
    """What of a collective is not hidden by `beside` seconds of computation, with what it slows that down by."""
    hidden = min(seconds * share, beside / contention)
    return seconds - hidden + hidden * (contention - 1)
