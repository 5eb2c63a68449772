"""What a rank holds of a unit's parameters: elements, and which of their gradients other ranks must add.

Read from the placement table, one unit at a time, as `parallel/data_parallel.py` lays them out: parameters whose gradients
are shared stand first in a flat buffer, which is cut into equal parts by the largest tensor rank's size. Experts, whose
gradients are summed over other ranks (`Layout.expert_data`), have a buffer of their own.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import msgspec

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import Parameter, declare, declare_layer, place_parameter

EXPERT_SPLITS = ("experts", "expert_rows", "expert_columns")


class Held(msgspec.Struct, frozen=True):
    """One unit on one tensor rank; of experts, those of the rank that holds most."""

    longest: int
    """Elements on the tensor rank that holds most: what every rank's buffer is cut by."""
    experts: int
    """Elements of experts, beside these."""
    shared: tuple[tuple[int, int], ...]
    """(how many tensor ranks must add its gradient, elements) of each parameter outside experts, in the buffer's order."""

    @property
    def elements(self) -> int:
        """All that this rank holds."""
        return self.experts + sum(elements for _, elements in self.shared)

    def owned(self, tp_sum: int, low: int, high: int) -> int:
        """Elements in [low, high) of the buffer whose gradients `tp_sum` tensor ranks must add."""
        total, begin = 0, 0
        for add, elements in self.shared:
            end = begin + elements
            if add == tp_sum:
                total += max(0, min(end, high) - max(begin, low))
            begin = end
        return total


def data_ranks(layout: Layout) -> int:
    """Ranks whose gradients of one parameter are added: those of context parallelism see other tokens too."""
    return layout.dp * layout.cp


def shard_ranks(layout: Layout) -> int:
    """Ranks that share one copy of the sharded state."""
    return layout.shard_ranks * (layout.cp if layout.shard_ranks == layout.dp and layout.zero else 1)


def expert_shard_ranks(layout: Layout) -> int:
    """The same of experts: as many as lie within a shard group."""
    return 1 if layout.zero == 0 else max(1, layout.expert_data * shard_ranks(layout) // data_ranks(layout))


class Buffer(NamedTuple):
    """One of a unit's flat buffers: the axis of the ranks that share it, and that of those that hold the same of it."""

    axis: str
    copies: str
    elements: int
    shards: int
    replicas: int

    @property
    def part(self) -> int:
        """Elements that each of the sharing ranks owns."""
        return -(-self.elements // self.shards)


def buffers(spec: ModelSpec, layout: Layout, unit: str, tp_rank: int = 0) -> list[Buffer]:
    """Of a unit; experts', if it has any, is the second."""
    one, shards = held(spec, layout, unit, tp_rank), shard_ranks(layout)
    found = [Buffer("shard", "replica", one.longest, shards, data_ranks(layout) // shards)]
    if one.experts:
        shards = expert_shard_ranks(layout)
        found.append(Buffer("edp", "edp", one.experts, shards, layout.expert_data // shards))
    return found


def held(spec: ModelSpec, layout: Layout, unit: str, tp_rank: int = 0) -> Held:
    """Equal layers are placed once."""
    degrees = (layout.tp, layout.sp, layout.ep, layout.etp)
    return _held(spec, alike(spec)[unit], degrees, tp_rank)


@functools.cache
def alike(spec: ModelSpec) -> dict[str, str]:
    """Each unit's first equal: one with the same parameters but for the names."""
    first: dict[tuple[Parameter, ...], str] = {}
    found: dict[str, str] = {}
    for parameter in declare(spec):
        unit = parameter.unit
        if unit not in found:
            nameless = tuple(msgspec.structs.replace(p, name="", unit="") for p in _declared(spec, unit))
            found[unit] = first.setdefault(nameless, unit)
    return found


def _declared(spec: ModelSpec, unit: str) -> list[Parameter]:
    kind, _, number = unit.partition(".")
    if kind == "layers":
        return declare_layer(spec, int(number))
    bare = msgspec.structs.replace(spec, layers=0, predicted=1)
    return [parameter for parameter in declare(bare) if parameter.unit == unit]


@functools.cache
def _held(spec: ModelSpec, unit: str, degrees: tuple[int, ...], tp_rank: int) -> Held:
    tp, sp, ep, etp = degrees
    layout, parameters = Layout(tp=tp, sp=sp, ep=ep, etp=etp), _declared(spec, unit)

    def elements(parameter: Parameter, tp_rank: int) -> tuple[int, int]:
        placed = place_parameter(layout, parameter, spec.kv_heads, tp_rank=tp_rank)
        return placed.tp_sum, math.prod(placed.size)

    dense = [p for p in parameters if p.split not in EXPERT_SPLITS]
    own = sorted((elements(p, tp_rank) for p in dense), key=lambda item: -item[0])
    return Held(
        longest=sum(elements(p, 0)[1] for p in dense),
        experts=sum(elements(p, tp_rank)[1] for p in parameters if p.split in EXPERT_SPLITS),
        shared=tuple(own),
    )
