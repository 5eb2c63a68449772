"""`layout = "auto"`: the planner's pick for the devices of this machine, and why.

What was measured by `fiveply probe` here, `cluster.toml` in the working directory, goes before what is known of the kind of
device in general.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from fiveply.parallel.data_parallel import Dtypes
from fiveply.plan import explain, footprint, machine, table
from fiveply.plan.explain import TERMS, Answer, Ranked, interval_text
from fiveply.plan.predict import Predictor
from fiveply.plan.software import Software
from fiveply.plan.space import Limits
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.world.device import Devices, find

AUTO = "auto"
MEASURED = Path("cluster.toml")
"""Where `fiveply probe` leaves what it measured, and `auto` looks for it."""
RUNNABLE: dict[str, tuple[object, ...]] = {"cp": (1,), "ep": (1,), "offload": ("none",)}
"""What the runtime has of the keys that can be planned."""


def cluster(found: Devices | None = None, ranks: int = 0) -> ClusterSpec:
    """This machine's devices, or as many as there are `ranks` if these were started elsewhere too.

    Raises InputError for a GPU that the planner does not know.
    """
    found = found or find()
    count = ranks or found.count
    if MEASURED.is_file():
        measured = ClusterSpec.load(MEASURED)
        if (measured.device == "cpu") == (found.kind == "cpu"):
            return msgspec.structs.replace(measured, count=count)
    if found.kind == "cpu":
        return ClusterSpec("cpu", count, found.count, found.memory_bytes)
    try:
        return ClusterSpec(table.device(found.name), count, found.count, found.memory_bytes)
    except table.RowError:
        raise InputError(
            f"the planner does not know {found.name}", where="layout", key=AUTO,
            fix=f"give a layout such as dp={count}, or run `fiveply probe` first (known: {', '.join(machine.names())})",
        ) from None  # fmt: skip


def plan(
    spec: ModelSpec, devices: ClusterSpec, dtypes: Dtypes, *, sequence: int, global_batch: int, ranks: int = 0,
    compiled: bool = False, alone: bool = False,
) -> Answer:  # fmt: skip
    """The best layouts that the runtime runs, of exactly `ranks` ranks where they are given. `compiled`: blocks are; `alone`:
    replicas step alone, and so share nothing. Raises InputError where none is."""
    among = dict(RUNNABLE)
    if compiled:
        among["schedule"] = ("gpipe", "1f1b", "interleaved")
    if alone:
        among["zero"] = (0,)
    if spec.attention_dropout:
        among |= {"dp": (1,), "tp": (1,), "pp": (1,), "recompute": ("none",)}
    worlds = [ranks] if ranks else None
    return explain.answer(
        spec, devices, sequence=sequence, global_batch=global_batch, precision=precision(dtypes.compute),
        limits=Limits(among=among), system=software(dtypes), worlds=worlds,
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """As the planner names it."""
    return {torch.bfloat16: "bf16", torch.float64: "fp64"}.get(dtype, "fp32")


def software(dtypes: Dtypes) -> Software:
    """The runtime's habits, in these types."""
    return footprint.runtime(dtypes.compute.itemsize, dtypes.reduce.itemsize, dtypes.optimizer.itemsize)


def reason(answer: Answer) -> str:
    """`planned dp=2 for cpu:2: 0.30 s (0.27-0.33) a step expected; tp=2 would take 8% longer, mostly by tensor collectives`."""
    top = answer.ranked[0]
    text = f"planned {_named(top)} for {answer.cluster}: {interval_text(top.prediction.seconds)} a step expected"
    if len(answer.ranked) == 1:
        return text + "; no other layout fits"
    other = answer.ranked[1]
    share = other.prediction.seconds.p50 / top.prediction.seconds.p50 - 1
    return f"{text}; {_named(other)} would take {share:.1%} longer{_because(top, other)}"


def _named(one: Ranked) -> str:
    """With a degree where all are 1, which a layout's own text leaves out."""
    return f"{'dp=1,' if one.world == 1 else ''}{one.prediction.layout}"


def _because(top: Ranked, other: Ranked) -> str:
    ours, theirs = dict(top.waterfall), dict(other.waterfall)
    name = max(TERMS, key=lambda term: theirs.get(term, 0.0) - ours.get(term, 0.0))
    return f", mostly by {TERMS[name]}" if theirs.get(name, 0.0) > ours.get(name, 0.0) else ""


def predicted(
    spec: ModelSpec, layout: Layout, dtypes: Dtypes, *, sequence: int, global_batch: int
) -> dict[str, Any] | None:
    """What the planner expects of a resolved layout on this machine, for the run's record; None on a device it does not know."""
    try:
        devices = cluster()
    except InputError:
        return None
    job = explain.job_of(
        spec, devices, layout.world, sequence=sequence, global_batch=global_batch, precision=precision(dtypes.compute),
        system=software(dtypes),
    )  # fmt: skip
    found = Predictor(job).predict(layout)
    return {
        "seconds": msgspec.structs.asdict(found.seconds),
        "shares": explain.shares(found.terms),
        "terms": found.terms,
        "memory_bytes": list(found.memory_bytes),
        "cluster": str(devices),
        "measured": bool(devices.measured),
    }


def recalibrate(measured: dict[str, float], expected: dict[str, float], world: int) -> str:
    """Change `MEASURED` (from what is known of this machine, where it isn't there) such that a step recorded on `world` ranks would
    have been predicted: seconds by share, measured and expected. Returns what was changed."""
    found = cluster()
    values = dict(found.shared.get(str(world)) or found.measured) or msgspec.to_builtins(
        explain.machine_of(found, world)
    )
    slower, talking, updating = (
        _ratio(measured, expected, share) for share in ("compute", "communication", "optimizer")
    )
    for key in ("name", "devices_per_node"):
        values.pop(key, None)
    values["peak"] = {name: flops / slower for name, flops in values["peak"].items()}
    values["bandwidth"] /= slower
    for key in ("launch", "host", "action"):
        values[key] = values.get(key, 0.0) * slower
    passes = values.setdefault("passes", {})
    passes.pop("sums", None)  # what was recorded of them stands in `step_seconds` then
    update = passes.pop("step", None) or {"launch": 0.0, "stream": values["stream"]}
    for kind in (*values["products"].values(), values["attention"], *passes.values()):
        kind["launch"] *= slower
    passes["step"] = {"launch": update["launch"] * updating, "stream": update["stream"] * slower / updating}
    for link in (*values["link"].values(), values["network"]):
        link["bandwidth"] /= talking
        for key in ("start", "hop", "half"):
            link[key] = link.get(key, 0.0) * talking
    shared = found.shared | {str(world): values} if explain.is_cpu(found) else {}
    rest = measured.get("rest", 0.0) + measured.get("data", 0.0)
    ClusterSpec(
        found.device, found.count, found.devices_per_node, found.memory_bytes, found.measured if shared else values, shared,
        rest or found.step_seconds,
    ).save(MEASURED)  # fmt: skip
    return (
        f"{MEASURED}: computing {1 / slower:.2f} times as fast, communication {1 / talking:.2f} times, the optimiser "
        f"{1 / updating:.2f} times, {1e3 * rest:.1f} ms beside these"
    )


def _ratio(measured: dict[str, float], expected: dict[str, float], share: str) -> float:
    """How many times longer it took, within 1/8 to 8; 1 for what was expected to be less than a hundredth of the step."""
    if expected.get(share, 0.0) < 0.01 * sum(expected.values()) or not measured.get(share):
        return 1.0
    return min(8.0, max(0.125, measured[share] / expected[share]))
