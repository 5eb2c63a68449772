"""Cut a decoder into the part that one stage holds, by dropping the rest: names survive, and nothing is allocated before."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fiveply.model.decoder import Decoder
from fiveply.spec.architecture import ModelSpec


def stage_of_decoder(spec: ModelSpec, units: Iterable[str], *, first: bool) -> Decoder:
    """The decoder with only `units` (`spec.placement.stage_units`), on the meta device; `first` stages take tokens."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    kept = set(units)
    decoder.first = first
    for name in list(decoder.model.layers):
        if f"layers.{name}" not in kept:
            del decoder.model.layers[name]
    if "embed" not in kept:
        decoder.model.embed_tokens = None
    if "positions" not in kept:
        decoder.model.embed_positions = None
    if "norm" not in kept:
        decoder.model.norm = None
    if "head" not in kept:
        decoder.lm_head = None
    return decoder
