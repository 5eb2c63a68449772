"""Reading a run's directory: what may be missing, what counts twice, what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import synthetic_run

from fiveply.report.record import Chunk, load, read_rows, smoothed
from fiveply.spec.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic_run.write(tmp_path, synthetic_run.facts(["dp=2,pp=2"], [0]), synthetic_run.rows(30, 4))


def test_the_last_row_of_a_step_counts_and_steps_ascend(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"loss":9}\n{"step":2,"loss":8}\n{"step":3,"loss":7}\n{"step":2,"loss":5,"new_key":1}\n')
    assert [(row.step, row.loss) for row in read_rows(path)] == [(1, 9), (2, 5), (3, 7)]


def test_a_last_line_that_is_being_written_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":31,"lo')
    assert load(run).rows[-1].step == 30


def test_a_value_that_was_not_finite_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"loss":null}\n')
    assert read_rows(path)[0].loss is None


@pytest.mark.parametrize("line", ["{broken", '{"loss": 1}', '{"step": "one"}', "[]", "\x00\x01"])
def test_a_damaged_line_is_named(run: Path, line: str) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 5: damaged .*; remove that line"):
        load(run)


def test_damaged_bytes_are_named(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b'{"step":1}\n\xff\xfe\n{"step":2}\n')
    with pytest.raises(InputError, match="line 2"):
        load(run)


@pytest.mark.parametrize("name", ["run.toml", "facts.json"])
def test_a_directory_that_is_no_run_is_refused(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(InputError, match=f"not a run's directory: it has no {name}; give a run's directory"):
        load(run)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "\n", '{"st'])
def test_a_run_without_a_step_is_refused(run: Path, text: str) -> None:
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.jsonl: no step is recorded yet"):
        load(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no step is recorded yet"):
        load(run)


@pytest.mark.parametrize("text", ["{", '{"ranks": 3}', "[]"])
def test_damaged_facts_are_named(run: Path, text: str) -> None:
    (run / "facts.json").write_text(text)
    with pytest.raises(InputError, match=r"facts\.json: damaged"):
        load(run)


def test_facts_may_lack_anything_and_hold_more(run: Path) -> None:
    (run / "facts.json").write_text(json.dumps({"a_key_of_tomorrow": 1}))
    assert load(run).facts.ranks == []


def test_rows_of_the_layout_in_force(tmp_path: Path) -> None:
    facts = synthetic_run.facts(["dp=2,pp=2", "tp=2"], [0, 20])
    record = load(synthetic_run.write(tmp_path, facts, synthetic_run.rows(30, 4)))
    assert [row.step for row in record.latest] == list(range(21, 31))
    shutil.rmtree(record.directory)


def test_what_a_stage_holds_in_words() -> None:
    assert Chunk(0, (0, 3), ["embed", "layers.0", "layers.3"]).text == "embed, layers 0\N{EN DASH}3"
    assert Chunk(0, (0, 0), ["embed", "positions", "layers.0"]).text == "embed, positions, layer 0"
    assert Chunk(1, (4, 7), ["layers.4", "norm", "embed"]).text == "layers 4\N{EN DASH}7, norm, tied head"
    assert Chunk(2, None, ["norm", "head"]).text == "norm, head"


def test_smoothing_keeps_a_slope_at_the_start_and_gaps_everywhere() -> None:
    slope: list[float | None] = [float(value) for value in range(10)]
    assert smoothed(slope, 2)[:8] == pytest.approx(slope[:8])
    assert smoothed(slope, 2)[-1] == pytest.approx((7 + 8 + 9) / 3)
    assert smoothed([1.0, None, 3.0], 1) == [1.0, None, 3.0]
    assert smoothed([5.0], 3) == [5.0]
