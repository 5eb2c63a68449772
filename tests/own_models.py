"""Modules as a user would write them, their data, and plain PyTorch's training of them: what the tests of a user's own module
share. Everything is float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fiveply.own_module import Job, World
from fiveply.spec.layout import Layout
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups

SEED, BATCH, EPOCHS = 3, 9, 2
ROWS = 19
"""Two batches of 9 and one of a single row: most replicas are left without rows at the end of an epoch."""


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 7, 3, stride=2), nn.BatchNorm2d(7, momentum=None), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.lstm = nn.LSTM(6, 9, num_layers=2, batch_first=True)
        self.gru = nn.GRU(9, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(x))
        hidden, _ = self.gru(hidden)
        return self.head(hidden[:, -1])


class Gated(nn.Module):
    """A block with a gated MLP (two columns meet before a row) and a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.gate, self.up = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.down = nn.Linear(10, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.scale * self.down(F.silu(self.gate(y)) * self.up(y)) + 0.1 * skip


class Stack(nn.Module):
    """Blocks with a skip connection over all of them, a mask and a size that travel with the values."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(Gated() for _ in range(4))
        self.leave = nn.Linear(6, 5)
        self.offset = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        rows, mask = x.shape[0], x[:, :1] > 0
        hidden = skip = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, skip)
        hidden = torch.where(mask, hidden + self.offset, hidden * 2)
        return self.leave(hidden).view(rows, -1)


class Attention(nn.Module):
    """torch's own encoder, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(13, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.head(self.encoder(self.embed(x)))[:, -1])


WEIGHTS = torch.arange(1.0, 6.0, dtype=torch.float64)


def weighted(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A mean over class weights, not over rows: so (sum, count)."""
    return F.cross_entropy(output, target, WEIGHTS, reduction="sum"), WEIGHTS[target].sum()


def adam(named: Any) -> torch.optim.Optimizer:
    named = list(named)
    decayed = [p for name, p in named if p.dim() > 1]
    others = [p for name, p in named if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    # An epsilon above rounding: a bias before batch norm has no gradient in truth.
    return torch.optim.AdamW(groups, lr=0.01, eps=1e-6)


@dataclass(frozen=True, eq=False)
class Example:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[Any, Any], Any] = field(default_factory=nn.CrossEntropyLoss)
    classes: int = 5
    """0: targets are vectors of 3."""
    tokens: bool = False
    tp: dict[str, str] = field(default_factory=dict)
    stages: Sequence[str] = ()

    def data(self) -> TensorDataset:
        random = torch.Generator().manual_seed(5)
        if self.tokens:
            x = torch.randint(0, 13, (ROWS, *self.shape), generator=random)
        else:
            x = torch.randn(ROWS, *self.shape, generator=random, dtype=torch.float64)
        if self.classes:
            return TensorDataset(x, torch.randint(0, self.classes, (ROWS,), generator=random))
        return TensorDataset(x, torch.randn(ROWS, 3, generator=random, dtype=torch.float64))

    def build(self) -> nn.Module:
        return self.model().double()


GATED = {f"blocks.{i}.{name}": kind for i in range(4)
         for name, kind in (("gate", "column"), ("up", "column"), ("down", "row"))}  # fmt: skip
EXAMPLES = {
    "two layers": Example(TwoLayers, (7,), nn.MSELoss(), 0, tp={"fc1": "column", "fc2": "row"}, stages=["fc1", "fc2"]),
    "row alone": Example(TwoLayers, (7,), nn.MSELoss(), 0, tp={"fc1": "row", "fc2": "column"}, stages=["fc1", "fc2"]),
    "convolutions": Example(Convolutions, (3, 8, 8)),
    "recurrent": Example(Recurrent, (7,), tokens=True),
    "stack": Example(Stack, (3,), weighted, tp=GATED, stages=["blocks.0", "blocks.2"]),
    "stack of 4": Example(Stack, (3,), weighted, tp=GATED, stages=[f"blocks.{i}" for i in range(4)]),
    "attention": Example(Attention, (5,), tokens=True),
}


@dataclass
class Trained:
    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    state: dict[str, Tensor]
    held_out: float


def _mean(loss: Any) -> Tensor:
    return loss[0] / loss[1] if isinstance(loss, tuple) else loss


@cache
def plain(name: str) -> Trained:
    """Ordinary PyTorch on one process; nothing of fiveply."""
    example = EXAMPLES[name]
    torch.manual_seed(SEED)
    model = example.build()
    optimizer = adam(model.named_parameters())
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for _ in range(EPOCHS):
        for x, y in DataLoader(example.data(), batch_size=BATCH):
            optimizer.zero_grad()
            loss = _mean(example.loss(model(x), y))
            loss.backward()
            gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        held_out = _mean(example.loss(model(example.data().tensors[0]), example.data().tensors[1])).item()
    return Trained(losses, gradients, {n: x.clone() for n, x in model.state_dict().items()}, held_out)


def parallelize(name: str, layout: str, groups: Groups | None = None, **more: Any) -> tuple[World, Job]:
    example = EXAMPLES[name]
    world = World(Layout.parse(layout), SEED, groups)
    more = {"loss": example.loss, "optimizer": adam, "tp": example.tp, "stages": example.stages} | more
    return world, world.parallelize(example.build, **more)


def train(name: str, layout: str, groups: Groups | None = None) -> Trained:
    """The same through fiveply, on the ranks of this world."""
    data = EXAMPLES[name].data()
    world, job = parallelize(name, layout, groups)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    loader = world.loader(data, global_batch=BATCH)
    for _ in range(EPOCHS):
        for batch in loader:
            if losses:
                losses.append(job.step(batch))
                continue
            losses.append(job.gradients(batch))
            gradients = job.gradient_dict()
            job.update()
    held_out = job.evaluate(world.loader(data, global_batch=7))
    return Trained(losses, gradients, job.state_dict(), held_out)


def differences(a: Trained, b: Trained) -> Iterator[tuple[str, float]]:
    """Of each kind, relative to the largest value of the tensor or 1e-3."""
    assert a.gradients.keys() == b.gradients.keys()
    assert a.state.keys() == b.state.keys()
    yield "loss", max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))
    yield "held out", abs(a.held_out - b.held_out)
    for kind, mine, theirs in (("gradient of", a.gradients, b.gradients), ("", a.state, b.state)):
        for name, y in theirs.items():
            yield f"{kind} {name}", float((mine[name] - y).abs().max()) / max(1e-3, float(y.abs().max()))


def prove(cases: Sequence[tuple[str, str]], ranks: int) -> None:
    """Each (example, layout) of one world size, in one launch, against plain PyTorch."""
    expected = {name: plain(name) for name, _ in cases}

    def on_ranks() -> dict[str, tuple[float, str]]:
        groups, worst = Groups(), {}
        for name, layout in cases:
            try:
                trained = train(name, layout, groups)
            except Exception as error:
                raise RuntimeError(f"{name} under {layout}: {error}") from error
            worst[f"{name}: {layout}"] = max((d, what) for what, d in differences(trained, expected[name]))
        return worst

    worst = launch(on_ranks, ranks, timeout_seconds=60, backend="gloo")
    assert len(worst) == len(cases)
    beyond = {case: found for case, found in worst.items() if not found[0] <= 1e-9}
    assert not beyond, beyond
