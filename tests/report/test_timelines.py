"""Recorded steps of real runs, as values, as a trace, and in a browser at both widths."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import chromium
import msgspec
import pytest
import short_run

from fiveply import pipeline_schedule, timeline
from fiveply.report import perfetto, timelines
from fiveply.report.page import TRACE, write_report
from fiveply.spec.errors import InputError
from fiveply.timeline import COMPUTE_KINDS, SHARES, Event, RecordedStep, innermost
from fiveply.world.device import find

SCHEDULES = ("1f1b", "zb")
MICRO_BATCHES = 4
FIELD = {name: index for index, name in enumerate(timelines.FIELDS)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of real runs of dp=2,pp=2, by schedule; the report of each is written."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(find()), "threads_for", lambda self, ranks: 1)
        made = {name: short_run.train(folder, f"dp=2,pp=2,schedule={name},micro_batch=1", name) for name in SCHEDULES}
    for run in made.values():
        write_report(run)
    return made


@pytest.fixture(params=SCHEDULES)
def run(runs: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return runs[request.param]


@pytest.fixture
def step(run: Path) -> RecordedStep:
    (step,) = timelines.chosen(run)
    return step


# values


def test_the_picture_holds_every_event_of_every_rank(step: RecordedStep) -> None:
    picture = timelines.drawn(step)["picture"]
    names = picture["names"]
    assert [row["rank"] for row in picture["rows"]] == [0, 2, 1, 3], "ranks of a pipeline below each other"
    for row in picture["rows"]:
        events = step.by_rank()[row["rank"]]
        for lane in ("compute", "communication"):
            held = [(names[span[0]], span[FIELD["micro_batch"]], span[1], span[2]) for span in row[lane]]
            want = [(e.kind, e.micro_batch, round(1e6 * e.start), round(1e6 * e.end)) for e in events if e.lane == lane]
            assert held == want
        assert row["place"] == f"dp {row['rank'] % 2}, pp {row['rank'] // 2}"


def test_each_transfer_and_each_collective_is_linked_at_all_its_ranks(step: RecordedStep) -> None:
    picture = timelines.drawn(step)["picture"]
    names = picture["names"]
    ends: dict[int, list[tuple[str, str, int, int]]] = {}
    for row in picture["rows"]:
        for span in row["communication"]:
            key = (names[span[FIELD["operation"]]], names[span[FIELD["axis"]]], row["rank"], span[FIELD["bytes"]])
            ends.setdefault(span[FIELD["link"]], []).append(key)
    assert -1 not in ends, "the axes of this layout are all known"
    kinds = Counter("+".join(sorted({operation for operation, *_ in members})) for members in ends.values())
    assert kinds["receive+send"] == 2 * 2 * MICRO_BATCHES, "two pipelines, activations down, gradients up"
    assert set(kinds) == {"receive+send", "all-reduce"}
    for members in ends.values():
        assert len({size for *_, size in members}) == 1
        ranks = sorted(rank for _, _, rank, _ in members)
        of_axis = {"pp": ([0, 2], [1, 3]), "tied": ([0, 2], [1, 3]), "dp": ([0, 1], [2, 3]), "world": ([0, 1, 2, 3],)}
        assert ranks in of_axis[members[0][1]]


def test_shares_sum_to_the_step_and_are_what_was_recorded(step: RecordedStep) -> None:
    for row in timelines.drawn(step)["shares"]:
        assert tuple(row["shares"]) == SHARES == tuple(timelines.SHARE_TEXT)
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert all(share >= -1e-9 for share in row["shares"].values())
        events = [e for e in step.by_rank()[row["rank"]] if e.lane == "compute"]
        computed = sum(high - low for event, low, high in innermost(events) if event.kind in COMPUTE_KINDS)
        assert row["shares"]["compute"] * row["seconds"] == pytest.approx(computed)


def test_the_plan_is_the_schedule_at_the_measured_means(step: RecordedStep) -> None:
    plan = timelines.planned(step)
    events = plan.events
    schedule = pipeline_schedule.build(step.schedule, 2, MICRO_BATCHES)
    for rank in (0, 1):
        want = [(a.kind.value, a.micro_batch) for a in schedule.ranks[rank] if a.kind in pipeline_schedule.COMPUTE]
        assert [(e.kind, e.micro_batch) for e in events if e.rank == rank] == want
        for lane in (lane for lane in step.ranks if lane.pp == rank):
            ran = [e for e in step.by_rank()[lane.rank] if e.lane == "compute" and e.kind in COMPUTE_KINDS]
            assert [(e.kind, e.micro_batch) for e in ran] == want, "what ran is what was planned"
    for kind in {e.kind for e in events}:
        for stage in (0, 1):
            took = [e.seconds for e in step.events if e.kind == kind and e.stage == stage]
            assert [e.seconds for e in events if (e.kind, e.rank) == (kind, stage)] == pytest.approx(
                [sum(took) / len(took)] * MICRO_BATCHES
            )
    assert plan.seconds == pytest.approx(max(e.end for e in events))
    # A forward on the second stage cannot be planned before the first stage's has ended.
    first = {e.micro_batch: e.end for e in events if (e.rank, e.kind) == (0, "forward")}
    assert all(e.start >= first[e.micro_batch] - 1e-12 for e in events if (e.rank, e.kind) == (1, "forward"))


def test_a_slower_action_lengthens_the_plan_and_its_own_stage_alone(step: RecordedStep) -> None:
    slow = msgspec.structs.replace(
        step, events=[msgspec.structs.replace(e, end=e.end + 1.0) if (e.kind, e.stage) == ("forward", 1) else e for e in step.events]
    )  # fmt: skip
    before, after = timelines.planned(step), timelines.planned(slow)
    assert after.seconds == pytest.approx(before.seconds + MICRO_BATCHES, abs=0.5)
    lengths = [[e.seconds for e in plan.events if e.rank == 0] for plan in (before, after)]
    assert lengths[0] == pytest.approx(lengths[1])


def test_calls_by_axis(step: RecordedStep) -> None:
    calls = {(call["axis"], call["operation"]): call for call in timelines.calls(step)}
    assert calls["pp", "send"]["calls"] == calls["pp", "receive"]["calls"] == MICRO_BATCHES
    assert calls["pp", "send"]["bytes"] == MICRO_BATCHES * 16 * 64 * 4, "tokens x hidden x float32"
    reduced = [e for e in step.events if e.kind == "collective" and e.axis == "dp"]
    assert calls["dp", "all-reduce"]["flight"] == pytest.approx(sum(e.seconds for e in reduced) / 4)
    for call in calls.values():
        assert -1e-9 <= call["beside"] <= call["flight"] + 1e-9


def test_reductions_begin_inside_the_last_backward(runs: dict[str, Path]) -> None:
    """A unit's gradients travel while the backward goes on to the units before it; the last unit's can't."""
    (step,) = timelines.chosen(runs["1f1b"])
    for rank, events in step.by_rank().items():
        last = max((e for e in events if e.kind == "backward"), key=lambda e: e.start)
        reductions = [e for e in events if e.kind == "collective" and e.axis == "dp"]
        inside = [e for e in reductions if last.start < e.start < last.end]
        assert len(inside) >= len(reductions) - 1 >= 4, f"rank {rank}"


def span(kind: str, start: float, end: float, rank: int = 0, **more: Any) -> Event:
    return Event(rank, kind, more.pop("chunk", -1), more.pop("micro_batch", -1), start, end, **more)


def test_what_a_call_overlaps_is_counted_less_the_waits() -> None:
    call = {"axis": "dp", "operation": "all-reduce", "bytes": 8}
    events = [
        span("step", 0, 10), span("backward", 1, 6, micro_batch=0), span("wait", 2, 3, axis="tp", operation="all-reduce"),
        span("finish", 6, 9), span("wait", 7, 9, **call), span("collective", 1.5, 9, lane="communication", **call),
    ]  # fmt: skip
    recorded = RecordedStep(1, "dp=2", "1f1b", 1, 1, 1, [timeline.Lane(0, end=10)], events)
    found = {row["axis"]: row for row in timelines.calls(recorded)}
    assert found["dp"] == {"axis": "dp", "operation": "all-reduce", "ranks": 1, "calls": 1, "bytes": 8, "flight": 7.5,
                           "beside": pytest.approx(3.5), "waited": 2}  # fmt: skip


def test_spans_that_overlap_get_strips_of_their_own() -> None:
    spans = [span("a", 0, 4), span("b", 1, 2), span("c", 2, 3), span("d", 2.5, 6), span("e", 4, 5)]
    assert timelines.stacked(spans) == [0, 1, 1, 2, 0]
    assert timelines.depths([span("a", 0, 9), span("b", 1, 4), span("c", 2, 4), span("d", 4, 5)]) == [0, 1, 2, 1]


def test_many_ranks_are_drawn_in_whole_pipelines_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, step: RecordedStep
) -> None:
    monkeypatch.setattr(timelines, "MOST_SPANS", 3 * len(step.events) // 4)
    picture = timelines.drawn(step)["picture"]
    assert [row["rank"] for row in picture["rows"]][:2] == [0, 2]
    assert len(picture["rows"]) < picture["ranks"] == 4
    monkeypatch.setattr(timelines, "MOST_RANKS", 1)
    assert [row["rank"] for row in timelines.drawn(step)["picture"]["rows"]] == [0]


def test_the_last_step_of_each_layout_newest_first(tmp_path: Path, step: RecordedStep) -> None:
    for number, layout in ((10, "dp=2,pp=2"), (20, "dp=2,pp=2"), (30, "tp=4")):
        timeline.write(msgspec.structs.replace(step, step=number, layout=layout), tmp_path)
    assert [(found.step, found.layout) for found in timelines.chosen(tmp_path)] == [(30, "tp=4"), (20, "dp=2,pp=2")]
    assert timelines.chosen(tmp_path / "none") == []


def test_a_damaged_file_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["1f1b"], tmp_path / "run"))
    (path,) = timeline.recorded_steps(run)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"step-00000003\.json: damaged .*; remove it"):
        write_report(run)


def test_a_schedule_that_cannot_be_is_named(step: RecordedStep) -> None:
    with pytest.raises(InputError, match="the timeline of step 3: schedule: unknown schedule '2f2b'"):
        timelines.drawn(msgspec.structs.replace(step, schedule="2f2b"))


# the trace


def test_the_trace_holds_every_event_nested_and_every_transfer_as_a_flow(run: Path, step: RecordedStep) -> None:
    trace = json.loads((run / TRACE).read_text())["traceEvents"]
    slices = [e for e in trace if e["ph"] == "X"]
    assert len(slices) == len(step.events)
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
        threads.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for spans in threads.values():
        ends: list[float] = []
        for low, high in spans:
            while ends and ends[-1] <= low + 1e-6:
                ends.pop()
            assert not ends or high <= ends[-1] + 1e-6, "a thread's slices nest"
            ends.append(high)
    starts, finishes = ({e["id"]: e for e in trace if e["ph"] == phase} for phase in "sf")
    assert starts.keys() == finishes.keys()
    assert len(starts) == 2 * 2 * MICRO_BATCHES
    for key, start in starts.items():
        for flow, operation in ((start, "send"), (finishes[key], "receive")):
            within = [e for e in slices if (e["pid"], e["tid"]) == (flow["pid"], flow["tid"])
                      and e["ts"] <= flow["ts"] <= e["ts"] + e["dur"] and e["args"]["operation"] == operation]  # fmt: skip
            assert within, "a flow begins and ends in a slice"
        assert abs(start["pid"] - finishes[key]["pid"]) == 2, "between stages of one pipeline"
    assert {e["args"]["name"] for e in trace if e["name"] == "process_name"} == {f"rank {rank}" for rank in range(4)}


def test_steps_of_a_trace_stand_one_after_another(tmp_path: Path, step: RecordedStep) -> None:
    later = msgspec.structs.replace(step, step=step.step + 10)
    trace = json.loads(perfetto.write([later, step], tmp_path / "t.json").read_text())["traceEvents"]
    begins = {e["args"]["step"]: e["ts"] for e in trace if e.get("name") == "step" and e["pid"] == 0}
    assert begins[later.step] - begins[step.step] > 1e6 * step.seconds


# in a browser

WIDTHS = (1280, 390)


def seen(page: chromium.Page) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in page.run("({ ...document.querySelector('.recorded canvas').dataset })").items()
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_shows_what_ran(run: Path, step: RecordedStep, browser: chromium.Browser, width: int) -> None:
    page = browser.open(run / "report.html", width, touch=width < 500)
    page.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.run("document.documentElement.dataset.error ?? null") is None
    assert page.run("innerWidth") == width
    assert page.run("document.documentElement.scrollWidth") <= width
    whole = seen(page)
    assert whole["drawn"] == len(step.events)
    assert whole["planned"] == 2 * len(timelines.planned(step).events), "beside each of two pipelines"
    assert (whole["from"], whole["to"]) == (0, pytest.approx(max(step.seconds, timelines_end(step))))
    rows = page.run(
        "[...document.querySelectorAll('.shares tbody tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    assert [row[:-1] for row in rows] == [
        [f"{row['rank']} {row['place']}", *(f"{100 * share:.1f}%" for share in row["shares"].values())]
        for row in timelines.drawn(step)["shares"]
    ]


def timelines_end(step: RecordedStep) -> float:
    plan = timelines.planned(step)
    return plan.begin + plan.seconds


@pytest.mark.parametrize("width", WIDTHS)
def test_each_action_stands_where_it_ran_in_its_colour(
    run: Path, step: RecordedStep, browser: chromium.Browser, width: int
) -> None:
    """Zoomed to where a computation's longest piece without a wait ran by its recorded times: what is pointed at, and drawn."""
    page = browser.open(run / "report.html", width, touch=width < 500)
    longest: dict[int, tuple[Event, float, float]] = {}
    for events in step.by_rank().values():
        for event, low, high in innermost([e for e in events if e.lane == "compute"]):
            if event.kind in COMPUTE_KINDS and high - low > longest.get(id(event), (event, 0, 0))[2]:
                longest[id(event)] = (event, (low + high) / 2, high - low)
    assert len(longest) == sum(e.kind in COMPUTE_KINDS for e in step.events)
    found = page.run(f"""(() => {{
        const timeline = timelines[0], context = timeline.canvas.getContext("2d");
        return {json.dumps([(e.rank, at, length) for e, at, length in longest.values()])}.map(([rank, at, length]) => {{
            timeline.show(at - 5 * length, at + 5 * length);
            timeline.paint();
            const x = timeline.x(at), y = timeline.places[timeline.picture.rows.findIndex(row => row.rank === rank)].compute + 3;
            const span = timeline.at(x, y, 0), pixel = context.getImageData(Math.round(x), y, 1, 1).data;
            return [timeline.picture.rows[span.row].rank, span.kind, timeline.words(span).join(" "), ...pixel];
        }});
    }})()""")
    colors = {"forward": [0, 114, 178], "backward": [194, 78, 0], "input": [230, 159, 0], "weight": [0, 158, 115]}
    for (event, _, _), (rank, kind, words, *pixel) in zip(longest.values(), found, strict=True):
        assert (rank, kind, pixel) == (event.rank, event.kind, [*colors[event.kind], 255])
        assert f"rank {event.rank} · micro-batch {event.micro_batch} · stage {event.stage}" in words


def test_wheel_drag_keys_and_buttons_move_the_view(run: Path, step: RecordedStep, browser: chromium.Browser) -> None:
    page = browser.open(run / "report.html", 1280)
    x, y, width, height = page.box(".recorded canvas")
    whole = seen(page)
    page.wheel(x + width / 2, y + height / 2, -500)
    zoomed = seen(page)
    assert whole["from"] < zoomed["from"] < zoomed["to"] < whole["to"]
    times = [(round(1e6 * e.start) / 1e6, round(1e6 * e.end) / 1e6) for e in step.events]
    assert zoomed["drawn"] == sum(end >= zoomed["from"] and start <= zoomed["to"] for start, end in times) < len(times)
    page.drag((x + 600, y + 60), (x + 400, y + 60))
    dragged = seen(page)
    assert dragged["from"] > zoomed["from"]
    assert dragged["to"] - dragged["from"] == pytest.approx(zoomed["to"] - zoomed["from"])
    page.run("document.querySelector('.recorded canvas').focus()")
    page.key("ArrowLeft")
    assert seen(page)["from"] < dragged["from"]
    page.key("+")
    assert seen(page)["to"] - seen(page)["from"] < dragged["to"] - dragged["from"]
    page.key("0")
    assert seen(page) == whole
    page.run("document.querySelector('.recorded [data-key=\"+\"]').click()")
    page.settle()
    assert seen(page)["to"] - seen(page)["from"] < whole["to"]
    page.key(".")
    assert "rank 0" in page.run("document.querySelector('.recorded .tip').innerText")
    for _ in range(9):
        page.wheel(x + width / 2, y + height / 2, 400)
    assert seen(page) == whole


def test_with_the_whole_step_in_view_the_wheel_scrolls_the_page_on(run: Path, browser: chromium.Browser) -> None:
    page = browser.open(run / "report.html", 1280)
    x, y, width, height = page.box(".recorded canvas")
    whole = seen(page)
    page.settle()
    before = page.run("scrollY")
    page.run("void (scrolled = new Promise(done => addEventListener('scroll', () => done(scrollY))))")
    page.wheel(x + width / 2, y + height / 2, 200)
    assert page.run("scrolled") > before
    assert seen(page) == whole


def test_two_fingers_zoom_and_a_tap_reads(run: Path, step: RecordedStep, browser: chromium.Browser) -> None:
    page = browser.open(run / "report.html", 390, touch=True)
    x, y, width, _ = page.box(".recorded canvas")
    whole = seen(page)
    middle = x + width / 2
    page.touch(*([(middle - apart, y + 80), (middle + apart, y + 80)] for apart in (20, 40, 80)))
    zoomed = seen(page)
    assert math.isclose((whole["to"] - whole["from"]) / (zoomed["to"] - zoomed["from"]), 4, rel_tol=0.3)
    page.touch([(x + 200, y + 80)], [(x + 150, y + 80)], [(x + 100, y + 80)])
    assert seen(page)["from"] > zoomed["from"]
    page.run("timelines[0].show(...timelines[0].whole)")
    page.settle()
    first = min((e for e in step.events if e.rank == 0 and e.kind == "forward"), key=lambda e: e.start)
    at = page.run(f"[timelines[0].x({(first.start + first.end) / 2}), timelines[0].places[0].compute + 4]")
    page.touch([(x + at[0], y + at[1])])
    told = page.run("document.querySelector('.recorded .tip').innerText")
    assert told.startswith("forward")
    assert "rank 0 · micro-batch 0 · stage 0" in told
    tip = page.box(".recorded .tip")
    assert tip[0] >= x - 1
    assert tip[0] + tip[2] <= x + width + 1
