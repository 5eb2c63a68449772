"""The vocabulary of counting: an operation, a kept tensor, the work of a part, and `Tally`, which collects them.

Nothing here knows a model or a layout.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from fiveply.plan.software import Software

OperationKind = Literal["product", "grouped", "attention", "memory"]
Phase = Literal["forward", "input", "weight", "step"]
"""`input`, `weight`: gradients of the input and of the weights. `step`: once a step, not once a micro-batch."""
PRODUCT_PHASES: tuple[Phase, ...] = ("forward", "input", "weight")
Module = Literal[
    "embed", "residual", "norm", "latent", "attention", "core", "mlp", "activation", "router", "experts", "head", "loss"
]
"""What an operation or a kept tensor belongs to: `core` is attention's scores and softmax, `latent` the products that expand
latent attention to heads, `activation` the MLP's and the experts'. Recomputation names these."""


class Operation(msgspec.Struct, frozen=True):
    """`shape` by kind: product (m, n, k); grouped (groups, m of one group, n, k); attention (rows, queries, keys, heads,
    key-value heads, head size of queries, of values, window or 0); memory (). `flops` counts a multiply-add as two, and of
    attention only the keys that a token may see; `bytes` are those that must be read and written."""

    name: str
    kind: OperationKind
    phase: Phase
    module: Module
    shape: tuple[int, ...]
    flops: int
    bytes: int
    count: int = 1
    again: bool = False
    """A forward operation that recomputation runs in backward (phase `input`)."""


class Kept(msgspec.Struct, frozen=True):
    """A tensor that forward leaves for backward."""

    name: str
    module: Module
    bytes: int


class Work(msgspec.Struct, frozen=True):
    """One part of the model, one micro-batch, one rank. What recomputation drops is not among `kept`."""

    operations: tuple[Operation, ...]
    kept: tuple[Kept, ...]
    forward_working: int = 0
    """Bytes that stand beyond the kept ones at forward's worst moment."""
    backward_working: int = 0
    """The same of backward: gradients on their way, and what recomputation forms again."""
    weight_working: int = 0
    """The same of the weight gradients that a split backward puts off."""
    deferred: int = 0
    """Bytes kept from a split backward's input gradient to its weight gradient: inputs of products, their outputs' gradients."""

    @property
    def weights(self) -> int:
        """Elements of the matrices whose gradients can be put off."""
        return sum(math.prod(o.shape[:-1]) * o.count for o in self.operations if o.phase == "weight")

    @property
    def kept_bytes(self) -> int:
        return sum(kept.bytes for kept in self.kept)

    def flops(self, phase: Phase) -> int:
        return sum(operation.flops * operation.count for operation in self.operations if operation.phase == phase)


class Tally:
    """Collects the operations and kept tensors of one part. `element`: bytes of an activation; `again`: modules that
    backward computes again."""

    def __init__(self, element: int, again: frozenset[str], software: Software) -> None:
        self.element, self.again, self.software = element, again, software
        self.operations: list[Operation] = []
        self.kept: list[Kept] = []
        self.dropped: list[Kept] = []
        """What recomputation forms again in backward."""
        self.deferred = 0
        """Bytes that weight gradients need where they are put off: inputs of products, and gradients of their outputs."""

    def work(self, forward: int = 0, backward: int = 0, weight: int = 0) -> Work:
        """Given what stands beyond the kept tensors at the worst moment of each phase."""
        backward += sum(kept.bytes for kept in self.dropped)
        return Work(tuple(self.operations), tuple(self.kept), forward, backward, weight, self.deferred)

    def add(self, other: Tally) -> None:
        self.operations += other.operations
        self.kept += other.kept
        self.dropped += other.dropped
        self.deferred += other.deferred

    def keep(self, name: str, module: Module, size: int, *, always: bool = False) -> None:
        """`size` in bytes; dropped where its module is computed again, unless `always`."""
        if size:
            dropped = module in self.again and not always
            (self.dropped if dropped else self.kept).append(Kept(name, module, size))

    def products(self, module: Module, rows: int, k: int, /, *, groups: int = 0, **columns: int) -> None:
        """Products of one input (rows, k) with weights (n, k) each, forward and backward: x W^T, g W, g^T x. Of `groups`, as many
        weights share the rows equally."""
        if self.software.fused_products and len(columns) > 1:
            columns = {"+".join(columns): sum(columns.values())}
        m = -(-rows // groups) if groups else rows
        for name, n in columns.items():
            size = self.element * (rows * k + (groups or 1) * n * k + rows * n)
            for phase, shape in zip(PRODUCT_PHASES, ((m, n, k), (m, k, n), (n, k, m)), strict=True):
                kind, shape = ("grouped", (groups, *shape)) if groups else ("product", shape)
                self._add(Operation(name, kind, phase, module, shape, 2 * rows * n * k, size))

    def save_alternate(self) -> None:
        """Of all that is computed again, save the outputs of every second product from the first on, and attention's."""
        products = [o for o in self.operations if o.kind == "product" and o.phase == "forward"]
        saved = {o.name for o in products[::2]} | {"attention"}
        self.operations = [o for o in self.operations if not (o.again and o.name in saved)]
        for one in products[::2]:
            self.keep(f"{one.name} output", one.module, one.shape[0] * one.shape[1] * self.element, always=True)
        for kept in self.dropped:
            if kept.name in ("attention output", "log-sum"):
                self.kept.append(kept)
        self.dropped = [kept for kept in self.dropped if kept not in self.kept]

    def head_chunk(self, m: int, n: int, k: int, count: int) -> None:
        """The head's product of a chunk of `m` tokens and both its gradients, all in forward."""
        size = self.element * (m * k + n * k + m * n)
        for name, shape in (("logits", (m, n, k)), ("hidden gradient", (m, k, n)), ("head gradient", (n, k, m))):
            self.operations.append(Operation(name, "product", "forward", "head", shape, 2 * m * n * k, size, count))

    def attention(self, shape: tuple[int, ...], pairs: int) -> None:
        """`pairs` of a query and a key that it sees, all rows together. Backward of flash attention forms the scores again
        (Dao et al. 2022): five products for forward's two."""
        rows, queries, keys, heads, kv_heads, size, value, _ = shape
        flash = self.software.flash
        tensors = self.element * rows * (queries * heads * (size + value) + keys * kv_heads * (size + value))
        scores = 0 if flash else 2 * self.element * pairs * heads
        forward, backward = 2 * (size + value), 2 * (2 * size + 2 * value + size * flash)
        for phase, flops, times in zip(PRODUCT_PHASES, (forward, backward), (1, 2), strict=False):
            moved = times * (tensors + scores)
            self._add(Operation("attention", "attention", phase, "core", shape, flops * pairs * heads, moved))

    def memory(self, name: str, module: Module, forward: int, backward: int) -> None:
        """An operation bound by memory: elements that forward and backward read and write."""
        for phase, elements in zip(PRODUCT_PHASES, (forward, backward), strict=False):
            if elements:
                self._add(Operation(name, "memory", phase, module, (), 0, elements * self.element))

    def _add(self, one: Operation) -> None:
        self.operations.append(one)
        if one.phase == "forward" and one.module in self.again:
            self.operations.append(msgspec.structs.replace(one, phase="input", again=True))
