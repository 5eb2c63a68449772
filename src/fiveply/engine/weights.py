"""A rank's own part of the model for inference: read by slices, frozen, with the products of one input fused.

Notable: query, key and value, and gate and up, are slices of one matrix each, so that a layer multiplies four times and not
seven (unfused took 2.4 times the calls' time; a compiler does not repair it). The decoder is not told: its parameters keep
their shapes and stand for the fused matrix, which `FusedProducts` finds by the first of them.

It knows layouts and files; what is computed with the weights is the decoder's affair.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from fiveply.checkpoint import store
from fiveply.checkpoint.huggingface import HuggingFaceSource
from fiveply.engine.int4 import Int4Products
from fiveply.engine.int8 import Int8Products
from fiveply.engine.products import FusedProducts
from fiveply.model.decoder import Decoder, Linear
from fiveply.parallel.pipeline_stages import stage_of_decoder
from fiveply.parallel.tensor_parallel import apply_tensor_parallel
from fiveply.spec.errors import InputError
from fiveply.spec.placement import place, stage_units
from fiveply.world.mesh import Mesh

Source = store.Checkpoint | HuggingFaceSource

_FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_PRODUCTS = {"none": FusedProducts, "int8": Int8Products, "int4": Int4Products}
_ROWS = ("o_proj", "down_proj")
"""Whose columns tensor ranks share."""


def open_source(path: Path, *, verify: bool = True) -> Source:
    """The weights that `path` means: a checkpoint, a run's directory (its newest intact checkpoint), or a Hugging Face one.

    Raises InputError for any other, DamagedCheckpointError for a checkpoint given by its own name and not whole. `verify`:
    check sums (one process does so for all).
    """
    fix = "give a run's directory, a checkpoint, or a Hugging Face directory"
    if not path.is_dir():
        raise InputError("no such directory", where=str(path), fix=fix)
    if (path / store.INDEX).is_file():
        checkpoint = store.Checkpoint.open(path)
        if verify:
            checkpoint.verify()
        return checkpoint
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, problems = store.open_newest_intact(folder)
    if checkpoint is None:
        problem = "; ".join(problems) or "holds no checkpoint, and is no Hugging Face directory"
        raise InputError(problem, where=str(folder), fix=fix)
    for problem in problems:
        print(f"fiveply: {problem}: an older checkpoint is used", file=sys.stderr)
    return checkpoint


def load(source: Source, mesh: Mesh, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Decoder:
    """This rank's stage and slices of the decoder, ready to compute; collectives stand at its boundaries where tp > 1.

    `quantize`: "int8" and "int4" keep the matrices of products in 8 or 4 bits (`int8.py`, `int4.py`); one layer at a time is float
    meanwhile.
    """
    spec, layout, stage = source.spec, mesh.layout, mesh.at.pp
    decoder = stage_of_decoder(spec, stage_units(spec, layout.stages, stage), first=stage == 0)
    products = _PRODUCTS[quantize](dtype, device)
    for unit, group in groupby(place(spec, layout, mesh.at.tp, stage), lambda placed: placed.parameter.unit):
        for placed in group:
            owner, _, attribute = placed.name.rpartition(".")
            value = source.read(placed.name, placed.start, placed.size, dtype).to(device)
            setattr(decoder.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
        for module in decoder.get_submodule(f"model.{unit}").modules() if unit.startswith("layers.") else ():
            for names in _FUSED:
                if linears := [part for name in names if (part := getattr(module, name, None)) is not None]:
                    axis = mesh.tp if names[0] in _ROWS else None
                    stands = products.adopt([one.weight for one in linears], axis)
                    for linear, weight in zip(linears, stands, strict=True):
                        linear.weight = weight
    if decoder.model.norm is not None:
        head = decoder.lm_head or Linear(spec.hidden, spec.vocabulary, False)
        (head.weight,) = products.adopt([decoder.head_weight])
        decoder.lm_head = head  # a tied embedding keeps its rows for looking up
    decoder.set_products(products, head=products)
    if mesh.tp is not None:
        apply_tensor_parallel(decoder, mesh.tp, sequence_parallel=False)
    return decoder.eval()
