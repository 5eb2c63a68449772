"""Seconds of an operation and of a collective on a machine: a roofline by shape, calibrated; nothing here counts work."""

from __future__ import annotations

from fiveply.plan.machine import Machine, Precision
from fiveply.plan.software import Software
from fiveply.plan.traffic import Collective
from fiveply.plan.workload import Operation, Phase, Work
from fiveply.spec.layout import Layout


def operation_seconds(operation: Operation, machine: Machine, software: Software, precision: Precision) -> float:
    """All `operation.count` calls."""
    raise NotImplementedError


def work_seconds(work: Work, machine: Machine, software: Software, precision: Precision) -> dict[Phase, float]:
    """Seconds of one micro-batch of a part by phase, without collectives."""
    raise NotImplementedError


def collective_seconds(collective: Collective, machine: Machine, layout: Layout) -> float:
    """ONE call, nothing hidden. Where the axis's ranks stand (in a node, in an NVLink domain, across) follows from the
    order of ranks: tp, cp, dp, pp, fastest first."""
    raise NotImplementedError
