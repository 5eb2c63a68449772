"""The report's page: whole, self-contained, escaped, and right in a browser at both widths."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import pytest
import synthetic_run

from fiveply.report.page import MOST_POINTS, write_report
from fiveply.report.text import bytes_text, count_text, duration_text
from fiveply.spec.errors import InputError, RunError

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp and pp, after tp": ({"layouts": ["tp=2,dp=2,zero=1", "dp=2,pp=2"], "starts": [0, 60]}, {"steps": 120}),
    "tp": ({"layouts": ["tp=4"], "starts": [0]}, {"steps": 30}),
    "interleaved": (
        {"layouts": ["pp=4,schedule=interleaved,micro_batch=4"], "starts": [0], "model": "60m"},
        {"steps": 30},
    ),
    "zbv": ({"layouts": ["dp=2,tp=2,pp=4,schedule=zbv"], "starts": [0], "model": "60m"}, {"steps": 30}),
    "64 ranks": (
        {"layouts": ["dp=16,tp=2,pp=2,zero=3"], "starts": [0], "model": "150m", "devices": 64, "gpu": True},
        {"steps": 60, "peak": 60 * 2**30},
    ),
    "one rank, one step": ({"layouts": ["dp=1"], "starts": [0]}, {"steps": 1, "evaluate_every": 0}),
}
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "source"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what is loaded and what is said."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.counts: dict[str, int] = {}
        self.data = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{key}={value}" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.counts["data"] = self.counts.get("data", 0) + (("id", "data") in attrs)
        if tag not in VOID:
            self.open.append("data" if ("id", "data") in attrs else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "data"), f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.data += data
        elif not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make(folder: Path, case: str) -> Path:
    facts_, rows_ = CASES[case]
    facts = synthetic_run.facts(**facts_)
    return synthetic_run.write(folder, facts, synthetic_run.rows(world=facts["world"], **rows_))


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, case: str) -> None:
    run = make(tmp_path, case)
    path = write_report(run)
    text = path.read_text()
    page = Page(text)
    facts = json.loads((run / "facts.json").read_text())
    assert path == run / "report.html"
    assert page.loads == []
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert "default-src 'none'" in text
    assert facts["layout"] in page.text.replace(", ", ",")
    assert "AMD EPYC" in page.text or "NVIDIA H100" in page.text
    assert f"fiveply train {run / 'run.toml'} --resume" in page.text
    assert "loss <2.6>" in page.text, "the log's end, without its colour codes"
    for rank in facts["ranks"]:
        assert f'data-rank="{rank["rank"]}"' in text
    columns = json.loads(page.data)["columns"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert columns["step"] == [row["step"] for row in rows]
    assert columns["loss"] == pytest.approx([row["loss"] for row in rows], rel=1e-4)


def test_final_figures_and_segments(tmp_path: Path) -> None:
    run = make(tmp_path, "dp and pp, after tp")
    page = Page(write_report(run).read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"Held-out loss {rows[-1]['held_out_loss']:.3f}" in page.text
    assert f"Bits per character {rows[-1]['bits_per_character']:.3f}" in page.text
    assert "median of 60 steps" in page.text, "of the layout in force alone"
    assert "2-way data \N{MULTIPLICATION SIGN} 2-way pipeline parallel" in page.text
    assert "4 ranks share 2 cores" in page.text
    assert "983 k tokens" in page.text
    assert "120 steps done" in page.text
    assert "idle 20.0% of the time" in page.text
    segments = json.loads(page.data)["segments"]
    assert [(s["from"], s["to"], s["layout"][:9]) for s in segments] == [(1, 60, "dp=2,tp=2"), (61, 120, "dp=2,pp=2")]


def test_resuming_under_the_same_layout_is_no_new_band(tmp_path: Path) -> None:
    facts = synthetic_run.facts(["dp=2", "dp=2", "dp=2"], [0, 10, 20])
    page = Page(write_report(synthetic_run.write(tmp_path, facts, synthetic_run.rows(30, 2), steps=50)).read_text())
    assert [(segment["from"], segment["to"]) for segment in json.loads(page.data)["segments"]] == [(1, 30)]
    assert "step 30 of 50" in page.text


def test_missing_pieces_are_left_out(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 5.0} for step in (1, 2)]
    run = synthetic_run.write(tmp_path, {}, rows)
    page = Page(write_report(run).read_text())
    assert "never evaluated" in page.text
    for section in ("Ranks and what each holds", "Schedule of a step", "Memory by rank"):
        assert section not in page.text
    facts = synthetic_run.facts(["dp=2,pp=2"], [0])
    (run / "facts.json").write_text(json.dumps(facts))
    page = Page(write_report(run).read_text())
    assert "the run recorded no measured peak" in page.text


def test_memory_of_a_layout_before_is_not_this_ones(tmp_path: Path) -> None:
    facts = synthetic_run.facts(["dp=4", "dp=2"], [0, 20])
    rows = [*synthetic_run.rows(20, 4), {"step": 21, "loss": 3.0, "memory_bytes": [2**30, 2**31]}]
    page = Page(write_report(synthetic_run.write(tmp_path, facts, rows)).read_text())
    assert "1 GiB" in page.text
    assert "2 GiB" in page.text
    assert "420 MiB" not in page.text


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script>'
    facts = synthetic_run.facts(["dp=2", "pp=2"], [0, 5])
    facts["corpus"]["sources"] = [evil]
    facts["segments"][0]["layout"] = evil
    run = synthetic_run.write(tmp_path, facts, synthetic_run.rows(10, 2), name=evil)
    (run / "logs" / "rank-00000.log").write_text(evil)
    text = write_report(run).read_text()
    assert "<script>alert" not in text
    assert html.escape(evil, quote=False).replace('"', "&#34;") in text
    assert json.loads(Page(text).data)["segments"][0]["layout"] == evil


def test_long_runs_are_thinned_and_large_schedules_cut(tmp_path: Path) -> None:
    facts = synthetic_run.facts(["pp=4"], [0])
    facts["schedule"] |= {"micro_batches": 4096}
    rows = synthetic_run.rows(5000, 4, evaluate_every=500)
    rows[100]["loss"] = None
    text = write_report(synthetic_run.write(tmp_path, facts, rows)).read_text()
    data = json.loads(Page(text).data)
    assert len(data["columns"]["step"]) == MOST_POINTS
    assert data["columns"]["step"][-1] == 5000
    assert len(data["held_out"]["step"]) == 10
    assert "4096 micro-batches (drawn: 250)" in Page(text).text
    assert len(text) < 1_500_000


def test_many_replicas_fold(tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path, "64 ranks")).read_text())
    assert "8 more replicas with the same parts (dp 8 to 15, 16 more rows)" in page.text
    assert "worst of 32" in page.text
    assert "As a table, all 64 ranks" in page.text


def test_a_schedule_that_cannot_be_is_named(tmp_path: Path) -> None:
    facts = synthetic_run.facts(["pp=2"], [0])
    facts["schedule"]["name"] = "2f2b"
    with pytest.raises(InputError, match=r"facts\.json: schedule: unknown schedule '2f2b'"):
        write_report(synthetic_run.write(tmp_path, facts, synthetic_run.rows(3, 2)))


def test_where_it_is_written(tmp_path: Path) -> None:
    run = make(tmp_path, "one rank, one step")
    assert write_report(run, tmp_path / "new" / "page.html").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        write_report(run, tmp_path / "file" / "page.html")


def test_numbers_as_text() -> None:
    assert [count_text(n) for n in (0, 7, 999, 1000, 12_345, 2_312_345, 405e9)] == [
        "0", "7", "999", "1 k", "12.3 k", "2.31 M", "405 B",
    ]  # fmt: skip
    assert [bytes_text(n) for n in (0, 1023, 1024, 420 * 2**20, 80 * 2**30)] == [
        "0 B", "1023 B", "1 KiB", "420 MiB", "80 GiB",
    ]  # fmt: skip
    assert [duration_text(s) for s in (1.25, 61, 3600 * 5 + 120)] == ["1.2 s", "1 min 1 s", "5 h 2 min"]


# in a browser

# Points at the curves, reads them by keys, changes the axis, points at a rank and at the schedule, and says what it saw.
PROBE = """
(() => {
  const seen = { scroll: document.documentElement.scrollWidth, width: innerWidth };
  const plot = document.querySelector('[data-chart="loss"] .plot');
  const readout = () => document.querySelector('[data-chart="loss"] .readout').innerText;
  const box = plot.getBoundingClientRect();
  seen.curves = document.querySelectorAll(".plot svg .curve").length;
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 1, pointerType: "mouse" }));
  seen.pointed = readout();
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
  seen.end = readout();
  const tokens = document.querySelector('input[value="tokens"]');
  tokens.checked = true;
  tokens.dispatchEvent(new Event("change"));
  seen.tokens = readout();
  document.querySelector(".grid td[data-rank]").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  seen.lit = document.querySelectorAll(".lit").length;
  document.querySelector(".schedule g rect").dispatchEvent(new PointerEvent("pointerdown", { bubbles: true }));
  seen.cell = document.getElementById("cell").innerText;
  for (const details of document.querySelectorAll("details")) details.open = true;
  seen.opened = document.documentElement.scrollWidth;
  seen.error = document.documentElement.dataset.error ?? null;
  return seen;
})()
"""
WIDTHS = (1280, 390)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_in_a_browser(tmp_path: Path, browser: chromium.Browser, case: str, width: int) -> None:
    seen = browser.open(write_report(make(tmp_path, case)), width).run(PROBE)
    assert seen["error"] is None
    assert seen["width"] == width
    assert max(seen["scroll"], seen["opened"]) <= width
    last = synthetic_run.rows(world=1, **CASES[case][1])[-1]
    assert seen["curves"] == 8
    assert re.match(r"step\s*1\b", seen["pointed"])
    assert re.match(rf"step\s*{last['step']}\b", seen["end"])
    assert f"{last['loss']:.3f}" in seen["end"]
    assert seen["tokens"].startswith("tokens")
    assert seen["lit"] == 3 or case == "64 ranks"
    assert seen["cell"].startswith("pp 0, forward, micro-batch 0")
