"""Bounds of a pipeline's step: never above what the schedule takes, and close to it where stages are even."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.pipeline_schedule import build
from fiveply.plan.bounds import Model, least_of_any
from fiveply.plan.simulate import StageSeconds, bound, simulate
from fiveply.plan.stages import deal

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb", 1), ("zbv", 2)]
EVEN = [("gpipe", 1, 1.0), ("1f1b", 1, 1.0), ("interleaved", 2, 0.5), ("zb", 1, 1 / 3), ("zbv", 2, 1 / 6)]
"""With the share of pp - 1 stages' time that is lost (Narayanan et al. 2021, Qi et al. 2024)."""

Triple = tuple[float, float, float]
triple = st.tuples(*[st.floats(0.1, 2.0)] * 3)


def stages_of(
    layers: list[Triple], ends: tuple[Triple, Triple], counts: tuple[int, ...], send: float
) -> list[StageSeconds]:
    """Each stage's seconds, where layers are dealt to stages in order and the ends stand before the first and behind the last."""
    found: list[StageSeconds] = []
    at = 0
    for number, count in enumerate(counts):
        parts = [ends[0]] * (number == 0) + layers[at : at + count] + [ends[1]] * (number == len(counts) - 1)
        found.append(
            StageSeconds(*(sum(part[phase] for part in parts) for phase in range(3)), send=send, send_back=send)
        )
        at += count
    return found


def model_of(layers: list[Triple], ends: tuple[Triple, Triple]) -> Model:
    shares = [layer[0] / sum(layer) for layer in layers]
    return Model(
        sum(ends[0]), sum(ends[1]), sum(map(sum, layers)), sum(f + i for f, i, _ in (*layers, *ends)), min(map(sum, layers)),
        min(f for f, _, _ in layers), max(shares), min(shares),
    )  # fmt: skip


@given(st.sampled_from(SCHEDULES), st.integers(2, 5), st.integers(1, 24), st.booleans(), st.data())
@settings(deadline=None, max_examples=150)
def test_no_division_ends_before_the_bound_of_all(
    schedule: tuple[str, int], pp: int, micro_batches: int, blocking: bool, data: st.DataObject
) -> None:
    name, vp = schedule
    ranks = data.draw(st.lists(st.integers(vp, 3 * vp), min_size=pp, max_size=pp))
    kinds = data.draw(st.lists(triple, min_size=1, max_size=2))
    layers = [kinds[index % len(kinds)] for index in range(sum(ranks))]
    ends, send = (data.draw(triple), data.draw(triple)), data.draw(st.floats(0, 0.5))
    stages = stages_of(layers, ends, deal(ranks, vp, folded=name == "zbv"), send)
    ended = simulate(build(name, pp, micro_batches, vp), stages, blocking=blocking).seconds
    least = least_of_any(name, vp, pp, micro_batches, max(ranks), model_of(layers, ends), send, blocking=blocking)
    assert least <= ended * (1 + 1e-9)
    assert bound(name, pp, vp, micro_batches, stages, blocking=blocking) <= ended * (1 + 1e-9)


@pytest.mark.parametrize(("name", "vp", "share"), EVEN)
@pytest.mark.parametrize(("pp", "micro_batches"), [(4, 8), (8, 64)])
def test_even_stages_end_at_the_bound(name: str, vp: int, share: float, pp: int, micro_batches: int) -> None:
    layer, none = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    layers = [layer] * (4 * pp)
    stages = stages_of(layers, (none, none), deal([4] * pp, vp, folded=name == "zbv"), 0.0)
    ended = simulate(build(name, pp, micro_batches, vp), stages).seconds
    assert ended == pytest.approx(12 * (micro_batches + share * (pp - 1)))
    assert bound(name, pp, vp, micro_batches, stages) == pytest.approx(ended)
    any_division = least_of_any(name, vp, pp, micro_batches, 4, model_of(layers, (none, none)), 0.0, blocking=False)
    assert 0.88 * ended <= any_division <= ended * (1 + 1e-9)
