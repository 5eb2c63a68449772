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
    kept, trunk = set(units), decoder.model
    decoder.first = first
    for name in list(trunk.layers):
        if f"layers.{name}" not in kept:
            del trunk.layers[name]
    ends = {"embed": (trunk, "embed_tokens"), "positions": (trunk, "embed_positions"), "norm": (trunk, "norm"),
            "head": (decoder, "lm_head")}  # fmt: skip
    for unit, (module, name) in ends.items():
        if unit not in kept:
            setattr(module, name, None)
    return decoder
