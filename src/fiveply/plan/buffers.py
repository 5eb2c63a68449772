"""Parameters and gradients that stand only for a while, as `parallel/data_parallel.py` makes and frees them.

Under zero 3 a unit's parameters are gathered around each use, one unit ahead. Under zero 2 and 3 its gradients are copied to one
buffer and reduced at the end of each backward, two reductions at a time; under zero 1 at the end of the step's last one.
"""

from __future__ import annotations

from collections.abc import Sequence

from fiveply.plan import units
from fiveply.plan.operations import Work
from fiveply.plan.parts import Case
from fiveply.spec.layout import Layout


class Buffers:
    """Of one chunk's units, in bytes by the index of a part of it."""

    def __init__(self, case: Case, layout: Layout, names: Sequence[str], tp_rank: int) -> None:
        spec, software = case.spec, case.software
        self.zero, self.software = layout.zero, software
        self.sizes: list[tuple[int, int, int]] = []
        """Elements of each unit: of its whole buffers, of the parts that a rank owns where it shares them, and of its tensors."""
        for name in names if layout.zero else ():
            unit = "embed" if name == "head" and spec.tied else name
            each = units.buffers(spec, layout, unit, tp_rank)
            whole, own = sum(one.part * one.shards for one in each), sum(one.part for one in each if one.shards > 1)
            self.sizes.append((whole, own, units.held(spec, layout, unit, tp_rank).elements))
        self.reduced = self.sizes
        """Those whose reductions this chunk starts: not an embedding's that another place of the same rank starts."""
        self.tied = 0
        """Bytes of its gradient that wait for that."""
        if layout.zero >= 1 and names[-1] == "head" and spec.tied and len(layout.end_ranks) == 1:
            self.tied = round(self.sizes[-1][2] * software.parameter_bytes) if layout.zero >= 2 else 0
            self.reduced = [*self.sizes[:-1], (0, 0, 0)]
        self.first = self.gathered(0, 0)
        owned = sum(own for _, own, _ in self.reduced)
        self.left = round(owned * software.reduce_bytes) if self.zero == 1 else self.reducing(0, 2)

    def gathered(self, index: int, step: int) -> int:
        """At zero 3 a part's parameters, and those of the part that comes next."""
        if self.zero != 3:
            return 0
        low, high = sorted((index, index + step))
        return round(sum(whole for whole, _, _ in self.sizes[max(0, low) : high + 1]) * self.software.gather_bytes)

    def formed(self, index: int) -> int:
        """At zero 2 and 3 a part's gradients as they were formed."""
        return round(self.reduced[index][2] * self.software.parameter_bytes) if self.zero >= 2 else 0

    def copied(self, index: int) -> int:
        """The same in one buffer, of the type that is reduced."""
        return round(self.reduced[index][0] * self.software.reduce_bytes) if self.zero >= 2 else 0

    def reducing(self, index: int, count: int) -> int:
        """At zero 2 and 3 the buffers of `count` parts' reductions: all gradients of each, and the part that comes of them."""
        if self.zero < 2:
            return 0
        sizes = self.reduced[index : index + count]
        return round(sum(whole + own for whole, own, _ in sizes if own) * self.software.reduce_bytes)

    def started(self, index: int) -> int:
        """At zero 1, what the last backward's reductions hold when it comes to part `index`."""
        return (
            round(sum(own for _, own, _ in self.reduced[index + 1 :]) * self.software.reduce_bytes)
            if self.zero == 1
            else 0
        )

    def gradients(self, works: Sequence[Work]) -> tuple[int, int]:
        if self.zero < 2:
            return 0, 0
        put_off = sum(one.weights for one in works)
        rest = sum(elements for _, _, elements in self.reduced) - put_off
        return round(rest * self.software.parameter_bytes), round(put_off * self.software.parameter_bytes)
