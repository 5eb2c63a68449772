"""Every rule of legality refuses with its arithmetic; what is legal comes back with every default filled."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.spec.architecture import Experts, Latent, ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import CHOICES, Layout, Layouts, divisors
from fiveply.spec.legality import balanced_stages, check_runnable, head_cost, legal, resolve

SIZES: dict[str, Any] = {
    "family": "llama", "vocabulary": 1003, "hidden": 72, "layers": 7, "heads": 9, "kv_heads": 3, "head_dim": 8, "ffn": 131,
    "positions": 512,
}  # fmt: skip


def model(**changed: Any) -> ModelSpec:
    return ModelSpec(**SIZES | changed)


def resolved(text: str, sequence: int = 64, global_batch: int = 24, **changed: Any) -> Layout:
    return resolve(Layout.parse(text), model(**changed), sequence=sequence, global_batch=global_batch)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [  # layout, model and batch, key, the whole of the message
    ("tp=2", {}, "tp", "tp=2 does not divide 9 heads; tp in {1, 3, 9} does"),
    ("tp=4", {"heads": 12}, "tp",
     "tp=4 neither divides 3 key-value heads nor is a multiple of them; tp in {1, 3, 6, 12} is legal"),
    ("tp=8", {"heads": 12, "kv_heads": 4}, "tp", "tp=8 does not divide 12 heads; tp in {1, 2, 4, 12} does"),
    ("dp=1,recompute=full", {"attention_dropout": 0.1}, "recompute",
     "dropout inside attention would draw another mask when recomputed; leave recompute out, or set the model's attention "
     "dropout to 0"),
    ("tp=9", {"ffn": 8}, "tp", "tp=9 exceeds the MLP's 8 columns or 1003 tokens; lower tp"),
    ("tp=9", {"vocabulary": 5}, "tp", "tp=9 exceeds the MLP's 131 columns or 5 tokens; lower tp"),
    ("pp=2,stages=4+4", {}, "stages", "stages 4+4 = 8 layers, the model has 7; make them add up, or leave stages out"),
    ("pp=4,stages=7+7+7+7", {"layers": 30}, "stages",
     "stages 7+7+7+7 = 28 layers, the model has 30; make them add up, or leave stages out"),
    ("pp=3,stages=4+0+3", {}, "stages", "a stage in the middle holds no layer; give it one, or lower pp"),
    ("pp=8", {}, "pp", "pp=8 x 1 chunks = 8 stages, the model has 7 layers; at most 7 stages"),
    ("pp=4,schedule=zbv", {}, "pp", "pp=4 x 2 chunks = 8 stages, the model has 7 layers; at most 7 stages"),
    ("cp=2", {}, "cp", "cp=2 cannot be run yet; leave cp out"),
    ("ep=2,dp=2", {}, "ep", "ep=2 needs a model with experts; leave ep out"),
    ("etp=2", {}, "etp", "etp=2 needs a model with experts; leave etp out"),
    ("offload=optimizer", {}, "offload", "offload=optimizer cannot be run yet; leave offload out"),
    ("offload=activations", {}, "offload", "offload=activations cannot be run yet; leave offload out"),
    ("dp=2", {"attention_dropout": 0.1}, "attention_dropout",
     "dropout inside attention (0.1) is not keyed by token, so it would differ by layout; set it to 0 in config.json, "
     "or run on one rank"),
    ("dp=1", {"sequence": 513}, "data.sequence",
     "sequence 513 is longer than the model's 512 positions; give at most 512"),
    ("dp=1", {"sequence": 0}, "", "sequence 0 and global_batch 24 must be 1 or more; give whole numbers from 1"),
    ("dp=1", {"global_batch": 0}, "", "sequence 64 and global_batch 0 must be 1 or more; give whole numbers from 1"),
    ("dp=5", {}, "dp", "dp=5 does not divide a global batch of 24 rows; dp in [1, 2, 3, 4, 6, 8, 12, 24] does"),
    ("dp=2,micro_batch=5", {}, "micro_batch",
     "micro_batch=5 does not divide the 12 rows of a replica; one of [1, 2, 3, 4, 6, 12] does"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "changed", "key", "message"), REFUSED)
def test_refused_with_the_arithmetic(text: str, changed: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolved(text, **changed)
    assert str(caught.value) == f"layout: {key}: {message}" if key else f"layout: {message}"
    assert caught.value.key == key


MIXTURE = Experts(count=6, per_token=2, ffn=37, layers=(0, 1, 2))
UNPLANNED: list[tuple[str, dict[str, Any], str, str]] = [  # what not even the planner takes
    ("ep=4,dp=4", {}, "ep", "ep=4 does not divide 6 experts; one of [1, 2, 3, 6] does"),
    ("ep=2,etp=2,tp=3", {}, "etp", "etp=2 does not divide tp=3; one of [1, 3] does"),
    ("ep=2,tp=3", {}, "ep",
     "ep=2 does not divide dp x cp x tp / etp = 1 x 1 x 3 / 3 = 1; make dp or cp a multiple of it, or set etp=1"),
    ("ep=6,dp=2,tp=9,etp=9", {}, "ep",
     "ep=6 does not divide dp x cp x tp / etp = 2 x 1 x 9 / 9 = 2; make dp or cp a multiple of it, or set etp=1"),
    ("tp=9", {"experts": msgspec.structs.replace(MIXTURE, ffn=8)}, "etp",
     "etp=9 exceeds an expert's 8 columns; lower etp"),
    ("cp=2,cp_kind=ulysses", {}, "cp_kind",
     "tp x cp = 1 x 2 = 2 does not divide 9 heads; set cp_kind=gather, or lower cp"),
    ("cp=33", {}, "cp", "cp=33 cuts a sequence of 64 into 66 pieces; cp at most 32"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "changed", "key", "message"), UNPLANNED)
def test_the_planner_refuses_with_the_arithmetic(text: str, changed: dict[str, Any], key: str, message: str) -> None:
    spec = model(**{"experts": MIXTURE} | changed)
    with pytest.raises(InputError) as caught:
        resolve(Layout.parse(text), spec, sequence=64, global_batch=24, runtime=False)
    assert str(caught.value) == f"layout: {key}: {message}"


@pytest.mark.parametrize(
    "text", ["cp=32", "tp=3,cp=3,cp_kind=ulysses", "ep=6,dp=2,tp=3,etp=1", "ep=3,dp=3,tp=9", "offload=optimizer"]
)
def test_the_planner_takes_what_cannot_be_run_yet(text: str) -> None:
    spec = model(experts=MIXTURE)
    full = resolve(Layout.parse(text), spec, sequence=64, global_batch=24, runtime=False)
    assert resolve(full, spec, sequence=64, global_batch=24, runtime=False) == full
    assert full.world == full.ep * full.expert_tensor * full.expert_data * full.pp
    with pytest.raises(InputError, match="routed experts cannot be run yet; it can be planned"):
        resolve(full, spec, sequence=64, global_batch=24)


def test_models_that_cannot_be_run_yet_say_why() -> None:
    latent = Latent(q_rank=24, kv_rank=20, nope_dim=6, rope_dim=2, value_dim=7)
    with pytest.raises(InputError) as caught:
        check_runnable(model(latent=latent, sinks=True, predicted=2), "x.json")
    assert str(caught.value) == (
        "x.json: llama: latent attention and attention sinks and multi-token prediction cannot be run yet; it can be "
        "planned; give it to `fiveply plan`, or take a dense model"
    )
    check_runnable(model())


def _taken(layout: Layout, spec: ModelSpec, batch: int) -> bool:
    try:
        resolve(layout, spec, sequence=16, global_batch=batch, runtime=False)
    except InputError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_arrays_are_judged_as_layouts_are_one_by_one(data: st.DataObject) -> None:
    """One statement of each rule serves both."""
    spec = model(experts=data.draw(st.sampled_from([None, MIXTURE])), layers=data.draw(st.integers(1, 8)))
    batch, draw = data.draw(st.sampled_from([6, 8, 24])), data.draw
    drawn: dict[str, st.SearchStrategy[Any]] = {key: st.integers(0, 4) for key in ("dp", "pp", "cp", "ep")} | {
        "tp": st.sampled_from([0, 1, 2, 3, 9]), "zero": st.integers(-1, 4), "dp_shard": st.integers(-1, 4), "sp": st.integers(-2, 2),
        "vp": st.integers(-1, 3), "micro_batch": st.integers(-1, 5), "etp": st.integers(-1, 3),
        "schedule": st.sampled_from(CHOICES["schedule"]), "cp_kind": st.sampled_from(CHOICES["cp_kind"]),
        "offload": st.sampled_from(CHOICES["offload"]),
    }  # fmt: skip
    usual = {"dp": 2, "pp": 1, "cp": 1, "ep": 1, "tp": 3, "zero": 1, "schedule": "1f1b"}
    odd = draw(st.sets(st.sampled_from(sorted(drawn)), max_size=4))
    rows = [{**usual, **{key: draw(drawn[key]) for key in odd}} for _ in range(20)]
    degrees = ("dp", "tp", "pp", "cp", "ep")
    rows = [row for row in rows if min(row[key] for key in degrees) >= 1]  # arrays hold degrees
    if not rows:
        return
    mask = legal(
        Layouts(**{key: np.array([row[key] for row in rows]) for key in rows[0]}), spec, sequence=16, global_batch=batch
    )
    assert mask.tolist() == [_taken(Layout(**row), spec, batch) for row in rows]


def test_arrays_broadcast() -> None:
    mask = legal(Layouts(dp=np.array([1, 2, 5]), tp=np.array([[1], [3], [4]])), model(), sequence=64, global_batch=24)
    assert mask.tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    with pytest.raises(TypeError, match="not keys of a layout: depth"):
        Layouts(depth=3)
    with pytest.raises(InputError, match="sequence 513"):
        legal(Layouts(), model(), sequence=513, global_batch=24)


def test_a_layout_that_was_never_text_is_checked_too() -> None:
    with pytest.raises(
        InputError, match=r"^layout: dp_shard: dp_shard=4 does not divide dp=6; give one of \[1, 2, 3, 6\]$"
    ):
        resolve(Layout(dp=6, zero=1, dp_shard=4), model(), sequence=64, global_batch=24)


def test_where_is_named() -> None:
    with pytest.raises(InputError, match=r"^--against: tp: tp=2 does not divide 9 heads; tp in \{1, 3, 9\} does$"):
        resolve(Layout(tp=2), model(), sequence=64, global_batch=24, where="--against")


def test_attention_dropout_runs_alone() -> None:
    assert resolved("dp=1,zero=1", attention_dropout=0.1).world == 1


@pytest.mark.parametrize(("stages", "layers"), [((0, 7), 7), ((4, 3, 0), 7), ((0, 7, 0), 7)])
def test_the_ends_may_hold_no_layer(stages: tuple[int, ...], layers: int) -> None:
    text = f"pp={len(stages)},stages={'+'.join(map(str, stages))}"
    assert resolved(text, layers=layers).stages == stages


@pytest.mark.parametrize(
    ("text", "batch", "micro_batch"),
    [
        ("dp=1", 24, 24),
        ("dp=2", 24, 12),
        ("pp=2", 24, 6),  # over 2 x pp
        ("dp=2,pp=2", 24, 3),
        ("dp=3,pp=3", 24, 1),
        ("pp=4", 7, 1),
        ("pp=2", 10, 2),
        ("pp=2", 35, 7),  # 8 wanted, the largest divisor below
        ("pp=2", 13, 1),
        ("dp=24", 24, 1),
        ("dp=2,micro_batch=4", 24, 4),
    ],
)
def test_micro_batch_default(text: str, batch: int, micro_batch: int) -> None:
    assert resolved(text, global_batch=batch).micro_batch == micro_batch


@pytest.mark.parametrize(
    ("text", "heads", "kv_heads", "legal"),
    [("tp=6", 12, 3, True), ("tp=9", 9, 3, True), ("tp=3", 9, 9, True), ("tp=8", 8, 1, True), ("tp=2", 6, 3, False)],
)
def test_kv_heads_divide_or_are_copied(text: str, heads: int, kv_heads: int, legal: bool) -> None:
    if legal:
        assert resolved(text, heads=heads, kv_heads=kv_heads).sequence_parallel
    else:
        with pytest.raises(InputError, match="neither divides"):
            resolved(text, heads=heads, kv_heads=kv_heads)


@settings(max_examples=300)
@given(
    st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4), st.integers(0, 3),
    st.sampled_from(CHOICES["schedule"]), st.integers(1, 9), st.integers(1, 24), st.sampled_from([(6, 3), (4, 4), (9, 3), (8, 1)]),
)  # fmt: skip
def test_what_is_legal_is_filled_and_stays(
    dp: int, tp: int, pp: int, zero: int, schedule: Any, layers: int, batch: int, heads: tuple[int, int]
) -> None:
    layout = Layout(dp=dp, tp=tp, pp=pp, zero=zero, schedule=schedule)
    spec = model(layers=layers, heads=heads[0], kv_heads=heads[1])
    kv = heads[1]
    legal = heads[0] % tp == 0 and (kv % tp == 0 or tp % kv == 0) and pp * layout.chunks <= layers and batch % dp == 0
    if not legal:
        with pytest.raises(InputError):
            resolve(layout, spec, sequence=64, global_batch=batch)
        return
    full = resolve(layout, spec, sequence=64, global_batch=batch)
    assert (full.dp, full.tp, full.pp, full.zero, full.schedule) == (dp, tp, pp, zero, schedule)
    assert sum(full.stages) == layers
    assert len(full.stages) == full.stage_count == pp * full.chunks
    assert (batch // dp) % full.micro_batch == 0
    # Defaults are explicit: nothing in force changes when it is written down, read back and resolved once more.
    assert resolve(Layout.parse(str(full)), spec, sequence=64, global_batch=batch) == full
    for name in ("chunks", "shard_ranks", "sequence_parallel", "world"):
        assert getattr(full, name) == getattr(layout, name)


def all_cuts(layers: int, count: int) -> list[tuple[int, ...]]:
    inner = itertools.combinations(range(1, layers), count - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, layers))) for cut in inner]


@settings(deadline=None)
@given(layers=st.integers(1, 10), count=st.integers(1, 6), vocabulary=st.integers(1, 9000))
def test_balanced_stages_have_the_least_bottleneck(layers: int, count: int, vocabulary: int) -> None:
    count = min(count, layers)
    spec = model(layers=layers, vocabulary=vocabulary)

    def bottleneck(stages: tuple[int, ...]) -> float:
        return max(*stages[:-1], stages[-1] + head_cost(spec), 0)

    stages = tuple(balanced_stages(spec, count))
    assert sum(stages) == layers
    assert min(stages) >= 1
    assert bottleneck(stages) == pytest.approx(min(map(bottleneck, all_cuts(layers, count))))
    # Where the head does not decide, no two stages but the last differ by more than one layer.
    assert max(stages[:-1], default=1) - min(stages[:-1], default=1) <= 1


def test_head_cost_is_in_layers() -> None:
    """Llama 3 (vocabulary 128,256): published shapes give 2.4 layers at 8B, 1.2 at 70B, 0.66 at 405B."""
    for hidden, heads, kv, ffn, cost in (
        (4096, 32, 8, 14336, 2.4),
        (8192, 64, 8, 28672, 1.23),
        (16384, 128, 8, 53248, 0.66),
    ):
        spec = model(vocabulary=128256, hidden=hidden, heads=heads, kv_heads=kv, head_dim=128, ffn=ffn)
        assert head_cost(spec) == pytest.approx(cost, rel=0.02)
    plain = msgspec.structs.replace(model(), gated_mlp=False)
    assert head_cost(plain) > head_cost(model())


def test_the_head_takes_layers_off_the_last_stage() -> None:
    spec = model(layers=30, vocabulary=20000)  # the head costs over 30 layers: the last stage keeps its one
    assert balanced_stages(spec, 4) == [10, 10, 9, 1]
    assert balanced_stages(model(layers=8, vocabulary=1), 3) == [3, 3, 2]


def test_every_divisor_of_the_batch_is_a_legal_dp() -> None:
    for dp in divisors(24):
        assert resolved(f"dp={dp}").dp == dp
