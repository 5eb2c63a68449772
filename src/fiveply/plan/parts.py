"""What is counted (a `Case`), what a part of its model is, and all that a part's work depends on: of the model a `Part`, of
layout and batch a `Split`.

A *part* is a unit of the parameter table (`embed`, `positions`, `layers.3`, `norm`, `head`), and `head` also where it shares
the embedding's matrix. Parts of equal `Part` under an equal `Split` are counted once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import msgspec

from fiveply.plan.software import FIVEPLY, Software
from fiveply.spec.architecture import Experts, ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.placement import part as cut
from fiveply.spec.placement import stage_units

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "fp4": 2}
"""Of an activation: products in 8 and 4 bits read and write 16-bit ones."""

QUANTISED_BYTES = {"fp8": 1 + 1 / 32, "fp4": 1 / 2 + 1 / 16}
"""Of a product's input, with a byte of scale for each block of 32 (MXFP8) or 16 (NVFP4)."""


class Part(msgspec.Struct, frozen=True):
    """All that a part's work depends on in the model: parts of equal `Part` have equal work and equal traffic."""

    what: Literal["embed", "positions", "layer", "norm", "head"]
    spec: ModelSpec
    window: int = 0
    experts: Experts | None = None
    predicts: bool = False
    """A layer that predicts a further token: it joins two inputs, and has a pass of the head of its own."""


class Split(msgspec.Struct, frozen=True):
    """All that a part's work depends on in the layout, the batch and the precision."""

    tp: int
    tp_rank: int
    sequence_parallel: bool
    cp: int
    cp_kind: str
    ep: int
    etp: int
    rows: int
    sequence: int
    recompute: str
    element: int
    """Bytes of an activation."""
    quantised: float
    """Bytes of an element that a product reads, with its share of a block's scale."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch that tensor ranks compute on together."""
        return self.rows * -(-self.sequence // self.cp)

    @property
    def local(self) -> int:
        """Of those that this rank holds in the residual stream."""
        return -(-self.tokens // self.tp) if self.sequence_parallel else self.tokens

    @property
    def gathered(self) -> int:
        """Rows of a gathered tensor, the padding of uneven parts included."""
        return self.local * self.tp if self.sequence_parallel else self.tokens

    @property
    def routed(self) -> int:
        """Tokens that this rank sends to experts: tensor ranks share them."""
        return -(-self.tokens // self.tp)

    def part(self, size: int) -> int:
        return cut(size, self.tp, self.tp_rank)[1]


class Case(msgspec.Struct, frozen=True):
    """A model, the length of its rows in tokens, and the system and precision that compute them: what layouts are counted for."""

    spec: ModelSpec
    sequence: int
    software: Software = FIVEPLY
    precision: str = "bf16"

    def split(self, layout: Layout, tp_rank: int = 0) -> Split:
        return Split(
            tp=layout.tp,
            tp_rank=tp_rank,
            sequence_parallel=layout.sequence_parallel,
            cp=layout.cp,
            cp_kind=layout.cp_kind,
            ep=layout.ep,
            etp=layout.expert_tensor,
            rows=layout.micro_batch,
            sequence=self.sequence,
            recompute=layout.recompute,
            element=ELEMENT_BYTES[self.precision],
            quantised=QUANTISED_BYTES.get(self.precision, ELEMENT_BYTES[self.precision]),
        )


def parts(spec: ModelSpec, stages: Sequence[int], stage: int) -> list[str]:
    """The parts that a stage computes, in forward order."""
    units = stage_units(spec, stages, stage)
    last = stage == len(stages) - 1
    if last and stage > 0:
        units = [unit for unit in units if unit != "embed"]  # the copy that head and prediction share
    return [*units, "head"] if last and "head" not in units else units


@functools.cache
def kinds(spec: ModelSpec) -> dict[str, str]:
    """Every part of the model in forward order, with the first of its kind: parts of a kind have equal work and traffic."""
    first: dict[Part, str] = {}
    return {name: first.setdefault(describe(spec, name), name) for name in parts(spec, (spec.layers,), 0)}


@functools.cache
def describe(spec: ModelSpec, name: str) -> Part:
    what, _, number = name.partition(".")
    layer = int(number) if number else -1
    predicts = layer >= spec.layers
    experts = spec.experts if spec.experts and (predicts or layer in spec.experts.layers) else None
    return Part(
        "layer" if what == "layers" else what,  # pyright: ignore[reportArgumentType]
        spec,
        window=spec.window if layer in spec.window_layers else 0,
        experts=msgspec.structs.replace(experts, layers=()) if experts else None,
        predicts=predicts,
    )


def seen(sequence: int, window: int) -> int:
    """Pairs of a token and a key that it may see, in one causal row."""
    width = min(window or sequence, sequence)
    return width * sequence - width * (width - 1) // 2
