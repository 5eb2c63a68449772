"""Every collective and transfer of one rank in one step, counted exactly: axis, operation, bytes, how often, what can hide it.

`part_traffic` is what one micro-batch needs in one part of the model, `step_traffic` what comes once a step, `handed_on` what a
transfer between stages carries. For fiveply's own runtime they equal what the running code calls.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any, Literal, NamedTuple

import msgspec

from fiveply.plan import units
from fiveply.plan.software import Software
from fiveply.plan.workload import Case, Part, Phase, Split, chunk_rows, describe
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import stage_units

Operation = Literal[
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "receive"
]  # as world/recorder.py names them
SUMS_BYTES = 3 * 8
"""Loss, square norm of the gradients and the wish to stop, in float64."""


class Collective(msgspec.Struct, frozen=True):
    """`bytes` of the larger of its tensors at one rank, `size` ranks on the axis, `count` calls of this kind.

    axis: `tp`, `kv`, `cp`, `ep`, `etp`, `dp`, `shard`, `replica`, `edp` (ranks that hold the same experts), `pp`, `tied`, `world`.
    part: of a call once a step, the unit whose gradients or parameters it is about, "" for none.
    hides: whether other parts' computation may run meanwhile.
    """

    axis: str
    operation: Operation
    bytes: int
    size: int
    count: int
    phase: Phase
    part: str = ""
    hides: bool = False
    copies: int = 1
    """Of each row of an exchange, those for ranks of one host cross to it once."""


def part_traffic(case: Case, layout: Layout, part: str) -> tuple[Collective, ...]:
    """Of one micro-batch through `part`: `count` is calls a micro-batch. What recomputation runs again has phase `input`."""
    found = _in_part(describe(case.spec, part), case.split(layout), case.software)
    return found + _of_state_each(case.spec, layout, part, case.software) if layout.zero >= 2 else found


def handed_on(case: Case, layout: Layout) -> int:
    """Bytes of the hidden states that one rank hands to the next stage for one micro-batch."""
    split = case.split(layout)
    return split.local * case.spec.hidden * split.element


@functools.cache
def _in_part(part: Part, split: Split, software: Software) -> tuple[Collective, ...]:
    calls = _Calls(split, software)
    match part.what:
        case "embed":
            calls.leave(part.spec.hidden, again=False)
        case "head":
            _vocabulary(calls, part, split, software)
        case "layer":
            _attention(calls, part, split)
            _mlp(calls, part, split)
            if part.predicts:
                _vocabulary(calls, part, split, software)
        case _:
            pass
    return tuple(calls.found)


class _Calls:
    """Collects the calls of one part's forward and, mirrored, of its backward."""

    def __init__(self, split: Split, software: Software) -> None:
        self.split, self.software = split, software
        alternate = software.alternate and split.recompute == "selective"
        self.full = split.recompute == "full"
        self.enters = self.full or alternate  # what leaves is saved then
        self.selected = set(software.selective) if split.recompute == "selective" else set[str]()
        self.found: list[Collective] = []

    def add(
        self, axis: str, operation: Operation, size: int, ranks: int, phase: Phase, count: int = 1, copies: int = 1
    ) -> None:
        if ranks > 1:
            self.found.append(Collective(axis, operation, size, ranks, count, phase, copies=copies))

    def both(
        self, axis: str, forward: Operation | None, backward: Operation | None, size: int, ranks: int, *, again: bool,
        copies: int = 1,
    ) -> None:  # fmt: skip
        """A call of forward, the one that mirrors it in backward, and forward's once more where it is recomputed."""
        if forward:
            self.add(axis, forward, size, ranks, "forward", copies=copies)
        if backward:
            self.add(axis, backward, size, ranks, "input", copies=copies)
        if forward and again:
            self.add(axis, forward, size, ranks, "input", copies=copies)

    def enter(self, columns: int, *, again: bool) -> None:
        """Before a column-parallel product of an input of `columns`."""
        split = self.split
        if split.sequence_parallel:
            size = split.gathered * columns * split.element
            self.both("tp", "all-gather", "reduce-scatter", size, split.tp, again=again)
            if not self.software.gathered_input and not again:
                self.add("tp", "all-gather", size, split.tp, "input")  # the weight gradient's input, gathered again
        else:
            self.both("tp", None, "all-reduce", split.tokens * columns * split.element, split.tp, again=again)

    def leave(self, columns: int, *, again: bool) -> None:
        """After a row-parallel product, and after the embedding."""
        split = self.split
        if split.sequence_parallel:
            size = split.gathered * columns * split.element
            self.both("tp", "reduce-scatter", "all-gather", size, split.tp, again=again)
        else:
            self.both("tp", "all-reduce", None, split.tokens * columns * split.element, split.tp, again=again)


def _attention(calls: _Calls, part: Part, split: Split) -> None:
    element, again, latent = split.element, calls.full, part.spec.latent
    heads, kv_heads, size = part.spec.heads // split.tp, max(1, part.spec.kv_heads // split.tp), part.spec.head_dim
    value = size
    if latent is None:
        calls.enter(part.spec.hidden, again=calls.enters)
    else:
        calls.enter(latent.kv_rank + latent.rope_dim, again=calls.enters)
        calls.enter(latent.q_rank or part.spec.hidden, again=calls.enters)
        kv_heads, size, value = heads, latent.nope_dim + latent.rope_dim, latent.value_dim
    if split.cp > 1 and split.cp_kind == "ulysses":
        q, out = split.tokens * heads * size * element, split.tokens * heads * value * element
        for traded in (q, split.tokens * kv_heads * size * element, split.tokens * kv_heads * value * element, out):
            calls.both("cp", "all-to-all", "all-to-all", traded, split.cp, again=again)
    elif split.cp > 1:
        for columns in (size, value):  # keys, then values; gathered once more in backward, since the own part is kept
            gathered = split.tokens * split.cp * kv_heads * columns * element
            calls.both("cp", "all-gather", "reduce-scatter", gathered, split.cp, again=True)
    calls.leave(part.spec.hidden, again=again)


def _mlp(calls: _Calls, part: Part, split: Split) -> None:
    dropped = calls.software.stops_early and not max(part.spec.dropout, calls.software.dropout)
    inner = calls.full or "mlp" in calls.selected
    experts = part.experts
    if experts is not None:
        again = calls.full or "experts" in calls.selected
        chosen = split.routed * experts.per_token * part.spec.hidden * split.element
        copies = experts.per_token if calls.software.dispatch_once else 1
        calls.both("ep", "all-to-all", "all-to-all", chosen, split.ep, again=again, copies=copies)
        calls.both("etp", "all-gather", "reduce-scatter", chosen * split.etp, split.etp, again=again)
        calls.both("etp", "reduce-scatter", "all-gather", chosen * split.etp, split.etp, again=again)
        calls.both("ep", "all-to-all", "all-to-all", chosen, split.ep, again=again, copies=copies)
        if not split.sequence_parallel:  # each tensor rank takes its share of the tokens, and all need the result
            calls.both(
                "tp", "all-gather", "all-gather", split.tokens * part.spec.hidden * split.element, split.tp, again=again
            )
    if experts is None or experts.shared_ffn:
        calls.enter(part.spec.hidden, again=inner or calls.enters)
        calls.leave(part.spec.hidden, again=inner and not dropped)


def _vocabulary(calls: _Calls, part: Part, split: Split, software: Software) -> None:
    """The head's input, and what the softmax over a split vocabulary needs: largest logit, then sums and target's logit."""
    exact = max(4, split.element)
    if software.loss != "chunked":
        calls.enter(part.spec.hidden, again=False)
        calls.add("tp", "all-reduce", split.tokens * exact, split.tp, "forward", 3)
        return
    if split.sequence_parallel:
        size = split.gathered * part.spec.hidden * split.element
        calls.both("tp", "all-gather", "reduce-scatter", size, split.tp, again=False)
    else:
        calls.enter(part.spec.hidden, again=False)
    chunk = chunk_rows(part.spec.vocabulary, split.tp)
    for rows, count in ((chunk, split.tokens // chunk), (split.tokens % chunk, 1)):
        if rows and count:
            calls.add("tp", "all-reduce", rows * exact, split.tp, "forward", count)
            calls.add("tp", "all-reduce", 2 * rows * exact, split.tp, "forward", count)


def _of_state_each(spec: ModelSpec, layout: Layout, part: str, software: Software) -> tuple[Collective, ...]:
    """What zero 2 and 3 do every micro-batch: reduce each unit's gradients, and gather its parameters around each use."""
    found: list[Collective] = []
    shared = part == "head" and spec.embeds_at_end
    unit = "embed" if part == "head" and spec.tied else part
    reduces = not (shared and spec.tied and len(layout.end_ranks) == 1)  # the embedding's own unit does
    for one in units.buffers(spec, layout, unit):
        axis, shards, whole = one.axis, one.shards, one.part * one.shards
        if shards == 1:
            continue
        if layout.zero == 3:
            bytes_ = round(whole * software.gather_bytes)
            found.append(Collective(axis, "all-gather", bytes_, shards, 1, "forward", hides=True))
            if gathers_again(part, software):
                found.append(Collective(axis, "all-gather", bytes_, shards, 1, "input", hides=True))
        if reduces:
            bytes_ = round(whole * software.reduce_bytes)
            found.append(Collective(axis, "reduce-scatter", bytes_, shards, 1, "weight", hides=True))
    return tuple(found)


def gathers_again(part: str, software: Software) -> bool:
    """Whether backward needs its weights: an embedding's gradients need none, and the runtime's head forms its own in forward."""
    return part not in ("embed", "positions") and (part != "head" or software.loss != "chunked")


def held_units(spec: ModelSpec, layout: Layout, pp_rank: int) -> dict[str, int]:
    """Units that a pipeline rank holds, with their (first) stage."""
    found: dict[str, int] = {}
    for chunk in range(layout.chunks):
        stage = layout.stage_of(pp_rank, chunk)
        for unit in stage_units(spec, layout.stages, stage):
            found.setdefault(unit, stage)
    return found


def unit_step_traffic(case: Case, layout: Layout, unit: str, tp_rank: int = 0) -> tuple[Collective, ...]:
    """What one unit calls once a step over the ranks that hold the same of it: reductions of gradients that are not made every
    micro-batch, and gathers after the optimiser."""
    found: list[Collective] = []
    for one in units.buffers(case.spec, layout, unit, tp_rank):
        for call in step_calls(layout.zero, one.shards, one.replicas, one.part, case.software):
            if call.made:
                over = one.axis if call.shards else "dp" if layout.zero == 0 and one.axis == "shard" else one.copies
                ranks = one.shards if call.shards else one.replicas
                found.append(
                    Collective(over, call.operation, round(call.bytes), ranks, 1, call.phase, unit, call.hides)
                )
    return tuple(found)


class StepCall(NamedTuple):
    """A call that one flat buffer may make once a step, over the ranks that share it (`shards`) or those that have the same;
    `made`: whether it does. Numbers, or arrays of states."""

    operation: Operation
    shards: bool
    bytes: Any
    phase: Phase
    hides: bool
    made: Any


def step_calls(zero: Any, shards: Any, replicas: Any, size: Any, software: Software) -> tuple[StepCall, ...]:
    """Of a buffer whose parts have `size` elements."""
    reduce, gather = size * shards * software.reduce_bytes, size * shards * software.gather_bytes
    return (
        StepCall("all-reduce", False, reduce, "weight", True, (zero == 0) & (replicas > 1)),
        StepCall("reduce-scatter", True, reduce, "weight", True, (zero == 1) & (shards > 1)),
        StepCall("all-reduce", False, size * software.reduce_bytes, "weight", False, (zero >= 1) & (replicas > 1)),
        StepCall("all-gather", True, gather, "step", False, (zero >= 1) & (zero <= 2) & (shards > 1)),
    )


def sums(case: Case, layout: Layout, pp_rank: int, tp_rank: int = 0, shard: int = 0) -> tuple[Collective, ...]:
    """What is added up once a step besides: gradients that tensor ranks share, the copies of a tied embedding, and the sums of
    the step. `shard`: the rank's index among those that share its state."""
    spec, shared = case.spec, Counter[str]()
    for unit, stage in held_units(spec, layout, pp_rank).items():
        one = units.held(spec, layout, unit, tp_rank)
        part = -(-one.longest // units.shard_ranks(layout))
        low, high = shard * part, (shard + 1) * part
        if layout.tp > 1:
            alike = layout.tp // spec.kv_heads
            shared["tp"] += one.owned(layout.tp, low, high)
            shared["kv"] += one.owned(alike, low, high) if 1 < alike < layout.tp else 0
        at_end = stage in (0, layout.stage_count - 1)
        if unit == "embed" and spec.embeds_at_end and len(layout.end_ranks) > 1 and at_end:
            shared["tied"] += sum(one.owned(add, low, high) for add in {add for add, _ in one.shared})
    sizes = {"tp": layout.tp, "kv": layout.tp // min(spec.kv_heads, layout.tp), "tied": 2}
    found = [
        Collective(axis, "all-reduce", round(elements * case.software.reduce_bytes), sizes[axis], 1, "step")
        for axis, elements in shared.items()
        if elements
    ]
    if layout.world > 1:
        found.append(Collective("world", "all-reduce", SUMS_BYTES, layout.world, 1, "step"))
    return tuple(found)


def step_traffic(case: Case, layout: Layout, pp_rank: int, tp_rank: int = 0, shard: int = 0) -> tuple[Collective, ...]:
    """All that a rank calls once a step, transfers left out."""
    mine = held_units(case.spec, layout, pp_rank)
    each = (unit_step_traffic(case, layout, unit, tp_rank) for unit in mine)
    return (*itertools.chain(*each), *sums(case, layout, pp_rank, tp_rank, shard))
