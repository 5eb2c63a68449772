"""One layout predicted: counts (`workload`, `traffic`) priced (`cost`), run through the schedule (`simulate`), with its bytes.

The one composition of the planner's layers: search, score and `fiveply plan` all ask here. Parts of a kind are priced once
for all layouts that split them alike.
"""

from __future__ import annotations

import msgspec

from fiveply.plan.footprint import Footprint
from fiveply.plan.machine import Machine
from fiveply.plan.simulate import StageSeconds
from fiveply.plan.software import Software
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.plan import Interval

ORDERS = ("tp,cp,dp,pp", "tp,cp,pp,dp")
"""Ranks, fastest axis first: the runtime's own, and the one that keeps a pipeline's neighbours on one node."""


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


def predict(job: Job, layout: Layout) -> Prediction:
    """Raises InputError for a layout that is not legal for the model and the batch (whether the runtime has it or not)."""
    raise NotImplementedError
