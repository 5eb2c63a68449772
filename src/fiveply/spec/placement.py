"""The parameter table: for each parameter of a model its global shape, and the slice that a rank holds of it.

One table is read by initialisation, gradient reduction, clipping, checkpoints, conversion and the planner, so that none of
them asks a tensor how it was split. Names are the decoder's own, which are Hugging Face's on-disk names of the Llama
family; `checkpoint/huggingface.py` holds the few exceptions (GPT-2).

Tensor parallelism slices one dimension: rows (dim 0) of column-parallel matrices, columns (dim 1) of row-parallel ones.
Nothing is padded: a size that `tp` does not divide is cut into parts that differ by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout

Split = Literal["none", "rows", "columns", "kv"]
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
    """How many neighbouring tensor ranks hold this same slice with gradients that must be added: 1, a group of `tp / kv_heads`, or `tp`."""
    counted: bool = True
    """Whether this tensor and pipeline rank counts it in norms and writes it in checkpoints; exactly one holder does."""
    tied_copy: bool = False
    """A tied embedding that stands on two stages: its gradients are added over both."""

    @property
    def name(self) -> str:
        return self.parameter.name


def part(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` of `size` cut into `parts` that differ by at most one."""
    base, extra = divmod(size, parts)
    return index * base + min(index, extra), base + (index < extra)


def declare(spec: ModelSpec) -> list[Parameter]:
    """All parameters of the model in forward order."""
    hidden, ffn, norm_bias = spec.hidden, spec.ffn, spec.norm == "layer"

    def norm(name: str, unit: str, size: int, partial: Literal["sequence", "always"] = "sequence") -> list[Parameter]:
        weight = Parameter(f"{name}.weight", (size,), unit, partial=partial, init="ones", decay=False)
        if not norm_bias:
            return [weight]
        return [weight, Parameter(f"{name}.bias", (size,), unit, partial=partial, init="zeros", decay=False)]

    def linear(
        name: str, unit: str, rows: int, columns: int, split: Split, bias: bool, init: Init = "normal"
    ) -> list[Parameter]:
        weight = Parameter(f"{name}.weight", (rows, columns), unit, split, init=init)
        if not bias:
            return [weight]
        # The bias of a row-parallel product is added after the sum over tensor ranks, where tokens may be split.
        whole = split == "columns"
        return [
            weight,
            Parameter(
                f"{name}.bias",
                (rows,),
                unit,
                "none" if whole else split,
                "sequence" if whole else "never",
                "zeros",
                False,
            ),
        ]

    table = [Parameter("model.embed_tokens.weight", (spec.vocabulary, hidden), "embed", "rows", decay=False)]
    if spec.rope is None:
        table.append(
            Parameter(
                "model.embed_positions.weight", (spec.positions, hidden), "positions", partial="sequence", decay=False
            )
        )
    for layer in range(spec.layers):
        unit, prefix = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        table += norm(f"{prefix}.input_layernorm", unit, hidden)
        table += linear(f"{attention}.q_proj", unit, spec.q_size, hidden, "rows", spec.qkv_bias)
        table += linear(f"{attention}.k_proj", unit, spec.kv_size, hidden, "kv", spec.qkv_bias)
        table += linear(f"{attention}.v_proj", unit, spec.kv_size, hidden, "kv", spec.qkv_bias)
        if spec.qk_norm:
            # Each tensor rank sees its own heads only, so these gradients are partial with or without sequence parallel.
            table += norm(f"{attention}.q_norm", unit, spec.head_dim, "always")
            table += norm(f"{attention}.k_norm", unit, spec.head_dim, "always")
        table += linear(f"{attention}.o_proj", unit, hidden, spec.q_size, "columns", spec.out_bias, "residual")
        table += norm(f"{prefix}.post_attention_layernorm", unit, hidden)
        if spec.gated_mlp:
            table += linear(f"{mlp}.gate_proj", unit, ffn, hidden, "rows", spec.mlp_bias)
        table += linear(f"{mlp}.up_proj", unit, ffn, hidden, "rows", spec.mlp_bias)
        table += linear(f"{mlp}.down_proj", unit, hidden, ffn, "columns", spec.mlp_bias, "residual")
    table += norm("model.norm", "norm", hidden)
    if not spec.tied:
        table.append(Parameter("lm_head.weight", (spec.vocabulary, hidden), "head", "rows"))
    return table


def stage_units(spec: ModelSpec, stages: Sequence[int], stage: int) -> list[str]:
    """Units of one stage in forward order; a tied embedding stands on the first and on the last stage."""
    first = sum(stages[:stage])
    units = [f"layers.{layer}" for layer in range(first, first + stages[stage])]
    if stage == 0:
        units = ["embed", *(["positions"] if spec.rope is None else []), *units]
    if stage == len(stages) - 1:
        units += ["norm", "embed" if spec.tied else "head"]
    return list(dict.fromkeys(units))


def place(spec: ModelSpec, layout: Layout, tp_rank: int, stage: int) -> list[Placed]:
    """The table of one (tensor rank, stage) of a resolved layout, in forward order."""
    by_unit: dict[str, list[Parameter]] = {}
    for parameter in declare(spec):
        by_unit.setdefault(parameter.unit, []).append(parameter)
    last = layout.stage_count - 1
    placed: list[Placed] = []
    for unit in stage_units(spec, layout.stages, stage):
        tied_copy = unit == "embed" and spec.tied and last > 0
        for parameter in by_unit[unit]:
            placed.append(
                _place_one(spec, layout, tp_rank, parameter, tied_copy, counted=not (tied_copy and stage == last))
            )
    return placed


def _place_one(
    spec: ModelSpec, layout: Layout, tp_rank: int, parameter: Parameter, tied_copy: bool, counted: bool
) -> Placed:
    tp, shape = layout.tp, parameter.shape
    start, size = [0] * len(shape), list(shape)
    tp_sum = 1
    if parameter.split == "none":
        partial = parameter.partial == "always" or (parameter.partial == "sequence" and layout.sequence_parallel)
        tp_sum = tp if partial else 1
        counted = counted and tp_rank == 0
    elif parameter.split == "kv" and tp > spec.kv_heads:
        tp_sum = tp // spec.kv_heads
        start[0], size[0] = tp_rank // tp_sum * spec.head_dim, spec.head_dim
        counted = counted and tp_rank % tp_sum == 0
    else:
        dim = 1 if parameter.split == "columns" else 0
        start[dim], size[dim] = part(shape[dim], tp, tp_rank)
    return Placed(parameter, tuple(start), tuple(size), tp_sum, counted, tied_copy)
