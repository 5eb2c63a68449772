"""The dry run against eight running ranks: calls, bytes and products, exactly; and its command line."""

from __future__ import annotations

import gc
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from plan.dry import Drawn, draw

from fiveply.cli import main
from fiveply.train import metrics
from fiveply.train.dry_run import STEP, Blank, DryRank, fake_world
from fiveply.train.job import Job
from fiveply.train.ledger import Ledger
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups, Mesh

FEW = [
    Drawn("few-kv", "dp=2,tp=2,pp=2,zero=3,schedule=interleaved,micro_batch=1", 0, rows=8, dtype="bfloat16", here=True),
    Drawn("gpt2", "dp=2,tp=4,zero=2,dp_shard=1,recompute=full,micro_batch=2", 0, rows=8, dtype="float32", here=True),
    Drawn("qwen3", "dp=2,tp=2,pp=2,zero=1,schedule=zbv,sp=0,recompute=selective", 0, rows=8, here=True),
]
MANY = [replace(case, here=True) for case in draw(14, seed=23)]


def ran(case: Drawn, groups: Groups) -> list[dict[str, Any]]:
    """What every rank of this world does in a step of the case, on real tensors."""
    mesh = Mesh(case.resolved, case.spec, groups)
    with Ledger(lambda: "", lambda: None) as ledger:
        job = Job(case.run, case.spec, mesh, case.dtypes)
        ledger.resized([unit.full for unit in job.model.units if unit.zero == 3])
        mesh.recorder.start(job.device)
        recording = mesh.recorder.recording
        assert recording is not None
        recording.now = ledger.bytes
        ledger.begin()
        job.step(Blank(case.run), STEP)  # type: ignore[arg-type]
    kinds = {action.kind for action in job.executor.actions}
    spans = [(before, after) for span, before, after in recording.spans if span.call is None and span.kind in kinds]
    mine = {
        "calls": dict(Counter((call.axis.name, call.operation, call.bytes) for call in recording.calls)),
        "standing": metrics.bytes_by_category(job.model),
        "products": dict(ledger.products),
        "attention": dict(ledger.attention),
        "moments": [(before - spans[0][0], after - spans[0][0]) for before, after in spans],
    }
    return mesh.collect_objects(mine)


def on_ranks(cases: list[Drawn]) -> list[list[dict[str, Any]]]:
    def ranks() -> list[list[dict[str, Any]]]:
        groups = Groups()
        return [ran(case, groups) for case in cases]

    gc.collect()  # as in `plan.dry`
    return launch(ranks, cases[0].resolved.world, timeout_seconds=120)


def assert_equal(case: Drawn, rank: int, real: dict[str, Any]) -> None:
    dry = replace(case, rank=rank).dry
    assert {(c.axis, c.operation, c.bytes): c.count for c in dry.calls} == real["calls"], f"{case} rank {rank}"
    assert dry.standing == real["standing"]
    assert {(m, n, k): count for m, n, k, count in dry.products} == real["products"]
    assert {(phase, tuple(shape)): count for phase, shape, count in dry.attention} == real["attention"]
    if case.resolved.pp == 1:  # between stages, when a transfer lets its tensor go is chance
        assert moments(dry) == real["moments"]


def moments(dry: DryRank) -> list[tuple[int, int]]:
    begun = dry.moments[0].before
    return [(moment.before - begun, moment.after - begun) for moment in dry.moments]


def test_eight_running_ranks_do_the_same() -> None:
    for case, ranks in zip(FEW, on_ranks(FEW), strict=True):
        for rank in (0, 5, 7):
            assert_equal(case, rank, ranks[rank])


@pytest.mark.slow
def test_many_layouts_on_running_ranks_do_the_same() -> None:
    for case, ranks in zip(MANY, on_ranks(MANY), strict=True):
        for rank in {0, case.rank, 7}:
            assert_equal(case, rank, ranks[rank])


def test_the_peak_is_the_largest_moment() -> None:
    dry = Drawn("llama", "tp=3,pp=2,micro_batch=2", 0, rows=6).dry
    assert sum(dry.peak.values()) == dry.peak_bytes
    assert dry.peak_bytes >= max(moment.after for moment in dry.moments)
    assert (
        dry.when == "backward chunk 0 micro-batch 0"
    )  # where one stage's activations of two micro-batches are still alive


def test_the_bytes_that_a_run_records_are_the_runtimes() -> None:
    case = FEW[0]
    counted = metrics.counted_bytes(
        case.spec, case.resolved, 0, sequence=case.sequence, global_batch=case.rows, dtypes=case.dtypes
    )
    assert counted | case.dry.standing == counted
    assert sum(counted.values()) == case.footprint().peak


def test_a_world_is_left_behind() -> None:
    with fake_world(3, 4096):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 4096)
    assert not dist.is_initialized()


RUN = """
layout = "dp=2,tp=2,pp=2"
[model]
preset = "tiny"
[data]
corpus = "there is none"
sequence = 16
[train]
global_batch = 8
[precision]
parameters = "float32"
"""


@pytest.fixture
def run(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return str(path)


def test_json(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    main(["train", run, "--dry-run", "--ranks", "6", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert (found["layout"].split(",stages")[0], found["world"]) == ("dp=2,tp=2,pp=2", 8)
    (rank,) = found["ranks"]
    assert rank["place"]["pp"] == 1
    assert {"axis": "world", "operation": "all-reduce", "bytes": 24, "count": 1} in rank["calls"]
    assert set(rank["flops"]) == {"products", "attention"}


def test_tables_name_the_peak_and_the_calls(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    main(["train", run, "--layout", "dp=2,pp=2", "--dry-run"])
    out, _ = capfd.readouterr()
    assert "1f1b: 2 ranks" in out
    assert "rank 0 (dp 0, tp 0, pp 0)" in out
    assert "rank 3 (dp 1, tp 0, pp 1)" in out
    assert "at forward chunk 0" in out or "at backward chunk 0" in out
    assert "all-reduce" in out


@pytest.mark.parametrize(("ranks", "says"), [("8", "there is no rank 8 among 8"), ("0,x", "'0,x' names no ranks")])
def test_ranks_that_are_none(run: str, ranks: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", run, "--dry-run", "--ranks", ranks])
    assert stop.value.code == 2
    assert says in capfd.readouterr().err


@pytest.mark.slow
def test_a_rank_of_16384() -> None:
    """Llama-3.1-405B; one micro-batch a replica keeps this short."""
    case = Drawn("llama-3.1-405b", "dp=128,tp=8,pp=16,micro_batch=1,zero=1", 16383, 8192, 128, "bfloat16")
    assert case.calls() == {(c.axis, c.operation, c.bytes): c.count for c in case.dry.calls}
    assert case.footprint().peak == pytest.approx(case.dry.peak_bytes, rel=1e-3)
