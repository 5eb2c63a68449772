"""The paged key-value cache of one rank, behind the decoder's attention seam.

Notable: a step's tokens, prompts and decoding mixed, attend in one call a layer. On CPUs that call is compiled code
(`paged_attention.hpp`), which reads the cache where it lies. Elsewhere, and where there is no compiler, `_gathered` does the
same with torch's own operations: right everywhere, and slower, since it copies what it reads.

It knows blocks by number and requests by the tables that the driver extends; who holds a block is `serve/kv_blocks.py`'s.

Shape suffixes: T packed tokens, H query heads, K key-value heads, d head size, P head size padded to whole vectors, N blocks,
B tokens of a block, R sequences, S cached positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiveply.engine import kernels
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
        place: Any = {"dtype": dtype, "device": device}
        self.keys_NKdB = {layer: torch.empty(blocks, kv_heads, head_dim, BLOCK, **place) for layer in layers}
        self.values_NKBP = {layer: torch.empty(blocks, kv_heads, BLOCK, self.padded, **place) for layer in layers}
        self._kernel = kernels.function("attend", dtype, device) if compiled_kernels else None
        self._device = device
        self._spans: list[Span] = []

    @staticmethod
    def bytes_per_block(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return layers * kv_heads * BLOCK * (head_dim + padded(head_dim)) * dtype.itemsize

    def begin(self, spans: Sequence[Span]) -> Tensor:
        """Announce the coming forward's tokens, span after span. Returns their positions (T,)."""
        self._spans = list(spans)
        starts = np.array([span.start for span in spans])
        counts = np.array([span.count for span in spans])
        rows_T = np.repeat(np.arange(len(spans)), counts)
        firsts = np.cumsum(counts) - counts
        positions_T = np.arange(counts.sum()) - np.repeat(firsts - starts, counts)
        self._tables = np.zeros((len(spans), max(len(span.table) for span in spans)), np.int32)
        for row, span in enumerate(spans):
            self._tables[row, : len(span.table)] = span.table
        self._slots_T = self._tables[rows_T, positions_T // BLOCK].astype(np.int64) * BLOCK + positions_T % BLOCK
        if self._kernel is None:
            self._slots_tensor_T = torch.from_numpy(self._slots_T).to(self._device)
        else:
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
        return torch.from_numpy(positions_T).to(self._device)

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor:
        keys_NKdB, values_NKBP = self.keys_NKdB[layer], self.values_NKBP[layer]
        if self._kernel is None:
            return self._gathered(q_THd, k_TKd, v_TKd, keys_NKdB, values_NKBP, window)
        q_THd, k_TKd, v_TKd = (_heads_together(x) for x in (q_THd, k_TKd, v_TKd))
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        shape = kernels.Shape(self.heads, self.kv_heads, self.head_dim, self.padded, window, q_THd.stride(0),
                              k_TKd.stride(0), v_TKd.stride(0))  # fmt: skip
        self._kernel(
            shape, self.step, q_THd.data_ptr(), k_TKd.data_ptr(), v_TKd.data_ptr(), out_THd.data_ptr(),
            keys_NKdB.data_ptr(), values_NKBP.data_ptr(),
        )  # fmt: skip
        return out_THd

    def _gathered(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys_NKdB: Tensor, values_NKBP: Tensor, window: int
    ) -> Tensor:
        """With torch's own operations: sequences that bring equally many tokens (all that decode) attend together."""
        blocks_T, places_T = self._slots_tensor_T // BLOCK, self._slots_tensor_T % BLOCK
        keys_NKdB[blocks_T, :, :, places_T] = k_TKd
        values_NKBP[blocks_T, :, places_T, : self.head_dim] = v_TKd
        out_THd = torch.empty_like(q_THd)
        firsts = np.cumsum([0, *(span.count for span in self._spans)])
        by_count: dict[int, list[int]] = {}
        for row, span in enumerate(self._spans):
            by_count.setdefault(span.count, []).append(row)
        for count, rows in by_count.items():
            ends_R = torch.tensor([self._spans[row].start + count for row in rows], device=self._device)
            longest = int(ends_R.max())
            tables_RN = torch.from_numpy(self._tables[rows, : -(-longest // BLOCK)]).to(self._device).long()
            keys_RKSd = keys_NKdB[tables_RN].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :longest]
            values_RKSd = values_NKBP[tables_RN].transpose(1, 2).flatten(2, 3)[:, :, :longest, : self.head_dim]
            own_RC = ends_R[:, None] - count + torch.arange(count, device=self._device)
            index_S = torch.arange(longest, device=self._device)
            mask_RCS = index_S <= own_RC[..., None]
            if window:
                mask_RCS &= index_S > own_RC[..., None] - window
            beyond_RS = index_S >= ends_R[:, None]  # never written: whatever stands there must not reach a product
            values_RKSd = values_RKSd.masked_fill(beyond_RS[:, None, :, None], 0)
            keys_RKSd = keys_RKSd.masked_fill(beyond_RS[:, None, :, None], 0)
            index_RC = torch.from_numpy(firsts[rows])[:, None].to(self._device) + torch.arange(
                count, device=self._device
            )
            out_RHCd = F.scaled_dot_product_attention(
                q_THd[index_RC].transpose(1, 2), keys_RKSd, values_RKSd, attn_mask=mask_RCS[:, None],
                enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
            out_THd[index_RC] = out_RHCd.transpose(1, 2)
        return out_THd


def padded(head_dim: int) -> int:
    """To whole vectors."""
    return -(-head_dim // BLOCK) * BLOCK


def _heads_together(x_THd: Tensor) -> Tensor:
    """Heads of a token side by side, as compiled code expects; tokens may be further apart (parts of a fused product)."""
    return x_THd if x_THd.stride(2) == 1 and x_THd.stride(1) == x_THd.shape[2] else x_THd.contiguous()
