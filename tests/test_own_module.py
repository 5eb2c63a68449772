"""A user's own module under layouts equals plain PyTorch on one process, and what can't is refused."""

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
from own_models import BATCH, EPOCHS, EXAMPLES, SEED, TwoLayers, adam, parallelize, plain, prove
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
from fiveply.world.mesh import Groups

# equality


def test_one_rank_is_plain_pytorch() -> None:
    prove([(name, "dp=1") for name in EXAMPLES], 1)
    prove([("stack", "schedule=interleaved,vp=2"), ("two layers", "micro_batch=2")], 1)


def test_two_ranks_equal_one_process() -> None:
    cases = [(name, f"dp=2,zero={zero}") for name in EXAMPLES for zero in range(4)]
    cases += [
        (name, layout)
        for name in ("two layers", "row alone", "stack")
        for layout in ("tp=2", "pp=2", "pp=2,schedule=gpipe")
    ]
    cases += [("stack of 4", "pp=2,schedule=interleaved"), ("stack of 4", "pp=2,schedule=interleaved,zero=3")]
    cases += [
        ("two layers", "pp=2,micro_batch=1"),
        ("stack", "dp=2,zero=2,micro_batch=2"),
        ("recurrent", "dp=2,micro_batch=1"),
    ]
    prove(cases, 2)


def test_four_ranks_equal_one_process() -> None:
    cases = [
        ("two layers", f"{axes},zero={zero}") for axes in ("dp=2,tp=2", "dp=2,pp=2", "tp=2,pp=2") for zero in range(4)
    ]
    cases += [(name, f"dp=4,zero={zero}") for name in ("convolutions", "recurrent", "attention") for zero in (0, 3)]
    cases += [("stack", "dp=4,zero=3,dp_shard=2"), ("stack", "tp=4"), ("row alone", "tp=2,pp=2,schedule=gpipe")]
    cases += [
        ("stack", "dp=2,pp=2,zero=2"),
        ("stack of 4", "pp=4"),
        ("stack of 4", "pp=2,dp=2,schedule=interleaved,zero=2"),
    ]
    cases += [("stack of 4", "tp=2,pp=2,schedule=interleaved"), ("two layers", "dp=2,tp=2,zero=2,micro_batch=2")]
    prove(cases, 4)


def test_all_three_axes_equal_one_process() -> None:
    prove(
        [
            ("two layers", "dp=2,tp=2,pp=2"), ("two layers", "dp=2,tp=2,pp=2,zero=3,schedule=gpipe"),
            ("stack", "dp=2,tp=2,pp=2,zero=1"), ("stack of 4", "dp=2,tp=2,pp=2,schedule=interleaved,zero=3"),
            ("convolutions", "dp=8,zero=3"), ("two layers", "dp=8"), ("recurrent", "dp=8,zero=2,dp_shard=4"),
        ],
        8,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 6, 8])
def test_every_layout_of_the_stack(ranks: int) -> None:
    cases = [
        (name, f"dp={dp},tp={tp},pp=2,zero={zero},schedule={schedule}")
        for dp, tp in itertools.product((1, 2, 3, 4), repeat=2) if dp * tp * 2 == ranks
        for zero in range(4)
        for name, schedule in (("stack", "1f1b"), ("stack", "gpipe"), ("stack of 4", "interleaved"))
    ]  # fmt: skip
    prove(cases, ranks)


class Dropped(nn.Module):
    """Dropout between a column and a row, one that is shared by two places, and one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 11), nn.Linear(11, 6)
        self.inner, self.shared, self.channels = nn.Dropout(0.4), nn.Dropout(0.3), nn.Dropout1d(0.5)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        x = self.shared(self.fc2(self.inner(torch.relu(self.fc1(x)))))
        return self.out(self.channels(x.view(-1, 3, 2)).flatten(1))


def dropped(layout: str, groups: Groups | None = None) -> tuple[list[float], dict[str, Tensor]]:
    world = World(Layout.parse(layout), SEED, groups)
    job = world.parallelize(
        lambda: Dropped().double(),
        loss=nn.MSELoss(),
        optimizer=adam,
        tp={"fc1": "column", "fc2": "row"},
        stages=["fc1", "fc2"],
    )
    losses = [job.step(batch) for batch in world.loader(EXAMPLES["two layers"].data(), global_batch=BATCH)]
    return losses, job.state_dict()


@pytest.mark.parametrize(
    "layouts", [["dp=2", "tp=2", "pp=2", "dp=2,micro_batch=1"], ["dp=2,tp=2", "tp=2,pp=2", "dp=4,zero=3"]]
)
def test_dropout_is_keyed_by_row(layouts: list[str]) -> None:
    expected = dropped("dp=1")

    def on_ranks() -> list[float]:
        groups, found = Groups(), []
        for layout in layouts:
            losses, state = dropped(layout, groups)
            found.append(max(abs(a - b) for a, b in zip(losses, expected[0], strict=True)))
            found += [float((state[name] - x).abs().max()) for name, x in expected[1].items()]
        return found

    found = launch(on_ranks, Layout.parse(layouts[0]).world, timeout_seconds=60, backend="gloo")
    assert max(found) <= 1e-12
    # It drops: without it the loss is another, and a layer that stands twice draws two masks.
    torch.manual_seed(SEED)
    model, (x, y) = Dropped().double().eval(), EXAMPLES["two layers"].data()[:BATCH]
    assert abs(F.mse_loss(model(x), y).item() - expected[0][0]) > 1e-3


def test_dropout_zeroes_its_share_and_draws_anew_at_each_call_and_step() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.other, self.scale = nn.Dropout(0.25), nn.Dropout(0.25), nn.Parameter(torch.ones(()))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen += [self.drop(x), self.drop(x), self.other(x)]
            return x * self.scale

    job = World(Layout(), 0).parallelize(Twice, loss=F.mse_loss, optimizer=adam)
    x = torch.ones(100, 100)
    for _ in range(2):
        job.step((x, x))
    seen = job.module.seen  # type: ignore[union-attr]
    assert all(abs(float((each == 0).float().mean()) - 0.25) < 0.02 for each in seen)
    assert all(abs(float(each.mean()) - 1) < 0.02 for each in seen)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


class InPlace(nn.Module):
    """A stage that begins by changing its input in place, a buffer and frozen weights that two stages use."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(7, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)
        self.fixed = nn.Linear(7, 7, bias=False).requires_grad_(False)
        self.register_buffer("shift", torch.linspace(-1, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fixed(self.fc1(x)) + self.shift
        x.mul_(2)
        x = self.relu(x)
        return self.fc2(self.fixed(x) - self.shift)


def test_operations_in_place_and_constants_that_two_stages_use(tmp_path: Path) -> None:
    x, y = EXAMPLES["two layers"].data()[:BATCH]
    torch.manual_seed(SEED)
    model = InPlace().double()
    optimizer = adam((n, p) for n, p in model.named_parameters() if p.requires_grad)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    def make(seed: int) -> Any:
        return World(Layout.parse("dp=2,pp=2"), seed).parallelize(
            lambda: InPlace().double(), loss=nn.MSELoss(), optimizer=adam, stages=["fc1", "relu"]
        )

    def on_ranks() -> list[float]:
        job, worst = make(SEED), []
        for _ in range(2):
            job.step((x, y))
        job.save(tmp_path)
        other = make(SEED + 1)  # other frozen weights, until those of the checkpoint are read on both stages
        other.load(tmp_path)
        for each in (job, other):
            each.step((x, y))
            worst.append(max(float((each.state_dict()[name] - value).abs().max()) for name, value in expected.items()))
        return worst

    assert max(launch(on_ranks, 4, timeout_seconds=60, backend="gloo")) <= 1e-12


class Routed(nn.Module):
    """Each row goes to one of two layers, so a replica may use one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 3), nn.Linear(7, 3)])

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for index, layer in enumerate(self.layers):
            mine = (x[:, 0] > 0) == bool(index)
            if mine.any():
                out = out.index_put((mine.nonzero()[:, 0],), layer(x[mine]))
        return out


def test_replicas_may_use_different_parameters() -> None:
    x, y = EXAMPLES["two layers"].data()[:8]
    x = x[x[:, 0].argsort()]
    torch.manual_seed(SEED)
    model = Routed().double()
    F.mse_loss(model(x), y).backward()

    def on_ranks() -> float:
        groups, worst = Groups(), 0.0
        for zero in range(3):
            job = World(Layout(dp=4, zero=zero), SEED, groups).parallelize(
                lambda: Routed().double(), loss=nn.MSELoss(), optimizer=adam
            )
            job.gradients((x, y))
            gradients = job.gradient_dict()
            worst = max(worst, *(float((gradients[n] - p.grad).abs().max()) for n, p in model.named_parameters()))
        return worst

    assert launch(on_ranks, 4, timeout_seconds=60, backend="gloo") <= 1e-12


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


# refusals


def refusal(model: Any, layout: str = "dp=1", loss: Any = None, optimizer: Any = adam, **more: Any) -> str:
    with pytest.raises(InputError) as refused:
        World(Layout.parse(layout), 0).parallelize(model, loss=loss or nn.MSELoss(), optimizer=optimizer, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_no_layout_can_hold_is_refused_in_one_line() -> None:
    tp = {"fc1": "column", "fc2": "row"}
    assert "give what builds it: TwoLayers" in refusal(TwoLayers())
    assert "gives int; return an nn.Module" in refusal(lambda: 3)
    for key in ("cp", "ep"):
        assert f"{key}=2 needs to know" in refusal(TwoLayers, f"{key}=2")
    assert "leave sp out" in refusal(TwoLayers, "tp=2,sp=1", tp=tp)
    assert "zbv splits the backward" in refusal(TwoLayers, "schedule=zbv,vp=2", stages=["fc1", "fc2"])
    assert "call torch.utils.checkpoint" in refusal(TwoLayers, "recompute=full")
    assert "4 stages, 2 are named; name 4 modules" in refusal(TwoLayers, "pp=4", stages=["fc1", "fc2"])
    assert "the module has no part 'fc3'; name parts of it: fc1, fc2" in refusal(TwoLayers, stages=["fc3"])
    assert "tp: fc3: the module has no such part; name linears of it: fc1, fc2" in refusal(TwoLayers, tp={"fc3": "row"})
    assert "fc1: 'diagonal' is unknown" in refusal(TwoLayers, tp={"fc1": "diagonal"})
    assert "Embedding is no nn.Linear" in refusal(EXAMPLES["recurrent"].model, tp={"embed": "row"})
    assert "uses its weight without calling it" in refusal(
        EXAMPLES["attention"].model, tp={"encoder.layers.0.linear1": "row"}
    )
    assert "its weight is also embed.weight" in refusal(EXAMPLES["attention"].model, tp={"head": "column"})
    assert "give the layer its sizes" in refusal(lambda: nn.LazyLinear(3))
    assert "nothing to train" in refusal(nn.ReLU)
    assert "hold them in the module" in refusal(TwoLayers, loss=nn.Linear(3, 1))


def optimizer_of(make: Any) -> Any:
    return lambda named: make([p for _, p in named])


def test_optimisers_that_are_not_elementwise_are_refused() -> None:
    for kind in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.Rprop,
    ):
        World(Layout(), 0).parallelize(
            TwoLayers, loss=nn.MSELoss(), optimizer=optimizer_of(lambda ps, kind=kind: kind(ps, lr=0.0))
        )
    assert "LBFGS can't take a plain step" in refusal(TwoLayers, optimizer=optimizer_of(torch.optim.LBFGS))
    assert "Adafactor keeps 'row_var' in another shape" in refusal(
        TwoLayers, optimizer=optimizer_of(torch.optim.Adafactor)
    )

    class Normed(torch.optim.SGD):
        """Each matrix moves by its gradient's direction."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad / p.grad.norm(), alpha=group["lr"])

    assert "Normed updates a matrix as a whole" in refusal(
        TwoLayers, optimizer=optimizer_of(lambda ps: Normed(ps, lr=0.1))
    )
    muon = optimizer_of(lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2]))
    assert "Muon updates a matrix as a whole" in refusal(TwoLayers, optimizer=muon)
    assert "gives list; return a torch.optim.Optimizer" in refusal(TwoLayers, optimizer=list)


class Branching(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x if x.sum() > 0 else -x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_cuts_that_cannot_be_made_are_refused_with_the_reason() -> None:
    two = {"layout": "schedule=interleaved,vp=2", "stages": ["fc1", "fc2"]}
    assert "the forward can't be traced (symbolically traced variables cannot be used" in refusal(Branching, **two)
    assert "stages are called in the order fc1, fc2" in refusal(TwoLayers, **two | {"stages": ["fc2", "fc1"]})
    assert "is used in stages a and b, and weights tied" in refusal(Shared, **two | {"stages": ["a", "b"]})
    assert "never called by itself" in refusal(EXAMPLES["stack"].model, **two | {"stages": ["enter", "blocks"]})


def test_what_differs_by_layout_is_refused() -> None:
    def on_ranks() -> list[str]:
        data = EXAMPLES["two layers"].data()

        def step(model: Any, layout: str, **more: Any) -> None:
            world = World(Layout.parse(layout), 0)
            job = world.parallelize(lambda: model().double(), loss=nn.MSELoss(), optimizer=adam, **more)
            job.step(next(iter(world.loader(data, global_batch=BATCH))))

        def run(model: Any, layout: str = "dp=2", **more: Any) -> str:
            with pytest.raises(InputError) as refused:
                step(model, layout, **more)
            return str(refused.value)

        class Functional(TwoLayers):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc2(F.dropout(self.fc1(x), 0.1, self.training))

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(1, 3, 2, dropout=0.1, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.lstm(x[:, :, None])[0][:, -1]

        class Own(nn.BatchNorm1d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input)

        class ByRank(TwoLayers):
            def __init__(self) -> None:
                super().__init__()
                self.fc2.bias.data += dist.get_rank()

        class Loose(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(7, 3)])

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.layers[0].weight)

        two = {"stages": ["0", "2"]}
        return [
            run(Functional), run(Recurrent), run(lambda: nn.Sequential(nn.Linear(7, 3), Own(3))),
            run(lambda: nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), "pp=2", **two),
            run(lambda: nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3)), "dp=2,micro_batch=2"),
            run(ByRank), run(Loose, "dp=2,zero=3"),
        ]  # fmt: skip

    functional, recurrent, own, piped, parts, by_rank, loose = launch(on_ranks, 2, timeout_seconds=60, backend="gloo")
    assert "torch.nn.functional.dropout draws random numbers that no key holds to a row" in functional
    assert "lstm draws random numbers" in recurrent
    assert "1: Own is no batch norm of torch's own, so it can't be synchronised; use nn.BatchNorm2d" in own
    assert "1: BatchNorm1d normalises each micro-batch by itself" in piped
    assert "1: BatchNorm1d normalises each micro-batch by itself" in parts
    assert "fc2.bias starts with other values on other ranks" in by_rank
    assert "layers.0.weight: torch.nn.functional.linear uses it outside its own block's forward" in loose


def test_own_loops_are_refused_where_no_rank_has_the_whole() -> None:
    def on_ranks(layout: str) -> str:
        _, job = parallelize("two layers", layout)
        with pytest.raises(InputError) as refused:
            _ = job.module
        return str(refused.value)

    assert launch(on_ranks, 2, "pp=2", backend="gloo") == (
        "job: module: under pp=2 no rank can run the whole module by itself; call job.step, or leave pp out and set zero to 0 or 1"
    )
    assert "zero to 0 or 1" in launch(on_ranks, 2, "dp=2,zero=2", backend="gloo")


def test_losses_that_are_no_means_are_refused() -> None:
    x = torch.ones(4, 7)
    for loss in (lambda o, t: o, lambda o, t: 3.0):
        job = World(Layout(), 0).parallelize(TwoLayers, loss=loss, optimizer=adam)
        with pytest.raises(InputError, match="return a scalar tensor, or \\(sum, count\\)"):
            job.step((x, x))
    job = World(Layout(), 0).parallelize(TwoLayers, loss=nn.MSELoss(), optimizer=adam)
    for batch in ((x, x[:3]), x, (x, torch.ones(()))):
        with pytest.raises(InputError, match="rows first"):
            job.step(batch)


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
