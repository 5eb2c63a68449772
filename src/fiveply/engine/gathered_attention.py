"""Attention over a paged cache with torch's own operations: right on every device, and slower than compiled code, since the keys
and values that a sequence looks at are copied to lie side by side.

Notable: where they lie is worked out once a step, for all layers, and nothing waits for the device. `begin_decoding` does it from
tensors on the device alone, so that a forward can be recorded and replayed (`graphs.py`). torch's `attention.varlen` reads paged
caches since 2.13, but on GPUs alone, and 2.11 has to do: it is not used.

It knows blocks by number, and no requests.

Shape suffixes: T packed tokens, H query heads, K key-value heads, d head size, N blocks of a table, B tokens of a block, X slots
(tokens of all blocks), R sequences, C tokens that each brings, S cached positions, Q queries of a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiveply.engine.inputs import sent
from fiveply.serve.messages import BLOCK

GATHERED = 1 << 28  # numbers of keys that are copied at once
Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]


class GatheredAttention:
    """An `Attention`, and its cache. Before each forward one of the two `begin`s tells whose tokens it brings."""

    def __init__(
        self, layers: Sequence[int], heads: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._kv_heads, self._shared, self.device = kv_heads, heads // kv_heads, device
        self._numbers = kv_heads * head_dim
        self.spare = blocks
        """One block more, which no request has."""
        shape = (blocks + 1) * BLOCK, kv_heads, head_dim
        self.keys_XKd = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}
        self.values_XKd = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}

    def begin(
        self, starts: Integers, counts: Integers, positions_T: Integers, slots_T: Integers, tables: Integers
    ) -> Tensor:
        """Sequences that bring equally many tokens (all that decode) attend together, unless their copies would be too large.

        `starts`, `counts`, `tables`: by sequence. Returns the positions on the device.
        """
        firsts, wanted = np.cumsum(counts) - counts, [positions_T, slots_T]
        shapes: list[tuple[int, int, int]] = []
        for count in sorted(set(counts.tolist())):
            alike = np.flatnonzero(counts == count)
            blocks = -(-int(starts[alike].max() + count) // BLOCK)
            together = max(1, GATHERED // (blocks * BLOCK * self._numbers))
            for rows in np.split(alike, range(together, len(alike), together)):
                wanted += [firsts[rows], starts[rows], tables[rows, :blocks].ravel()]
                shapes.append((len(rows), count, blocks))
        whole = sent(np.concatenate(wanted, dtype=np.int64), self.device)
        positions, self._slots, *parts = whole.split([len(part) for part in wanted])
        self._groups: list[_Group] = []
        for index, (rows, count, blocks) in enumerate(shapes):
            firsts_R, starts_R, table = parts[3 * index : 3 * index + 3]
            index_C = torch.arange(count, device=self.device)
            index_RC = firsts_R[:, None] + index_C if len(shapes) > 1 else None
            self._groups.append(_Group(index_RC, starts_R[:, None] + index_C, table.view(rows, blocks), self._shared))
        return positions

    def begin_decoding(self, positions_R: Tensor, tables_RN: Tensor) -> None:
        """The same for one token of each sequence, from tensors on the device: nothing but their shapes decides what is done.

        A row without a sequence has position 0 and the spare block.
        """
        self._slots = _slots(tables_RN, positions_R[:, None])[:, 0]
        self._groups = [_Group(None, positions_R[:, None], tables_RN, self._shared)]

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor:
        keys_XKd, values_XKd = self.keys_XKd[layer], self.values_XKd[layer]
        keys_XKd[self._slots] = k_TKd
        values_XKd[self._slots] = v_TKd
        out_THd = torch.empty_like(q_THd)
        for group in self._groups:
            if group.index_RC is None:
                q_RCHd = q_THd.unflatten(0, (group.rows, -1))
                return self._attended(group, q_RCHd, keys_XKd, values_XKd, window).flatten(0, 1)
            out_THd[group.index_RC] = self._attended(group, q_THd[group.index_RC], keys_XKd, values_XKd, window)
        return out_THd

    def _attended(self, group: _Group, q_RCHd: Tensor, keys_XKd: Tensor, values_XKd: Tensor, window: int) -> Tensor:
        """Queries of the heads that share a key-value head stand as more queries of one head: no key is repeated for them."""
        keys_RKSd, values_RKSd = (
            F.embedding(group.slots_RS, x_XKd.flatten(1)).unflatten(2, (self._kv_heads, -1)).transpose(1, 2)
            for x_XKd in (keys_XKd, values_XKd)
        )
        q_RKQd = q_RCHd.unflatten(2, (self._kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out_RKQd = F.scaled_dot_product_attention(q_RKQd, keys_RKSd, values_RKSd, attn_mask=group.mask(window))
        return out_RKQd.unflatten(2, (-1, q_RCHd.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Group:
    """Sequences that bring equally many tokens: where these stand among the packed ones (None: all of them, in order), and the slots
    of what they attend to. `shared`: query heads of a key-value head."""

    def __init__(self, index_RC: Tensor | None, positions_RC: Tensor, tables_RN: Tensor, shared: int) -> None:
        self.index_RC, self.rows = index_RC, len(tables_RN)
        self._positions_RC, self._shared = positions_RC, shared
        self._index_S = torch.arange(tables_RN.shape[1] * BLOCK, device=tables_RN.device)
        # Beyond a sequence's end its last token stands in: what was never written, or is another's, must not reach a product.
        self.slots_RS = _slots(tables_RN, torch.minimum(self._index_S, positions_RC[:, -1:]))
        self._masks: dict[int, Tensor] = {}

    def mask(self, window: int) -> Tensor:
        """(R, 1, Q, S): True where a query may look."""
        if window not in self._masks:
            own_RC1 = self._positions_RC[..., None]
            mask_RCS = self._index_S <= own_RC1
            if window:
                mask_RCS &= self._index_S > own_RC1 - window
            self._masks[window] = mask_RCS.repeat(1, self._shared, 1)[:, None]
        return self._masks[window]


def _slots(tables_RN: Tensor, positions_RS: Tensor) -> Tensor:
    """Of cached positions."""
    return tables_RN.gather(1, positions_RS // BLOCK) * BLOCK + positions_RS % BLOCK
