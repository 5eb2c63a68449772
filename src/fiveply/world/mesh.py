"""Layout -> the groups of one rank. The only place that makes process groups; axes of size one are None.

A rank makes only the groups that it belongs to, so a world of thousands makes a handful each. Two groups serve the
pipeline, one a direction, because a backend without tags matches transfers of a pair by their order.

Ranks of one host talk through shared memory where they compute on CPUs, and through the default group's backend else.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import RunError
from fiveply.spec.layout import Coordinates, Layout
from fiveply.spec.placement import Placed
from fiveply.world import shm_backend
from fiveply.world.collectives import Axis
from fiveply.world.recorder import Recorder

Transport = Literal["auto", "shm", "gloo"]
"""What carries an axis between CPU ranks: `auto` is shared memory wherever it serves. GPUs have NCCL."""


class Groups:
    """Process groups by their ranks, made once: axes over the same ranks share one, and so do several layouts in one world.

    Every rank must ask for equally many, in the same order.
    """

    def __init__(self, transport: Transport = "auto") -> None:
        self.transport = transport
        self.fell_back = ""
        """Why an axis that shared memory should carry has gloo."""
        self._made: dict[tuple[tuple[int, ...], int], dist.ProcessGroup] = {}

    def get(self, ranks: list[int], lane: int = 0, name: str = "") -> dist.ProcessGroup:
        """`lane` keeps apart what must not wait for another: the two directions of a pipeline. `name`: for messages.

        Raises RunError where shared memory was asked for and can't serve.
        """
        key = (tuple(ranks), lane)
        if key not in self._made:
            self._made[key] = self._make(ranks)
        group = self._made[key]
        if isinstance(group, shm_backend.SharedMemoryGroup):
            group.channel.names.setdefault(name)
        return group

    def _make(self, ranks: list[int]) -> dist.ProcessGroup:
        how: dict[str, Any] = {"timeout": _default_timeout(), "use_local_synchronization": True}
        options = shm_backend.Options()
        if self.transport != "gloo" and dist.get_backend() == "gloo" and len(ranks) > 1:
            shm_backend.register()
            how |= {"backend": "shm", "pg_options": options}
        group = dist.new_group(ranks, **how)
        if options.fell_back and self.transport == "shm":
            raise RunError(f"shared memory can't serve ranks {ranks} ({options.fell_back}); use --backend auto or gloo")
        self.fell_back = self.fell_back or options.fell_back
        assert isinstance(group, dist.ProcessGroup)
        return group

    @property
    def call_seconds(self) -> float:
        """Time-out of a call."""
        timeout = _default_timeout()
        return timeout.total_seconds() if timeout else 600.0

    @property
    def carriers(self) -> str:
        """The backends in use, as `shm` or `gloo` or both."""
        shared = [isinstance(group, shm_backend.SharedMemoryGroup) for group in self._made.values() if group.size() > 1]
        return "+".join(
            name for name, used in (("shm", any(shared)), (dist.get_backend(), not all(shared) or not shared)) if used
        )


def _default_timeout() -> timedelta | None:
    """What `launch` was given; torch would give a new group half an hour."""
    group = dist.group.WORLD
    if group is None or dist.get_backend() != "gloo":
        return None
    return group._get_backend(torch.device("cpu")).options._timeout


class Mesh:
    """The axes of this rank in a world of `layout.world` ranks.

    tp: tensor ranks. kv: tensor ranks that hold the same key-value head. shard, replica: data-parallel ranks that share
    one copy of the state, and those that hold the same part of it. dp: both. down, up: the pipeline, one lane a direction.
    tied: first and last stage where both hold the embedding. model: the ranks of one replica. world: all.
    recorder: told of all that these axes do.
    """

    kind: type[Axis] = Axis
    """What its axes are."""

    def __init__(
        self, layout: Layout, spec: ModelSpec | None, groups: Groups | None = None, recorder: Recorder | None = None
    ) -> None:
        """`spec=None`: a user's own module, which has neither key-value heads nor a tied embedding that we know of."""
        self.layout, self.rank = layout, dist.get_rank() if dist.is_initialized() else 0
        self.at = at = layout.coordinates(self.rank)
        self.recorder = recorder or Recorder(self.rank)
        self.groups = groups or Groups()
        places = [layout.coordinates(rank) for rank in range(layout.world)]

        def axis(name: str, belongs: Callable[[Coordinates], bool], lane: int = 0) -> Axis | None:
            ranks = [rank for rank, place in enumerate(places) if belongs(place)]
            if len(ranks) == 1 and lane == 0:
                return None
            group = self.groups.get(ranks, lane, name)
            return self.kind(name, ranks, group, self.rank, self.recorder) if len(ranks) > 1 else None

        self.world = axis("world", lambda _: True)
        self.tp = axis("tp", lambda p: (p.dp, p.pp) == (at.dp, at.pp))
        alike = max(1, layout.tp // spec.kv_heads) if spec else 1
        self.kv = axis("kv", lambda p: (p.dp, p.pp, p.tp // alike) == (at.dp, at.pp, at.tp // alike))
        self.dp = axis("dp", lambda p: (p.tp, p.pp) == (at.tp, at.pp))
        self.shard = axis("shard", lambda p: (p.tp, p.pp, p.replica) == (at.tp, at.pp, at.replica))
        self.replica = axis("replica", lambda p: (p.tp, p.pp, p.shard) == (at.tp, at.pp, at.shard))
        self.down = axis("pp", lambda p: (p.tp, p.dp) == (at.tp, at.dp))
        self.up = axis("pp", lambda p: (p.tp, p.dp) == (at.tp, at.dp), lane=1) if layout.pp > 1 else None
        self.model = axis("model", lambda p: p.dp == at.dp)
        self.tied = None
        if spec and spec.tied and len(layout.end_ranks) > 1:
            # Ranks between the ends make a group too, of themselves alone: gloo numbers groups by process, and members of a
            # later one must have made equally many.
            # A lane for each depth keeps one layout's lone groups from standing in for another's.
            mine = layout.end_ranks if at.pp in layout.end_ranks else {at.pp}
            self.tied = axis(
                "tied", lambda p: (p.tp, p.dp) == (at.tp, at.dp) and p.pp in mine, lane=2 + max(layout.end_ranks)
            )

    @property
    def place(self) -> str:
        """`dp 0, pp 1`: this rank's coordinates along the axes that have more than one rank."""
        degrees = {"dp": self.layout.dp, "tp": self.layout.tp, "pp": self.layout.pp}
        return ", ".join(f"{axis} {getattr(self.at, axis)}" for axis, degree in degrees.items() if degree > 1)

    def speaks_for(self, placed: Placed) -> bool:
        """Whether this rank does, of all that hold the same: every element of a model is spoken for once in the world."""
        return placed.counted and self.at.replica == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's small Python value, in rank order, on every rank of the world. Collective."""
        return [value] if self.world is None else self.world.gather_objects(value)

    def collect_objects(self, value: Any) -> list[Any]:
        """Each rank's Python value, in rank order, on rank 0 of the world; others get none. Collective."""
        return [value] if self.world is None else self.world.collect_objects(value)
