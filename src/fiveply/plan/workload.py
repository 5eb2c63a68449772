"""What one rank computes and keeps, counted exactly: every operation and every kept tensor of a part of the model.

A *part* is a unit of the parameter table (`embed`, `layers.3`, `norm`, `head`). Counts are of one micro-batch on one rank
under a resolved layout. Nothing here knows seconds: `cost.py` prices operations, `traffic.py` counts what ranks exchange,
`footprint.py` adds kept tensors up over a schedule's life.
"""

from __future__ import annotations

from typing import Literal

import msgspec

OperationKind = Literal["product", "grouped", "attention", "memory"]
Phase = Literal["forward", "input", "weight", "step"]
"""`input`, `weight`: gradients of the input and of the weights. `step`: once a step, not once a micro-batch."""
Module = Literal["embed", "norm", "attention", "core", "mlp", "router", "experts", "head", "loss", "optimizer"]
"""What an operation or a kept tensor belongs to; `core` is attention's scores and softmax. Recomputation names these."""


class Operation(msgspec.Struct, frozen=True):
    """`shape` by kind: product (m, n, k); grouped (groups, m of one group, n, k); attention (rows, queries, keys, heads,
    key-value heads, head size of queries, of values, window or 0); memory (). `flops` counts a multiply-add as two and half
    of a causal attention's scores; `bytes` are those that must be read and written."""

    name: str
    kind: OperationKind
    phase: Phase
    module: Module
    shape: tuple[int, ...]
    flops: int
    bytes: int
    count: int = 1


class Kept(msgspec.Struct, frozen=True):
    """A tensor that forward leaves for backward. `count` alike."""

    name: str
    module: Module
    bytes: int
    count: int = 1


class Work(msgspec.Struct, frozen=True):
    """One part of the model, one micro-batch, one rank. Recomputed operations stand among `operations` again, with phase
    `input`; what recomputation drops is not among `kept`."""

    operations: tuple[Operation, ...]
    kept: tuple[Kept, ...]
