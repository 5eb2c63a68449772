"""What `fiveply bench` prints: the planner's score on a table of published measurements, of training or of serving."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fiveply.plan import inference_score
from fiveply.plan.score import RULES, Errors, Score
from fiveply.plan.table import Skipped


def show(score: Score, console: Console) -> None:
    """The score as tables: time and memory by stratum and source, sweeps, and what was skipped by which rule."""
    for title, whole in (("step time", score.time), ("memory", score.memory)):
        table = Table("", "rows", "MAPE", "bias", "in 10-90%", box=None, title=title, title_justify="left")
        for name, errors in {"all": whole, **whole.by_stratum, **whole.by_source}.items():
            table.add_row(name[:70], *_cells(errors))
        if whole.n or whole is score.time:
            console.print(table)
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
    title = "time per output token"
    table = Table("", "rows", "median", "MAPE", "bias", box=None, title=title, title_justify="left")
    whole = {"all": score.tpot} if score.tpot else {}
    for name, one in {**whole, **score.by_stratum, **score.by_source}.items():
        table.add_row(name, str(one.n), f"{one.median:.1%}", f"{one.mape:.1%}", f"{one.bias:+.1%}")
    console.print(table)
    _skipped(score.rows, score.skipped, inference_score.RULES, console)


def _skipped(rows: int, skipped: Sequence[Skipped], rules: Sequence[str], console: Console) -> None:
    console.print(f"{rows} rows, {len(skipped)} skipped. Rows are skipped where")
    for rule in rules:
        console.print(f"- {rule}")
    for skip in skipped:
        console.print(f"  row {skip.row}: {skip.reason}", style="dim")


def _cells(errors: Errors) -> tuple[str, str, str, str]:
    if errors.mape is None or errors.bias is None:
        return str(errors.n), "-", "-", "-"
    held = "-" if errors.coverage is None else f"{errors.coverage:.0%}"
    return str(errors.n), f"{errors.mape:.1%}", f"{errors.bias:+.1%}", held
