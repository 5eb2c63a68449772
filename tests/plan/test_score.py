"""The score: its figures, its JSON and its command, on small tables with known answers."""

import json
from functools import partial
from pathlib import Path

import msgspec
import pytest
from plan.tables import LLAMA, write

from fiveply import cli
from fiveply.plan import score


def test_errors_are_means_of_relative_ones() -> None:
    of = partial(score.Compared, "source", "stratum")
    found = score.errors([of(1.0, 1.1, True), of(2.0, 1.6, False), of(1.0, 1.1)])
    assert found.mape == pytest.approx(0.4 / 3)
    assert found.median == pytest.approx(0.1)
    assert found.bias == pytest.approx(0)
    assert (found.n, found.coverage) == (3, 0.5)
    assert score.errors([]) == score.Errors(None, None, 0, None, None)


def test_kendalls_tau() -> None:
    assert score.kendall([(1, 10), (2, 20), (3, 30)]) == 1
    assert score.kendall([(1, 30), (2, 20), (3, 10)]) == -1
    # three concordant and two discordant pairs, one tie: 1 / sqrt(6 x 5)
    assert score.kendall([(1, 1), (2, 3), (3, 2), (4, 2)]) == pytest.approx(1 / 30**0.5)
    assert score.kendall([(1, 5), (2, 5)]) == 0


def test_the_command_prints_the_agreed_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = [
        {"tp": 1, "pp": 1, "vp": 1},
        {"tp": 2, "pp": 1, "vp": 1},
        {"tp": 4, "pp": 2, "vp": 2},
        {"tp": 8, "pp": 1, "vp": 1},
    ]
    rows = [LLAMA | layout | {"mem_gib": 40, "mem_rank": "", "mem_kind": "allocated"} for layout in layouts]
    table = write(tmp_path / "t.csv", *rows, rows[0] | {"layers": "x"}, rows[0] | {"micro_batch": 5})
    cli.main(["bench", "plan", "--table", str(table), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 6
    assert [skip["row"] for skip in found["skipped"]] == [5, 6]
    for group in (found["time"], found["memory"]):
        assert {"mape", "bias", "n", "coverage", "by_source", "by_stratum"} <= set(group)
        assert group["n"] == 4
    assert found["sweeps"][0] | {"source": LLAMA["source"], "n": 4} == found["sweeps"][0]
    assert {"tau", "regret"} <= set(found["sweeps"][0])
    one = found["predictions"][0]
    assert one["row"] == 1
    assert one["measured_seconds"] == 1.5
    assert one["stratum"] == "complete-16-bit"
    assert one["predicted_seconds"]["p10"] < one["predicted_seconds"]["p50"] < one["predicted_seconds"]["p90"]
    assert one["measured_bytes"] == 40 * 2**30
    assert one["predicted_bytes"] > 2**30


def test_the_command_shows_tables_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "plan", "--table", str(write(tmp_path / "t.csv", LLAMA, LLAMA | {"gpu": "abacus"}))])
    shown = capsys.readouterr().out
    assert "complete-16-bit" in shown
    assert "row 2: gpu: 'abacus' is unknown" in shown


@pytest.mark.parametrize("text", ["source,model\na,b\n", "\0\0", ""])
def test_a_malformed_table_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "plan", "--table", str(path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_micro_batch_that_a_row_leaves_out_is_the_fastest_that_fits(tmp_path: Path) -> None:
    given = score.table.read(write(tmp_path / "t.csv", LLAMA, LLAMA | {"micro_batch": ""}))[0]
    free = score.predicted(given[1])
    assert free.seconds.p50 <= score.predicted(given[0]).seconds.p50
    assert free.p_oom < 0.5


@pytest.mark.slow
def test_the_shipped_table_meets_the_bar_on_sources_it_was_fitted_to() -> None:
    found = score.score()
    dense = found.time.by_stratum["complete-16-bit"]
    assert dense.mape is not None
    assert dense.mape <= 0.05
    assert dense.n >= 240
    assert found.time.coverage is not None
    assert 0.75 <= found.time.coverage <= 0.9
    assert msgspec.json.encode(found)
