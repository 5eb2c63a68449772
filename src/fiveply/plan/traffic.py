"""Every collective and transfer of one rank in one step, counted exactly: axis, operation, bytes, how often, what can hide it."""

from __future__ import annotations

from typing import Literal

import msgspec

from fiveply.plan.workload import Phase

Operation = Literal[
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "receive"
]  # as world/recorder.py names them


class Collective(msgspec.Struct, frozen=True):
    """`bytes` of the larger of its tensors at one rank, `size` ranks on the axis, `count` calls of this kind.

    axis: `tp`, `kv`, `cp`, `ep`, `dp`, `shard`, `replica`, `pp`, `tied`, `world`, `model`.
    part: the unit whose computation calls it; "" for those of the whole step.
    hides: what may run meanwhile: "" (exposed), `weight` (the weight gradients of the same part), `block` (the computation
    of the neighbouring part), `backward` (all that is left of the step's last backward), `expert`.
    """

    axis: str
    operation: Operation
    bytes: int
    size: int
    count: int
    phase: Phase
    part: str = ""
    hides: Literal["", "weight", "block", "backward", "expert"] = ""
