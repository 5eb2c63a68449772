"""What `fiveply bench` prints: the planner's score on a table of published measurements, of training or of serving."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fiveply.plan import inference_score
from fiveply.plan.score import RULES, Errors, Score
from fiveply.plan.table import Skipped

CELLS = {
    "median": ("median", ".1%"),
    "MAPE": ("mape", ".1%"),
    "bias": ("bias", "+.1%"),
    "in 10-90%": ("coverage", ".0%"),
}
"""Columns of errors: the field of each, and how it is written."""


def show(score: Score, console: Console) -> None:
    """The score as tables: time and memory by stratum and source, sweeps, and what was skipped by which rule."""
    for title, found in (("step time", score.time), ("memory", score.memory)):
        if found.n or found is score.time:
            columns = ("MAPE", "bias", "in 10-90%")
            _errors(title, {"all": found, **found.by_stratum, **found.by_source}, columns, console)
    if score.sweeps:
        sweeps = Table("sweep", "model", "layouts", "tau", "regret", box=None, title="ranking", title_justify="left")
        for sweep in score.sweeps:
            sweeps.add_row(sweep.source[:50], sweep.model, str(sweep.n), f"{sweep.tau:.2f}", f"{sweep.regret:.1%}")
        console.print(sweeps)
    risk = score.out_of_memory
    if risk.brier is not None:
        console.print(
            f"out of memory: Brier score {risk.brier:.3f} on {risk.n} rows that all ran, {risk.wrong} thought not to fit"
        )
    _skipped(score.rows, score.skipped, RULES, console)


def show_serving(score: inference_score.Score, console: Console) -> None:
    """Errors of the time per token by stratum and source, and what was skipped by which rule."""
    whole = {"all": score.tpot} if score.tpot else {}
    found = {**whole, **score.by_stratum, **score.by_source}
    _errors("time per output token", found, ("median", "MAPE", "bias"), console)
    _skipped(score.rows, score.skipped, inference_score.RULES, console)


def _errors(title: str, found: dict[str, Errors], columns: Sequence[str], console: Console) -> None:
    table = Table("", "rows", *columns, box=None, title=title, title_justify="left")
    for name, errors in found.items():
        values = [(getattr(errors, field), form) for field, form in map(CELLS.__getitem__, columns)]
        table.add_row(name[:70], str(errors.n), *("-" if v is None else f"{v:{form}}" for v, form in values))
    console.print(table)


def _skipped(rows: int, skipped: Sequence[Skipped], rules: Sequence[str], console: Console) -> None:
    console.print(f"{rows} rows, {len(skipped)} skipped. Rows are skipped where")
    for rule in rules:
        console.print(f"- {rule}")
    for skip in skipped:
        console.print(f"  row {skip.row}: {skip.reason}", style="dim")
