"""The planner's predictions against published measurements: errors, coverage, ranking, by source and stratum.

Each prediction is made as `fiveply plan` makes it, from the row's model, layout, devices and system; nothing of what a row
measured is used.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from fiveply.plan import cost, table
from fiveply.plan.predict import Prediction, predict
from fiveply.plan.table import Row, Skipped
from fiveply.spec.errors import InputError
from fiveply.spec.layout import divisors
from fiveply.spec.plan import Interval

RULES = (
    "a size without which nothing can be counted is missing: layers, hidden, heads, vocabulary, sequence, batch, devices",
    "neither time nor memory was measured",
    "no pretraining step: fine-tuning on packed rows, adapters, a single layer",
    "the device, the precision or the layout is unknown or impossible",
)
"""Why rows are skipped."""
SWEEP = 4
"""Rows that make a sweep."""


class Scored(msgspec.Struct, frozen=True):
    """One prediction. Seconds and bytes are null where the row measured none."""

    row: int
    source: str
    stratum: str
    measured_seconds: float | None
    predicted_seconds: Interval | None
    measured_bytes: float | None
    predicted_bytes: float | None
    predicted_bytes_range: tuple[float, float] | None
    """10 and 90%."""


class Compared(NamedTuple):
    """A measurement and its prediction. `held`: whether the 10-90% interval holds it, None where there is none."""

    source: str
    stratum: str
    measured: float
    predicted: float
    held: bool | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class Errors(msgspec.Struct, frozen=True):
    """Over `n` rows: mean and median of |predicted / measured - 1|, mean of predicted / measured - 1, and the share of
    measurements that the 10-90% interval holds; null where there is none."""

    mape: float | None
    bias: float | None
    n: int
    coverage: float | None
    median: float | None


class Group(Errors, frozen=True):
    by_source: dict[str, Errors]
    by_stratum: dict[str, Errors]


class Sweep(msgspec.Struct, frozen=True):
    """Layouts of one job. `tau`: Kendall's tau-b of predicted and measured; `regret`: how much slower than the fastest the
    layout is that was predicted fastest."""

    source: str
    model: str
    n: int
    tau: float
    regret: float


class Risk(msgspec.Struct, frozen=True):
    """Predicted probabilities of running out of memory, of `n` rows that all ran: the mean of their squares (Brier's score), and
    how many exceed one half."""

    brier: float | None
    n: int
    wrong: int


class Score(msgspec.Struct, frozen=True):
    rows: int
    skipped: list[Skipped]
    time: Group
    memory: Group
    sweeps: list[Sweep]
    predictions: list[Scored]
    out_of_memory: Risk


def score(path: str | Path = "") -> Score:
    """Score on the table at `path`, by default the shipped one. Raises InputError for what is no table."""
    rows, skipped = table.read(path or published())
    count = len(rows) + len(skipped)
    scored: list[Scored] = []
    risks: list[float] = []
    times: list[Compared] = []
    memories: list[Compared] = []
    sweeps: dict[tuple[str, ...], list[Compared]] = defaultdict(list)
    for row in rows:
        try:
            prediction = predicted(row)
        except InputError as error:
            skipped.append(Skipped(row.number, str(error)))
            continue
        risks.append(prediction.p_oom)
        seconds = memory = within = None
        if row.seconds:
            seconds = prediction.seconds
            held = seconds.p10 <= row.seconds <= seconds.p90
            times.append(Compared(row.source, row.stratum, row.seconds, seconds.p50, held))
            sweeps[row.sweep].append(times[-1])
        if row.bytes:
            memory = _bytes(row, prediction)
            width = math.exp(cost.NINETIETH * row.job.software.memory_spread)
            within = memory / width, memory * width
            held = within[0] <= row.bytes <= within[1]
            memories.append(Compared(row.source, row.stratum, row.bytes, memory, held))
        scored.append(Scored(row.number, row.source, row.stratum, row.seconds, seconds, row.bytes, memory, within))
    return Score(
        rows=count,
        skipped=sorted(skipped, key=lambda skip: skip.row),
        time=_group(times),
        memory=_group(memories),
        sweeps=[_sweep(key, some) for key, some in sweeps.items() if len(some) >= SWEEP],
        predictions=scored,
        out_of_memory=Risk(
            sum(risk**2 for risk in risks) / len(risks) if risks else None,
            len(risks),
            sum(risk > 0.5 for risk in risks),
        ),
    )


def published() -> str:
    """Path of the shipped table."""
    return str(resources.files("fiveply.plan").joinpath("published.csv"))


def predicted(row: Row) -> Prediction:
    """The row's prediction; where it does not say its micro-batch, the fastest that fits is taken. Raises InputError for a
    layout that is none."""
    job, layout = row.job, row.layout
    if layout.micro_batch:
        return predict(job, layout)
    sizes = [size for size in divisors(max(1, job.global_batch // layout.dp)) if size <= 16]
    tried = [predict(job, msgspec.structs.replace(layout, micro_batch=size)) for size in sizes]
    fitting = [one for one in tried if one.p_oom < 0.5]
    return min(fitting or tried, key=lambda one: one.seconds.p50)


def _bytes(row: Row, prediction: Prediction) -> float:
    ranks = prediction.memory_bytes
    allocated = (ranks[-1] if row.last_rank else max(ranks)) + row.job.machine.workspace_bytes
    return allocated * RESERVED if row.reserved else allocated


RESERVED = 1.05
"""Reserved over allocated memory: mean of 43 published runs, which span 1.03 to 1.09."""


def errors(found: Sequence[Compared]) -> Errors:
    if not found:
        return Errors(None, None, 0, None, None)
    off = [one.error for one in found]
    held = [one.held for one in found if one.held is not None]
    sizes = list(map(abs, off))
    return Errors(
        mape=sum(sizes) / len(found),
        bias=sum(off) / len(found),
        n=len(found),
        coverage=sum(held) / len(held) if held else None,
        median=statistics.median(sizes),
    )


def errors_by(found: Iterable[Compared], key: Callable[[Compared], str]) -> dict[str, Errors]:
    groups: dict[str, list[Compared]] = defaultdict(list)
    for one in found:
        groups[key(one)].append(one)
    return {name: errors(some) for name, some in sorted(groups.items())}


def _group(found: Sequence[Compared]) -> Group:
    by_source, by_stratum = (errors_by(found, attrgetter(key)) for key in ("source", "stratum"))
    return Group(**msgspec.structs.asdict(errors(found)), by_source=by_source, by_stratum=by_stratum)


def _sweep(key: tuple[str, ...], found: Sequence[Compared]) -> Sweep:
    pairs = [(one.measured, one.predicted) for one in found]
    return Sweep(key[0], key[1], len(pairs), kendall(pairs), min(pairs, key=lambda p: p[1])[0] / min(pairs)[0] - 1)


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau-b: concordant less discordant pairs, ties corrected for; 0 where one side is all ties."""
    one, other = (np.sign(np.subtract.outer(values, values)) for values in np.array(pairs).T)
    untied = float((one**2).sum() * (other**2).sum())
    return float((one * other).sum()) / math.sqrt(untied) if untied else 0.0
