"""The paged key-value cache of one rank, behind the decoder's attention seam.

Notable: a step's tokens, prompts and decoding mixed, attend in one call a layer. On CPUs that call is compiled code
(`paged_attention.hpp`), which reads the cache where it lies. Elsewhere, and where there is no compiler, torch's own operations
do the same (`gathered_attention.py`).

It knows blocks by number and requests by the tables that the driver extends; who holds a block is `serve/kv_blocks.py`'s.

Shape suffixes: T packed tokens, H query heads, K key-value heads, d head size, P head size padded to whole vectors, N blocks,
B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiveply.engine import kernels
from fiveply.engine.gathered_attention import GatheredAttention
from fiveply.engine.memory import Memory
from fiveply.serve.messages import BLOCK

_ROWS = 32  # queries of one key-value head that a tile holds: they read its keys together


class Span(NamedTuple):
    """The tokens that one sequence brings to a step: `count` from position `start` on, and its blocks."""

    start: int
    count: int
    table: Sequence[int]


class PagedAttention:
    """An `Attention` over the cache. Before each forward, `begin` tells whose tokens it brings."""

    def __init__(
        self, layers: Sequence[int], heads: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype,
        device: torch.device, *, compiled_kernels: bool = True,
    ) -> None:  # fmt: skip
        """`heads`, `kv_heads`: this rank's own. Keys of a block stand column by column, values token by token."""
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.padded = padded(head_dim)
        self._kernel: Any = kernels.function("attend", dtype, device) if compiled_kernels else None
        self.gathered: GatheredAttention | None = None
        """What computes, and has the cache, where there is no kernel."""
        if self._kernel is None:
            self.gathered = GatheredAttention(layers, heads, kv_heads, head_dim, blocks, dtype, device)
            return
        empty = Memory(device).empty
        self.keys_NKdB = {layer: empty((blocks, kv_heads, head_dim, BLOCK), dtype) for layer in layers}
        self.values_NKBP = {layer: empty((blocks, kv_heads, BLOCK, self.padded), dtype) for layer in layers}

    @staticmethod
    def bytes_per_block(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return layers * kv_heads * BLOCK * (head_dim + padded(head_dim)) * dtype.itemsize

    def begin(self, spans: Sequence[Span]) -> Tensor:
        """Announce the coming forward's tokens, span after span. Returns their positions (T,)."""
        starts = np.array([span.start for span in spans])
        counts = np.array([span.count for span in spans])
        rows_T = np.repeat(np.arange(len(spans)), counts)
        firsts = np.cumsum(counts) - counts
        positions_T = np.arange(counts.sum()) - np.repeat(firsts - starts, counts)
        self._tables = np.zeros((len(spans), max(len(span.table) for span in spans)), np.int32)
        for row, span in enumerate(spans):
            self._tables[row, : len(span.table)] = span.table
        self._slots_T = self._tables[rows_T, positions_T // BLOCK].astype(np.int64) * BLOCK + positions_T % BLOCK
        if self.gathered is not None:
            return self.gathered.begin(starts, counts, positions_T, self._slots_T, self._tables)
        size = max(1, _ROWS // (self.heads // self.kv_heads))
        tiles = [
            (first + done, min(size, span.count - done), span.start + done, row)
            for row, (first, span) in enumerate(zip(firsts.tolist(), spans, strict=True))
            for done in range(0, span.count, size)
        ]
        self._tiles = np.array(tiles, np.int64)
        self.step = kernels.Step(
            len(self._slots_T), self._tables.shape[1], len(tiles), self._slots_T.ctypes.data,
            self._tables.ctypes.data, self._tiles.ctypes.data,
        )  # fmt: skip
        return torch.from_numpy(positions_T)

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor:
        if self.gathered is not None:
            return self.gathered(q_THd, k_TKd, v_TKd, layer=layer, window=window)
        q_THd, k_TKd, v_TKd = (_heads_together(x) for x in (q_THd, k_TKd, v_TKd))
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        shape = kernels.Shape(self.heads, self.kv_heads, self.head_dim, self.padded, window, q_THd.stride(0),
                              k_TKd.stride(0), v_TKd.stride(0))  # fmt: skip
        self._kernel(
            shape, self.step, q_THd.data_ptr(), k_TKd.data_ptr(), v_TKd.data_ptr(), out_THd.data_ptr(),
            self.keys_NKdB[layer].data_ptr(), self.values_NKBP[layer].data_ptr(),
        )  # fmt: skip
        return out_THd


def padded(head_dim: int) -> int:
    """To whole vectors."""
    return -(-head_dim // BLOCK) * BLOCK


def _heads_together(x_THd: Tensor) -> Tensor:
    """Heads of a token side by side, as compiled code expects; tokens may be further apart (parts of a fused product)."""
    return x_THd if x_THd.stride(2) == 1 and x_THd.stride(1) == x_THd.shape[2] else x_THd.contiguous()
