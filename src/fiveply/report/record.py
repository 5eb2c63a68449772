"""A run's directory as values: its settings, what each rank holds (`facts.json`), and a row a step (`metrics.jsonl`).

Tolerant of what may be missing (no evaluations, no memory, a last line that is being written), strict about what is
damaged. It knows the files alone, nothing of how they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fiveply import pipeline_schedule
from fiveply.pipeline_schedule import Schedule
from fiveply.report.text import coordinates
from fiveply.spec.errors import InputError
from fiveply.spec.run import RunSpec


class Segment(msgspec.Struct, frozen=True):
    """The steps after `from_step` ran under `layout`."""

    from_step: int
    layout: str
    world: int
    started: str = ""


class Chunk(msgspec.Struct, frozen=True):
    """One stage's units, as one rank holds them."""

    stage: int
    layers: tuple[int, int] | None
    units: list[str]

    @property
    def text(self) -> str:
        """`embed, layers 0-3`; the embedding of a later stage is the tied head."""
        named = {"embed": "embed" if self.stage == 0 else "tied head"}
        parts = [named.get(unit, unit) for unit in self.units if not unit.startswith("layers.")]
        if self.layers:
            first, last = self.layers
            layers = f"layer {first}" if first == last else f"layers {first}\N{EN DASH}{last}"
            parts.insert(sum(unit in ("embed", "positions") for unit in self.units) if self.stage == 0 else 0, layers)
        return ", ".join(parts) or "nothing"


STATE = ("parameters", "gradients", "optimizer")


class Rank(msgspec.Struct, frozen=True):
    rank: int
    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0
    shard: int = 0
    replica: int = 0
    chunks: list[Chunk] = []
    parameters: int = 0
    """Of the tensors that the rank computes with, before any sharding over data-parallel ranks."""
    bytes: dict[str, int] = {}
    """By category: what stands the whole step, `STATE`, and what comes and goes in it."""

    @property
    def state_bytes(self) -> int:
        return sum(self.bytes.get(category, 0) for category in STATE)


class ScheduleFacts(msgspec.Struct, frozen=True):
    name: str
    pp: int
    vp: int
    micro_batches: int

    def build(self, micro_batches: int | None = None) -> Schedule:
        """The schedule itself; raises ScheduleError where the numbers don't fit the name."""
        return pipeline_schedule.build(self.name, self.pp, micro_batches or self.micro_batches, self.vp)


class Predicted(msgspec.Struct, frozen=True):
    """What the planner expected of the layout: seconds of a step by share."""

    shares: dict[str, float]


class Facts(msgspec.Struct, frozen=True):
    """What `facts.json` says. Its free tables are shown, not computed with, so each key of theirs may be missing."""

    version: str = ""
    segments: list[Segment] = []
    layout: str = "dp=1"
    world: int = 1
    oversubscribed: bool = False
    model: dict[str, Any] = {}
    corpus: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    precision: dict[str, Any] = {}
    schedule: ScheduleFacts | None = None
    tokens_per_step: int = 0
    ranks: list[Rank] = []
    predicted: Predicted | None = None
    own_module: bool = False
    """A user's own module: its loss is of his making, and rows are all that is known of its data."""

    def degree(self, axis: str) -> int:
        """Ranks along an axis, by the coordinates that stand here."""
        return 1 + max((getattr(rank, axis) for rank in self.ranks), default=0)

    def coordinates(self, rank: Rank, axes: tuple[str, ...] = ("dp", "cp", "tp", "pp")) -> str:
        """`dp 0, pp 1`: the axes above one rank."""
        return coordinates(rank, self.ranks, axes)


class Row(msgspec.Struct, frozen=True):
    """A step. A value that is missing, or was not finite, is None."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds: float | None = None
    memory_bytes: list[int] | None = None
    held_out_loss: float | None = None
    bits_per_character: float | None = None


@dataclass(frozen=True)
class Record:
    directory: Path
    run: RunSpec
    facts: Facts
    rows: list[Row]
    """Ascending steps, at least one."""

    @property
    def latest(self) -> list[Row]:
        """Rows of the layout in force: another layout's speed and memory are another matter."""
        segments = self.facts.segments
        return [row for row in self.rows if not segments or row.step > segments[-1].from_step] or self.rows[-1:]


def load(directory: Path) -> Record:
    """Read a run's directory; raises InputError naming the file and the fix."""
    fix = "give a run's directory, as runs/NAME"
    if not directory.is_dir():
        raise InputError("no such directory", where=str(directory), fix=fix)
    for name in ("run.toml", "facts.json"):
        if not (directory / name).is_file():
            raise InputError(f"not a run's directory: it has no {name}", where=str(directory), fix=fix)
    path = directory / "facts.json"
    try:
        facts = msgspec.json.decode(path.read_bytes(), type=Facts)
    except msgspec.DecodeError as error:
        raise InputError(
            f"damaged ({error})", where=str(path), fix="the run writes it anew when it is resumed"
        ) from None
    return Record(directory, RunSpec.load(directory / "run.toml"), facts, read_rows(directory / "metrics.jsonl"))


def read_rows(path: Path) -> list[Row]:
    """The last row of each step. A last line without its end is still being written, and left out."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=Row)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                break
            raise InputError(f"damaged ({error})", where=f"{path}, line {number}", fix="remove that line") from None
        rows[row.step] = row
    if not rows:
        raise InputError("no step is recorded yet", where=str(path), fix="train first, or wait for the first step")
    return [rows[step] for step in sorted(rows)]


def smoothed(values: list[float | None], half: int) -> list[float | None]:
    """Mean over up to `half` neighbours on each side; gaps stay gaps.

    At the start both sides shrink alike, so that a steep fall stays where it is; at the end only the far side does.
    """
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for index, value in enumerate(values):
        reach = min(half, index)
        low, high = index - reach, min(index + reach + 1, len(values))
        result.append(None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low]))
    return result
