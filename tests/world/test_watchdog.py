"""Hangs explained: a rank that is stopped, that never comes, that makes another call; and a slow run that goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from short_run import arguments, corpus

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import RunError
from fiveply.spec.layout import Layout
from fiveply.world.hang import Hello, Position, judge
from fiveply.world.launch import launch
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call, Recorder
from fiveply.world.watchdog import Watchdog

LIMIT = 1.0


def mesh_of(layout: str) -> Mesh:
    return Mesh(Layout.parse(layout), ModelSpec.load("tiny"))


def watchdog(mesh: Mesh, folder: Path, **more: float) -> Watchdog:
    place = f"dp {mesh.at.dp}, pp {mesh.at.pp}"
    options: dict[str, float] = {"limit": LIMIT, **more}
    return Watchdog(mesh.recorder, place, file=folder / "hang.txt", note=print, **options)  # type: ignore[arg-type]


def a_rank_stops(folder: Path) -> None:
    """Rank 1, the second stage, in the forward pass of micro-batch 3; rank 0 wants a gradient from it."""
    mesh = mesh_of("pp=2")
    mesh.recorder.step, mesh.recorder.stages = 5, {mesh.rank: "layers 4 to 7"}
    assert mesh.up is not None
    with watchdog(mesh, folder):
        if mesh.rank == 1:
            with mesh.recorder.span("forward", chunk=0, micro_batch=3, stage=1):
                (folder / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(60)  # a moment passes before the stop takes hold of this thread
        with mesh.recorder.span("receive_backward", chunk=0, micro_batch=2, stage=0):
            mesh.up.receive(torch.empty(8), 1).wait()


def test_a_stopped_rank_is_named_with_its_action(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError) as error:
        launch(a_rank_stops, 2, tmp_path, log_folder=tmp_path / "logs")
    where = "rank 1 (dp 0, pp 1) does not answer (its process is stopped): it stands in forward, micro-batch 3, stage 1 (layers 4 to 7)"
    assert str(error.value) == f"hang: {where}; its log: {tmp_path}/logs/rank-00001.log"
    told = capfd.readouterr().err
    report = (tmp_path / "hang.txt").read_text()
    assert told.count(report) == 1
    assert (tmp_path / "logs" / "rank-00000.log").read_text().count(report.strip()) == 1
    lines = report.splitlines()
    assert lines[0] == "No rank has gone on for 1 s, in step 5:"
    assert lines[1] == f"  {where}"
    waits = r"  rank 0 \(dp 0, pp 0\) waits to receive the gradient of micro-batch 2 \(32 B\) from rank 1, since \d+ s"
    assert re.fullmatch(waits, lines[2])
    assert len(lines) == 3
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists(), "the stopped rank is still there"


def a_rank_never_comes(folder: Path) -> None:
    mesh = mesh_of("dp=3")
    assert mesh.dp is not None
    mesh.dp.all_reduce(torch.ones(2))
    with watchdog(mesh, folder, timeout=3.0):
        if mesh.rank == 2:
            with mesh.recorder.span("data"):
                time.sleep(60)
        with mesh.recorder.span("finish"):
            mesh.dp.all_reduce(torch.ones(256))


def test_a_rank_that_computes_is_named_at_once_and_ends_the_run_before_the_calls_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"hang: rank 2 \(dp 2, pp 0\) holds up the others: data, since \d s"):
        launch(a_rank_never_comes, 3, tmp_path)
    out, err = capfd.readouterr()
    assert out.count("it may only be slow: the run goes on, for 3 s at most") == 1
    assert "rank 2 (dp 2, pp 0) waits for nobody" in err
    for rank in (0, 1):
        assert f"rank {rank} (dp {rank}, pp 0) waits for rank 2 in all-reduce 2 over dp (1 KiB), during finish" in err


def calls_differ(folder: Path) -> None:
    mesh = mesh_of("dp=2")
    assert mesh.dp is not None
    with watchdog(mesh, folder):
        # What the ranks wait for never ends: a transport may refuse, mix up or hang in such calls.
        operation = ("all-reduce", "all-gather")[mesh.rank]
        Call(mesh.recorder, mesh.dp, operation, 64, -1).begin(lambda: time.sleep(60), wait=True)  # type: ignore[arg-type]


def test_ranks_in_different_calls_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"rank 0 \(.*\) and rank 1 \(.*\) do not make the same call: in all-reduce 1 over dp"
    ):
        launch(calls_differ, 2, tmp_path)


def slow(folder: Path) -> str:
    """One rank computes for five limits; later all move all the time while rank 0 waits in one call."""
    mesh = mesh_of("dp=2")
    recorder = mesh.recorder
    assert mesh.dp is not None
    with watchdog(mesh, folder):
        if mesh.rank == 1:
            with recorder.span("evaluation"):
                time.sleep(2.5 * LIMIT)
        mesh.dp.all_reduce(torch.ones(2))
        for _ in range(25 if mesh.rank == 1 else 0):
            with recorder.span("forward"):
                time.sleep(0.1 * LIMIT)
        mesh.dp.all_reduce(torch.ones(2))
    return "done"


def test_a_slow_run_is_not_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(slow, 2, tmp_path) == "done"
    assert capfd.readouterr().out.count("No rank has gone on") == 1, (
        "in the evaluation, once, and not while rank 1 moves"
    )
    assert not (tmp_path / "hang.txt").exists()


def test_a_real_run_with_a_stopped_stage_ends_with_the_report(tmp_path: Path) -> None:
    corpus(tmp_path)
    command = [sys.executable, "-m", "fiveply.cli", *arguments(
        tmp_path, "dp=2,pp=2,micro_batch=1", "hung", "--hang-timeout", "2", train__steps=100_000, train__log_every=1
    )]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = tmp_path / "runs" / "hung"
    try:
        wait_until(lambda: (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size > 500)
        children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        (victim,) = [pid for pid in children if (folder / "logs" / "rank-00002.log") in opened(pid)]
        os.kill(victim, signal.SIGSTOP)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    report = (folder / "hang.txt").read_text()
    assert err.count(report) == 1
    line = next(line for line in report.splitlines() if "rank 2" in line)
    assert re.match(
        r"  rank 2 \(dp 0, pp 1\) does not answer \(its process is stopped\): it stands (in|waiting) ", line
    )
    for rank, place in ((0, "dp 0, pp 0"), (1, "dp 1, pp 0"), (3, "dp 1, pp 1")):
        assert f"rank {rank} ({place}) waits " in report
    assert err.splitlines()[-1].startswith("fiveply: hang: rank 2 (dp 0, pp 1) does not answer")
    assert "Traceback" not in err


def opened(pid: int) -> list[Path]:
    return [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()]


def wait_until(true: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


# the judgement alone


def position(rank: int, kind: str, *, call: str = "", issued: int = 0, left: bool = False) -> Position:
    recorder = Recorder(rank)

    class Axis:
        name, ranks = "dp", [0, 1, 2]
        place = recorder.add_axis("dp", [0, 1, 2])

    hello = Hello(f"dp {rank}", recorder.axes, {})
    with recorder.span(kind):
        for _ in range(issued):
            done = Call(recorder, Axis(), call or "all-reduce", 8, -1)
        if call:
            boards: list[tuple[int, ...]] = []
            done.begin(lambda: boards.append(tuple(recorder.board)), wait=True)  # type: ignore[arg-type, return-value]
            return Position(rank, hello, boards[0], 9.0)
        return Position(rank, hello, tuple(recorder.board), 9.0, left=left)


def test_a_rank_that_left_is_named_by_those_who_wait() -> None:
    positions = [position(0, "step", call="all-reduce", issued=3), position(1, "step", call="all-reduce", issued=3),
                 position(2, "", issued=2, left=True)]  # fmt: skip
    verdict = judge({p.rank: p for p in positions}, 9)
    assert verdict.certain
    assert verdict.blamed == (2,)
    assert "rank 0 (dp 0) waits for rank 2 in all-reduce 3 over dp (8 B), during step, since 9 s" in verdict.report


def test_ranks_that_all_wait_in_one_call_cannot_go_on() -> None:
    positions = {rank: position(rank, "finish", call="all-reduce", issued=1) for rank in range(3)}
    verdict = judge(positions, 9)
    assert verdict.certain
    assert "which all its ranks have begun" in verdict.report
    assert verdict.cause == "ranks 0, 1, 2 wait for each other"


def test_a_rank_that_computes_may_only_be_slow() -> None:
    positions = {0: position(0, "step", call="all-reduce", issued=1), 1: position(1, "evaluation")}
    verdict = judge(positions, 9)
    assert not verdict.certain
    assert verdict.blamed == (1,)
