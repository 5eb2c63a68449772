"""What `fiveply plan` says: the keys of its JSON, terms that add up, reasons, refusals, the file that other verbs read, the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fiveply.cli import main
from fiveply.plan import explain
from fiveply.plan.explain import Answer
from fiveply.plan.search import Search
from fiveply.plan.space import Limits
from fiveply.report import plan_page
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.plan import Plan, layout_text


@pytest.fixture(scope="module")
def answered() -> Answer:
    return explain.answer(ModelSpec.load("1b"), ClusterSpec("h100", 8), sequence=2048, global_batch=64)


def test_terms_and_waterfall_add_up_to_the_step(answered: Answer) -> None:
    for one in answered.ranked:
        middle = one.prediction.seconds.p50
        assert sum(one.prediction.terms.values()) == pytest.approx(middle)
        assert sum(seconds for _, seconds in one.waterfall) == pytest.approx(middle)
        assert one.prediction.seconds.p10 < middle < one.prediction.seconds.p90
        assert one.mfu == pytest.approx(one.ideal / middle)
    times = [one.prediction.seconds.p50 for one in answered.ranked]
    assert times == sorted(times)


def test_what_nothing_else_fits_goes_to_the_host() -> None:
    def planned(devices: int, *fixed: str) -> Answer:
        spec, cluster = ModelSpec.load("llama-3.1-8b"), ClusterSpec("h100", devices)
        return explain.answer(spec, cluster, sequence=2048, global_batch=32, limits=Limits.parse(fixed))

    found = planned(1)
    assert [one.prediction.layout.offload for one in found.ranked] == ["optimizer"]
    # Gradients there, parameters back, and the state once through the host's memory.
    least = 8e9 * (4 + 2 + 2 * 12) / found.job.machine.host_bandwidth
    assert found.ranked[0].prediction.terms["offload"] > least
    assert found.ranked[0].refusal
    with pytest.raises(InputError, match="does not fit"):
        planned(1, "offload=none")
    eight = planned(8)
    assert {one.prediction.layout.offload for one in eight.ranked} == {"none"}
    asked = explain.why(eight, "offload=activations").best
    assert asked
    assert asked.prediction.layout.offload == "activations"
    assert asked.prediction.seconds.p50 > eight.ranked[0].prediction.seconds.p50


def test_one_search_answers_as_a_fresh_one_does(answered: Answer) -> None:
    again = answered.search.run(Limits.parse(["tp=2"]), wanted=3)
    assert again == Search(answered.job, 8).run(Limits.parse(["tp=2"]), wanted=3)
    assert answered.search.run() == Search(answered.job, 8).run()


def test_the_command_prints_the_keys_and_writes_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main(["plan", "1b", "--cluster", "h100:8", "--seq", "2048", "--batch-tokens", "128k", "--why", "tp=8", "--why", "tp=3", "--json",
          "--html", "plan.html"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert {"seconds", "legal", "fit", "plans", "gap"} <= found.keys()
    assert found["legal"] >= found["fit"] > 0
    for plan in found["plans"]:
        assert Layout.parse(plan["layout"]).world == 8
        assert plan["step_seconds"].keys() == {"p10", "p50", "p90"}
        assert plan["memory_bytes"].keys() == {"worst", "by_rank", "capacity"}
        assert plan["memory_bytes"]["worst"] == max(plan["memory_bytes"]["by_rank"]) <= plan["memory_bytes"]["capacity"]
        assert 0 <= plan["p_oom"] <= 0.05
        assert plan["tokens_per_second_per_device"] == pytest.approx(128 * 2**10 / plan["step_seconds"]["p50"] / 8)
    assert "tp=3 does not divide" in found["why"]["tp=3"]
    assert "time" in found["why"]["tp=8"]
    written = Plan.load("run.plan")
    assert (written.model, written.global_batch, written.sequence) == ("1b", 64, 2048)
    assert layout_text("run.plan") in [plan["layout"] for plan in found["plans"] if plan["runnable"]]
    text = (tmp_path / "plan.html").read_text()
    assert "default-src 'none'" in text
    assert "http://www.w3.org/2000/svg" in text
    assert text.count("<tr data-plan=") == len(found["plans"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1b", "--cluster", "h101:8", "--seq", "2048", "--batch-tokens", "128k"], "no device 'h101'"),
        (["1b", "--cluster", "h100", "--seq", "2048", "--batch-tokens", "128k"], "is no cluster"),
        (["1b", "--cluster", "h100:0", "--seq", "2048", "--batch-tokens", "128k"], "not a number of devices"),
        (["1b", "--cluster", "h100:8", "--seq", "2048", "--batch-tokens", "100"], "not whole rows"),
        (["1b", "--cluster", "h100:8", "--seq", "2048", "--batch-tokens", "0"], "not a number of tokens"),
        (["1b", "--cluster", "h100:8", "--seq", "-1", "--batch-tokens", "4k"], "not a length"),
        (
            ["1b", "--cluster", "h100:8", "--seq", "2048", "--batch-tokens", "128k", "--fix", "tp=8", "--max", "tp=4"],
            "exceeds",
        ),
        (
            ["1b", "--cluster", "h100:8", "--seq", "2048", "--batch-tokens", "128k", "--fix", "tp=3"],
            "no layout of 8 devices is legal",
        ),
        (["llama-3.1-70b", "--cluster", "h100:2", "--seq", "2048", "--batch-tokens", "16k"], "would do"),
    ],
)
def test_nonsense_is_refused_in_one_line(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_what_was_probed_is_read_back(tmp_path: Path) -> None:
    cluster = ClusterSpec("cpu", 2, 2, 10**9, {"launch": 2e-5}, {"1": {"launch": 3e-5}}, 0.002)
    cluster.save(tmp_path / "cluster.toml")
    assert ClusterSpec.parse(str(tmp_path / "cluster.toml")) == cluster
    assert explain.machine_of(cluster, 1).launch == 3e-5
    (tmp_path / "cluster.toml").write_text("device = 'cpu'\ncount = 0\n")
    with pytest.raises(InputError, match="count"):
        ClusterSpec.load(tmp_path / "cluster.toml")


def test_the_page_holds_every_plan(answered: Answer) -> None:
    text = plan_page.render(answered, "1b", [explain.why(answered, "tp=8")])
    data = json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])
    assert len(data["plans"]) == len(answered.ranked)
    for drawn, one in zip(data["plans"], answered.ranked, strict=True):
        assert drawn["layout"] == str(one.prediction.layout)
        assert [sum(held) for held in drawn["memory"]] == list(one.prediction.memory_bytes)
        ends = [end for *_, end in drawn["timeline"]["actions"]]
        assert max(ends) <= drawn["timeline"]["end"] * (1 + 1e-6)
