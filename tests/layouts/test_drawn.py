"""Layouts drawn at random at six and eight ranks, all keys at once, to break the promise of equality.

The draws are the same in every run; a failure prints its model and layout.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prover import MODELS, Case, assert_equal, prove_each

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout, ScheduleName, divisors
from fiveply.world.mesh import Transport

FEW, ROWS = 14, 24
DRAWS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def fits(spec: ModelSpec, tp: int) -> bool:
    return spec.heads % tp == 0 and (spec.kv_heads % tp == 0 or tp % spec.kv_heads == 0)


@st.composite
def stage_lists(draw: st.DrawFn, layers: int, stages: int) -> tuple[int, ...]:
    """`layers` over `stages`, as unevenly as it comes; the first and the last may hold none."""
    inner = max(0, stages - 2)
    cuts = sorted(draw(st.lists(st.integers(0, layers - inner), min_size=stages - 1, max_size=stages - 1)))
    parts = [high - low for low, high in zip([0, *cuts], [*cuts, layers - inner], strict=True)]
    return tuple(part + (0 < index < stages - 1) for index, part in enumerate(parts))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world = draw(st.sampled_from((6, 8)))
    name = draw(st.sampled_from(sorted(MODELS)))
    spec = MODELS[name]
    tp = draw(st.sampled_from([tp for tp in divisors(world) if fits(spec, tp)]))
    pp = draw(st.sampled_from(divisors(world // tp)))
    dp = world // tp // pp
    schedule: ScheduleName = draw(st.sampled_from(("1f1b", "gpipe", "interleaved", "zb", "zbv")))
    most = spec.layers + 2  # stages, the ends without a layer
    vp = 0
    if schedule in ("interleaved", "zbv"):
        vp = draw(st.sampled_from((2, 3) if schedule == "interleaved" and 3 * pp <= most else (2,)))
        if vp * pp > most:
            schedule, vp = "1f1b", 0
    zero = draw(st.sampled_from((0, 1, 2, 3)))
    replica = ROWS // dp
    micro_batch = draw(st.sampled_from([0, *(size for size in divisors(replica) if replica // size <= 12)]))
    stages = pp * (vp or 1)
    by_hand = stages > spec.layers or draw(st.booleans())
    return Case(
        name,
        str(
            Layout(
                dp=dp,
                tp=tp,
                pp=pp,
                zero=zero,
                dp_shard=draw(st.sampled_from(divisors(dp))) if zero else 0,
                schedule=schedule,
                vp=vp,
                stages=draw(stage_lists(spec.layers, stages)) if by_hand else (),
                micro_batch=micro_batch,
                recompute=draw(st.sampled_from(("none", "selective", "full"))),
                sp=draw(st.sampled_from((-1, 0))) if tp > 1 else -1,
            )
        ),
        rows=ROWS,
    )


def drawn(count: int) -> list[Case]:
    found: list[Case] = []

    @settings(DRAWS, max_examples=count)
    @given(cases())
    def draw(case: Case) -> None:
        assert case.legal(), f"{case} was drawn as legal"
        found.append(case)

    draw()
    return list(dict.fromkeys(found))


def check(found: list[Case], transport: Transport) -> None:
    """All of a world size in one launch."""
    for case, result in prove_each(found, transport).items():
        assert_equal(case, result)


def test_drawn_layouts_compute_what_one_process_does(transport: Transport) -> None:
    check(drawn(FEW), transport)


@pytest.mark.slow
def test_many_drawn_layouts_compute_what_one_process_does(transport: Transport) -> None:
    first = set(drawn(FEW))
    more = [case for case in drawn(60) if case not in first]
    assert len(more) > 40
    check(more, transport)
