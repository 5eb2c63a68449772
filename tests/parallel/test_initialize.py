"""Initial values: any slice is the whole's, bit for bit; the numbers are normal, keyed by seed and name, and pinned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.parallel.initialize import BLOCK_ROWS, initial_value, normal
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.placement import Parameter, Placed, declare, place

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
SPEC = ModelSpec.load(next(path for path in CONFIGS if path.stem == "llama"))


def placed(
    name: str, shape: tuple[int, ...], start: tuple[int, ...] = (), size: tuple[int, ...] = (), **more: Any
) -> Placed:
    return Placed(Parameter(name, shape, "unit", **more), start or (0,) * len(shape), size or shape)


WHOLE = normal(placed("w", (3 * BLOCK_ROWS + 5, 21)), seed=0)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_slice_is_the_wholes_bit_for_bit(data: st.DataObject) -> None:
    start, size = [], []
    for length in WHOLE.shape:
        first = data.draw(st.integers(0, length - 1))
        start.append(first)
        size.append(data.draw(st.integers(1, length - first)))
    got = normal(placed("w", tuple(WHOLE.shape), tuple(start), tuple(size)), seed=0)
    assert torch.equal(got, WHOLE[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 200), columns=st.integers(1, 70))
def test_a_row_depends_on_its_number_and_the_columns_alone(rows: int, columns: int) -> None:
    """Not on how many rows follow: a longer vocabulary starts with the shorter one's rows."""
    shorter, longer = (normal(placed("w", (n, columns)), seed=0) for n in (rows, rows + 77))
    assert torch.equal(shorter, longer[:rows])


@pytest.mark.parametrize("text", ["dp=1", "tp=3,pp=2", "tp=9", "pp=7", "tp=3,pp=2,schedule=zbv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layout_starts_from_the_same_bits(text: str, dtype: torch.dtype) -> None:
    layout = resolve(Layout.parse(text), SPEC, sequence=64, global_batch=4)
    whole = {p.name: initial_value(Placed(p, (0,) * len(p.shape), p.shape), SPEC, 5, dtype) for p in declare(SPEC)}
    for stage in range(layout.stage_count):
        for tp in range(layout.tp):
            for row in place(SPEC, layout, tp, stage):
                window = tuple(slice(a, a + n) for a, n in zip(row.start, row.size, strict=True))
                value = initial_value(row, SPEC, 5, dtype)
                assert value.dtype == dtype
                assert torch.equal(value, whole[row.name][window]), row.name


def test_values_are_standard_normal() -> None:
    values = normal(placed("w", (1000, 300)), seed=1).numpy()
    n = values.size
    flat = np.sort(values.ravel())
    assert abs(flat.mean()) < 4 / math.sqrt(n)
    assert abs(flat.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((flat**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((flat**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov at the 0.1% level.
    exact = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in flat])
    assert np.abs(exact - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)
    assert np.unique(flat).size == n
    # Nothing of one element in its neighbours: along rows, down columns, a block below.
    for a, b in (
        (values[:, 1:], values[:, :-1]),
        (values[1:], values[:-1]),
        (values[BLOCK_ROWS:], values[:-BLOCK_ROWS]),
    ):
        assert abs((a * b).mean()) < 4.5 / math.sqrt(a.size)
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(("name", "seed"), [("w", 2), ("w", -1), ("w", 2**70), ("v", 1), ("w.", 1), ("1/w", 1)])
def test_other_names_and_seeds_are_independent(name: str, seed: int) -> None:
    shape = (200, 100)
    a, b = normal(placed("w", shape), seed=1), normal(placed(name, shape), seed=seed)
    assert not torch.equal(a, b)
    assert abs((a * b).mean().item()) < 4.5 / math.sqrt(a.numel())


def test_layers_differ() -> None:
    values = [
        initial_value(Placed(p, (0, 0), p.shape), SPEC, 0, torch.float64)
        for p in declare(SPEC)
        if p.name.endswith("q_proj.weight")
    ]
    assert len({value.sum().item() for value in values}) == SPEC.layers


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_deviations(path: Path) -> None:
    spec = ModelSpec.load(path)
    for parameter in declare(spec):
        value = initial_value(Placed(parameter, (0,) * len(parameter.shape), parameter.shape), spec, 0, torch.float32)
        if len(parameter.shape) == 1:
            assert (value == (0.0 if parameter.name.endswith("bias") else 1.0)).all()
            continue
        into_residual = parameter.name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = spec.init_std / (math.sqrt(2 * spec.layers) if into_residual else 1)
        assert value.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * value.numel()))


def test_golden_values() -> None:
    """A change here gives every seed another model: say so in the release notes, or don't."""
    value = normal(placed("model.embed_tokens.weight", (1003, 72), (998, 69), (5, 3)), seed=42)
    golden = [
        [1.0606151242956334, 0.997009562379771, -0.4563350582519253],
        [0.23499549341900242, 1.4844674314409079, 0.6181304272529154],
        [0.22698262257901478, 1.6773157151462172, 0.08452523034970368],
        [-1.37370092600777, -2.192926656262576, 1.1619684186412582],
        [-0.41709090874627347, 1.1592242101584884, -1.4943209461230111],
    ]
    torch.testing.assert_close(value, torch.tensor(golden, dtype=torch.float64), rtol=1e-12, atol=0)
