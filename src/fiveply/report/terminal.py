"""What a run shows in a terminal: the progress line, the ranks and what each holds, the schedule's picture.

Notable: nothing here starts a thread. Ranks are forked, and a thread that redraws does not survive a fork, so the line is
drawn when a step reports, at most five times a second. Each redraw is one write that holds a carriage return, by which
the launcher keeps it out of the rank's log; notes are written apart from it, and so are logged.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from types import TracebackType
from typing import Any, TextIO

import msgspec
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fiveply import pipeline_schedule
from fiveply.pipeline_schedule import Schedule
from fiveply.report.record import Facts
from fiveply.report.text import bytes_text, count_text

REDRAW_SECONDS = 0.2
SMOOTHING = 0.9  # of the loss shown: a mean over about ten steps
BAR_CELLS, BAR_PRIORITY = 16, 7
MOST_ROWS = 16  # of the table of ranks before replicas fold
MOST_DRAWN = 16  # micro-batches of a schedule


class Progress:
    """Training's progress: one line that redraws itself on a terminal, a plain line now and then elsewhere.

    `update` takes rows of `metrics.jsonl`; a step's row may come twice, the second time with its evaluation. Memory is the
    fullest rank's peak, as last measured. With
    `enabled=False` (ranks other than the first) every method does nothing. `clock` gives seconds.
    """

    def __init__(
        self,
        steps: int,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        log_every: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.enabled, self.log_every = steps, enabled, log_every
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream, highlight=False)
        self._redraws = self._console.is_terminal and not self._console.is_dumb_terminal
        self._begun = clock()
        self._row: dict[str, Any] = {}
        self._held_out: float | None = None
        self._memory: int | None = None
        self._loss_sum = self._loss_weight = 0.0
        self._first: tuple[int, float] | None = None  # step and time from which the speed is taken
        self._drawn_at = float("-inf")
        self._line_stands = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last line as it is, and the terminal at the start of the next one."""
        if self.enabled and self._redraws and self._row:
            self._draw()
            self._write("\r\n")
            self._line_stands = False

    def update(self, row: dict[str, Any]) -> None:
        """Show a step's row."""
        if not self.enabled:
            return
        again = row["step"] == self._row.get("step")
        self._row = row
        if not again and row.get("loss") is not None:
            self._loss_sum = SMOOTHING * self._loss_sum + row["loss"]
            self._loss_weight = SMOOTHING * self._loss_weight + 1
        if row.get("held_out_loss") is not None:
            self._held_out = row["held_out_loss"]
        if row.get("memory_bytes"):
            self._memory = max(row["memory_bytes"])
        if self._first is None:
            # The first step warms up: compilation, first touch of memory. The speed is that of the steps after it.
            self._first = row["step"], self._clock()
        last = row["step"] >= self.steps
        if self._redraws:
            if last or self._clock() - self._drawn_at >= REDRAW_SECONDS:
                self._draw()
        elif again and row.get("held_out_loss") is not None:
            bits = row.get("bits_per_character")
            beside = "" if bits is None else f" ({bits:.3f} bits per character)"
            self._write(f"{self._step_text()}  held out {self._held_out:.4f}{beside}\n")
        elif not again and (last or row["step"] % self.log_every == 0 or row["step"] == self._first[0]):
            self._write("  ".join(text for _, text, _ in self._fields()) + "\n")

    def note(self, text: str) -> None:
        """Print a line above the progress line."""
        if not self.enabled:
            return
        if self._line_stands:
            self._write("\r\x1b[K")
        self._write(text + "\n")
        if self._line_stands:
            self._draw()

    def show(self, what: RenderableType) -> None:
        """Print something rich can draw, such as `layout_table`, above the progress line."""
        if self.enabled:
            self._console.print(what)

    # the line

    def _draw(self) -> None:
        with self._console.capture() as drawn:
            self._console.print(self._line(self._console.width - 1), end="", soft_wrap=True)
        self._write(f"\r{drawn.get()}\x1b[K")
        self._drawn_at, self._line_stands = self._clock(), True

    def _line(self, width: int) -> Text:
        """The fields that fit, in their order; those of the highest number go first."""
        fields = [(BAR_PRIORITY, "", ""), *self._fields()]
        sizes = [BAR_CELLS, *(cell_len(text) for _, text, _ in fields[1:])]
        shown = list(range(len(fields)))
        while len(shown) > 1 and sum(sizes[index] + 2 for index in shown) - 2 > width:
            shown.remove(max(shown, key=lambda index: fields[index][0]))
        parts = [Text(fields[index][1], fields[index][2]) if index else self._bar() for index in shown]
        line = Text("  ", no_wrap=True).join(parts)
        line.truncate(width)
        return line

    def _bar(self) -> Text:
        done = round(BAR_CELLS * min(1.0, self._row["step"] / self.steps))
        unicode = "utf" in self._console.encoding.lower()
        full, empty = (
            ("\N{BOX DRAWINGS HEAVY HORIZONTAL}",) * 2 if unicode and self._console.color_system else ("#", ".")
        )
        return Text.assemble((full * done, "cyan"), (empty * (BAR_CELLS - done), "bright_black"))

    def _fields(self) -> list[tuple[int, str, str]]:
        """(priority, text, style): 0 stays longest."""
        row, now = self._row, self._clock()
        fields: list[tuple[int, Any, Callable[[Any], str], str]] = [
            (1, self._loss_sum / self._loss_weight if self._loss_weight else None, "loss {:.4f}".format, "bold"),
            (4, self._held_out, "held out {:.4f}".format, ""),
            (5, row.get("tokens_per_second"), lambda v: f"{count_text(v)} tokens/s", ""),
            (8, row.get("mfu"), "MFU {:.1%}".format, "dim"),
            (10, row.get("lr"), "lr {:.1e}".format, "dim"),
            (11, row.get("grad_norm"), "norm {:.2f}".format, "dim"),
            (9, self._memory, lambda v: f"memory {bytes_text(v)}", "dim"),
            (6, now - self._begun, clock_text, ""),
            (2, self._seconds_left(now), lambda v: f"{clock_text(v)} left", "cyan"),
        ]
        known = [(priority, form(value), style) for priority, value, form, style in fields if value is not None]
        return [(0, self._step_text(), "bold"), *known]

    def _step_text(self) -> str:
        return f"step {self._row['step']:>{len(str(self.steps))}}/{self.steps}"

    def _seconds_left(self, now: float) -> float | None:
        """By the wall clock, so evaluations and checkpoints are included; None until there are two steps to tell by."""
        step = self._row["step"]
        if self._first is None or not self._first[0] < step < self.steps:
            return None
        first, since = self._first
        return (now - since) / (step - first) * (self.steps - step)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def clock_text(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plain_table(*columns: str, left: Sequence[str] = (), folds: str = "", gap: int = 2) -> Table:
    """A table without lines: numbers to the right but for the columns `left`; the text of the column `folds` may break."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != folds, overflow="fold")
    return table


def layout_table(facts: Facts | dict[str, Any]) -> Table:
    """The ranks and what they hold, for rich to print; replicas share a row where there are many ranks."""
    if not isinstance(facts, Facts):
        facts = msgspec.convert(facts, Facts)
    folds = len(facts.ranks) > MOST_ROWS
    groups = [[rank] for rank in facts.ranks]
    if folds:
        place = attrgetter("pp", "cp", "tp")
        groups = [list(group) for _, group in groupby(sorted(facts.ranks, key=place), key=place)]
    table = plain_table("rank", "place", "holds", "parameters", "state", left=("place", "holds"), folds="holds")
    for ranks in groups:
        rank, last, axes = ranks[0], ranks[-1], ("cp", "tp", "pp") if folds else ("dp", "cp", "tp", "pp")
        table.add_row(
            str(rank.rank) if rank is last else f"{rank.rank}\N{HORIZONTAL ELLIPSIS}{last.rank} ({len(ranks)})",
            facts.coordinates(rank, axes) or "alone", "; ".join(chunk.text for chunk in rank.chunks),
            count_text(rank.parameters), bytes_text(max(each.state_bytes for each in ranks)),
        )  # fmt: skip
    return table


def schedule_picture(schedule: Schedule, console: Console) -> None:
    """Print a pipeline's schedule as text, in bands as wide as the terminal; of many micro-batches the report draws it."""
    if schedule.pp > 1 and schedule.micro_batches <= MOST_DRAWN:
        text = pipeline_schedule.picture(schedule, width=console.width)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
