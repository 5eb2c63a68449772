"""What stands around a user's own module: data, his own loop, checkpoints and report, joining and being started."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_models import BATCH, EPOCHS, EXAMPLES, SEED, TwoLayers, adam, parallelize, plain
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import fiveply
from fiveply import pipeline_schedule, timeline
from fiveply.own_module import World, join
from fiveply.report import record
from fiveply.report.page import write_report
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.world.launch import launch

# data


def test_the_loader_keeps_every_row_once_in_an_order_that_no_layout_changes() -> None:
    data = TensorDataset(torch.arange(23), torch.arange(23))

    def epochs(layout: str, **options: Any) -> list[list[list[int]]]:
        def on_ranks() -> Any:
            world = World(Layout.parse(layout), 7)
            passes = []
            for _ in range(2):  # each pass is an epoch, also of a loader asked for anew
                mine = [b.input[: b.rows].tolist() for b in world.loader(data, global_batch=6, **options)]
                ranks: list[Any] = [None] * world.size
                if world.size > 1:
                    dist.all_gather_object(ranks, mine)
                else:
                    ranks = [mine]
                passes.append([list(itertools.chain(*rows)) for rows in zip(*ranks, strict=True)])
            return passes

        return launch(on_ranks, Layout.parse(layout).world, backend="gloo")

    assert epochs("dp=1") == [[list(range(i, min(i + 6, 23))) for i in range(0, 23, 6)]] * 2
    shuffled = epochs("dp=1", shuffle=True)
    assert all(sorted(itertools.chain(*batches)) == list(range(23)) for batches in shuffled)
    assert shuffled[0] != shuffled[1]
    for layout in ("dp=2", "dp=4"):
        assert epochs(layout, shuffle=True) == shuffled
    # A cursor goes on in the middle of an epoch.
    world = World(Layout(), 7)
    rest = [b.input.tolist() for b in world.loader(data, global_batch=6, shuffle=True, start=23 + 12)]
    assert rest == shuffled[1][2:]
    assert [b.cursor for b in world.loader(data, global_batch=6)] == [6, 12, 18, 23]


def test_epochs_go_on_by_data_set_and_settings_whatever_else_is_new() -> None:
    world = World(Layout(), 7)
    data = TensorDataset(torch.arange(8), torch.arange(8))

    def order(data: Any) -> list[int]:
        collate = lambda rows: (torch.stack([x for x, _ in rows]), torch.zeros(len(rows)))  # noqa: E731 (anew each time)
        return [int(x) for b in world.loader(data, global_batch=8, shuffle=True, collate=collate) for x in b.input]

    epochs = [order(data) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    pairs = list(zip(torch.arange(8), torch.arange(8), strict=True))  # a list can't say when it is gone
    assert [order(pairs) for _ in range(2)] == epochs[:2]
    for _ in range(20):  # the next one is likely to get the id of the last
        assert order(TensorDataset(torch.arange(8), torch.arange(8))) == epochs[0]


def test_a_plain_pair_is_the_whole_global_batch_on_every_rank() -> None:
    x, y = EXAMPLES["two layers"].data().tensors

    def on_ranks() -> tuple[float, str]:
        world, job = parallelize("two layers", "dp=2")
        loss = job.step((x[:BATCH], y[:BATCH]))
        assert loss.item() == loss
        part = slice(0, 4) if world.rank else slice(4, 8)
        with pytest.raises(InputError) as refused:
            job.step((x[part], y[part]))
        turned = slice(0, BATCH) if world.rank else torch.arange(BATCH).flip(0)  # equal in sum
        with pytest.raises(InputError, match="different ones"):
            job.step((x[turned], y[turned]))
        return loss, str(refused.value)

    loss, refused = launch(on_ranks, 2, backend="gloo")
    assert abs(loss - plain("two layers").losses[0]) < 1e-12
    assert refused.startswith("step: batch: ranks were given different ones; pass what world.loader gives")


def test_another_measure_than_the_loss() -> None:
    def hits(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return (output.argmax(1) == target).sum(), len(target)

    def on_ranks() -> float:
        world, job = parallelize("stack", "dp=2,pp=2")
        return job.evaluate(world.loader(EXAMPLES["stack"].data(), global_batch=5), hits)

    torch.manual_seed(SEED)
    model, (x, y) = EXAMPLES["stack"].build(), EXAMPLES["stack"].data().tensors
    assert launch(on_ranks, 4, backend="gloo") == float((model(x).argmax(1) == y).double().mean())


# the user's own loop


@pytest.mark.parametrize(
    ("layout", "ranks"), [("dp=1", 1), ("dp=2", 2), ("dp=2,zero=1", 2), ("dp=2,tp=2", 4), ("dp=4,zero=1", 4)]
)
@pytest.mark.parametrize("name", ["two layers", "convolutions"])
def test_the_users_own_loop(name: str, layout: str, ranks: int) -> None:
    expected = plain(name)

    def on_ranks() -> tuple[float, float]:
        world, job = parallelize(name, layout)
        worst = 0.0
        for epoch in range(EPOCHS):
            for step, (x, y) in enumerate(world.loader(EXAMPLES[name].data(), global_batch=BATCH)):
                if step % 2:
                    job.module.zero_grad()  # the module's, which sets each .grad to None
                else:
                    job.optimizer.zero_grad()
                EXAMPLES[name].loss(job.module(x), y).backward()
                if (epoch, step) == (0, 0) and "tp" not in layout:
                    gradients = {n: p.grad for n, p in job.module.named_parameters()}
                    worst = max(float((gradients[n] - g).abs().max()) for n, g in expected.gradients.items())  # type: ignore[operator]
                job.optimizer.step()
        state = job.state_dict()
        return worst, max(float((state[n] - x).abs().max()) for n, x in expected.state.items())

    gradients, state = launch(on_ranks, ranks, timeout_seconds=60, backend="gloo")
    assert gradients <= 1e-12
    assert state <= 1e-9


def test_own_gradients_accumulate_until_zero_grad() -> None:
    def on_ranks() -> float:
        _, job = parallelize("two layers", "dp=2")
        x, y = (t[dist.get_rank() :: 2][:4] for t in EXAMPLES["two layers"].data().tensors)
        (F.mse_loss(job.module(x), y) / 2).backward()
        (F.mse_loss(job.module(x), y) / 2).backward()
        return float(job.module.fc1.weight.grad.sum())  # type: ignore[union-attr]

    torch.manual_seed(SEED)
    model, (x, y) = EXAMPLES["two layers"].build(), EXAMPLES["two layers"].data().tensors
    F.mse_loss(model(x[:8]), y[:8]).backward()
    assert abs(launch(on_ranks, 2, backend="gloo") - float(model.fc1.weight.grad.sum())) < 1e-12  # type: ignore[union-attr]


def test_a_scheduler_of_torch_sets_the_rate() -> None:
    world, job = parallelize("two layers", "dp=1")
    scheduler = torch.optim.lr_scheduler.StepLR(job.optimizer, 1, gamma=0.5)
    for batch in world.loader(EXAMPLES["two layers"].data(), global_batch=BATCH):
        job.step(batch)
        scheduler.step()
    assert job.optimizer.param_groups[0]["lr"] == 0.01 / 8


# state


@pytest.mark.parametrize(("name", "first", "then"), [
    ("two layers", "dp=2,tp=2,zero=1", "pp=2,tp=2"), ("two layers", "pp=2,dp=2,zero=3", "dp=4"),
    ("convolutions", "dp=4,zero=2", "dp=4,zero=3,dp_shard=2"), ("attention", "dp=4", "dp=4,zero=3"),
])  # fmt: skip
def test_saved_under_one_layout_loaded_under_another(name: str, first: str, then: str, tmp_path: Path) -> None:
    data, expected = EXAMPLES[name].data(), plain(name)

    def before() -> None:
        world, job = parallelize(name, first)
        for batch in world.loader(data, global_batch=BATCH):
            job.step(batch)
            if job.steps == 2:
                break
        job.optimizer.param_groups[0]["lr"] = 0.01
        job.save(tmp_path)

    def after() -> float:
        world, job = parallelize(name, then)
        assert job.load(tmp_path) == 2
        loader = world.loader(data, global_batch=BATCH, start=job.cursor)
        losses = [job.step(batch) for _ in range(2) for batch in loader]
        state = job.state_dict()
        worst = max(abs(a - b) for a, b in zip(losses, expected.losses[2:], strict=True))
        return max(worst, *(float((state[n] - x).abs().max()) for n, x in expected.state.items()))

    launch(before, 4, timeout_seconds=60, backend="gloo")
    assert launch(after, 4, timeout_seconds=60, backend="gloo") <= 1e-9
    _, other = parallelize("recurrent", "dp=1")
    with pytest.raises(InputError, match="this is a checkpoint of another module"):
        other.load(tmp_path)


def test_a_run_directory_that_the_report_draws(tmp_path: Path) -> None:
    def on_ranks() -> None:
        world, job = parallelize("two layers", "dp=2,pp=2", run=tmp_path / "mine", record=2)
        for batch in world.loader(EXAMPLES["two layers"].data(), global_batch=BATCH):
            job.step(batch)
        job.evaluate(world.loader(EXAMPLES["two layers"].data(), global_batch=BATCH))

    launch(on_ranks, 4, timeout_seconds=60, backend="gloo")
    run = record.load(tmp_path / "mine")
    assert [row.step for row in run.rows] == [1, 2, 3]
    assert run.rows[-1].held_out_loss
    assert run.rows[0].loss == pytest.approx(plain("two layers").losses[0], rel=1e-12)
    assert run.facts.model["parameters"] == sum(p.numel() for p in TwoLayers().parameters())
    page = write_report(tmp_path / "mine").read_text()
    assert "TwoLayers" in page
    assert "2-way data" in page
    (path,) = timeline.recorded_steps(tmp_path / "mine")
    step = timeline.read(path)
    assert (step.step, step.pp, step.micro_batches) == (2, 2, run.facts.schedule.micro_batches)
    schedule = pipeline_schedule.build(step.schedule, step.pp, step.micro_batches)
    for lane in step.ranks:
        spans = [e for e in step.by_rank()[lane.rank] if e.lane == "compute"]
        kinds = {kind.value for kind in pipeline_schedule.Kind}
        ran = [(e.kind, e.chunk, e.micro_batch) for e in spans if e.kind in kinds]
        assert ran == [(a.kind.value, a.chunk, a.micro_batch) for a in schedule.ranks[lane.pp]]
        assert {"step", "data", "sums", "optimizer"} <= {e.kind for e in spans}


def test_clipping_takes_the_global_norm() -> None:
    def on_ranks(layout: str) -> tuple[float, float]:
        world, job = parallelize(
            "two layers", layout, clip=0.01, optimizer=lambda n: torch.optim.SGD([p for _, p in n], lr=1.0)
        )
        job.step(next(iter(world.loader(EXAMPLES["two layers"].data(), global_batch=BATCH))))
        return job.norm, float(job.state_dict()["fc1.weight"].sum())

    one, many = launch(on_ranks, 1, "dp=1", backend="gloo"), launch(on_ranks, 4, "tp=2,pp=2,zero=3", backend="gloo")
    assert one == pytest.approx(many, rel=1e-12)
    gradients = plain("two layers").gradients.values()
    assert one[0] == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-12)


# joining


def test_the_public_names_load_torch_only_when_used() -> None:
    code = (
        "import sys, fiveply, fiveply.spec.layout; fiveply.Layout; assert 'torch' not in sys.modules; "
        "fiveply.join; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_join_alone_and_with_too_few_ranks() -> None:
    world = join("dp=1", seed=1)
    assert (world.rank, world.size) == (0, 1)
    assert join().layout is None
    with pytest.raises(InputError) as refused:
        fiveply.join("dp=2,tp=2,pp=2")
    assert str(refused.value) == (
        "join: layout: dp=2,tp=2,pp=2 takes 8 ranks, 1 rank runs here; start them with "
        "`fiveply train script.py --layout dp=2,tp=2,pp=2`, or torchrun --nproc-per-node 8"
    )
    with pytest.raises(InputError, match="call parallelize first"):
        iter(join().loader(TensorDataset(torch.ones(3), torch.ones(3)), global_batch=2)).__next__()


def planned(stages: list[str], batch: bool) -> list[tuple[str, list[float]]]:
    """Every rank's layout, and its losses."""
    world = World(None, SEED)
    random = torch.Generator().manual_seed(SEED)
    rows = torch.randn(8, 7, generator=random).double(), torch.randn(8, 3, generator=random).double()
    job = world.parallelize(
        lambda: TwoLayers().double(), loss=nn.MSELoss(), optimizer=adam, stages=stages, batch=rows if batch else None
    )
    found = str(job.layout), [float(job.step(rows)) for _ in range(2)]
    return [found] if job.mesh.world is None else job.mesh.world.gather_objects(found)


@pytest.mark.parametrize(("stages", "batch"), [([], False), ([], True), (["fc1", "fc2"], True)])
def test_auto_plans_one_layout_for_all_ranks_and_trains_by_it(stages: list[str], batch: bool) -> None:
    (first, losses), other = launch(planned, 2, stages, batch)
    ((alone, expected),) = planned(stages, batch)
    assert other == (first, losses)
    assert Layout.parse(first).world == 2
    assert alone == "dp=1"
    assert losses == pytest.approx(expected, rel=1e-9)


# scripts


def test_torchrun_starts_a_script_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import fiveply, torch
        world = fiveply.join("dp=2")
        job = world.parallelize(
            lambda: torch.nn.Linear(3, 1), loss=torch.nn.MSELoss(),
            optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        )
        loss = job.step((torch.ones(3, 3), torch.ones(3, 1)))
        if world.rank == 0:
            print("loss", float(loss))
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")
