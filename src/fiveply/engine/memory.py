"""Memory that is read at every step, weights and cache: of large pages where the system has them.

Notable: a core finds the place of each page that it reads, and decoding reads every weight once a token: in pages of 2 MiB one
core read 17 to 18 GB/s where it read 14 in pages of 4 KiB (`docs/dev-log.md`). Linux gives them to those who ask (`madvise`), for whole
pages alone, so that small tensors share them.

It knows bytes, not what they are for.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_PAGE = 1 << 21
_TOGETHER = 1 << 26  # bytes that are asked for at once; none is taken before it is written to
_LINE = 64


class Memory:
    """Tensors on a CPU that are made one after another and kept for good; on other devices they are plain ones."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = -(-prod(shape) * dtype.itemsize // _LINE) * _LINE
        if self.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or not size:
            return torch.empty(*shape, dtype=dtype, device=self.device)
        if len(self._left) < size:
            self._left = _pages(max(size, _TOGETHER))
        own, self._left = self._left[:size], self._left[size:]
        return own[: prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def _pages(size: int) -> Tensor:
    block = mmap.mmap(-1, -(-size // _PAGE) * _PAGE + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _PAGE :]
