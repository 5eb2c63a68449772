"""The global cursor -> rows of tokens and targets; the owner of target-token counts.

A sample is a window of `sequence` tokens and their successors. Which window sample g of the endless global stream is
follows from g, the seed and the files alone, so any rank of any layout asks for the rows that it needs and all agree; a
checkpoint keeps one integer. It knows nothing of ranks, devices or torch.

How sample g is found, with random access: draws go in blocks of `_BLOCK`, each holding every file in exact proportion to
its weight in a seeded order, so the draws of a file before g are a product and a short count. Draw k of a file with n
windows is entry k mod n of that file's permutation for epoch k div n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fiveply.spec.errors import InputError

IGNORE = -100  # the target that is not predicted: cross-entropy's ignore_index
_BLOCK = 4096  # draws; shares are rounded to 1/4096, and every file has at least one draw a block


@dataclass(frozen=True)
class TokenFile:
    """Tokens [T] of one source's split, usually a memory map, and `documents` [D+1], int64: document d is
    tokens[documents[d]:documents[d+1]]. `weight` is relative to the other files of a mixture."""

    name: str
    tokens: np.ndarray
    documents: np.ndarray
    weight: float = 1.0


class Rows(NamedTuple):
    """n samples of S tokens: `tokens` int64 [n, S]; `targets` int64 [n, S], IGNORE where not to be predicted;
    `documents` int32 [n, S], counting documents from 0 within each row, or None; `first`, the global sample index of
    row 0."""

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None
    first: int


class Batches:
    """The global stream of samples over a mixture of files.

    With `shuffle`, an endless mixture by weight, each file freshly permuted every epoch of its own. Without, each
    file's windows in order, one file after the other, from the start again after `len(self)`: evaluation.
    `respect_documents` numbers the documents in each row and drops the targets that would cross into the next one.
    Raises InputError for a file that is shorter than one sample.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        sequence: int,
        global_batch: int,
        seed: int,
        respect_documents: bool = False,
        shuffle: bool = True,
    ) -> None:
        if not files:
            raise InputError("no tokens to read", key="held_out", fix="hold out a share above 0")
        for file in files:
            if len(file.tokens) < sequence + 1:
                raise InputError(
                    f"corpus has {len(file.tokens)} tokens, one sample needs {sequence + 1}",
                    where=file.name,
                    fix="give more text or a shorter sequence",
                )
        self.files, self.sequence, self.global_batch = list(files), sequence, global_batch
        self.respect_documents, self.shuffle = respect_documents, shuffle
        self._seed = seed % 2**64
        # Windows step by `sequence` and share one token: the last target of one is the first input of the next, so
        # every token but a file's first is predicted exactly once an epoch.
        self._windows = np.array([(len(file.tokens) - 1) // sequence for file in files], dtype=np.int64)
        self._draws = _draws_per_block(np.array([file.weight for file in files], dtype=np.float64))
        self._block = lru_cache(maxsize=2)(self._new_block)
        self._permutation = lru_cache(maxsize=len(files))(self._new_permutation)  # 8 bytes a window

    def __len__(self) -> int:
        """Samples in an epoch: the windows of all files."""
        return int(self._windows.sum())

    def batch(self, step: int) -> Rows:
        """The whole global batch of a step, counted from 0."""
        return self.rows(step * self.global_batch, self.global_batch)

    def rows(self, start: int, count: int) -> Rows:
        """Samples start to start + count - 1 of the global stream."""
        file_n, window_n = self._locate(start, count)
        window_nT = np.empty((count, self.sequence + 1), dtype=np.int64)
        documents_nT = np.empty_like(window_nT) if self.respect_documents else None
        for row, (number, window) in enumerate(zip(file_n.tolist(), window_n.tolist(), strict=True)):
            file, begin = self.files[number], window * self.sequence
            end = begin + self.sequence + 1
            window_nT[row] = file.tokens[begin:end]
            if documents_nT is not None:
                documents_nT[row] = _document_numbers(file.documents, begin, end)
        tokens, targets, documents = window_nT[:, :-1], window_nT[:, 1:].copy(), None
        if documents_nT is not None:
            targets[documents_nT[:, 1:] != documents_nT[:, :-1]] = IGNORE
            documents = documents_nT[:, :-1].astype(np.int32)
        return Rows(np.ascontiguousarray(tokens), targets, documents, start)

    def target_tokens(self, start: int, count: int) -> int:
        """Targets other than IGNORE in samples start to start + count - 1, without reading a token."""
        total = count * self.sequence
        if not self.respect_documents:
            return total
        file_n, window_n = self._locate(start, count)
        for number in np.unique(file_n).tolist():
            inner = self.files[number].documents[1:-1]  # where a document follows another
            begin_n = window_n[file_n == number] * self.sequence
            crossed_n = np.searchsorted(inner, begin_n + self.sequence, "right") - np.searchsorted(
                inner, begin_n, "right"
            )
            total -= int(crossed_n.sum())
        return total

    def _locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples -> their file numbers [n] and window numbers [n]."""
        sample_n = np.arange(start, start + count, dtype=np.int64)
        if not self.shuffle:
            ends = np.cumsum(self._windows)
            sample_n %= ends[-1]
            file_n = np.searchsorted(ends, sample_n, "right")
            return file_n, sample_n - (ends - self._windows)[file_n]
        file_n, draw_n = self._draw(sample_n)
        window_n = np.empty_like(draw_n)
        for number in np.unique(file_n).tolist():
            mine = file_n == number
            epoch_n, place_n = np.divmod(draw_n[mine], self._windows[number])
            found_n = np.empty_like(place_n)
            for epoch in np.unique(epoch_n).tolist():
                now = epoch_n == epoch
                found_n[now] = self._permutation(number, epoch)[place_n[now]]
            window_n[mine] = found_n
        return file_n, window_n

    def _draw(self, sample_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples -> the file each is drawn from [n] and how many times that file was drawn before [n]."""
        if len(self.files) == 1:
            return np.zeros_like(sample_n), sample_n
        file_n, draw_n = np.empty_like(sample_n), np.empty_like(sample_n)
        block_n, place_n = np.divmod(sample_n, _BLOCK)
        for block in np.unique(block_n).tolist():
            mine = block_n == block
            file_b, earlier_b = self._block(block)
            file_n[mine] = file_b[place_n[mine]]
            draw_n[mine] = block * self._draws[file_n[mine]] + earlier_b[place_n[mine]]
        return file_n, draw_n

    def _new_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's file of each draw, and the draws of the same file before it in the block."""
        file_b = np.repeat(np.arange(len(self.files)), self._draws)[permutation(_BLOCK, self._seed, 0, block)]
        earlier_b = np.empty_like(file_b)
        for number, draws in enumerate(self._draws.tolist()):
            earlier_b[file_b == number] = np.arange(draws)
        return file_b, earlier_b

    def _new_permutation(self, number: int, epoch: int) -> np.ndarray:
        """A file's order of windows in one of its epochs."""
        return permutation(int(self._windows[number]), self._seed, 1, number, epoch)


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of 0..length-1 by a counter-based generator. Sorting raw bits, not `Generator.permutation`: NumPy
    promises that only the former stay the same from version to version (NEP 19), and a cursor must outlive one."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(bits, kind="stable")


def _draws_per_block(weights: np.ndarray) -> np.ndarray:
    """Weights -> draws of each file in a block, by largest remainder, at least one; they sum to _BLOCK."""
    quota = weights / weights.sum() * _BLOCK
    draws = np.floor(quota).astype(np.int64)
    draws[np.argsort(draws - quota, kind="stable")[: _BLOCK - int(draws.sum())]] += 1
    draws = np.maximum(draws, 1)
    draws[draws.argmax()] -= draws.sum() - _BLOCK
    return draws


def _document_numbers(documents: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The document of each token in tokens[begin:end], counted from 0 at the first: int64 [end - begin]."""
    first, last = np.searchsorted(documents, [begin, end - 1], "right")
    starts = documents[first:last] - begin  # of the documents that begin inside
    return np.repeat(np.arange(len(starts) + 1), np.diff(starts, prepend=0, append=end - begin))
