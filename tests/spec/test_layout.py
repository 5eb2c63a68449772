"""The layout's text form, the order of ranks, and one clear line for every layout that no model could have."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiveply.spec.errors import InputError
from fiveply.spec.layout import CHOICES, Layout, divisors

degree = st.integers(1, 6)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts that `check` accepts."""
    dp, tp, pp, zero = draw(degree), draw(degree), draw(degree), draw(st.integers(0, 3))
    schedule = draw(st.sampled_from(CHOICES["schedule"]))
    values: dict[str, Any] = {
        "dp": dp, "tp": tp, "pp": pp, "cp": draw(degree), "ep": draw(degree), "zero": zero, "schedule": schedule,
        "micro_batch": draw(st.integers(0, 9)), "etp": draw(st.integers(0, 4)),
        "dp_shard": draw(st.sampled_from([0, *divisors(dp)])) if zero else draw(st.sampled_from([0, 1])),
        "vp": draw(st.sampled_from({"interleaved": [0, 2, 3], "zbv": [0, 2]}.get(schedule, [0, 1]))),
        "sp": draw(st.sampled_from([-1, 0, 1] if tp > 1 else [-1, 0])),
    } | {key: draw(st.sampled_from(CHOICES[key])) for key in ("recompute", "offload", "cp_kind")}  # fmt: skip
    count = Layout(**values).stage_count
    if draw(st.booleans()):
        values["stages"] = tuple(draw(st.lists(st.integers(0, 50), min_size=count, max_size=count)))
    return Layout(**values)


@given(layouts())
def test_text_round_trip(layout: Layout) -> None:
    layout.check()
    assert Layout.parse(str(layout)) == layout


@given(layouts())
def test_text_is_the_shortest(layout: Layout) -> None:
    """Dropping any part gives another layout, or none."""
    parts = str(layout).split(",")
    for part in parts if layout != Layout() else []:
        with contextlib.suppress(InputError):
            assert Layout.parse(",".join(other for other in parts if other != part)) != layout


def test_text_forms() -> None:
    assert str(Layout()) == "dp=1"
    assert Layout.parse("dp=1") == Layout.parse("") == Layout()
    assert Layout.parse(" tp = 2 , dp=3, ") == Layout(dp=3, tp=2)
    text = "dp=2,tp=4,pp=2,zero=1,schedule=interleaved,vp=2,stages=8+8+7+7,micro_batch=4,recompute=full,sp=0"
    assert str(Layout.parse(text)) == text
    assert Layout.parse(text).stages == (8, 8, 7, 7)


WRONG = {  # text -> (key, words of the problem, words of the fix)
    "dq=2": ("", "unknown key 'dq'", "keys are dp, tp, pp"),
    "dp": ("dp", "'dp' has no value", "key=value"),
    "dp=": ("dp", "has no value", "key=value"),
    "=2": ("", "unknown key ''", "keys are"),
    "dp=two": ("dp", "'two' is not a whole number", "whole number"),
    "dp=2.0": ("dp", "'2.0' is not a whole number", "whole number"),
    "dp=2,tp=2,dp=4": ("dp", "stands twice", "once"),
    "dp=0": ("dp", "0 is not a degree", "from 1"),
    "tp=-2": ("tp", "-2 is not a degree", "from 1"),
    "pp=0": ("pp", "0 is not a degree", "from 1"),
    "cp=0": ("cp", "0 is not a degree", "from 1"),
    "ep=0": ("ep", "0 is not a degree", "from 1"),
    "zero=4": ("zero", "4 is not a ZeRO stage", "0, 1, 2 or 3"),
    "zero=-1": ("zero", "-1 is not a ZeRO stage", "0, 1, 2 or 3"),
    "tp=2,sp=2": ("sp", "2 is not a choice", "0 or 1"),
    "sp=1": ("sp", "needs tp above 1", "set tp"),
    "dp_shard=-1": ("dp_shard", "-1 is negative", "from 1"),
    "vp=-1": ("vp", "-1 is negative", "from 1"),
    "micro_batch=-4": ("micro_batch", "-4 is negative", "from 1"),
    "etp=-1": ("etp", "-1 is negative", "from 1"),
    "dp=6,zero=1,dp_shard=4": ("dp_shard", "dp_shard=4 does not divide dp=6", "[1, 2, 3, 6]"),
    "dp=4,dp_shard=2": ("dp_shard", "nothing is sharded at zero=0", "zero=1, 2 or 3"),
    "schedule=1f2b": ("schedule", "'1f2b' is unknown", "gpipe, 1f1b, interleaved, zb, zbv"),
    "recompute=some": ("recompute", "'some' is unknown", "none, selective, full"),
    "offload=disk": ("offload", "'disk' is unknown", "none, optimizer, activations"),
    "cp_kind=ring": ("cp_kind", "'ring' is unknown", "gather, ulysses"),
    "pp=2,schedule=zbv,vp=3": ("vp", "zbv holds 2 chunks a rank, not 3", "leave vp out"),
    "pp=2,schedule=interleaved,vp=1": ("vp", "2 or more chunks", "schedule=1f1b"),
    "pp=2,vp=2": ("vp", "1f1b runs one chunk a rank", "schedule=interleaved"),
    "stages=3+x": ("stages", "'3+x' is not whole numbers", "8+8+7+7"),
    "stages=3+": ("stages", "'3+' is not whole numbers", "8+8+7+7"),
    "pp=2,stages=4": ("stages", "1 stages listed, 2 ranks x 1 chunks = 2 needed", "joined by +"),
    "pp=2,schedule=zbv,stages=4+4": ("stages", "2 stages listed, 2 ranks x 2 chunks = 4 needed", "joined by +"),
    "pp=2,stages=9+-1": ("stages", "negative number of layers", "whole numbers"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_layout_gets_one_line_with_key_and_fix(text: str) -> None:
    key, problem, fix = WRONG[text]
    with pytest.raises(InputError) as caught:
        Layout.parse(text, where="run.toml: layout")
    error = caught.value
    assert (error.where, error.key) == ("run.toml: layout", key)
    assert problem in error.problem
    assert fix in error.fix
    assert "\n" not in str(error)
    assert all(words in str(error) for words in ("run.toml: layout", key, problem, fix))


@given(st.text(alphabet="dptzeroc_=+,-0123456789 ", max_size=30) | st.text(max_size=12))
def test_any_text_is_a_layout_or_an_input_error(text: str) -> None:
    try:
        layout = Layout.parse(text)
    except InputError:
        return
    assert Layout.parse(str(layout)) == layout


@given(layouts())
def test_ranks_fill_the_axes_tp_fastest_pp_slowest(layout: Layout) -> None:
    assert layout.world == layout.dp * layout.tp * layout.pp * layout.cp
    seen = [layout.coordinates(rank) for rank in range(layout.world)]
    order = [(at.pp, at.dp, at.cp, at.tp) for at in seen]
    assert order == sorted(set(order))  # counts up like digits, tp the last
    axes = (layout.pp, layout.dp, layout.cp, layout.tp)
    assert order[-1] == tuple(size - 1 for size in axes)
    for at in seen:
        assert at.dp == at.replica * layout.shard_ranks + at.shard
        assert 0 <= at.shard < layout.shard_ranks


def test_neighbours_share_a_tensor_group() -> None:
    layout = Layout.parse("dp=4,tp=2,pp=2,zero=3,dp_shard=2")
    assert [layout.coordinates(rank).tp for rank in range(4)] == [0, 1, 0, 1]
    assert [layout.coordinates(rank).dp for rank in range(0, 16, 2)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [layout.coordinates(rank).shard for rank in range(0, 8, 2)] == [0, 1, 0, 1]
    assert [layout.coordinates(rank).replica for rank in range(0, 8, 2)] == [0, 0, 1, 1]
    assert [layout.coordinates(rank).pp for rank in (0, 7, 8, 15)] == [0, 0, 1, 1]


@given(layouts())
def test_every_stage_has_one_place(layout: Layout) -> None:
    stages = [layout.stage_of(rank, chunk) for rank in range(layout.pp) for chunk in range(layout.chunks)]
    assert sorted(stages) == list(range(layout.stage_count))
    first, last = (next(r for r in range(layout.pp) for c in range(layout.chunks) if layout.stage_of(r, c) == stage)
                   for stage in (0, layout.stage_count - 1))  # fmt: skip
    assert layout.end_ranks == {first, last}


def test_a_v_folds_back() -> None:
    layout = Layout.parse("pp=3,schedule=zbv")
    assert [[layout.stage_of(rank, chunk) for chunk in range(2)] for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert layout.end_ranks == {0}
    layout = Layout.parse("pp=3,schedule=interleaved,vp=2")
    assert [[layout.stage_of(rank, chunk) for chunk in range(2)] for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]


def test_defaults_in_force() -> None:
    assert Layout(schedule="interleaved").chunks == Layout(schedule="zbv").chunks == 2
    assert Layout(pp=4).chunks == 1
    assert Layout(dp=8).shard_ranks == 1
    assert Layout(dp=8, zero=1).shard_ranks == 8
    assert Layout(dp=8, zero=3, dp_shard=2).shard_ranks == 2
    assert Layout(tp=2).sequence_parallel
    assert not Layout(tp=2, sp=0).sequence_parallel
    assert not Layout().sequence_parallel


@given(st.integers(1, 2000))
def test_divisors(number: int) -> None:
    found = divisors(number)
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == number
    assert all(number % d == 0 for d in found)
    assert {number // d for d in found} == set(found)
