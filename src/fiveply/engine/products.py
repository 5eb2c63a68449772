"""The matrix products of inference on a rank: no gradients, matrices of one input multiplied as one, few rows done well.

Notable: decoding multiplies a handful of rows, where what counts is how each weight is read. In float32 on CPUs up to FEW rows go
through compiled code that reads weights where they lie (`few_rows.cpp`): libraries that pack them at each call take 1.3 to 1.6
times as long from 4 rows on, and oneDNN's packed copy 1.3 times as long for one row. In bfloat16 a matrix is kept in
oneDNN's own order, packed once, which took 1.3 to 2 times off at any number of rows (`docs/dev-log.md`).

It knows matrices, not layers.

Shape suffixes: T tokens, I columns of the input, O columns of an output.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiveply.model.products import Products
from fiveply.world import compiled

FEW = 24  # rows: from there on libraries are as quick
PACKED_FOR = 16  # rows that packing is chosen for; it serves any number


@lru_cache(maxsize=1)
def few_rows() -> Any:
    """The compiled product, or why there is none."""
    library = compiled.library(Path(__file__).with_name("few_rows.cpp"), ("-fopenmp",))
    if isinstance(library, str):
        return library
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    library.few_rows.restype, library.few_rows.argtypes = None, [pointer, pointer, pointer, i64, i64, i64, i64]
    return library.few_rows


class FusedProducts(Products):
    """Products with matrices that it has adopted."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._packed = onednn and dtype == torch.bfloat16
        self._onednn = onednn and dtype in (torch.float32, torch.bfloat16)
        few = few_rows() if device.type == "cpu" and dtype == torch.float32 else "not for this type"
        self._few = None if isinstance(few, str) else few
        self._whole_of: dict[int, Tensor] = {}  # by the identity of the first part that stands for it

    def adopt(self, parts_OI: Sequence[Tensor]) -> list[nn.Parameter]:
        """Parameters of the same shapes that stand for the matrices from now on: they hold no numbers of their own."""
        whole_OI = torch.cat(list(parts_OI)) if len(parts_OI) > 1 else parts_OI[0].detach().contiguous()
        stands = [nn.Parameter(part.new_empty(1, 1).expand(part.shape), requires_grad=False) for part in parts_OI]
        if self._packed:
            whole_OI = torch.ops.mkldnn._reorder_linear_weight(whole_OI, PACKED_FOR)
        self._whole_of[id(stands[0])] = whole_OI
        return stands

    def linears(self, x_TI: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`weights_OI`: all that were adopted together."""
        y_TO = self.forward(x_TI, weights_OI[0])
        return y_TO.split([weight.shape[0] for weight in weights_OI], -1) if len(weights_OI) > 1 else (y_TO,)

    def forward(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        whole_OI = self._whole_of[id(weight_OI)]
        if self._few is not None and x_TI.shape[0] <= FEW:
            x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
            (rows, inner), outer = x_TI.shape, whole_OI.shape[0]
            y_TO = x_TI.new_empty(rows, outer)
            self._few(x_TI.data_ptr(), whole_OI.data_ptr(), y_TO.data_ptr(), rows, inner, outer, x_TI.stride(0))
            return y_TO
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(x_TI, whole_OI, None, "none", [], "")
        return F.linear(x_TI, whole_OI)
