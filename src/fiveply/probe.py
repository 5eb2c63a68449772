"""probe: measure this machine and fit the planner's model of it, for `--cluster FILE` and `layout = "auto"`.

Ranks as many as there are devices measure at the same time (`train/measure.py`); on CPUs also one, half as many, and twice as
many, since they slow each other down in ways that no one rank shows. The fit is by least squares of the logarithm, on
the very functions that plan (`plan/cost.py`).
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fiveply.plan import cost, explain, table, traffic, workload
from fiveply.plan.machine import Machine, Passes
from fiveply.plan.operations import Operation
from fiveply.plan.parts import Case
from fiveply.report import expected, timelines
from fiveply.report.record import load
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.train import auto, measure, metrics
from fiveply.train.measure import SEQUENCE, Measured
from fiveply.world.device import Devices, find
from fiveply.world.launch import launch
from fiveply.world.mesh import Transport

BUDGET, ROUNDS = 0.03, 3
"""Seconds for one figure, and how often all are taken: a world takes about half a minute."""
LEAST_SPREAD = 0.03
"""Of the intervals on a measured machine: what steps vary by from round to round."""
PHASES = ("forward", "input", "weight", "step")
SIMPLICES = 400
"""Steps of a fit."""
Pairs = list[tuple[float, float]]


def probe(out: str | Path = auto.MEASURED, *, transport: Transport = "auto") -> dict[str, Any]:
    """Measure, fit, write `out`; returns the cluster's values and how well they fit. Collective where ranks were started."""
    begun, found = time.perf_counter(), find()
    if not Path(out).resolve().parent.is_dir():
        raise InputError("no such folder", where="--out", key=str(out), fix="make it first, or give another place")
    worlds = (
        [found.count] if found.kind == "cuda" else sorted({1, max(1, found.count // 2), found.count, 2 * found.count})
    )
    dtypes = ["float32", "bfloat16"] if found.fast_bf16 else ["float32"]
    device = torch.device("cuda", 0) if found.kind == "cuda" else torch.device("cpu")
    shared: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, float]] = {}
    for ranks in worlds:
        print(f"measuring with {ranks} rank{'s' * (ranks > 1)}", file=sys.stderr)
        rounds = ROUNDS if ranks <= found.count else 1  # ranks that share a core are slow
        measured = launch(measure.measure, ranks, dtypes, dtypes[-1], transport, device, BUDGET, rounds)
        machine, off = fit(measured, found, dtypes[-1])
        shared[str(ranks)] = _changed(machine)
        errors[str(ranks)] = off
    main = shared[str(found.count)]
    cluster = ClusterSpec(
        _kind(found), found.count, found.count, found.memory_bytes, main,
        shared if found.kind == "cpu" else {},
    )  # fmt: skip
    cluster.save(out)
    return {
        "cluster": str(out), "devices": found.count, "name": found.name, "seconds": time.perf_counter() - begun,
        "errors": errors, **msgspec.to_builtins(cluster),
    }  # fmt: skip


def recalibrate(run: Path) -> str:
    """Correct what `auto` plans with by the newest recorded step of a run; says what was changed. Raises InputError for a run
    that has none, or of which nothing was predicted."""
    record, steps = load(run), timelines.chosen(run)
    step = next((step for step in steps if step.layout == record.facts.layout), None)
    if step is None or record.facts.predicted is None:
        raise InputError("no step of its layout was recorded and predicted", where=str(run), key="--recalibrate",
                         fix="train it anew with train.record on a device that the planner knows")  # fmt: skip
    return auto.recalibrate(expected.measured(step), record.facts.predicted.shares, record.facts.world)


def _changed(machine: Machine) -> dict[str, Any]:
    """Keys of a hardware file, without what the cluster says itself."""
    values = msgspec.to_builtins(machine)
    return {key: value for key, value in values.items() if key not in ("name", "devices_per_node")}


def _kind(found: Devices) -> str:
    """Whose file says what is not measured: the device's own, or for a GPU that has none an A100's."""
    try:
        return "cpu" if found.kind == "cpu" else table.device(found.name)
    except table.RowError:
        return "a100-80"


def fit(measured: Measured, found: Devices, computed: str) -> tuple[Machine, dict[str, float]]:
    """A rank's share of the machine, as the planner sees it, and the mean error of each kind of figure in the fit."""
    base = cost.machine(ClusterSpec(_kind(found), found.count))
    memory = found.memory_bytes * (max(1, found.count // measured.ranks) if found.kind == "cpu" else 1)
    if measured.ranks > found.count:
        memory = memory * found.count // measured.ranks
    machine = msgspec.structs.replace(
        base, memory_bytes=memory, bandwidth=measured.bandwidth, launch=measured.launch, host=0.0,
        sources={"all": f"fiveply probe, {measured.ranks} ranks of {measured.threads} threads, {found.name}"},
    )  # fmt: skip
    errors: dict[str, float] = {}
    for name, samples in measured.products.items():
        kind = auto.precision(getattr(torch, name))
        machine, errors[f"products {kind}"] = _fit_products(machine, kind, samples)
    precision = auto.precision(getattr(torch, computed))
    machine, errors["attention"] = _fit_attention(machine, precision, measured)
    if measured.calls:
        machine, errors["collectives"] = _fit_calls(machine, measured)
    machine, errors["steps"] = _fit_steps(machine, precision, measured)
    machine = msgspec.structs.replace(machine, spread=max(LEAST_SPREAD, errors["steps"]))
    return _with_waits(machine, precision, measured), errors


def _fit_products(
    machine: Machine, precision: str, samples: list[tuple[int, int, int, float]]
) -> tuple[Machine, float]:
    peak = max(2.0 * m * n * k / seconds for m, n, k, seconds in samples)
    speed = machine.product(precision)

    def of(x: Sequence[float]) -> Machine:
        efficiency, prologue, small_tile, start, share = x
        new = msgspec.structs.replace(
            speed, efficiency=efficiency, prologue=prologue, small_tile=small_tile, launch=start, memory=share,
            quantisation=0.0,
        )  # fmt: skip
        return msgspec.structs.replace(
            machine, peak=machine.peak | {precision: peak}, products=machine.products | {precision: new}
        )

    def pairs_of(tried: Machine) -> Pairs:
        return [(cost.product_seconds(m, n, k, tried, precision), seconds) for m, n, k, seconds in samples]

    least = min(seconds for *_, seconds in samples)
    return _fitted(of, pairs_of, [0.95, 32.0, 0.05, 0.3 * least, 0.7],
                   [(0.3, 1.2), (0, 2000), (0, 0.6), (1e-7, 2 * least), (0.05, 3.0)])  # fmt: skip


def _fit_attention(machine: Machine, precision: str, measured: Measured) -> tuple[Machine, float]:
    software = explain.software(precision)
    samples: list[tuple[Operation, float]] = []
    for rows, sequence, heads, size, forward, backward in measured.attention:
        pairs = rows * workload.seen(sequence, 0)
        shape = (rows, sequence, sequence, heads, heads, size, size, 0)
        samples.append(
            (Operation("attention", "attention", "forward", "core", shape, 4 * pairs * heads * size, 0), forward)
        )
        samples.append(
            (Operation("attention", "attention", "input", "core", shape, 10 * pairs * heads * size, 0), backward)
        )

    def of(x: Sequence[float]) -> Machine:
        efficiency, half_sequence, half_head, start, backward = x
        new = msgspec.structs.replace(
            machine.attention, efficiency=efficiency, half_sequence=half_sequence, half_head=half_head, launch=start,
            backward=backward,
        )  # fmt: skip
        return msgspec.structs.replace(machine, attention=new)

    def pairs_of(tried: Machine) -> Pairs:
        return [(cost.attention_seconds(one, tried, software, precision), seconds) for one, seconds in samples]

    return _fitted(of, pairs_of, [0.4, 64.0, 16.0, 5e-5, 0.8],
                   [(0.01, 2.0), (1, 2000), (1, 200), (1e-6, 1e-2), (0.1, 3.0)])  # fmt: skip


def _fit_calls(machine: Machine, measured: Measured) -> tuple[Machine, float]:
    """Each operation's start and bandwidth; all-to-all, which the runtime does not call yet, as all-gather."""
    links = dict(machine.link)
    errors: list[float] = []
    for name, samples in measured.calls.items():
        fitted, error = _fit_call(machine, name, samples, 2 if name == "send" else measured.ranks)
        links[name] = fitted.link[name]
        errors.append(error)
    links["all-to-all"] = links["all-gather"]
    network = msgspec.structs.replace(links["all-reduce"])
    return msgspec.structs.replace(machine, link=links, network=network), float(np.mean(errors))


def _fit_call(machine: Machine, name: str, samples: list[tuple[int, float]], ranks: int) -> tuple[Machine, float]:
    def of(x: Sequence[float]) -> Machine:
        start, bandwidth, half = x
        link = msgspec.structs.replace(
            machine.link[name], start=start, hop=0.0, loss=0.0, bandwidth=bandwidth, half=half
        )
        return msgspec.structs.replace(machine, link=machine.link | {name: link})

    def pairs_of(tried: Machine) -> Pairs:
        return [(cost.call_seconds(name, size, ranks, tried, 1), seconds) for size, seconds in samples]

    start, speed = samples[0][1], samples[-1][0] / samples[-1][1]
    return _fitted(of, pairs_of, [start, speed, 1e-6],
                   [(start / 10, 3 * start), (speed / 10, 30 * speed), (0.0, 1e-2)])  # fmt: skip


def _with_waits(machine: Machine, precision: str, measured: Measured) -> Machine:
    """Ranks that compute between their collectives come to each at different times: by the median, what a call takes longer
    then than among ranks that do nothing else."""
    longer = [0.0]
    for hidden, layers, rows, seconds in measured.waits:
        spec = measure.model(hidden, layers)
        layout = resolve(Layout(tp=measured.ranks), spec, sequence=SEQUENCE, global_batch=rows)
        calls = [
            call
            for part in workload.parts(spec, layout.stages, 0)
            for call in traffic.part_traffic(Case(spec, SEQUENCE, explain.software(precision), precision), layout, part)
        ]
        alone = sum(call.count * cost.call_seconds(call.operation, call.bytes, call.size, machine, 1) for call in calls)
        longer.append((seconds - alone) / (1 + sum(call.count for call in calls)))  # the sums of the step are one more
    late = float(np.median(longer[1:] or longer))
    links = {
        name: link if name == "send" else msgspec.structs.replace(link, start=link.start + max(0.0, late))
        for name, link in machine.link.items()
    }
    return msgspec.structs.replace(machine, link=links)


def _fit_steps(machine: Machine, precision: str, measured: Measured) -> tuple[Machine, float]:
    """What forwards, backwards and updates take beyond products and attention is linear in the bytes of their other
    operations and in the number of these."""
    software = explain.software(precision)
    bare = msgspec.structs.replace(machine, passes=dict.fromkeys(PHASES, Passes(0.0, math.inf)))
    rows: dict[str, list[list[float]]] = {"forward": [], "backward": [], "optimizer": [], "rest": []}
    known: dict[str, list[float]] = {name: [] for name in rows}
    for step in measured.steps:
        spec = measure.model(step.hidden, step.layers)
        layout = resolve(Layout(dp=measured.ranks), spec, sequence=SEQUENCE, global_batch=step.rows * measured.ranks)
        count, moved = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        fixed = dict.fromkeys(rows, 0.0)
        for part in workload.parts(spec, layout.stages, 0):
            for one in workload.work(Case(spec, SEQUENCE, software, precision), layout, part).operations:
                fixed["forward" if one.phase == "forward" else "backward"] += cost.operation_seconds(
                    one, bare, software, precision
                )
                if one.kind == "memory" or one.phase == "weight":
                    count[one.phase] += one.count
                    size = (
                        one.bytes if one.kind == "memory" else 2 * one.shape[0] * one.shape[1] * software.gradient_bytes
                    )
                    moved[one.phase] += size * one.count
        rows["forward"].append([count["forward"], moved["forward"], 1.0])
        rows["backward"].append([count["input"] + count["weight"], moved["input"], moved["weight"], 1.0])
        held = metrics.parameter_count(spec)
        rows["optimizer"].append([1.0, cost.optimizer_bytes(held, software)])
        rows["rest"].append([1.0, 2 * held * software.gradient_bytes])
        for name, seconds in fixed.items():
            known[name].append(seconds)
    found: dict[str, list[float]] = {}
    errors: list[float] = []
    for name, matrix in rows.items():
        wholes = np.array([getattr(step, name) for step in measured.steps])
        beyond = wholes - np.array(known[name])
        found[name] = least_squares(np.array(matrix) / wholes[:, None], beyond / wholes)  # relative errors
        errors += np.abs((np.array(known[name]) + np.array(matrix) @ found[name]) / wholes - 1).tolist()
    forward, backward, update, sums = found.values()
    passes = {
        "forward": Passes(forward[0], _stream(forward[1], machine)),
        "input": Passes(backward[0], _stream(backward[1], machine)),
        "weight": Passes(backward[0], _stream(backward[2], machine)),
        "step": Passes(update[0], _stream(update[1], machine)),
        "sums": Passes(sums[0], _stream(sums[1], machine)),
    }
    return msgspec.structs.replace(machine, passes=passes, action=(forward[2] + backward[3]) / 2), float(
        np.mean(errors)
    )


def _stream(per_byte: float, machine: Machine) -> float:
    """At most what a cache gives."""
    return min(50.0, 1 / (max(per_byte, 1e-15) * machine.bandwidth))


def least_squares(matrix: Any, wanted: Any) -> list[float]:
    """min |matrix x - wanted| for x >= 0, by trying which of the few are above zero."""
    best, least = np.zeros(matrix.shape[1]), math.inf
    for chosen in itertools.product((False, True), repeat=matrix.shape[1]):
        columns = np.flatnonzero(chosen)
        x = np.zeros(matrix.shape[1])
        if len(columns):
            x[columns] = np.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
        error = float(np.sum((matrix @ x - wanted) ** 2))
        if x.min() >= 0 and error < least:
            best, least = x, error
    return best.tolist()


def _fitted(
    of: Callable[[Sequence[float]], Machine], pairs_of: Callable[[Machine], Pairs], start: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> tuple[Machine, float]:  # fmt: skip
    """The machine `of(x)` that comes nearest to what was measured, and its mean error; `pairs_of` a machine: what it takes by the
    planner's count beside what was measured."""

    def loss(x: Sequence[float]) -> float:
        return float(sum(np.log(found / truth) ** 2 for found, truth in pairs_of(of(x))))

    fitted = of(minimise(loss, start, bounds))
    return fitted, float(np.mean([abs(found / truth - 1) for found, truth in pairs_of(fitted)]))


def minimise(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], bounds: Sequence[tuple[float, float]]
) -> list[float]:
    """Nelder and Mead's simplex (1965), each parameter scaled to its start and held in its bounds."""
    low, high = np.array(bounds).T
    first = np.clip(np.array(start, float), low, high)
    span = np.maximum(np.abs(first), 1e-3 * (high - low))

    def at(x: Any) -> float:
        return loss(np.clip(first + x * span, low, high).tolist())

    simplex = [np.zeros(len(first)), *(0.3 * np.eye(len(first)))]
    values = [at(x) for x in simplex]
    for _ in range(SIMPLICES):
        order = np.argsort(values)
        simplex, values = [simplex[i] for i in order], [values[i] for i in order]
        centre = np.mean(simplex[:-1], axis=0)
        away = centre - simplex[-1]
        tried = centre + away
        value = at(tried)
        if value < values[0]:
            further = centre + 2 * away
            better = at(further)
            tried, value = (further, better) if better < value else (tried, value)
        elif value >= values[-2]:
            tried = centre - 0.5 * away
            value = at(tried)
            if value >= values[-1]:
                simplex = [simplex[0], *((simplex[0] + x) / 2 for x in simplex[1:])]
                values = [values[0], *(at(x) for x in simplex[1:])]
                continue
        simplex[-1], values[-1] = tried, value
    return np.clip(first + simplex[int(np.argmin(values))] * span, low, high).tolist()
