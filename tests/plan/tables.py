"""A row of a table of measurements, and a file of rows."""

import csv
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "source": "pytorch/torchtitan@b5bcd76c6 benchmarks/llama3_h100_202412_torchtitan.md", "model": "llama3.1-8b", "params_b": 8.03,
    "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256, "seq": 8192, "gpu": "H100-80GB-SXM",
    "num_gpus": 64, "tp": 4, "pp": 2, "vp": 2, "zero": 1, "micro_batch": 1, "global_batch": 64, "recompute": "none", "precision": "bf16",
    "step_time_s": 1.5,
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
