"""A map-style data set -> this rank's rows of each global batch, by a global cursor.

Global batch b of an epoch is entries b x global_batch onwards of the epoch's order, whatever the layout; a replica takes an
equal part of it, in order, give or take one row. The last batch of an epoch is short where it must be. Nothing is padded by
duplicates: a replica without rows gets one stand-in row, so that it takes part in every collective, and its weight is 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader

from fiveply.corpus.batches import permutation
from fiveply.parallel.parallelize_module import ModuleBatch
from fiveply.spec.errors import InputError
from fiveply.spec.placement import part


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch; `input, target = batch` unpacks it.

    rows: how many of its rows count (0: the one row there is a stand-in). first: index of its first row in the global
    batch, of `total` rows. cursor: global sample index after the batch.
    """

    input: Any
    target: Any
    rows: int
    first: int
    total: int
    cursor: int = 0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.input, self.target))

    @property
    def held(self) -> int:
        """Rows that the tensors have."""
        return max(1, self.rows)

    def to(self, device: torch.device) -> Batch:
        input, target = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), (self.input, self.target))
        return Batch(input, target, self.rows, self.first, self.total, self.cursor)

    def micro_batches(self, count: int) -> list[ModuleBatch]:
        """Its rows in `count` parts that differ by at most one; one without rows is the first row with weight 0."""
        batches: list[ModuleBatch] = []
        for index in range(count):
            low, rows = part(self.rows, count, index)
            input, target = _rows((self.input, self.target), low, rows)
            batches.append(ModuleBatch(input, target, max(1, rows), rows, self.first + low))
        return batches


def split_global(pair: Any, replicas: int, index: int) -> Batch:
    """A replica's part of a whole global batch (input, target); raises InputError where rows don't stand first."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"a batch is (input, target), not {type(pair).__name__}", where="batch",
                         fix="give a pair, rows first, or what world.loader gives")  # fmt: skip
    leaves = [x for x in tree_leaves(tuple(pair)) if isinstance(x, Tensor)]
    counts = {x.shape[0] if x.dim() else 0 for x in leaves}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"rows must stand first and be as many in every tensor; first dimensions are {sorted(counts)}",
                         where="batch", fix="give (input, target), rows first, 1 or more")  # fmt: skip
    total = counts.pop()
    first, rows = part(total, replicas, index)
    return Batch(*_rows(tuple(pair), first, rows), rows, first, total)


def _rows(pair: tuple[Any, Any], first: int, rows: int) -> tuple[Any, Any]:
    """Some of its rows; of none, the stand-in."""
    take = slice(first, first + rows) if rows else slice(0, 1)
    return tree_map_only(Tensor, lambda x: x[take], pair)


class Passes:
    """How often each data set was gone through under which settings, so that a loader made anew for each epoch goes on."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[Any, Iterator[int]]] = {}
        self._kept: list[Any] = []

    def of(self, dataset: Any, *settings: Any) -> Iterator[int]:
        key = id(dataset)
        if key not in self._counts:
            self._counts[key] = {}
            try:  # when the data set is gone its id may be another one's
                weakref.finalize(dataset, self._counts.pop, key)
            except TypeError:  # a list, say
                self._kept.append(dataset)
        return self._counts[key].setdefault(settings, count())


@dataclass(eq=False)
class Loader:
    """Each pass is an epoch: of the data set in order, or in an order that follows from (seed, epoch) alone."""

    dataset: Any
    global_batch: int
    replica: Callable[[], tuple[int, int]]
    """This rank's index and the number of replicas."""
    shuffle: bool
    seed: int
    start: int
    """Global sample index to go on from."""
    collate: Callable[[list[Any]], Any]
    workers: int
    entered: Callable[[Batch], None]
    """Is told of each batch before it is handed out."""
    passes: Iterator[int]
    """Counts them; loaders that share it go on from each other."""

    def __post_init__(self) -> None:
        dataset, global_batch = self.dataset, self.global_batch
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
            raise InputError(f"{type(dataset).__name__} has no entries by index", where="loader", key="dataset",
                             fix="give a map-style data set with __len__ and __getitem__")  # fmt: skip
        if global_batch < 1:
            raise InputError(
                f"{global_batch} rows are no batch", where="loader", key="global_batch", fix="give 1 or more"
            )

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return -(-len(self.dataset) // self.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        size, passed = len(self.dataset), next(self.passes)
        epoch, skip = divmod(self.start, size)
        epoch, skip = epoch + passed, 0 if passed else skip
        order = permutation(size, self.seed % 2**64, epoch).tolist() if self.shuffle else range(size)
        index, replicas = self.replica()
        places: list[tuple[int, int, int]] = []
        indices: list[list[int]] = []
        for begin in range(skip, size, self.global_batch):
            total = min(self.global_batch, size - begin)
            first, rows = part(total, replicas, index)
            places.append((rows, first, total))
            indices.append([order[i] for i in range(begin + first, begin + first + rows)] or [order[begin]])
        # torch's loader draws from the default generator unless it has one of its own.
        loaded = DataLoader(self.dataset, batch_sampler=indices, collate_fn=self.collate, num_workers=self.workers,
                            generator=torch.Generator())  # fmt: skip
        cursor = epoch * size + skip
        for (rows, first, total), pair in zip(places, loaded, strict=True):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise InputError("its entries are no pairs of (input, target)", where="loader", key="dataset",
                                 fix="give pairs, or collate=... that makes them")  # fmt: skip
            cursor += total
            batch = Batch(*pair, rows=rows, first=first, total=total, cursor=cursor)
            self.entered(batch)
            yield batch
