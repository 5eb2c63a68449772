"""`fiveply train script.py --layout ...`: the ranks, the arguments, the first error; and the recipe against plain PyTorch."""

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

from fiveply import script
from fiveply.cli import main
from fiveply.spec.errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"


def fiveply(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fiveply.cli", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_recipe_trains_as_plain_pytorch_does_at_every_layout(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, RECIPES / "own_module_plain.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = torch.load(tmp_path / "own_module.pt")
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] * 0.6
    for layout in ("", "dp=2", "tp=2", "pp=2", "dp=2,tp=2,pp=2"):
        (tmp_path / "own_module.pt").unlink()
        done = fiveply("train", RECIPES / "own_module.py", *(["--layout", layout] if layout else []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        mine = [float(line.split()[-1]) for line in done.stdout.splitlines()]
        assert mine == pytest.approx(losses, abs=1e-11), layout
        state = torch.load(tmp_path / "own_module.pt")
        assert list(state) == list(expected)
        assert max(float((state[name] - x).abs().max()) for name, x in expected.items()) <= 1e-9, layout


def test_a_script_sees_what_torchrun_would_give_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "script.py").write_text(
        "import os, sys\nimport beside, fiveply\n"
        "if __name__ == '__main__':\n"
        "    world = fiveply.join('dp=4')\n"
        "    print(world.rank, world.size, os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1:], beside.NAME)\n"
        "    sys.exit(0)\n"
    )
    done = fiveply("train", "script.py", "--layout", "dp=2", "a", "--b=c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 2 0 2 ['a', '--b=c'] beside\n"
    assert done.stderr == "fiveply: --layout dp=2 goes before the script's dp=4\n"
    assert (tmp_path / "runs/script/logs/rank-00001.log").read_text() == "1 2 1 2 ['a', '--b=c'] beside\n"
    done = fiveply("train", "--layout=dp=2", "script.py", cwd=tmp_path)
    assert done.stdout == "0 2 0 2 [] beside\n"
    done = fiveply("train", "script.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "fiveply: join: layout: dp=4 takes 4 ranks, 1 rank runs here; start them with `fiveply train"
    )


def test_the_first_error_is_named(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import fiveply\nworld = fiveply.join()\nassert world.rank != 1, 'not me'\n")
    done = fiveply("train", "script.py", "--layout", "dp=2", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "fiveply: rank 1: AssertionError: not me; its log: runs/script/logs/rank-00001.log"
    )
    (tmp_path / "script.py").write_text("import sys\nsys.exit('enough')\n")
    done = fiveply("train", "script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "fiveply: script.py ended with enough\n")


def test_bad_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["train", *args])
        assert stop.value.code == 2
        return capsys.readouterr().err

    missing = str(tmp_path / "missing.py")
    assert refused(missing) == f"fiveply: {missing}: no such file; give a Python script, or a run's TOML file\n"
    (tmp_path / "script.py").write_text("")
    there = str(tmp_path / "script.py")
    assert (
        refused(there, "--layout") == "fiveply: fiveply train: --layout has no value; give one, as --layout dp=2,tp=2\n"
    )
    assert "--layout: unknown key 'dq'" in refused(there, "--layout", "dq=2")
    assert "'auto' says not how many ranks to start" in refused(there, "--layout", "auto")


def test_arguments_are_told_apart() -> None:
    assert script.split_arguments(["a", "--layout", "dp=2", "--", "--layout", "b"]) == ("dp=2", ["a", "--layout", "b"])
    assert script.split_arguments(["--layout=tp=2", "--x"]) == ("tp=2", ["--x"])
    assert script.find(["run.toml", "--layout", "x.py"]) is None
    assert script.find(["--layout", "dp=2", "s.py"]) == 2
    with pytest.raises(InputError):
        script.split_arguments(["--layout"])


def test_ctrl_c_stops_training_after_one_step_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import torch, fiveply\n"
        "world = fiveply.join()\n"
        "job = world.parallelize(lambda: torch.nn.Linear(3, 1), loss=torch.nn.MSELoss(),\n"
        "                        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1))\n"
        "try:\n"
        "    while True:\n"
        "        job.step((torch.ones(3, 3), torch.ones(3, 1)))\n"
        "        open('ready', 'w')\n"
        "except KeyboardInterrupt:\n"
        "    job.save('saved')\n"
        "    raise\n"
    )
    command = [sys.executable, "-m", "fiveply.cli", "train", "script.py", "--layout", "dp=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "fiveply: script.py stopped as asked\n")
    assert len(list((tmp_path / "saved").iterdir())) == 1


def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, time, fiveply\nworld = fiveply.join()\nopen(f'ready-{world.rank}', 'w').write(str(os.getpid()))\n"
        "while True:\n    time.sleep(0.1)\n"
    )
    command = [sys.executable, "-m", "fiveply.cli", "train", "script.py", "--layout", "dp=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # a press within half a second counts as the same one
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert "interrupt" in (process.stderr.read() if process.stderr else "")
    for rank in range(2):
        pid = int((tmp_path / f"ready-{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


HANGS = """
import os, signal, sys, time
import torch, fiveply

world = fiveply.join("dp=2", hang_timeout=2.5)
job = world.parallelize(
    lambda: torch.nn.Linear(3, 1), loss=torch.nn.MSELoss(), run="runs/mine",
    optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
)
batch = torch.ones(3, 3), torch.ones(3, 1)
job.step(batch)
time.sleep(5)  # between steps nobody waits, so nothing hangs
job.step(batch)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)  # a moment passes before the stop takes hold of this thread
job.step(batch)
"""


# torchrun gives a stopped process half a minute to end.
@pytest.mark.parametrize("starter", ["fiveply", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_hang_is_explained_and_a_pause_is_none(starter: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(HANGS)
    if starter == "fiveply":
        done = fiveply("train", "script.py", "--layout", "dp=2", cwd=tmp_path)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    report = (tmp_path / "runs/mine/hang.txt").read_text()
    assert done.stderr.count("No rank has gone on") == 1
    assert report in done.stderr
    assert report.startswith("No rank has gone on for 2 s, in step 2:\n")
    assert "rank 1 (dp 1) does not answer (its process is stopped): it stands in between steps" in report
    assert re.search(
        r"rank 0 \(dp 0\) waits for rank 1 in all-reduce \d+ over world \(8 B\), during data, since \d s", report
    )
