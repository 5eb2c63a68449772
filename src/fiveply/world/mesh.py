"""Layout -> the groups of one rank. The only place that makes process groups; axes of size one are None.

A rank makes only the groups that it belongs to, so a world of thousands makes a handful each. Two groups serve the
pipeline, one a direction, because a backend without tags matches transfers of a pair by their order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Coordinates, Layout
from fiveply.world.collectives import Axis
from fiveply.world.recorder import Recorder


class Groups:
    """Process groups by their ranks, made once: axes over the same ranks share one, and so do several layouts in one world.

    Every rank must ask for equally many, in the same order.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], int], dist.ProcessGroup] = {}

    def get(self, ranks: list[int], lane: int = 0) -> dist.ProcessGroup:
        """`lane` keeps apart what must not wait for another: the two directions of a pipeline."""
        key = (tuple(ranks), lane)
        if key not in self._made:
            group = dist.new_group(ranks, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._made[key] = group
        return self._made[key]


class Mesh:
    """The axes of this rank in a world of `layout.world` ranks.

    tp: tensor ranks. kv: tensor ranks that hold the same key-value head. shard, replica: data-parallel ranks that share
    one copy of the state, and those that hold the same part of it. dp: both. down, up: the pipeline, one lane a direction.
    tied: first and last stage where both hold the embedding. model: the ranks of one replica. world: all.
    recorder: told of all that these axes do.
    """

    def __init__(self, layout: Layout, spec: ModelSpec, groups: Groups | None = None) -> None:
        self.layout, self.rank = layout, dist.get_rank()
        self.at = at = layout.coordinates(self.rank)
        self.recorder = Recorder(self.rank)
        self._groups = groups or Groups()
        places = [layout.coordinates(rank) for rank in range(layout.world)]

        def axis(name: str, belongs: Callable[[Coordinates], bool], lane: int = 0) -> Axis | None:
            ranks = [rank for rank, place in enumerate(places) if belongs(place)]
            if len(ranks) == 1 and lane == 0:
                return None
            group = self._groups.get(ranks, lane)
            return Axis(name, ranks, group, self.rank, self.recorder) if len(ranks) > 1 else None

        self.world = axis("world", lambda _: True)
        self.tp = axis("tp", lambda p: (p.dp, p.pp) == (at.dp, at.pp))
        alike = max(1, layout.tp // spec.kv_heads)
        self.kv = axis("kv", lambda p: (p.dp, p.pp, p.tp // alike) == (at.dp, at.pp, at.tp // alike))
        self.dp = axis("dp", lambda p: (p.tp, p.pp) == (at.tp, at.pp))
        self.shard = axis("shard", lambda p: (p.tp, p.pp, p.replica) == (at.tp, at.pp, at.replica))
        self.replica = axis("replica", lambda p: (p.tp, p.pp, p.shard) == (at.tp, at.pp, at.shard))
        self.down = axis("pp", lambda p: (p.tp, p.dp) == (at.tp, at.dp))
        self.up = axis("pp", lambda p: (p.tp, p.dp) == (at.tp, at.dp), lane=1) if layout.pp > 1 else None
        self.model = axis("model", lambda p: p.dp == at.dp)
        self.tied = None
        if spec.tied and len(layout.end_ranks) > 1:
            # Ranks between the ends make a group too, of themselves alone: gloo numbers groups by process, and members of a
            # later one must have made equally many.
            # A lane for each depth keeps one layout's lone groups from standing in for another's.
            mine = layout.end_ranks if at.pp in layout.end_ranks else {at.pp}
            self.tied = axis(
                "tied", lambda p: (p.tp, p.dp) == (at.tp, at.dp) and p.pp in mine, lane=2 + max(layout.end_ranks)
            )
