"""Each key of a layout and each promise about training that the matrix does not vary: one named test for each.

What users of other frameworks report as bugs stands here: gradients scaled by token counts or by shard groups, layers
lost by uneven stages, a tensor degree that changes the loss, a vocabulary that does not divide.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, get_args

import msgspec
import pytest
import torch
import torch.distributed as dist
from prover import MODELS, Case, assert_equal, one_process, prove, prove_each, prove_near_float32

from fiveply.equality import SEQUENCE, TOLERANCE, record, verification_batches
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, ScheduleName
from fiveply.spec.legality import resolve
from fiveply.spec.placement import declare, stage_units
from fiveply.spec.run import RunSpec
from fiveply.train.job import Job
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups, Mesh, Transport

SCHEDULES = get_args(ScheduleName)
FLOAT64 = Dtypes(torch.float64, torch.float64, torch.float64)


def _cases() -> dict[str, Case]:
    """By the name of what each shows."""
    found: dict[str, Case] = {}

    def add(what: str, model: str, layout: str, **more: Any) -> None:
        assert what not in found
        found[what] = Case(model, layout, **more)

    names = sorted(MODELS)
    for index, schedule in enumerate(SCHEDULES):
        for offset, recompute in enumerate(("selective", "full")):
            model = names[(2 * index + offset) % len(names)]
            add(f"recompute {recompute} {schedule}", model, f"pp=2,schedule={schedule},recompute={recompute}")
        add(f"one micro-batch {schedule}", "qwen3", f"pp=4,schedule={schedule},micro_batch=12,{_ends(schedule)}")
        add(f"two micro-batches {schedule}", "gpt2", f"pp=4,schedule={schedule},micro_batch=6,{_ends(schedule)}")
        add(f"tied ends {schedule}", "few-kv", f"pp=3,schedule={schedule}")
        add(f"tied ends sharded {schedule}", "gpt2", f"dp=2,zero=3,pp=2,schedule={schedule}")
        add(f"documents {schedule}", "llama", f"dp=2,pp=2,schedule={schedule},micro_batch=1")
    for recompute in ("selective", "full"):
        for more in ("tp=2", "tp=2,sp=0", "dp=2,zero=3", "dp=2,zero=2,micro_batch=2"):
            add(f"recompute {recompute} {more}", "gpt2", f"{more},recompute={recompute}")
    add("tied ends, three chunks", "few-kv", "pp=2,schedule=interleaved,vp=3")
    add("7 layers on 2 stages", "llama", "pp=2")
    add("7 layers on 4 stages", "llama", "pp=4")
    add("uneven stages", "llama", "pp=2,stages=5+2")
    add("uneven stages of chunks", "few-kv", "pp=2,schedule=zbv,stages=1+4+1+1")
    add("embedding and head apart from layers", "gpt2", "pp=4,stages=0+3+4+0")
    add("a head alone", "qwen2", "pp=2,stages=7+0,schedule=zb")
    add("three chunks, empty ends", "mistral", "pp=2,schedule=interleaved,vp=3,stages=0+1+2+2+2+0")
    for more in ("", ",sp=0", ",zero=3", ",schedule=zbv"):
        add(f"key-value heads held twice{more}", "few-kv", f"tp=4{more}")
    add("key-value heads held three times", "llama", "tp=9")
    add("tokens fewer than tensor ranks", "mistral", "tp=4,micro_batch=1")
    for more in ("zero=1", "zero=2,micro_batch=1", "zero=3,dp_shard=2"):
        add(f"documents {more}", "qwen3", f"dp=4,{more}")
    for more in (
        "dp=4",
        "tp=4",
        "pp=4",
        "dp=2,pp=2,schedule=zbv,zero=3",
        "tp=2,pp=2,schedule=interleaved",
        "dp=2,tp=2,zero=2",
    ):
        add(f"float32 {more}", "few-kv", more, dtype="float32")
    add("float32 dropout", "gpt2", "dp=2,tp=2,recompute=full", dtype="float32")
    return found


def _ends(schedule: str) -> str:
    """Eight stages of seven layers need an end without one."""
    return "stages=0+1+1+1+1+1+1+1" if schedule in ("interleaved", "zbv") else ""


CASES = _cases()


@cache
def results(transport: Transport) -> dict[Case, dict[str, Any]]:
    return prove_each(CASES.values(), transport)


@pytest.mark.parametrize("what", CASES)
def test_equal(what: str, transport: Transport) -> None:
    assert_equal(CASES[what], results(transport)[CASES[what]])


def test_documents_give_ranks_and_micro_batches_unequal_numbers_of_targets() -> None:
    """Else every test of the division by the global number would pass with any other."""
    case = Case("llama", "dp=2,pp=2")
    batches = verification_batches(case.spec, case.run)
    halves = [batches.target_tokens(first, 6) for first in (0, 6)]
    rows = [batches.target_tokens(row, 1) for row in range(12)]
    assert halves[0] != halves[1]
    assert len(set(rows)) > 2
    assert sum(rows) == sum(halves) == (batches.batch(0).targets >= 0).sum() < 12 * SEQUENCE


@pytest.mark.parametrize("stages", ["7+0", "0+7", "5+2", "2+1+3+1", "1+1+1+1+1+1+1", "0+1+1+1+1+1+1+1+0"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_no_layer_is_lost_to_uneven_stages(stages: str, model: str) -> None:
    spec, sizes = MODELS[model], [int(size) for size in stages.split("+")]
    units = [unit for stage in range(len(sizes)) for unit in stage_units(spec, sizes, stage)]
    assert set(units) == {parameter.unit for parameter in declare(spec)}
    assert [unit for unit in units if unit.startswith("layers")] == [f"layers.{layer}" for layer in range(7)]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("dp=5", r"dp=5 does not divide a global batch of 12 rows; dp in \[1, 2, 3, 4, 6, 12\] does"),
        ("dp=2,micro_batch=4", r"micro_batch=4 does not divide the 6 rows of a replica; one of \[1, 2, 3, 6\] does"),
        ("pp=2,stages=3+3", r"stages 3\+3 = 6 layers, the model has 7"),
        ("tp=2", r"tp=2 does not divide 9 heads; tp in \{1, 3, 9\} does"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_arithmetic(layout: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Case("llama", layout).resolved()


def test_ranks_are_ordered_tensor_then_data_then_pipeline() -> None:
    layout = resolve(Layout.parse("dp=2,tp=2,pp=2"), MODELS["few-kv"], sequence=SEQUENCE, global_batch=8)

    def axes() -> list[list[int]]:
        mesh = Mesh(layout, MODELS["few-kv"])
        everyone = [axis.ranks for axis in (mesh.tp, mesh.dp, mesh.down, mesh.up, mesh.model, mesh.world) if axis]
        assert all(dist.get_rank() in ranks for ranks in everyone)
        return everyone

    assert launch(axes, 8) == [[0, 1], [0, 2], [0, 4], [0, 4], [0, 1, 4, 5], list(range(8))]
    places = [layout.coordinates(rank) for rank in range(8)]
    assert [place.tp for place in places] == [0, 1] * 4
    assert [place.dp for place in places] == [0, 0, 1, 1] * 2
    assert [place.pp for place in places] == [0] * 4 + [1] * 4


# precision


@pytest.mark.parametrize("layout", ["dp=1", "dp=2,zero=2", "dp=2,zero=3,micro_batch=2", "tp=2", "pp=2,schedule=zbv"])
def test_bf16_with_float32_reduction_stays_near_float32(layout: str, transport: Transport) -> None:
    prove_near_float32(Case("few-kv", layout, dtype="float32"), transport)


# replicas that step alone


def test_averaging_parameters_each_step_equals_averaging_gradients_with_plain_gradient_steps(
    transport: Transport,
) -> None:
    cases = [
        Case("llama", "dp=2", sync_every=1),
        Case("few-kv", "dp=2,tp=2", sync_every=1),
        Case("few-kv", "dp=2,pp=2", sync_every=1),
    ]
    for case, result in prove_each(cases, transport).items():
        assert_equal(case, result)


def test_replicas_drift_apart_between_averages_and_meet_at_them(transport: Transport) -> None:
    case = Case("qwen3", "dp=2,tp=2", sync_every=3, steps=6)

    def ranks() -> list[bool]:
        job = Job(case.run, case.spec, Mesh(case.resolved(), case.spec, Groups(transport)), FLOAT64)
        batches, alike = verification_batches(case.spec, case.run), []
        for step in range(6):
            job.step(batches, step)
            assert job.mesh.dp is not None
            own = torch.cat([segment.value.detach() for segment in job.optimizer.segments])
            replicas = job.mesh.dp.gather_objects(own.numpy())
            alike.append(all((values == replicas[0]).all() for values in replicas))
        return alike

    assert launch(ranks, 4) == [False, False, True, False, False, True]


# what a step and an evaluation report


LAYOUTS = {
    "few-kv": ["dp=4,zero=3", "tp=4", "pp=4,schedule=zb", "dp=2,tp=2,zero=1", "tp=2,pp=2,schedule=zbv", "dp=4,zero=2,dp_shard=2"],
    "gpt2": ["dp=2,pp=2,schedule=interleaved", "tp=4,sp=0", "dp=2,tp=2,zero=3,recompute=full", "pp=4,stages=0+4+3+0"],
    "qwen3": ["tp=4", "dp=2,tp=2", "dp=2,pp=2,schedule=gpipe,zero=2"],
}  # fmt: skip
NORMS = {Case(model, layout): Case(model, "dp=1") for model, layouts in LAYOUTS.items() for layout in layouts}


def _report(case: Case, groups: Groups | None = None) -> list[float]:
    """Norm before clipping, mean loss of training and of evaluation, of three steps."""
    job = Job(case.run, case.spec, Mesh(case.resolved(), case.spec, groups), FLOAT64)
    batches, told = verification_batches(case.spec, case.run), []
    for step in range(3):
        sums = job.step(batches, step)
        told += [sums.norm, sums.mean_loss, job.evaluate(batches, 2)]
    return told


@cache
def _reports(transport: Transport) -> dict[Case, list[float]]:
    def ranks() -> list[list[float]]:
        groups = Groups(transport)
        told = []
        for case in NORMS:
            mine = _report(case, groups)
            everyone: list[Any] = [None] * 4
            dist.all_gather_object(everyone, mine)
            assert everyone == [mine] * 4, f"ranks of {case} report unlike numbers"
            told.append(mine)
        return told

    return dict(zip(NORMS, launch(ranks, 4), strict=True))


@cache
def _one_report(case: Case) -> list[float]:
    return launch(_report, 1, case)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_loss_and_evaluation_are_the_same_on_every_rank_and_under_every_layout(
    case: Case, transport: Transport
) -> None:
    exact = _one_report(NORMS[case])
    assert _reports(transport)[case] == pytest.approx(exact, rel=1e-9)
    assert exact[0] > case.run.optimizer.clip > 0, (
        "clipping must bite, or the comparison of parameters says nothing of it"
    )


def test_dropout_acts_in_training_alone() -> None:
    still = msgspec.structs.replace(MODELS["gpt2"], dropout=0.0)
    run = Case("gpt2", "dp=1").run

    def losses(spec: Any) -> list[float]:
        job = Job(run, spec, Mesh(Case("gpt2", "dp=1").resolved(), spec), FLOAT64)
        batches = verification_batches(spec, run)
        first = [job.evaluate(batches, 1), job.gradients(batches, 0).mean_loss, job.gradients(batches, 1, 0).mean_loss]
        return [*first, job.evaluate(batches, 1)]

    kept, dropped = launch(lambda: (losses(still), losses(MODELS["gpt2"])), 1)
    assert kept[0] == kept[1] == kept[2] == kept[3] == dropped[0] == dropped[3]
    assert len({kept[0], dropped[1], dropped[2]}) == 3  # steps draw masks of their own


@pytest.mark.parametrize("seed", [3, 2**40 + 3])
def test_another_seed_is_another_run_and_as_equal(seed: int, transport: Transport) -> None:
    case = Case("gpt2", "dp=2")
    run: RunSpec = msgspec.structs.replace(case.run, seed=seed)

    def trace(layout: str) -> list[float]:
        return record(run, case.spec, Case("gpt2", layout).resolved(), 2, "float64", Groups(transport)).losses

    other, one = launch(trace, 2, "dp=2"), launch(trace, 1, "dp=1")
    assert other == pytest.approx(one, rel=TOLERANCE["float64"])
    assert not math.isclose(one[0], one_process(case).losses[0], rel_tol=1e-6)


def test_tied_embeddings_at_several_depths_share_one_world(transport: Transport) -> None:
    """Ranks between the ends make groups of their own; cached ones of another depth once left ranks out of step."""
    cases = [Case("few-kv", layout) for layout in ("dp=2,pp=3", "pp=6", "dp=3,pp=2", "tp=2,pp=3")]
    for case, result in zip(cases, prove(cases, transport), strict=True):
        assert_equal(case, result)
