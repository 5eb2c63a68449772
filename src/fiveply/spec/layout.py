"""Layout: how one model and one batch are split over the ranks, in one text form used everywhere.

    dp=2,tp=2,pp=2,schedule=1f1b,micro_batch=4

The same text stands on the command line, in TOML, in logs and in checkpoint metadata. A Layout knows the degrees and where
a rank stands on each axis; whether it fits a given model is `spec/legality.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

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
    """A rank's index on each axis; `replica` and `shard` split `dp` (hybrid sharding): dp = replica * dp_shard + shard.

    Experts lie across tp, cp and dp: of their index, fastest first, etp is `tp % etp`, then comes `ep`.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    shard: int
    replica: int
    ep: int


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
        enforce(LAYOUT_RULES, self, None, where)
        if self.stages and len(self.stages) != self.pp * self.chunks:
            raise InputError(
                f"{len(self.stages)} stages listed, {self.pp} ranks x {self.chunks} chunks = {self.pp * self.chunks} needed",
                where=where, key="stages", fix="give one number of layers per stage, joined by +",
            )  # fmt: skip
        if any(layers < 0 for layers in self.stages):
            raise InputError("a stage cannot hold a negative number of layers", where=where, key="stages",
                             fix="give whole numbers joined by +")  # fmt: skip

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

    @property
    def expert_tensor(self) -> int:
        """Ranks that share one expert: etp, or all of tp."""
        return self.etp or self.tp

    @property
    def expert_data(self) -> int:
        """Ranks of one stage that hold the same slice of the same experts, and sum its gradients."""
        return self.dp * self.cp * self.tp // (self.ep * self.expert_tensor)

    def coordinates(self, rank: int) -> Coordinates:
        """Order of ranks, fastest first: tp, cp, dp, pp."""
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        expert = rank % (self.dp * self.cp * self.tp) // self.expert_tensor % self.ep
        return Coordinates(tp, cp, dp, pp, shard=dp % self.shard_ranks, replica=dp // self.shard_ranks, ep=expert)

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


class Layouts:
    """Many layouts at once: Layout's keys, each one value or an array of values (strings too) that broadcast together.

    For the planner's search, which masks by the rules that one layout is refused by. `stages` stays empty.
    """

    def __init__(self, **columns: Any) -> None:
        for key, default in zip(Layout.__struct_fields__, Layout.__struct_defaults__, strict=True):
            setattr(self, key, columns.pop(key, default))
        if columns:
            raise TypeError(f"not keys of a layout: {', '.join(columns)}")

    def __getattr__(self, key: str) -> Any:  # only what __init__ did not set; for the type checker
        raise AttributeError(key)

    # The same sums and products as of one.
    world, stage_count, expert_data = Layout.world, Layout.stage_count, Layout.expert_data

    @property
    def chunks(self) -> Any:
        looped = (np.asarray(self.schedule) == "interleaved") | (np.asarray(self.schedule) == "zbv")
        return np.where(np.asarray(self.vp) > 0, self.vp, np.where(looped, 2, 1))

    @property
    def shard_ranks(self) -> Any:
        shared = self.dp_shard + (self.dp_shard == 0) * self.dp
        return np.where(np.asarray(self.zero) == 0, 1, shared)

    @property
    def sequence_parallel(self) -> Any:
        return (np.asarray(self.tp) > 1) & (np.asarray(self.sp) != 0)

    @property
    def expert_tensor(self) -> Any:
        return self.etp + (self.etp == 0) * self.tp


Job = TypeVar("Job")


@dataclass(frozen=True)
class Rule(Generic[Job]):
    """Something no legal layout does. `broken` says whether: of a Layout, or of Layouts element by element (hence `&` and
    `|`); `said` gives the problem of a Layout, with its arithmetic, and the fix. The second argument is the job."""

    key: str
    broken: Callable[[Layouts, Job], Any]
    said: Callable[[Layouts, Job], tuple[str, str]]


def enforce(rules: Iterable[Rule[Job]], layout: Layout, job: Job, where: str) -> None:
    """Raise InputError for the first rule that `layout` breaks."""
    one = cast(Layouts, layout)  # has the same attributes
    for rule in rules:
        if rule.broken(one, job):
            problem, fix = rule.said(one, job)
            raise InputError(problem, where=where, key=rule.key, fix=fix)


def kept(rules: Iterable[Rule[Job]], layouts: Layouts, job: Job) -> NDArray[np.bool_]:
    """Which of `layouts` break none of `rules`."""
    legal: Any = np.True_
    with np.errstate(divide="ignore"):  # a degree that another rule refuses may divide to zero
        for rule in rules:
            legal = legal & (np.asarray(rule.broken(layouts, job)) == 0)
    return np.asarray(legal, dtype=np.bool_)


def _at_least(key: str, least: int, kind: str) -> Rule[None]:
    return Rule(
        key,
        lambda x, _: getattr(x, key) < least,
        lambda x, _: (f"{getattr(x, key)} is {kind}", "give a whole number from 1"),
    )


LAYOUT_RULES: tuple[Rule[None], ...] = (
    *(_at_least(key, 1, "not a degree") for key in DEGREES),
    Rule("zero", lambda x, _: (x.zero < 0) | (x.zero > 3), lambda x, _: (f"{x.zero} is not a ZeRO stage", "give 0, 1, 2 or 3")),
    Rule("sp", lambda x, _: (x.sp < -1) | (x.sp > 1), lambda x, _: (f"{x.sp} is not a choice", "give 0 or 1")),
    *(_at_least(key, 0, "negative") for key in ("dp_shard", "vp", "micro_batch", "etp")),
    Rule("dp_shard", lambda x, _: x.dp % np.maximum(x.dp_shard, 1) != 0,
         lambda x, _: (f"dp_shard={x.dp_shard} does not divide dp={x.dp}", f"give one of {divisors(x.dp)}")),
    Rule("dp_shard", lambda x, _: (x.dp_shard > 1) & (x.zero == 0),
         lambda x, _: ("nothing is sharded at zero=0", "set zero=1, 2 or 3, or leave dp_shard out")),
    Rule("sp", lambda x, _: (x.sp == 1) & (x.tp == 1),
         lambda x, _: ("sequence parallel needs tp above 1", "set tp, or leave sp out")),
    Rule("vp", lambda x, _: (x.schedule == "zbv") & (x.vp != 0) & (x.vp != 2),
         lambda x, _: (f"zbv holds 2 chunks a rank, not {x.vp}", "leave vp out")),
    Rule("vp", lambda x, _: (x.schedule == "interleaved") & (x.vp == 1),
         lambda x, _: ("interleaved needs 2 or more chunks a rank", "set vp=2 or more, or schedule=1f1b")),
    Rule("vp", lambda x, _: (x.vp > 1) & (x.schedule != "interleaved") & (x.schedule != "zbv"),
         lambda x, _: (f"{x.schedule} runs one chunk a rank", "set schedule=interleaved, or leave vp out")),
)  # fmt: skip
"""What is wrong whatever the model."""


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
