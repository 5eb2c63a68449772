"""What a run shows of itself: a recorded step under every schedule, a profile, a snapshot of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from short_run import train

from fiveply import pipeline_schedule, timeline
from fiveply.spec.errors import InputError
from fiveply.spec.run import RunSpec
from fiveply.timeline import RecordedStep, shares
from fiveply.world.device import find

LAYOUTS = {
    "pp=2,schedule=gpipe": "micro_batch=2",
    "dp=2,pp=2,schedule=1f1b": "zero=1",
    "pp=2,schedule=interleaved": "vp=2,micro_batch=2",
    "dp=2,pp=2,schedule=zb": "zero=2,micro_batch=1",
    "pp=2,schedule=zbv": "micro_batch=2",
    "tp=2,dp=2": "zero=3,micro_batch=2",
    "dp=1": "micro_batch=4",
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(find()), "threads_for", lambda self, ranks: 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def recorded(run: Path) -> RecordedStep:
    (path,) = timeline.recorded_steps(run)
    return timeline.read(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_action_of_the_schedule_stands_once_and_in_order(layout: str, folder: Path) -> None:
    run = train(folder, f"{layout},{LAYOUTS[layout]}", layout.replace(",", "-"))
    step = recorded(run)
    assert step.step == 3, "the last step, where there are fewer than ten"
    zero = int(LAYOUTS[layout].partition("zero=")[2][:1] or 0)
    schedule = pipeline_schedule.build(
        step.schedule, step.pp, step.micro_batches, step.vp, gather=zero == 3, reduce_each=zero >= 2
    )
    kinds = {kind.value for kind in pipeline_schedule.Kind}
    by_rank = step.by_rank()
    for lane in step.ranks:
        events = [e for e in by_rank[lane.rank] if e.lane == "compute"]
        ran = [(e.kind, e.chunk, e.micro_batch) for e in events if e.kind in kinds]
        assert ran == [(a.kind.value, a.chunk, a.micro_batch) for a in schedule.ranks[lane.pp]]
        assert all(e.stage == schedule.stage_of(lane.pp, e.chunk) for e in events if e.kind in kinds and e.chunk >= 0)
        assert {"step", "data", "sums", "optimizer"} <= {e.kind for e in events}
        assert all(lane.start <= e.start <= e.end <= lane.end for e in events)
        # Spans nest: none reaches beyond the one that it began in.
        open_ends: list[float] = []
        for e in events:
            while open_ends and open_ends[-1] <= e.start:
                open_ends.pop()
            assert not open_ends or e.end <= open_ends[-1]
            open_ends.append(e.end)
    assert min(lane.start for lane in step.ranks) == 0
    for lane in step.ranks:
        assert sum(shares(step)[lane.rank].values()) == pytest.approx(lane.end - lane.start)


def test_both_ends_of_a_transfer_agree_and_ranks_of_an_axis_make_the_same_calls(folder: Path) -> None:
    step = recorded(train(folder, "dp=2,pp=2,micro_batch=1", "calls"))
    calls = {lane.rank: [e for e in step.by_rank()[lane.rank] if e.lane == "communication"] for lane in step.ranks}
    ends = sorted((e.rank, e.peer, e.start, e.end) for rank in calls for e in calls[rank] if e.operation == "send")
    other = sorted((e.peer, e.rank, e.start, e.end) for rank in calls for e in calls[rank] if e.operation == "receive")
    assert ends == other
    assert len(ends) == 2 * 2 * 4, "4 micro-batches, two pipelines, there and back"
    for a, b in ((0, 1), (2, 3)):
        reductions = [[(e.number, e.bytes) for e in calls[rank] if e.axis == "dp"] for rank in (a, b)]
        assert reductions[0] == reductions[1] != []


def test_which_step_is_recorded(folder: Path) -> None:
    run = train(folder, "dp=2", "which", "--record", "2", train__stop_at=2, train__steps=9)
    assert [path.name for path in timeline.recorded_steps(run)] == ["step-00000002.json"]
    train(folder, "dp=2", "which", "--record", "2", "--resume", train__steps=9)
    assert [path.stem for path in timeline.recorded_steps(run)] == ["step-00000002", "step-00000004"]
    none = train(folder, "dp=1", "none", "--record", "0")
    assert timeline.recorded_steps(none) == []


def test_a_profile_of_the_steps_asked_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(folder, "dp=2", "profiled", "--profile", "2:3")
    err = capfd.readouterr().err
    assert "steps 2 to 3 profiled" in err
    assert "Self CPU %" in err
    for rank in (0, 1):
        events = json.loads((run / "profile" / f"rank-0000{rank}.json").read_text())["traceEvents"]
        assert sum(event.get("name") == "all-reduce over dp" for event in events) >= 2, "which are no calls of torch's"
        assert "Self CPU %" in (run / "logs" / f"rank-0000{rank}.log").read_text()
    run = train(folder, "dp=1", "beyond", "--profile", "3:9")  # the run ends before the profile does
    assert (run / "profile" / "rank-00000.txt").is_file()


@pytest.mark.parametrize("value", ["x", "3:2", "0:1", "1:2:3"])
def test_a_range_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"train\.profile: .* is no range of steps; write the first and the last"):
        RunSpec.load(None, ["name=a", f'train.profile="{value}"'])


def test_a_snapshot_of_memory(folder: Path) -> None:
    # In a process of its own: ranks forked from this one would find what other tests hold.
    code = f"import short_run, pathlib; short_run.train(pathlib.Path({str(folder)!r}), 'pp=2', 'snapshot', '--memory-snapshot')"
    paths = [path for path in sys.path if path]
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    run = folder / "runs" / "snapshot"
    facts = json.loads((run / "facts.json").read_text())
    for rank in (0, 1):
        held = json.loads((run / "memory" / f"rank-0000{rank}.json").read_text())
        assert held["bytes"].items() <= facts["ranks"][rank]["bytes"].items()  # activations come and go
        assert held["when"] == "after step 3"
        sizes = [tensor["bytes"] for tensor in held["largest"]]
        assert sizes == sorted(sizes, reverse=True)
        names = {tensor["name"] for tensor in held["largest"]}
        assert {"layers.0 parameters", "layers.0 gradients"} <= names or rank


def test_running_out_of_memory_leaves_a_snapshot_and_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fiveply.train.job import Job

    def starve(self: Job, *args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(Job, "update", starve)
    with pytest.raises(SystemExit) as stop:
        train(folder, "dp=2", "starved")
    assert stop.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fiveply: ")]
    rank = line.removeprefix("fiveply: rank ")[0]
    assert "is out of memory at step 1 (DefaultCPUAllocator" in line
    held = json.loads((folder / "runs" / "starved" / "memory" / f"rank-0000{rank}.json").read_text())
    assert held["when"] == "out of memory"
