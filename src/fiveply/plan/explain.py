"""A plan and its reasons: the ranked layouts, where their seconds go, why not another, what would help.

Values only; `report/plan_text.py` and `report/plan_page.py` draw them.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, Literal

import msgspec

from fiveply.plan import cost, footprint, workload
from fiveply.plan.machine import Machine
from fiveply.plan.predict import ORDERS, Job, Prediction, Predictor
from fiveply.plan.search import BUDGET, Search, Searched
from fiveply.plan.software import Software
from fiveply.plan.space import Limits
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, divisors
from fiveply.spec.legality import resolve
from fiveply.spec.plan import Interval, Plan, Predicted

Objective = Literal["time", "cost", "devices"]
BYTES = {"fp64": (8, 8, 8), "fp32": (4, 4, 4), "tf32": (4, 4, 4)}
"""Of parameters, reduced gradients and what the optimiser updates, where a precision is not mixed."""
USEFUL = ("products", "attention", "experts")
"""Terms that compute what the model needs; all others are lost."""
TERMS = {
    "elementwise": "norms, activations, copies", "recompute": "recomputation", "launch": "kernel launches",
    "tp": "tensor collectives", "cp": "context collectives", "ep": "expert collectives",
    "zero": "gathering and reducing shards", "bubble": "pipeline bubble", "transfers": "pipeline transfers",
    "dp": "gradient reduction", "optimizer": "optimiser", "sums": "sums of the step", "offload": "traffic with the host",
    "residual": "what no term explains",
}  # fmt: skip
"""What each lost term is, in words."""


SHARES = {
    "compute": (*USEFUL, "elementwise", "recompute", "launch"),
    "communication": ("tp", "cp", "ep", "zero", "dp", "transfers", "offload"),
    "bubble": ("bubble",),
    "optimizer": ("optimizer",),
    "rest": ("sums", "residual"),
}
"""Terms by the share of a recorded step (`timeline.SHARES`) that they are measured as; reading data counts as rest."""


class Ranked(msgspec.Struct, frozen=True):
    """One layout of the table. `capacity`: bytes of a device. `mfu`: of all devices' peak. `refusal`: "" or why the runtime
    can't run it yet."""

    prediction: Prediction
    order: str
    world: int
    capacity: int
    tokens_per_second_per_device: float
    mfu: float
    bound_by: str
    refusal: str
    ideal: float
    """Seconds of the model's own operations at the devices' peak."""

    @property
    def worst(self) -> int:
        return max(self.prediction.memory_bytes)

    @property
    def waterfall(self) -> list[tuple[str, float]]:
        """From the ideal to the prediction: (name, seconds), adding up to `seconds.p50`."""
        terms = self.prediction.terms
        useful = sum(terms.get(name, 0.0) for name in USEFUL)
        lost = sorted(((name, terms[name]) for name in TERMS if terms.get(name)), key=lambda item: -item[1])
        return [("ideal", self.ideal), ("below peak", useful - self.ideal), *lost]


class Answer(msgspec.Struct, frozen=True):
    """What `fiveply plan` says. `search`: what the first layout was found by; `seconds`: of all searches."""

    search: Search
    cluster: ClusterSpec
    ranked: tuple[Ranked, ...]
    searched: Searched
    seconds: float

    @property
    def job(self) -> Job:
        return self.search.job

    @property
    def proof(self) -> str:
        gap = self.searched.gap
        return "proven best" if gap == 0 else f"at most {gap:.1%} above what was pruned"


def software(precision: str) -> Software:
    """fiveply's own runtime at `precision`, as `train` sets its types."""
    return footprint.runtime(*BYTES.get(precision, (2, 4, 4)))


def job_of(
    spec: ModelSpec, cluster: ClusterSpec, world: int, *, sequence: int, global_batch: int, precision: str,
    system: Software | None = None,
) -> Job:  # fmt: skip
    """The job on `world` of the cluster's devices."""
    habits = system or software(precision)
    if is_cpu(cluster):  # the cores that compute are those that move bytes
        habits = msgspec.structs.replace(habits, overlap_gradients=0.0, overlap_parameters=0.0)
    if cluster.step_seconds:
        habits = msgspec.structs.replace(habits, step_seconds=cluster.step_seconds)
    return Job(spec, sequence, habits, precision, machine=machine_of(cluster, world), global_batch=global_batch)


def machine_of(cluster: ClusterSpec, world: int) -> Machine:
    """The devices as `world` ranks find them. Where devices are cores, ranks share them out: more cores each where there are
    fewer ranks, a part of one where there are more; as measured for that many ranks, if that was measured."""
    if not is_cpu(cluster):
        return cost.machine(cluster)
    if str(world) in cluster.shared:
        return cost.machine(
            msgspec.structs.replace(cluster, measured=cluster.measured | cluster.shared[str(world)], memory_bytes=0)
        )
    threads = max(1.0, cluster.count // world) if world <= cluster.count else cluster.count / world
    return cost.machine(cluster).with_threads(threads)


def is_cpu(cluster: ClusterSpec) -> bool:
    return cluster.device.startswith("cpu")


def answer(
    spec: ModelSpec, cluster: ClusterSpec, *, sequence: int, global_batch: int, precision: str = "bf16",
    objective: Objective = "time", limits: Limits | None = None, system: Software | None = None, wanted: int = 10,
    worlds: list[int] | None = None,
) -> Answer:  # fmt: skip
    """Plan, for numbers of devices `worlds` (by default those that the objective considers). Raises InputError where nothing
    is legal, or nothing fits (with how many devices would do)."""
    began = time.perf_counter()
    limits = limits or Limits()
    found: list[tuple[Ranked, Search]] = []
    searched: list[Searched] = []
    search = None
    for allowed, world in itertools.product(_limits(limits), worlds or _worlds(cluster, objective)):
        if found and (objective == "devices" or allowed is not limits):
            break
        job = job_of(
            spec, cluster, world, sequence=sequence, global_batch=global_batch, precision=precision, system=system
        )
        search = Search(job, world)
        one = search.run(allowed, wanted=wanted)
        searched.append(one)
        found += [(rank(search.predictors[choice.order], choice.layout), search) for choice in one.choices]
    assert search is not None
    if not found:
        raise _nothing(spec, cluster, search.job, limits, searched)
    found.sort(key=lambda one: _rank_by(objective, one[0]))
    total = Searched(
        (), sum(one.legal for one in searched), sum(one.fit for one in searched), sum(one.priced for one in searched),
        max(one.gap for one in searched),
    )  # fmt: skip
    ranked = tuple(one for one, _ in found[:wanted])
    return Answer(found[0][1], cluster, ranked, total, time.perf_counter() - began)


def _limits(limits: Limits) -> list[Limits]:
    """First as given; where nothing fits so, with the optimiser or with activations on the host."""
    kinds = [
        kind
        for kind in ("optimizer", "activations")
        if "offload" not in limits.fixed and limits.allows("offload", kind)
    ]
    return [limits, *(msgspec.structs.replace(limits, fixed=limits.fixed | {"offload": kind}) for kind in kinds)]


def _rank_by(objective: Objective, one: Ranked) -> tuple[float, float]:
    """What is least for the best layout."""
    seconds = one.prediction.seconds.p50
    return {"time": (seconds, 0.0), "cost": (seconds * one.world, seconds), "devices": (float(one.world), seconds)}[
        objective
    ]


def _worlds(cluster: ClusterSpec, objective: Objective) -> list[int]:
    """Numbers of devices to plan for: all of them, but where fewer may be cheaper, or leave each rank more cores."""
    whole = cluster.count
    if objective == "time" and not is_cpu(cluster):
        return [whole]
    return divisors(whole) if objective == "devices" else divisors(whole)[::-1]


def rank(predictor: Predictor, layout: Layout) -> Ranked:
    """Predict a resolved layout in full."""
    job, prediction = predictor.job, predictor.predict(layout)
    seconds, world = prediction.seconds.p50, layout.world
    ideal = workload.model_flops(job.spec, job.sequence) * job.global_batch / (world * job.machine.flops(job.precision))
    return Ranked(
        prediction, job.order, world, job.machine.memory_bytes, job.global_batch * job.sequence / seconds / world,
        ideal / seconds, bound_by(prediction.terms), refusal(job, layout), ideal,
    )  # fmt: skip


def bound_by(terms: dict[str, float]) -> str:
    """The largest lost term, if it is a tenth of the step; else the products."""
    name, seconds = max(((name, terms.get(name, 0.0)) for name in TERMS), key=lambda item: item[1])
    return name if seconds >= 0.1 * sum(terms.values()) else "products"


def refusal(job: Job, layout: Layout) -> str:
    """Why fiveply's runtime cannot run it yet; "" where it can."""
    if job.order != ORDERS[0]:
        return f"ranks are ordered {ORDERS[0]} by the runtime"
    try:
        resolve(layout, job.spec, sequence=job.sequence, global_batch=job.global_batch)
    except InputError as error:
        return error.problem
    return ""


def _nothing(spec: ModelSpec, cluster: ClusterSpec, job: Job, limits: Limits, searched: list[Searched]) -> InputError:
    """Why there is no plan: nothing legal, or nothing that fits."""
    if not any(one.legal for one in searched):
        return InputError(
            f"no layout of {cluster.count} devices is legal for {job.global_batch} rows of {job.sequence} tokens"
            + (" under these constraints" if limits.fixed or limits.most else ""), where="--cluster",
            fix="give a number of devices that shares factors with the batch and the model's heads, or loosen --fix and --max",
        )  # fmt: skip
    world = cluster.count
    for _ in range(8):
        world *= 2
        rows = max(job.global_batch, world)
        more = msgspec.structs.replace(job, global_batch=-(-rows // world) * world)
        if Search(more, world).run(limits, wanted=1, budget=1).choices:
            return InputError(
                f"the model does not fit on {cluster.count} of {cluster.device} in any layout", where="--cluster",
                fix=f"{world} would do",
            )  # fmt: skip
    return InputError(f"the model fits on no number of {cluster.device} up to {world}", where="--cluster",
                      fix="shorten --seq, or loosen the constraints")  # fmt: skip


# --- reasons ---


ASKED = BUDGET // 5
"""Effort of looking for the best layout that grants a wish."""


class WhyNot(msgspec.Struct, frozen=True):
    """What a wish would cost: `reason` in words; `best` the fastest layout that grants it, if any fits."""

    wish: str
    reason: str
    best: Ranked | None = None


def why(answer: Answer, wish: str, limits: Limits | None = None) -> WhyNot:
    """Why the plan is not `wish`, which is a layout's keys as `tp=2` or `tp=2,pp=4`. Raises InputError for what is none."""
    wished = Limits.parse([piece for piece in wish.split(",") if piece])
    base = limits or Limits()
    both = msgspec.structs.replace(base, fixed=base.fixed | wished.fixed)
    job, top = answer.job, answer.ranked[0]
    chosen = {key: getattr(top.prediction.layout, key) for key in wished.fixed}
    if chosen == wished.fixed:
        return WhyNot(wish, "the plan has it", top)
    found = answer.search.run(both, wanted=1, budget=ASKED)
    if found.choices:
        best = rank(answer.search.predictors[found.choices[0].order], found.choices[0].layout)
        more = best.prediction.seconds.p50 - top.prediction.seconds.p50
        if more <= 0:
            return WhyNot(wish, "it is as fast", best)
        return WhyNot(
            wish,
            f"{'at most ' if found.gap else ''}{more / top.prediction.seconds.p50:+.1%} time: "
            + ", ".join(differences(top, best)),
            best,
        )
    if found.legal:
        return WhyNot(
            wish, f"none of its {found.legal:,} layouts fits in {job.machine.memory_bytes / 2**30:.0f} GiB a device"
        )
    return WhyNot(wish, _refusal(answer, wished))


def _refusal(answer: Answer, wished: Limits) -> str:
    """The rule that forbids a wish, asked of the plan's own layout changed as little as possible."""
    top, job = answer.ranked[0].prediction.layout, answer.job
    layout = msgspec.structs.replace(top, stages=(), vp=0, micro_batch=0, dp_shard=0, **wished.fixed)
    rest = layout.tp * layout.pp * layout.cp
    if "dp" not in wished.fixed:
        layout = msgspec.structs.replace(layout, dp=max(1, answer.ranked[0].world // rest))
    try:
        resolve(layout, job.spec, sequence=job.sequence, global_batch=job.global_batch, runtime=False)
    except InputError as error:
        return f"not legal: {error.problem}"
    return f"no layout of {answer.ranked[0].world} devices has it: {layout.world} ranks with {layout}"


def differences(one: Ranked, other: Ranked) -> list[str]:
    """By which terms `other` differs from `one`, the largest first, from half a hundredth of a step on."""
    ours, theirs = dict(one.waterfall), dict(other.waterfall)
    changed = {name: theirs.get(name, 0.0) - ours.get(name, 0.0) for name in {*ours, *theirs}}
    large = sorted(changed.items(), key=lambda item: -abs(item[1]))
    whole = one.prediction.seconds.p50
    return [f"{TERMS.get(name, name)} {delta:+.2f} s" for name, delta in large if abs(delta) >= 0.005 * whole][:4]


def sensitivities(answer: Answer) -> dict[str, float]:
    """By how much of its time the best layout gets faster if a part of the machine gets twice as good, the most first."""
    top, job = answer.ranked[0], answer.job
    machine = job.machine

    def twice(link: Any) -> Any:
        return msgspec.structs.replace(link, bandwidth=2 * link.bandwidth)

    changes = {
        "twice the network": {"network": twice(machine.network)},
        "twice the links within a node": {"link": {name: twice(link) for name, link in machine.link.items()}},
        "twice the memory bandwidth": {"bandwidth": 2 * machine.bandwidth},
        "twice the peak": {"peak": {name: 2 * flops for name, flops in machine.peak.items()}},
        "half the kernel launches' time": {"launch": machine.launch / 2, "host": machine.host / 2},
    }
    before = top.prediction.seconds.p50
    gains: dict[str, float] = {}
    for name, change in changes.items():
        changed = msgspec.structs.replace(job, order=top.order, machine=msgspec.structs.replace(machine, **change))
        gains[name] = 1 - Predictor(changed).seconds(top.prediction.layout) / before
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def shape_warnings(answer: Answer) -> list[str]:
    """Sizes of the model at which its products fall off a cliff: those where a little more would cost less."""
    job, layout = answer.job, answer.ranked[0].prediction.layout
    spec, found = job.spec, list[str]()

    def per_weight(**changed: int) -> float:
        """Seconds of a layer's, and of the head's, products per FLOP, in the model with these sizes."""
        seconds = flops = 0.0
        case = msgspec.structs.replace(job, spec=msgspec.structs.replace(spec, **changed))
        for part in ("layers.0", "head"):
            operations = workload.work(case, layout, part).operations
            products = [one for one in operations if one.kind in ("product", "grouped")]
            seconds += sum(cost.operation_seconds(one, job.machine, job.software, job.precision) for one in products)
            flops += sum(one.flops * one.count for one in products)
        return seconds / flops

    now = per_weight()
    for key, step in (("hidden", 1024), ("ffn", 256 * layout.tp), ("vocabulary", 128 * layout.tp)):
        size = getattr(spec, key)
        if size % step == 0:
            continue
        best = min((size // step * step or step, -(-size // step) * step),
                   key=lambda value: per_weight(**{key: value}))  # fmt: skip
        loss = now / per_weight(**{key: best}) - 1
        if loss >= 0.03:
            found.append(f"{key} {size:,} costs {loss:.0%} of the products' time against {best:,}")
    return found


# --- values for others ---


def values(answer: Answer) -> dict[str, Any]:
    """What `fiveply plan --json` prints; `memory_bytes.by_rank` by pipeline rank, whose members hold alike."""
    return {
        "seconds": answer.seconds,
        "legal": answer.searched.legal,
        "fit": answer.searched.fit,
        "priced": answer.searched.priced,
        "gap": answer.searched.gap,
        "plans": [values_of(one) for one in answer.ranked],
    }


def values_of(one: Ranked) -> dict[str, Any]:
    prediction = one.prediction
    return {
        "layout": str(prediction.layout),
        "devices": one.world,
        "order": one.order,
        "runnable": not one.refusal,
        "reason": one.refusal,
        "step_seconds": msgspec.structs.asdict(prediction.seconds),
        "tokens_per_second_per_device": one.tokens_per_second_per_device,
        "mfu": one.mfu,
        "memory_bytes": {
            "worst": one.worst,
            "by_rank": list(prediction.memory_bytes),
            "capacity": one.capacity,
        },
        "p_oom": prediction.p_oom,
        "bound_by": one.bound_by,
        "terms": prediction.terms,
        "waterfall": dict(one.waterfall),
    }


def plan_of(answer: Answer, model: str, one: Ranked) -> Plan:
    """The file that other verbs read."""
    job, prediction = answer.job, one.prediction
    machine = job.machine
    cluster = msgspec.structs.replace(
        answer.cluster,
        devices_per_node=machine.devices_per_node,
        memory_bytes=machine.memory_bytes,
        measured={},
        shared={},
    )
    predicted = Predicted(prediction.seconds, prediction.terms, prediction.memory_bytes)
    return Plan(str(prediction.layout), model, cluster, job.sequence, job.global_batch, job.precision, predicted)


def shares(terms: dict[str, float]) -> dict[str, float]:
    """Predicted seconds by share of a recorded step."""
    return {share: sum(terms.get(name, 0.0) for name in names) for share, names in SHARES.items()}


def interval_text(seconds: Interval) -> str:
    """`5.5 s (5.0-6.1)`."""
    return f"{seconds.p50:.3g} s ({seconds.p10:.3g}\N{EN DASH}{seconds.p90:.3g})"
