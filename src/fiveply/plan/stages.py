"""How many layers each pipeline stage gets: the split whose slowest path through the pipeline is shortest.

A rank cannot start before the stages ahead of it have passed on its first micro-batch, nor end its share of the step before
they have taken back its last gradient. So rank r ends at P(r) + m w(r): P is the time of one micro-batch on the ranks ahead,
w on itself, m the number of micro-batches, with embedding and head where they stand. The least possible maximum is found by
bisection; whether X can be met is decided by filling ranks from the last one backward, each with as many layers as X (and its
memory) allows. Filling is exact: a layer moved to a later rank relieves an earlier one of m times what it adds ahead of that
rank. Late ranks are filled first, since early ones keep more activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

STEPS = 40


class Weights(msgspec.Struct, frozen=True):
    """Seconds of one micro-batch: of each layer, of what stands before the first, and after the last. `ahead`: the share of
    it that a later rank waits for, which is all of it but under split backwards, and one chunk's under several."""

    layers: tuple[float, ...]
    first: float
    last: float
    ahead: float = 1.0


def balance(
    weights: Weights, pp: int, vp: int, micro_batches: int, *, folded: bool = False, most: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Layers of each of pp x vp stages; `folded`: the last stage is on the first rank (zbv). `most`: layers that each rank's
    memory holds. None where that is too few."""
    count = len(weights.layers)
    cumulative = [0.0]
    for layer in weights.layers:
        cumulative.append(cumulative[-1] + layer)
    least = [vp] * pp
    if vp == 1 and pp > 1:  # the ends may hold the embedding or the head alone
        least[0] = least[-1] = 0
    caps = list(most) if most is not None else [count] * pp
    if sum(caps) < count or any(cap < low for cap, low in zip(caps, least, strict=True)):
        return None
    extra = [0.0] * pp
    extra[0] += weights.first
    extra[0 if folded else pp - 1] += weights.last

    def fill(limit: float) -> list[int] | None:
        found = [0] * pp
        end = count
        for rank in range(pp - 1, -1, -1):
            must = sum(least[:rank])  # left for the ranks ahead
            taken = 0
            while end - taken > must and taken < caps[rank]:
                begin = end - taken - 1
                ahead = (cumulative[begin] + (weights.first if rank else 0.0)) * weights.ahead
                if ahead + micro_batches * (cumulative[end] - cumulative[begin] + extra[rank]) > limit and taken >= least[rank]:
                    break
                taken += 1
            found[rank] = taken
            end -= taken
        return found if end == 0 else None

    whole = cumulative[-1] + weights.first + weights.last
    high = (micro_batches + pp) * whole
    best = fill(high)
    if best is None:
        return None
    low = micro_batches * whole / pp
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = fill(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return _chunks(best, pp, vp, folded)


def _chunks(layers: list[int], pp: int, vp: int, folded: bool) -> tuple[int, ...]:
    """By stage: each rank's layers dealt evenly to its chunks, the later ones first, since they are alive more briefly."""
    stages = [0] * (pp * vp)
    for rank, held in enumerate(layers):
        base, extra = divmod(held, vp)
        for chunk in range(vp):
            stage = 2 * pp - 1 - rank if folded and chunk else chunk * pp + rank
            stages[stage] = base + (chunk >= vp - extra)
    return tuple(stages)
