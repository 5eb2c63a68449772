"""Weights in 8 bits: products of matrices that keep a whole number from -127 to 127 for each weight, and a scale for each row.

Notable: activations, sums, embeddings, norms, biases and cache stay as they are; numbers are widened as they are multiplied, so
no matrix has a float copy. A scale is the row's largest magnitude over 127. Where tensor ranks hold some columns of a row each,
that is taken over all of them: every layout multiplies by the same numbers. GPUs and machines without a compiler widen
some rows at a time for torch's product, which saves memory and takes longer.

It knows matrices, not layers.

Shape suffixes: T tokens, I columns of the input, O columns of an output, P panels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fiveply.engine import kernels
from fiveply.engine.memory import Memory
from fiveply.engine.products import PANEL, FusedProducts
from fiveply.world.collectives import Axis

WIDENED = 1 << 24  # numbers that are float at once where there is no kernel
SCALE_BYTES = 4  # float32, behind the whole numbers that it is for


def quantize(weight_OI: Tensor, axis: Axis | None = None) -> tuple[Tensor, Tensor]:
    """int8 (O, I) and float32 scales (O,), whose product is the nearest to the weight. `axis`: ranks with its other columns."""
    weight_OI = weight_OI.float()
    largest_O = weight_OI.abs().amax(1)
    if axis is not None:
        axis.all_reduce(largest_O, dist.ReduceOp.MAX)
    scales_O = (largest_O / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight_OI / scales_O[:, None]).round_().to(torch.int8), scales_O


class Int8Products(FusedProducts):
    """Products with matrices that it has adopted and quantised."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = torch.int8
        self._product = kernels.function("product", dtype, device, torch.int8)
        self._memory = Memory(device)
        self._whole_of = {}

    def _kept(self, whole_OI: Tensor, axis: Axis | None) -> tuple[Tensor, bool]:
        """Bytes: panels of PANEL rows, column by column, with their scales behind them; or rows with theirs."""
        numbers_OI, scales_O = quantize(whole_OI, axis)
        if self._product is None:
            return torch.cat((numbers_OI, scales_O[:, None].view(torch.int8)), 1), False
        missing = -len(scales_O) % PANEL
        numbers_PI = F.pad(numbers_OI, (0, 0, 0, missing)).unflatten(0, (-1, PANEL)).transpose(1, 2).flatten(1)
        scales_P = F.pad(scales_O, (0, missing)).view(-1, PANEL).view(torch.int8)
        kept = self._memory.empty((len(scales_P), numbers_PI.shape[1] + scales_P.shape[1]), torch.int8)
        return torch.cat((numbers_PI, scales_P), 1, out=kept), True

    def _by_torch(self, x_TI: Tensor, whole_OI: Tensor) -> Tensor:
        def product(rows_OI: Tensor) -> Tensor:
            numbers_OI, scale_O4 = rows_OI.split((rows_OI.shape[1] - SCALE_BYTES, SCALE_BYTES), 1)
            scale_O = scale_O4.clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]
            return (F.linear(x_TI, numbers_OI.to(x_TI.dtype)) * scale_O).to(x_TI.dtype)

        together = max(1, WIDENED // whole_OI.shape[1])
        return torch.cat([product(rows_OI) for rows_OI in whole_OI.split(together)], 1)
