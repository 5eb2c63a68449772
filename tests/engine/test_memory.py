"""Tensors that share large pages: apart from one another, aligned, and theirs for as long as they live."""

from __future__ import annotations

import gc

import pytest
import torch

from fiveply.engine import memory
from fiveply.engine.memory import Memory

SHAPES = [
    ((3, 5), torch.float32),
    ((7,), torch.bfloat16),
    ((2, 16, 16), torch.int8),
    ((0, 4), torch.float32),
    ((1000, 9), torch.float64),
]


@pytest.mark.parametrize("together", [1 << 12, 1 << 26])  # less than the largest of them, and more than all
def test_tensors_lie_apart_and_stay(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_TOGETHER", together)
    made = Memory(torch.device("cpu"))
    tensors = [made.empty(shape, dtype) for shape, dtype in SHAPES for _ in range(3)]
    for number, x in enumerate(tensors):
        x.fill_(number)
    del made
    gc.collect()
    for number, (x, (shape, dtype)) in enumerate(zip(tensors, [one for one in SHAPES for _ in range(3)], strict=True)):
        assert (tuple(x.shape), x.dtype, x.is_contiguous()) == (shape, dtype, True)
        assert x.numel() == 0 or x.data_ptr() % 64 == 0
        assert bool((x == number).all())


def test_other_devices_have_their_own() -> None:
    x = Memory(torch.device("meta")).empty((2, 3), torch.float32)
    assert (x.device.type, tuple(x.shape)) == ("meta", (2, 3))
