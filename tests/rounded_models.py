"""A served model with few bits a weight, beside `transformers` with weights rounded to what those bits have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from greedy_service import greedy
from lone_stage import logits, lone_stage
from random_models import greedy_by_transformers, ragged, same_where_clear, with_rounded_weights
from torch import Tensor

from fiveply import service

Rounded = Callable[[Tensor], Tensor]


@torch.no_grad()
def logits_apart(model: Any, quantize: str, rounded: Rounded) -> tuple[float, float]:
    """How far a stage's logits are from the rounded model's, and from the plain one's, beside the rounded one's largest."""
    (tokens,) = ragged(model.config.vocab_size, [50])
    ours = logits(lone_stage(Path(model.name_or_path), torch.float32, quantize), tokens, [40, *[1] * 10])
    plain = model(torch.tensor([tokens])).logits[0]
    wanted = with_rounded_weights(model, rounded)(torch.tensor([tokens])).logits[0]
    from_rounded, from_plain = ((ours - other).abs().max() / wanted.abs().max() for other in (wanted, plain))
    return float(from_rounded), float(from_plain)


def greedy_agree(model: Any, quantize: str, layout: str, rounded: Rounded) -> list[bool]:
    """Of each prompt, whether its answer is the rounded model's wherever that is clear."""
    prompts = ragged(model.config.vocab_size)
    served = service.Served.load(model.name_or_path, layout, "float32", quantize=quantize)
    told = greedy(served, prompts, 10)
    model = with_rounded_weights(model, rounded)
    return [
        same_where_clear(tokens, greedy_by_transformers(model, prompt, 10), prompt, model)
        for prompt, tokens in zip(prompts, told, strict=True)
    ]
