"""The parameter table: what all ranks hold, put together, is the model exactly once, by the decoder's own names."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.model.decoder import Decoder
from fiveply.parallel.pipeline_stages import stage_of_decoder
from fiveply.spec.architecture import ModelSpec, Rope, presets
from fiveply.spec.layout import CHOICES, Layout, divisors
from fiveply.spec.legality import resolve
from fiveply.spec.placement import Placed, declare, part, place, stage_units

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
PLANNED = sorted((Path(__file__).parents[1] / "configs/planned").glob("*.json"))
"""Models that the decoder does not compute yet."""


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 6))
    flags = {name: draw(st.booleans()) for name in ("qk_norm", "qkv_bias", "out_bias", "mlp_bias", "gated_mlp", "tied")}
    return ModelSpec(
        family="drawn",
        vocabulary=draw(st.integers(13, 60)),
        hidden=draw(st.integers(1, 20)),
        layers=draw(st.integers(1, 8)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        ffn=draw(st.integers(13, 50)),
        positions=draw(st.integers(64, 80)),
        norm=draw(st.sampled_from(["rms", "layer"])),
        rope=draw(st.sampled_from([None, Rope()])),
        **flags,
    )


@st.composite
def placements(draw: st.DrawFn) -> tuple[ModelSpec, Layout]:
    spec = draw(specs())
    fits = [d for d in divisors(spec.heads) if d <= 12 and (spec.kv_heads % d == 0 or d % spec.kv_heads == 0)]
    schedule: Any = draw(st.sampled_from(CHOICES["schedule"]))
    chunks = Layout(schedule=schedule).chunks
    values: dict[str, Any] = {"tp": draw(st.sampled_from(fits)), "sp": draw(st.sampled_from([-1, 0]))}
    if spec.layers >= chunks:
        values |= {"schedule": schedule, "pp": draw(st.integers(1, spec.layers // chunks))}
    layout = Layout(**values)
    if layout.pp > 1 and chunks == 1 and draw(st.booleans()):  # ends without layers
        cuts = sorted(draw(st.sets(st.integers(1, spec.layers - 1), min_size=layout.pp - 2, max_size=layout.pp - 2)))
        bounds = [0, *cuts, spec.layers]
        inner = [b - a for a, b in itertools.pairwise(bounds)]
        layout = msgspec.structs.replace(layout, stages=tuple([*inner, 0] if draw(st.booleans()) else [0, *inner]))
    return spec, resolve(layout, spec, sequence=32, global_batch=12)


def everything(spec: ModelSpec, layout: Layout) -> list[tuple[int, int, Placed]]:
    """(tensor rank, stage, row) of the whole grid."""
    grid = [(tp, stage) for stage in range(layout.stage_count) for tp in range(layout.tp)]
    return [(tp, stage, row) for tp, stage in grid for row in place(spec, layout, tp, stage)]


def window(row: Placed) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(row.start, row.size, strict=True))


@settings(deadline=None)
@given(placements())
def test_counted_slices_cover_every_parameter_once(drawn: tuple[ModelSpec, Layout]) -> None:
    spec, layout = drawn
    covered = {parameter.name: np.zeros(parameter.shape, dtype=int) for parameter in declare(spec)}
    for _, _, row in everything(spec, layout):
        assert all(a >= 0 and n >= 1 for a, n in zip(row.start, row.size, strict=True)), row
        assert covered[row.name][window(row)].shape == row.size  # within the global shape
        if row.counted:
            covered[row.name][window(row)] += 1
    for name, times in covered.items():
        assert (times == 1).all(), name


@settings(deadline=None)
@given(placements())
def test_every_stage_holds_every_element_of_its_own(drawn: tuple[ModelSpec, Layout]) -> None:
    """Counted or not: what a stage computes with is whole over its tensor ranks, and its names are its decoder's."""
    spec, layout = drawn
    shapes = {parameter.name: parameter.shape for parameter in declare(spec)}
    for stage in range(layout.stage_count):
        decoder = stage_of_decoder(spec, stage_units(spec, layout.stages, stage), first=stage == 0)
        tables = [place(spec, layout, tp, stage) for tp in range(layout.tp)]
        names = dict(decoder.named_parameters())
        for table in tables:
            assert Counter(row.name for row in table) == Counter(names.keys())
        for rows in zip(*tables, strict=True):
            seen = np.zeros(shapes[rows[0].name], dtype=bool)
            for row in rows:
                seen[window(row)] = True
            assert seen.all()
            assert tuple(names[rows[0].name].shape) == seen.shape


@settings(deadline=None)
@given(placements())
def test_tp_sum_counts_the_holders_whose_gradients_add(drawn: tuple[ModelSpec, Layout]) -> None:
    spec, layout = drawn
    for stage in range(layout.stage_count):
        for rows in zip(*(place(spec, layout, tp, stage) for tp in range(layout.tp)), strict=True):
            slices = [(row.start, row.size) for row in rows]
            name, tp_sum = rows[0].name, rows[0].tp_sum
            assert len({row.tp_sum for row in rows}) == 1
            if rows[0].parameter.split == "none":
                # Norms of heads see a rank's own heads; what acts on the residual stream sees its own tokens under sp.
                partial = name.rpartition(".")[0].endswith(("q_norm", "k_norm")) or layout.sequence_parallel
                assert len(set(slices)) == 1
                assert tp_sum == (layout.tp if partial else 1)
            else:
                # Groups of neighbours hold the same slice, each seeing some of its query heads.
                assert Counter(slices) == {slices[i]: tp_sum for i in range(0, layout.tp, tp_sum)}
                assert all(slices[i] == slices[i - i % tp_sum] for i in range(layout.tp))


@settings(deadline=None)
@given(placements())
def test_ranks_hold_the_kv_heads_that_their_queries_use(drawn: tuple[ModelSpec, Layout]) -> None:
    spec, layout = drawn
    group = spec.heads // spec.kv_heads
    for tp in range(layout.tp):
        rows = {row.name: row for row in place(spec, layout, tp, 0)}
        if "model.layers.0.self_attn.q_proj.weight" not in rows:  # a first stage without layers
            continue
        queries, keys, values, output = (rows[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo")
        held = [
            range(row.start[0] // spec.head_dim, (row.start[0] + row.size[0]) // spec.head_dim)
            for row in (queries, keys)
        ]
        assert queries.size[0] == len(held[0]) * spec.head_dim
        assert keys.size[0] == len(held[1]) * spec.head_dim
        # The local map of query to key-value heads, which attention derives from the two counts alone, is the global one.
        local_group = len(held[0]) // len(held[1])
        for local, head in enumerate(held[0]):
            assert held[1][local // local_group] == head // group
        assert (values.start, values.size) == (keys.start, keys.size)
        assert (output.start[1], output.size[1]) == (queries.start[0], queries.size[0])


@settings(deadline=None)
@given(placements())
def test_tied_embeddings_stand_at_both_ends(drawn: tuple[ModelSpec, Layout]) -> None:
    spec, layout = drawn
    rows = [(stage, row) for _, stage, row in everything(spec, layout) if row.parameter.unit == "embed"]
    last = layout.stage_count - 1
    twice = spec.tied and last > 0
    assert {stage for stage, _ in rows} == ({0, last} if twice else {0})
    for stage, row in rows:
        assert row.tied_copy == twice
        assert row.counted == (stage == 0)
    assert not any(row.tied_copy for _, _, row in everything(spec, layout) if row.parameter.unit != "embed")


@settings(deadline=None)
@given(placements())
def test_rank_zero_holds_the_most_of_every_parameter(drawn: tuple[ModelSpec, Layout]) -> None:
    """Buffers of equal size over the tensor ranks are made for rank 0's part."""
    spec, layout = drawn
    for stage in range(layout.stage_count):
        for rows in zip(*(place(spec, layout, tp, stage) for tp in range(layout.tp)), strict=True):
            sizes = [np.prod(row.size) for row in rows]
            assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("source", [*CONFIGS, *presets()[:6]], ids=lambda source: Path(source).stem)
def test_the_table_is_the_decoders_parameters(source: Path | str) -> None:
    spec = ModelSpec.load(source)
    with torch.device("meta"):
        decoder = Decoder(spec)
    table = declare(spec)
    assert len({parameter.name for parameter in table}) == len(table)
    assert {p.name: p.shape for p in table} == {name: tuple(p.shape) for name, p in decoder.named_parameters()}


@given(specs())
def test_drawn_models_have_the_decoders_parameters(spec: ModelSpec) -> None:
    with torch.device("meta"):
        decoder = Decoder(spec)
    assert {p.name: p.shape for p in declare(spec)} == {name: tuple(p.shape) for name, p in decoder.named_parameters()}


@given(specs())
def test_units_follow_the_forward(spec: ModelSpec) -> None:
    """All of a unit's parameters stand together, in forward order; matrices of the blocks and the head decay, nothing else."""
    units = list(dict.fromkeys(parameter.unit for parameter in declare(spec)))
    expected = [
        "embed",
        *(["positions"] if spec.rope is None else []),
        *(f"layers.{i}" for i in range(spec.layers)),
        "norm",
    ]
    assert units == expected + ([] if spec.tied else ["head"])
    assert units == [
        unit for i, unit in enumerate(p.unit for p in declare(spec)) if i == 0 or declare(spec)[i - 1].unit != unit
    ]
    for parameter in declare(spec):
        inside = parameter.unit.startswith("layers.") or parameter.unit == "head"
        assert parameter.decay == (inside and len(parameter.shape) == 2)
        assert (parameter.init in ("ones", "zeros")) == (len(parameter.shape) == 1)


@given(size=st.integers(0, 1000), parts=st.integers(1, 40))
def test_parts_cover_and_differ_by_one(size: int, parts: int) -> None:
    pieces = [part(size, parts, index) for index in range(parts)]
    end = 0
    for start, length in pieces:
        assert start == end
        end = start + length
    assert end == size
    assert max(n for _, n in pieces) - min(n for _, n in pieces) <= 1


def test_odd_sizes_by_hand() -> None:
    spec = ModelSpec.load(next(path for path in CONFIGS if path.stem == "llama"))
    layout = resolve(Layout.parse("tp=9,pp=2"), spec, sequence=64, global_batch=4)
    rows = {row.name: row for row in place(spec, layout, 4, 0)}
    # 1003 = 4 x 112 + 5 x 111; 131 = 5 x 15 + 4 x 14; heads of 8 rows; three ranks to a key-value head.
    assert (rows["model.embed_tokens.weight"].start, rows["model.embed_tokens.weight"].size) == ((448, 0), (111, 72))
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert (down.start, down.size) == ((0, 60), (72, 15))
    key = rows["model.layers.0.self_attn.k_proj.weight"]
    assert (key.start, key.size, key.tp_sum, key.counted) == ((8, 0), (8, 72), 3, False)
    assert place(spec, layout, 3, 0)[2:4][1].counted  # the group's first rank counts it
    norm = rows["model.layers.0.input_layernorm.weight"]
    assert (norm.tp_sum, norm.counted) == (9, False)
    assert {row.parameter.unit for row in place(spec, layout, 0, 1)} == {
        *(f"layers.{i}" for i in range(layout.stages[0], 7)), "norm", "head"
    }  # fmt: skip


@st.composite
def expert_placements(draw: st.DrawFn) -> tuple[ModelSpec, Layout]:
    """A model with experts, some also with latent attention, biases or further predictions, and every axis in use."""
    spec = ModelSpec.load(draw(st.sampled_from(PLANNED)))
    spec = msgspec.structs.replace(spec, predicted=draw(st.integers(1, 2)))
    assert spec.experts is not None
    tp = draw(st.sampled_from([d for d in divisors(spec.heads) if spec.kv_heads % d == 0 or d % spec.kv_heads == 0]))
    cp, dp, etp = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(divisors(tp)))
    ep = draw(st.sampled_from([d for d in divisors(spec.experts.count) if (dp * cp * tp // etp) % d == 0]))
    layout = Layout(
        tp=tp,
        pp=draw(st.integers(1, 3)),
        cp=cp,
        dp=dp,
        ep=ep,
        etp=draw(st.sampled_from([etp, 0])) if etp == tp else etp,
    )
    return spec, resolve(layout, spec, sequence=32, global_batch=12, runtime=False)


@settings(deadline=None)
@given(expert_placements())
def test_the_ranks_of_a_stage_hold_its_experts_equally_often(drawn: tuple[ModelSpec, Layout]) -> None:
    spec, layout = drawn
    shapes = {parameter.name: parameter.shape for parameter in declare(spec)}
    held = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    counted = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        first = rank % (layout.tp * layout.cp * layout.dp) < layout.ep * layout.expert_tensor
        for row in place(spec, layout, at.tp, at.pp, at.ep):
            held[row.name][window(row)] += 1
            expert = ".experts." in row.name
            if row.counted and (first if expert else at.cp == at.dp == 0):
                counted[row.name][window(row)] += 1
    for name, times in held.items():
        assert (counted[name] == 1).all(), name
        if ".experts." in name:
            copies = layout.expert_tensor if name.endswith("down_proj.bias") else 1
            assert (times == layout.expert_data * copies).all(), name


@pytest.mark.parametrize("source", PLANNED, ids=lambda source: source.stem)
def test_experts_bear_the_names_they_have_on_disk(source: Path) -> None:
    """The names and shapes of `transformers`, but that ours stack a layer's experts by projection."""
    spec = ModelSpec.load(source)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**spec.config))
    names = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    renamed = {"shared_expert.": "shared_experts.", "mlp.router.": "mlp.gate."}
    for old, new in renamed.items():
        names = {name.replace(old, new): shape for name, shape in names.items()}
    for name, shape in {p.name: p.shape for p in declare(spec)}.items():
        if ".experts." not in name:
            assert names.pop(name) == shape
    experts = [name for name in names if ".experts." in name]
    assert sorted(experts) == sorted(names)
    ours = sum(np.prod(p.shape) for p in declare(spec) if ".experts." in p.name)
    assert sum(np.prod(names[name]) for name in experts) == ours


def test_a_further_prediction_stands_on_the_last_stage_with_a_copy_of_the_embedding() -> None:
    spec = ModelSpec.load("deepseek-v3")
    layout = resolve(Layout.parse("tp=8,pp=16,dp=8,ep=64,etp=1"), spec, sequence=4096, global_batch=64, runtime=False)
    first, last = (place(spec, layout, 0, stage) for stage in (0, 15))
    assert {row.parameter.unit for row in last} == {
        *(f"layers.{i}" for i in range(61 - layout.stages[-1], 62)), "norm", "embed", "head"
    }  # fmt: skip
    copies = [row for row in (*first, *last) if row.tied_copy]
    assert [(row.name, row.counted) for row in copies] == [
        ("model.embed_tokens.weight", True),
        ("model.embed_tokens.weight", False),
    ]
    gate = next(row for row in last if row.name == "model.layers.61.mlp.experts.gate_proj.weight")
    assert gate.size == (4, 2048, 7168)
