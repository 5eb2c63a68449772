"""Products and attention against the dry run, shape by shape; context, experts and latent attention against closed forms."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan.dry import FEW, MANY, Drawn

from fiveply.plan import software, workload
from fiveply.plan.workload import Case, Work, seen
from fiveply.spec.architecture import Experts, ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve


def counted_products(case: Drawn) -> Counter[tuple[int, ...]]:
    """Sizes in ascending order: some libraries compute a weight's gradient transposed."""
    found: Counter[tuple[int, ...]] = Counter()
    for work in case.works():
        for one in work.operations:
            if one.kind == "product":
                found[tuple(sorted(one.shape))] += one.count * case.micro_batches
    return found


def assert_equal_products(case: Drawn) -> None:
    made: Counter[tuple[int, ...]] = Counter()
    for m, n, k, count in case.dry.products:
        made[tuple(sorted((m, n, k)))] += count
    assert counted_products(case) == made
    flops = sum(o.flops * o.count for work in case.works() for o in work.operations if o.kind == "product")
    assert flops * case.micro_batches == case.dry.flops["products"]


def assert_equal_attention(case: Drawn) -> None:
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for work in case.works():
        for one in work.operations:
            if one.kind == "attention":
                phase = "forward" if one.phase == "forward" or one.again else "backward"
                rows, queries, keys, heads, kv_heads, size, _, _ = one.shape
                # torch's CPU kernel takes grouped heads in the forward as they are.
                found[phase, (rows, queries, keys, heads, kv_heads, size)] += case.micro_batches
    assert found == {(phase, tuple(shape)): count for phase, shape, count in case.dry.attention}


@pytest.mark.parametrize("case", FEW, ids=str)
def test_products_are_those_computed(case: Drawn) -> None:
    assert_equal_products(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_ranks_products_are_those_computed(case: Drawn) -> None:
    assert_equal_products(case)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_attention_is_that_computed(case: Drawn) -> None:
    assert_equal_attention(case)


def planned(model: str, layout: str, part: str, sequence: int = 4096, system: str = "fiveply") -> Work:
    spec = ModelSpec.load(model)
    resolved = resolve(Layout.parse(layout), spec, sequence=sequence, global_batch=64, runtime=False)
    return workload.work(Case(spec, sequence, software.load(system)), resolved, part)


def operations(work: Work, name: str, phase: str = "forward") -> list[tuple[int, ...]]:
    return [o.shape for o in work.operations if o.name == name and o.phase == phase]


@given(sequence=st.integers(1, 64), window=st.integers(0, 80))
def test_pairs_are_counted(sequence: int, window: int) -> None:
    width = window or sequence
    pairs = sum(1 for token in range(sequence) for key in range(token + 1) if token - key < width)
    assert seen(sequence, window) == pairs


def test_model_flops_are_six_a_weight_and_twelve_a_pair() -> None:
    spec, sequence = ModelSpec.load("llama-3.1-8b"), 8192
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    weights = 32 * layer + 4096 * 128256
    attention = 12 * 32 * 32 * 128 * (sequence * (sequence + 1) // 2)
    assert workload.model_flops(spec, sequence) == 6 * weights * sequence + attention


@given(tp=st.sampled_from((2, 4, 8)))
def test_tensor_ranks_share_the_products(tp: int) -> None:
    whole = planned("llama-3.1-8b", "dp=1,micro_batch=1", "layers.0").flops("forward")
    spec = ModelSpec.load("llama-3.1-8b")
    layout = resolve(Layout.parse(f"tp={tp},micro_batch=1"), spec, sequence=4096, global_batch=64)
    ranks = [workload.work(Case(spec, 4096), layout, "layers.0", rank).flops("forward") for rank in range(tp)]
    assert sum(ranks) == whole


def test_uneven_slices_and_a_head_held_twice() -> None:
    spec = msgspec.structs.replace(ModelSpec.load("llama-3.1-8b"), ffn=14335, kv_heads=2)
    layout = Layout(tp=4, stages=(32,), micro_batch=1)
    first, last = (workload.work(Case(spec, 4096), layout, "layers.0", rank) for rank in (0, 3))
    assert operations(first, "gate") == [(4096, 3584, 4096)]
    assert operations(last, "gate") == [(4096, 3583, 4096)]
    # Two key-value heads for four tensor ranks: each holds one of them whole.
    assert operations(first, "k") == [(4096, 128, 4096)]


def test_recomputation_runs_forward_again_and_keeps_the_input() -> None:
    none = planned("llama-3.1-8b", "micro_batch=1", "layers.0")
    full = planned("llama-3.1-8b", "micro_batch=1,recompute=full", "layers.0")
    assert full.kept_bytes == 4096 * 4096 * 2
    again = sum(o.flops for o in full.operations if o.again)
    assert again == none.flops("forward")
    selective = planned("llama-3.1-8b", "micro_batch=1,recompute=selective", "layers.0")
    assert [o.name for o in selective.operations if o.again] == ["attention"]
    assert none.kept_bytes - selective.kept_bytes == 32 * 4096 * 4  # one number a query and head


def test_context_ranks_share_tokens_and_pairs() -> None:
    whole = planned("llama-3.1-8b", "micro_batch=1", "layers.0")
    for kind, heads, queries in (("gather", 32, 1024), ("ulysses", 8, 4096)):
        part = planned("llama-3.1-8b", f"cp=4,cp_kind={kind},micro_batch=1", "layers.0")
        (shape,) = operations(part, "attention")
        assert (shape[1], shape[2], shape[3]) == (queries, 4096, heads)
        assert 4 * part.flops("forward") == whole.flops("forward")
        assert 4 * part.kept_bytes == whole.kept_bytes


def test_experts_compute_the_chosen_tokens() -> None:
    # Mixtral: each of 4,096 tokens goes to 2 of 8 experts; a rank of 8 holds one, and gets 8,192 rows from all ranks.
    work = planned("mixtral-8x7b", "dp=8,ep=8,micro_batch=1", "layers.0")
    assert operations(work, "expert gate") == [(1, 8192, 14336, 4096)]
    assert operations(work, "expert down", "weight") == [(1, 4096, 14336, 8192)]
    assert operations(work, "router") == [(4096, 8, 4096)]
    experts = sum(o.flops for o in work.operations if o.kind == "grouped" and o.phase == "forward")
    assert experts == 2 * 8192 * 3 * 4096 * 14336
    # All experts on one rank do the same work, in smaller products.
    alone = planned("mixtral-8x7b", "micro_batch=1", "layers.0")
    assert operations(alone, "expert gate") == [(8, 1024, 14336, 4096)]
    assert sum(o.flops for o in alone.operations if o.kind == "grouped" and o.phase == "forward") == experts


def test_experts_over_tensor_ranks() -> None:
    # Split like an MLP, a rank computes a quarter of the columns for all tokens; else all columns for a quarter of them.
    split = planned("mixtral-8x7b", "dp=8,tp=4,ep=8,etp=4,micro_batch=1", "layers.0")
    whole = planned("mixtral-8x7b", "dp=8,tp=4,ep=8,etp=1,micro_batch=1", "layers.0")
    assert operations(split, "expert up") == [(1, 8192, 3584, 4096)]
    assert operations(whole, "expert up") == [(1, 2048, 14336, 4096)]


def test_latent_attention_by_hand() -> None:
    # DeepSeek-V3: 128 heads, of 128 columns and 64 rotated ones, values of 128; low ranks 1,536 and 512.
    work = planned("deepseek-v3", "micro_batch=1", "layers.0")
    assert operations(work, "q_a") == [(4096, 1536, 7168)]
    assert operations(work, "kv_a") == [(4096, 512 + 64, 7168)]
    assert operations(work, "q_b") == [(4096, 128 * 192, 1536)]
    assert operations(work, "kv_b") == [(4096, 128 * 256, 512)]
    assert operations(work, "o") == [(4096, 7168, 128 * 128)]
    (shape,) = operations(work, "attention")
    assert shape == (1, 4096, 4096, 128, 128, 192, 128, 0)
    (attention,) = (o.flops for o in work.operations if o.name == "attention" and o.phase == "forward")
    assert attention == 2 * 128 * (192 + 128) * (4096 * 4097 // 2)


def test_a_layer_that_predicts_a_further_token_has_a_head_of_its_own() -> None:
    spec = ModelSpec.load("deepseek-v3")
    predicting = planned("deepseek-v3", "micro_batch=1", f"layers.{spec.layers}")
    last = planned("deepseek-v3", "micro_batch=1", f"layers.{spec.layers - 1}")
    head = planned("deepseek-v3", "micro_batch=1", "head")
    joining = 2 * 4096 * 7168 * 2 * 7168
    assert predicting.flops("forward") == last.flops("forward") + head.flops("forward") + joining


def test_windows_bound_attention_and_sinks_add_nothing_to_it() -> None:
    # GPT-OSS: every second layer sees 128 tokens.
    spec = ModelSpec.load("gpt-oss-120b")
    layout = resolve(Layout.parse("micro_batch=1"), spec, sequence=4096, global_batch=64, runtime=False)
    flops = {
        layer in spec.window_layers: next(
            o.flops
            for o in workload.work(Case(spec, 4096), layout, f"layers.{layer}").operations
            if o.name == "attention" and o.phase == "forward"
        )
        for layer in (0, 1)
    }
    assert flops == {True: 4 * 64 * 64 * seen(4096, 128), False: 4 * 64 * 64 * seen(4096, 0)}
    without = msgspec.structs.replace(spec, sinks=False)
    backward = [workload.work(Case(one, 4096), layout, "layers.0").flops("input") for one in (spec, without)]
    assert backward[0] == backward[1]


def test_equal_kinds_have_equal_work() -> None:
    spec = ModelSpec.load("gpt-oss-120b")
    kinds = workload.kinds(spec)
    assert list(kinds) == ["embed", *(f"layers.{layer}" for layer in range(36)), "norm", "head"]
    assert len(set(kinds.values())) == 5
    assert kinds["layers.0"] == kinds["layers.2"] != kinds["layers.1"]


def test_a_system_that_keeps_logits_has_one_product_of_the_head_forward() -> None:
    work = planned("llama-3.1-8b", "micro_batch=1", "head", system="megatron")
    assert [o.shape for o in work.operations if o.kind == "product" and o.phase == "forward"] == [(4096, 128256, 4096)]
    ours = planned("llama-3.1-8b", "micro_batch=1", "head")
    assert ours.flops("forward") == 3 * work.flops("forward")
    assert ours.flops("input") == ours.flops("weight") == 0


def test_saving_every_second_product() -> None:
    """torchtitan's selective recomputation: outputs of products 1, 3, 5 ... and of attention are kept."""
    work = planned("llama-3.1-8b", "micro_batch=1,recompute=selective", "layers.0", system="torchtitan")
    again = {o.name for o in work.operations if o.again}
    assert {"k", "o", "up", "rotary", "activation", "input_norm"} <= again
    assert not {"q", "v", "gate", "down", "attention"} & again
    assert {kept.name for kept in work.kept} == {
        "input", "q output", "v output", "gate output", "down output", "attention output", "log-sum",
    }  # fmt: skip


def small() -> ModelSpec:
    """One gated layer."""
    sizes = {"vocabulary": 512, "hidden": 128, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256}
    return msgspec.structs.replace(ModelSpec.load("llama-3.1-8b"), **sizes)


def test_a_quantised_input_is_kept_as_it_is_multiplied() -> None:
    spec = small()
    layout = resolve(Layout(micro_batch=1), spec, sequence=64, global_batch=1)
    quantising = software.load("nemo", "2025-02")
    casting = msgspec.structs.replace(quantising, keeps_quantised=False)
    kept = {
        (precision, system.keeps_quantised): workload.work(
            Case(spec, 64, system, precision), layout, "layers.0"
        ).kept_bytes
        for precision in ("bf16", "fp8")
        for system in (quantising, casting)
    }
    assert kept["bf16", True] == kept["bf16", False] == kept["fp8", False]
    one, scales = 64, 1 / 32
    inputs = one * (128 + 128 + 256)  # of the attention, of the MLP, of the down product
    output = one * 128  # attention keeps its own in 16 bits, and the product after it a copy
    assert kept["bf16", True] - kept["fp8", True] == inputs * (1 - scales) - output * (1 + scales)


def test_the_gradients_of_chances_need_what_they_scaled() -> None:
    experts = Experts(count=4, per_token=2, ffn=64, layers=(0,))
    spec = msgspec.structs.replace(small(), experts=experts)
    layout = resolve(Layout(micro_batch=1), spec, sequence=64, global_batch=1, runtime=False)

    def kept(model: ModelSpec, system: str) -> dict[str, int]:
        counted = workload.work(Case(model, 64, software.load(system)), layout, "layers.0")
        return {one.name: one.bytes for one in counted.kept}

    plain = msgspec.structs.replace(spec, gated_mlp=False, activation="gelu")
    assert kept(spec, "torchtitan")["expert output"] == 64 * 2 * 128 * 2
    assert kept(plain, "megatron")["unscaled activation"] == 64 * 2 * 64 * 2
    assert not {"expert output", "unscaled activation"} & kept(spec, "megatron").keys()
