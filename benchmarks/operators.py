"""Fits the curves of hardware/*.toml to measured operator tables, and prints them as TOML.

    pip download --no-deps aiconfigurator-core==0.12.0 && python -m zipfile -e aiconfigurator_core-*.whl tables
    pip install scipy pandas pyarrow                       # for this script alone
    python benchmarks/operators.py tables h100_sxm

The tables (Apache-2.0, measured by NVIDIA on the devices in 2025 and 2026) hold milliseconds of matrix products by shape and
precision, of attention's prefill, and of NCCL's collectives in a host. They are not part of this repository: what ships are
the coefficients, six of a precision's products, four of attention, five of a collective. The forms are those of
`fiveply.plan.cost`, whose docstrings say what each coefficient means.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from fiveply.plan.cost import TILES
from fiveply.plan.machine import load

Array = NDArray[np.float64]
NAMES = {
    "a100_sxm": "a100-80",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "gb300": "gb300",
}
TYPES = {"bf16": ("bfloat16", 2.0, 2e9), "fp8": ("fp8", 1.0, 1e11), "fp4": ("nvfp4", 0.5, 1e11)}
"""By precision: its name in the tables, bytes of an operand, and the FLOPs below which a product is left out."""
KERNELS = {"flash_attention", "fa3", "vllm_flash_attn_fa3", "trtllm_mha", "vllm_flashinfer_trtllmprefill"}
"""The best attention kernels known for their devices."""
COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
}


def tables(folder: Path, system: str, pattern: str) -> pd.DataFrame:
    files = sorted(folder.glob(f"**/systems/data/{system}/{pattern}"))
    return pd.concat([pd.read_parquet(file) for file in files]) if files else pd.DataFrame()


Bounds = tuple[float, float, float]
"""Where the search for a coefficient starts, and between what it stays."""


def solve(model: Callable[[Array], Array], measured: Array, *bounds: Bounds) -> tuple[Array, float]:
    """Coefficients that bring log(model / measured) nearest to 0, robustly; and the mean absolute error."""
    start, low, high = (np.log(np.array(column)) for column in zip(*bounds, strict=True))

    def errors(logs: Array) -> Array:
        return np.log(model(np.exp(logs)) / measured)

    found = least_squares(errors, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return np.exp(found.x), float(np.abs(errors(found.x)).mean())


def products(folder: Path, system: str, precision: str) -> str:
    name, wide, least = TYPES[precision]
    machine = load(NAMES[system])
    data = tables(folder, system, "gemm/*/*/gemm_perf.parquet")
    data = data[(data.gemm_dtype == name) & (data.m >= 256) & (data.n >= 256) & (data.k >= 128)]
    data = data[2.0 * data.m * data.n * data.k > least]
    if data.empty or precision not in machine.peak:
        return ""
    groups = data.groupby(["m", "n", "k"], as_index=False).latency
    data = groups.median() if precision == "bf16" else groups.min()  # frameworks differ in how well they drive float8
    m, n, k = (data[column].to_numpy(float) for column in "mnk")

    def seconds(coefficients: Array) -> Array:
        efficiency, prologue, quantisation, small, launch, memory = coefficients
        area = np.full(m.shape, np.inf)
        for rows, columns in TILES:
            waves = np.ceil(m / rows) * np.ceil(n / columns) / machine.processors
            waves = np.maximum(1, waves + quantisation * (np.ceil(waves) - waves))
            reuse = (rows * columns / (rows + columns) / (256 * 128 / 384)) ** small
            area = np.minimum(area, waves * machine.processors * rows * columns / reuse)
        computing = area * (k + prologue) * 2 / (machine.peak[precision] * efficiency)
        moving = (wide * (m + n) * k + 2 * m * n) / (machine.bandwidth * memory)
        return launch + (computing**4 + moving**4) ** 0.25

    found, error = solve(
        seconds, data.latency.to_numpy(float) / 1e3,
        (0.7, 0.1, 0.99), (100, 0.1, 4000), (0.5, 0.01, 1), (0.3, 0.001, 1.5), (3e-6, 1e-7, 2e-5), (0.8, 0.2, 1),
    )  # fmt: skip
    return section(
        f"products.{precision}",
        ("efficiency", "prologue", "quantisation", "small_tile", "launch", "memory"),
        found,
        error,
    )


def attention(folder: Path, system: str) -> str:
    machine = load(NAMES[system])
    data = tables(folder, system, "attention/*/*/context_attention_perf.parquet")
    data = data[
        (data.attn_dtype == "bfloat16")
        & (data.kv_cache_dtype == "bfloat16")
        & (data.isl >= 512)
        & (data.head_dim <= 256)
    ]
    data = data[
        data.kernel_source.isin(KERNELS)
        & (data.reindex(columns=["window_size"]).fillna(0).window_size == 0)
        & (data.reindex(columns=["step"]).fillna(0).step == 0)
    ]
    flops = (2.0 * data.batch_size * data.num_heads * data.isl.astype(float) ** 2 * data.head_dim).to_numpy(float)
    data, flops = data[flops > 5e9], flops[flops > 5e9]
    keys, head = data.isl.to_numpy(float), data.head_dim.to_numpy(float)

    def seconds(coefficients: Array) -> Array:
        efficiency, half_sequence, half_head, launch = coefficients
        return launch + flops / (
            machine.peak["bf16"] * efficiency * keys / (keys + half_sequence) * head / (head + half_head)
        )

    found, error = solve(
        seconds, data.latency.to_numpy(float) / 1e3,
        (0.8, 0.1, 2), (500, 1, 5000), (20, 0.01, 300), (8e-6, 1e-6, 1e-5),
    )  # fmt: skip
    return section("attention", ("efficiency", "half_sequence", "half_head", "launch"), found, error)


def collectives(folder: Path, system: str) -> str:
    data = pd.read_parquet(sorted(folder.glob(f"**/systems/data/{system}/comm/nccl/*/nccl_perf.parquet"))[-1])
    text = ""
    for name, rows in data[data.nccl_dtype == "half"].groupby("op_name"):
        ranks = rows.num_gpus.to_numpy(float)
        share = (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks * 2.0 * rows.message_size.to_numpy(float)

        def seconds(coefficients: Array, ranks: Array = ranks, share: Array = share) -> Array:
            bandwidth, start, hop, loss, half = coefficients
            moving = share / (bandwidth * (1 - loss / ranks))
            return start + hop * ranks + moving + np.sqrt(half * moving)

        found, error = solve(
            seconds, rows.latency.to_numpy(float) / 1e3,
            (3e11, 1e10, 2e12), (5e-6, 1e-7, 1e-4), (1e-6, 1e-8, 1e-4), (0.3, 1e-3, 0.95), (1e-6, 1e-9, 1e-3),
        )  # fmt: skip
        text += section(f"link.{COLLECTIVES[str(name)]}", ("bandwidth", "start", "hop", "loss", "half"), found, error)
    return text


def section(name: str, keys: tuple[str, ...], values: Array, error: float) -> str:
    lines = [f"{key} = {value:.4g}" for key, value in zip(keys, values, strict=True)]
    return "\n".join([f"[{name}]  # mean error {error:.1%}", *lines, "", ""])


def main(folder: str, *systems: str) -> None:
    for system in systems or tuple(NAMES):
        print(f"# {NAMES[system]}, from {system}")
        for precision in TYPES:
            print(products(Path(folder), system, precision), end="")
        print(attention(Path(folder), system), end="")
        print(collectives(Path(folder), system))


if __name__ == "__main__":
    main(*sys.argv[1:])
