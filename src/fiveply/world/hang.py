"""Why a world stands still, in words: which rank is missing, in which action or collective, and what the others wait for.

Pure: from each rank's `Hello` and the last that is known of where it stands. Who looks and when is `watchdog.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from fiveply.report.text import bytes_text
from fiveply.world.recorder import KINDS, OPERATIONS, Field

MOST_LINES = 40
_NAMES = {"": "between steps", "input": "input gradient", "weight": "weight gradient"}
_HANDED = {"forward": "the activation", "backward": "the gradient"}


class Hello(msgspec.Struct, frozen=True):
    """What a rank says of itself once. `board`: (machine, process, file descriptor) under which its board can be read."""

    place: str
    axes: list[tuple[str, tuple[int, ...]]]
    stages: dict[int, str]
    board: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class Position:
    """Where a rank stands. `still`: seconds without a move, as it counted; `answers`: whether its watchdog still does;
    `left`: it has ended its part of the run; `state`: what the system says of a process that does not answer."""

    rank: int
    hello: Hello
    board: tuple[int, ...]
    still: float
    answers: bool = True
    left: bool = False
    state: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" ({self.hello.place})" if self.hello.place else "")

    @property
    def waits(self) -> bool:
        """In a call, so for others."""
        return self.board[Field.OPERATION] != 0

    @property
    def operation(self) -> str:
        return OPERATIONS[self.board[Field.OPERATION]]

    @property
    def axis(self) -> tuple[str, tuple[int, ...]]:
        return self.hello.axes[self.board[Field.AXIS]]

    @property
    def number(self) -> int:
        return self.board[Field.NUMBER]

    def issued(self, axis: tuple[str, tuple[int, ...]]) -> int:
        """Calls started over an axis; 0 where the rank has none such."""
        return self.board[Field.ISSUED + self.hello.axes.index(axis)] if axis in self.hello.axes else 0

    @property
    def doing(self) -> str:
        """`forward, micro-batch 3, stage 1 (layers 4 to 7)`"""
        kind = KINDS[self.board[Field.KIND]]
        parts = [_NAMES.get(kind, kind.replace("_", " "))]
        micro_batch, stage = self.board[Field.MICRO_BATCH], self.board[Field.STAGE]
        if micro_batch >= 0:
            parts.append(f"micro-batch {micro_batch}")
        if stage >= 0:
            layers = self.hello.stages.get(stage, "")
            parts.append(f"stage {stage}" + (f" ({layers})" if layers else ""))
        return ", ".join(parts)

    @property
    def call(self) -> str:
        """`in all-reduce 17 over dp (16 KiB)`, `to receive the gradient of micro-batch 2 (32 KiB) from rank 3`"""
        size = self.board[Field.BYTES]
        sized = f" ({bytes_text(size)})" if size else ""
        if self.operation not in ("send", "receive"):
            return f"in {self.operation} {self.number} over {self.axis[0]}{sized}"
        what = _HANDED.get(KINDS[self.board[Field.KIND]].rpartition("_")[2], "a transfer")
        if self.board[Field.MICRO_BATCH] >= 0:
            what += f" of micro-batch {self.board[Field.MICRO_BATCH]}"
        return f"to {self.operation} {what}{sized} {'from' if self.operation == 'receive' else 'to'} rank {self.board[Field.PEER]}"


@dataclass(frozen=True)
class Verdict:
    """`blamed`: ranks that hold up the others, the likeliest first. `certain`: it can't resolve itself. `cause`: one line."""

    blamed: tuple[int, ...]
    certain: bool
    cause: str
    report: str


def judge(positions: Mapping[int, Position], seconds: float) -> Verdict:
    """Explain why no rank of the world has gone on for `seconds`. A rank that computes and answers may only be slow."""
    missing = [p for p in positions.values() if not p.answers and not p.left]
    present = [p for p in positions.values() if p.answers and not p.left]
    waiting, computing = [p for p in present if p.waits], [p for p in present if not p.waits]
    awaited = {rank for p in waiting for rank in _awaited(p, positions)}
    gone = [p for p in positions.values() if p.left and p.rank in awaited]
    apart = _disagreements(waiting)
    lines = [_missing_line(p) for p in missing]
    lines += [f"{p.name} has ended its part of the run" for p in gone]
    lines += [text for _, text in apart]
    lines += [
        f"{p.name} waits for nobody since {p.still:.0f} s, and answers: {p.doing}"
        for p in sorted(computing, key=lambda p: p.rank not in awaited)
    ]
    blamed = [p.rank for p in (*missing, *gone)] or [rank for pair, _ in apart for rank in pair]
    certain = bool(blamed) or not computing
    blamed = blamed or [p.rank for p in computing if p.rank in awaited] or sorted(awaited)
    lines += [_waiting_line(p, positions) for p in waiting]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} ranks more"]
    step = max(p.board[Field.STEP] for p in positions.values())
    head = f"No rank has gone on for {seconds:.0f} s, in step {step}:"
    first = positions[blamed[0]] if blamed else None
    if missing or gone:
        cause = lines[0]
    elif apart:
        cause = apart[0][1]
    elif first is not None and not first.waits:
        cause = f"{first.name} holds up the others: {first.doing}, since {first.still:.0f} s"
    else:
        cause = f"{_ranks([p.rank for p in waiting])} wait for each other"
    return Verdict(tuple(dict.fromkeys(blamed)), certain, cause, "\n".join([head, *(f"  {line}" for line in lines)]))


def _missing_line(p: Position) -> str:
    where = f"waiting {p.call}, during {p.doing}" if p.waits else f"in {p.doing}"
    return f"{p.name} does not answer{f' ({p.state})' if p.state else ''}: it stands {where}"


def _waiting_line(p: Position, positions: Mapping[int, Position]) -> str:
    if p.operation in ("send", "receive"):
        return f"{p.name} waits {p.call}, since {p.still:.0f} s"
    late = _awaited(p, positions)
    whom = f" for {_ranks(late)}" if late else ""
    return f"{p.name} waits{whom} {p.call}{'' if late else ', which all its ranks have begun'}, during {p.doing}, since {p.still:.0f} s"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"


def _awaited(p: Position, positions: Mapping[int, Position]) -> list[int]:
    """Ranks without which the call that `p` waits for can't end."""
    if p.operation in ("send", "receive"):
        return [p.board[Field.PEER]]
    return [
        rank
        for rank in p.axis[1]
        if rank != p.rank and (other := positions.get(rank)) is not None
        and (other.left or other.issued(p.axis) < p.number)
    ]  # fmt: skip


def _disagreements(waiting: list[Position]) -> list[tuple[tuple[int, int], str]]:
    """Pairs of ranks that wait in one call of one axis, but make another operation of it, or another size."""
    found: list[tuple[tuple[int, int], str]] = []
    first: dict[Any, Position] = {}
    for p in waiting:
        if p.operation in ("send", "receive"):
            continue
        a = first.setdefault((p.axis, p.number), p)
        if (a.operation, a.board[Field.BYTES]) != (p.operation, p.board[Field.BYTES]):
            text = f"{a.name} and {p.name} do not make the same call: {a.call}, and {p.call}"
            found.append(((a.rank, p.rank), text))
    return found
