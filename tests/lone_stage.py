"""A whole decoder as a rank loads it, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fiveply.engine import weights
from fiveply.engine.paged_attention import PagedAttention, Span
from fiveply.engine.stage import Stage
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve_for_inference

CPU = torch.device("cpu")


def lone_stage(
    path: Path, dtype: torch.dtype, quantize: str = "none", blocks: int = 32, device: torch.device = CPU
) -> Stage:
    source = weights.open_source(path)
    spec = source.spec
    mesh: Any = SimpleNamespace(layout=resolve_for_inference(Layout(), spec), at=SimpleNamespace(tp=0, pp=0), tp=None)
    decoder = weights.load(source, mesh, dtype, device, quantize)
    layers = list(range(spec.layers))
    attention = PagedAttention(layers, spec.heads, spec.kv_heads, spec.head_dim, blocks, dtype, device)
    return Stage(decoder, attention, None)


@torch.inference_mode()
def logits(stage: Stage, tokens: list[int], counts: Sequence[int]) -> Tensor:
    """After each token of one sequence, of which each step has so many."""
    told: list[Tensor] = []
    start = 0
    for count in counts:
        positions = stage.attention.begin([Span(start, count, range(-(-len(tokens) // 16)))])
        told.append(stage.decoder.logits(stage(torch.tensor(tokens[start : start + count]), positions)))
        start += count
    return torch.cat(told)
