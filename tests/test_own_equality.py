"""fiveply.verify on a user's own module: equal where it should be, and the first tensor that differs named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_models import EXAMPLES, adam
from torch import Tensor, nn
from torch.nn import functional as F

import fiveply
from fiveply.spec.errors import InputError
from fiveply.world.launch import launch

SPLIT: Any = {"tp": {"fc1": "column", "fc2": "row"}, "stages": ["fc1", "fc2"]}
BATCH = (torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 30).view(10, 3))


class Middle(nn.Module):
    """fc1, something, fc2."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.fc1, self.middle, self.fc2 = nn.Linear(6, 8), middle, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.middle(torch.relu(self.fc1(x))))


class DropoutByRank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(dist.get_rank())
        return F.dropout(x, 0.3)


class OwnBatchNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


class BackwardByRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (2 + dist.get_rank())


class WrongBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return BackwardByRank.apply(x)  # type: ignore[no-any-return]


class CountsItsCalls(nn.Module):
    """A buffer that follows this rank's rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)  # type: ignore[operator]
        return x


def averaged_twice(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) / dist.get_world_size()


def verdict(middle: Any, layout: str, loss: Any = F.mse_loss, **more: Any) -> Any:
    return fiveply.verify(lambda: Middle(middle()), BATCH, loss, layout, report=False, **SPLIT | more)


@pytest.mark.parametrize(
    "layout", ["dp=2,tp=2,pp=2", "dp=3,zero=3", "pp=2,schedule=gpipe", "tp=2", "dp=1,micro_batch=3"]
)
def test_a_sound_module_is_equal(layout: str) -> None:
    result = verdict(lambda: nn.Dropout(0.3), layout, optimizer=adam, steps=3)
    assert result
    assert result["pass"] is True
    assert result["first"] is None
    assert result["layout"] == layout
    assert max(result["max_difference"].values()) <= result["tolerance"] == 1e-9
    assert str(result).endswith("PASS")
    assert torch.get_default_dtype() == torch.float32


def test_batch_norm_and_blocks_of_ones_own_are_equal() -> None:
    assert verdict(lambda: nn.BatchNorm1d(8), "dp=3")
    stack = EXAMPLES["stack of 4"]
    batch = stack.data()[:7]
    assert fiveply.verify(
        stack.model, batch, stack.loss, "pp=2,tp=2,schedule=interleaved", tp=stack.tp, stages=stack.stages, report=False
    )


@pytest.mark.parametrize(("middle", "layout", "first"), [
    (DropoutByRank, "dp=2", "output of middle, step 1"),
    (DropoutByRank, "tp=2", "output of middle, step 1"),
    (DropoutByRank, "pp=2", "output of middle, step 1"),
    (OwnBatchNorm, "dp=2", "output of middle, step 1"),
    (lambda: nn.BatchNorm1d(8), "pp=2", "output of middle, step 1"),
    (WrongBackward, "dp=2", "gradient of fc1.weight, step 1"),
    (CountsItsCalls, "dp=2", "middle.seen, after step 2"),
])  # fmt: skip
def test_planted_faults_are_named(middle: Any, layout: str, first: str) -> None:
    result = verdict(middle, layout)
    assert not result
    assert result["first"] == first
    assert str(result).splitlines()[-2:] == [f"  first to differ: {first}", "FAIL"]


def test_a_loss_averaged_twice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("dp=2", "dp=2,pp=2"):
        assert verdict(nn.Identity, layout, loss=averaged_twice)["first"] == "loss, step 1"
    fiveply.verify(lambda: Middle(nn.Identity()), BATCH, averaged_twice, "dp=2")
    assert "first to differ: loss, step 1" in capsys.readouterr().out


def test_initial_values_by_rank_are_named() -> None:
    class ByRank(Middle):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.fc2.bias.data += dist.get_rank()

    assert fiveply.verify(ByRank, BATCH, F.mse_loss, "pp=2", report=False, **SPLIT)["first"] == "fc2.bias, as it starts"


def test_what_verify_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="0 steps compare nothing"):
        verdict(nn.Identity, "dp=2", steps=0)
    with pytest.raises(InputError, match="give what builds it: Middle"):
        fiveply.verify(Middle(nn.Identity()), BATCH, F.mse_loss, "dp=2")  # type: ignore[arg-type]

    def inside() -> str:
        with pytest.raises(InputError) as refused:
            verdict(nn.Identity, "dp=2")
        return str(refused.value)

    assert "verify starts its own ranks, and this process is one already" in launch(inside, 2, backend="gloo")


def test_verify_from_a_plain_script(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import torch, fiveply\n"
        "batch = torch.ones(5, 3), torch.ones(5, 2)\n"
        "print(bool(fiveply.verify(lambda: torch.nn.Linear(3, 2), batch, torch.nn.MSELoss(), 'dp=2,zero=3')))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-2:] == ["PASS", "True"]
