"""The planner on this machine: probe it, train real layouts of a small model, and compare predicted with measured step times.

    python benchmarks/plan_cpu.py [--cluster cluster.toml] [--steps 14] [--only N]

Prints a table, the mean absolute error, and how much longer the layout that the planner ranks first takes than the fastest one
measured; writes plan_cpu.json. The machine should do nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYOUTS = (
    "dp=1,micro_batch=16", "dp=1,micro_batch=4", "dp=1,micro_batch=16,recompute=full", "dp=2,micro_batch=8", "dp=2,micro_batch=2",
    "dp=2,zero=1,micro_batch=8", "dp=2,zero=2,micro_batch=4", "dp=2,zero=3,micro_batch=8", "tp=2,micro_batch=16",
    "tp=2,sp=0,micro_batch=8", "pp=2,micro_batch=4", "pp=2,micro_batch=2", "pp=2,micro_batch=4,schedule=zb",
    "pp=2,micro_batch=4,schedule=zbv", "pp=2,micro_batch=4,schedule=interleaved",
)  # fmt: skip
"""Of at most two ranks: a machine of two cores runs them without sharing a core."""
WARM = 4
"""Steps that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cluster", default="", help="a file that fiveply probe wrote; by default it is measured first"
    )
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--only", type=int, default=len(LAYOUTS), help="the first so many layouts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.cluster:
            shutil.copy(options.cluster, folder / "cluster.toml")
        else:
            fiveply(folder, "probe")
        rows = [run(folder, layout, options.steps) for layout in LAYOUTS[: options.only]]
    for row in rows:
        off = row["predicted"] / row["measured"] - 1
        print(
            f"{row['layout']:44} {1e3 * row['predicted']:8.1f} ms predicted {1e3 * row['measured']:8.1f} ms measured {off:+7.1%}"
        )
    error = statistics.fmean(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    pick = min(rows, key=lambda row: row["predicted"])
    best = min(rows, key=lambda row: row["measured"])
    regret = pick["measured"] / best["measured"] - 1
    print(f"{len(rows)} layouts: mean absolute error {error:.1%}")
    print(f"first choice {pick['layout']}, {regret:.1%} above the best ({best['layout']})")
    Path("plan_cpu.json").write_text(json.dumps({"rows": rows, "mape": error, "regret": regret}, indent=1))


def run(folder: Path, layout: str, steps: int) -> dict[str, Any]:
    """Train under `layout`: the median of its steps after the first few, and what was predicted before it began."""
    name = layout.replace(",", "-").replace("=", "")
    settings = {
        "data.sequence": 128, "train.global_batch": 16, "train.evaluate_every": 0, "train.record": 0, "data.held_out": 0,
        "data.tokenizer": "train:512",
    }  # fmt: skip
    fiveply(folder, "train", "--model", "2m", "--data", "shakespeare", "--layout", layout, "--steps", str(steps), "--name", name,
            *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))  # fmt: skip
    directory = folder / "runs" / name
    seconds = [json.loads(line)["seconds"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    predicted = json.loads((directory / "facts.json").read_text())["predicted"]
    return {"layout": layout, "predicted": predicted["seconds"]["p50"], "measured": statistics.median(seconds[WARM:]),
            "terms": predicted["terms"], "seconds": seconds}  # fmt: skip


def fiveply(folder: Path, *arguments: str) -> None:
    source = str(Path(__file__).resolve().parents[1] / "src")
    done = subprocess.run([sys.executable, "-m", "fiveply.cli", *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": source}, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
