"""Bytes of a rank, by category, over a schedule's life: the one accounting that predicts, refuses, logs and reports.

State (parameters, gradients, optimiser) follows from the placement table; activations from the kept tensors of each part
and from how many micro-batches of each chunk are alive while the schedule's actions go by. What is counted are tensors, as
an allocator that loses nothing would hold them: not its fragmentation, not contexts of the device or of its collectives.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fiveply import pipeline_schedule
from fiveply.pipeline_schedule import Action, Kind, Schedule
from fiveply.plan import units
from fiveply.plan.buffers import Buffers
from fiveply.plan.software import FIVEPLY, Software
from fiveply.plan.traffic import handed_on, held_units
from fiveply.plan.workload import INDEX_BYTES, Case, Split, describe, parts, work
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout


class State(NamedTuple):
    """Bytes that stand the whole step."""

    parameters: int
    gradients: int
    optimizer: int


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
        return sum(self.categories.values())

    @property
    def categories(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "when"}


class Stage(msgspec.Struct, frozen=True):
    """One chunk's bytes of one micro-batch."""

    kept: int
    """From forward to backward, its input and its output included."""
    deferred: int
    """From a split backward's input gradient to its weight gradient."""
    forward: int
    """At forward's worst moment, what is kept included."""
    backward: int
    """At the worst moment of backward, or of its first half, what is kept by then included."""
    begin: int
    """The same of its first two parts, during which the last micro-batch's reductions still stand, those included (zero 2 and 3)."""
    last_backward: int
    """The same as `backward` of the step's last, which starts reductions on its way (zero 1)."""
    weight: int
    """Beyond what is kept, in the second half of a split backward."""
    handed: int
    """What it hands on, or gets."""
    gathered: int
    """At zero 3: its first unit's parameters, which are gathered ahead of it."""
    reducing: int
    """Buffers of reductions that its last backward leaves under way."""
    gradients: tuple[int, int]
    """At zero 2 and 3: gradients that each half of a split backward leaves until they are reduced."""
    waiting: int
    """At zero 2 and 3: the head's gradient of an embedding that it shares with another chunk, until that chunk's are reduced."""


def runtime(compute: int, reduce: int, optimizer: int) -> Software:
    """fiveply's own runtime with types of these bytes: of parameters that compute, of gradients as they are accumulated and
    reduced, of what the optimiser updates. AdamW keeps two moments, and a master copy where the types differ."""
    master = optimizer if compute != optimizer else 0
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
    part = -(-elements // shards)
    spare = part * shards - part  # what the other ranks own
    parameters = (part + spare * (zero < 3)) * software.parameter_bytes
    gradients = part + spare * (zero < 2)
    if software.separate_part:
        gradients = gradients + part * ((zero == 1) & (shards > 1))
    return parameters, gradients * software.gradient_bytes, part * software.optimizer_bytes


def state(case: Case, layout: Layout, names: Iterable[str], tp_rank: int = 0) -> State:
    """Of the units `names` (`traffic.held_units`): flat buffers, cut into equal parts by the largest tensor rank."""
    total = np.zeros(3)
    for name, count in Counter(units.alike(case.spec)[name] for name in names).items():
        for one in units.buffers(case.spec, layout, name, tp_rank):
            total += np.array(state_of(one.elements, one.shards, layout.zero, software=case.software)) * count
    parameters, gradients, optimizer = total.round().astype(int).tolist()
    return State(parameters, gradients, 0 if layout.offload == "optimizer" else optimizer)


def stage(case: Case, layout: Layout, number: int, tp_rank: int = 0) -> Stage:
    """Of stage `number` of a resolved layout."""
    names = parts(case.spec, layout.stages, number)
    works = [work(case, layout, name, tp_rank) for name in names]
    handed = handed_on(case, layout)
    shared = _shared(case.spec, layout, names, case.split(layout, tp_rank))
    kept = [one.kept_bytes for one in works]
    held = list(accumulate(kept, initial=shared))[1:]
    if layout.offload == "activations":  # one part's tensors are on their way while the next computes
        held = [shared + this + before for this, before in zip(kept, [0, *kept], strict=False)]
    output = 0 if number == layout.stage_count - 1 else handed
    splits = layout.schedule in ("zb", "zbv") and layout.pp > 1
    buffers = Buffers(case, layout, names, tp_rank)
    forward = backward = begin = last_backward = shared
    for index, one in enumerate(works):
        forward = max(forward, held[index] + one.forward_working + buffers.gathered(index, 1))
        gathered = buffers.gathered(index, -1) + (buffers.tied if "embed" in names and index < len(works) - 1 else 0)
        computing = held[index] + one.backward_working + gathered
        if index == len(works) - 1:
            computing -= output  # a gradient that another stage sent is the stream's here, and beside it further on
        if splits:  # weight gradients and reductions come later, but the head's gradient is there from its forward
            behind = range(index + 1, len(works))
            heads = sum(buffers.formed(later) for later in behind if names[later] == "head")
            backward = max(backward, computing + sum(works[later].deferred for later in behind) + heads)
            continue
        last_backward = max(last_backward, computing + buffers.started(index))
        # Its gradients are formed when its kept tensors are gone but its input, and then copied to be reduced: one other
        # reduction is under way then, and two before.
        formed = (held[index - 1] if index else shared) + handed + gathered + buffers.formed(index)
        copied = formed + buffers.copied(index)
        formed = max(computing, formed)
        backward = max(backward, formed + buffers.reducing(index + 1, 2), copied + buffers.reducing(index + 1, 1))
        # The first two parts meet what the micro-batch before left, the reductions of its first two units.
        if index == len(works) - 1:
            begin = max(begin, formed + buffers.reducing(0, 2), copied + buffers.reducing(0, 1))
        elif index == len(works) - 2:
            begin = max(begin, formed + buffers.reducing(index + 1, 1) + buffers.reducing(0, 1))
    whole = shared if layout.offload == "activations" else held[-1]
    return Stage(
        kept=whole + output,
        deferred=sum(one.deferred for one in works),
        forward=max(forward, held[-1] + output),
        backward=backward + output,
        begin=begin + output,
        last_backward=last_backward + output,
        weight=max(one.weight_working for one in works),
        handed=handed,
        gathered=buffers.first,
        reducing=buffers.left,
        gradients=buffers.gradients(works),
        waiting=0 if "embed" in names else buffers.tied,
    )


def _shared(spec: ModelSpec, layout: Layout, names: Sequence[str], split: Split) -> int:
    """Bytes that all layers of a chunk keep together: cosine and sine, half a head each; and what recomputation calls with,
    the tokens' numbers for dropout and a window's mask."""
    layers = [name for name in names if name.startswith("layers")]
    if not layers:
        return 0
    total = 0
    if spec.rope is not None:
        total += split.tokens * (spec.latent.rope_dim if spec.latent else spec.head_dim) * split.element
    if layout.recompute == "full" and spec.dropout:
        padded = (split.tp_rank + 1) * split.local > split.tokens and split.sequence_parallel
        total += (split.local if padded else split.tokens) * INDEX_BYTES
    if layout.recompute != "none" and any(describe(spec, name).window in range(1, split.sequence) for name in layers):
        total += split.sequence**2
    return total


def footprint(case: Case, layout: Layout, micro_batches: int, pp_rank: int, tp_rank: int = 0) -> Footprint:
    """The worst moment of a step on a rank of `layout` (resolved), walked action by action."""
    stages = [stage(case, layout, layout.stage_of(pp_rank, chunk), tp_rank) for chunk in range(layout.chunks)]
    standing = state(case, layout, held_units(case.spec, layout, pp_rank), tp_rank)
    schedule = _schedule(layout.schedule, layout.pp, micro_batches, layout.chunks, layout.zero)
    worst = max(walk(schedule, pp_rank, stages), key=lambda moment: moment.during)
    buffers = case.software.workspace_bytes
    if case.software.whole_batch:
        buffers += micro_batches * case.split(layout).tokens * 3 * INDEX_BYTES  # tokens, positions, targets
    working = worst.during - worst.kept - worst.posted
    return Footprint(*standing, worst.kept, working, buffers + worst.posted, str(worst.action))


@functools.lru_cache(maxsize=256)
def _schedule(name: str, pp: int, micro_batches: int, vp: int, zero: int = 0) -> Schedule:
    return pipeline_schedule.build(name, pp, micro_batches, vp, gather=zero == 3, reduce_each=zero >= 2)


class Moment(msgspec.Struct, frozen=True):
    """Bytes beside the state around one action of a rank."""

    action: Action
    during: int
    """At its worst moment."""
    after: int
    kept: int
    """Of `during`: kept by forwards and handed between stages."""
    posted: int
    """Of `during`: receives posted ahead."""


def walk(schedule: Schedule, rank: int, stages: Sequence[Stage]) -> list[Moment]:
    """The life of one step on pipeline rank `rank`, whose chunks are `stages`. One receive is posted ahead for each peer."""
    actions = schedule.ranks[rank]
    to_post = Counter(action.peer for action in actions if action.kind in _RECEIVES)
    handed = stages[0].handed
    posted, alive, reducing = len(to_post) * handed, 0, 0
    halves = [[0, 0] for _ in stages]  # gradients that wait for their reduction
    waiting = 0
    moments: list[Moment] = []
    for index, action in enumerate(actions):
        worst, after, kind, number = alive, reducing, action.kind, max(0, action.chunk)
        before = reducing + sum(map(sum, halves)) + waiting
        chunk = stages[number]
        match kind:
            case Kind.RECEIVE_FORWARD | Kind.RECEIVE_BACKWARD:
                to_post[action.peer] -= 1
                posted -= 0 if to_post[action.peer] else handed
                alive += handed
            case Kind.SEND_BACKWARD:
                alive -= handed
            case Kind.GATHER:
                alive += chunk.gathered
            case Kind.FORWARD:
                # Its input stands already: received, or the output of another chunk of this rank.
                alive -= 0 if schedule.adjacent(rank, number, -1) is None else handed
                alive -= chunk.gathered if action.micro_batch == 0 else 0
                worst = alive + chunk.forward
                alive += chunk.kept
            case Kind.BACKWARD | Kind.INPUT:
                alive -= chunk.kept
                worst = alive + chunk.backward
                if kind is Kind.BACKWARD and schedule.reduce_each:
                    # Reductions start as gradients arrive, in place of the last micro-batch's, which `begin` counts.
                    worst = alive + max(chunk.backward, chunk.begin if reducing else 0) - reducing
                    after = chunk.reducing
                alive += _left_between(schedule, rank, number, handed)
                waiting = chunk.waiting or (waiting if number else 0)
                if kind is Kind.INPUT:
                    alive += chunk.deferred
                    halves[number][0] = chunk.gradients[0]
                elif not schedule.reduce_each and any(
                    later.kind is Kind.REDUCE for later in actions[index + 1 : index + 3]
                ):
                    worst += chunk.last_backward - chunk.backward
                    after += chunk.reducing
            case Kind.WEIGHT:
                worst = alive + max(chunk.weight, chunk.gradients[1])
                alive -= chunk.deferred
                halves[number][1] = chunk.gradients[1]
            case Kind.REDUCE:
                split = actions[index - 1].kind is Kind.WEIGHT
                halves[number], waiting = [0, 0], 0 if number == 0 else waiting
                if split:
                    after = chunk.reducing if schedule.reduce_each else reducing + chunk.reducing
            case Kind.FINISH:
                after = 0
            case _:
                pass
        reducing = after
        left = alive + reducing + sum(map(sum, halves)) + waiting
        moments.append(Moment(action, max(worst + before, left) + posted, left + posted, alive, posted))
    return moments


def _left_between(schedule: Schedule, rank: int, chunk: int, handed: int) -> int:
    """What a backward leaves of the gradients between stages: it takes one from the stage behind, and leaves one for the stage
    before, whose output its input is where both are of this rank."""
    taken = 0 if schedule.adjacent(rank, chunk, 1) is None else handed
    before = schedule.adjacent(rank, chunk, -1)
    left = 0 if before is None else 2 * handed if before[0] == rank else handed
    return left - taken


_RECEIVES = (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)
