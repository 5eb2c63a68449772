"""The progress line on a terminal and elsewhere, the table of ranks, the schedule's picture."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import synthetic_run
from rich.cells import cell_len
from rich.console import Console

from fiveply import pipeline_schedule
from fiveply.report.terminal import Progress, clock_text, layout_table, schedule_picture

CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def set_width(columns: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))

    set_width(160)
    return set_width


def follow(stream: io.StringIO, steps: int = 100, seconds: float = 1.0) -> list[str]:
    """Train for `steps`; what was drawn, one string a redraw."""
    clock = Clock()
    with Progress(steps, stream=stream, clock=clock) as progress:
        for row in synthetic_run.rows(steps, 4):
            clock.now += seconds
            progress.update({key: value for key, value in row.items() if not key.startswith(("held", "bits"))})
            if "held_out_loss" in row:
                progress.update(row)
    return [CODES.sub("", part) for part in stream.getvalue().split("\r") if part]


def test_a_line_on_a_terminal(size: Any) -> None:
    drawn = follow(Terminal())
    assert re.match(
        r"━+  step  50/100  loss \d\.\d{4}  held out \d\.\d{4}  [\d.]+ k tokens/s  MFU [\d.]+%  lr .*  norm ", drawn[49]
    )
    assert drawn[49].endswith("memory 454 MiB  0:50  0:50 left"), "the fullest rank's"
    assert "memory 454 MiB" in drawn[54], "measured every tenth step, shown at each"
    assert drawn[-1] == "\n", "the terminal is left at the start of a line"
    assert "left" not in drawn[-2]
    assert "step 100/100" in drawn[-2]


@pytest.mark.parametrize("columns", [200, 120, 100, 80, 60, 40, 20, 10])
def test_it_fits_any_width_and_drops_the_least_first(size: Any, columns: int) -> None:
    size(columns)
    drawn = [text for text in follow(Terminal()) if text != "\n"]
    assert max(cell_len(text) for text in drawn) < columns
    assert all("\n" not in text for text in drawn)
    present = [
        word in drawn[60]
        for word in ("step", "loss", "left", "held out", "tokens/s", "━", "MFU", "memory", "lr", "norm")
    ]
    assert present[0]
    assert present == sorted(present, reverse=True)


def test_it_is_calm(size: Any) -> None:
    assert len(follow(Terminal(), steps=1000, seconds=0.01)) < 10 * 5 + 5


def test_every_redraw_holds_a_carriage_return_and_notes_are_apart(size: Any) -> None:
    writes: list[str] = []

    class Recorder(Terminal):
        def write(self, text: str) -> int:
            if text:  # rich writes nothing, too
                writes.append(text)
            return len(text)

    with Progress(10, stream=Recorder(), clock=Clock()) as progress:
        progress.note("before")
        progress.update(synthetic_run.rows(1, 1)[0])
        progress.note("saved a checkpoint")
    assert writes[0] == "before\n"
    logged = [text for text in writes if "\r" not in text]
    assert logged == ["before\n", "saved a checkpoint\n"]
    assert writes.index("saved a checkpoint\n") == writes.index("\r\x1b[K") + 1


def test_an_interrupt_leaves_a_clean_line(size: Any) -> None:
    stream = Terminal()

    def interrupted() -> None:
        with Progress(10, stream=stream, clock=Clock()) as progress:
            progress.update(synthetic_run.rows(1, 1)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().endswith("\r\n")
    assert "\x1b[?25l" not in stream.getvalue(), "the cursor is never hidden, so nothing has to bring it back"


def test_plain_lines_elsewhere() -> None:
    stream = io.StringIO()
    follow(stream)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert len(lines) == 1 + 10 + 4, "the first step, every tenth, and four evaluations"
    assert lines[0].startswith("step   1/100  loss 8.3")
    assert re.fullmatch(r"step  25/100  held out \d\.\d{4} \(\d\.\d{3} bits per character\)", lines[3])


def test_a_dumb_terminal_gets_plain_lines(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in "".join(follow(Terminal()))


def test_an_ascii_terminal_gets_no_other_characters(size: Any) -> None:
    class Ascii(Terminal):
        encoding = "ascii"

    assert "".join(follow(Ascii())).isascii()


def test_other_ranks_say_nothing(size: Any) -> None:
    stream = Terminal()
    with Progress(10, enabled=False, stream=stream) as progress:
        progress.note("x")
        progress.update(synthetic_run.rows(1, 1)[0])
    assert stream.getvalue() == ""


def test_a_row_of_few_keys_will_do(size: Any) -> None:
    stream = Terminal()
    with Progress(5, stream=stream, clock=Clock()) as progress:
        progress.update({"step": 1, "loss": None})
    assert "step 1/5" in CODES.sub("", stream.getvalue())


def test_the_time_left_starts_at_a_resumed_step(size: Any) -> None:
    clock, stream = Clock(), Terminal()
    with Progress(200, stream=stream, clock=clock) as progress:
        for step in (101, 102, 103):
            clock.now += 10
            progress.update({"step": step, "loss": 1.0})
    assert "16:10 left" in CODES.sub("", stream.getvalue())


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table_of_ranks() -> None:
    text = printed(layout_table(synthetic_run.facts(["dp=2,pp=2"], [0])))
    assert len(text.splitlines()) == 5
    assert re.search(r"2  dp 0, pp 1  layers 2.3, norm, tied head +1\.08 M", text)


def test_the_table_folds_many_ranks() -> None:
    text = printed(layout_table(synthetic_run.facts(["dp=16,tp=2,pp=2"], [0])))
    assert len(text.splitlines()) == 5
    assert "0…30 (16)  tp 0, pp 0" in text


def test_the_table_of_one_rank() -> None:
    assert "alone" in printed(layout_table(synthetic_run.facts(["dp=1"], [0])))


def test_the_schedule_fits_the_terminal(size: Any) -> None:
    size(60)
    stream = Terminal()
    schedule_picture(pipeline_schedule.build("1f1b", 4, 16), Console(file=stream))
    rows = [line for line in stream.getvalue().splitlines() if line.startswith("rank")]
    assert len(rows) > 4
    assert max(map(len, rows)) <= 60


def test_clock_text() -> None:
    assert [clock_text(s) for s in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
