"""The planner's fitted constants, judged on sources that the fit did not see (leave one source out).

    python benchmarks/calibration.py [TABLE.csv ...]

Every constant that was fitted to step times is first set back to what it would be without any: clocks, products and network
at their isolated speed, memory-bound kernels as fused ones, no stragglers.
Which attention kernel a system has stays known. Then factors are fitted to the terms of all sources but one, and
that one is predicted: its system's own factors, and its device's, are known only as far as other sources share them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import calibrate
import msgspec
from calibrate import Case

from fiveply.plan import score, table
from fiveply.plan.machine import Machine
from fiveply.plan.predict import Job, predict
from fiveply.plan.software import Software
from fiveply.plan.table import Row
from fiveply.spec.errors import InputError

ISOLATED = {
    "products": 1.0,
    "memory_passes": 1.2,
    "straggle": 0.0,
    "network": 1.0,
    "experts_stall": 0.0,
}


def unfitted(row: Row) -> Job:
    """The row's job as it would be priced before any step time was seen."""
    job = row.job
    software: Software = msgspec.structs.replace(job.software, **ISOLATED)
    machine: Machine = msgspec.structs.replace(
        job.machine, clock=1.0, attention=msgspec.structs.replace(job.machine.attention, backward=0.8)
    )
    return msgspec.structs.replace(job, machine=machine, software=software)


def case(row: Row) -> Case | None:
    """None for a layout that is not legal. Factors: the device's speed of products; the system's elementwise kernels,
    attention, and what it leaves exposed of each axis."""
    if row.seconds is None or not row.layout.micro_batch:
        return None
    try:
        found = predict(unfitted(row), row.layout)
    except InputError:
        return None
    device, system = row.job.machine.name.split("-")[0], row.job.software.name
    kernel = "flash" if row.job.software.flash else "plain"
    factors = {
        "products": (f"products on {device}",),
        "recompute": (f"products on {device}",),
        "attention": (f"{kernel} attention on {device}", f"attention of {system}"),
        "elementwise": (f"elementwise of {system}",),
        "tp": (f"tp on {device}", f"tp of {system}"),
        "dp": (f"network on {device}",),
        "zero": (f"network on {device}", f"zero of {system}"),
        "launch": (f"host of {system}",),
    }
    return Case(found.terms, row.seconds, factors, row.source)


def main(tables: Sequence[str]) -> None:
    rows = [row for path in tables for row in table.read(path)[0] if row.stratum == "complete-16-bit"]
    cases = [one for row in rows if (one := case(row))]
    factors = calibrate.fit(cases)
    left = calibrate.leave_out(cases)
    seen = {
        source: [calibrate.predicted(one, factors) / one.measured - 1 for one in cases if one.group == source]
        for source in left
    }
    print(f"{'rows':>5} {'unfitted':>9} {'fitted':>8} {'left out':>9}  source")
    result: dict[str, dict[str, float]] = {}
    for source, errors in left.items():
        bare = [calibrate.predicted(one, {}) / one.measured - 1 for one in cases if one.group == source]
        figures = {"unfitted": _mape(bare), "fitted": _mape(seen[source]), "left_out": _mape(errors)}
        result[str(source)] = {"rows": len(errors), **figures}
        shown = " ".join(f"{value:{width}.1%}" for value, width in zip(figures.values(), (9, 8, 9), strict=True))
        print(f"{len(errors):5} {shown}  {str(source)[:80]}")
    every = [error for errors in left.values() for error in errors]
    mean = sum(figures["left_out"] for figures in result.values()) / len(result)
    print(f"{len(every):5} {'':18} {_mape(every):9.1%}  all rows; mean of sources {mean:.1%}")
    print(json.dumps({"factors": {name: round(value, 3) for name, value in factors.items()}, "sources": result}))


def _mape(errors: Sequence[float]) -> float:
    return sum(map(abs, errors)) / len(errors)


if __name__ == "__main__":
    main(sys.argv[1:] or [score.published()])
