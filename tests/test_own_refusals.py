"""What a user's own module can't have under layouts is refused in one line, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_models import BATCH, EXAMPLES, TwoLayers, adam, parallelize
from torch import Tensor, nn
from torch.nn import functional as F

from fiveply.own_module import World
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.world.launch import launch


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
