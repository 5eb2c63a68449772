"""Dropout whose mask depends on (seed, step, site, global token, column) alone, so that every layout draws the same one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class KeyedDropout:
    """Dropout of one micro-batch: `tokens_T` are the global indices of the rows that this rank holds in the residual stream."""

    def __init__(self, rate: float, seed: int, step: int, tokens_T: Tensor) -> None:
        self.rate, self.seed, self.step, self.tokens_T = rate, seed, step, tokens_T

    def __call__(self, x_TD: Tensor, site: str, columns_D: Tensor | None = None) -> Tensor:
        """Zero a share `rate` of x_TD and scale the rest by 1 / (1 - rate). `site` names the place in the model,
        `columns_D` the global columns where a rank holds only some."""
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{site}".encode(), digest_size=8).digest()
        low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        columns_D = torch.arange(x_TD.shape[1], device=x_TD.device) if columns_D is None else columns_D
        # Two rounds of a 32-bit finaliser (murmur3's) in 64-bit integers, the upper half masked off after each product.
        rows_T1 = _mix((self.tokens_T[:, None] & 0xFFFFFFFF) ^ low) ^ (self.tokens_T[:, None] >> 32)
        bits_TD = _mix((rows_T1 * 0x9E3779B1 + columns_D + high) & 0xFFFFFFFF)
        keep_TD = bits_TD >= int(self.rate * 2**32)
        return x_TD * (keep_TD.to(x_TD.dtype) / (1 - self.rate))


def _mix(bits: Tensor) -> Tensor:
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
