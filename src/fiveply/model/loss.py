"""Head and cross-entropy in one function, chunk by chunk, so that logits never stand whole in memory.

Gradients are formed beside the loss in the forward pass, since the loss is a plain sum over targets whose own gradient is
one number: three matrix products per chunk and no logits kept for backward. With a slice of the vocabulary (`first_row`),
the maximum and the sums over the vocabulary go through `reduce_max` and `reduce_sum`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fiveply.model.products import Products

IGNORE = -100
CHUNK_ELEMENTS = 1 << 22
"""Logits formed at a time: 16 MiB in float32."""

Reduce = Callable[[Tensor], object]
"""An in-place reduction over the ranks that hold slices of the vocabulary."""


def head_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    products: Products | None = None,
    first_row: int = 0,
    largest_slice: int = 0,
    reduce_max: Reduce | None = None,
    reduce_sum: Reduce | None = None,
) -> Tensor:
    """Sum over targets of -log softmax(hidden W^T)[target]; targets of -100 count nothing. Returns a scalar, float32 or float64.

    largest_slice: rows of the largest slice on any rank, where slices differ: all must cut the tokens into the same chunks.
    """
    chunk = max(1, CHUNK_ELEMENTS // (largest_slice or weight_VD.shape[0]))
    return _HeadLoss.apply(  # type: ignore[no-any-return]
        hidden_TD, weight_VD, targets_T, products or Products(), first_row, chunk, reduce_max, reduce_sum
    )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        products: Products,
        first_row: int,
        chunk: int,
        reduce_max: Reduce | None,
        reduce_sum: Reduce | None,
    ) -> Tensor:
        tokens, stored = hidden_TD.shape[0], weight_VD.shape[0]
        exact = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=exact, device=hidden_TD.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        for start in range(0, tokens, chunk):
            hidden_CD, targets_C = hidden_TD[start : start + chunk], targets_T[start : start + chunk]
            counts_C = targets_C != IGNORE
            index_C = targets_C - first_row
            here_C = counts_C & (index_C >= 0) & (index_C < stored)
            index_C1 = index_C.masked_fill(~here_C, 0)[:, None]

            logits_CV = products.forward(hidden_CD, weight_VD).to(exact)
            target_C = logits_CV.gather(1, index_C1).squeeze(1).masked_fill_(~here_C, 0)
            chances_CV = torch.softmax(logits_CV, -1)
            # The likeliest token's chance is 1 / sum(exp(logit - largest logit)).
            log_sum_C = logits_CV.amax(-1) - chances_CV.amax(-1).log_()
            del logits_CV
            if reduce_max is not None and reduce_sum is not None:
                slice_C, largest_C = log_sum_C, log_sum_C.clone()
                reduce_max(largest_C)
                sums_2C = torch.stack(((slice_C - largest_C).exp_(), target_C))
                reduce_sum(sums_2C)
                log_sum_C, target_C = largest_C + sums_2C[0].log(), sums_2C[1]
                chances_CV *= (slice_C - log_sum_C).exp_()[:, None]
            loss += torch.where(counts_C, log_sum_C - target_C, 0).sum()

            if grad_hidden_TD is None and grad_weight_VD is None:
                continue
            chances_CV.scatter_add_(1, index_C1, -here_C.to(exact)[:, None])
            grad_CV = chances_CV.to(hidden_TD.dtype)
            # Rows without a target are left out here, where they are narrow.
            if grad_hidden_TD is not None:
                grad_hidden_TD[start : start + chunk] = products.grad_input([grad_CV], [weight_VD]) * counts_C[:, None]
            if grad_weight_VD is not None:
                products.add_grad_weight(grad_weight_VD, grad_CV, hidden_CD * counts_C[:, None])
        ctx.grads = grad_hidden_TD, grad_weight_VD
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight = (None if x is None else x.mul_(grads[0]) for x in ctx.grads)
        ctx.grads = None
        return hidden, weight, *[None] * 6
