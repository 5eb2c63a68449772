"""A user's module as state without a layout: gathered whole, saved, and loaded under any other layout.

Names are the module's own. Optimiser state stands beside them as `optimizer.KEY.NAME`: a tensor like the parameter, or a
single number for each parameter, such as Adam's step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fiveply.checkpoint import store
from fiveply.checkpoint.slices import Slice, assembled, read_flat, slices_of
from fiveply.parallel.data_parallel import Segment
from fiveply.parallel.parallelize_module import ParallelModule
from fiveply.spec.errors import InputError
from fiveply.train.module_optimizer import ModuleOptimizer

PREFIX = "optimizer."


def gathered(
    model: ParallelModule, optimizer: ModuleOptimizer, kind: Literal["values", "gradients"]
) -> dict[str, Tensor]:
    """Whole tensors by name on every rank, buffers among the values. Collective."""
    own = optimizer.pieces(kind)
    if kind == "values":
        own += [(model.placed[piece.name], 0, piece.tensor.cpu().flatten()) for piece in _constants(model)]
    return assembled(piece for rank in model.mesh.gather_objects(own) for piece in rank)


def _constants(model: ParallelModule) -> Iterator[Slice]:
    """Buffers and frozen parameters that this rank speaks for."""
    for name, x in model.constants.items():
        placed = model.placed[name]
        if placed.counted and model.mesh.at.dp == 0:
            yield Slice(name, placed.parameter.shape, placed.start, x.detach())


def save(folder: Path, model: ParallelModule, optimizer: ModuleOptimizer, steps: int, cursor: int, seed: int) -> Path:
    """Write `folder/step-XXXXXXXX`. Collective."""
    groups = [{key: x for key, x in group.items() if _plain(x)} for group in optimizer.torch.param_groups]
    state = {"step": steps, "cursor": cursor, "layout": str(model.layout), "seed": seed, "groups": groups,
             "numbers": optimizer.numbers()}  # fmt: skip
    return store.save(folder, steps, _slices(model, optimizer), state)


def _plain(x: Any) -> bool:
    return isinstance(x, (bool, int, float, str)) and (not isinstance(x, float) or math.isfinite(x))


def _slices(model: ParallelModule, optimizer: ModuleOptimizer) -> Iterator[Slice]:
    yield from _constants(model)
    for segment in optimizer.segments:
        if model.mesh.speaks_for(segment.placed):
            yield from slices_of(segment.placed, segment.low, segment.value.detach().cpu())
    for key, segment, values in optimizer.state():
        placed = segment.placed
        if values.dim() and model.mesh.speaks_for(placed):
            yield from slices_of(placed, segment.low, values.cpu(), f"{PREFIX}{key}.")
        elif model.mesh.speaks_for(placed) and segment.low == 0 and not any(placed.start):
            yield Slice(f"{PREFIX}{key}.{placed.name}", (), (), values)


def load(checkpoint: store.Checkpoint, model: ParallelModule, optimizer: ModuleOptimizer) -> tuple[int, int]:
    """Fill module and optimiser; returns step and cursor. Raises InputError naming the first tensor that doesn't fit."""
    stored = checkpoint.stored
    for name, placed in model.placed.items():
        if stored.get(name) != placed.parameter.shape:
            has = f"has it as {stored[name]}" if name in stored else "does not have it"
            raise InputError(f"the module's is {placed.parameter.shape}, the checkpoint {has}", where=str(checkpoint.path),
                             key=name, fix="this is a checkpoint of another module")  # fmt: skip
    for name, x in model.constants.items():
        placed = model.placed[name]
        with torch.no_grad():
            x.copy_(checkpoint.read_stored(name, placed.start, placed.size))
    keys: dict[str, list[str]] = {}
    for full in stored:
        key, _, name = full.removeprefix(PREFIX).partition(".")
        if full.startswith(PREFIX) and name in model.placed:
            keys.setdefault(name, []).append(key)
    numbers = set(checkpoint.state.get("numbers", ()))

    def flat(segment: Segment, name: str) -> Tensor:
        read = functools.partial(checkpoint.read_stored, name)
        return read_flat(read, segment.placed, segment.low, segment.high).to(model.device)

    def held(segment: Segment) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for key in keys.get(segment.placed.name, ()):
            name = f"{PREFIX}{key}.{segment.placed.name}"
            if stored[name] == segment.placed.parameter.shape and segment.placed.parameter.shape != ():
                state[key] = flat(segment, name)
            else:
                number = checkpoint.read_stored(name, (), ())
                state[key] = number.item() if key in numbers else number
        return state

    optimizer.load(lambda segment: flat(segment, segment.placed.name), held)
    for group, saved in zip(optimizer.torch.param_groups, checkpoint.state.get("groups", ()), strict=False):
        group.update(saved)
    return int(checkpoint.state["step"]), int(checkpoint.state["cursor"])
