"""Activation recomputation: keep a block's input alone (`full`) or everything but attention's insides (`selective`).

Chen et al. 2016; selective after Korthikanti et al. 2022. Forward runs again in backward, collectives included; keyed
dropout draws the same mask again, so no random state is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fiveply.model.attention import Attention
from fiveply.spec.layout import Recompute


def recomputed_block(forward: Any, kind: Recompute) -> Any:
    """The forward of a block with `kind` of recomputation, in training only."""
    if kind == "full":
        return partial(_again, forward)
    if kind == "selective":

        def selective(x_TD: Tensor, tables: Any, attention: Attention, dropout: Any = None) -> Tensor:
            return forward(x_TD, tables, partial(_again, attention), dropout)

        return selective
    return forward


def _again(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
