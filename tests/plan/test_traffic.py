"""Collectives against the dry run, call by call; those of axes that the runtime lacks against closed forms."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from plan.dry import FEW, MANY, Drawn

from fiveply.plan import traffic
from fiveply.plan.parts import Case
from fiveply.plan.software import load
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve

BYTES = 2  # of an activation in bf16


def assert_equal_calls(case: Drawn) -> None:
    assert case.calls() == {(c.axis, c.operation, c.bytes): c.count for c in case.dry.calls}


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_rank_calls_what_is_counted(case: Drawn) -> None:
    assert_equal_calls(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_ranks_call_what_is_counted(case: Drawn) -> None:
    assert_equal_calls(case)


def planned(model: str, layout: str) -> tuple[Case, Layout]:
    spec = ModelSpec.load(model)
    resolved = resolve(Layout.parse(layout), spec, sequence=4096, global_batch=64, runtime=False)
    return Case(spec, 4096), resolved


def calls(model: str, layout: str, part: str, axis: str) -> Counter[tuple[str, str, int]]:
    found: Counter[tuple[str, str, int]] = Counter()
    for one in traffic.part_traffic(*planned(model, layout), part):
        if one.axis == axis:
            found[one.operation, one.phase, one.bytes] += one.count
    return found


def test_gathering_keys_and_values_over_context_ranks() -> None:
    # Llama-3.1-8B: 8 key-value heads of 128; 2 rows of 4,096 tokens, of which a rank has a quarter.
    gathered = 2 * 4096 * 8 * 128 * BYTES
    found = calls("llama-3.1-8b", "dp=2,cp=4,micro_batch=2", "layers.3", "cp")
    # Once for keys, once for values; backward gathers them again and sums their gradients.
    assert found == {
        ("all-gather", "forward", gathered): 2,
        ("all-gather", "input", gathered): 2,
        ("reduce-scatter", "input", gathered): 2,
    }


def test_trading_tokens_for_heads() -> None:
    # 32 query and 8 key-value heads; a quarter of 4,096 tokens a rank.
    q, kv = 1024 * 32 * 128 * BYTES, 1024 * 8 * 128 * BYTES
    found = calls("llama-3.1-8b", "dp=2,cp=4,cp_kind=ulysses,micro_batch=1", "layers.3", "cp")
    assert found == {("all-to-all", phase, size): 2 for phase in ("forward", "input") for size in (q, kv)}


def test_dispatch_and_combination_of_experts() -> None:
    # Mixtral: 2 of 8 experts a token, hidden 4,096: a rank sends each of its 4,096 tokens twice, there and back.
    sent = 4096 * 2 * 4096 * BYTES
    found = calls("mixtral-8x7b", "dp=8,ep=8,micro_batch=1", "layers.0", "ep")
    assert found == {("all-to-all", "forward", sent): 2, ("all-to-all", "input", sent): 2}
    assert calls("mixtral-8x7b", "dp=8,ep=8,micro_batch=1,recompute=full", "layers.0", "ep") == {
        ("all-to-all", "forward", sent): 2,
        ("all-to-all", "input", sent): 4,
    }


def test_experts_split_over_tensor_ranks_gather_their_tokens() -> None:
    # Each of 4 tensor ranks routes a quarter of the tokens, and then computes a quarter of the columns for all of them.
    chosen = 4096 // 4 * 2 * 4096 * BYTES
    layout = "dp=8,tp=4,ep=8,etp=4,micro_batch=1"
    assert calls("mixtral-8x7b", layout, "layers.0", "ep")["all-to-all", "forward", chosen] == 2
    assert calls("mixtral-8x7b", layout, "layers.0", "etp") == {
        (operation, phase, 4 * chosen): 1
        for operation in ("all-gather", "reduce-scatter")
        for phase in ("forward", "input")
    }


def test_latent_attention_gathers_its_low_ranks() -> None:
    # DeepSeek-V3: queries of rank 1,536, keys and values of rank 512 beside 64 rotated columns; hidden 7,168.
    found = calls("deepseek-v3", "dp=4,tp=4,ep=4,etp=1,micro_batch=1", "layers.0", "tp")
    for rank in (1536, 512 + 64):
        assert found["all-gather", "forward", 4096 * rank * BYTES] == 1
        assert found["reduce-scatter", "input", 4096 * rank * BYTES] == 1
    # Its output and both ends of the dense MLP have the whole width.
    assert found["reduce-scatter", "forward", 4096 * 7168 * BYTES] == 2
    assert found["all-gather", "forward", 4096 * 7168 * BYTES] == 1


def test_gradients_of_experts_are_summed_over_the_ranks_that_hold_them() -> None:
    found = traffic.unit_step_traffic(*planned("mixtral-8x7b", "dp=16,ep=8,micro_batch=1"), "layers.0")
    by_axis = {one.axis: one for one in found}
    assert by_axis["dp"].size == 16
    assert by_axis["edp"].size == 2
    # One of 8 experts of three 4,096 x 14,336 matrices, in float32.
    assert by_axis["edp"].bytes == 3 * 4096 * 14336 * 4


def test_context_ranks_add_gradients_as_data_ranks_do() -> None:
    found = traffic.unit_step_traffic(*planned("llama-3.1-8b", "dp=4,cp=2,zero=1,micro_batch=1"), "layers.0")
    assert {(one.axis, one.operation, one.size) for one in found} == {
        ("shard", "reduce-scatter", 8),
        ("shard", "all-gather", 8),
    }


def test_a_system_that_gathers_inputs_again_calls_so() -> None:
    case, layout = planned("llama-3.1-8b", "dp=2,tp=4,micro_batch=1")
    kept = traffic.part_traffic(case, layout, "layers.0")
    system = msgspec.structs.replace(load("fiveply"), gathered_input=False)
    again = traffic.part_traffic(Case(case.spec, 4096, system), layout, "layers.0")
    gathers = [sum(c.count for c in found if c.operation == "all-gather") for found in (kept, again)]
    assert gathers == [4, 6]  # two forward and two backward; and the inputs of two pairs of products


def test_bytes_handed_on_are_one_ranks_part_of_the_stream() -> None:
    case, layout = planned("llama-3.1-8b", "dp=2,tp=4,pp=2,micro_batch=2")
    assert traffic.handed_on(case, layout) == 2 * 4096 * 4096 * BYTES // 4
    whole = msgspec.structs.replace(layout, sp=0)
    assert traffic.handed_on(case, whole) == 2 * 4096 * 4096 * BYTES
