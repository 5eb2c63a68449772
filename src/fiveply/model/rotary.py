"""Rotary positions (Su et al. 2021) with the scalings of Llama 3.1, linear interpolation and YaRN (Peng et al. 2023).

Tables are computed in float32 whatever the model's type, as `transformers` does, so that both round alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fiveply.spec.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Rotation per token of each pair of columns, (head_dim / 2,) float32, and the factor on cosine and sine."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    inverse = 1.0 / powers
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = rope.original_positions / rope.low_freq_factor, rope.original_positions / rope.high_freq_factor
        smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (1 - smooth) * inverse / rope.factor + smooth * inverse
        scaled = torch.where(wavelength > low, inverse / rope.factor, inverse)
        return torch.where((wavelength <= low) & (wavelength >= high), between, scaled), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, powers)
    return inverse, 1.0


def _yarn(rope: Rope, head_dim: int, powers: Tensor) -> tuple[Tensor, float]:
    def column(rotations: float) -> float:
        return head_dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = column(rope.beta_fast), column(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    factor = rope.attention_factor
    if factor is None:
        both = rope.mscale and rope.mscale_all_dim
        factor = scale(rope.mscale or 1.0) / scale(rope.mscale_all_dim or 1.0) if both else scale(1.0)
    # In the oracle's own order of operations: a last bit of a frequency grows with the position.
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept, float(factor)


def tables(rope: Rope, head_dim: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (T, 1, head_dim / 2) float32, for `rotate`."""
    inverse_h, factor = inverse_frequencies(rope, head_dim)
    return turned(inverse_h.to(positions_T.device, non_blocking=True), factor, positions_T)


def turned(inverse_h: Tensor, factor: float, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """`tables` of frequencies that are on the device already."""
    angles_T1h = positions_T[:, None, None].float() * inverse_h
    return angles_T1h.cos() * factor, angles_T1h.sin() * factor


def rotate(x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    """Rotate the pairs (column i, column i + head_dim / 2) of every head."""
    if torch.compiler.is_compiling():
        first, second = x_THd.chunk(2, dim=-1)
        return torch.cat((first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h), dim=-1)
    return _Rotation.apply(x_THd, cos_T1h, sin_T1h)  # type: ignore[no-any-return]


class _Rotation(torch.autograd.Function):
    """In three passes over memory, where the composed one takes seven forward and more backward."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1h, sin_T1h)
        return _rotated(x_THd, cos_T1h, sin_T1h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        cos_T1h, sin_T1h = ctx.saved_tensors
        return _rotated(grads[0], cos_T1h, -sin_T1h), None, None


def _rotated(x_THd: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    x_TH2h = x_THd.unflatten(-1, (2, -1))
    out_TH2h = x_TH2h * cos_T1h[:, :, None]
    out_TH2h[:, :, 0].addcmul_(x_TH2h[:, :, 1], sin_T1h, value=-1)
    out_TH2h[:, :, 1].addcmul_(x_TH2h[:, :, 0], sin_T1h)
    return out_TH2h.flatten(2)
