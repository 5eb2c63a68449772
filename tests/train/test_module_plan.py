"""The plan for a user's own module: what it counts equals what the module is, and the pick follows from prices and memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from own_models import EXAMPLES
from torch import Tensor, nn

from fiveply.plan.operations import Operation
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.train import auto, module_plan
from fiveply.train.module_plan import choose

FLOAT = 4


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Peeking(Mlp):
    """Branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > 0 else x


def cluster(monkeypatch: pytest.MonkeyPatch, memory: float = 1e12, *, apart: bool = False) -> None:
    """Cores of one host, or of as many hosts on a slow network."""
    network = {"network": {"bandwidth": 1e8, "start": 1e-4, "hop": 5e-5}}
    spec = ClusterSpec("cpu", 2, 1 if apart else 8, int(memory), network if apart else {})
    monkeypatch.setattr(auto, "cluster", lambda ranks: msgspec.structs.replace(spec, count=ranks))


def pair(rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width), torch.randn(rows, width)


def test_operations_parameters_and_kept_bytes_are_those_of_the_module() -> None:
    rows, width, inner = 6, 8, 32
    products: list[Operation] = []

    def flops(operation: Operation) -> float:
        products.extend([operation] * (operation.kind == "product"))
        return float(operation.flops * operation.count)

    seen = module_plan._seen(Mlp(width, inner), nn.MSELoss(), ["fc1", "fc2"], pair(9, width), rows, flops)
    one = 2 * rows * width * inner
    assert [stage.forward for stage in seen] == [one, one]
    assert sum(stage.backward for stage in seen) == 3 * one, "both weight gradients, and one input gradient"
    assert sorted(operation.shape for operation in products) == sorted([
        (rows, inner, width), (rows, width, inner), (rows, inner, width), (inner, width, rows), (width, inner, rows),
    ])  # fmt: skip
    assert [stage.parameters for stage in seen] == [width * inner] * 2
    assert [stage.arriving for stage in seen] == [0, FLOAT * rows * inner]
    # The input and the activation, which relu and the second product share; the loss keeps output and target.
    assert [stage.kept for stage in seen] == [FLOAT * rows * (width + inner), FLOAT * rows * 2 * width]


def test_what_multiplies_and_is_no_plain_product_counts_by_its_flops() -> None:
    module, rows = nn.Conv2d(3, 5, 3, padding=1, bias=False), 4
    data = torch.randn(rows, 3, 8, 8), torch.randn(rows, 5, 8, 8)
    (seen,) = module_plan._seen(module, nn.MSELoss(), [], data, rows, lambda operation: float(operation.flops))
    assert seen.forward == 2 * rows * 8 * 8 * 5 * 3 * 3 * 3


@pytest.mark.parametrize(
    "name", [name for name in EXAMPLES if name != "convolutions"]
)  # whose average is a value's inverse
def test_every_example_is_seen(name: str) -> None:
    example = EXAMPLES[name]
    module = example.build()
    (seen,) = module_plan._seen(module, example.loss, [], example.data()[:5], 5, lambda operation: 1.0)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert seen.parameters == trained
    assert min(seen.forward, seen.backward, seen.kept) > 0


def test_a_small_module_is_replicated_and_a_large_one_over_a_slow_network_is_piped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster(monkeypatch)
    small, why = choose(Mlp(64, 64), 2, nn.MSELoss(), ["fc1", "fc2"], pair(8192, 64))
    assert (small.dp, small.pp) == (2, 1)
    assert "a step expected" in why
    cluster(monkeypatch, apart=True)
    large, _ = choose(Mlp(2048, 2048), 2, nn.MSELoss(), ["fc1", "fc2"], pair(64, 2048))
    assert (large.dp, large.pp) == (1, 2)
    without, why = choose(Mlp(2048, 2048), 2, nn.MSELoss(), ["fc1", "fc2"], None)
    assert without.dp == 2, "what it computes is unknown"
    assert "no batch was given" in why


def test_what_does_not_fit_is_sharded_further_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Mlp(1024, 1024)  # 8 MiB: parameters, gradients and two moments are 32 on one rank
    size = FLOAT * 2 * 1024 * 1024
    found: list[int] = []
    for share in (4.0, 2.6, 1.8, 1.01):
        cluster(monkeypatch, share * size / module_plan.UNSEEN)
        found.append(choose(module, 4, nn.MSELoss(), [], None)[0].zero)
    assert found[0] <= 1
    assert found[-2:] == [2, 3]
    assert found == sorted(found)
    cluster(monkeypatch, 0.9 * size / module_plan.UNSEEN)
    with pytest.raises(InputError, match="start more ranks, or name the layout"):
        choose(module, 4, nn.MSELoss(), [], None)


def test_a_module_that_needs_values_or_cannot_be_cut_is_planned_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, apart=True)  # where a pipeline would be taken
    layout, why = choose(Peeking(2048, 2048), 2, nn.MSELoss(), ["fc1", "fc2"], pair(64, 2048))
    assert (layout.dp, layout.pp) == (2, 1)
    assert "its operations are not known" in why

    class Backwards(Mlp):
        def forward(self, x: Any) -> Any:
            return self.fc1(torch.relu(self.fc2(x)))

    layout, _ = choose(Backwards(2048, 2048), 2, nn.MSELoss(), ["fc1", "fc2"], pair(64, 2048))
    assert layout.pp == 1, "its stages are named in another order than they are called"
