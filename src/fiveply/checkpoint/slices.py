"""Slices of stored tensors: how a rank's piece of a parameter, even a flat range of it, becomes rectangles on disk and back.

Pure geometry over global offsets: this file knows neither files nor ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fiveply.checkpoint.huggingface import Shape, disk_region, disk_shape
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.placement import Placed

Rectangle = tuple[Shape, Shape, int, int]
"""Global start, size, and the flat range [lo, hi) of the local slice that it covers."""


@dataclass(frozen=True)
class Slice:
    """A block of a stored tensor: `tensor` stands at offset `start` of the tensor `name` of global shape `shape`."""

    name: str
    shape: Shape
    start: Shape
    tensor: Tensor


def rectangles(start: Shape, size: Shape, lo: int, hi: int) -> list[Rectangle]:
    """Cut the flat range [lo, hi) of a row-major local slice (global offset `start`, shape `size`) into blocks.

    Each is (global start, size, lo, hi) with its own flat range of the local slice, in order: a partial first row, whole
    rows, a partial last row, so at most 3 in two dimensions, and 1 in one.
    """
    if lo >= hi:
        return []
    if len(size) < 2:
        return [(tuple(first + lo for first in start), tuple(hi - lo for _ in size), lo, hi)]
    row = math.prod(size[1:])
    top, bottom = -(-lo // row), hi // row  # whole rows: [top, bottom)
    if top > bottom:  # inside one row
        return _in_row(start, size, bottom, lo, hi)
    blocks = _in_row(start, size, top - 1, lo, top * row)
    if top < bottom:
        blocks.append(((start[0] + top, *start[1:]), (bottom - top, *size[1:]), top * row, bottom * row))
    return blocks + _in_row(start, size, bottom, bottom * row, hi)


def _in_row(start: Shape, size: Shape, row: int, lo: int, hi: int) -> list[Rectangle]:
    base = row * math.prod(size[1:])
    return [
        ((start[0] + row, *inner_start), (1, *inner_size), base + inner_lo, base + inner_hi)
        for inner_start, inner_size, inner_lo, inner_hi in rectangles(start[1:], size[1:], lo - base, hi - base)
    ]


def slices_of(placed: Placed, lo: int, flat: Tensor, prefix: str = "", spec: ModelSpec | None = None) -> list[Slice]:
    """The slices to save of a rank's flat piece of a parameter: `flat` (1-D) is the range [lo, lo + len(flat)) of `placed`.

    `prefix` goes before the disk name ("optimizer.exp_avg."). Without a spec (a user's own module) names are kept.
    """
    slices: list[Slice] = []
    parameter = placed.parameter
    for block_start, block_size, block_lo, block_hi in rectangles(placed.start, placed.size, lo, lo + flat.numel()):
        block = flat[block_lo - lo : block_hi - lo].view(block_size)
        if spec is None:
            slices.append(Slice(prefix + parameter.name, parameter.shape, block_start, block))
            continue
        region = disk_region(spec, parameter.name, block_start, block_size)
        block = block.t() if region.transposed else block
        slices.append(Slice(prefix + region.name, disk_shape(spec, parameter), region.start, block))
    return slices


def read_flat(read: Callable[[Shape, Shape], Tensor], placed: Placed, lo: int, hi: int) -> Tensor:
    """The flat range [lo, hi) of a local slice, 1-D, through `read(start, size)`; the inverse of `slices_of`."""
    blocks = [read(start, size).flatten() for start, size, _, _ in rectangles(placed.start, placed.size, lo, hi)]
    return torch.cat(blocks) if blocks else read(placed.start, tuple(0 for _ in placed.size)).flatten()


def assembled(pieces: Iterable[tuple[Placed, int, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name, of flat pieces (slice, its first element that is there, values); what none holds is NaN."""
    tensors: dict[str, Tensor] = {}
    for placed, lo, flat in pieces:
        if placed.name not in tensors:
            missing = math.nan if flat.is_floating_point() else 0
            tensors[placed.name] = torch.full(placed.parameter.shape, missing, dtype=flat.dtype)
        for start, size, low, high in rectangles(placed.start, placed.size, lo, lo + flat.numel()):
            tensors[placed.name][window(start, size, (0,) * len(start))] = flat[low - lo : high - lo].view(size)
    return tensors


def overlap(start: Shape, size: Shape, other_start: Shape, other_size: Shape) -> tuple[Shape, Shape] | None:
    low = tuple(map(max, start, other_start))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(start, size, other_start, other_size, strict=True))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def window(start: Shape, size: Shape, origin: Shape) -> tuple[slice, ...]:
    """Indices of a region inside a block that begins at `origin`."""
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(start, size, origin, strict=True))
