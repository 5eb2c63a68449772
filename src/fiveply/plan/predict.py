"""One layout's prediction: seconds by term with an interval, bytes by rank. `search` and `score` call this and nothing else."""

from __future__ import annotations

import msgspec

from fiveply.plan.machine import Machine, Precision
from fiveply.plan.software import Software
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout


class Job(msgspec.Struct, frozen=True):
    """What is to be computed: the model, rows of `sequence` tokens, `global_batch` of them a step."""

    spec: ModelSpec
    sequence: int
    global_batch: int
    precision: Precision = "bf16"


class Prediction(msgspec.Struct, frozen=True):
    """`terms`: seconds of one step by name, adding up to `p50`. `memory`: allocated peak bytes by pipeline rank."""

    terms: dict[str, float]
    p10: float
    p50: float
    p90: float
    memory: tuple[int, ...]


def predict(job: Job, layout: Layout, machine: Machine, software: Software) -> Prediction:
    """`layout` is resolved (legality.resolve)."""
    raise NotImplementedError
