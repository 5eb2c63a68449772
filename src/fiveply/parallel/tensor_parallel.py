"""Tensor and sequence parallelism: one collective at each boundary that the decoder names.

Megatron-LM's f and g (Shoeybi et al. 2019): entering a column-parallel product copies, leaving a row-parallel one sums.
Under sequence parallelism (Korthikanti et al. 2022) the residual stream is split by tokens between them, so entering gathers
and leaving reduce-scatters: the same bytes, and norms, dropout and residuals hold 1/tp of the tokens. Which slice of which
weight a rank holds is `spec/placement.py`'s table.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fiveply.model.decoder import Boundary, Decoder
from fiveply.model.loss import head_loss
from fiveply.spec.placement import part
from fiveply.world.collectives import Axis, copy_to, gather_rows, local_rows, rows_per_rank, scatter_sum_rows, sum_from


class TensorBoundary(Boundary):
    """Whole tokens everywhere, heads and columns split."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def enter(self, x_TD: Tensor) -> Tensor:
        return copy_to(x_TD, self.axis)

    def leave(self, x_TD: Tensor) -> Tensor:
        return sum_from(x_TD, self.axis)


class SequenceBoundary(TensorBoundary):
    """The residual stream split by tokens: the rows that equal parts need beyond `tokens` are padding."""

    def enter(self, x_TD: Tensor) -> Tensor:
        return gather_rows(x_TD, self.axis, self.tokens)

    def leave(self, x_TD: Tensor) -> Tensor:
        return scatter_sum_rows(x_TD, self.axis)

    def local(self, x_T: Tensor) -> Tensor:
        return local_rows(x_T, self.axis)

    @property
    def rows(self) -> int:
        return rows_per_rank(self.tokens, self.axis)


class VocabularyHead:
    """The loss of hidden states under a head whose vocabulary is split over `axis` (None: whole)."""

    def __init__(self, decoder: Decoder, axis: Axis | None) -> None:
        self.decoder, self.axis = decoder, axis
        self.first_row = part(decoder.spec.vocabulary, axis.size, axis.index)[0] if axis else 0

    def __call__(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Sum of cross-entropy over the targets, the same on every tensor rank."""
        decoder, axis = self.decoder, self.axis
        if axis is None:
            return head_loss(hidden_TD, decoder.head_weight, targets_T, products=decoder.products)
        return head_loss(
            decoder.boundary.enter(hidden_TD), decoder.head_weight, targets_T, products=decoder.products,
            first_row=self.first_row, largest_slice=part(decoder.spec.vocabulary, axis.size, 0)[1],
            reduce_max=lambda x: axis.all_reduce(x, dist.ReduceOp.MAX), reduce_sum=axis.all_reduce,
        )  # fmt: skip


def apply_tensor_parallel(decoder: Decoder, axis: Axis, *, sequence_parallel: bool) -> None:
    """Put the collectives on the decoder's boundaries; its weights are the rank's slices already."""
    decoder.set_boundary(SequenceBoundary(axis) if sequence_parallel else TensorBoundary(axis))
    if decoder.model.embed_tokens is not None:
        decoder.model.embed_tokens.first_row = part(decoder.spec.vocabulary, axis.size, axis.index)[0]
