"""The serving predictions against published measurements: time per output token, by source.

Columns are those of `published_inference.csv`: model, gpu, backend, precision, isl, osl, concurrency, tp, dp_attention, moe_tp,
moe_ep, tpot_ms. What a row measured is used for nothing but the comparison.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Hashable
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from fiveply.plan import inference, table
from fiveply.plan import machine as machines
from fiveply.plan import software as systems
from fiveply.plan.inference import Load, Served
from fiveply.plan.score import Compared, Errors, errors, errors_by
from fiveply.plan.table import Record, RowError, Skipped, number_in, rows_of, whole_in
from fiveply.spec.architecture import Experts, ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve

NEEDED = ("source", "model", "gpu", "backend", "isl", "osl", "concurrency", "tp", "tpot_ms")
"""Columns by which such a table is known."""
RULES = (
    "no time per token was measured",
    "prompts and answers were computed by ranks of their own (disaggregated): how many requests a rank decodes is not said",
    "the model's attention is none that the planner counts, or its device or system has no file",
    "the layout contradicts itself (attention ranks are not expert ranks, or no device), is illegal, or leaves a host's fast links",
    "memory does not hold as many requests as there were clients: how many were decoded together is not said",
    "it repeats an earlier row",
)
"""Why rows are skipped."""
SYSTEMS = ("trtllm", "vllm", "sglang")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of `served.toml`."""

    preset: str
    sizes: dict[str, int] = {}
    experts: dict[str, int] = {}
    dense: int = 0

    def spec(self) -> ModelSpec:
        spec = msgspec.structs.replace(ModelSpec.load(self.preset), **self.sizes)
        if not self.experts:
            return spec
        experts: dict[str, Any] = {**self.experts, "layers": tuple(range(self.dense, spec.layers))}
        return msgspec.structs.replace(spec, experts=Experts(**experts))


MODELS = msgspec.toml.decode(
    resources.files("fiveply.plan").joinpath("served.toml").read_bytes(), type=dict[str, Model]
)


class Row(msgspec.Struct, frozen=True):
    """One measurement. `requests`: of each rank group that computes attention together."""

    number: int
    source: str
    stratum: str
    served: Served
    layout: Layout
    load: Load
    requests: int
    seconds: float


class Scored(msgspec.Struct, frozen=True):
    row: int
    source: str
    stratum: str
    measured_seconds: float
    predicted_seconds: float
    terms: dict[str, float]


class Score(msgspec.Struct, frozen=True):
    rows: int
    skipped: list[Skipped]
    tpot: Errors | None
    by_source: dict[str, Errors]
    by_stratum: dict[str, Errors]
    predictions: list[Scored]


def is_table(path: str | Path) -> bool:
    """Whether the CSV file at `path` has the columns of this score."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return set(NEEDED) <= set(next(csv.reader(file), list[str]()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def read(path: str | Path) -> tuple[list[Row], list[Skipped]]:
    """Rows that can be predicted, and the others with the reason. Raises InputError where the file is no such table."""
    first: dict[Hashable, int] = {}

    def row(number: int, record: Record) -> Row:
        found = _row(number, record)
        if first.setdefault((found.served, found.layout, found.load, found.requests, found.seconds), number) < number:
            raise RowError("repeats an earlier row")
        return found

    return rows_of(path, NEEDED, row)


def _row(number: int, record: Record) -> Row:
    milliseconds = number_in(record, "tpot_ms")
    if not milliseconds:
        raise RowError("no time per token")
    if record["mode"] == "disagg":
        raise RowError("disaggregated: requests decoded together are not said")
    served, name = _served(record)
    layout = _layout(record, served)
    load = Load(whole_in(record, "isl"), whole_in(record, "osl"))
    requests = max(1, round(whole_in(record, "concurrency") / layout.dp))
    held = inference.held_requests(served, layout, load)
    if requests > held:
        raise RowError(f"memory holds {held} of {requests} requests")
    return Row(
        number, f"{name} on {served.machine.name}, {served.software.name}, {served.precision}",
        "experts" if served.spec.experts else "dense", served, layout, load, requests, milliseconds / 1e3,
    )  # fmt: skip


def _served(record: Record) -> tuple[Served, str]:
    name, backend = record["model"].rpartition("/")[2].lower(), record["backend"].partition(" ")[0]
    name = re.sub(r"-(instruct|fp8|nvfp4)", "", name).replace("v3.1", "v3")
    if name not in MODELS:
        raise RowError(f"model '{record['model']}' is not counted")
    if backend not in SYSTEMS:
        raise RowError(f"system '{record['backend']}' is unknown")
    precision = {"": "bf16", "int4": "fp4"}.get(record["precision"], record["precision"])
    machine = machines.load(table.device(record["gpu"]))
    return Served(MODELS[name].spec(), machine, systems.load(backend), precision, 2 if precision == "bf16" else 1), name


def _layout(record: Record, served: Served) -> Layout:
    """Ranks that compute attention (tp each, dp_attention groups) and those that share experts are the same."""
    tp, devices = whole_in(record, "tp"), whole_in(record, "num_gpus")
    dp, pp, ep, etp = (whole_in(record, key, 1) for key in ("dp_attention", "pp", "moe_ep", "moe_tp"))
    experts = served.spec.experts is not None
    if tp * dp * pp != devices or (experts and ep * etp != tp * dp):
        raise RowError(f"{devices} devices, tp={tp}, dp={dp}, experts over {ep} x {etp} contradict each other")
    if tp * dp > served.machine.joined:
        raise RowError(f"{tp * dp} ranks leave the fast links of {served.machine.joined}")
    layout = Layout(dp=dp, tp=tp, pp=pp, sp=0, ep=ep if experts else 1, etp=min(etp, tp) if experts else 0)
    return resolve(layout, served.spec, sequence=1, global_batch=dp, runtime=False)


def predicted(row: Row) -> inference.Latency:
    return inference.closed(row.served, row.layout, row.load, row.requests)


def score(path: str | Path) -> Score:
    rows, skipped = read(path)
    scored: list[Scored] = []
    compared: list[Compared] = []
    for row in rows:
        found = predicted(row)
        scored.append(Scored(row.number, row.source, row.stratum, row.seconds, found.tpot, found.terms))
        compared.append(Compared(row.source, row.stratum, row.seconds, found.tpot))
    by_source, by_stratum = (errors_by(compared, attrgetter(key)) for key in ("source", "stratum"))
    tpot = errors(compared) if compared else None
    return Score(len(rows) + len(skipped), skipped, tpot, by_source, by_stratum, scored)
