"""Which layouts are legal for a model and a batch: each rule stands here once and refuses with its arithmetic.

`resolve` fills the defaults that depend on model and batch (`stages`, `micro_batch`); Layout's own properties answer for
the others. Everything below the command line works with resolved layouts only.
"""

from __future__ import annotations

import msgspec

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, divisors


def resolve(layout: Layout, spec: ModelSpec, *, sequence: int, global_batch: int, where: str = "layout") -> Layout:
    """Check `layout` against model and batch, and fill its defaults. Raises InputError with the arithmetic and the fix."""
    layout.check(where)
    _check_model(layout, spec, where)
    _check_runtime(layout, spec, where)
    if sequence > spec.positions:
        raise InputError(
            f"sequence {sequence} is longer than the model's {spec.positions} positions", where=where, key="data.sequence",
            fix=f"give at most {spec.positions}",
        )  # fmt: skip
    if sequence < 1 or global_batch < 1:
        raise InputError(
            f"sequence {sequence} and global_batch {global_batch} must be 1 or more",
            where=where,
            fix="give whole numbers from 1",
        )
    if global_batch % layout.dp:
        raise InputError(
            f"dp={layout.dp} does not divide a global batch of {global_batch} rows", where=where, key="dp",
            fix=f"dp in {divisors(global_batch)} does",
        )  # fmt: skip
    stages = layout.stages or balanced_stages(spec, layout.stage_count)
    return msgspec.structs.replace(
        layout,
        stages=tuple(stages),
        micro_batch=_micro_batch(layout, global_batch // layout.dp, where),
    )


def resolve_for_inference(layout: Layout, spec: ModelSpec, where: str = "layout") -> Layout:
    """Check `layout` for serving the model, and fill its stages; keys that matter in training alone are left out."""
    layout.check(where)
    if layout.chunks > 1:
        raise InputError(f"schedule={layout.schedule} puts {layout.chunks} chunks on a rank; serving runs one", where=where,
                         key="schedule", fix="leave schedule and vp out")  # fmt: skip
    plain = Layout(dp=layout.dp, tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, stages=layout.stages)
    _check_model(plain, spec, where)
    _check_runtime(plain, msgspec.structs.replace(spec, attention_dropout=0.0), where)
    return msgspec.structs.replace(plain, stages=plain.stages or tuple(balanced_stages(spec, plain.stage_count)))


def check_module(layout: Layout, stages: int, where: str = "layout") -> Layout:
    """Check `layout` for a user's own module that names `stages` stages; returns it with sequence parallel off."""
    layout.check(where)
    for key in ("cp", "ep", "etp"):
        if getattr(layout, key) > 1:
            raise InputError(f"{key}={getattr(layout, key)} needs to know what a module computes", where=where, key=key,
                             fix=f"leave {key} out for a module of your own")  # fmt: skip
    if layout.sp == 1:
        raise InputError(
            "sequence parallel needs to know which dimension holds tokens", where=where, key="sp", fix="leave sp out"
        )
    if layout.recompute != "none" or layout.offload != "none":
        key = "recompute" if layout.recompute != "none" else "offload"
        raise InputError(f"{key}={getattr(layout, key)} is for fiveply's own decoder", where=where, key=key,
                         fix="call torch.utils.checkpoint in the module" if key == "recompute" else "leave offload out")  # fmt: skip
    if layout.schedule in ("zb", "zbv"):
        raise InputError(f"{layout.schedule} splits the backward of each linear, which a module of your own does not offer",
                         where=where, key="schedule", fix="set schedule=1f1b, gpipe or interleaved")  # fmt: skip
    if layout.stages:
        raise InputError(
            "counts layers of fiveply's decoder",
            where=where,
            key="stages",
            fix="name modules in parallelize(stages=...)",
        )
    if layout.stage_count > 1 and layout.stage_count != stages:
        raise InputError(
            f"pp={layout.pp} x {layout.chunks} chunks = {layout.stage_count} stages, {stages} are named", where=where, key="pp",
            fix=f"name {layout.stage_count} modules in parallelize(stages=...)",
        )  # fmt: skip
    return msgspec.structs.replace(layout, sp=0) if layout.tp > 1 else layout


def _check_model(layout: Layout, spec: ModelSpec, where: str) -> None:
    tp, stages = layout.tp, layout.stage_count
    if spec.heads % tp:
        raise InputError(
            f"tp={tp} does not divide {spec.heads} heads", where=where, key="tp",
            fix=f"tp in {{{', '.join(str(d) for d in divisors(spec.heads) if _kv_fits(spec, d))}}} does",
        )  # fmt: skip
    if not _kv_fits(spec, tp):
        raise InputError(
            f"tp={tp} neither divides {spec.kv_heads} key-value heads nor is a multiple of them", where=where, key="tp",
            fix=f"tp in {{{', '.join(str(d) for d in divisors(spec.heads) if _kv_fits(spec, d))}}} is legal",
        )  # fmt: skip
    if tp > min(spec.ffn, spec.vocabulary):
        raise InputError(
            f"tp={tp} exceeds the MLP's {spec.ffn} columns or {spec.vocabulary} tokens",
            where=where,
            key="tp",
            fix="lower tp",
        )
    if layout.stages and sum(layout.stages) != spec.layers:
        raise InputError(
            f"stages {'+'.join(map(str, layout.stages))} = {sum(layout.stages)} layers, the model has {spec.layers}",
            where=where, key="stages", fix="make them add up, or leave stages out",
        )  # fmt: skip
    if layout.stages and 0 in layout.stages[1:-1]:
        raise InputError(
            "a stage in the middle holds no layer", where=where, key="stages", fix="give it one, or lower pp"
        )
    if not layout.stages and stages > spec.layers:
        raise InputError(
            f"pp={layout.pp} x {layout.chunks} chunks = {stages} stages, the model has {spec.layers} layers", where=where, key="pp",
            fix=f"at most {spec.layers} stages",
        )  # fmt: skip


def _check_runtime(layout: Layout, spec: ModelSpec, where: str) -> None:
    """What the runtime does not run (yet), said before anything starts."""
    for key in ("cp", "ep", "etp"):
        if getattr(layout, key) > 1:
            raise InputError(
                f"{key}={getattr(layout, key)} cannot be run yet", where=where, key=key, fix=f"leave {key} out"
            )
    if layout.offload != "none":
        raise InputError(
            f"offload={layout.offload} cannot be run yet", where=where, key="offload", fix="leave offload out"
        )
    if spec.attention_dropout and layout.world > 1:
        raise InputError(
            f"dropout inside attention ({spec.attention_dropout}) is not keyed by token, so it would differ by layout",
            where=where, key="attention_dropout", fix="set it to 0 in config.json, or run on one rank",
        )  # fmt: skip
    if spec.attention_dropout and layout.recompute != "none":
        raise InputError(
            "dropout inside attention would draw another mask when recomputed", where=where, key="recompute",
            fix="leave recompute out, or set the model's attention dropout to 0",
        )  # fmt: skip


def _kv_fits(spec: ModelSpec, tp: int) -> bool:
    return spec.kv_heads % tp == 0 or tp % spec.kv_heads == 0


def _micro_batch(layout: Layout, replica_batch: int, where: str) -> int:
    """The given micro-batch if it divides the replica's rows; by default all of them at pp=1, else that over 2 x pp."""
    if layout.micro_batch:
        if replica_batch % layout.micro_batch:
            raise InputError(
                f"micro_batch={layout.micro_batch} does not divide the {replica_batch} rows of a replica", where=where,
                key="micro_batch", fix=f"one of {divisors(replica_batch)} does",
            )  # fmt: skip
        return layout.micro_batch
    wanted = replica_batch if layout.pp == 1 else max(1, replica_batch // (2 * layout.pp))
    return max(d for d in divisors(replica_batch) if d <= wanted)


def head_cost(spec: ModelSpec) -> float:
    """Cost of the head in layers: its matrix over a layer's matrices."""
    layer = spec.hidden * (2 * spec.q_size + 2 * spec.kv_size + (3 if spec.gated_mlp else 2) * spec.ffn)
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
