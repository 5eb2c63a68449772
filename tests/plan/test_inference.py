"""Serving predicted: closed forms, memory, queueing, the bound kept, the score and the commands."""

import csv
import itertools
import json
import math
import re
from pathlib import Path

import msgspec
import pytest

from fiveply import cli, service
from fiveply.plan import inference, inference_score, machine, serving, software
from fiveply.plan.inference import Latency, Load, Served
from fiveply.plan.serving import Bound
from fiveply.serve import messages
from fiveply.serve.driver import Settings
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.placement import declare
from fiveply.spec.plan import Plan
from fiveply.train import auto

LLAMA, DEEPSEEK = ModelSpec.load("llama-3.1-8b"), ModelSpec.load("deepseek-v3")
H100 = ClusterSpec("h100", 8)
LOAD = Load(1024, 256)


def served(spec: ModelSpec = LLAMA, precision: str = "bf16", cache: float = 2, device: str = "h100") -> Served:
    plain = msgspec.structs.replace(software.load("vllm"), serving=software.Serving())
    return Served(spec, machine.load(device), plain, precision, cache)


def layout(text: str, spec: ModelSpec = LLAMA) -> Layout:
    return resolve(Layout.parse(text), spec, sequence=1, global_batch=Layout.parse(text).dp, runtime=False)


ONE = layout("sp=0")


def matrices(spec: ModelSpec) -> int:
    """Elements of all matrices that a token is multiplied by."""
    return sum(math.prod(p.shape) for p in declare(spec) if len(p.shape) == 2 and p.unit != "embed")


def test_one_request_waits_for_the_weights_to_stream() -> None:
    one = served()
    streamed = 2 * matrices(LLAMA) / (one.machine.bandwidth * one.machine.product("bf16").memory)
    assert inference.decode(one, ONE, 1, 1)["products"] == pytest.approx(streamed, rel=0.01)
    assert inference.decode(one, layout("tp=4,sp=0"), 1, 1)["products"] == pytest.approx(streamed / 4, rel=0.02)


def test_the_cache_is_read_once_a_token() -> None:
    one = served()
    token = 32 * 2 * 8 * 128 * 2
    assert inference.cache_bytes(one, ONE) == token == 131072
    read = 64 * 3000 * token / (one.machine.bandwidth * one.machine.product("bf16").memory)
    assert inference.decode(one, ONE, 64, 3000)["attention"] == pytest.approx(read, rel=0.01)
    assert inference.cache_bytes(one, layout("tp=4,pp=2,stages=16+16,sp=0")) == token / 8
    assert inference.cache_bytes(one, layout("tp=16,sp=0")) == token / 8  # copied heads


def test_latent_attention_keeps_its_ranks_whole_on_every_tensor_rank() -> None:
    one = served(DEEPSEEK, "fp8", 1)
    assert inference.cache_bytes(one, layout("tp=8,etp=8,sp=0", DEEPSEEK)) == 61 * (512 + 64)


def test_a_window_bounds_what_is_read() -> None:
    spec = msgspec.structs.replace(LLAMA, window=128, window_layers=tuple(range(32)))
    short, long = (inference.decode(served(spec), ONE, 8, context) for context in (128, 4096))
    assert short["attention"] == long["attention"]


def test_only_chosen_experts_are_read() -> None:
    one, whole = served(DEEPSEEK, "fp8", 1), layout("tp=8,etp=8,sp=0", DEEPSEEK)
    seconds = {rows: inference.decode(one, whole, rows, 1)["experts"] for rows in (1, 2, 16, 512)}
    assert seconds[1] < seconds[2] < 2.01 * seconds[1]
    every = seconds[1] * 256 / 8
    assert seconds[16] == pytest.approx(every * (1 - (1 - 8 / 256) ** 16), rel=0.05)
    assert every < seconds[512] < 1.1 * every


def test_weights_are_all_parameters_in_their_precision() -> None:
    elements = sum(math.prod(p.shape) for p in declare(LLAMA))
    assert inference.weight_bytes(served(), ONE) == 2 * elements
    quantised = inference.weight_bytes(served(precision="fp8"), ONE)
    embedded = 2 * 2 * LLAMA.vocabulary * LLAMA.hidden  # embedding and head stay in 16 bits
    assert embedded + (elements - embedded / 2) < quantised < embedded + 1.01 * (elements - embedded / 2)
    assert inference.weight_bytes(served(), layout("tp=8,sp=0")) == pytest.approx(2 * elements / 8, rel=0.01)


def test_memory_holds_what_is_left() -> None:
    one = served()
    room = (one.machine.memory_bytes - one.machine.workspace_bytes - inference.weight_bytes(one, ONE)) * 0.85
    assert inference.held_requests(one, ONE, LOAD) == int(room / 131072 / 16) // 80
    large = ModelSpec.load("llama-3.1-70b")
    assert inference.held_requests(served(large), layout("sp=0", large), LOAD) == 0


def test_what_the_engine_says_of_blocks_and_chunks() -> None:
    assert (messages.BLOCK, Settings().step_tokens) == (inference.BLOCK, inference.CHUNK)


@pytest.mark.parametrize("text", ["sp=0", "tp=4,sp=0", "pp=4", "tp=2,pp=2,sp=0"])
def test_more_requests_and_longer_ones_never_make_a_token_quicker(text: str) -> None:
    one, here = served(), layout(text)
    times = [inference.closed(one, here, LOAD, requests) for requests in (1, 2, 3, 8, 32, 33, 128)]
    assert all(a.tpot < b.tpot and a.ttft < b.ttft for a, b in itertools.pairwise(times))
    assert inference.closed(one, here, Load(4096, 256), 32).tpot > times[4].tpot
    for latency in times:
        assert sum(latency.terms.values()) == pytest.approx(latency.tpot)


def test_prompts_and_answers_share_the_ranks() -> None:
    """The period of a client holds its own service, the prompts of all others, and its tokens' steps in what is left."""
    one, requests = served(), 64
    found = inference.closed(one, ONE, LOAD, requests)
    step = found.tpot - found.terms["prefill"]
    period = found.ttft - found.waiting + LOAD.output * found.tpot
    busy = (requests - 1) * inference.prefill(one, ONE, LOAD.prompt) / period
    assert found.tpot == pytest.approx(step / (1 - busy))
    assert inference.closed(one, ONE, LOAD, 1).terms["prefill"] == 0


def test_a_pipeline_of_one_request_is_its_stages_one_after_another() -> None:
    one, cut = served(), layout("pp=4")
    whole, parts = inference.decode(one, ONE, 1, 1000), inference.decode(one, cut, 1, 1000)
    assert parts["products"] == pytest.approx(whole["products"])
    assert parts["transfers"] > 0
    full = inference.decode(one, cut, 4, 1000)  # four cohorts: each stage is busy, and the slowest sets the pace
    assert sum(full.values()) < 2 * sum(parts.values())


def test_waiting_is_what_queueing_theory_says() -> None:
    assert inference.many_servers(0.5, 1.0, 1, variation=1.0) == pytest.approx(1.0)  # M/M/1: rho / (1 - rho)
    assert inference.many_servers(0.5, 1.0, 1) == pytest.approx(inference.one_server(0.5, 1.0)) == pytest.approx(0.5)
    assert inference.many_servers(1.0, 1.0, 2, variation=1.0) == pytest.approx(1 / 3)  # Erlang's C of 2 servers is 1/3
    assert inference.many_servers(2.0, 1.0, 2) == math.inf == inference.one_server(1.0, 1.0)


def test_arrivals_obey_littles_law() -> None:
    one = served()
    found = inference.opened(one, ONE, LOAD, 2.0, 200)
    assert isinstance(found, Latency)
    stay = found.ttft - found.waiting + LOAD.output * found.tpot
    assert found.requests - 1 < 2.0 * stay <= found.requests
    assert inference.opened(one, ONE, LOAD, 1000.0, 200) is None
    busier = inference.opened(one, ONE, LOAD, 8.0, 200)
    assert busier is not None
    assert busier.waiting > found.waiting
    assert busier.tpot > found.tpot


@pytest.mark.parametrize(
    "bound", [Bound(0.5, 0.03), Bound(0.06, 0.03), Bound(0.5, 0.012), Bound(0.5, 0.03, 10.0), Bound()]
)
def test_every_choice_keeps_the_bound_and_one_request_more_does_not(bound: Bound) -> None:
    found = serving.answer(LLAMA, H100, LOAD, bound)
    assert found.ranked
    for one in found.ranked:
        assert one.latency.ttft <= bound.ttft
        assert one.latency.tpot <= bound.tpot
        assert one.memory_bytes <= one.capacity
        assert one.layout.world <= 8
        system = serving.served_on(LLAMA, H100, one.layout.world, "bf16")
        replica = msgspec.structs.replace(one.layout, dp=1)
        more = inference.closed(system, replica, LOAD, one.requests + 1)
        match one.limit:
            case "ttft":
                assert more.ttft > bound.ttft
            case "tpot":
                assert more.tpot > bound.tpot
            case "memory":
                assert inference.held_requests(system, replica, LOAD) == one.requests
            case _:
                assert one.requests == inference.PLACES


def test_tighter_bounds_answer_less_and_slower_arrivals_need_fewer_devices() -> None:
    loose, tight = (serving.answer(LLAMA, H100, LOAD, Bound(tpot=tpot)).ranked[0] for tpot in (0.05, 0.012))
    assert loose.tokens_per_second > tight.tokens_per_second
    few, many = (serving.answer(LLAMA, H100, LOAD, Bound(1.0, 0.03, rate)).ranked[0] for rate in (1.0, 60.0))
    assert few.devices == 1 < many.devices
    assert few.tokens_per_second == LOAD.output


def test_what_can_only_be_planned_is_marked() -> None:
    found = serving.answer(DEEPSEEK, ClusterSpec("h200", 8), LOAD, Bound(), precision="fp8")
    assert {one.layout.ep for one in found.ranked} == {1, 2, 4, 8}
    assert all("experts" in one.refusal for one in found.ranked)
    with pytest.raises(InputError, match="no layout is legal"):
        serving.answer(DEEPSEEK, ClusterSpec("h200", 8), LOAD, Bound(), precision="fp8", runnable=True)
    with pytest.raises(InputError, match="does not fit on h100:1"):
        serving.answer(ModelSpec.load("llama-3.1-70b"), ClusterSpec("h100", 1), LOAD, Bound())
    with pytest.raises(InputError, match="positions"):
        serving.answer(LLAMA, H100, Load(131072, 1), Bound())


ASKED = ["plan", "llama-3.1-8b", "--cluster", "h100:8", "--serve", "--prompt", "1024", "--output", "256"]


def test_the_command_writes_a_plan_that_serve_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main([*ASKED, "--ttft", "0.5", "--tpot", "0.03", "--why", "tp=8", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    best = found["plans"][0]
    assert best["tokens_per_second"] == max(one["tokens_per_second"] for one in found["plans"])
    assert best["tokens_per_second_per_device"] == pytest.approx(best["tokens_per_second"] / best["devices"])
    assert best["tpot_seconds"] <= 0.03
    assert "ms a token" in found["why"]["tp=8"]
    assert "wrote run.plan" in printed.err
    plan = Plan.load("run.plan")
    assert (plan.layout, plan.requests, plan.sequence) == (best["layout"], best["requests"], 1280)

    seen: list[object] = []
    monkeypatch.setattr(service.Served, "load", lambda *given: seen.append(given))
    monkeypatch.setattr(service, "serve", lambda served, settings, **_: seen.append(settings.most_running))
    cli.main(["serve", "model", "--plan", "run.plan"])
    assert seen == [("model", plan.layout, "auto", 0, "auto", "none"), plan.requests]
    cli.main(["serve", "model", "--plan", "run.plan", "--most-running", "3"])
    assert seen[-1] == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tpot", "0.0001"], "no layout keeps the bound: alone, a request takes at least"),
        (
            ["--ttft", "0.5", "--tpot", "0.03", "--rate", "1e6"],
            "1e\\+06 requests a second are more than h100:8 answers",
        ),
        (["--seq", "128"], "--seq is not for plans of --serve"),
        (["--ttft", "-1"], "--ttft: -1.0 is no bound"),
        (["--fix", "tp=7"], "no layout is legal"),
    ],
)
def test_the_command_says_what_is_wrong(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*ASKED, *more])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error)


def test_serve_takes_a_plan_or_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "model", "--plan", "run.plan", "--layout", "tp=2"])
    assert "both --plan and --layout" in capsys.readouterr().err


def test_auto_plans_for_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(auto, "cluster", lambda: ClusterSpec("h100", 4))
    found = service.planned(ModelSpec.load("llama-3.1-70b"), "bfloat16")
    assert found.world <= 4
    assert found.tp * found.pp > 1  # 141 GB of weights
    said = capsys.readouterr().err
    assert said.startswith("fiveply: planned for h100:4: ")
    assert said.count("\n") == 1


ROW = {
    "source": "s", "model": "meta-llama/Llama-3.1-70B", "gpu": "b200_sxm", "num_gpus": 1, "backend": "trtllm", "precision": "fp8",
    "mode": "agg", "isl": 1024, "osl": 8192, "concurrency": 64, "tp": 1, "pp": 1, "dp_attention": 1, "moe_tp": 1, "moe_ep": 1,
    "tpot_ms": 24.5879,
}  # fmt: skip
"""As published in aiconfigurator's silicon_sample.csv, 2025-10-29."""


def test_the_score_knows_its_table_and_says_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.csv"
    changes = [
        {}, {"tpot_ms": ""}, {"mode": "disagg"}, {"model": "zhipuai/GLM-5"}, {"num_gpus": 4}, {"tp": 16, "num_gpus": 16},
        {"tp": 7, "num_gpus": 7}, {"concurrency": 100000}, {}, {"concurrency": 8, "tpot_ms": 6.1}, {"isl": "many"},
    ]  # fmt: skip
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(ROW))
        writer.writeheader()
        writer.writerows(ROW | change for change in changes)
    assert inference_score.is_table(file)
    assert not inference_score.is_table(tmp_path / "none.csv")
    cli.main(["bench", "plan", "--table", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["tpot"]["n"]) == (11, 2)
    reasons = {skip["row"]: skip["reason"] for skip in found["skipped"]}
    for row, word in ((2, "no time"), (3, "disaggregated"), (4, "GLM"), (5, "contradict"), (6, "leave the fast links"),
                      (7, "tp=7 does not divide"), (8, "memory holds"), (9, "repeats"), (11, "isl")):  # fmt: skip
        assert word in reasons[row]
    first = found["predictions"][0]
    assert first["measured_seconds"] == pytest.approx(24.5879e-3)
    assert first["predicted_seconds"] == pytest.approx(first["measured_seconds"], rel=0.15)
    assert found["by_source"] == {"llama-3.1-70b on b200, trtllm, fp8": found["tpot"]}
    cli.main(["bench", "plan", "--table", str(file)])
    shown = capsys.readouterr().out
    assert "11 rows, 9 skipped" in shown
    assert "time per output token" in shown
