"""Initial values that depend on (seed, parameter name, global row) alone, so that every layout starts from the same bits.

A Philox counter (Salmon et al. 2011) is positioned at any row, and uniforms become normals by Box-Muller, which takes a
fixed number of draws. Rows are always computed in the same global blocks: vectorised logarithms and cosines may round
differently at other positions of an array, and a rank's slice must not depend on where it was cut.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.placement import Placed

BLOCK_ROWS = 64


def initial_value(placed: Placed, spec: ModelSpec, seed: int, dtype: torch.dtype) -> Tensor:
    """The rank's slice of a parameter: ones, zeros, or normal with the model's standard deviation.

    Projections into the residual stream are scaled by 1 / sqrt(2 x layers), as GPT-2's are.
    """
    kind = placed.parameter.init
    if kind in ("ones", "zeros"):
        return torch.full(placed.size, float(kind == "ones"), dtype=dtype)
    deviation = spec.init_std / (math.sqrt(2 * spec.layers) if kind == "residual" else 1.0)
    return (normal(placed, seed) * deviation).to(dtype)


def normal(placed: Placed, seed: int) -> Tensor:
    """Standard normal values of a two-dimensional slice, float64."""
    columns = placed.parameter.shape[1]
    (first, left), (rows, width) = placed.start, placed.size
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{placed.name}".encode(), digest_size=16).digest(), "little")
    out = np.empty((rows, width))
    for block in range(first // BLOCK_ROWS, -(-(first + rows) // BLOCK_ROWS)):
        values = _block(key, block, columns)
        low, high = max(first, block * BLOCK_ROWS), min(first + rows, (block + 1) * BLOCK_ROWS)
        out[low - first : high - first] = values[
            low - block * BLOCK_ROWS : high - block * BLOCK_ROWS, left : left + width
        ]
    return torch.from_numpy(out)


def _block(key: int, block: int, columns: int) -> np.ndarray:
    """(BLOCK_ROWS, columns) normals; one 64-bit word makes one value's half of a Box-Muller pair."""
    count = BLOCK_ROWS * columns
    pairs = -(-count // 2)
    # A step of Philox's counter gives four words.
    stride = -(-2 * pairs // 4)
    words = np.random.Philox(key=key).advance(block * stride).random_raw(2 * pairs)
    unit = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(unit[:pairs])), 2 * np.pi * unit[pairs:]
    values = np.empty(2 * pairs)
    values[0::2], values[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    return values[:count].reshape(BLOCK_ROWS, columns)
