"""Collectives of CPU ranks on one host: shared memory beside gloo, alternating in one run.

    python benchmarks/collectives.py [--ranks 2 4] [--quick] [--json FILE]

A size is what one rank holds: the gathered tensor of an all-gather, the input of a reduce-scatter or an all-to-all. A
time is one call's, on the rank that took longest; of a send/receive, half a round trip. gloo and shm are called through
torch.distributed, `axis` is shm as fiveply calls it, past torch's dispatch. Each round times a block of calls on each;
printed are the medians, and of gloo / shm the range as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fiveply.world import device
from fiveply.world.collectives import Axis
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups

Call = Callable[[], object]

SIZES = (1 << 10, 16 << 10, 256 << 10, 4 << 20, 64 << 20)
BLOCK_SECONDS = 0.05
MOST_CALLS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--quick", action="store_true", help="three sizes, three rounds")
    options = parser.parse_args()
    sizes, rounds = (SIZES[::2], 3) if options.quick else (SIZES, 7)
    found = device.find()
    result: dict[str, Any] = {"machine": f"{found.name}, {found.cores} cores", "torch": torch.__version__, "rows": []}
    for ranks in options.ranks:
        rows = launch(measure, ranks, sizes, rounds, backend="gloo")
        result["rows"] += [{"ranks": ranks, **row} for row in rows]
        print(f"\n{ranks} ranks on {result['machine']}\n")
        print(
            "| operation | size | gloo | shm | gloo / shm (range) | axis |\n| --- | ---: | ---: | ---: | ---: | ---: |"
        )
        for row in rows:
            ratio, (low, high) = row["ratio"], row["range"]
            gloo, shm, axis = (duration(row["seconds"].get(name)) for name in ("gloo", "shm", "axis"))
            spread = f"{ratio:.1f} ({low:.1f} to {high:.1f})"
            print(f"| {row['operation']} | {size_text(row['bytes'])} | {gloo} | {shm} | {spread} | {axis} |")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def contenders(size: int, gloo: dist.ProcessGroup, shm: dist.ProcessGroup) -> dict[str, dict[str, Call]]:
    """By operation and name; the same order on every rank."""
    ranks, me = dist.get_world_size(), dist.get_rank()
    axis = Axis("all", list(range(ranks)), shm, me)
    whole, part = torch.ones(size // 4), torch.ones(size // 4 // ranks)
    other = torch.empty_like(whole)

    def transfer(group: dist.ProcessGroup) -> None:
        """There and back between the first two ranks, for two calls' worth of time."""
        if me == 0:
            dist.send(whole, 1, group=group)
            dist.recv(other, 1, group=group)
        elif me == 1:
            dist.recv(other, 0, group=group)
            dist.send(whole, 0, group=group)

    gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    through_torch: dict[str, Callable[[dist.ProcessGroup], object]] = {
        "all-reduce": lambda group: dist.all_reduce(whole, group=group),
        "all-gather": lambda group: gather(whole, part, group=group),
        "reduce-scatter": lambda group: scatter(part, whole, group=group),
        "broadcast": lambda group: dist.broadcast(whole, 0, group=group),
        "all-to-all": lambda group: dist.all_to_all_single(other, whole, group=group),
        "send/receive": transfer,
    }
    past_torch: dict[str, Call] = {
        "all-reduce": lambda: axis.all_reduce(whole),
        "all-gather": lambda: axis.all_gather(whole, part),
        "reduce-scatter": lambda: axis.reduce_scatter(part, whole),
    }
    return {
        name: {"gloo": partial(call, gloo), "shm": partial(call, shm)}
        | ({"axis": past_torch[name]} if name in past_torch else {})
        for name, call in through_torch.items()
    }


def measure(sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    everyone = list(range(dist.get_world_size()))
    groups = [Groups(name).get(everyone) for name in ("gloo", "shm")]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for operation, calls in contenders(size, *groups).items():
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            counts = {name: calibrated(call) for name, call in calls.items()}
            for _ in range(rounds):
                for name, call in calls.items():
                    seconds[name].append(slowest(call, counts[name]) / (2 if operation == "send/receive" else 1))
            ratios = [gloo / shm for gloo, shm in zip(seconds["gloo"], seconds["shm"], strict=True)]
            rows.append({
                "operation": operation, "bytes": size, "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)],
                "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            })  # fmt: skip
    return rows


def calibrated(call: Call) -> int:
    """Calls that fill a block, the same number on every rank."""
    call()
    return max(1, min(MOST_CALLS, int(BLOCK_SECONDS / slowest(call, 2))))


def slowest(call: Call, count: int) -> float:
    """Seconds a call on the rank that took longest."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    taken: Tensor = torch.tensor((time.perf_counter() - begun) / count, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} us"


if __name__ == "__main__":
    main()
