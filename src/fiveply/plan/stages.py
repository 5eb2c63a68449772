"""How many layers each pipeline stage gets: the division whose slowest path through the pipeline is shortest.

A rank cannot start before the stages ahead of it have passed on its first micro-batch, nor end its share of the step before
they have taken back its last gradient. So rank r ends at a P(r) + m w(r) at the earliest: P is the time of one micro-batch on
the ranks ahead, w on itself with embedding and head where they stand, m the number of micro-batches; `ahead` (a) says how much
of P counts. The least possible maximum X is found by bisection; whether X can be met is decided by filling ranks from the last
one backward, each with as many layers as X (and its memory) allows. Filling is exact: a layer moved from a rank to a later one
relieves it of m times what it adds ahead of others. Late ranks are filled first, since early ones keep more activations.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, combinations_with_replacement, pairwise
from math import comb

import msgspec

STEPS = 16
"""Of bisection: to a 65-thousandth of a little more than a layer's time."""


class Weights(msgspec.Struct, frozen=True):
    """Seconds of one micro-batch: of each layer, of what stands before the first, and after the last."""

    layers: tuple[float, ...]
    first: float
    last: float


def balance(
    weights: Weights, pp: int, micro_batches: int, ahead: float = 0.0, *, least: int = 0, folded: bool = False,
    most: Sequence[int] | None = None,
) -> tuple[int, ...] | None:  # fmt: skip
    """Layers of each of `pp` ranks. `folded`: what stands after the last layer is on the first rank (zbv). A rank takes at
    least `least` layers (0: one, but for the ends, which may hold the embedding or the head alone), and at most what its
    memory holds of them (`most`). None where that can't be."""
    count = len(weights.layers)
    sums = list(accumulate(weights.layers, initial=0.0))
    low_end = [least or 1] * pp
    if not least and pp > 1:
        low_end[0] = low_end[-1] = 0
    caps = [count] * pp if most is None else list(most)
    if sum(caps) < count or any(cap < low for cap, low in zip(caps, low_end, strict=True)):
        return None
    must = list(accumulate(low_end, initial=0))  # layers left for the ranks ahead
    extra = [0.0] * pp
    extra[0] += weights.first
    extra[0 if folded else pp - 1] += weights.last
    a, m = ahead, float(micro_batches)

    def fill(limit: float) -> list[int] | None:
        found, end = [0] * pp, count
        for rank in range(pp - 1, -1, -1):
            room = limit - m * (sums[end] + extra[rank]) - (a * weights.first if rank else 0.0)
            # a x sums[begin] + m x (sums[end] - sums[begin]) <= room + m x sums[end]
            begin = bisect_left(sums, -room / (m - a) * (1 - 1e-12)) if m > a else 0 if room >= 0 else end + 1
            begin = max(begin, must[rank], end - caps[rank])
            if begin > end - low_end[rank]:
                return None
            found[rank], end = end - begin, begin
        return found if end == 0 else None

    def slowest(division: list[int]) -> float:
        worst, end = 0.0, 0
        for rank, held in enumerate(division):
            begin, end = end, end + held
            before = a * (sums[begin] + weights.first) if rank else 0.0
            worst = max(worst, before + m * (sums[end] - sums[begin] + extra[rank]))
        return worst

    whole = sums[-1] + weights.first + weights.last
    low, high = m * whole / pp * (1 - 1e-9), a * whole + m * (whole / pp + max(weights.layers) + max(extra))
    best = fill(high)
    if best is None:  # memory forces more on some rank
        high = (m + a) * whole
        best = fill(high)
    if best is None:
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = fill(middle)
        if found is None:
            low = middle
            continue
        best, high = found, slowest(found)
        if fill(high * (1 - 1e-9)) is None:  # paths have few lengths
            break
    return tuple(best)


def every(layers: int, stages: int, most: int) -> list[tuple[int, ...]]:
    """All divisions of so many layers where there are at most `most` of them, else none: few can be tried one by one."""
    if stages == 1 or comb(layers + 1, stages - 1) > most:
        return []
    inner = combinations_with_replacement(range(layers + 1), stages - 1)
    cuts = (tuple(b - a for a, b in pairwise((0, *places, layers))) for places in inner)
    return [division for division in cuts if 0 not in division[1:-1]]


def deal(layers: Sequence[int], vp: int, *, folded: bool = False) -> tuple[int, ...]:
    """By stage: each rank's layers dealt evenly to its chunks, the later ones first, since they are alive more briefly."""
    pp = len(layers)
    stages = [0] * (pp * vp)
    for rank, held in enumerate(layers):
        base, extra = divmod(held, vp)
        for chunk in range(vp):
            stages[2 * pp - 1 - rank if folded and chunk else chunk * pp + rank] = base + (chunk >= vp - extra)
    return tuple(stages)
