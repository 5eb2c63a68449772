"""Weights in 4 bits: products of matrices that keep a whole number from 0 to 15 for each weight, and two numbers for each group of columns.

Notable: a weight is (number - 8) * scale + zero, where a group's 16 levels go from its least weight to its greatest; scale and zero
are rounded to the model's type before numbers are chosen. A group lies on one rank at every layout that
`legality.check_groups` admits, so all of them multiply by the same numbers. bfloat16 is multiplied by torch's own operators for GPUs, or
their twins on CPUs. Other types widen some rows at a time.

It knows matrices, not layers.

Shape suffixes: T tokens, I columns of the input, O rows of a matrix, G groups of columns, g columns of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fiveply.engine.products import FusedProducts
from fiveply.spec.legality import GROUP
from fiveply.world.collectives import Axis

ROWS = 16  # matrices have a multiple of it for the operators
WIDENED = 1 << 24  # weights that are whole at once where there is no operator


def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (O, I) and what they stand for, (G, O, 2) of scale and zero in the weight's type."""
    exact = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OGg = weight_OI.to(exact).unflatten(1, (-1, GROUP))
    least_OG, greatest_OG = weight_OGg.aminmax(dim=2)
    scale_OG = ((greatest_OG - least_OG) / 15).clamp_(min=torch.finfo(torch.float32).tiny)
    pair_OG2 = torch.stack((scale_OG, least_OG + 8 * scale_OG), 2).to(weight_OI.dtype)
    scale_OG1, zero_OG1 = pair_OG2.to(exact).split(1, 2)
    numbers_OGg = ((weight_OGg - zero_OG1) / scale_OG1).round_().add_(8).clamp_(0, 15)
    return numbers_OGg.to(torch.int32).flatten(1), pair_OG2.transpose(0, 1).contiguous()


def widened(numbers_OI: Tensor, pairs_GO2: Tensor) -> Tensor:
    """The weights that they stand for, in the pairs' type."""
    scale_OG1, zero_OG1 = pairs_GO2.transpose(0, 1).split(1, 2)
    return ((numbers_OI.unflatten(1, (-1, GROUP)) - 8) * scale_OG1 + zero_OG1).flatten(1)


class Int4Products(FusedProducts):
    """Products with matrices that it has adopted and quantised."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = dtype  # there are no blocks of this kind
        self._operators, self._on_cpu = dtype == torch.bfloat16, device.type == "cpu"
        self._whole_of = {}
        self._pairs_of: dict[int, Tensor] = {}  # by the identity of the packed numbers

    def _kept(self, whole_OI: Tensor, axis: Axis | None) -> tuple[Tensor, bool]:
        numbers_OI, pairs_GO2 = quantize(whole_OI)
        packed = self._packed(numbers_OI)
        self._pairs_of[id(packed)] = (
            F.pad(pairs_GO2, (0, 0, 0, -len(numbers_OI) % ROWS)) if self._operators else pairs_GO2
        )
        return packed, False

    def _packed(self, numbers_OI: Tensor) -> Tensor:
        """As the operators have them; or two a byte, the first in its upper half, which is what those of GPUs are given."""
        if self._operators:
            numbers_OI = F.pad(numbers_OI, (0, 0, 0, -len(numbers_OI) % ROWS))
        if self._operators and self._on_cpu:
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers_OI, 1)
        bytes_OI = (numbers_OI[:, ::2] << 4 | numbers_OI[:, 1::2]).to(torch.uint8)
        if not self._operators:
            return bytes_OI
        tiles = next(tiles for tiles in (8, 4, 2) if numbers_OI.shape[1] % (16 * tiles) == 0)
        return torch.ops.aten._convert_weight_to_int4pack(bytes_OI, tiles)

    def _multiplied(self, x_TI: Tensor, weight_OI: Tensor, outer: int) -> Tensor:
        packed, _ = self._whole_of[id(weight_OI)]
        pairs_GO2 = self._pairs_of[id(packed)]
        if not self._operators:
            return _by_rows(x_TI, packed, pairs_GO2)
        aten = torch.ops.aten
        product = aten._weight_int4pack_mm_for_cpu if self._on_cpu else aten._weight_int4pack_mm
        return product(x_TI.contiguous(), packed, GROUP, pairs_GO2)[:, :outer]


def _by_rows(x_TI: Tensor, bytes_OI: Tensor, pairs_GO2: Tensor) -> Tensor:
    together = max(1, WIDENED // x_TI.shape[1])
    parts = zip(bytes_OI.split(together), pairs_GO2.split(together, 1), strict=True)
    return torch.cat(
        [
            F.linear(x_TI, widened(torch.stack((part >> 4, part & 15), 2).flatten(1).to(x_TI.dtype), pairs))
            for part, pairs in parts
        ],
        1,
    )
