"""The parameter table: for each parameter of a model its global shape, and the slice that a rank holds of it.

One table is read by initialisation, gradient reduction, clipping, checkpoints, conversion and the planner, so that none of
them asks a tensor how it was split. Names are the decoder's own, which are Hugging Face's on-disk names of the Llama
family; `checkpoint/huggingface.py` holds the few exceptions (GPT-2).

Tensor parallelism slices one dimension: rows (dim 0) of column-parallel matrices, columns (dim 1) of row-parallel ones.
The experts of a layer stand in one tensor a projection (on disk they have one each): its dim 0 is shared by `ep` ranks, and
one of the others, as in a plain MLP, by `etp`. Nothing is padded: a size that its ranks do not divide is cut into parts
that differ by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from fiveply.spec.architecture import Experts, ModelSpec
from fiveply.spec.layout import Layout

Split = Literal["none", "rows", "columns", "kv", "experts", "expert_rows", "expert_columns"]
Init = Literal["normal", "residual", "ones", "zeros"]


class Parameter(msgspec.Struct, frozen=True):
    """One parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    unit: str
    """The group that is gathered, reduced and freed together: `embed`, `positions`, `layers.3`, `norm`, `head`."""
    split: Split = "none"
    partial: Literal["never", "sequence", "always"] = "never"
    """When its gradient on one tensor rank covers only part of the tokens (under sequence parallel) or of the heads (always)."""
    init: Init = "normal"
    decay: bool = True
    """Weight decay by default: matrices of the blocks, not norms, biases or embeddings."""


class Placed(msgspec.Struct, frozen=True):
    """One parameter as one rank holds it before any data-parallel sharding."""

    parameter: Parameter
    start: tuple[int, ...]
    size: tuple[int, ...]
    tp_sum: int = 1
    """How many neighbouring tensor ranks hold this same slice with gradients that must be added: 1, a group of `tp / kv_heads`, or
    `tp`. 1 for experts, whose gradients are added over `Layout.expert_data` ranks, tensor ranks among them."""
    counted: bool = True
    """Whether this tensor and pipeline rank counts it in norms and writes it in checkpoints; exactly one holder does, of each
    `ep` rank for experts."""
    tied_copy: bool = False
    """An embedding that stands on two stages: its gradients are added over both."""

    @property
    def name(self) -> str:
        return self.parameter.name


def part(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` of `size` cut into `parts` that differ by at most one."""
    base, extra = divmod(size, parts)
    return index * base + min(index, extra), base + (index < extra)


def declare(spec: ModelSpec) -> list[Parameter]:
    """All parameters of the model in forward order."""
    hidden = spec.hidden
    table = [Parameter("model.embed_tokens.weight", (spec.vocabulary, hidden), "embed", "rows", decay=False)]
    if spec.rope is None:
        table.append(
            Parameter(
                "model.embed_positions.weight", (spec.positions, hidden), "positions", partial="sequence", decay=False
            )
        )
    for layer in range(spec.layers + spec.predicted - 1):
        table += declare_layer(spec, layer)
    table += _norm(spec, "model.norm", "norm", hidden)
    if not spec.tied:
        table.append(Parameter("lm_head.weight", (spec.vocabulary, hidden), "head", "rows"))
    return table


def declare_layer(spec: ModelSpec, layer: int) -> list[Parameter]:
    """The parameters of one layer in forward order; those from `spec.layers` on predict a further token each."""
    hidden, unit, prefix = spec.hidden, f"layers.{layer}", f"model.layers.{layer}"
    predicts = layer >= spec.layers
    table: list[Parameter] = []
    if predicts:  # joins the hidden state and the next token's embedding (DeepSeek-V3, arXiv:2412.19437, section 2.2)
        table += _norm(spec, f"{prefix}.enorm", unit, hidden)
        table += _norm(spec, f"{prefix}.hnorm", unit, hidden)
        table += _linear(f"{prefix}.eh_proj", unit, hidden, 2 * hidden, "none", False)
    table += _norm(spec, f"{prefix}.input_layernorm", unit, hidden)
    table += (_latent_attention if spec.latent else _attention)(spec, f"{prefix}.self_attn", unit)
    table += _norm(spec, f"{prefix}.post_attention_layernorm", unit, hidden)
    if spec.experts and (predicts or layer in spec.experts.layers):
        table += _experts(spec, spec.experts, f"{prefix}.mlp", unit)
    else:
        table += _mlp(spec, f"{prefix}.mlp", unit, spec.ffn, spec.mlp_bias)
    if predicts:
        table += _norm(spec, f"{prefix}.shared_head.norm", unit, hidden)
    return table


def _norm(
    spec: ModelSpec, name: str, unit: str, size: int, partial: Literal["sequence", "always"] = "sequence"
) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (size,), unit, partial=partial, init="ones", decay=False)
    if spec.norm == "rms":
        return [weight]
    return [weight, Parameter(f"{name}.bias", (size,), unit, partial=partial, init="zeros", decay=False)]


def _linear(
    name: str, unit: str, rows: int, columns: int, split: Split, bias: bool, init: Init = "normal"
) -> list[Parameter]:
    # What is not split computes for a rank's own tokens under sequence parallel, as norms do.
    weight = Parameter(f"{name}.weight", (rows, columns), unit, split, "sequence" if split == "none" else "never", init)
    if not bias:
        return [weight]
    # The bias of a row-parallel product is added after the sum over tensor ranks, where tokens may be split.
    whole = split in ("columns", "none")
    return [
        weight,
        Parameter(
            f"{name}.bias", (rows,), unit, "none" if whole else split, "sequence" if whole else "never", "zeros", False
        ),
    ]


def _attention(spec: ModelSpec, name: str, unit: str) -> list[Parameter]:
    table = _linear(f"{name}.q_proj", unit, spec.q_size, spec.hidden, "rows", spec.qkv_bias)
    table += _linear(f"{name}.k_proj", unit, spec.kv_size, spec.hidden, "kv", spec.qkv_bias)
    table += _linear(f"{name}.v_proj", unit, spec.kv_size, spec.hidden, "kv", spec.qkv_bias)
    if spec.qk_norm:
        # Each tensor rank sees its own heads only, so these gradients are partial with or without sequence parallel.
        table += _norm(spec, f"{name}.q_norm", unit, spec.head_dim, "always")
        table += _norm(spec, f"{name}.k_norm", unit, spec.head_dim, "always")
    if spec.sinks:
        table.append(Parameter(f"{name}.sinks", (spec.heads,), unit, "rows", init="zeros", decay=False))
    return table + _linear(f"{name}.o_proj", unit, spec.hidden, spec.q_size, "columns", spec.out_bias, "residual")


def _latent_attention(spec: ModelSpec, name: str, unit: str) -> list[Parameter]:
    """The projections to the low ranks are whole on every tensor rank; those from them are split by heads."""
    latent = spec.latent
    assert latent is not None
    queries = spec.heads * (latent.nope_dim + latent.rope_dim)
    table: list[Parameter] = []
    if latent.q_rank:
        table += _linear(f"{name}.q_a_proj", unit, latent.q_rank, spec.hidden, "none", spec.qkv_bias)
        table += _norm(spec, f"{name}.q_a_layernorm", unit, latent.q_rank)
        table += _linear(f"{name}.q_b_proj", unit, queries, latent.q_rank, "rows", False)
    else:
        table += _linear(f"{name}.q_proj", unit, queries, spec.hidden, "rows", False)
    low = latent.kv_rank + latent.rope_dim
    table += _linear(f"{name}.kv_a_proj_with_mqa", unit, low, spec.hidden, "none", spec.qkv_bias)
    table += _norm(spec, f"{name}.kv_a_layernorm", unit, latent.kv_rank)
    both = spec.heads * (latent.nope_dim + latent.value_dim)
    table += _linear(f"{name}.kv_b_proj", unit, both, latent.kv_rank, "rows", False)
    values = spec.heads * latent.value_dim
    return table + _linear(f"{name}.o_proj", unit, spec.hidden, values, "columns", spec.out_bias, "residual")


def _mlp(spec: ModelSpec, name: str, unit: str, ffn: int, bias: bool) -> list[Parameter]:
    table: list[Parameter] = []
    if spec.gated_mlp:
        table += _linear(f"{name}.gate_proj", unit, ffn, spec.hidden, "rows", bias)
    table += _linear(f"{name}.up_proj", unit, ffn, spec.hidden, "rows", bias)
    return table + _linear(f"{name}.down_proj", unit, spec.hidden, ffn, "columns", bias, "residual")


def _experts(spec: ModelSpec, experts: Experts, name: str, unit: str) -> list[Parameter]:
    """Router, experts in one tensor a projection, and the MLP that every token passes."""
    count, ffn, hidden = experts.count, experts.ffn, spec.hidden
    table = _linear(f"{name}.gate", unit, count, hidden, "none", experts.bias)
    shapes = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    for projection, (rows, columns) in shapes.items():
        if projection == "gate_proj" and not spec.gated_mlp:
            continue
        down = projection == "down_proj"
        split, bias_split = ("expert_columns", "experts") if down else ("expert_rows", "expert_rows")
        stack = f"{name}.experts.{projection}"
        init: Init = "residual" if down else "normal"
        table.append(Parameter(f"{stack}.weight", (count, rows, columns), unit, split, init=init))
        if experts.bias:
            table.append(Parameter(f"{stack}.bias", (count, rows), unit, bias_split, init="zeros", decay=False))
    if experts.shared_ffn:
        table += _mlp(spec, f"{name}.shared_experts", unit, experts.shared_ffn, spec.mlp_bias)
    if experts.shared_gate:
        table += _linear(f"{name}.shared_expert_gate", unit, 1, hidden, "none", False)
    return table


def stage_units(spec: ModelSpec, stages: Sequence[int], stage: int) -> list[str]:
    """Units of one stage in forward order; the embedding may stand on the first and on the last stage."""
    first = sum(stages[:stage])
    units = [f"layers.{layer}" for layer in range(first, first + stages[stage])]
    if stage == 0:
        units = ["embed", *(["positions"] if spec.rope is None else []), *units]
    if stage == len(stages) - 1:
        units += [f"layers.{layer}" for layer in range(spec.layers, spec.layers + spec.predicted - 1)]
        units += ["norm", *(["embed"] if spec.embeds_at_end else []), *([] if spec.tied else ["head"])]
    return list(dict.fromkeys(units))


def place(spec: ModelSpec, layout: Layout, tp_rank: int, stage: int, ep_rank: int = 0) -> list[Placed]:
    """The table of one (tensor rank, stage, expert rank) of a resolved layout, in forward order."""
    by_unit: dict[str, list[Parameter]] = {}
    for parameter in declare(spec):
        by_unit.setdefault(parameter.unit, []).append(parameter)
    last = layout.stage_count - 1
    placed: list[Placed] = []
    for unit in stage_units(spec, layout.stages, stage):
        tied_copy = unit == "embed" and spec.embeds_at_end and last > 0
        for parameter in by_unit[unit]:
            placed.append(
                place_parameter(
                    layout, parameter, spec.kv_heads, tp_rank=tp_rank, ep_rank=ep_rank, tied_copy=tied_copy,
                    counted=not (tied_copy and stage == last),
                )
            )  # fmt: skip
    return placed


def place_parameter(
    layout: Layout,
    parameter: Parameter,
    kv_heads: int,
    *,
    tp_rank: int,
    ep_rank: int = 0,
    tied_copy: bool = False,
    counted: bool = True,
) -> Placed:
    """The slice of one parameter; `kv_heads` are the model's."""
    tp, shape = layout.tp, parameter.shape
    start, size = [0] * len(shape), list(shape)
    tp_sum = 1
    if parameter.split == "none":
        partial = parameter.partial == "always" or (parameter.partial == "sequence" and layout.sequence_parallel)
        tp_sum = tp if partial else 1
        counted = counted and tp_rank == 0
    elif parameter.split == "kv" and tp > kv_heads:
        tp_sum = tp // kv_heads
        head = shape[0] // kv_heads
        start[0], size[0] = tp_rank // tp_sum * head, head
        counted = counted and tp_rank % tp_sum == 0
    elif parameter.split in ("experts", "expert_rows", "expert_columns"):
        etp = layout.expert_tensor
        start[0], size[0] = part(shape[0], layout.ep, ep_rank)
        if parameter.split == "experts":
            counted = counted and tp_rank % etp == 0
        else:
            dim = 1 if parameter.split == "expert_rows" else 2
            start[dim], size[dim] = part(shape[dim], etp, tp_rank % etp)
        counted = counted and tp_rank < etp * layout.ep
    else:
        dim = 1 if parameter.split == "columns" else 0
        start[dim], size[dim] = part(shape[dim], tp, tp_rank)
    return Placed(parameter, tuple(start), tuple(size), tp_sum, counted, tied_copy)
