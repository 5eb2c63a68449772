"""The equality matrix: every legal layout of up to four ranks computes what one process does, to 1e-9 in float64.

It runs over shared memory, which ranks of one host choose by themselves; with `--backend gloo` over that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from prover import MODELS, Case, assert_equal, every_layout, prove, rotate, values

from fiveply.pipeline_schedule import build
from fiveply.spec.layout import Layout
from fiveply.world.mesh import Transport

WORLDS = (1, 2, 3, 4)


def runs_apart(layout: Layout) -> bool:
    """Whether no other layout runs the same actions: without a pipeline a schedule is nothing but its number of chunks."""
    return layout.pp > 1 or layout.schedule in ("1f1b", "interleaved")


def _cases() -> tuple[dict[int, list[Case]], dict[int, list[Case]]]:
    """Each layout at one model, those that run the same actions left out; and again, at other models. There one process runs
    every schedule, so that none does more than its actions say."""
    everything = {w: list(dict.fromkeys(x for m in MODELS.values() for x in every_layout(w, m))) for w in WORLDS}
    apart = {world: [x for x in layouts if runs_apart(x)] for world, layouts in everything.items()}
    seen: set[tuple[Any, ...]] = set()
    first = {world: rotate(layouts, seen) for world, layouts in apart.items()}
    return first, {world: rotate(layouts, seen) for world, layouts in (apart | {1: everything[1]}).items()}


CASES, MORE_CASES = _cases()


@cache
def results(world: int, transport: Transport) -> dict[Case, dict[str, Any]]:
    return dict(zip(CASES[world], prove(CASES[world], transport), strict=True))


@pytest.mark.parametrize("case", [case for world in WORLDS for case in CASES[world]], ids=str)
def test_a_layout_computes_what_one_process_does(case: Case, transport: Transport) -> None:
    assert_equal(case, results(case.resolved().world, transport)[case])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_layouts_compute_what_one_process_does_at_other_models(world: int, transport: Transport) -> None:
    for case, result in zip(MORE_CASES[world], prove(MORE_CASES[world], transport), strict=True):
        assert_equal(case, result)


@pytest.mark.parametrize(("one", "other"), [("gpipe", "1f1b"), ("zb", "1f1b"), ("zbv", "interleaved")])
def test_schedules_of_one_pipeline_rank_are_the_same_actions(one: str, other: str) -> None:
    chunks = 2 if other == "interleaved" else 1
    assert build(one, 1, 3, chunks).ranks == build(other, 1, 3, chunks).ranks


def test_the_matrix_is_complete() -> None:
    """So that a layout that legality begins to refuse, or a key that stops varying, is noticed."""
    seen = {
        (case.model, value) for cases in CASES.values() for case in cases for value in values(Layout.parse(case.layout))
    }
    for name, spec in MODELS.items():
        legal = {value for world in WORLDS for layout in every_layout(world, spec) for value in values(layout)}
        assert legal <= {value for model, value in seen if model == name}, name
    assert {world: len(cases) for world, cases in CASES.items()} == {1: 8, 2: 50, 3: 50, 4: 151}
    assert {world: len(cases) for world, cases in MORE_CASES.items()} == {1: 20, 2: 50, 3: 50, 4: 151}
