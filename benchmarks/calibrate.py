"""Factors that bring predicted terms to measured times: few, shared, and held near 1 where measurements say little.

Both calibrations beside this file fit them. A case is one measured step (or token): its predicted seconds by term, and for each
term the names of the factors that multiply it. `fit` finds the factors that make the logarithms of predicted and measured
times agree best, robust against single bad rows; `leave_out` judges such a fit on groups (sources) that it did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FOLLOWS = "bubble"
"""The term that grows with all computation, and has no factor of its own."""


class Case(msgspec.Struct, frozen=True):
    """One measured step. `factors`: of each term, the names that multiply it; terms that are not among them stay."""

    terms: Mapping[str, float]
    measured: float
    factors: Mapping[str, tuple[str, ...]]
    group: Hashable = None


def fit(cases: Sequence[Case], *, prior: float = 0.15, noise: float = 0.03, rounds: int = 30) -> dict[str, float]:
    """Factor by name. `prior`: standard deviation of a factor's logarithm before any measurement; `noise`: of one
    measurement's, beyond which (twice) a row counts less and less (Huber's weights)."""
    names = sorted({name for case in cases for many in case.factors.values() for name in many})
    logs = np.zeros(len(names))
    for _ in range(rounds):
        rows = [_row(case, dict(zip(names, np.exp(logs), strict=True)), names) for case in cases]
        errors = np.array([error for error, _ in rows])
        slopes = np.array([slope for _, slope in rows]).reshape(len(cases), len(names))
        weights = 1 / np.maximum(1.0, np.abs(errors) / (2 * noise)) / noise**2
        normal = (slopes * weights[:, None]).T @ slopes + np.eye(len(names)) / prior**2
        step = np.linalg.solve(normal, (slopes * weights[:, None]).T @ errors + logs / prior**2)
        logs = logs - step
        if np.max(np.abs(step), initial=0.0) < 1e-6:
            break
    return dict(zip(names, np.exp(logs).tolist(), strict=True))


def predicted(case: Case, factors: Mapping[str, float]) -> float:
    """Seconds of a case under `factors`; those that are not among them count 1."""
    scaled, before, _ = _scaled(case, factors)
    rest = case.terms.get(FOLLOWS, 0.0)
    total = sum(scaled.values())
    return total + (rest * total / before if before else rest)


def leave_out(
    cases: Sequence[Case], fitter: Callable[[Sequence[Case]], Mapping[str, float]] = fit
) -> dict[Hashable, list[float]]:
    """By group: predicted / measured - 1 of its cases, with factors fitted to all other groups."""
    groups = dict.fromkeys(case.group for case in cases)
    return {
        group: _errors([case for case in cases if case.group == group], fitter([c for c in cases if c.group != group]))
        for group in groups
    }


def _errors(cases: Sequence[Case], factors: Mapping[str, float]) -> list[float]:
    return [predicted(case, factors) / case.measured - 1 for case in cases]


def _scaled(case: Case, factors: Mapping[str, float]) -> tuple[dict[str, float], float, dict[str, float]]:
    """Terms as scaled, their sum before, and each term's factor; without the one that follows the others."""
    scaled: dict[str, float] = {}
    used: dict[str, float] = {}
    for term, seconds in case.terms.items():
        if term != FOLLOWS:
            used[term] = float(np.prod([factors.get(name, 1.0) for name in case.factors.get(term, ())]))
            scaled[term] = seconds * used[term]
    return scaled, sum(seconds for term, seconds in case.terms.items() if term != FOLLOWS), used


def _row(case: Case, factors: Mapping[str, float], names: Sequence[str]) -> tuple[float, Array]:
    """log(predicted / measured), and its slope in each factor's logarithm."""
    scaled, _, _ = _scaled(case, factors)
    total = sum(scaled.values())
    slope = np.zeros(len(names))
    for term, seconds in scaled.items():
        for name in case.factors.get(term, ()):
            slope[names.index(name)] += seconds / total
    return float(np.log(predicted(case, factors) / case.measured)), slope
