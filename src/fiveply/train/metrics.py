"""What a run records: a JSON line a step, floating-point operations and MFU, memory by rank, bytes by category.

Operations and bytes are the planner's (`plan/workload.py`, `plan/footprint.py`): what is predicted, refused, logged and
reported is counted once.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

import fiveply
from fiveply.parallel.data_parallel import Dtypes
from fiveply.parallel.parallelize import products_on
from fiveply.parallel.pipeline_parallel import Model
from fiveply.plan.footprint import footprint
from fiveply.plan.workload import Case, model_flops
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import declare
from fiveply.train import auto
from fiveply.world.device import find, read


def parameter_count(spec: ModelSpec) -> int:
    return sum(torch.Size(parameter.shape).numel() for parameter in declare(spec))


def flops_per_token(spec: ModelSpec, sequence: int) -> float:
    """Forward and backward of one token in a row of that length: 6 per weight of a matrix product, and attention over the keys
    that a token may see; recomputation is not counted (model FLOPs utilisation, Chowdhery et al. 2022)."""
    return model_flops(spec, sequence) / sequence


def counted_bytes(
    spec: ModelSpec, layout: Layout, rank: int, *, sequence: int, global_batch: int, dtypes: Dtypes
) -> dict[str, int]:
    """Bytes by category of a rank of `layout` (resolved) at the worst moment of a step, as the planner counts them."""
    at = layout.coordinates(rank)
    case = Case(spec, sequence, auto.software(dtypes), auto.precision(dtypes.compute))
    return footprint(case, layout, global_batch // layout.dp // layout.micro_batch, at.pp, at.tp).categories


def peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.15) -> float:
    """Operations a second of a large matrix product on this device with the current threads: MFU's denominator."""
    size = 8192 if device.type == "cuda" else 1024
    a, products = torch.ones(size, size, dtype=dtype, device=device), products_on(device, dtype)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds or best == float("inf"):
        start = time.perf_counter()
        products.forward(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Largest bytes so far: allocated on a GPU, resident in a CPU process (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = read("/proc/self/status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak_memory() -> None:
    """Let a forked rank's peak start from now, not from its parent's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def bytes_by_category(model: Model) -> dict[str, int]:
    """This rank's standing bytes; a transient gathered unit of zero 3 counts as a parameter while it stands."""
    parameters = gradients = optimizer = 0
    for unit in model.units:
        parameters += unit.values.nbytes if unit.zero == 3 else unit.full.nbytes
        gradients += unit.grad.nbytes
        if unit.full_grad is not None and unit.full_grad is not unit.grad:
            gradients += unit.full_grad.nbytes
        optimizer += 2 * unit.master.nbytes + (unit.master.nbytes if unit.master is not unit.values else 0)
    return {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}


def segments(facts: Path, done: int, layout: Layout) -> list[dict[str, Any]]:
    """The run's starts so far by its `facts.json`, those after step `done` forgotten, and this one."""
    earlier = msgspec.json.decode(facts.read_bytes())["segments"] if done and facts.is_file() else []
    now = datetime.now(UTC).isoformat(timespec="seconds")
    this = {"from_step": done, "layout": str(layout), "world": layout.world, "started": now}
    return [*(segment for segment in earlier if segment["from_step"] < done), this]


def machine() -> dict[str, Any]:
    """What the record says of this machine."""
    found = find()
    return {key: getattr(found, key) for key in ("kind", "name", "count", "cores", "memory_bytes", "fast_bf16")}


def rank_facts(model: Model, held: dict[str, int]) -> dict[str, Any]:
    """What the record says of this rank; `held`: its bytes by category."""
    return {
        "rank": model.mesh.rank,
        **msgspec.structs.asdict(model.mesh.at),
        "chunks": [{"stage": c.stage, "layers": c.layers, "units": list(c.units)} for c in model.chunks],
        "parameters": sum(entry.parameter.numel() for unit in model.units for entry in unit.entries),
        "bytes": held,
    }


def schedule_facts(layout: Layout, micro_batches: int) -> dict[str, Any]:
    return {"name": layout.schedule, "pp": layout.pp, "vp": layout.chunks, "micro_batches": micro_batches}


def write_facts(path: Path, layout: Layout, done: int, micro_batches: int, more: dict[str, Any]) -> None:
    """`facts.json`: what the run is and what each rank holds, for the report. `done`: steps before this start; `more`: what
    one kind of run alone can say."""
    starts = segments(path, done, layout)
    facts = {
        "version": fiveply.__version__, "started": starts[0]["started"], "segments": starts, "layout": str(layout),
        "world": layout.world, "oversubscribed": layout.world > find().count,
        "schedule": schedule_facts(layout, micro_batches),
    } | more  # fmt: skip
    path.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=1))


class _Row(msgspec.Struct):
    step: int


class MetricsFile:
    """`metrics.jsonl`, appended to a row at a time; a row that a crash cut short is dropped on resume."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Keep the rows up to `after_step`: a resumed run repeats the steps since its checkpoint."""
        kept: list[bytes] = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    row = msgspec.json.decode(line, type=_Row)
                except msgspec.DecodeError:
                    continue
                if row.step <= after_step:
                    kept.append(line)
        path.write_bytes(b"".join(line + b"\n" for line in kept))
        self._path = path.absolute()

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
