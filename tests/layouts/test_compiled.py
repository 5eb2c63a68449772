"""Compiled blocks compute what plain ones do: one layout for each pair of axes.

torch.compile with tensor parallelism and sharding has been silently wrong elsewhere (gradients off by 100%). Ranks compile
by themselves, each in one thread: the pool of compiling processes that torch would share does not survive a fork.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import prover
import pytest
import torch
import torch._inductor.config as inductor
from prover import Case, assert_equal, on_ranks, one_process
from torch._dynamo.utils import counters

from fiveply.equality import Trace, compare
from fiveply.world.mesh import Transport

# torch's tracer looks at `.grad` of whatever a block takes.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# The two that failed elsewhere; with the others they are every pair of axes, and so every axis.
RISKY = ["dp=2,zero=3", "tp=2"]
OTHERS = [
    "dp=2,tp=2", "dp=2,pp=2,schedule=interleaved,stages=0+1+1+0", "tp=2,pp=2", "dp=2,zero=3,tp=2", "dp=2,zero=3,pp=2",
    "dp=2,zero=2,tp=2,sp=0,recompute=full", "dp=2,tp=2,recompute=selective,micro_batch=2",
]  # fmt: skip
# Two layers, since a block costs seconds to compile and one graph serves all of its kind.
SMALL = {
    "small": prover.model("llama", 24, 2, 4, 2, 61),
    "small-gpt2": prover.model(
        "gpt2", 24, 2, 4, 4, 61, norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True, gated_mlp=False,
        activation="gelu_tanh", rope=None, tied=True, dropout=0.1,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, small models, and a cache that ranks and layouts of this run share."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    for name, spec in SMALL.items():
        monkeypatch.setitem(prover.MODELS, name, spec)
    with inductor.patch(compile_threads=1):
        yield


def prove_compiled(cases: list[Case], transport: Transport) -> list[dict[str, Any]]:
    exact = {case: one_process(case) for case in cases}

    def judge(case: Case, trace: Trace) -> dict[str, Any]:
        graphs = counters["stats"]["unique_graphs"]
        limits = dict(counters.get("recompile_limit", {}))
        torch._dynamo.reset()
        counters.clear()
        return compare(trace, exact[case], dtype=case.dtype) | {"graphs": graphs, "limits": limits}

    return on_ranks(cases, judge, transport, timeout_seconds=300)


def check(cases: list[Case], transport: Transport) -> None:
    for case, result in zip(cases, prove_compiled(cases, transport), strict=True):
        assert_equal(case, result)
        assert result["graphs"] > 0, f"{case} was not compiled"
        assert not result["limits"], f"{case} fell back to plain code: {result['limits']}"


def test_compiled_blocks_sharded_and_tensor_parallel(transport: Transport) -> None:
    check([Case("small", layout, rows=8, compile=True) for layout in RISKY], transport)


@pytest.mark.slow
def test_compiled_blocks_under_pairs_of_axes(transport: Transport) -> None:
    check([Case("small", layout, rows=8, compile=True) for layout in OTHERS], transport)


@pytest.mark.slow
def test_compiled_blocks_with_dropout_biases_and_layer_norms(transport: Transport) -> None:
    check([Case("small-gpt2", layout, rows=8, compile=True) for layout in ("tp=2", "dp=2,zero=3")], transport)


@pytest.mark.slow
@pytest.mark.parametrize("layout", RISKY)
def test_compiled_blocks_in_bf16(layout: str, transport: Transport) -> None:
    prover.prove_near_float32(Case("small", layout, rows=8, dtype="float32", compile=True), transport)
