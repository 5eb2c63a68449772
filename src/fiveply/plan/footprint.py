"""Bytes of a rank, by category, over a schedule's life: the one accounting that predicts, refuses, logs and reports.

State (parameters, gradients, optimiser) follows from the placement table; activations from the kept tensors of each part
and from how many micro-batches of each chunk are alive while the schedule's actions go by. What is counted are tensors, as
an allocator that loses nothing would hold them: not its fragmentation, not contexts of the device or of its collectives
(`Software.context_bytes`), not workspaces of kernels (`workspace_bytes`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply import pipeline_schedule
from fiveply.pipeline_schedule import Action, Kind, Schedule
from fiveply.plan import units
from fiveply.plan.software import Software
from fiveply.plan.traffic import handed_on, held_units
from fiveply.plan.workload import FIVEPLY, INDEX_BYTES, parts, split_of, work
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout


class State(msgspec.Struct, frozen=True):
    """Bytes that stand the whole step."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


class Footprint(msgspec.Struct, frozen=True):
    """Bytes of one rank at the worst moment of a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept by forwards whose backward is to come, and handed from stage to stage."""
    working: int
    """What the action at the peak needs for itself: logits, gradients on their way, tensors formed again, gathered parameters."""
    buffers: int
    """The step's batch, and receives that are posted ahead."""
    when: str = ""
    """The action at the peak."""

    @property
    def peak(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working + self.buffers

    @property
    def categories(self) -> dict[str, int]:
        names = ("parameters", "gradients", "optimizer", "activations", "working", "buffers")
        return {name: getattr(self, name) for name in names}


class Stage(msgspec.Struct, frozen=True):
    """One chunk's bytes of one micro-batch."""

    kept: int
    """From forward to backward."""
    deferred: int
    """From a split backward's input gradient to its weight gradient."""
    forward: int
    """At forward's worst moment, what is kept included."""
    backward: int
    """At backward's worst moment, what is kept by then included."""


def runtime(compute: int, reduce: int, optimizer: int, *, same: bool = False) -> Software:
    """fiveply's own runtime with types of these bytes: of parameters that compute, of gradients as they are accumulated and
    reduced, of what the optimiser updates. AdamW keeps two moments, and a master copy where the types differ."""
    master = optimizer if compute != optimizer and not same else 0
    return msgspec.structs.replace(
        FIVEPLY,
        parameter_bytes=compute,
        gather_bytes=compute,
        gradient_bytes=reduce,
        reduce_bytes=reduce,
        optimizer_bytes=2 * optimizer + master,
    )


def state_of(elements: Any, shards: Any, zero: Any, *, software: Software = FIVEPLY) -> tuple[Any, Any, Any]:
    """Bytes of (parameters, gradients, optimiser state) of one flat buffer of `elements` whose sharded state `shards` ranks
    share. Whole numbers or arrays that broadcast together."""
    zero = np.asarray(zero)
    part = -(-elements // shards)
    whole = part * shards
    parameters = np.where(zero == 3, part, whole) * software.parameter_bytes
    gradients = np.where(zero >= 2, part, whole) * software.gradient_bytes
    if software.separate_part:
        gradients = gradients + np.where((zero == 1) & (np.asarray(shards) > 1), part, 0) * software.gradient_bytes
    return parameters, gradients, part * software.optimizer_bytes


def state(
    spec: ModelSpec, layout: Layout, names: Iterable[str], *, software: Software = FIVEPLY, tp_rank: int = 0
) -> State:
    """Of the units `names` (`traffic.held_units`): flat buffers, cut into equal parts by the largest tensor rank."""
    total = np.zeros(3)
    for name, count in Counter(units.alike(spec)[name] for name in names).items():
        one = units.held(spec, layout, name, tp_rank)
        for elements, shards in (
            (one.longest, units.shard_ranks(layout)),
            (one.experts, units.expert_shard_ranks(layout)),
        ):
            total += np.array(state_of(elements, shards, layout.zero, software=software)) * count
    parameters, gradients, optimizer = total.round().astype(int).tolist()
    return State(parameters, gradients, 0 if layout.offload == "optimizer" else optimizer)


def stage(
    spec: ModelSpec,
    layout: Layout,
    number: int,
    *,
    sequence: int,
    software: Software = FIVEPLY,
    precision: str = "bf16",
    tp_rank: int = 0,
) -> Stage:
    """Of stage `number` of a resolved layout."""
    names = parts(spec, layout.stages, number)
    works = [
        work(spec, layout, name, sequence=sequence, software=software, precision=precision, tp_rank=tp_rank)
        for name in names
    ]
    split = split_of(layout, sequence=sequence, precision=precision, tp_rank=tp_rank)
    away = layout.offload == "activations"
    kept = 0
    if spec.rope is not None and any(name.startswith("layers") for name in names):
        width = spec.latent.rope_dim if spec.latent else spec.head_dim
        kept += split.tokens * width * split.element  # cosine and sine, half a head each, which all its layers share
    forward = backward = kept
    before = 0
    for one, gathered in zip(works, _gathered(spec, layout, names, software), strict=True):
        # Offloaded, one part's tensors are on their way while the next computes.
        kept = (before + one.kept_bytes) if away else kept + one.kept_bytes
        before = one.kept_bytes
        forward = max(forward, kept + one.forward_working + gathered[0])
        backward = max(backward, kept + one.backward_working + gathered[1])
    kept = 0 if away else kept
    if number < layout.stage_count - 1:
        output = handed_on(spec, layout, sequence=sequence, precision=precision)
        kept, forward, backward = kept + output, max(forward, kept + output), backward + output
    return Stage(kept, sum(one.deferred for one in works), forward, backward)


def _gathered(spec: ModelSpec, layout: Layout, names: list[str], software: Software) -> list[tuple[int, int]]:
    """Bytes of parameters and gradients that stand only around each part's use, (forward, backward)."""
    if layout.zero < 2:
        return [(0, 0)] * len(names)
    sizes: list[int] = []
    for name in names:
        one = units.held(spec, layout, "embed" if name == "head" and spec.tied else name)
        sizes.append(one.longest + one.experts)
    found: list[tuple[int, int]] = []
    for index, size in enumerate(sizes):
        ahead = sizes[index + 1] if index + 1 < len(sizes) else 0
        behind = sizes[index - 1] if index else 0
        parameters = (size + ahead, size + behind) if layout.zero == 3 else (0, 0)
        gradients = size * (software.parameter_bytes + software.reduce_bytes) + ahead * software.reduce_bytes
        found.append(
            (round(parameters[0] * software.gather_bytes), round(parameters[1] * software.gather_bytes + gradients))
        )
    return found


def footprint(
    spec: ModelSpec,
    layout: Layout,
    *,
    sequence: int,
    global_batch: int,
    pp_rank: int,
    tp_rank: int = 0,
    software: Software = FIVEPLY,
    precision: str = "bf16",
) -> Footprint:
    """The worst moment of a step on a rank of `layout` (resolved), walked action by action."""
    micro_batches = global_batch // layout.dp // layout.micro_batch
    stages = [
        stage(spec, layout, layout.stage_of(pp_rank, chunk), sequence=sequence, software=software, precision=precision,
              tp_rank=tp_rank)
        for chunk in range(layout.chunks)
    ]  # fmt: skip
    standing = state(spec, layout, held_units(spec, layout, pp_rank), software=software, tp_rank=tp_rank)
    schedule = _schedule(layout.schedule, layout.pp, micro_batches, layout.chunks)
    activations, working, when = _walk(schedule.ranks[pp_rank], stages)
    split = split_of(layout, sequence=sequence, precision=precision)
    buffers = 0
    if software.whole_batch:
        buffers += micro_batches * split.tokens * 3 * INDEX_BYTES  # tokens, positions, targets
    peers = {a.peer for a in schedule.ranks[pp_rank] if a.kind in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)}
    buffers += len(peers) * handed_on(spec, layout, sequence=sequence, precision=precision)
    return Footprint(
        standing.parameters, standing.gradients, standing.optimizer, activations, working, buffers, str(when)
    )


def by_rank(
    spec: ModelSpec,
    layout: Layout,
    *,
    sequence: int,
    global_batch: int,
    software: Software = FIVEPLY,
    precision: str = "bf16",
) -> tuple[Footprint, ...]:
    """Of tensor rank 0, which holds the larger part of every uneven cut, on each pipeline rank."""
    return tuple(
        footprint(spec, layout, sequence=sequence, global_batch=global_batch, pp_rank=pp_rank, software=software,
                  precision=precision)
        for pp_rank in range(layout.pp)
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _schedule(name: str, pp: int, micro_batches: int, vp: int) -> Schedule:
    return pipeline_schedule.build(name, pp, micro_batches, vp)


def _walk(actions: Iterable[Action], stages: list[Stage]) -> tuple[int, int, Action | None]:
    """(bytes kept, bytes beyond them, the action) at the worst moment."""
    alive, worst = 0, (0, 0, None)
    for action in actions:
        chunk = stages[action.chunk] if action.chunk >= 0 else None
        if chunk is None:
            continue
        match action.kind:
            case Kind.FORWARD:
                now = (alive, chunk.forward, action)
                alive += chunk.kept
            case Kind.BACKWARD | Kind.INPUT:
                alive -= chunk.kept
                now = (alive, chunk.backward, action)
                alive += chunk.deferred if action.kind is Kind.INPUT else 0
            case Kind.WEIGHT:
                now = (alive, 0, action)
                alive -= chunk.deferred
            case _:
                continue
        if now[0] + now[1] > worst[0] + worst[1]:
            kept = min(chunk.kept, now[1])
            worst = (now[0] + kept, now[1] - kept, action)
    return worst


@functools.lru_cache(maxsize=4096)
def in_flight(schedule: str, pp: int, vp: int, micro_batches: int) -> NDArray[np.int64]:
    """(pp, vp): micro-batches of each chunk that are alive at the moment when a rank holds most of them.

    A split backward's micro-batch counts as alive until its weight gradient. Beyond a few rounds the number of micro-batches
    changes nothing, so it is cut there (interleaved: where all rounds are equal).
    """
    bounded = schedule != "gpipe" and (schedule != "interleaved" or micro_batches % pp == 0)
    enough = min(micro_batches, 4 * pp) if bounded else micro_batches
    built = _schedule(schedule, pp, enough, vp)
    found = np.zeros((pp, vp), np.int64)
    for rank, actions in enumerate(built.ranks):
        alive = np.zeros(vp, np.int64)
        for action in actions:
            if action.kind is Kind.FORWARD:
                alive[action.chunk] += 1
                if alive.sum() > found[rank].sum():
                    found[rank] = alive
            elif action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                alive[action.chunk] -= 1
    return found
