"""Activation recomputation: keep a block's input alone (`full`) or everything but attention's insides (`selective`).

Chen et al. 2016; selective after Korthikanti et al. 2022. Forward runs again in backward, collectives included; keyed
dropout draws the same mask again, so no random state is kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fiveply.model.attention import Attention
from fiveply.spec.layout import Recompute


class RecomputedAttention:
    """An attention that is computed again in backward."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, layer: int, window: int) -> Tensor:
        return _again(self.attention, q_THd, k_TKd, v_TKd, layer=layer, window=window)


def recomputed_block(forward: Any, kind: Recompute) -> Any:
    """The forward of a block with `kind` of recomputation, in training only."""
    if kind == "full":

        def full(*args: Any, **kwargs: Any) -> Tensor:
            return _again(forward, *args, **kwargs)

        return full
    if kind == "selective":

        def selective(x_TD: Tensor, tables: Any, attention: Attention, dropout: Any = None) -> Tensor:
            return forward(x_TD, tables, RecomputedAttention(attention), dropout)

        return selective
    return forward


def _again(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
