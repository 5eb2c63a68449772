"""For those who train with something else: the best plan that another system can run, and what to change in one's own."""

from __future__ import annotations

from typing import Any

import msgspec

from fiveply.plan import dialects, explain, software
from fiveply.plan.dialects.facts import facts_of
from fiveply.plan.dialects.megatron import Given
from fiveply.plan.explain import Answer, Ranked
from fiveply.plan.predict import Predictor
from fiveply.plan.space import Limits
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError

LEAST = 0.01
"""Share of a step from which another layout is advised."""


class Advice(msgspec.Struct, frozen=True):
    """`now`: what was given, predicted. `best`: the best layout that the system can run, if it is faster or `now` does not
    fit; `changes` lead from one to the other."""

    given: Given
    now: Ranked
    best: Ranked | None = None
    changes: tuple[str, ...] = ()


def expressible(system: str, answer: Answer, model: str) -> tuple[Ranked, str, list[str]]:
    """The first layout of an answer that `system` can express, its text, and comments (which name those passed over).
    Raises InputError, with the first one's reason, if there is none."""
    job, refusals = answer.job, list[InputError]()
    for one in answer.ranked:
        try:
            facts = facts_of(
                one.prediction.layout, job.spec, sequence=job.sequence, global_batch=job.global_batch,
                precision=job.precision, devices_per_node=job.machine.devices_per_node, model=model, order=one.order,
            )  # fmt: skip
            text, comments = dialects.emit(system, facts)
        except InputError as error:
            refusals.append(error)
            continue
        passed = [f"A faster layout is passed over: {error.problem}." for error in refusals[:1]]
        return one, text, [*passed, *comments]
    raise refusals[0]


def advise(given: Given, cluster: ClusterSpec, limits: Limits | None = None) -> Advice:
    """What was given, and what is better within the user's limits. Raises InputError for arguments that mean another number
    of devices than the cluster has."""
    world = given.layout.world
    if world != cluster.count:
        raise InputError(f"the arguments are for {world} ranks, the cluster has {cluster.count}", where="--cluster",
                         fix=f"give {cluster.device}:{world}")  # fmt: skip
    batch: dict[str, Any] = {key: getattr(given, key) for key in ("sequence", "global_batch", "precision")}
    system = software.load("megatron")
    job = explain.job_of(given.spec, cluster, world, **batch, system=system)
    now = explain.rank(Predictor(msgspec.structs.replace(job, order=given.order)), given.layout)
    limits = msgspec.structs.replace(limits or Limits(), among=dialects.choices("megatron"))
    try:
        found = explain.answer(given.spec, cluster, **batch, limits=limits, system=system)
        best, _, _ = expressible("megatron", found, "")
    except InputError:
        return Advice(given, now)  # no layout fits
    faster = best.prediction.seconds.p50 < (1 - LEAST) * now.prediction.seconds.p50
    if not faster and now.worst <= now.capacity:
        return Advice(given, now)
    facts = (facts_of(one.prediction.layout, given.spec, order=one.order, **batch) for one in (now, best))
    changes = dialects.changes(dialects.load("megatron"), *facts)
    return Advice(given, now, best, tuple(changes))


def values(advice: Advice) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "notes": list(advice.given.notes),
        "given": explain.values_of(advice.now),
        "better": explain.values_of(advice.best) | {"changes": list(advice.changes)} if advice.best else None,
    }
