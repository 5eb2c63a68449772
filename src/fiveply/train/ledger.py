"""What a step computes and holds, seen from below: a dispatch mode that follows every tensor's storage from birth to death.

Under fake tensors nothing is allocated, yet storages know their sizes and die when the last tensor that needs them does, as
autograd's kept ones do after backward. So the live bytes at any moment are those of a real run, fragmentation left out.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fiveply.plan.workload import seen

aten = torch.ops.aten
Product = tuple[int, int, int]
"""(m, n, k) of an (m, k) by (k, n) product."""


class Ledger(TorchDispatchMode):
    """Live bytes by category, their peak, and the products computed.

    `category()` names the owner of what is made now; `at_peak()` is called whenever there was never more than now.
    """

    def __init__(self, category: Callable[[], str], at_peak: Callable[[], None]) -> None:
        super().__init__()
        self.category, self.at_peak = category, at_peak
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak: Counter[str] = Counter()
        self.peak_total = 0
        self.products: Counter[Product] = Counter()
        self.attention: Counter[tuple[str, tuple[int, ...]]] = Counter()
        """(`forward` or `backward`, (rows, queries, keys, heads, key-value heads, head size))."""
        self._watched: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        """By storage: itself, its category and bytes."""
        self._resized: list[torch.UntypedStorage] = []

    @property
    def flops(self) -> dict[str, int]:
        """Of products, and of attention over the keys that a token may see."""
        attention = 0
        for (phase, (rows, queries, _, heads, _, size)), count in self.attention.items():
            products = 2 if phase == "forward" else 5
            attention += count * 2 * products * rows * heads * size * seen(queries, 0)
        return {
            "products": sum(2 * m * n * k * count for (m, n, k), count in self.products.items()),
            "attention": attention,
        }

    def belongs(self, x: Tensor, category: str) -> None:
        """`x`'s storage is of this category, whatever made it."""
        key = x.untyped_storage()._cdata
        if key in self._watched:
            reference, old, size = self._watched[key]
            self._watched[key] = reference, category, size
            self.live[old] -= size
            self.live[category] += size

    def resized(self, tensors: Iterable[Tensor]) -> None:
        """Their storages change size without an operation (flat parameters of zero 3): they are asked each time."""
        self._resized = [x.untyped_storage() for x in tensors]
        for storage in self._resized:
            self._forget(storage._cdata)

    def begin(self) -> None:
        """Count from here on."""
        self.peak, self.peak_total = Counter(self.live), self.bytes()
        self.products.clear()
        self.attention.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        if func in _COUNTED:
            count, *operands = _COUNTED[func]
            count(self, *(args[place] for place in operands))
        return out

    def bytes(self) -> int:
        return self.total + sum(storage.nbytes() for storage in self._resized)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched or size == 0 or any(resized._cdata == key for resized in self._resized):
            return
        category = self.category()
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key)), category, size
        self.live[category] += size
        self.total += size
        if (now := self.bytes()) > self.peak_total:
            self.peak_total, self.peak = now, Counter(self.live)
            self.peak["gathered"] = now - self.total
            self.at_peak()

    def _forget(self, key: int) -> None:
        if key in self._watched:
            _, category, size = self._watched.pop(key)
            self.live[category] -= size
            self.total -= size


def _product(ledger: Ledger, a: Tensor, b: Tensor) -> None:
    ledger.products[a.shape[0], b.shape[1], a.shape[1]] += 1


def _linear(ledger: Ledger, x: Tensor, weight: Tensor) -> None:
    rows = x.numel() // x.shape[-1]
    ledger.products[rows, weight.shape[0], x.shape[-1]] += 1


def _attention(phase: str, ledger: Ledger, q: Tensor, k: Tensor) -> None:
    rows, heads, queries, size = q.shape
    ledger.attention[phase, (rows, queries, k.shape[2], heads, k.shape[1], size)] += 1


_forward, _backward = (functools.partial(_attention, phase) for phase in ("forward", "backward"))
_COUNTED: dict[Any, tuple[Any, int, int]] = {
    aten.mm.default: (_product, 0, 1),
    aten.addmm.default: (_product, 1, 2),
    aten.addmm_.default: (_product, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (_forward, 0, 1),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (_backward, 1, 2),
    aten._scaled_dot_product_flash_attention.default: (_forward, 0, 1),
    aten._scaled_dot_product_flash_attention_backward.default: (_backward, 1, 2),
    torch.ops.mkldnn._linear_pointwise.default: (_linear, 0, 1),
    torch.ops.mkldnn._linear_pointwise.binary: (_linear, 0, 2),
}
"""What counts an operation, and which of its arguments are the operands."""
