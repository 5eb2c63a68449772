"""Layers of a user's own module that must know the split: batch norm over all replicas, and dropout by key.

An object keeps its identity, parameters, buffers and hooks: only its class changes, so whatever refers to it keeps doing so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode, resolve_name

from fiveply.model.dropout import KeyedDropout
from fiveply.spec.errors import InputError
from fiveply.spec.placement import part
from fiveply.world.collectives import Axis, sum_over

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Now:
    """Which rows are in the module: what dropout and batch norm ask. One a job and rank, set before each forward."""

    seed: int
    step: int = 0
    first: int = 0
    """Index of the first row in the global batch."""
    rows: int = 1
    real: bool = True
    """False for a stand-in row that keeps a rank without rows in step with the others."""
    share: float = 1.0
    """What this rank's gradients are multiplied by after backward."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often each dropout was called in this forward: a layer called twice draws two masks."""


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of the global batch; replicas may hold unequal numbers of rows."""

    now: Now
    axis: Axis

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes rows and channels first, got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        sums, real = x.sum(dims), float(self.now.real)
        here = torch.cat((sums * real, sums.new_tensor([real * x.numel() / sums.numel()])))
        totals = sum_over(here, self.axis, self.now.share)
        count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        # Two passes, because a mean of squares less a square of the mean cancels.
        centred = x - mean.view(shape)
        variance = sum_over(centred.square().sum(dims) * real, self.axis, self.now.share) / count
        if self.training and self.track_running_stats:
            self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class KeyedDropoutLayer(nn.Dropout):
    """Dropout whose mask depends on (seed, step, site, global row, element) alone, as the decoder's."""

    now: Now
    site: str
    channels: bool
    """Drop whole channels, as nn.Dropout1d, 2d and 3d do."""
    axis: Axis | None
    """Tensor ranks over which the last dimension is split here, of `columns` in all."""
    columns: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0
        now = self.now
        if input.shape[0] % now.rows:
            raise InputError(
                f"sees a tensor of shape {tuple(input.shape)} for {now.rows} rows, so its masks can't be keyed by row",
                where="parallelize", key=self.site, fix="keep rows first where dropout stands",
            )  # fmt: skip
        calls = now.calls[self.site] = now.calls.get(self.site, -1) + 1
        several = input.shape[0] // now.rows  # a tensor may hold several entries a row, as (rows x time, features)
        rows_R = torch.arange(input.shape[0], device=input.device) + now.first * several
        dropout = KeyedDropout(self.p, now.seed, now.step, rows_R)
        site = f"{self.site}/{calls}"
        if self.channels:
            mask = dropout(input.new_ones(input.shape[:2]), site)
            return input * mask.view(*input.shape[:2], *[1] * (input.dim() - 2))
        return dropout(input.reshape(input.shape[0], -1), site, self._columns(input)).view(input.shape)

    def _columns(self, x: Tensor) -> Tensor | None:
        if self.axis is None:
            return None
        first, mine = part(self.columns, self.axis.size, self.axis.index)
        before = torch.arange(x[0].numel() // mine, device=x.device) * self.columns
        return (before[:, None] + torch.arange(first, first + mine, device=x.device)).flatten()


def key_layers(module: nn.Module, now: Now, dp: Axis | None, *, micro_batches: bool, strict: bool) -> None:
    """Synchronise the batch norms of `module` over `dp` and key its dropouts.

    `micro_batches`: the rows of a replica may pass in several parts. Raises InputError for what can be neither, unless not
    `strict`: then it is left as it is, to be found by comparison.
    """
    for name, layer in module.named_modules():
        if type(layer) in DROPOUTS:
            channels = type(layer) is not nn.Dropout
            layer.__class__ = KeyedDropoutLayer
            vars(layer).update(now=now, site=name, channels=channels, axis=None, columns=0)
        elif type(layer) in BATCH_NORMS and not micro_batches:
            if dp is not None:
                layer.__class__ = SynchronisedBatchNorm
                vars(layer).update(now=now, axis=dp)
        elif strict and (reason := _refusal(layer, dp, micro_batches)):
            problem, fix = reason
            raise InputError(f"{type(layer).__name__} {problem}", where="parallelize", key=name, fix=fix)


def _refusal(layer: nn.Module, dp: Axis | None, micro_batches: bool) -> tuple[str, str] | None:
    norm = "use GroupNorm or LayerNorm"
    if isinstance(layer, _BatchNorm) and micro_batches:
        return (
            "normalises each micro-batch by itself, so it would differ from one process",
            f"leave pp and micro_batch out, or {norm}",
        )
    if isinstance(layer, _BatchNorm) and dp is not None:
        return "is no batch norm of torch's own, so it can't be synchronised", f"use nn.BatchNorm2d, or {norm}"
    if isinstance(layer, _NormBase) and layer.track_running_stats and (dp is not None or micro_batches):
        return "keeps running statistics of this rank's rows alone", f"set track_running_stats=False, or {norm}"
    return None


class Watch(TorchFunctionMode):
    """Finds in a forward what would silently differ by layout: random numbers without a key (functional dropout, dropout
    inside nn.LSTM or attention), and parameters that are used while they are not gathered."""

    def __init__(self, released: Any, device: torch.device) -> None:
        """`released(tensor)`: the name of a parameter that has no values now, else ""."""
        super().__init__()
        self.released, self.device = released, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if not name.endswith("__get__"):
            for x in args:
                if isinstance(x, nn.Parameter) and (parameter := self.released(x)):
                    raise InputError(
                        f"{name} uses it outside its own block's forward, where zero=3 has freed it", where="parallelize",
                        key=parameter, fix="use zero=2, or hold the parameter in the module that uses it",
                    )  # fmt: skip
        before = self._state()
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, self._state()):
            raise InputError(
                f"{name} draws random numbers that no key holds to a row, so they would differ by layout", where="parallelize",
                key="forward", fix="use nn.Dropout modules, which are keyed, and no dropout inside recurrent or attention layers",
            )  # fmt: skip
        return result

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()
