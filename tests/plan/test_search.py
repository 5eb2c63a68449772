"""The search against listing everything; stages against listing every division; limits; bounds that never exclude too much."""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.pipeline_schedule import Kind, build
from fiveply.plan import explain, machine, space
from fiveply.plan.fitting import Fitting, alive
from fiveply.plan.floors import SURE
from fiveply.plan.predict import ORDERS, Job, Predictor
from fiveply.plan.search import Search
from fiveply.plan.space import Limits
from fiveply.plan.stages import Weights, balance, deal
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve

SMALL = ModelSpec(
    family="llama", vocabulary=512, hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=704, positions=512
)


def job(memory: int = 0, rows: int = 4) -> Job:
    gpu = machine.load("h100")
    # Slow products and a fast link make layouts differ by what each of them splits, not by start-up times alone.
    gpu = msgspec.structs.replace(gpu, memory_bytes=memory or gpu.memory_bytes, devices_per_node=2)
    return Job(SMALL, 512, explain.software("bf16"), machine=gpu, global_batch=rows)


def everything(job: Job, world: int) -> list[tuple[float, Layout, str]]:
    """Every legal layout that fits, with every division of the layers, priced one by one."""
    found: list[tuple[float, Layout, str]] = []
    chosen = space.splits(SMALL, world, sequence=job.sequence, global_batch=job.global_batch, limits=Limits())
    predictors = {order: Predictor(msgspec.structs.replace(job, order=order)) for order in ORDERS}
    capacity = Fitting(predictors[ORDERS[0]]).capacity
    for row in range(len(chosen)):
        split = chosen.layout(row)
        for name, vp in space.pipelines(SMALL, split.pp, Limits()):
            for zero, shard in space.states(split.dp, split.cp, Limits()):
                layout = msgspec.structs.replace(split, schedule=name, vp=vp, zero=zero, dp_shard=shard)
                for stages in divisions(layout.stage_count):
                    one = msgspec.structs.replace(layout, stages=stages)
                    if max(found.peak for found in predictors[ORDERS[0]].footprints(one)) > capacity:
                        continue
                    found += [(predictors[order].seconds(one), one, order) for order in ORDERS]
    return sorted(found, key=lambda item: item[0])


def divisions(stages: int) -> list[tuple[int, ...]]:
    return [
        each
        for each in itertools.product(range(SMALL.layers + 1), repeat=stages)
        if sum(each) == SMALL.layers and 0 not in each[1:-1] and (stages == 1 or len(each) > 1)
    ]


@pytest.mark.parametrize("memory", [0, 60_000_000])
def test_the_best_of_everything_is_found(memory: int) -> None:
    wanted = job(memory)
    listed = everything(wanted, 4)
    found = Search(wanted, 4).run()
    best = found.choices[0]
    assert found.gap == 0
    assert best.seconds == pytest.approx(listed[0][0], rel=1e-6), (best, listed[0])
    assert found.fit <= found.legal
    if memory:
        assert found.fit < found.legal, "the case must exclude something"
    for choice in found.choices:
        resolve(choice.layout, SMALL, sequence=512, global_batch=4, runtime=False)


@pytest.mark.parametrize("memory", [40_000_000, 55_000_000])
def test_no_layout_that_fits_is_excluded_by_the_bound_of_memory(memory: int) -> None:
    wanted = job(memory)
    listed = {str(layout) for _, layout, _ in everything(wanted, 4)}
    chosen = space.splits(SMALL, 4, sequence=512, global_batch=4, limits=Limits())
    fitting = Fitting(Predictor(wanted))
    first, place = chosen.alike("pp", "dp", "cp")
    for number, row in enumerate(first.tolist()):
        rows = np.flatnonzero(place == number)
        one = chosen.layout(row)
        orders, kinds = space.pipelines(SMALL, one.pp, Limits()), space.states(one.dp, one.cp, Limits())
        fits, busiest = fitting.may_fit(chosen, rows, kinds)
        for which, split in enumerate(rows.tolist()):
            least = fitting.busiest(chosen.layout(split), orders, kinds)
            for (index, (name, vp)), (state, (zero, shard)) in itertools.product(enumerate(orders), enumerate(kinds)):
                layout = msgspec.structs.replace(
                    chosen.layout(split), schedule=name, vp=vp, zero=zero, dp_shard=shard
                )  # fmt: skip
                for stages in divisions(layout.stage_count):
                    divided = msgspec.structs.replace(layout, stages=stages)
                    if str(divided) in listed and evenly(divided, stages):
                        most = max(sum(own) for own in of_rank(divided, stages))
                        assert fits[which, state], divided
                        assert max(busiest[which], least[state, index]) <= most, divided


def of_rank(layout: Layout, stages: tuple[int, ...]) -> list[list[int]]:
    return [[stages[layout.stage_of(rank, chunk)] for chunk in range(layout.chunks)] for rank in range(layout.pp)]


def evenly(layout: Layout, stages: tuple[int, ...]) -> bool:
    """As the search deals the layers of a rank to its chunks."""
    return all(held == sorted(held) and held[-1] - held[0] <= 1 for held in of_rank(layout, stages))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_division_has_a_shorter_slowest_path(data: st.DataObject) -> None:
    layers = data.draw(st.integers(3, 8))
    pp = data.draw(st.integers(2, min(4, layers)))
    micro_batches, ahead = data.draw(st.sampled_from([1, 2, 3, 8, 50])), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    seconds = st.floats(0.5, 2)
    weights = Weights(
        tuple(data.draw(st.lists(seconds, min_size=layers, max_size=layers))),
        data.draw(seconds),
        data.draw(st.floats(0, 3)),
    )
    most = data.draw(st.none() | st.lists(st.integers(1, layers), min_size=pp, max_size=pp))

    def slowest(division: tuple[int, ...]) -> float:
        before, worst, at = 0.0, 0.0, 0
        for rank, held in enumerate(division):
            own = sum(weights.layers[at : at + held]) + weights.first * (rank == 0) + weights.last * (rank == pp - 1)
            worst = max(worst, ahead * before + micro_batches * own)
            before += sum(weights.layers[at : at + held]) + weights.first * (rank == 0)
            at += held
        return worst

    legal = [
        each
        for each in itertools.product(range(layers + 1), repeat=pp)
        if sum(each) == layers
        and 0 not in each[1:-1]
        and (most is None or all(a <= b for a, b in zip(each, most, strict=True)))
    ]
    found = balance(weights, pp, micro_batches, ahead, most=most)
    assert (found is None) == (not legal)
    if found:
        assert found in legal
        assert slowest(found) <= min(map(slowest, legal)) * (1 + 1e-4)


def test_layers_are_dealt_to_chunks_evenly_and_folded() -> None:
    assert deal((5, 4), 2) == (2, 2, 3, 2)
    assert deal((5, 4), 2, folded=True) == (2, 2, 2, 3)


@pytest.mark.parametrize(
    ("name", "vp"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb", 1), ("zbv", 2)]
)
@pytest.mark.parametrize("pp", [2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 6, 17])
def test_what_is_alive_is_the_schedules_own(name: str, vp: int, pp: int, micro_batches: int) -> None:
    """Until the input gradient; of an interleaved schedule's short rounds no more than that."""
    for rank, actions in enumerate(build(name, pp, micro_batches, vp).ranks):
        now = most = 0
        for action in actions:
            now += (action.kind is Kind.FORWARD) - (action.kind in (Kind.BACKWARD, Kind.INPUT))
            most = max(most, now)
        assert alive(name, pp, vp, micro_batches)[rank] * vp == pytest.approx(most)


@pytest.mark.parametrize("memory", [0, 55_000_000])
def test_no_bound_of_seconds_exceeds_what_a_layout_takes(memory: int) -> None:
    """Of a split, of a pipeline, of a state; each is at least the one before, but for what `SURE` leaves."""
    wanted = job(memory)
    listed = [entry for entry in everything(wanted, 4) if evenly(entry[1], entry[1].stages)]
    found = Search(wanted, 4)
    found.run(Limits())
    floors, fitting, columns = found.floors, found.fitting, found.splits.columns
    places = {found.splits.layout(row): row for row in range(len(columns["tp"]))}
    for seconds, layout, order in random.Random(0).sample(listed, 300):
        split = msgspec.structs.replace(layout, schedule="1f1b", vp=0, stages=(), zero=0, dp_shard=0)
        kinds, orders = space.states(layout.dp, layout.cp, Limits()), space.pipelines(SMALL, layout.pp, Limits())
        send = min(predictor.transfer(layout) for predictor in floors.predictors.values())
        by_pipeline = floors.pipelines(split, kinds, orders, fitting.busiest(split, orders, kinds), send)
        pipeline = by_pipeline[orders.index((layout.schedule, layout.vp))]
        state = floors.states(layout, order, kinds, [kinds.index((layout.zero, layout.dp_shard))])[0]
        large = floors.large([split])[0][int(layout.recompute == "full")] * layout.micro_batch
        any_pipeline = found._least(np.array([places[split]]), large[None])[0]  # pyright: ignore[reportPrivateUsage]
        assert any_pipeline <= pipeline / SURE
        assert pipeline <= seconds, layout
        assert state <= seconds, layout


def test_the_gap_bounds_what_an_unfinished_search_has_not_seen() -> None:
    wanted = job(60_000_000)
    best = Search(wanted, 4).run().choices[0].seconds
    for budget in (1, 300, 1000):
        found = Search(wanted, 4).run(budget=budget)
        assert found == Search(wanted, 4).run(budget=budget)
        assert best <= found.choices[0].seconds <= best * (1 + found.gap) * (1 + 1e-9)


def test_limits_hold_and_contradict() -> None:
    found = Search(job(), 4).run(Limits.parse(["tp=2"], ["pp=1"]))
    assert all(choice.layout.tp == 2 and choice.layout.pp == 1 for choice in found.choices)
    with pytest.raises(InputError, match="contradict"):
        Limits.parse(["tp=2", "tp=4"])
    with pytest.raises(InputError, match="exceeds --max"):
        Limits.parse(["tp=8"], ["tp=4"])
    with pytest.raises(InputError, match="unknown key"):
        Limits.parse(["width=2"])
    with pytest.raises(InputError, match="not one key"):
        Limits.parse(["tp=2,pp=2"])
