"""Serving systems' constants, fitted to published times per token and judged on models that the fit did not see.

    python benchmarks/serving_calibration.py published_inference.csv

Without a fit all factors (`software.Serving`, `Machine.experts`) are 1. A term's factor is one that all systems share times the
system's own, so that what one system's rows say counts for the others too; experts have one by the device's generation. All are held
near 1 as if each row were a tenth of one, since rows of a source err alike. A source here is a model under a system, on whatever devices.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import calibrate
import msgspec
from calibrate import Case

from fiveply.plan import inference_score
from fiveply.plan.inference_score import Row
from fiveply.plan.software import Serving

FIELDS = ("products", "experts", "attention", "launch", "collectives", "host", "requests", "prefill")
"""Terms of a prediction and fields of `Serving`."""
GENERATIONS = {
    "a100-80": "Ampere",
    "h100": "Hopper",
    "h200": "Hopper",
    "b200": "Blackwell",
    "b300": "Blackwell",
    "gb200": "Blackwell",
}


def case(row: Row) -> Case:
    software = msgspec.structs.replace(row.served.software, serving=Serving())
    machine = msgspec.structs.replace(row.served.machine, experts=1.0)
    plain = msgspec.structs.replace(row, served=msgspec.structs.replace(row.served, software=software, machine=machine))
    factors = {term: (term, f"{software.name} {term}") for term in FIELDS}
    factors["experts"] += (f"{GENERATIONS[machine.name]} experts",)
    return Case(
        inference_score.predicted(plain).terms, row.seconds, factors, f"{software.name}: {row.source.split(' on ')[0]}"
    )


def fit(cases: Sequence[Case]) -> dict[str, float]:
    return calibrate.fit(cases, prior=0.035, noise=0.1)


def main(path: str, every: int = 1) -> None:
    cases = [case(row) for row in inference_score.read(path)[0][::every]]
    factors = fit(cases)
    print(f"{'rows':>5} {'unfitted':>9} {'fitted':>9} {'left out':>9}  source (median error)")
    whole: list[tuple[float, float, float]] = []
    for group, left in sorted(calibrate.leave_out(cases, fit).items(), key=lambda item: str(item[0])):
        found = [
            (abs(calibrate.predicted(one, {}) / one.measured - 1), abs(calibrate.predicted(one, factors) / one.measured - 1), abs(out))
            for one, out in zip((one for one in cases if one.group == group), left, strict=True)
        ]  # fmt: skip
        whole += found
        print(f"{len(found):5} {_medians(found)}  {group}")
    print(f"{len(whole):5} {_medians(whole)}  all")
    for system in sorted({str(one.group).split(":")[0] for one in cases}):
        values = {term: factors[term] * factors[f"{system} {term}"] for term in FIELDS if f"{system} {term}" in factors}
        print(f"{system}: " + ", ".join(f"{term} = {value:.2f}" for term, value in values.items()))
    print({name: round(value, 2) for name, value in factors.items() if name.split()[0] in GENERATIONS.values()})
    print("all systems: " + ", ".join(f"{term} = {factors[term]:.2f}" for term in FIELDS))


def _medians(found: Sequence[tuple[float, float, float]]) -> str:
    return " ".join(f"{statistics.median(column):9.1%}" for column in zip(*found, strict=True))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
