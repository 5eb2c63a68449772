"""Measuring this machine: the fit finds what made the figures, the file is what the planner reads, and a recorded step corrects it.

No test expects a duration: real measurements are checked for being complete and read back, fits on figures that a known
machine would have given.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from short_run import train

from fiveply import probe
from fiveply.cli import main
from fiveply.parallel.data_parallel import Dtypes
from fiveply.plan import cost, explain, machine, workload
from fiveply.plan.machine import Attention, Link, Machine, Passes, Products
from fiveply.plan.operations import Operation
from fiveply.plan.predict import Job, Predictor
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.train import auto, measure
from fiveply.train.measure import Measured, Step
from fiveply.world.device import Devices, find

LINK = Link(3e9, 4e-5, 0.0, half=2e-4)
TRUE = msgspec.structs.replace(
    machine.load("cpu"), bandwidth=1.2e10, launch=4e-6, host=0.0,
    peak={"fp32": 6e10}, products={"fp32": Products(0.9, 40.0, 0.0, 0.1, 1.5e-5, 1.2)},
    attention=Attention(0.3, 80.0, 20.0, 6e-5, 0.7),
    link=dict.fromkeys(machine.load("cpu").link, LINK), network=LINK,
    passes={"forward": Passes(2e-5, 0.5), "input": Passes(3e-5, 0.8), "weight": Passes(3e-5, 0.6), "step": Passes(4e-4, 0.4),
            "sums": Passes(5e-4, 0.9)},
    action=1.5e-4,
)  # fmt: skip
"""A machine that is to be found from its figures."""
FOUND = Devices("cpu", 2, "a processor", 8 << 30, False, 2)
FLOAT32 = Dtypes(*[measure.torch.float32] * 3)
TINY = ModelSpec.load("tiny")


def figures(true: Machine, ranks: int) -> Measured:
    """What measuring `true` without noise would give."""
    software = explain.software("fp32")

    def attention(rows: int, sequence: int, heads: int, size: int, phase: Any, products: int) -> float:
        flops = products * 2 * rows * workload.seen(sequence, 0) * heads * size
        shape = (rows, sequence, sequence, heads, heads, size, size, 0)
        return cost.attention_seconds(
            Operation("a", "attention", phase, "core", shape, flops, 0), true, software, "fp32"
        )

    def step(hidden: int, layers: int, rows: int) -> Step:
        spec = measure.model(hidden, layers)
        layout = resolve(Layout(dp=ranks), spec, sequence=measure.SEQUENCE, global_batch=rows * ranks)
        (rank,) = Predictor(
            Job(spec, measure.SEQUENCE, software, "fp32", machine=true, global_batch=rows * ranks)
        ).ranks(layout)
        one = rank.stages[0]
        return Step(
            hidden, layers, rows, one.forward, one.input + one.weight, rank.after["optimizer"], rank.after["sums"]
        )

    shapes = [shape for m, n, k in measure.PRODUCTS for shape in ((m, n, k), (m, k, n), (n, k, m))]
    return Measured(
        ranks, 1, {"float32": [(*shape, cost.product_seconds(*shape, true, "fp32")) for shape in shapes]},
        [(*shape, attention(*shape, "forward", 2), attention(*shape, "input", 5)) for shape in measure.ATTENTION],
        true.bandwidth, true.launch,
        {name: [(size, cost.call_seconds(name, size, 2, true, 1)) for size in measure.CALLS]
         for name in ("all-reduce", "all-gather", "reduce-scatter", "send")} if ranks > 1 else {},
        [step(*shape) for shape in measure.TRAINED],
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_fit_finds_the_machine_that_made_the_figures(ranks: int) -> None:
    fitted, errors = probe.fit(figures(TRUE, ranks), FOUND, "float32")
    assert max(errors.values()) < 0.03
    assert fitted.memory_bytes == FOUND.memory_bytes * 2 // ranks
    for shape in ((128, 384, 384), (2048, 192, 512), (512, 2048, 256)):  # that were not measured
        assert cost.product_seconds(*shape, fitted, "fp32") == pytest.approx(
            cost.product_seconds(*shape, TRUE, "fp32"), rel=0.06
        )
    if ranks == 2:
        for name in ("all-reduce", "send"):
            for size in (5_000, 300_000, 4_000_000):
                assert cost.call_seconds(name, size, 2, fitted, 1) == pytest.approx(
                    cost.call_seconds(name, size, 2, TRUE, 1), rel=0.1
                )
    spec = ModelSpec.load("2m")
    for text in (
        ("dp=2,micro_batch=2", "dp=2,zero=1", "tp=2,micro_batch=4")
        if ranks == 2
        else ("micro_batch=2", "recompute=full")
    ):
        layout = resolve(Layout.parse(text), spec, sequence=128, global_batch=16)
        predicted, true = (
            Predictor(Job(spec, 128, explain.software("fp32"), "fp32", machine=one, global_batch=16))
            .predict(layout)
            .seconds.p50
            for one in (fitted, TRUE)
        )
        assert predicted == pytest.approx(true, rel=0.05), text


def test_a_gpu_that_no_file_describes_is_measured_all_the_same() -> None:
    unknown = Devices("cuda", 2, "A GPU of next year", 64 << 30, True, 16)
    fitted, _ = probe.fit(figures(TRUE, 2), unknown, "float32")
    assert fitted.memory_bytes == unknown.memory_bytes
    assert fitted.peak["fp32"] == pytest.approx(TRUE.peak["fp32"], rel=0.25)
    assert "A GPU of next year" in fitted.sources["all"]


def test_a_pass_that_takes_no_time_is_not_negative() -> None:
    """Products slower in a step than by themselves leave less than nothing to the rest."""
    given = figures(TRUE, 1)
    steps = [msgspec.structs.replace(step, forward=0.5 * step.forward) for step in given.steps]
    fitted, _ = probe.fit(msgspec.structs.replace(given, steps=steps), FOUND, "float32")
    for one in fitted.passes.values():
        assert one.launch >= 0
        assert one.stream > 0
    assert fitted.action >= 0


def test_least_squares_is_exact_where_it_may_be_and_never_below_zero() -> None:
    matrix = measure.np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]])
    assert probe.least_squares(matrix, matrix @ [0.5, 2.0]) == pytest.approx([0.5, 2.0])
    low = probe.least_squares(matrix, matrix @ [-0.5, 2.0])
    assert low[0] == 0
    assert low[1] > 0


# a real measurement, of few and small figures


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cluster.toml that was really measured."""
    folder = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(measure, "PRODUCTS", ((64, 128, 128), (256, 128, 512), (256, 512, 128)))
        patch.setattr(measure, "ATTENTION", ((1, 64, 2, 32), (2, 128, 2, 32)))
        patch.setattr(measure, "CALLS", (1 << 10, 1 << 14))
        patch.setattr(measure, "TRAINED", ((64, 1, 1), (64, 2, 2), (128, 1, 1)))
        patch.setattr(measure, "STEPS", 1)
        patch.setattr(probe, "ROUNDS", 2)
        patch.setattr(probe, "BUDGET", 0.002)
        main(["probe"])
    return folder


def test_the_file_holds_every_number_of_ranks_and_the_planner_reads_it(
    probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, found = ClusterSpec.load(probed / "cluster.toml"), find()
    assert (cluster.device, cluster.count, cluster.memory_bytes) == (found.kind, found.count, found.memory_bytes)
    assert str(found.count) in cluster.shared
    assert cluster.shared[str(found.count)] == cluster.measured
    for ranks, values in cluster.shared.items():
        one = explain.machine_of(cluster, int(ranks))
        assert one.peak == values["peak"]
        assert set(one.passes) == {"forward", "input", "weight", "step", "sums"}
        assert "fiveply probe" in one.sources["all"]
        assert 0 < one.memory_bytes <= found.memory_bytes * found.count
        for value in (*one.peak.values(), one.bandwidth, *(link.bandwidth for link in one.link.values())):
            assert 0 < value < math.inf
    monkeypatch.chdir(probed)
    assert auto.cluster().measured == cluster.measured
    answer = auto.plan(TINY, auto.cluster(), FLOAT32, sequence=16, global_batch=8)
    predicted = auto.predicted(TINY, answer.ranked[0].prediction.layout, FLOAT32, sequence=16, global_batch=8)
    assert predicted is not None
    assert predicted["measured"]
    assert predicted["seconds"]["p50"] == pytest.approx(answer.ranked[0].prediction.seconds.p50)


def test_plan_takes_the_file_as_a_cluster(
    probed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(probed)
    main(
        [
            "plan",
            "tiny",
            "--cluster",
            "cluster.toml",
            "--seq",
            "16",
            "--batch-tokens",
            "128",
            "--precision",
            "fp32",
            "--json",
        ]
    )
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans[0]["step_seconds"]["p50"] > 0


# a recorded step corrects what was expected


def shares(layout: str) -> dict[str, float]:
    resolved = resolve(Layout.parse(layout), TINY, sequence=16, global_batch=8)
    predicted = auto.predicted(TINY, resolved, FLOAT32, sequence=16, global_batch=8)
    assert predicted is not None
    return predicted["shares"]


@pytest.mark.parametrize("measured", [True, False])
def test_a_recorded_step_is_predicted_once_it_has_corrected_the_file(
    measured: bool, probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if measured:
        Path("cluster.toml").write_text((probed / "cluster.toml").read_text())
    before = shares("tp=2")
    truth = {"compute": 1.7 * before["compute"], "communication": 0.6 * before["communication"], "bubble": 0.0,
             "optimizer": 3.0 * before["optimizer"], "rest": 0.004}  # fmt: skip
    said = auto.recalibrate(truth, before, 2)
    assert f"computing {1 / 1.7:.2f} times as fast" in said
    after = shares("tp=2")
    assert after["rest"] >= truth["rest"], "and sums over ranks"
    for name in ("compute", "communication", "optimizer"):
        assert after[name] == pytest.approx(truth[name], rel=0.02), name


def test_report_corrects_the_file_by_a_run(probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text((probed / "cluster.toml").read_text())
    run = train(tmp_path, "dp=2", "run", "--record", "3")
    before = ClusterSpec.load("cluster.toml")
    main(["report", str(run), "--recalibrate"])
    assert "cluster.toml: computing" in capsys.readouterr().err
    after = ClusterSpec.load("cluster.toml")
    assert after.shared["2"] != before.shared["2"]
    assert {key: value for key, value in after.shared.items() if key != "2"} == {
        key: value for key, value in before.shared.items() if key != "2"
    }
    main(["report", str(run)])
    assert ClusterSpec.load("cluster.toml") == after, "only where it is asked for"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def test_bad_input_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert "nowhere/cluster.toml: no such folder" in refused(["probe", "--out", "nowhere/cluster.toml"], capsys)
    run = train(tmp_path, "dp=1", "run", "--record", "0")
    assert "no step of its layout was recorded" in refused(["report", str(run), "--recalibrate"], capsys)
    assert not Path("cluster.toml").exists()
    for text, said in (("device = 3", "not a cluster"), ("device = 'cpu'\ncount = 0", "0 is too small"),
                       ("device = 'cpu'\ncount = 2\nspeed = 1", "not a cluster")):  # fmt: skip
        Path("cluster.toml").write_text(text)
        with pytest.raises(InputError, match=said):
            auto.cluster()
    Path("cluster.toml").write_text("device = 'cpu'\ncount = 2\n[measured]\nbandwidth = 'fast'")
    with pytest.raises(InputError, match=r"cluster: measured: .*write it with fiveply probe"):
        explain.machine_of(auto.cluster(), 2)
