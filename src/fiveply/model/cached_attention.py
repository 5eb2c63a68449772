"""A contiguous key-value cache behind the attention seam: generation on one process.

Notable: sequences of different lengths are rows of one cache, and a row is never padded in the forward: a step brings any
number of new tokens per row, packed row after row. When every row brings one token (decoding), all rows attend in one call.
It knows nothing of tokens, sampling or requests, nor of pages and ranks, which serving brings.

Shape suffixes: T packed tokens, R rows, H query heads, K key-value heads, S cached positions, N new tokens of one row, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fiveply.spec.architecture import ModelSpec

SMALLEST = 128
"""Positions that a cache has room for at first; it doubles from there."""


class CachedAttention:
    """Causal attention of new tokens over all tokens of their row, cached and new; an `Attention`.

    Before each forward, `begin` says how many tokens each row brings. Rows are 0 to len(lengths) - 1.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths: list[int] = []
        """Tokens of each row that the cache holds, those of the forward under way included."""
        shape = (spec.kv_heads, SMALLEST, spec.head_dim)
        self._keys_RKSd, self._values_RKSd = (
            [torch.zeros(0, *shape, dtype=dtype, device=device) for _ in range(spec.layers)] for _ in range(2)
        )
        self._device = device
        self._counts: list[int] = []
        self._masks: dict[tuple[int, int], Tensor | None] = {}

    def add_row(self) -> None:
        """An empty row behind the others."""
        self.lengths.append(0)

    def remove_row(self, row: int) -> None:
        """Forget `row`; the last row takes its number, so that the rows stay together."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row != last:
            for cache_RKSd in (*self._keys_RKSd, *self._values_RKSd):
                cache_RKSd[row, :, :length] = cache_RKSd[last, :, :length]
        self.lengths[row] = length
        self.lengths.pop()

    def begin(self, counts: Sequence[int]) -> Tensor:
        """Announce the coming forward's tokens, `counts[row]` of each row, 0 allowed. Returns their positions (T,)."""
        positions_T = torch.cat([torch.arange(n, n + new) for n, new in zip(self.lengths, counts, strict=True)])
        self.lengths = [length + new for length, new in zip(self.lengths, counts, strict=True)]
        self._counts, self._masks = list(counts), {}
        self._grow(max(self.lengths))
        self._rows_R = torch.arange(len(counts), device=self._device)
        self._last_R = torch.tensor(self.lengths, device=self._device) - 1
        return positions_T.to(self._device)

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor:
        keys_RKSd, values_RKSd = self._keys_RKSd[layer], self._values_RKSd[layer]
        if set(self._counts) == {1}:
            keys_RKSd[self._rows_R, :, self._last_R] = k_TKd
            values_RKSd[self._rows_R, :, self._last_R] = v_TKd
            return self._one_token_each(q_THd, keys_RKSd, values_RKSd, window)
        parts, first = [], 0
        for row, new in enumerate(self._counts):
            if new:
                packed, cached = slice(first, first + new), slice(self.lengths[row] - new, self.lengths[row])
                keys_RKSd[row, :, cached] = k_TKd[packed].transpose(0, 1)
                values_RKSd[row, :, cached] = v_TKd[packed].transpose(0, 1)
                parts.append(self._one_row(q_THd[packed], keys_RKSd[row], values_RKSd[row], row, window))
                first += new
        return torch.cat(parts)

    def _one_token_each(self, q_RHd: Tensor, keys_RKSd: Tensor, values_RKSd: Tensor, window: int) -> Tensor:
        """All rows at once. The query heads of a group stand as queries of their one key head: grouped heads by torch's own
        flag took 6 times as long in bfloat16 on a CPU, and 20% less in float32, of a step's small part."""
        rows, end = len(self.lengths), max(self.lengths)
        start = max(0, min(self.lengths) - window) if window else 0
        if (window, -1) not in self._masks:
            index_S, last_R1 = torch.arange(start, end, device=self._device), self._last_R[:, None]
            mask_RS = index_S <= last_R1
            if window:
                mask_RS &= index_S > last_R1 - window
            self._masks[window, -1] = None if rows == 1 else mask_RS[:, None, None]
        grouped_RKGd = q_RHd.view(rows, keys_RKSd.shape[1], -1, q_RHd.shape[2])
        out_RKGd = F.scaled_dot_product_attention(
            grouped_RKGd,
            keys_RKSd[:rows, :, start:end],
            values_RKSd[:rows, :, start:end],
            attn_mask=self._masks[window, -1],
        )
        return out_RKGd.reshape(q_RHd.shape)

    def _one_row(self, q_NHd: Tensor, keys_KSd: Tensor, values_KSd: Tensor, row: int, window: int) -> Tensor:
        new, end = q_NHd.shape[0], self.lengths[row]
        start = max(0, end - new + 1 - window) if window else 0
        if (window, row) not in self._masks:
            mask = None  # plain causal attention, for which a kernel needs no mask
            if new < end or 0 < window < end:
                own_N1, index_S = torch.arange(end - new, end)[:, None], torch.arange(start, end)
                mask = index_S <= own_N1
                if window:
                    mask &= index_S > own_N1 - window
                mask = mask.to(self._device)
            self._masks[window, row] = mask
        mask = self._masks[window, row]
        out_1HNd = F.scaled_dot_product_attention(
            q_NHd.transpose(0, 1)[None],
            keys_KSd[None, :, start:end],
            values_KSd[None, :, start:end],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_NHd.shape[1] != keys_KSd.shape[0],
        )
        return out_1HNd[0].transpose(0, 1)

    def _grow(self, positions: int) -> None:
        """Room for all rows and `positions`, at least doubled; zeros, since a masked position still must be a number."""
        rows, _, room, _ = self._keys_RKSd[0].shape
        wanted_rows = rows if len(self.lengths) <= rows else max(len(self.lengths), 2 * rows)
        wanted_room = room if positions <= room else max(positions, 2 * room)
        if (wanted_rows, wanted_room) == (rows, room):
            return
        for caches in (self._keys_RKSd, self._values_RKSd):
            for layer, old in enumerate(caches):
                caches[layer] = old.new_zeros(wanted_rows, old.shape[1], wanted_room, old.shape[3])
                caches[layer][:rows, :, :room] = old
