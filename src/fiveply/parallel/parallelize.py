"""parallelize: THE function that applies a Layout to a decoder, in a fixed order.

1. cut: each chunk keeps its stage's layers, on the meta device;
2. slice: each parameter becomes this rank's slice, initialised by name or read from a checkpoint, in its unit's flat buffer;
3. tensor boundaries; 4. split backward; 5. compile; 6. recompute; 7. gathering around units (zero 3).

Nothing above asks how the model is split: the trainer sees chunks, units and a reducer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fiveply.model.attention import RowsAttention
from fiveply.model.decoder import Decoder
from fiveply.model.dropout import KeyedDropout
from fiveply.model.products import OneDnnProducts, Products
from fiveply.parallel.data_parallel import Dtypes, GradientReducer, Unit
from fiveply.parallel.initialize import initial_value
from fiveply.parallel.pipeline_stages import stage_of_decoder
from fiveply.parallel.recompute import recomputed_block
from fiveply.parallel.split_backward import WeightQueue
from fiveply.parallel.tensor_parallel import VocabularyHead, apply_tensor_parallel
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.placement import Placed, place, stage_units
from fiveply.world.device import find
from fiveply.world.mesh import Mesh


class TensorSource(Protocol):
    """Where parameters are read from: a checkpoint or a Hugging Face directory."""

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one replica that flow through the pipeline together, packed: T = rows x sequence.

    targets_T: -100 where nothing is predicted. documents_T: the document of each token, or None to attend over whole rows.
    first_token: global index of the first token, for keyed dropout.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    rows: int
    documents_T: Tensor | None = None
    first_token: int = 0


class Chunk:
    """One stage's part of the decoder on this rank: a `pipeline_parallel.Stage`."""

    def __init__(self, decoder: Decoder, stage: int, units: dict[str, Unit], reduces: list[Unit], last: bool) -> None:
        self.decoder, self.stage, self.last = decoder, stage, last
        self.units = units
        """All units that the chunk computes with, in forward order."""
        self.reduces = reduces
        """Those whose gradients its last backward completes (a tied embedding's belong to the first stage)."""
        self.head: VocabularyHead | None = None
        self.weights: WeightQueue | None = None
        """Weight gradients put off by a split backward."""
        self.blocked_backward = False
        """Of attention."""

    @property
    def layers(self) -> tuple[int, int] | None:
        names = list(self.decoder.model.layers)
        return (int(names[0]), int(names[-1])) if names else None

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.decoder.boundary.tokens = len(micro_batches[0].tokens_T)

    def arriving(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        unit = next(iter(self.units.values()))
        shape = self.decoder.boundary.rows, self.decoder.spec.hidden
        return (torch.empty(shape, dtype=unit.dtypes.compute, device=unit.grad.device),)

    leaving = arriving  # the residual stream has one shape throughout

    def forward(
        self, received: tuple[Tensor, ...], batch: MicroBatch, seed: int, step: int | None
    ) -> tuple[Tensor, ...]:
        decoder, spec = self.decoder, self.decoder.spec
        dropout = None
        if step is not None and spec.dropout:
            end = batch.first_token + len(batch.tokens_T)
            indices_T = decoder.boundary.local(torch.arange(batch.first_token, end, device=batch.tokens_T.device))
            dropout = KeyedDropout(spec.dropout, seed, step, indices_T)
        attention = RowsAttention(
            batch.rows,
            batch.documents_T,
            spec.attention_dropout if step is not None else 0.0,
            blocked_backward=self.blocked_backward,
        )
        output = decoder(*(received or (batch.tokens_T,)), batch.positions_T, attention, dropout)
        if self.head is not None:
            unit = self.units["embed" if spec.tied else "head"]
            unit.wait_gather()
            output = self.head(output, batch.targets_T)
            unit.release()
        return (output,)


class ParallelModel:
    """A decoder under a resolved Layout, as this rank holds it."""

    def __init__(
        self, spec: ModelSpec, mesh: Mesh, chunks: list[Chunk], units: list[Unit], reducer: GradientReducer
    ) -> None:
        self.spec, self.mesh, self.chunks, self.units, self.reducer = spec, mesh, chunks, units, reducer
        self.layout = mesh.layout

    @property
    def dtype(self) -> torch.dtype:
        return self.units[0].dtypes.compute

    @property
    def device(self) -> torch.device:
        return self.units[0].grad.device

    def updated(self) -> None:
        """After the optimiser's step: refresh the parameters that the chunks compute with."""
        for unit in self.units:
            unit.updated()

    def train(self, mode: bool = True) -> None:
        for chunk in self.chunks:
            chunk.decoder.train(mode)


def parallelize(
    spec: ModelSpec,
    mesh: Mesh,
    *,
    seed: int,
    dtypes: Dtypes,
    device: torch.device | None = None,
    source: TensorSource | None = None,
    compile: bool = False,
    average_gradients: bool = True,
) -> ParallelModel:
    """Build this rank's part of the model under `mesh.layout` (resolved). Values come from `source`, else from `seed`."""
    layout, device = mesh.layout, device or torch.device("cpu")
    chunks: list[Chunk] = []
    made: dict[str, Unit] = {}

    def value(placed: Placed) -> Tensor:
        if source is not None:
            return source.read(placed.name, placed.start, placed.size).to(device)
        return initial_value(placed, spec, seed, dtypes.optimizer).to(device)

    for index in range(layout.chunks):
        stage = layout.stage_of(mesh.at.pp, index)
        names = stage_units(spec, layout.stages, stage)
        decoder = stage_of_decoder(spec, names, first=stage == 0)
        own = [name for name in names if name not in made]
        _make_units(decoder, stage, mesh, dtypes, made, value)
        units, reduces = {name: made[name] for name in names}, [made[name] for name in own]
        chunks.append(Chunk(decoder, stage, units, reduces, stage == layout.stage_count - 1))
    for chunk in chunks:
        chunk.blocked_backward = blocked_backward_on(device, dtypes.compute)
        _dress(chunk, mesh, products_on(device, dtypes.compute), compile=compile)
    units = list(made.values())
    return ParallelModel(spec, mesh, chunks, units, GradientReducer(units, mesh, average_gradients=average_gradients))


def products_on(device: torch.device, dtype: torch.dtype) -> Products:
    """The fastest products for a type: a rule, not a timing, so that a resumed run computes the same bits."""
    onednn = device.type == "cpu" and dtype == torch.float32 and find().mkl_held_back
    return OneDnnProducts() if onednn else Products()


def blocked_backward_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `flash_backward` is quicker than torch's own attention backward: a rule likewise."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not find().bf16_tiles


def longest_of(spec: ModelSpec, mesh: Mesh, stage: int) -> dict[str, int]:
    """Elements of each unit on the tensor rank that holds most: rank 0, which has the larger part of every uneven cut."""
    sizes: Counter[str] = Counter()
    for placed in place(spec, mesh.layout, 0, stage):
        sizes[placed.parameter.unit] += math.prod(placed.size)
    return sizes


def _make_units(
    decoder: Decoder, stage: int, mesh: Mesh, dtypes: Dtypes, made: dict[str, Unit], value: Callable[[Placed], Tensor]
) -> None:
    """Give every parameter of the chunk its values, unit by unit; a unit that another chunk made is shared."""
    by_unit: dict[str, list[Placed]] = {}
    for placed in place(decoder.spec, mesh.layout, mesh.at.tp, stage):
        by_unit.setdefault(placed.parameter.unit, []).append(placed)
    longest = longest_of(decoder.spec, mesh, stage)
    for name, rows in by_unit.items():
        if name not in made:
            made[name] = Unit(name, [(placed, value(placed)) for placed in rows], longest[name], mesh, dtypes)
        for entry in made[name].entries:
            owner, _, attribute = entry.placed.name.rpartition(".")
            setattr(decoder.get_submodule(owner), attribute, entry.parameter)
    missing = [name for name, parameter in decoder.named_parameters() if parameter.is_meta]
    assert not missing, f"the parameter table lacks {missing}"


def _dress(chunk: Chunk, mesh: Mesh, products: Products, *, compile: bool) -> None:
    """Put everything around the plain modules: boundaries, split backward, compile, recompute, gathering."""
    layout, decoder = mesh.layout, chunk.decoder
    if mesh.tp is not None:
        apply_tensor_parallel(decoder, mesh.tp, sequence_parallel=layout.sequence_parallel)
    if chunk.last:
        chunk.head = VocabularyHead(decoder, mesh.tp)
    if layout.schedule in ("zb", "zbv") and layout.pp > 1:
        chunk.weights = WeightQueue(products)
    decoder.set_products(chunk.weights or products, head=products)
    for block in decoder.model.layers.values():
        forward: Any = block.forward
        if compile:
            forward = torch.compile(forward)
        block.forward = recomputed_block(forward, layout.recompute)
    if layout.zero == 3:
        trunk, units = decoder.model, chunk.units
        # Backward needs the weights of blocks and norms; an embedding's needs the indices alone.
        users: list[tuple[nn.Module | None, str, bool]] = [
            (trunk.embed_tokens if decoder.first else None, "embed", False),
            (trunk.embed_positions, "positions", False),
            *((block, f"layers.{name}", True) for name, block in trunk.layers.items()),
            (trunk.norm, "norm", True),
        ]
        gather_in_order([(module, units[name], again) for module, name, again in users if module is not None])


def gather_in_order(users: Sequence[tuple[nn.Module, Unit, bool]]) -> None:
    """zero 3: the parameters of each (module, unit, whether backward needs it) exist from just before its use to just after,
    forward and backward, one unit ahead."""
    for index, (module, unit, again) in enumerate(users):
        following = [after for _, after, _ in users[index + 1 : index + 2]]
        preceding = [before for _, before, needed in users[max(0, index - 1) : index] if needed]
        _gather_around(module, unit, following, preceding, again)


def _gather_around(module: nn.Module, unit: Unit, following: list[Unit], preceding: list[Unit], again: bool) -> None:
    """Hooks on `module`, which may return tensors in any nesting; `again`: backward needs the parameters too."""

    def before(_module: nn.Module, _args: Any) -> None:
        unit.wait_gather()
        for ahead in following:
            ahead.start_gather()

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # computed again in backward, which needs the parameters right after
        unit.release()
        for x in tree_leaves(output) if again else ():
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(before_backward)

    def before_backward(_grad: Tensor) -> None:
        unit.wait_gather()
        for ahead in preceding:
            ahead.start_gather()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
