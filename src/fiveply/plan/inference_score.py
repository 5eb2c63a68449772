"""The serving predictions against published measurements: time per output token, by source.

Columns are those of `published_inference.csv`: model, gpu, backend, precision, isl, osl, concurrency, tp, dp_attention, moe_tp,
moe_ep, tpot_ms. What a row measured is used for nothing but the comparison.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fiveply.plan import inference, table
from fiveply.plan import machine as machines
from fiveply.plan import software as systems
from fiveply.plan.inference import Load, Served
from fiveply.plan.score import errors
from fiveply.plan.table import RowError, Skipped
from fiveply.spec.architecture import Experts, ModelSpec
from fiveply.spec.errors import InputError
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
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama-3.1-8b", {}),
    "llama-3.1-70b": ("llama-3.1-70b", {}),
    "llama-3.3-70b": ("llama-3.1-70b", {}),
    "llama-3.1-405b": ("llama-3.1-405b", {}),
    "qwen3-235b-a22b": ("qwen3-235b-a22b", {}),
    "qwen3-32b": ("qwen3-8b", {"hidden": 5120, "layers": 64, "heads": 64, "ffn": 25600}),
    "gpt-oss-120b": ("gpt-oss-120b", {}),
    "deepseek-r1": ("deepseek-v3", {"predicted": 1}),
    "deepseek-v3": ("deepseek-v3", {"predicted": 1}),
    "kimi-k2.5": ("deepseek-v3", {
        "predicted": 1, "vocabulary": 163840, "heads": 64, "kv_heads": 64,
        "experts": Experts(384, 8, 2048, tuple(range(1, 61)), shared_ffn=2048),
    }),
    "minimax-m2.5": ("qwen3-235b-a22b", {
        "vocabulary": 200064, "hidden": 3072, "layers": 62, "heads": 48, "kv_heads": 8,
        "experts": Experts(256, 8, 1536, tuple(range(62))),
    }),
}  # fmt: skip
"""Models of such tables as presets with other sizes, from their config.json (Hugging Face, 2025-2026)."""
SYSTEMS = {"trtllm": "trtllm", "vllm": "vllm", "sglang": "sglang"}


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


class Errors(msgspec.Struct, frozen=True):
    """Of `n` rows: median and mean of |predicted / measured - 1|, and the mean of predicted / measured - 1."""

    median: float
    mape: float
    bias: float
    n: int


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
    rows: list[Row] = []
    skipped: list[Skipped] = []
    seen: set[tuple[Any, ...]] = set()
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, record in enumerate(csv.DictReader(file), 1):
            try:
                row = _row(number, defaultdict(str, {k: (v or "").strip() for k, v in record.items() if k}))
                key = (row.served, row.layout, row.load, row.requests, row.seconds)
                if key in seen:
                    raise RowError("repeats an earlier row")
                seen.add(key)
                rows.append(row)
            except (RowError, InputError) as error:
                skipped.append(Skipped(number, str(error)))
    return rows, skipped


def _row(number: int, record: dict[str, str]) -> Row:
    milliseconds = _number(record, "tpot_ms")
    if not milliseconds:
        raise RowError("no time per token")
    if record["mode"] == "disagg":
        raise RowError("disaggregated: requests decoded together are not said")
    served, name = _served(record)
    layout = _layout(record, served)
    clients, load = _number(record, "concurrency"), Load(_number(record, "isl"), _number(record, "osl"))
    requests = max(1, round(clients / layout.dp))
    held = inference.held_requests(served, layout, load)
    if requests > held:
        raise RowError(f"memory holds {held} of {requests} requests")
    system = record["backend"].split()[0]
    return Row(
        number, f"{name} on {served.machine.name}, {system}, {served.precision}",
        "experts" if served.spec.experts else "dense", served, layout, load, requests, float(milliseconds) / 1e3,
    )  # fmt: skip


def _served(record: dict[str, str]) -> tuple[Served, str]:
    name = record["model"].rpartition("/")[2].lower()
    name = re.sub(r"-(instruct|fp8|nvfp4)", "", name).replace("v3.1", "v3")
    if name not in SPECS:
        raise RowError(f"model '{record['model']}' is not counted")
    if record["backend"].split(" ")[0] not in SYSTEMS:
        raise RowError(f"system '{record['backend']}' is unknown")
    preset, changes = SPECS[name]
    spec = msgspec.structs.replace(ModelSpec.load(preset), **changes)
    kind, system = table.device(record["gpu"]), systems.load(record["backend"].split(" ")[0])
    precision = {"": "bf16", "int4": "fp4"}.get(record["precision"], record["precision"])
    return Served(spec, machines.load(kind), system, precision, 2 if precision == "bf16" else 1), name


def _layout(record: dict[str, str], served: Served) -> Layout:
    """Ranks that compute attention (tp each, dp_attention groups) and those that share experts are the same."""
    tp, dp, devices = (_number(record, key) for key in ("tp", "dp_attention", "num_gpus"))
    dp, pp = max(1, dp), max(1, _number(record, "pp"))
    ep, etp = max(1, _number(record, "moe_ep")), max(1, _number(record, "moe_tp"))
    experts = served.spec.experts is not None
    if tp * dp * pp != devices or (experts and ep * etp != tp * dp):
        raise RowError(f"{devices} devices, tp={tp}, dp={dp}, experts over {ep} x {etp} contradict each other")
    if tp * dp > served.machine.joined:
        raise RowError(f"{tp * dp} ranks leave the fast links of {served.machine.joined}")
    layout = Layout(dp=dp, tp=tp, pp=pp, sp=0, ep=ep if experts else 1, etp=min(etp, tp) if experts else 0)
    return resolve(layout, served.spec, sequence=1, global_batch=dp, runtime=False)


def _number(record: dict[str, str], key: str) -> Any:
    text = record[key]
    try:
        return float(text) if key == "tpot_ms" and text else int(float(text)) if text else 0
    except ValueError:
        raise RowError(f"{key}: '{text}' is not a number") from None


def predicted(row: Row) -> inference.Latency:
    return inference.closed(row.served, row.layout, row.load, row.requests)


def score(path: str | Path) -> Score:
    rows, skipped = read(path)
    scored: list[Scored] = []
    for row in rows:
        found = predicted(row)
        scored.append(Scored(row.number, row.source, row.stratum, row.seconds, found.tpot, found.terms))

    def split(key: Callable[[Scored], str]) -> dict[str, Errors]:
        parts: dict[str, list[Scored]] = defaultdict(list)
        for one in scored:
            parts[key(one)].append(one)
        return {name: summary(many) for name, many in sorted(parts.items())}

    return Score(
        len(rows) + len(skipped), skipped, summary(scored) if scored else None, split(lambda one: one.source),
        split(lambda one: one.stratum), scored,
    )  # fmt: skip


def summary(scored: list[Scored]) -> Errors:
    found = errors([(one.measured_seconds, one.predicted_seconds, None) for one in scored])
    middle = statistics.median(abs(one.predicted_seconds / one.measured_seconds - 1) for one in scored)
    return Errors(middle, found.mape or 0.0, found.bias or 0.0, found.n)
