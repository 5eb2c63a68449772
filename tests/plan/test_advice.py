"""What Megatron-LM arguments lead to, and the first plan that another system can run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fiveply import cli
from fiveply.plan import advice, dialects, explain, software
from fiveply.plan.dialects import megatron
from fiveply.plan.space import Limits
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.cluster import ClusterSpec
from fiveply.spec.errors import InputError

GIVEN = (
    "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --seq-length 4096 --max-position-embeddings 8192 --vocab-size 128256 --swiglu --bf16 "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--micro-batch-size 1 --global-batch-size 64"
)
CLUSTER = ClusterSpec("h100", 8)


def test_a_poor_layout_is_advised_against() -> None:
    given = megatron.read(f"{GIVEN} --tensor-model-parallel-size 8 --recompute-activations", 8)
    found = advice.advise(given, CLUSTER)
    assert found.best is not None
    assert found.best.prediction.seconds.p50 < found.now.prediction.seconds.p50
    assert any(change.startswith("drop --tensor-model-parallel-size 8") for change in found.changes)
    held = advice.advise(given, CLUSTER, Limits(fixed={"tp": 8}))
    assert not any("--tensor-model-parallel-size" in change for change in held.changes)
    values = advice.values(found)
    assert {"p10", "p50", "p90"} == set(values["given"]["step_seconds"])
    assert values["better"]["changes"] == list(found.changes)
    assert values["given"]["layout"].startswith("tp=8")


def test_ones_own_plan_is_not_advised_against() -> None:
    """Planned, written, read back: nothing is better."""
    given = megatron.read(GIVEN, 8)
    limits = Limits(among=dialects.choices("megatron"))
    found = explain.answer(
        given.spec, CLUSTER, sequence=4096, global_batch=64, limits=limits, system=software.load("megatron")
    )
    one, text, _ = advice.expressible("megatron", found, "")
    again = advice.advise(megatron.read(text), CLUSTER)
    assert again.now.prediction.seconds == one.prediction.seconds
    assert (again.best, again.changes) == (None, ())


def test_what_cannot_be_expressed_is_passed_over_and_named() -> None:
    found = explain.answer(ModelSpec.load("1b"), CLUSTER, sequence=4096, global_batch=64)
    first, second = found.ranked[:2]
    zb = msgspec.structs.replace(
        first.prediction, layout=msgspec.structs.replace(first.prediction.layout, schedule="zb")
    )
    mixed = msgspec.structs.replace(found, ranked=(msgspec.structs.replace(first, prediction=zb), second))
    one, text, comments = advice.expressible("megatron", mixed, "1b")
    assert one is second
    assert text.startswith("torchrun --nnodes 1 --nproc-per-node 8 pretrain_gpt.py")
    assert comments[0].startswith("A faster layout is passed over: Megatron-LM does not have schedule=zb")
    with pytest.raises(InputError, match="does not have schedule=zb"):
        advice.expressible("megatron", msgspec.structs.replace(mixed, ranked=mixed.ranked[:1]), "1b")


def test_another_number_of_ranks_is_refused() -> None:
    given = megatron.read(f"torchrun --nproc-per-node 4 pretrain_gpt.py {GIVEN}")
    with pytest.raises(InputError, match="the arguments are for 4 ranks, the cluster has 8; give h100:4"):
        advice.advise(given, CLUSTER)


def test_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        f"# my run\ntorchrun --nproc-per-node 8 pretrain_gpt.py \\\n {GIVEN} --tensor-model-parallel-size 8\n"
    )
    cli.main(["plan", "--cluster", "h100:8", "--explain-megatron", str(script)])
    shown = capsys.readouterr().out
    assert shown.startswith("Understood: tp=8")
    assert "  drop --tensor-model-parallel-size 8" in shown
    plan = [
        "plan",
        "1b",
        "--cluster",
        "h100:8",
        "--seq",
        "4096",
        "--batch-tokens",
        "256k",
        "--out",
        str(tmp_path / "run.plan"),
    ]
    cli.main([*plan, "--emit", "vllm"])
    streams = capsys.readouterr()
    assert streams.out.startswith("vllm serve 1b")
    assert "# A layout of training served" in streams.err
    with pytest.raises(SystemExit) as stop:
        cli.main([*plan, "--emit", "deepspeed", "--fix", "pp=2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
