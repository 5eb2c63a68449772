"""The planner on this machine: probe it, plan, train real layouts of a small model, and compare predicted with measured steps.

    python benchmarks/plan_cpu.py [--cluster cluster.toml] [--rounds 3] [--steps 24] [--only N] [--tries 3]
        [--json FILE]

`make bench-plan` runs it. Every round trains each layout once, so that a slow minute of the machine falls on all of them; a
layout's step time is the median of all its counted steps. The planner's own pick is trained too. Prints a table, the mean
absolute error, which share of the step is furthest off, and how much longer the first choice took than the fastest layout.
The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fiveply.report import expected, timelines
from fiveply.report.record import load
from fiveply.spec.cluster import ClusterSpec

LAYOUTS = (
    "dp=1,micro_batch=16", "dp=1,micro_batch=4", "dp=1,micro_batch=16,recompute=full", "dp=2,micro_batch=8", "dp=2,micro_batch=2",
    "dp=2,zero=1,micro_batch=8", "dp=2,zero=2,micro_batch=4", "dp=2,zero=3,micro_batch=8", "tp=2,micro_batch=16",
    "tp=2,sp=0,micro_batch=8", "pp=2,micro_batch=4", "pp=2,micro_batch=2", "pp=2,micro_batch=4,schedule=zb",
    "pp=2,micro_batch=4,schedule=zbv", "pp=2,micro_batch=4,schedule=interleaved",
)  # fmt: skip
"""Of at most two ranks: a machine of two cores runs them without sharing a core."""
MODEL, SEQUENCE, ROWS = "2m", 128, 16
WARM = 6
"""Steps that are not counted; the last of them is recorded."""
DISTURBED, TRIES = 0.05, 3
"""Share of the cores that others took, above which a run is tried again."""
SOURCE = Path(__file__).resolve().parents[1] / "src"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cluster", default="", help="a file that fiveply probe wrote; by default it is measured first"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", type=int, default=len(LAYOUTS), help="the first so many layouts")
    parser.add_argument("--tries", type=int, default=TRIES, help="runs of a layout a round, until one is undisturbed")
    parser.add_argument("--json", default="", help="write all figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = compare(folder, options.cluster, LAYOUTS[: options.only], options.rounds, options.steps, options.tries)
    show(found)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def compare(
    folder: Path, cluster: str, layouts: tuple[str, ...], rounds: int, steps: int, tries: int
) -> dict[str, Any]:
    """Probe (or take `cluster`), plan, and train; every row with what was predicted before its first run."""
    begun = time.perf_counter()
    if cluster:
        shutil.copy(cluster, folder / "cluster.toml")
    else:
        fiveply(folder, "probe")
    probed = time.perf_counter() - begun
    precision = "bf16" if ClusterSpec.load(folder / "cluster.toml").measured["products"].get("bf16") else "fp32"
    fiveply(folder, "plan", MODEL, "--cluster", "cluster.toml", "--seq", str(SEQUENCE), "--batch-tokens",
            str(SEQUENCE * ROWS), "--precision", precision, "--out", "first.plan")  # fmt: skip
    pick = json.loads((folder / "first.plan").read_text())["layout"]
    rows: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for layout in (*layouts, pick):
            run = undisturbed(folder, layout, "float32" if precision == "fp32" else "bfloat16", steps, tries)
            print(
                f"round {number + 1} of {rounds}: {layout} {1e3 * statistics.median(run['seconds']):.1f} ms a step",
                flush=True,
            )
            row = rows.setdefault(run["layout"], run | {"given": layout, "rounds": [], "others": [], "pick": False})
            row["rounds"].append(run["seconds"])
            row["others"].append(run["others"])
            row["pick"] |= layout == pick
    for row in rows.values():
        row["measured"] = statistics.median(second for one in row["rounds"] for second in one)
        medians = [statistics.median(one) for one in row["rounds"]]
        row["spread"] = max(medians) / min(medians) - 1
        row["error"] = row["predicted"] / row["measured"] - 1
    first = min(rows.values(), key=lambda row: row["predicted"])
    best = min(rows.values(), key=lambda row: row["measured"])
    return {
        "rows": list(rows.values()), "pick": pick, "first": first["given"], "best": best["given"],
        "precision": precision,
        "mape": statistics.fmean(abs(row["error"]) for row in rows.values()),
        "regret": first["measured"] / best["measured"] - 1,
        "probe_seconds": probed, "seconds": time.perf_counter() - begun,
        "others": statistics.fmean(one for row in rows.values() for one in row["others"]),
    }  # fmt: skip


def undisturbed(folder: Path, layout: str, dtype: str, steps: int, tries: int) -> dict[str, Any]:
    """Of up to `tries` runs the first beside which other processes took little of the cores, else the least disturbed."""
    runs: list[dict[str, Any]] = []
    while len(runs) < tries and (not runs or runs[-1]["others"] > DISTURBED):
        runs.append(train(folder, layout, dtype, steps))
    return min(runs, key=lambda run: run["others"])


def busy() -> tuple[float, float]:
    """Seconds that the machine's cores have worked, and those for this process's ended children."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime


def train(folder: Path, layout: str, dtype: str, steps: int) -> dict[str, Any]:
    """One run, which is not kept: seconds of its counted steps, what was predicted, and its recorded step by share."""
    settings = {
        "data.sequence": SEQUENCE, "train.global_batch": ROWS, "train.evaluate_every": 0, "train.record": WARM, "data.held_out": 0,
        "data.tokenizer": "train:512", "precision.parameters": dtype,
    }  # fmt: skip
    begun, (all_before, own_before) = time.perf_counter(), busy()
    fiveply(folder, "train", "--model", MODEL, "--data", "shakespeare", "--layout", layout, "--steps", str(steps), "--name", "run",
            *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))  # fmt: skip
    all_after, own_after = busy()
    others = (all_after - all_before - own_after + own_before) / (time.perf_counter() - begun) / (os.cpu_count() or 1)
    directory = folder / "runs" / "run"
    seconds = [json.loads(line)["seconds"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((directory / "facts.json").read_text())
    (recorded,) = timelines.chosen(directory)
    shares = {term.name: (term.predicted, term.measured) for term in expected.terms(load(directory).facts, recorded)}
    shutil.rmtree(directory)
    return {"layout": facts["layout"], "predicted": facts["predicted"]["seconds"]["p50"], "seconds": seconds[WARM:],
            "terms": facts["predicted"]["terms"], "shares": shares, "others": others}  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """The table on standard output, ready for a page."""
    print("| layout | predicted | measured | off | rounds apart | furthest off |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for row in found["rows"]:
        worst = max(row["shares"], key=lambda name: abs(row["shares"][name][0] - row["shares"][name][1]))
        predicted, measured = row["shares"][worst]
        print(f"| {row['given']}{' (pick)' if row['pick'] else ''} | {1e3 * row['predicted']:.1f} ms | {1e3 * row['measured']:.1f} ms "
              f"| {row['error']:+.1%} | {row['spread']:.1%} | {worst} {1e3 * predicted:.1f} for {1e3 * measured:.1f} |")  # fmt: skip
    print(f"\n{len(found['rows'])} layouts: mean absolute error {found['mape']:.1%}")
    print(f"first choice {found['first']}, {found['regret']:.1%} above the best ({found['best']})")
    print(f"other processes took {found['others']:.1%} of the cores meanwhile, {max(max(row['others']) for row in found['rows']):.0%} "
          "at the most in one run")  # fmt: skip
    print(f"probed in {found['probe_seconds']:.0f} s, {found['seconds']:.0f} s in all")


def fiveply(folder: Path, *arguments: str) -> None:
    paths = os.pathsep.join(path for path in (str(SOURCE), os.environ.get("PYTHONPATH", "")) if path)
    done = subprocess.run([sys.executable, "-m", "fiveply.cli", *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths}, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
