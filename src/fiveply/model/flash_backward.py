"""Causal attention whose backward pass is plain matrix products over blocks of queries: for 16-bit types on CPUs.

Notable: torch's CPU flash attention is quick forward, and in bfloat16 slow backward where the processor has no tiles for
16-bit products (61 ms where this takes 22: 16 rows of 256 tokens, 6 heads of 64, two cores; `docs/dev-log.md`). Like it,
this keeps the output and each query's log-sum alone, forms the weights again block by block in float32, and multiplies in
16 bits (Dao et al. 2022).

Shape suffixes: B rows, K key-value heads, G query heads of each, H = K x G, S tokens, d head size, Q queries of a block,
P keys up to its end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Queries of a block: a smaller one skips more of what causality hides, in smaller products."""


def attention(q_BHSd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over earlier tokens and the own one. `mask` (S, S) or (B, 1, S, S), True where a token may look, is causal."""
    return _Attention.apply(q_BHSd, k_BKSd, v_BKSd, mask)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Tensor | None) -> Tensor:
        groups = q_BHSd.shape[1] // k_BKSd.shape[1]
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q_BHSd.dtype).masked_fill_(~mask, -torch.inf)
        out_BHSd, log_sum_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHSd,
            k_BKSd.repeat_interleave(groups, 1),
            v_BKSd.repeat_interleave(groups, 1),
            is_causal=mask is None,
            attn_mask=bias,
        )
        ctx.save_for_backward(q_BHSd, k_BKSd, v_BKSd, out_BHSd, log_sum_BHS, mask)
        return out_BHSd

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q_BHSd, k_BKSd, v_BKSd, out_BHSd, log_sum_BHS, mask = ctx.saved_tensors
        rows, heads, length, size = q_BHSd.shape
        groups = heads // k_BKSd.shape[1]

        def grouped(x: Tensor) -> Tensor:
            """(B, H, S, ...) as (B x K, G, S, ...)."""
            return x.reshape(-1, groups, *x.shape[2:])

        q, out, grad = grouped(q_BHSd), grouped(out_BHSd), grouped(grads[0])
        k, v = k_BKSd.reshape(-1, length, size), v_BKSd.reshape(-1, length, size)
        log_sum = grouped(log_sum_BHS)
        along = (grad.float() * out).sum(-1, keepdim=True)
        q_scaled, k_exact = q.float() / math.sqrt(size), k.float()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k_exact), torch.zeros_like(k_exact)
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            block = (slice(None), slice(None), slice(start, end))

            weights = q_scaled[block].flatten(1, 2) @ k_exact[:, :end].transpose(1, 2)
            weights = weights.view(-1, groups, end - start, end).sub_(log_sum[block][..., None])
            if mask is None:
                hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
                weights[..., start:].masked_fill_(hidden, -torch.inf)
            else:
                seen = mask[..., start:end, :end]
                weights.view(rows, heads, end - start, end).masked_fill_(~seen, -torch.inf)
            weights.exp_()
            grad_block = grad[block].flatten(1, 2)
            grad_weights = (grad_block @ v[:, :end].transpose(1, 2)).view(weights.shape)
            grad_v[:, :end] += weights.flatten(1, 2).to(v.dtype).transpose(1, 2) @ grad_block
            grad_scores = weights.mul_(grad_weights - along[block]).flatten(1, 2).to(q.dtype)
            grad_q[block] = (grad_scores @ k[:, :end]).view(*grad_q.shape[:2], end - start, size)
            grad_k[:, :end] += grad_scores.transpose(1, 2) @ q[block].flatten(1, 2)
        scale = 1 / math.sqrt(size)
        return (
            grad_q.mul_(scale).view(q_BHSd.shape),
            grad_k.mul_(scale).to(k.dtype).view(k_BKSd.shape),
            grad_v.to(v.dtype).view(v_BKSd.shape),
            None,
        )
