"""What `fiveply bench` prints: the planner's score on a table of published measurements."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fiveply.plan.score import RULES, Errors, Score


def show(score: Score, console: Console) -> None:
    """The score as tables: time and memory by stratum and source, sweeps, and what was skipped by which rule."""
    table = Table("", "rows", "MAPE", "bias", "in 10-90%", box=None, title="step time", title_justify="left")
    table.add_row("all", *_cells(score.time))
    for name, errors in {**score.time.by_stratum, **score.time.by_source}.items():
        table.add_row(name[:70], *_cells(errors))
    console.print(table)
    if score.memory.n:
        memory = Table("", "rows", "MAPE", "bias", "in 10-90%", box=None, title="memory", title_justify="left")
        for name, errors in {"all": score.memory, **score.memory.by_stratum, **score.memory.by_source}.items():
            memory.add_row(name[:70], *_cells(errors))
        console.print(memory)
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
    console.print(f"{score.rows} rows, {len(score.skipped)} skipped. Rows are skipped where")
    for rule in RULES:
        console.print(f"- {rule}")
    for skip in score.skipped:
        console.print(f"  row {skip.row}: {skip.reason}", style="dim")


def _cells(errors: Errors) -> tuple[str, str, str, str]:
    if errors.mape is None or errors.bias is None:
        return str(errors.n), "-", "-", "-"
    held = "-" if errors.coverage is None else f"{errors.coverage:.0%}"
    return str(errors.n), f"{errors.mape:.1%}", f"{errors.bias:+.1%}", held
