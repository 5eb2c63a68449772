"""A rank's own part of the model for inference: read by slices, frozen, with the products of one input fused.

Notable: query, key and value, and gate and up, are slices of one matrix each, so that a layer multiplies four times and not
seven (unfused took 2.4 times the calls' time; a compiler does not repair it). The decoder is not told: its parameters are
views of the fused matrices, and `FusedProducts` finds the whole by the first part.

It knows layouts and files; what is computed with the weights is the decoder's affair.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiveply.checkpoint import store
from fiveply.checkpoint.huggingface import HuggingFaceSource
from fiveply.model.decoder import Decoder
from fiveply.model.products import OneDnnProducts, Products
from fiveply.parallel.parallelize import products_on
from fiveply.parallel.pipeline_stages import stage_of_decoder
from fiveply.parallel.tensor_parallel import apply_tensor_parallel
from fiveply.spec.errors import InputError
from fiveply.spec.placement import place, stage_units
from fiveply.world.mesh import Mesh

Source = store.Checkpoint | HuggingFaceSource

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedProducts(Products):
    """Products of inference: no gradients, and matrices that share their input multiplied as one."""

    def __init__(self, onednn: bool) -> None:
        self._onednn = onednn
        self._whole_of: dict[int, Tensor] = {}

    def fuse(self, parts_OI: Sequence[Tensor]) -> list[Tensor]:
        """The same matrices as views of one."""
        whole_OI = torch.cat(list(parts_OI))
        self._whole_of[whole_OI.data_ptr()] = whole_OI
        return list(whole_OI.split([part.shape[0] for part in parts_OI]))

    def linears(self, x_TI: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(weights_OI) == 1:
            return (self.forward(x_TI, weights_OI[0]),)
        y_TO = self.forward(x_TI, self._whole_of[weights_OI[0].data_ptr()])
        return y_TO.split([weight.shape[0] for weight in weights_OI], -1)

    def forward(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")
        return F.linear(x_TI, weight_OI)


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


def load(source: Source, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> Decoder:
    """This rank's stage and slices of the decoder, ready to compute; collectives stand at its boundaries where tp > 1."""
    spec, layout, stage = source.spec, mesh.layout, mesh.at.pp
    decoder = stage_of_decoder(spec, stage_units(spec, layout.stages, stage), first=stage == 0)
    for placed in place(spec, layout, mesh.at.tp, stage):
        owner, _, attribute = placed.name.rpartition(".")
        value = source.read(placed.name, placed.start, placed.size, dtype).to(device)
        setattr(decoder.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    products = FusedProducts(isinstance(products_on(device, dtype), OneDnnProducts))
    for module in decoder.modules():
        for names in _FUSED:
            linears = [part for name in names if (part := getattr(module, name, None)) is not None]
            if len(linears) == len(names):
                for linear, weight in zip(linears, products.fuse([part.weight for part in linears]), strict=True):
                    linear.weight = nn.Parameter(weight, requires_grad=False)
    decoder.set_products(products, head=products)
    if mesh.tp is not None:
        apply_tensor_parallel(decoder, mesh.tp, sequence_parallel=False)
    return decoder.eval()
