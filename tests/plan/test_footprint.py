"""Bytes against the dry run: state exactly, kept tensors exactly after every action, the peak within a stated tolerance."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan.dry import FEW, MANY, Drawn

from fiveply import pipeline_schedule
from fiveply.plan import footprint, traffic, units
from fiveply.plan.parts import Case
from fiveply.plan.software import load
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.placement import place

TOLERANCE = 0.1
"""Of the peak at the drawn models, whose tensors are so small that any one of them counts: each within a tenth, half of them
within a thousandth. `REAL`, of the sizes that people train, is held to a fortieth."""

REAL = [
    Drawn("150m", "dp=2,zero=3,micro_batch=2", 0, 1024, 8, "bfloat16"),
    Drawn("150m", "tp=2,pp=2,micro_batch=2,recompute=full", 3, 1024, 8, "bfloat16"),
    Drawn("150m", "pp=4,micro_batch=2,schedule=zb", 0, 1024, 8),
    Drawn("1b", "dp=8,tp=2,pp=2,zero=1,micro_batch=2", 0, 2048, 32, "bfloat16"),
]


def assert_equal_state(case: Drawn) -> None:
    predicted = case.footprint().categories
    assert {name: predicted[name] for name in case.dry.standing} == case.dry.standing


def assert_equal_moments(case: Drawn) -> None:
    """After every action the live bytes have changed by what is predicted."""
    layout, at = case.resolved, case.resolved.coordinates(case.rank)
    schedule = pipeline_schedule.build(
        layout.schedule,
        layout.pp,
        case.micro_batches,
        layout.chunks,
        gather=layout.zero == 3,
        reduce_each=layout.zero >= 2,
    )
    stages = [
        footprint.stage(case.case, layout, layout.stage_of(at.pp, chunk), at.tp) for chunk in range(layout.chunks)
    ]
    moments = footprint.walk(schedule, at.pp, stages)
    assert [moment.action for moment in moments] == [moment.action for moment in case.dry.moments]
    begun = case.dry.moments[0].before  # when the first receives are posted already
    posted = len({a.peer for a in schedule.ranks[at.pp] if a.kind.startswith("receive")}) * stages[0].handed
    differ = [
        (str(predicted.action), predicted.after - posted, dry.after - begun)
        for predicted, dry in zip(moments, case.dry.moments, strict=True)
        if predicted.after - posted != dry.after - begun
    ]
    assert not differ


def difference(case: Drawn) -> float:
    return case.footprint().peak / case.dry.peak_bytes - 1


@pytest.mark.parametrize("case", FEW, ids=str)
def test_state_is_the_runtimes(case: Drawn) -> None:
    assert_equal_state(case)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_kept_tensors_are_the_runtimes_after_every_action(case: Drawn) -> None:
    assert_equal_moments(case)


def test_peaks_are_close() -> None:
    off = sorted(abs(difference(case)) for case in FEW)
    assert off[-1] < TOLERANCE
    assert off[len(off) // 2] < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_ranks_bytes_are_the_runtimes(case: Drawn) -> None:
    assert_equal_state(case)
    assert_equal_moments(case)
    assert abs(difference(case)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL, ids=str)
def test_peaks_of_real_sizes(case: Drawn) -> None:
    assert_equal_state(case)
    assert_equal_moments(case)
    assert abs(difference(case)) < 0.025


def test_state_of_arrays_is_that_of_each() -> None:
    shards, zero = np.array([1, 2, 8, 8, 8]), np.array([0, 1, 1, 2, 3])
    together = footprint.state_of(1001, shards, zero)
    for index in range(len(zero)):
        alone = footprint.state_of(1001, int(shards[index]), int(zero[index]))
        assert [float(x[index]) for x in map(np.asarray, together)] == [float(x) for x in alone]
    # Zero 3 holds an eighth of everything, rounded up: 126 elements of 2 + 4 + 12 bytes.
    assert [float(np.asarray(x)[4]) for x in together] == [126 * 2, 126 * 4, 126 * 12]


@given(
    tp=st.sampled_from((1, 2, 4, 8)),
    model=st.sampled_from(("llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-120b")),
)
def test_a_units_elements_are_the_tables(tp: int, model: str) -> None:
    spec = msgspec.structs.replace(ModelSpec.load(model), layers=2, predicted=1, window_layers=(0,))
    if spec.experts:
        spec = msgspec.structs.replace(spec, experts=msgspec.structs.replace(spec.experts, layers=(1,)))
    layout = resolve(Layout.parse(f"dp=4,tp={tp},ep=4,etp=1" if spec.experts else f"tp={tp}"), spec, sequence=128,
                     global_batch=8, runtime=False)  # fmt: skip
    placed = place(spec, layout, 0, 0)
    for unit in units.alike(spec):
        elements = sum(math.prod(one.size) for one in placed if one.parameter.unit == unit)
        held = units.held(spec, layout, unit)
        assert held.longest + held.experts == elements


def test_offload_empties_the_device() -> None:
    spec = ModelSpec.load("llama-3.1-8b")

    def planned(text: str) -> footprint.Footprint:
        layout = resolve(Layout.parse(text), spec, sequence=4096, global_batch=16, runtime=False)
        return footprint.footprint(Case(spec, 4096), layout, 1, 0)

    on, off = planned("dp=8,micro_batch=2"), planned("dp=8,micro_batch=2,offload=optimizer")
    assert on.optimizer == 12 * 8_030_261_248
    assert on.peak - off.peak == on.optimizer
    assert planned("dp=8,micro_batch=2,offload=activations").activations < on.activations


def test_ranks_of_a_pipeline_differ() -> None:
    spec = ModelSpec.load("llama-3.1-8b")
    layout = resolve(Layout.parse("pp=4,tp=2,micro_batch=1,stages=9+9+9+5"), spec, sequence=4096, global_batch=16)
    ranks = [footprint.footprint(Case(spec, 4096), layout, 16, rank) for rank in range(4)]
    activations = [rank.activations for rank in ranks]
    assert activations == sorted(activations, reverse=True)
    units_of_last = traffic.held_units(spec, layout, 3)
    assert list(units_of_last)[-2:] == ["norm", "head"]
    assert ranks[3].parameters == footprint.state(Case(spec, 4096), layout, units_of_last).parameters


def test_other_systems_hold_their_own_state() -> None:
    spec = ModelSpec.load("llama-3.1-8b")
    layout = resolve(Layout.parse("dp=8,zero=1,micro_batch=1"), spec, sequence=4096, global_batch=16)
    state = footprint.state(Case(spec, 4096, load("megatron")), layout, traffic.held_units(spec, layout, 0))
    # 2 + 4 bytes a parameter, and 12 of optimiser state shared by 8 ranks.
    count = 8_030_261_248
    assert state.parameters == 2 * count
    assert state.gradients == 4 * count
    assert state.optimizer == pytest.approx(12 * count / 8, rel=1e-6)
