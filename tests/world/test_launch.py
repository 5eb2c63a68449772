"""Ranks start, talk, fail, stop and die as `fiveply.world.launch` says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fiveply.spec.errors import InputError, RunError
from fiveply.world.device import find
from fiveply.world.launch import joined, launch, stop_requested
from fiveply.world.process import first_host


def sum_of_ranks() -> float:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return total.item()


def test_four_ranks_reduce_and_rank_0s_value_comes_back() -> None:
    unpicklable = threading.Lock()

    def function(offset: int, lock: object) -> tuple[float, int, int]:
        assert lock is unpicklable  # forked: arguments travel as they are
        return sum_of_ranks() + offset + dist.get_rank(), dist.get_world_size(), torch.get_num_threads()

    assert launch(function, 4, 10, unpicklable, backend="gloo") == (16.0, 4, find().threads_for(4))
    assert not dist.is_initialized()


def test_a_value_that_cannot_be_pickled_comes_back_as_none() -> None:
    assert launch(lambda: threading.Lock() if dist.get_rank() == 0 else None, 2, backend="gloo") is None


def test_one_rank_is_this_process(tmp_path: Path) -> None:
    assert launch(lambda: (os.getpid(), sum_of_ranks(), stop_requested()), 1, backend="gloo") == (os.getpid(), 0, False)
    assert not dist.is_initialized()
    with pytest.raises(RunError, match=r"^rank 0: KeyError: 'k'; its log: .*rank-00000.log$"):
        launch(lambda: {}["k"], 1, backend="gloo", log_folder=tmp_path)
    assert "Traceback" in (tmp_path / "rank-00000.log").read_text()
    assert not dist.is_initialized()


def test_ranks_may_use_threads_after_their_parent_did(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(1_000_000).exp()  # a pool of OpenMP threads, which fork does not copy
    monkeypatch.setattr(type(find()), "threads_for", lambda self, ranks: 2)

    def function() -> int:
        torch.randn(1_000_000).exp()
        return torch.get_num_threads()

    assert launch(function, 2, backend="gloo", timeout_seconds=20) == 2
    torch.set_num_threads(before)


def test_ranks_are_spawned_where_fork_is_not_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert launch(sum_of_ranks, 2, backend="gloo") == 1


def test_the_rank_that_raised_first_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def function() -> None:
        sum_of_ranks()
        if dist.get_rank() == 2:
            raise ValueError("a bad\nnumber")
        sum_of_ranks()

    start = time.monotonic()
    with pytest.raises(RunError, match=r"^rank 2: ValueError: a bad number; its log: .*rank-00002.log$"):
        launch(function, 4, backend="gloo", log_folder=tmp_path)
    assert time.monotonic() - start < 10
    assert 'raise ValueError("a bad' in (tmp_path / "rank-00002.log").read_text()
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == 1, shown  # the first error's alone
    assert "ValueError" in shown


@pytest.mark.parametrize("code", [None, 3])
def test_a_rank_that_dies_is_named_though_others_are_stuck(code: int | None) -> None:
    def function() -> None:
        sum_of_ranks()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL) if code is None else os._exit(code)
        if dist.get_rank() == 3:
            time.sleep(60)
        sum_of_ranks()

    start = time.monotonic()
    cause = "was killed by signal 9 (SIGKILL)" if code is None else "ended with exit code 3 without a word"
    with pytest.raises(RunError) as raised:
        launch(function, 4, backend="gloo")
    assert str(raised.value) == f"rank 1 {cause}"
    assert time.monotonic() - start < 10


def test_errors_for_the_user_keep_their_type(capfd: pytest.CaptureFixture[str]) -> None:
    def function() -> None:
        raise InputError("is missing", where="run.toml", key="data", fix="name a file")

    with pytest.raises(InputError) as raised:
        launch(function, 2, backend="gloo")
    assert str(raised.value) == "run.toml: data: is missing; name a file"
    assert raised.value.exit_code == 2
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_that_follows_from_another_gives_way() -> None:
    def function() -> None:
        if dist.get_rank() == 1:
            time.sleep(0.3)
            raise RunError("the disk is full")
        try:
            raise ConnectionResetError("peer gone")
        except ConnectionResetError as error:
            raise RunError("this rank waited in vain") from error

    with pytest.raises(RunError, match=r"^the disk is full$"):
        launch(function, 3, backend="gloo")


def test_each_rank_has_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def function() -> None:
        rank = dist.get_rank()
        print(f"out {rank}")
        print(f"error {rank}", file=sys.stderr)
        print(f"\rprogress {rank}", file=sys.stderr)
        os.write(2, f"compiled {rank}\n".encode())

    launch(function, 3, backend="gloo", log_folder=tmp_path / "logs")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"rank-0000{i}.log" for i in range(3)]
    first, last = ((tmp_path / "logs" / f"rank-0000{i}.log").read_text() for i in (0, 2))
    assert "out 0" in first
    assert "progress" not in first
    assert all(text in last for text in ("out 2", "error 2", "compiled 2"))
    shown = capfd.readouterr()
    assert "out 0" in shown.out
    assert "out 1" not in shown.out
    assert "error 0" in shown.err
    assert "progress 0" in shown.err
    assert "compiled 1" not in shown.err


def test_bad_requests_are_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="0 ranks"):
        launch(print, 0, backend="gloo")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold logs"):
        launch(print, 2, backend="gloo", log_folder=tmp_path / "file")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert joined()
    with pytest.raises(InputError, match="takes 2 ranks, but 3 were started"):
        launch(print, 2, backend="gloo")
    monkeypatch.setenv("WORLD_SIZE", "three")
    with pytest.raises(InputError, match="WORLD_SIZE: 'three' is not a whole number"):
        launch(print, 2, backend="gloo")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-010,12]-ib,other7", "gpu003-ib"), ("a1,b[2-3]", "a1"), ("single", "single"), ("n-x[7]", "n-x7")],
)
def test_slurms_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# --- whole processes -------------------------------------------------------------------------------------------------


def program(body: str, **environment: str) -> subprocess.Popen[str]:
    head = """
        import os, sys, time
        import torch, torch.distributed as dist
        from fiveply.world.launch import joined, launch, stop_requested
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


STEPS = """
    def function():
        pids = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 0:
            print(*pids, flush=True)
        for step in range(600):
            flag = torch.tensor([float(stop_requested() and HEEDS)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            if flag.item():
                return step
            time.sleep(0.05)
    print("returned", launch(function, 2, backend="gloo"), flush=True)
"""


def started(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    return pids


@pytest.mark.parametrize("whole_group", [False, True])
def test_an_interrupt_asks_ranks_to_stop_and_waits_for_them(whole_group: bool) -> None:
    process = program(f"HEEDS = True\n{textwrap.dedent(STEPS)}")
    started(process)
    time.sleep(0.3)
    # A terminal's Ctrl-C reaches every process of the group; `kill` reaches the launcher alone.
    os.killpg(process.pid, signal.SIGINT) if whole_group else process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=15)
    assert out.startswith("returned "), errors
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_second_interrupt_ends_at_once() -> None:
    process = program(f"HEEDS = False\n{textwrap.dedent(STEPS)}")
    pids = started(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert "stopped at once by a second interrupt" in errors
    assert not any(alive(pid) for pid in pids)


def test_ranks_do_not_outlive_their_launcher() -> None:
    process = program(f"HEEDS = False\n{textwrap.dedent(STEPS)}")
    pids = started(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_ranks_started_by_others_are_joined(launcher: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    body = """
        def function():
            total = torch.ones(1)
            dist.all_reduce(total)
            if dist.get_rank() == 1 and "fails" in os.environ:
                raise ValueError("second")
            dist.all_reduce(total)
            return dist.get_rank(), total.item()
        print(joined(), *launch(function, 2, backend="gloo"), "RANK" in os.environ)
    """

    def environment(rank: int) -> dict[str, str]:
        if launcher == "torchrun":
            return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "77"}
        return slurm | {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}

    processes = [program(body, MASTER_PORT=port, **environment(rank)) for rank in range(2)]
    for rank, process in enumerate(processes):
        out, errors = process.communicate(timeout=30)
        assert out.split() == ["True", str(rank), "4.0", "True"], errors
    if launcher == "torchrun":
        processes = [program(body, MASTER_PORT=port, fails="1", **environment(rank)) for rank in range(2)]
        errors = [process.communicate(timeout=30)[1].splitlines()[-1] for process in processes]
        assert errors[0].endswith("another rank failed first")
        assert errors[1].endswith("RunError: rank 1: ValueError: second")


def test_a_single_rank_can_have_a_process_of_its_own() -> None:
    assert launch(os.getpid, 1, backend="gloo") == os.getpid()
    assert launch(os.getpid, 1, backend="gloo", apart=True) != os.getpid()
