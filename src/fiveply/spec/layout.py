"""Layout: how one model and one batch are split over the ranks, in one text form used everywhere.

    dp=2,tp=2,pp=2,schedule=1f1b,micro_batch=4

The same text stands on the command line, in TOML, in logs and in checkpoint metadata. A Layout knows the degrees and where
a rank stands on each axis; whether it fits a given model is `spec/legality.py`'s affair.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from fiveply.spec.errors import InputError

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb", "zbv"]
Recompute = Literal["none", "selective", "full"]
Offload = Literal["none", "optimizer", "activations"]
CpKind = Literal["gather", "ulysses"]

CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": get_args(ScheduleName),
    "recompute": get_args(Recompute),
    "offload": get_args(Offload),
    "cp_kind": get_args(CpKind),
}
DEGREES = ("dp", "tp", "pp", "cp", "ep")


class Coordinates(msgspec.Struct, frozen=True):
    """A rank's index on each axis; `replica` and `shard` split `dp` (hybrid sharding): dp = replica * dp_shard + shard."""

    tp: int
    cp: int
    dp: int
    pp: int
    shard: int
    replica: int


class Layout(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Degrees and choices of a hybrid-parallel split (DESIGN, section 2).

    `dp_shard=0`, `vp=0`, `micro_batch=0`, `sp=-1` and `etp=0` mean "the default", which depends on other keys; the
    properties and `spec.legality.resolve` give the values in force.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0
    dp_shard: int = 0
    schedule: ScheduleName = "1f1b"
    vp: int = 0
    stages: tuple[int, ...] = ()
    micro_batch: int = 0
    recompute: Recompute = "none"
    offload: Offload = "none"
    sp: int = -1
    cp_kind: CpKind = "gather"
    etp: int = 0

    @classmethod
    def parse(cls, text: str, where: str = "layout") -> Layout:
        """Read the text form; raises InputError naming the key and what is allowed."""
        values: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in cls.__struct_fields__:
                raise InputError(
                    f"unknown key '{key}'", where=where, fix=f"keys are {', '.join(cls.__struct_fields__)}"
                )
            if not equals or not value:
                raise InputError(f"'{part}' has no value", where=where, key=key, fix="write key=value, as in dp=2,tp=2")
            if key in values:
                raise InputError("stands twice", where=where, key=key, fix="give each key once")
            values[key] = _read_value(key, value, where)
        layout = cls(**values)
        layout.check(where)
        return layout

    def check(self, where: str = "layout") -> None:
        """Raise InputError for what is wrong whatever the model: degrees below one, contradicting keys."""

        def refuse(key: str, problem: str, fix: str) -> None:
            raise InputError(problem, where=where, key=key, fix=fix)

        for key in DEGREES:
            if getattr(self, key) < 1:
                refuse(key, f"{getattr(self, key)} is not a degree", "give a whole number from 1")
        if self.zero not in (0, 1, 2, 3):
            refuse("zero", f"{self.zero} is not a ZeRO stage", "give 0, 1, 2 or 3")
        if self.sp not in (-1, 0, 1):
            refuse("sp", f"{self.sp} is not a choice", "give 0 or 1")
        for key in ("dp_shard", "vp", "micro_batch", "etp"):
            if getattr(self, key) < 0:
                refuse(key, f"{getattr(self, key)} is negative", "give a whole number from 1")
        if self.dp_shard and self.dp % self.dp_shard:
            refuse(
                "dp_shard", f"dp_shard={self.dp_shard} does not divide dp={self.dp}", f"give one of {divisors(self.dp)}"
            )
        if self.dp_shard and self.zero == 0 and self.dp_shard != 1:
            refuse("dp_shard", "nothing is sharded at zero=0", "set zero=1, 2 or 3, or leave dp_shard out")
        if self.sp == 1 and self.tp == 1:
            refuse("sp", "sequence parallel needs tp above 1", "set tp, or leave sp out")
        if self.schedule == "zbv" and self.vp not in (0, 2):
            refuse("vp", f"zbv holds 2 chunks a rank, not {self.vp}", "leave vp out")
        if self.schedule == "interleaved" and self.vp == 1:
            refuse("vp", "interleaved needs 2 or more chunks a rank", "set vp=2 or more, or schedule=1f1b")
        if self.vp > 1 and self.schedule not in ("interleaved", "zbv"):
            refuse("vp", f"{self.schedule} runs one chunk a rank", "set schedule=interleaved, or leave vp out")
        if self.stages and len(self.stages) != self.pp * self.chunks:
            refuse(
                "stages",
                f"{len(self.stages)} stages listed, {self.pp} ranks x {self.chunks} chunks = {self.pp * self.chunks} needed",
                "give one number of layers per stage, joined by +",
            )
        if any(layers < 0 for layers in self.stages):
            refuse("stages", "a stage cannot hold a negative number of layers", "give whole numbers joined by +")

    def __str__(self) -> str:
        """The shortest text that `parse` reads back to an equal Layout; `dp=1` when all is default."""
        parts: list[str] = []
        for key, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True):
            value = getattr(self, key)
            if value != default:
                parts.append(f"{key}={'+'.join(map(str, value)) if key == 'stages' else value}")
        return ",".join(parts) or "dp=1"

    @property
    def world(self) -> int:
        """Number of ranks: dp x tp x pp x cp."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def chunks(self) -> int:
        """Model chunks a pipeline rank holds (vp with its default)."""
        return self.vp or (2 if self.schedule in ("interleaved", "zbv") else 1)

    @property
    def stage_count(self) -> int:
        return self.pp * self.chunks

    @property
    def shard_ranks(self) -> int:
        """Data-parallel ranks that share one copy of the sharded state: dp_shard, or all of dp; 1 at zero=0."""
        return 1 if self.zero == 0 else (self.dp_shard or self.dp)

    @property
    def sequence_parallel(self) -> bool:
        return self.tp > 1 and self.sp != 0

    def coordinates(self, rank: int) -> Coordinates:
        """Order of ranks, fastest first: tp, cp, dp, pp."""
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        return Coordinates(tp, cp, dp, pp, shard=dp % self.shard_ranks, replica=dp // self.shard_ranks)

    def stage_of(self, pp_rank: int, chunk: int) -> int:
        """Global stage of a rank's chunk: round-robin, or folded in a V for zbv."""
        if self.schedule == "zbv" and chunk == 1:
            return 2 * self.pp - 1 - pp_rank
        return chunk * self.pp + pp_rank

    @property
    def end_ranks(self) -> set[int]:
        """Pipeline ranks of the first and of the last stage: one and the same in a V."""
        last = self.stage_count - 1
        return {r for r in range(self.pp) for c in range(self.chunks) if self.stage_of(r, c) in (0, last)}


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _read_value(key: str, value: str, where: str) -> Any:
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise InputError(
                f"'{value}' is unknown", where=where, key=key, fix=f"choose one of {', '.join(CHOICES[key])}"
            )
        return value
    try:
        return tuple(int(piece) for piece in value.split("+")) if key == "stages" else int(value)
    except ValueError:
        form = "whole numbers joined by +, as in 8+8+7+7" if key == "stages" else "a whole number"
        raise InputError(f"'{value}' is not {form}", where=where, key=key, fix=f"give {form}") from None
