"""Collectives of CPU ranks on one host: shared memory beside gloo, alternating in one run.

    python benchmarks/collectives.py [--ranks 2 4] [--quick] [--json FILE]

A size is what one rank holds: the gathered tensor of an all-gather, the input of a reduce-scatter or an all-to-all. A
time is one call's through torch.distributed, on the rank that took longest; of a send/receive, half a round trip. Each
round times a block of calls on both; printed are the median and the range of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fiveply.world import device
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups

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
    result: dict[str, Any] = {"machine": f"{found.name}, {found.cores} cores", "rows": []}
    for ranks in options.ranks:
        rows = launch(measure, ranks, sizes, rounds, backend="gloo")
        result["rows"] += [{"ranks": ranks, **row} for row in rows]
        print(f"\n{ranks} ranks on {result['machine']}\n")
        print("| operation | size | gloo | shm | gloo / shm (range) |\n| --- | ---: | ---: | ---: | ---: |")
        for row in rows:
            ratio, (low, high) = row["ratio"], row["range"]
            times = " | ".join(duration(row["seconds"][name]) for name in ("gloo", "shm"))
            print(
                f"| {row['operation']} | {size_text(row['bytes'])} | {times} | {ratio:.1f} ({low:.1f} to {high:.1f}) |"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def calls(size: int) -> dict[str, Callable[[dist.ProcessGroup], object]]:
    ranks, me = dist.get_world_size(), dist.get_rank()
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
    return {
        "all-reduce": lambda group: dist.all_reduce(whole, group=group),
        "all-gather": lambda group: gather(whole, part, group=group),
        "reduce-scatter": lambda group: scatter(part, whole, group=group),
        "broadcast": lambda group: dist.broadcast(whole, 0, group=group),
        "all-to-all": lambda group: dist.all_to_all_single(other, whole, group=group),
        "send/receive": transfer,
    }


def measure(sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    everyone = list(range(dist.get_world_size()))
    groups = {name: Groups(name).get(everyone) for name in ("gloo", "shm")}
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for operation, call in calls(size).items():
            seconds: dict[str, list[float]] = {name: [] for name in groups}
            counts = {name: calibrated(call, group) for name, group in groups.items()}
            for _ in range(rounds):
                for name, group in groups.items():
                    seconds[name].append(slowest(call, group, counts[name]) / (2 if operation == "send/receive" else 1))
            ratios = [gloo / shm for gloo, shm in zip(*seconds.values(), strict=True)]
            rows.append({
                "operation": operation, "bytes": size, "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)],
                "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            })  # fmt: skip
    return rows


def calibrated(call: Callable[[dist.ProcessGroup], object], group: dist.ProcessGroup) -> int:
    """Calls that fill a block, the same number on every rank."""
    call(group)
    return max(1, min(MOST_CALLS, int(BLOCK_SECONDS / slowest(call, group, 2))))


def slowest(call: Callable[[dist.ProcessGroup], object], group: dist.ProcessGroup, count: int) -> float:
    """Seconds a call on the rank that took longest."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(count):
        call(group)
    taken: Tensor = torch.tensor((time.perf_counter() - begun) / count, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} us"


if __name__ == "__main__":
    main()
