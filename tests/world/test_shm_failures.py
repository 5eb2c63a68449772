"""Shared memory when ranks die, hang or disagree, when it can't serve, and under torch's own parallel wrappers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import short_run
import torch
import torch.distributed as dist
from torch import nn

from fiveply.spec.errors import RunError
from fiveply.world import compiled, shm
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups
from fiveply.world.process import failure
from fiveply.world.shm_backend import SharedMemoryGroup

SLOT = shm._SLOT_BYTES


def shared(ranks: list[int] | None = None, name: str = "tp") -> SharedMemoryGroup:
    group = Groups("shm").get(ranks or list(range(dist.get_world_size())), name=name)
    assert isinstance(group, SharedMemoryGroup)
    return group


def caught(call: Callable[[], Any]) -> str:
    """Its error; that of a lost peer must also be told apart by the launcher from one that is a cause."""
    try:
        call()
    except Exception as error:
        lost = "ConnectionError" if failure(0, error).follows else type(error).__name__
        return f"{lost}: {error}"
    return "no error"


# ranks that die, hang or leave


@pytest.mark.parametrize("size", [4, 4 * SLOT])
def test_a_rank_that_is_killed_is_named(size: int, tmp_path: Path) -> None:
    def function() -> None:
        group = shared()
        dist.all_reduce(torch.zeros(4), group=group)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        said = caught(lambda: dist.all_reduce(torch.zeros(size), group=group))
        (tmp_path / str(dist.get_rank())).write_text(said)

    with pytest.raises(RunError, match=r"^rank 1 was killed by signal 9 \(SIGKILL\)"):
        launch(function, 3, backend="gloo", timeout_seconds=60)
    said = [(tmp_path / rank).read_text() for rank in "02" if (tmp_path / rank).exists()]
    about = rf"during all-reduce \({4 * size} bytes, operation 2 of group tp \[0, 1, 2\]\)"
    assert any(re.fullmatch(rf"ConnectionError: rank 1 died {about}", text) for text in said), said
    assert all(re.fullmatch(rf"ConnectionError: rank \d (died|had given up) {about}", text) for text in said), said


def test_a_rank_that_waits_for_a_transfer_learns_that_the_sender_died(tmp_path: Path) -> None:
    def function() -> None:
        group = shared([0, 2]) if dist.get_rank() != 1 else None
        if dist.get_rank() == 2:
            assert group is not None
            dist.send(torch.ones(3), 0, group=group)  # what was sent before is still received
            os.kill(os.getpid(), signal.SIGKILL)
        elif group is not None:
            time.sleep(0.3)
            dist.recv(x := torch.zeros(3), 2, group=group)
            assert x.sum() == 3
            (tmp_path / "said").write_text(caught(lambda: dist.recv(x, 2, group=group)))

    with pytest.raises(RunError, match="rank 2 was killed"):
        launch(function, 3, backend="gloo", timeout_seconds=60)
    expected = "ConnectionError: rank 2 died during receive (12 bytes, operation 2 of group tp [0, 2])"
    assert (tmp_path / "said").read_text() == expected


def test_a_silent_rank_is_named_after_the_time_out() -> None:
    def function() -> list[str]:
        said: list[str] = []
        if dist.get_rank() != 1:
            group = shared([0, 2])
            group.channel.timeout_seconds = 0.3
            dist.all_reduce(torch.zeros(4), group=group)
            if dist.get_rank() == 0:
                said = [caught(lambda: dist.all_reduce(torch.zeros(4), group=group)) for _ in range(2)]
        dist.barrier()
        return said

    message = (
        "ConnectionError: rank 2 has been silent for 0.3 s in all-reduce (16 bytes, operation 2 of group tp [0, 2])"
    )
    assert launch(function, 3, backend="gloo", timeout_seconds=60) == [message] * 2


def test_a_rank_that_left_is_named() -> None:
    def function() -> str:
        group = shared()
        if dist.get_rank() == 1:
            dist.destroy_process_group(group)
            said = ""
        else:
            said = caught(lambda: dist.all_reduce(torch.zeros(4), group=group))
        dist.barrier()
        return said

    expected = "ConnectionError: rank 1 had left the group during all-reduce (16 bytes, operation 1 of group tp [0, 1])"
    assert launch(function, 2, backend="gloo", timeout_seconds=60) == expected


def test_memory_of_a_failed_operation_is_let_go() -> None:
    """After an error nothing may write into the tensor: its memory can be anyone's."""

    def function() -> str:
        group = shared()
        group.channel.timeout_seconds = 0.3
        if dist.get_rank() == 0:
            work = dist.irecv(x := torch.zeros(4), 1, group=group)
            assert work is not None
            said = caught(work.wait)
            dist.barrier()
        else:
            dist.barrier()
            said = ""
            dist.isend(torch.ones(4), 0, group=group)
        dist.barrier()
        return said if dist.get_rank() or not x.any() else "written"

    assert launch(function, 2, backend="gloo", timeout_seconds=60).startswith("ConnectionError: rank 1 has been silent")


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (
            lambda g: dist.all_reduce(torch.zeros(1000), group=g),
            lambda g: dist.broadcast(torch.zeros(10), 0, group=g),
            "rank 0 is in all-reduce (4000 bytes, operation 1 of group tp [0, 1]), "
            "but rank 1 in broadcast (40 bytes, operation 1)",
        ),
        (
            lambda g: dist.all_reduce(torch.zeros(10), group=g),
            lambda g: dist.all_reduce(torch.zeros(10, dtype=torch.int32), group=g),
            "rank 0 is in all-reduce (40 bytes, operation 1 of group tp [0, 1]), "
            "but rank 1 in all-reduce (40 bytes, operation 1) with another dtype, reduction or root",
        ),
        (
            lambda g: dist.all_to_all_single(torch.zeros(5), torch.zeros(2), [1, 4], [1, 1], group=g),
            lambda g: dist.all_to_all_single(torch.zeros(2), torch.zeros(5), [1, 1], [2, 3], group=g),
            "but rank 1 in all-to-all (8 bytes, operation 1)",
        ),
        (
            lambda g: dist.recv(torch.zeros(5), 1, group=g),
            lambda g: dist.send(torch.zeros(6), 0, group=g),
            "rank 0 is in receive (20 bytes, operation 1 of group tp [0, 1]), but rank 1 sent 24 bytes, or of another dtype",
        ),
    ],
)  # fmt: skip
def test_operations_that_do_not_match_are_named(
    mine: Callable[..., Any], theirs: Callable[..., Any], message: str
) -> None:
    def function() -> str:
        group = shared()
        said = caught(lambda: (mine, theirs)[dist.get_rank()](group))
        dist.barrier()
        return said

    said = launch(function, 2, backend="gloo", timeout_seconds=60)
    assert said.startswith("RuntimeError"), said
    assert message in said


def test_nothing_is_left_when_all_are_killed(tmp_path: Path) -> None:
    program = f"""
        import os, signal, time, torch, torch.distributed as dist
        from pathlib import Path
        from fiveply.world.launch import launch
        from fiveply.world.mesh import Groups

        def ranks():
            group = Groups("shm").get([0, 1, 2])
            dist.all_reduce(torch.zeros(300_000), group=group)
            (Path({str(tmp_path)!r}) / str(os.getpid())).touch()
            while True:
                dist.all_reduce(torch.zeros(300_000), group=group)

        launch(ranks, 3, backend="gloo")
    """
    before = set(os.listdir("/dev/shm"))
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3
    descriptors = [os.readlink(f"/proc/{pids[0]}/fd/{fd}") for fd in os.listdir(f"/proc/{pids[0]}/fd")]
    assert not [name for name in descriptors if "fiveply" in name]  # closed: the mappings alone hold the memory
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)
    assert set(os.listdir("/dev/shm")) == before


def _alive(pid: int) -> bool:
    return shm._born(pid) != ""


# when it can't serve


def _fallen_back() -> tuple[str, str, float]:
    groups = Groups()
    x = torch.ones(1)
    dist.all_reduce(x, group=groups.get([0, 1]))
    return groups.fell_back, groups.carriers, x.item()


def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)


def _with_broken_source(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(os.environ["PYTEST_TMP"])
    (broken / "group.cpp").write_text("int main( {")
    monkeypatch.setattr(shm, "_NATIVE", broken)


def _without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def shortage(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", shortage)


def _on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_host", lambda: f"host {dist.get_rank()}")


def _behind_a_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, *flags: Any, **more: Any) -> int:
        if str(path).startswith("/proc/"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *flags, **more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_compiler, r"rank 0: no C\+\+ compiler was found"),
        (_with_broken_source, r"rank 0: .*c\+\+ failed: .*error"),
        (_without_memory, r"rank 0: \d MiB could not be reserved \(No space left on device\)"),
        (_on_another_host, "the ranks are on several hosts"),
        (_behind_a_wall, r"rank 1: .*Permission denied"),
    ],
)
def test_gloo_serves_where_shared_memory_can_not(
    spoil: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    spoil(monkeypatch)
    shm.build.cache_clear()
    try:
        fell_back, carriers, total = launch(_fallen_back, 2, backend="gloo", timeout_seconds=60)
        assert re.match(reason, fell_back), fell_back
        assert (carriers, total) == ("gloo", 2.0)
        with pytest.raises(
            RunError, match=r"shared memory can't serve ranks \[0, 1\] \(.*\); use --backend auto or gloo"
        ):
            launch(lambda: Groups("shm").get([0, 1]), 2, backend="gloo", timeout_seconds=60)
    finally:
        shm.build.cache_clear()


def test_the_transport_is_a_choice() -> None:
    def carriers() -> list[str]:
        found = []
        for transport in ("auto", "gloo"):
            groups = Groups(transport)
            groups.get([0, 1])
            found.append(groups.carriers)
        return found

    assert launch(carriers, 2, backend="gloo", timeout_seconds=60) == ["shm", "gloo"]


def test_ranks_compile_at_once_into_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    native = shutil.copytree(shm._NATIVE, tmp_path / "native")
    (native / "block.hpp").write_text((native / "block.hpp").read_text() + f"\n// {time.time()}\n")
    monkeypatch.setattr(shm, "_NATIVE", native)
    monkeypatch.setattr(shm, "_FLAGS", (*shm._FLAGS, "-O0"))

    def function() -> bool:
        shm.build.cache_clear()
        return _fallen_back() == ("", "shm", 2.0)

    monkeypatch.setattr("fiveply.world.launch.shm.build", shm.build)
    assert launch(function, 2, backend="gloo", timeout_seconds=60)
    assert [path.suffix for path in (tmp_path / ".cache" / "fiveply").iterdir()] == [".so"]


def test_a_change_of_any_source_makes_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = shutil.copytree(shm._NATIVE, tmp_path / "native")
    monkeypatch.setattr(shm, "_NATIVE", native)
    names = {compiled.file_name(*shm.sources(), "c++")}
    for path in native.iterdir():
        path.write_text(path.read_text() + "\n")
        names.add(compiled.file_name(*shm.sources(), "c++"))
    assert len(names) == 1 + len(list(native.iterdir())) > 5


def test_nothing_is_compiled_where_gloo_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "build", lambda: pytest.fail("shared memory was built"))
    run = short_run.train(tmp_path, "dp=2", "over-gloo", "--backend", "gloo")
    assert json.loads((run / "facts.json").read_text())["transport"] == "gloo"


# torch's own wrappers


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def _step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _expected() -> torch.Tensor:
    model = _model()
    _step(model, torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))
    return model[0].weight.detach()


def _rows() -> torch.Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    return x.chunk(2)[dist.get_rank()]


def test_distributed_data_parallel_is_unchanged() -> None:
    def function() -> torch.Tensor:
        model = nn.parallel.DistributedDataParallel(_model(), process_group=shared())
        _step(model, _rows())
        return model.module[0].weight.detach()

    assert torch.allclose(launch(function, 2, backend="gloo", timeout_seconds=60), _expected(), atol=1e-6)


def test_fully_shard_and_tensor_parallel_are_unchanged() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def function() -> list[torch.Tensor]:
        mesh = DeviceMesh.from_group(shared(), "cpu")
        sharded = fully_shard(_model(), mesh=mesh)
        _step(sharded, _rows())
        split = parallelize_module(_model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        _step(split, torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))
        return [model[0].weight.full_tensor().detach() for model in (sharded, split)]

    for found in launch(function, 2, backend="gloo", timeout_seconds=60):
        assert torch.allclose(found, _expected(), atol=1e-6)
