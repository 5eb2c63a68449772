"""What the search chooses from: every legal layout of a world, as arrays, within the user's own limits.

A layout is three choices. A *split* says how one micro-batch is computed (all degrees, micro-batch, recomputation), a
*pipeline* in what order (schedule, chunks a rank), a *state* what data-parallel ranks share (zero, dp_shard). Every pipeline
and every state goes with every split, so that counting and pruning need not list the products.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import CHOICES, Layout, Layouts, divisors
from fiveply.spec.legality import legal

Kinds: TypeAlias = tuple[tuple[int, int], ...]
"""States of data-parallel ranks: (zero, dp_shard) each."""
SPLIT = ("tp", "cp", "pp", "dp", "micro_batch", "sp", "cp_kind", "ep", "etp", "recompute", "offload")


class Limits(msgspec.Struct, frozen=True):
    """Constraints: `fixed` values and largest values (`most`) of a layout's keys, and the values that a system has (`among`)."""

    fixed: dict[str, Any] = {}
    most: dict[str, int] = {}
    among: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def parse(cls, fix: Iterable[str] = (), most: Iterable[str] = ()) -> Limits:
        """From `key=value` texts; raises InputError for what is no key or value, or contradicts itself."""
        fixed: dict[str, Any] = {}
        for text in fix:
            key, value = _one(text, "--fix")
            if fixed.get(key, value) != value:
                raise InputError(f"{key}={fixed[key]} and {key}={value} contradict each other", where="--fix", key=key,
                                 fix="give one of them")  # fmt: skip
            fixed[key] = value
        largest: dict[str, int] = {}
        for text in most:
            key, value = _one(text, "--max")
            if not isinstance(value, int):
                raise InputError(f"{key} is no number", where="--max", key=key, fix=f"say --fix {key}={value}")
            largest[key] = min(value, largest.get(key, value))
            if isinstance(fixed.get(key), int) and fixed[key] > largest[key]:
                raise InputError(f"--fix {key}={fixed[key]} exceeds --max {key}={value}", where="--max", key=key,
                                 fix="give one of them")  # fmt: skip
        Layout(**fixed).check("--fix")
        return cls(fixed, largest)

    def allows(self, key: str, value: Any) -> bool:
        if key in self.fixed and self.fixed[key] != value:
            return False
        if key in self.among and value not in self.among[key]:
            return False
        return key not in self.most or value <= self.most[key]

    def choose(self, key: str, values: Iterable[Any]) -> list[Any]:
        return [value for value in values if self.allows(key, value)]


def _one(text: str, where: str) -> tuple[str, Any]:
    layouts = Layout.parse(text, where)  # reads and checks one key; a value equal to the default is one too
    key = text.partition("=")[0].strip()
    if "," in text or key not in Layout.__struct_fields__:
        raise InputError(f"'{text}' is not one key", where=where, fix="give each key on its own, as tp=8")
    return key, getattr(layouts, key)


class Splits(msgspec.Struct, frozen=True):
    """Legal splits of one world: `columns` by key, one row a split."""

    columns: dict[str, NDArray[Any]]
    codes: dict[str, tuple[NDArray[np.int64], int]] = {}
    """Of columns, as they were asked for: each value's number, and how many values there are."""

    def __len__(self) -> int:
        return len(self.columns["tp"])

    def layout(self, row: int) -> Layout:
        """One of them, with neither pipeline nor state."""
        return Layout(**{key: column[row].item() for key, column in self.columns.items()})

    def alike(self, *keys: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One row of each combination of these keys' values, and by row the place of its combination among those."""
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        codes = np.zeros(len(self), np.int64)
        for key in keys:
            if key not in self.codes:
                values, code = np.unique(self.columns[key], return_inverse=True)
                self.codes[key] = code, len(values)
            code, count = self.codes[key]
            codes = codes * count + code
        _, first, place = np.unique(codes, return_index=True, return_inverse=True)
        return first, place


def splits(spec: ModelSpec, world: int, *, sequence: int, global_batch: int, limits: Limits) -> Splits:
    """All of `world` ranks. Offloading is among them where it is asked for. Raises InputError for a batch that no layout can
    have."""
    blocks: list[NDArray[np.int64]] = []
    heads, experts = spec.heads, spec.experts
    words = {
        "cp_kind": limits.choose("cp_kind", CHOICES["cp_kind"]),
        "recompute": limits.choose("recompute", CHOICES["recompute"]),
        "offload": limits.choose("offload", [limits.fixed.get("offload", "none")]),
    }
    for tp in limits.choose("tp", (d for d in divisors(world) if heads % d == 0)):
        for cp in limits.choose("cp", (d for d in divisors(world // tp) if 2 * d <= sequence or d == 1)):
            for pp in limits.choose("pp", (d for d in divisors(world // tp // cp) if d <= spec.layers)):
                dp = world // tp // cp // pp
                if global_batch % dp or not limits.allows("dp", dp):
                    continue
                kinds = len(words["cp_kind"]) if cp > 1 else int("gather" in words["cp_kind"])
                rest = np.meshgrid(
                    [tp], [cp], [pp], [dp],
                    limits.choose("micro_batch", divisors(global_batch // dp)),
                    (limits.choose("sp", (-1, 0)) or limits.choose("sp", (1,))) if tp > 1 else (-1,),
                    range(kinds),
                    limits.choose("ep", divisors(experts.count) if experts else (1,)),
                    limits.choose("etp", (0, *(d for d in divisors(tp) if d < tp)) if experts else (0,)),
                    range(len(words["recompute"])),
                    [0],
                )  # fmt: skip
                blocks.append(np.array(rest, np.int64).reshape(len(SPLIT), -1))
    table = np.concatenate(blocks, axis=1) if blocks else np.zeros((len(SPLIT), 0), np.int64)
    columns: dict[str, NDArray[Any]] = dict(zip(SPLIT, table, strict=True))
    read = {key: np.array(names)[columns[key]] if names else columns[key] for key, names in words.items()}
    if not table.size:
        return Splits(columns)
    keep = legal(Layouts(**columns | read), spec, sequence=sequence, global_batch=global_batch)
    codes = {key: (columns[key][keep], len(names)) for key, names in words.items()}
    return Splits({key: column[keep] for key, column in (columns | read).items()}, codes)


def pipelines(spec: ModelSpec, pp: int, limits: Limits) -> list[tuple[str, int]]:
    """(schedule, vp) of `pp` ranks; at one rank all schedules are the same."""
    found = [("1f1b", 0)]
    if pp > 1:
        found += [("gpipe", 0), ("zb", 0)]
        found += [("zbv", 0)] * (2 * pp <= spec.layers)
        found += [("interleaved", vp) for vp in range(2, spec.layers // pp + 1)]
    elif "schedule" in limits.fixed:
        found = [(limits.fixed["schedule"], limits.fixed.get("vp", 0))]
    return [(name, vp) for name, vp in found if limits.allows("schedule", name) and limits.allows("vp", vp)]


def chunks_of(schedule: str, vp: int) -> int:
    """Chunks a rank, as `Layout.chunks`."""
    return vp or (2 if schedule in ("interleaved", "zbv") else 1)


def states(dp: int, cp: int, limits: Limits) -> Kinds:
    """(zero, dp_shard) of `dp` replicas; with one, and no context ranks beside it, there is nothing to share."""
    found = [(0, 0)]
    if dp * cp > 1:
        found += [
            (zero, 0 if shard == dp else shard) for zero in (1, 2, 3) for shard in divisors(dp) if shard > 1 or dp == 1
        ]
    elif limits.fixed.get("zero"):
        found = [(limits.fixed["zero"], 0)]
    return tuple(
        (zero, shard)
        for zero, shard in found
        if limits.allows("zero", zero) and limits.allows("dp_shard", shard or (dp if "dp_shard" in limits.fixed else 0))
    )
