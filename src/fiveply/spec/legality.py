"""Which layouts are legal for a model and a batch: each rule stands here once. Of one layout it refuses with its
arithmetic (`resolve`); of arrays of layouts it prunes the planner's search (`legal`).

`resolve` fills the defaults that depend on model and batch (`stages`, `micro_batch`); Layout's own properties answer for
the others. Everything below the command line works with resolved layouts only. What the runtime cannot run yet is told
apart from what no layout can: the planner takes the former (`runtime=False`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import LAYOUT_RULES, Layout, Layouts, Rule, divisors, enforce, kept
from fiveply.spec.placement import declare_layer

GROUP = 32
"""Columns of a matrix in 4 bits that share a scale."""


class _Job(NamedTuple):
    spec: ModelSpec
    sequence: int
    global_batch: int

    @property
    def experts(self) -> int:
        return self.spec.experts.count if self.spec.experts else 0

    @property
    def expert_columns(self) -> int:
        return self.spec.experts.ffn if self.spec.experts else 0


def resolve(
    layout: Layout, spec: ModelSpec, *, sequence: int, global_batch: int, where: str = "layout", runtime: bool = True
) -> Layout:
    """Check `layout` against model and batch, and fill its defaults. Raises InputError with the arithmetic and the fix.

    `runtime=False` admits what can be planned only.
    """
    job = _Job(spec, sequence, global_batch)
    layout.check(where)
    enforce(_MODEL_RULES, layout, job, where)
    if runtime:
        check_runnable(spec)
        enforce(_RUNTIME_RULES, layout, job, where)
    _check_batch(job, where)
    enforce(_BATCH_RULES, layout, job, where)
    stages = layout.stages or balanced_stages(spec, layout.stage_count)
    return msgspec.structs.replace(
        layout,
        stages=tuple(stages),
        micro_batch=layout.micro_batch or _micro_batch(layout.pp, global_batch // layout.dp),
    )


def resolve_for_inference(layout: Layout, spec: ModelSpec, where: str = "layout") -> Layout:
    """Check `layout` for serving the model, and fill its stages; keys that matter in training alone are left out."""
    layout.check(where)
    if layout.chunks > 1:
        raise InputError(f"schedule={layout.schedule} puts {layout.chunks} chunks on a rank; serving runs one", where=where,
                         key="schedule", fix="leave schedule and vp out")  # fmt: skip
    plain = Layout(dp=layout.dp, tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, stages=layout.stages)
    check_runnable(spec)
    job = _Job(msgspec.structs.replace(spec, attention_dropout=0.0), 1, layout.dp)
    enforce((*_MODEL_RULES, *_RUNTIME_RULES), plain, job, where)
    return msgspec.structs.replace(plain, stages=plain.stages or tuple(balanced_stages(spec, plain.stage_count)))


def check_groups(layout: Layout, spec: ModelSpec, where: str) -> None:
    """Raise InputError where the columns of a matrix that a tensor rank holds are no whole groups of weights in 4 bits."""
    shared = {"columns of query heads": spec.q_size, "MLP columns": spec.ffn}
    degrees = [
        tp for tp in divisors(spec.heads) if _kv_splits(spec, tp) and not any(x % (tp * GROUP) for x in shared.values())
    ]
    for name, columns, parts in (("hidden columns", spec.hidden, 1), *((*one, layout.tp) for one in shared.items())):
        if columns % (parts * GROUP):
            legal = bool(degrees) and spec.hidden % GROUP == 0
            raise InputError(
                f"{columns} {name}{f' / tp={parts}' if parts > 1 else ''} do not go into groups of {GROUP}, each of which has a scale"
                " in 4 bits", where=where, key="tp" if parts > 1 else "",
                fix=f"tp in {{{', '.join(map(str, degrees))}}} does" if legal else "take int8",
            )  # fmt: skip


def legal(layouts: Layouts, spec: ModelSpec, *, sequence: int, global_batch: int) -> NDArray[np.bool_]:
    """Which of many layouts `resolve(..., runtime=False)` takes, in the shape that their columns broadcast to.

    Raises InputError for a batch that no layout can have.
    """
    job = _Job(spec, sequence, global_batch)
    _check_batch(job, "data")
    return kept(LAYOUT_RULES, layouts, None) & kept((*_MODEL_RULES, *_BATCH_RULES), layouts, job)


def check_runnable(spec: ModelSpec, where: str = "model") -> None:
    """Raise InputError for a model that the planner counts and the runtime does not compute yet."""
    parts = {
        "routed experts": spec.experts is not None,
        "latent attention": spec.latent is not None,
        "attention sinks": spec.sinks,
        "multi-token prediction": spec.predicted > 1,
    }
    if missing := [name for name, has in parts.items() if has]:
        raise InputError(
            f"{' and '.join(missing)} cannot be run yet; it can be planned", where=where, key=spec.family,
            fix="give it to `fiveply plan`, or take a dense model",
        )  # fmt: skip


def check_module(layout: Layout, stages: int, where: str = "layout") -> Layout:
    """Check `layout` for a user's own module that names `stages` stages; returns it with sequence parallel off."""
    layout.check(where)
    enforce(_OWN_MODULE_RULES, layout, stages, where)
    return msgspec.structs.replace(layout, sp=0) if layout.tp > 1 else layout


def _check_batch(job: _Job, where: str) -> None:
    if job.sequence > job.spec.positions:
        raise InputError(
            f"sequence {job.sequence} is longer than the model's {job.spec.positions} positions", where=where,
            key="data.sequence", fix=f"give at most {job.spec.positions}",
        )  # fmt: skip
    if job.sequence < 1 or job.global_batch < 1:
        problem = f"sequence {job.sequence} and global_batch {job.global_batch} must be 1 or more"
        raise InputError(problem, where=where, fix="give whole numbers from 1")


def _kv_splits(spec: ModelSpec, parts: int) -> bool:
    """Whether `parts` ranks can share the heads: key-value heads are split evenly, or copied evenly."""
    return spec.heads % parts == 0 and (spec.kv_heads % parts == 0 or parts % spec.kv_heads == 0)


def _tensor_degrees(spec: ModelSpec) -> str:
    return f"{{{', '.join(str(d) for d in divisors(spec.heads) if _kv_splits(spec, d))}}}"


def _most_columns(spec: ModelSpec) -> float:
    """The least size, other than heads, that tensor ranks share."""
    experts = spec.experts
    dense = () if experts and len(experts.layers) == spec.layers else (spec.ffn,)
    shared = (experts.shared_ffn,) if experts and experts.shared_ffn else ()
    return min(*dense, *shared, spec.vocabulary, math.inf)


_MODEL_RULES: tuple[Rule[_Job], ...] = (
    Rule("tp", lambda x, j: j.spec.heads % x.tp != 0,
         lambda x, j: (f"tp={x.tp} does not divide {j.spec.heads} heads", f"tp in {_tensor_degrees(j.spec)} does")),
    Rule("tp", lambda x, j: (j.spec.kv_heads % x.tp != 0) & (x.tp % j.spec.kv_heads != 0),
         lambda x, j: (f"tp={x.tp} neither divides {j.spec.kv_heads} key-value heads nor is a multiple of them",
                       f"tp in {_tensor_degrees(j.spec)} is legal")),
    Rule("tp", lambda x, j: x.tp > _most_columns(j.spec),
         lambda x, j: (f"tp={x.tp} exceeds the MLP's {j.spec.ffn} columns or {j.spec.vocabulary} tokens", "lower tp")),
    Rule("stages", lambda x, j: bool(x.stages) and sum(x.stages) != j.spec.layers,
         lambda x, j: (f"stages {'+'.join(map(str, x.stages))} = {sum(x.stages)} layers, the model has {j.spec.layers}",
                       "make them add up, or leave stages out")),
    Rule("stages", lambda x, _: 0 in x.stages[1:-1],
         lambda x, _: ("a stage in the middle holds no layer", "give it one, or lower pp")),
    Rule("pp", lambda x, j: (not x.stages) & (x.stage_count > j.spec.layers),
         lambda x, j: (f"pp={x.pp} x {x.chunks} chunks = {x.stage_count} stages, the model has {j.spec.layers} layers",
                       f"at most {j.spec.layers} stages")),
    Rule("ep", lambda x, j: (j.experts == 0) & (x.ep > 1),
         lambda x, _: (f"ep={x.ep} needs a model with experts", "leave ep out")),
    Rule("etp", lambda x, j: (j.experts == 0) & (x.etp > 1),
         lambda x, _: (f"etp={x.etp} needs a model with experts", "leave etp out")),
    Rule("ep", lambda x, j: j.experts % x.ep != 0,
         lambda x, j: (f"ep={x.ep} does not divide {j.experts} experts", f"one of {divisors(j.experts)} does")),
    Rule("etp", lambda x, j: (j.experts > 0) & (x.tp % x.expert_tensor != 0),
         lambda x, _: (f"etp={x.etp} does not divide tp={x.tp}", f"one of {divisors(x.tp)} does")),
    Rule("etp", lambda x, j: (j.experts > 0) & (x.expert_tensor > j.expert_columns),
         lambda x, j: (f"etp={x.expert_tensor} exceeds an expert's {j.expert_columns} columns", "lower etp")),
    Rule("ep", lambda x, _: (x.dp * x.cp * x.tp) % (x.ep * x.expert_tensor) * (x.ep > 1) != 0,
         lambda x, _: (f"ep={x.ep} does not divide dp x cp x tp / etp = {x.dp} x {x.cp} x {x.tp} / {x.expert_tensor} = "
                       f"{x.dp * x.cp * x.tp // x.expert_tensor}", "make dp or cp a multiple of it, or set etp=1")),
    Rule("cp_kind", lambda x, j: (x.cp_kind == "ulysses") & (x.cp > 1) & (j.spec.heads % (x.tp * x.cp) != 0),
         lambda x, j: (f"tp x cp = {x.tp} x {x.cp} = {x.tp * x.cp} does not divide {j.spec.heads} heads",
                       "set cp_kind=gather, or lower cp")),
)  # fmt: skip

_BATCH_RULES: tuple[Rule[_Job], ...] = (
    Rule("dp", lambda x, j: j.global_batch % x.dp != 0,
         lambda x, j: (f"dp={x.dp} does not divide a global batch of {j.global_batch} rows",
                       f"dp in {divisors(j.global_batch)} does")),
    Rule("micro_batch", lambda x, j: (j.global_batch // x.dp) % np.maximum(x.micro_batch, 1) != 0,
         lambda x, j: (f"micro_batch={x.micro_batch} does not divide the {j.global_batch // x.dp} rows of a replica",
                       f"one of {divisors(j.global_batch // x.dp)} does")),
    # Causal work is even when each rank takes one piece from either end of the sequence.
    Rule("cp", lambda x, j: (x.cp > 1) & (2 * x.cp > j.sequence),
         lambda x, j: (f"cp={x.cp} cuts a sequence of {j.sequence} into {2 * x.cp} pieces", f"cp at most {j.sequence // 2}")),
)  # fmt: skip


def _not_yet(key: str) -> Rule[_Job]:
    return Rule(
        key,
        lambda x, _: getattr(x, key) > 1,
        lambda x, _: (f"{key}={getattr(x, key)} cannot be run yet", f"leave {key} out"),
    )


_RUNTIME_RULES: tuple[Rule[_Job], ...] = (
    _not_yet("cp"),
    _not_yet("ep"),
    _not_yet("etp"),
    Rule("offload", lambda x, _: x.offload != "none",
         lambda x, _: (f"offload={x.offload} cannot be run yet", "leave offload out")),
    Rule("attention_dropout", lambda x, j: j.spec.attention_dropout > 0 and x.world > 1,
         lambda _, j: (f"dropout inside attention ({j.spec.attention_dropout}) is not keyed by token, so it would differ by layout",
                       "set it to 0 in config.json, or run on one rank")),
    Rule("recompute", lambda x, j: j.spec.attention_dropout > 0 and x.recompute != "none",
         lambda _x, _j: ("dropout inside attention would draw another mask when recomputed",
                     "leave recompute out, or set the model's attention dropout to 0")),
)  # fmt: skip


_OWN_MODULE_RULES: tuple[Rule[int], ...] = (
    *(Rule(key, lambda x, _, key=key: getattr(x, key) > 1,
           lambda x, _, key=key: (f"{key}={getattr(x, key)} needs to know what a module computes",
                                  f"leave {key} out for a module of your own")) for key in ("cp", "ep", "etp")),
    Rule("sp", lambda x, _: x.sp == 1,
         lambda x, _: ("sequence parallel needs to know which dimension holds tokens", "leave sp out")),
    Rule("recompute", lambda x, _: x.recompute != "none",
         lambda x, _: (f"recompute={x.recompute} is for fiveply's own decoder", "call torch.utils.checkpoint in the module")),
    Rule("offload", lambda x, _: x.offload != "none",
         lambda x, _: (f"offload={x.offload} is for fiveply's own decoder", "leave offload out")),
    Rule("schedule", lambda x, _: x.schedule in ("zb", "zbv"),
         lambda x, _: (f"{x.schedule} splits the backward of each linear, which a module of your own does not offer",
                       "set schedule=1f1b, gpipe or interleaved")),
    Rule("stages", lambda x, _: bool(x.stages),
         lambda x, _: ("counts layers of fiveply's decoder", "name modules in parallelize(stages=...)")),
    Rule("pp", lambda x, named: x.stage_count > 1 and x.stage_count != named,
         lambda x, named: (f"pp={x.pp} x {x.chunks} chunks = {x.stage_count} stages, {named} are named",
                           f"name {x.stage_count} modules in parallelize(stages=...)")),
)  # fmt: skip
"""Of a layout alone, and the number of stages that the module names."""


def _micro_batch(pp: int, replica_batch: int) -> int:
    """The default micro-batch: all of a replica's rows at pp=1, else that over 2 x pp."""
    wanted = replica_batch if pp == 1 else max(1, replica_batch // (2 * pp))
    return max(d for d in divisors(replica_batch) if d <= wanted)


def head_cost(spec: ModelSpec) -> float:
    """Cost of the head in layers: its matrix over the products that a token passes in the last layer."""
    experts = spec.experts
    chosen = experts.per_token / experts.count if experts else 1.0
    layer = sum(
        math.prod(p.shape) * (chosen if len(p.shape) == 3 else 1.0)
        for p in declare_layer(spec, spec.layers - 1)
        if len(p.shape) > 1
    )
    return spec.vocabulary * spec.hidden / layer


def balanced_stages(spec: ModelSpec, count: int) -> list[int]:
    """Layers per stage such that the costliest stage is cheapest, the head counted on the last; each has at least one."""
    layers, cost = [1] * count, [1.0] * count
    cost[-1] += head_cost(spec)
    for _ in range(spec.layers - count):
        cheapest = cost.index(min(cost))
        layers[cheapest] += 1
        cost[cheapest] += 1
    return layers
