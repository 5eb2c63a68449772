"""A recorded step beside what the planner expected of it, and which term is wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

from fiveply import timeline
from fiveply.report.record import Facts
from fiveply.timeline import RecordedStep

WORDS = {
    "compute": "computing", "communication": "exposed communication", "bubble": "bubble", "optimizer": "optimiser",
    "rest": "data, sums and the rest",
}  # fmt: skip


class Term(NamedTuple):
    """Seconds of a step; `wrong` marks the term that differs most, where it differs by a twentieth of the step."""

    name: str
    predicted: float
    measured: float
    wrong: bool


def measured(recorded: RecordedStep) -> dict[str, float]:
    """Seconds by share, of the rank that computed longest; reading data among the rest."""
    found = max(timeline.shares(recorded).values(), key=lambda shares: shares["compute"])
    return {name: found[name] + (found["data"] if name == "rest" else 0.0) for name in WORDS}


def terms(facts: Facts, recorded: RecordedStep) -> list[Term]:
    """Empty where nothing was predicted, or another layout."""
    if facts.predicted is None or facts.layout != recorded.layout:
        return []
    truth, expected = measured(recorded), facts.predicted.shares
    worst = max(WORDS, key=lambda name: abs(truth[name] - expected.get(name, 0.0)))
    apart = abs(truth[worst] - expected.get(worst, 0.0)) >= recorded.seconds / 20
    return [Term(WORDS[name], expected.get(name, 0.0), truth[name], apart and name == worst) for name in WORDS]


def values(facts: Facts, recorded: RecordedStep) -> dict[str, Any]:
    """For the page."""
    found = terms(facts, recorded)
    predicted = sum(term.predicted for term in found)
    return {
        "terms": found,
        "predicted": predicted,
        "measured": recorded.seconds,
        "error": predicted / recorded.seconds - 1 if found else 0.0,
        "wrong": next((term.name for term in found if term.wrong), ""),
    }
