"""The matrix products of inference on a rank: no gradients, matrices of one input multiplied as one, few rows done well.

Notable: decoding multiplies a handful of rows, where what counts is how each weight is read. On CPUs matrices are packed once,
for compiled code that is quick at any number of rows (`products.hpp`, and `tiles.hpp` for bfloat16 on a processor with AMX).
bfloat16 matrices with an odd number of columns are left to oneDNN, and its own order of a packed matrix.

It knows matrices, not layers.

Shape suffixes: T tokens, I columns of the input, O columns of an output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiveply.engine import kernels
from fiveply.engine.memory import Memory
from fiveply.model.products import Products
from fiveply.world.collectives import Axis

PANEL = 16  # rows of a packed matrix that lie together
PACKED_FOR = 16  # rows that oneDNN's packing is chosen for; it serves any number


class FusedProducts(Products):
    """Products with matrices that it has adopted."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = dtype
        """The type of its matrices."""
        onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._product = kernels.function("product", dtype, device, dtype)
        self._pack = kernels.function("pack", dtype, device, dtype)
        self._reorders = onednn and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._onednn = self._reorders or (onednn and dtype == torch.float32)
        self._memory = Memory(device)
        self._whole_of: dict[int, tuple[Tensor, bool]] = {}  # by the identity of the first part that stands for it

    def adopt(self, parts_OI: Sequence[Tensor], axis: Axis | None = None) -> list[nn.Parameter]:
        """Parameters of the same shapes that stand for the matrices from now on: they hold no numbers of their own.

        `axis`: the ranks that hold the matrices' other columns, if there are any.
        """
        whole_OI = torch.cat(list(parts_OI)) if len(parts_OI) > 1 else parts_OI[0].detach().contiguous()
        stands = [nn.Parameter(part.new_empty(1, 1).expand(part.shape), requires_grad=False) for part in parts_OI]
        self._whole_of[id(stands[0])] = self._kept(whole_OI, axis)
        return stands

    def _kept(self, whole_OI: Tensor, axis: Axis | None) -> tuple[Tensor, bool]:
        """As it will be multiplied with, and whether that is for the compiled code."""
        outer, inner = whole_OI.shape
        if self._pack is not None and (whole_OI.dtype == torch.float32 or inner % 2 == 0):  # 16-bit numbers go in pairs
            panels = self._memory.empty((-(-outer // PANEL) * PANEL, inner), whole_OI.dtype)
            self._pack(whole_OI.data_ptr(), panels.data_ptr(), inner, outer)
            return panels, True
        return torch.ops.mkldnn._reorder_linear_weight(whole_OI, PACKED_FOR) if self._reorders else whole_OI, False

    def packed(self, weight_OI: Tensor) -> int:
        """Where the panels lie that it stands for with those adopted after it, or 0: they are not packed."""
        whole_OI, packs = self._whole_of[id(weight_OI)]
        return whole_OI.data_ptr() if packs else 0

    def linears(self, x_TI: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`weights_OI`: all that were adopted together."""
        sizes = [weight.shape[0] for weight in weights_OI]
        y_TO = self._multiplied(x_TI, weights_OI[0], sum(sizes))
        return y_TO.split(sizes, -1) if len(sizes) > 1 else (y_TO,)

    def forward(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        return self._multiplied(x_TI, weight_OI, weight_OI.shape[0])

    def _multiplied(self, x_TI: Tensor, weight_OI: Tensor, outer: int) -> Tensor:
        whole_OI, packs = self._whole_of[id(weight_OI)]
        if packs and self._product is not None:
            (rows, inner), y_TO = x_TI.shape, x_TI.new_empty(x_TI.shape[0], outer)
            x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
            self._product(x_TI.data_ptr(), whole_OI.data_ptr(), y_TO.data_ptr(), rows, inner, outer, x_TI.stride(0))
            return y_TO
        return self._by_torch(x_TI, whole_OI)

    def _by_torch(self, x_TI: Tensor, whole_OI: Tensor) -> Tensor:
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(x_TI, whole_OI, None, "none", [], "")
        return F.linear(x_TI, whole_OI)
