"""Whether layouts fit: bounds of memory over arrays of them, and the exact answer for one.

The bounds are of the worst rank's bytes from below, so what they exclude can't fit. They take the state of every unit from
`footprint.state_of` and what a micro-batch keeps from `workload`, and leave out what only the exact walk over the schedule
knows (working memory, buffers).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.plan import cost, footprint, traffic, units, workload
from fiveply.plan.predict import Job
from fiveply.spec.layout import Layout
from fiveply.spec.placement import stage_units

RISK = 0.05
"""A layout fits where the probability of running out of memory is at most this."""
CHUNKS = {"interleaved": 2, "zbv": 2}
"""Of a rank, where `vp` is left to its default."""
GROUPS = 4


class Fitting:
    """Of one job. `capacity`: the most predicted bytes that fit at RISK."""

    def __init__(self, job: Job) -> None:
        self.job, self.spec = job, job.spec
        bias, deviation = cost.memory_error(job.machine, job.software)
        room = max(0.0, job.machine.memory_bytes - job.software.context_bytes)
        self.capacity = room * math.exp(-bias - deviation * NormalDist().inv_cdf(1 - RISK))
        self._unit_of = units.alike(self.spec)
        self.units = list(dict.fromkeys(self._unit_of.values()))
        """The first unit of each kind."""
        self._place = {name: self.units.index(first) for name, first in self._unit_of.items()}
        self._layer = np.array([unit.startswith("layers") for unit in self.units])
        self._times = self.count(self._unit_of)
        self._first = {kind: part for part, kind in reversed(workload.kinds(self.spec).items())}
        self._kind_of = {part: self._first[kind] for part, kind in workload.kinds(self.spec).items()}
        self._kept: dict[Hashable, dict[str, int]] = {}
        self._states: dict[Hashable, NDArray[np.float64]] = {}

    def fits(self, layout: Layout) -> bool:
        """Exactly, for a resolved layout."""
        return max(self.peaks(layout)) <= self.capacity

    def peaks(self, layout: Layout) -> list[int]:
        """Bytes by pipeline rank. Beyond a few rounds the number of micro-batches does not matter, but for GPipe."""
        job = self.job
        rows = job.global_batch // layout.dp
        if layout.schedule != "gpipe" and rows // layout.micro_batch > 4 * layout.pp:
            rows = layout.micro_batch * (4 * layout.pp + rows // layout.micro_batch % layout.pp)
        found = footprint.by_rank(
            self.spec, layout, sequence=job.sequence, global_batch=rows * layout.dp, software=job.software,
            precision=job.precision,
        )  # fmt: skip
        return [one.peak for one in found]

    # many at once

    def may_fit(
        self, layouts: Sequence[Layout], orders: list[tuple[str, int]], kinds: list[tuple[int, int]]
    ) -> NDArray[np.bool_]:
        """[layout, pipeline, state]: whether the layers of splits of one pp, dp and cp could be dealt to ranks such that all
        fit, if layers were divisible.

        A rank r with n(r) layers holds n(r) (s + a(r) k): s is a layer's state, k what it keeps of a micro-batch, a(r) the
        micro-batches alive. The least possible maximum over ranks is L / sum(1 / (s + a(r) k)). At pp > 1 embedding and head
        are left out, and ranks are taken in a few groups, each at its least a(r).
        """
        pp = layouts[0].pp
        kept = np.array([self._kept_inside_and_out(layout) for layout in layouts], float)
        bytes_of = np.array([self.state(layout, kinds) for layout in layouts])  # [layout, state, unit]
        inside = bytes_of[:, :, self._layer] @ self._times[self._layer]
        if pp == 1:
            outside = bytes_of[:, :, ~self._layer] @ self._times[~self._layer]
            held = kept.sum(axis=1)[:, None] + inside + outside
            return np.repeat((held <= self.capacity)[:, None, :], len(orders), axis=1)
        layers = int(self._times[self._layer].sum())
        layer_kept, layer_state = kept[:, 0] / layers, inside / layers
        micro_batches = np.array([self.job.global_batch // one.dp // one.micro_batch for one in layouts])
        may = np.zeros((len(layouts), len(orders), len(kinds)), bool)
        for each in np.unique(micro_batches).tolist():
            here = np.flatnonzero(micro_batches == each)
            for index, (name, vp) in enumerate(orders):
                relief = np.zeros(layer_state[here].shape)
                for ranks in np.array_split(alive(name, pp, vp or CHUNKS.get(name, 1), each), min(GROUPS, pp)):
                    relief += len(ranks) / (layer_state[here] + ranks.min() * layer_kept[here, None])
                may[here, index] = layers <= self.capacity * relief
        return may

    def least_bytes(self, layout: Layout, kinds: list[tuple[int, int]]) -> NDArray[np.float64]:
        """[state, rank]: at least so many bytes are held by each rank of a divided layout."""
        kept = self._kept_by_part(layout)
        held = np.zeros((layout.pp, layout.chunks))
        for rank in range(layout.pp):
            for chunk in range(layout.chunks):
                parts = workload.parts(self.spec, layout.stages, layout.stage_of(rank, chunk))
                held[rank, chunk] = sum(kept[self._kind_of[part]] for part in parts)
        # Every chunk as often as the one that keeps least: which of them are alive at the peak is the exact walk's affair.
        whole = alive(layout.schedule, layout.pp, layout.chunks, self.job.global_batch // layout.dp // layout.micro_batch)
        activations = np.minimum(whole, np.inf) * (held.min(axis=1) * layout.chunks if layout.chunks > 1 else held[:, 0])
        return self.state(layout, kinds) @ self.counts(layout).T + activations * layout.micro_batch

    def counts(self, layout: Layout) -> NDArray[np.int64]:
        """[rank, unit]: how many units of each kind a pipeline rank holds."""
        return np.array([self.count(traffic.held_units(self.spec, layout, rank)) for rank in range(layout.pp)])

    def count(self, names: Iterable[str]) -> NDArray[np.int64]:
        """By kind of unit."""
        return np.bincount([self._place[name] for name in names], minlength=len(self.units))

    def stage_units(self, layout: Layout, stage: int) -> list[str]:
        return stage_units(self.spec, layout.stages, stage)

    def state(self, layout: Layout, kinds: list[tuple[int, int]]) -> NDArray[np.float64]:
        """[state, unit]: bytes of parameters, gradients and optimiser state of one unit of each kind."""
        key = (layout.tp, layout.cp, layout.dp, layout.ep, layout.etp, layout.offload)
        if key not in self._states:
            parameters, gradients, optimizer = self._state_of(layout, kinds)
            self._states[key] = parameters + gradients + (0 if layout.offload == "optimizer" else optimizer)
        return self._states[key]

    def owned(self, layout: Layout, kinds: list[tuple[int, int]]) -> NDArray[np.float64]:
        """[state, unit]: elements that one rank's optimiser updates."""
        return self._state_of(layout, kinds)[2] / self.job.software.optimizer_bytes

    def _state_of(self, layout: Layout, kinds: list[tuple[int, int]]) -> NDArray[np.float64]:
        each = [msgspec.structs.replace(layout, zero=zero, dp_shard=shard) for zero, shard in kinds]
        zero = np.array([one.zero for one in each])[:, None]
        held = [units.held(self.spec, layout, unit) for unit in self.units]
        total = np.zeros((3, len(kinds), len(held)))
        for elements, ranks in (
            ([one.longest for one in held], units.shard_ranks),
            ([one.experts for one in held], units.expert_shard_ranks),
        ):
            shards = np.array([ranks(one) for one in each])[:, None]
            total += np.array(footprint.state_of(np.array(elements), shards, zero, software=self.job.software))
        return total

    def _kept_by_part(self, layout: Layout) -> dict[str, int]:
        """Bytes that one part of each kind keeps of a row: micro-batches keep in proportion to their rows."""
        key = (layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.ep, layout.etp, layout.recompute, layout.offload)
        if key not in self._kept:
            job, one = self.job, msgspec.structs.replace(layout, micro_batch=1)
            away = layout.offload == "activations"
            self._kept[key] = {
                part: 0 if away else workload.work(
                    self.spec, one, part, sequence=job.sequence, software=job.software, precision=job.precision
                ).kept_bytes
                for part in self._first.values()
            }  # fmt: skip
        return self._kept[key]

    def _kept_inside_and_out(self, layout: Layout) -> tuple[int, int]:
        """What all layers, and what all other parts keep of a micro-batch."""
        kept, inside, outside = self._kept_by_part(layout), 0, 0
        for part, kind in self._kind_of.items():
            if part.startswith("layers"):
                inside += kept[kind]
            else:
                outside += kept[kind]
        return inside * layout.micro_batch, outside * layout.micro_batch


@lru_cache(maxsize=4096)
def alive(schedule: str, pp: int, vp: int, micro_batches: int) -> NDArray[np.float64]:
    """By rank, the most micro-batches of all its layers that are alive at once, until their input gradient: closed forms of
    the orders in `pipeline_schedule.py`."""
    ranks = np.arange(pp)
    if schedule == "gpipe":
        return np.full(pp, float(micro_batches))
    if schedule == "zbv" and pp > 1:
        return (np.minimum(micro_batches, 2 * pp - 1 - ranks) + np.minimum(micro_batches, ranks + 1)) / 2
    if schedule == "interleaved" and pp > 1:
        longest = -(-micro_batches // max(1, micro_batches // pp))
        return np.minimum(micro_batches * vp, 2 * (pp - 1 - ranks) + (vp - 1) * longest + 1) / vp
    return np.minimum(micro_batches, pp - ranks).astype(float)
