"""The attention seam: the decoder calls one function on packed queries, keys and values and knows nothing of rows or caches.

Training and evaluation attend within rows of equal length (`RowsAttention`); serving brings a paged one.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fiveply.model import flash_backward


class Attention(Protocol):
    """Causal attention over packed tokens. `window` > 0 limits it to that many tokens, the own one included."""

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor: ...


class RowsAttention:
    """Attention inside each of `rows` sequences of equal length, and inside documents where their numbers are given.

    documents_T: the document of each token (any integers, constant over a document), or None to attend over the whole row.
    dropout: rate inside attention, drawn from torch's own generator: one rank only. blocked_backward: by `flash_backward`.
    """

    def __init__(
        self, rows: int, documents_T: Tensor | None = None, dropout: float = 0.0, *, blocked_backward: bool = False
    ) -> None:
        self.rows, self.dropout, self.blocked_backward = rows, dropout, blocked_backward
        self.documents_BS = None if documents_T is None else documents_T.view(rows, -1)
        self._masks: dict[int, Tensor | None] = {}

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor:
        q_BHSd, k_BKSd, v_BKSd = (x.view(self.rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q_THd, k_TKd, v_TKd))
        mask = self._mask(q_BHSd.shape[2], window, q_THd.device)
        if self.blocked_backward and torch.is_grad_enabled() and not self.dropout:
            out_BHSd = flash_backward.attention(q_BHSd, k_BKSd, v_BKSd, mask)
        else:
            out_BHSd = F.scaled_dot_product_attention(
                q_BHSd,
                k_BKSd,
                v_BKSd,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=self.dropout,
                enable_gqa=q_THd.shape[1] != k_TKd.shape[1],
            )
        return out_BHSd.transpose(1, 2).reshape(q_THd.shape)

    def _mask(self, length: int, window: int, device: torch.device) -> Tensor | None:
        """None where plain causal attention says it all; else True where a token may look, made once per window."""
        if window >= length:
            window = 0
        if not window and self.documents_BS is None:
            return None
        if window not in self._masks:
            index_S = torch.arange(length, device=device)
            distance_SS = index_S[:, None] - index_S[None, :]
            mask = distance_SS >= 0
            if window:
                mask = mask & (distance_SS < window)
            if self.documents_BS is not None:
                mask = mask & (self.documents_BS[:, None, :, None] == self.documents_BS[:, None, None, :])
            self._masks[window] = mask
        return self._masks[window]
