"""Whether layouts fit: bounds of memory over arrays of them, and the exact answer for one.

The bounds are of the worst rank's bytes from below, so what they exclude can't fit. They take the state of every unit from
`footprint.state_of` and what a micro-batch keeps from `workload`, and leave out what only the exact walk over the schedule
knows (working memory, buffers).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.pipeline_schedule import Kind, build
from fiveply.plan import footprint, traffic, units, workload
from fiveply.plan.predict import Predictor
from fiveply.plan.space import Kinds, Splits, chunks_of
from fiveply.spec.layout import Layout
from fiveply.spec.placement import stage_units

RISK = 0.05
"""A layout fits where the probability of running out of memory is at most this."""
GROUPS = 2
"""Of ranks, in the bound over arrays."""
WORST = 3
"""Ranks that are walked exactly."""


class Divided(NamedTuple):
    """How many of each kind: `parts` [pipeline rank, kind of part] in all its chunks, `passing` in its first one; `units`
    [rank, kind of unit] held; `first` by kind of unit, of the first stage. `crossings`: what each rank sends of a micro-batch."""

    parts: NDArray[np.int64]
    passing: NDArray[np.int64]
    crossings: NDArray[np.int64]
    units: NDArray[np.int64]
    first: NDArray[np.int64]


class _OfSplits(NamedTuple):
    """`degrees`: one split of each state's sizes, and by split the place of its own among them; `kept` [split, (kept by all
    layers, by all other parts, least that a layer needs beside)], bytes of one row."""

    splits: Splits
    degrees: tuple[NDArray[np.int64], NDArray[np.int64]]
    kept: NDArray[np.float64]


class Fitting:
    """Of one job. `capacity`: the most predicted bytes that fit at RISK."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self.job, self.spec = predictor, predictor.job, predictor.job.spec
        job = self.job
        self.capacity = job.machine.memory_bytes * math.exp(
            -job.software.memory_spread * NormalDist().inv_cdf(1 - RISK)
        )
        self._unit_of = units.alike(self.spec)
        self.units = list(dict.fromkeys(self._unit_of.values()))
        """The first unit of each kind."""
        self._place = {name: self.units.index(first) for name, first in self._unit_of.items()}
        self._layer = np.array([unit.startswith("layers") for unit in self.units])
        self._times = self._count(self._unit_of)
        self._layers = int(self._times[self._layer].sum())
        self._head = "embed" if self.spec.tied else "head"
        first = workload.kinds(self.spec)
        self.kinds = list(dict.fromkeys(first.values()))
        """The first part of each kind."""
        self.kind_of = {part: self.kinds.index(kind) for part, kind in first.items()}
        self._kind_layer = np.array([part.startswith("layers") for part in self.kinds])
        self._kind_times = self.counted(self.kind_of)
        self._bytes: dict[Hashable, NDArray[np.float64]] = {}
        self._states: dict[Hashable, NDArray[np.float64]] = {}
        self._divided: dict[Hashable, Divided] = {}
        self._shards: dict[Hashable, NDArray[np.int64]] = {}
        self._last: _OfSplits | None = None

    def fits(self, layout: Layout) -> bool:
        """Whether the ranks that seem to hold most do, exactly."""
        held = self.estimate(layout, ((layout.zero, layout.dp_shard),))[0]
        worst = np.argsort(-held)[:WORST].tolist()
        return all(self._predictor.footprint(layout, rank).peak <= self.capacity for rank in worst)

    # many at once

    def may_fit(
        self, splits: Splits, rows: NDArray[np.int64], kinds: Kinds
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """[split, state]: whether the layers of these splits, all of one pp, dp and cp, could be dealt to ranks such that all fit;
        and by split how many the busiest rank must take at least, in any state.

        Of every pipeline one of these two keeps least: 1F1B has the fewest micro-batches alive; a V has as few on its last ranks
        and an odd layer in the chunk that is alive more briefly. Ranks between the ends are taken in a few groups, each at its
        least number alive.
        """
        pp, dp = splits.columns["pp"][rows[0]].item(), splits.columns["dp"][rows[0]].item()
        micro_batch = splits.columns["micro_batch"][rows]
        inside, outside, working = self._of(splits).kept[rows].T[:, :, None] * micro_batch[:, None]
        first, place = self._of(splits).degrees
        numbers, where = np.unique(place[rows], return_inverse=True)
        bytes_of = np.array([self.state(splits.layout(int(first[number])), kinds) for number in numbers.tolist()])
        state = (bytes_of[:, :, self._layer] @ self._times[self._layer])[where]  # [split, state]
        if pp == 1:
            beside = (bytes_of[:, :, ~self._layer] @ self._times[~self._layer])[where]
            fits = inside + np.maximum(outside, working) + state + beside <= self.capacity
            return fits, np.full(len(rows), self.spec.layers)
        kept, held, room = inside / self._layers, state / self._layers, self.capacity - working
        embed, head = (bytes_of[:, :, self._place[unit]][where] for unit in ("embed", self._head))
        micro_batches = (self.job.global_batch // dp // micro_batch)[:, None]
        size = max(1, -(-(pp - 2) // GROUPS))
        inner = [range(first, min(first + size, pp - 1)) for first in range(1, pp - 1, size)]
        groups = [range(1), *inner, range(pp - 1, pp)]
        fits, busiest = np.zeros(state.shape, bool), np.full(len(rows), self._layers)
        for name, chunks, beside in (("1f1b", 1, (embed, head)), ("zbv", 2, (embed + head, 0.0))):
            if chunks * pp > self._layers:
                continue
            takes = np.zeros((len(groups), *state.shape))
            for index, ranks in enumerate(groups):
                taken = beside[index > 0] if index in (0, len(groups) - 1) else 0.0
                least = np.minimum(*(alive_at(name, pp, micro_batches, ranks[end]) for end in (0, -1)))
                takes[index] = _most_layers(room - taken, held, kept, least * chunks, chunks)
            sizes = np.array([len(ranks) for ranks in groups])
            fits |= np.tensordot(sizes, takes, 1) >= self._layers
            busiest = np.minimum(busiest, _busiest(takes.max(axis=2).T, sizes, self._layers))
        return fits, busiest - (self._layers - self.spec.layers)

    def busiest(self, layout: Layout, orders: list[tuple[str, int]], kinds: Kinds) -> NDArray[np.int64]:
        """[state, pipeline] of one split, each rank for itself: how many layers the busiest rank must take at least; more than there
        are where they don't fit."""
        state, each = self.state(layout, kinds), self._part_bytes(layout) * layout.micro_batch
        layer = self._kind_times * self._kind_layer
        kept, held = layer @ each[:, 0] / self._layers, (state @ (self._times * self._layer) / self._layers)[:, None]
        left = np.full((2, len(kinds), layout.pp), self.capacity - each[self._kind_layer, 1].min())
        left[:, :, 0] -= state[:, self._place["embed"]]
        left[(0, 1), :, (-1, 0)] -= state[:, self._place[self._head]]  # a V ends on its first rank
        micro_batches = self._predictor.micro_batches(layout)
        chunks, instances = _instances(tuple(orders), layout.pp, micro_batches)
        folded = np.array([int(name == "zbv") for name, _ in orders])
        takes = _most_layers(left[folded], held, kept, instances[:, None], chunks[:, None, None])
        found = _busiest(takes.reshape(-1, layout.pp), np.ones(layout.pp, np.int64), self._layers)
        found -= (found <= self._layers) * (self._layers - self.spec.layers)
        return found.reshape(len(orders), -1).T

    def _of(self, splits: Splits) -> _OfSplits:
        if self._last is None or self._last.splits is not splits:
            # Not by ep: experts elsewhere leave as many rows here.
            first, place = splits.alike("tp", "sp", "cp", "cp_kind", "etp", "recompute", "offload")
            each = [self._part_bytes(splits.layout(row)) for row in first.tolist()]
            layers = self._kind_times * self._kind_layer
            others = self._kind_times - layers
            table = [(layers @ one[:, 0], others @ one[:, 0], one[self._kind_layer, 1].min()) for one in each]
            degrees = splits.alike("tp", "cp", "dp", "ep", "etp", "offload")
            self._last = _OfSplits(splits, degrees, np.array(table, float)[place])
        return self._last

    def estimate(self, layout: Layout, kinds: Kinds) -> NDArray[np.float64]:
        """[state, rank]: about the bytes that each rank of a divided layout holds at its worst moment: all that can be alive,
        and the most that one of its parts needs for itself."""
        divided = self.divided(layout)
        each = self._part_bytes(layout) * layout.micro_batch
        micro_batches = self._predictor.micro_batches(layout)
        kept = divided.parts @ each[:, 0]
        if layout.pp > 1 and layout.schedule in ("zb", "zbv"):
            held = np.stack((kept, divided.parts @ each[:, 2]), axis=1) / layout.chunks
            moments = _moments(layout.schedule, layout.pp, layout.chunks, min(micro_batches, 3 * layout.pp))
            activations = (moments @ held[:, :, None])[:, :, 0].max(axis=1)
        else:
            activations = alive(layout.schedule, layout.pp, layout.chunks, micro_batches) * kept
        working = ((divided.parts > 0) * each[:, 1]).max(axis=1)
        return self.state(layout, kinds) @ divided.units.T + activations + working

    def divided(self, layout: Layout) -> Divided:
        """What each pipeline rank, and the first stage, of a divided layout hold."""
        key = layout.stages, layout.schedule == "zbv", layout.pp
        if key not in self._divided:
            each = [
                self.counted(workload.parts(self.spec, layout.stages, stage)) for stage in range(layout.stage_count)
            ]
            parts = np.array([
                sum(each[layout.stage_of(rank, chunk)] for chunk in range(layout.chunks)) for rank in range(layout.pp)
            ])  # fmt: skip
            held = np.array([self._count(traffic.held_units(self.spec, layout, rank)) for rank in range(layout.pp)])
            first = self._count(stage_units(self.spec, layout.stages, 0))
            crossings = np.full(layout.pp, 2 * layout.chunks)
            crossings[0] -= 1
            crossings[0 if layout.schedule == "zbv" else -1] -= 1
            crossings[-1] -= 2 * (layout.schedule == "zbv")  # the turn of the V
            self._divided[key] = Divided(parts, np.array(each[: layout.pp]), crossings * (layout.pp > 1), held, first)
        return self._divided[key]

    def unit_of(self, part: str) -> str:
        """The first unit like the one that a part's parameters are of."""
        return self._unit_of["embed" if part == "head" and self.spec.tied else part]

    def counted(self, parts: Iterable[str]) -> NDArray[np.int64]:
        """By kind of part."""
        return np.bincount([self.kind_of[part] for part in parts], minlength=len(self.kinds))

    def _count(self, names: Iterable[str]) -> NDArray[np.int64]:
        """By kind of unit."""
        return np.bincount([self._place[name] for name in names], minlength=len(self.units))

    def state(self, layout: Layout, kinds: Kinds) -> NDArray[np.float64]:
        """[state, unit]: bytes of parameters, gradients and optimiser state of one unit of each kind."""
        key = (layout.tp, layout.cp, layout.dp, layout.ep, layout.etp, layout.offload, kinds)
        if key not in self._states:
            parameters, gradients, optimizer = self._state_of(layout, kinds)
            self._states[key] = parameters + gradients + (0 if layout.offload == "optimizer" else optimizer)
        return self._states[key]

    def owned(self, layout: Layout, kinds: Kinds) -> NDArray[np.float64]:
        """[state, unit]: elements that one rank's optimiser updates."""
        return self._state_of(layout, kinds)[2] / self.job.software.optimizer_bytes

    def _state_of(self, layout: Layout, kinds: Kinds) -> NDArray[np.float64]:
        zero, dense, experts = self.shards(layout, kinds)
        held = [units.held(self.spec, layout, unit) for unit in self.units]
        total = np.zeros((3, len(kinds), len(held)))
        for elements, shards in (([one.longest for one in held], dense), ([one.experts for one in held], experts)):
            total += np.array(footprint.state_of(np.array(elements), shards, zero, software=self.job.software))
        return total

    def shards(self, layout: Layout, kinds: Kinds) -> tuple[NDArray[np.int64], ...]:
        """By state, in a column: zero, the ranks that share one copy of what is sharded, and those that share one of experts."""
        key = layout.dp, layout.cp, kinds
        if key not in self._shards:
            each = [msgspec.structs.replace(layout, zero=zero, dp_shard=shard) for zero, shard in kinds]
            self._shards[key] = np.array([(one.zero, units.shard_ranks(one)) for one in each]).T[:, :, None]
        zero, dense = self._shards[key]
        part = np.maximum(1, layout.expert_data * dense // units.data_ranks(layout))
        return zero, dense, np.where(zero == 0, 1, part)

    def _part_bytes(self, layout: Layout) -> NDArray[np.float64]:
        """[kind of part, (kept, needed beyond that, kept for a weight gradient put off)] of one row of a micro-batch, which grow in
        proportion to its rows."""
        key = (layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.ep, layout.etp, layout.recompute, layout.offload)
        if key not in self._bytes:
            one = msgspec.structs.replace(layout, micro_batch=1)
            simple = msgspec.structs.replace(one, ep=1, etp=0, recompute="none", cp_kind="gather")  # for all but layers
            works = [workload.work(self.job, one if part.startswith("layers") else simple, part) for part in self.kinds]
            away = layout.offload == "activations"
            self._bytes[key] = np.array(
                [(0 if away else work.kept_bytes, work.backward_working, work.deferred) for work in works], float
            )
        return self._bytes[key]


def _most_layers(room: Any, state: Any, kept: Any, instances: Any, chunks: Any) -> Any:
    """Of a rank with `room` bytes where each layer has `state`, and `instances` of micro-batches of a chunk are alive, each of which
    keeps `kept` a layer. A chunk has the floor of its share of the layers at least."""
    whole = np.floor(np.maximum(0.0, room) / (chunks * state + instances * kept))
    return np.minimum(whole * chunks + chunks - 1, np.floor(np.maximum(0.0, room - instances * whole * kept) / state))


def _busiest(takes: NDArray[np.float64], sizes: NDArray[np.int64], layers: int) -> NDArray[np.int64]:
    """[case]: the fewest layers n such that ranks that take n each, but no more than `takes` [case, group of `sizes` ranks], take
    all; one more than there are where they can't."""
    low, high = np.full(len(takes), -(-layers // int(sizes.sum())) - 1), np.full(len(takes), layers + 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        enough = np.minimum(takes, middle[:, None]) @ sizes >= layers
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


@lru_cache(maxsize=4096)
def _instances(
    orders: tuple[tuple[str, int], ...], pp: int, micro_batches: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Chunks a rank by pipeline, and [pipeline, rank] the most micro-batches of a chunk alive."""
    chunks = np.array([chunks_of(name, vp) for name, vp in orders])
    each = [
        alive(name, pp, count, micro_batches) * count for (name, _), count in zip(orders, chunks.tolist(), strict=True)
    ]
    return chunks, np.array(each)


@lru_cache(maxsize=64)
def _moments(schedule: str, pp: int, vp: int, micro_batches: int) -> NDArray[np.float64]:
    """[rank, moment, (alive until their input gradient, then until their weight gradient)]: chunks of micro-batches, at the
    moments that others don't exceed in both."""
    rows: list[list[tuple[int, int]]] = []
    for actions in build(schedule, pp, micro_batches, vp, transfers=False).ranks:
        now, most = (0, 0), dict[int, int]()
        for action in actions:
            kind = action.kind
            begun, passed, ended = kind is Kind.FORWARD, kind is Kind.INPUT, kind is Kind.WEIGHT
            now = now[0] + begun - passed, now[1] + passed - ended
            most[now[0]] = max(now[1], most.get(now[0], 0))
        best, kept = -1, list[tuple[int, int]]()
        for first in sorted(most, reverse=True):
            if most[first] > best:
                best = most[first]
                kept.append((first, best))
        rows.append(kept)
    longest = max(len(row) for row in rows)
    return np.array([row + row[-1:] * (longest - len(row)) for row in rows], float)


@lru_cache(maxsize=4096)
def alive(schedule: str, pp: int, vp: int, micro_batches: int) -> NDArray[np.float64]:
    """By rank, the most micro-batches of all its layers that are alive at once, until their input gradient: closed forms of
    the orders in `pipeline_schedule.py`."""
    ranks = np.arange(pp)
    if schedule == "gpipe":
        return np.full(pp, float(micro_batches))
    if schedule == "interleaved" and pp > 1:
        longest = -(-micro_batches // max(1, micro_batches // pp))
        return np.minimum(micro_batches * vp, 2 * (pp - 1 - ranks) + (vp - 1) * longest + 1) / vp
    return np.asarray(alive_at(schedule, pp, micro_batches, ranks), float)


def alive_at(schedule: str, pp: int, micro_batches: Any, rank: Any) -> Any:
    """The same of `zbv` or of `1f1b` (and `zb`), for arrays."""
    if schedule == "zbv" and pp > 1:
        return (np.minimum(micro_batches, 2 * pp - 1 - rank) + np.minimum(micro_batches, rank + 1)) / 2
    return np.minimum(micro_batches, pp - rank)
