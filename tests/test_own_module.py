"""A user's own module under layouts equals plain PyTorch on one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import BATCH, EXAMPLES, SEED, adam, prove
from torch import Tensor, nn
from torch.nn import functional as F

from fiveply.own_module import World
from fiveply.spec.layout import Layout
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups


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
