"""parallelize_module: apply a Layout to a user's own module, in a fixed order.

1. layers: batch norms are synchronised, dropouts keyed; 2. tensor parallel: the named linears; 3. cut: by torch.fx, where
there are stages; 4. slice: each parameter becomes this rank's slice, in its unit's flat buffer; 5. gathering around units
(zero 3).

The same units, reducer and executor serve as for the decoder. A parameter keeps its identity: its `.data` moves.
Rows weigh: a micro-batch's loss counts by its rows, and a rank or micro-batch without rows runs a stand-in row of weight 0,
so that every rank takes part in the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fiveply.parallel.data_parallel import Dtypes, GradientReducer, Unit
from fiveply.parallel.module_layers import Now, Watch, key_layers
from fiveply.parallel.module_tensor_parallel import LISTS, SPLITS, check_names, split_linears
from fiveply.parallel.parallelize import gather_in_order
from fiveply.parallel.split_backward import WeightQueue
from fiveply.parallel.trace import Cut, StageForward
from fiveply.spec.errors import InputError
from fiveply.spec.placement import Parameter, Placed, Split, part, place_parameter
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Mesh

Loss = Callable[[Any, Any], Any]
"""(output, target) -> the mean over rows, or (sum, count)."""
REST = "rest"
"""The unit of parameters that stand in no block: held throughout a stage's forward and backward at zero 3."""


@dataclass(frozen=True)
class ModuleBatch:
    """Rows of one replica: `rows` of them count, of the `held` that the tensors have (a stand-in does not count)."""

    input: Any
    target: Any
    held: int
    rows: int
    first: int
    """Index of the first row in the global batch."""


class ModuleChunk:
    """One stage of a user's module: a `pipeline_parallel.Stage`."""

    weights: WeightQueue | None = None
    layers = None

    def __init__(
        self, model: ParallelModule, stage: int, forwards: dict[bool, Any], modules: dict[str, nn.Module]
    ) -> None:
        self.model, self.stage = model, stage
        self.last = stage == model.mesh.layout.stage_count - 1
        self.forwards, self.modules = forwards, modules
        """By whether it trains; and the modules that are called, by name."""
        self.units: dict[str, Unit] = {}
        self.reduces: list[Unit] = []
        self._watched = not model.strict or model.mesh.world is None

    def begin(self, micro_batches: Sequence[ModuleBatch]) -> None:
        self.model.count = self.model.count.new_zeros(())
        forward = self.forwards[self.model.training]
        for batch in micro_batches if isinstance(forward, StageForward) else ():
            forward.cut.values(batch.input)

    def arriving(self, batch: ModuleBatch) -> tuple[Tensor, ...]:
        return self._crossing(batch, self.stage - 1)

    def leaving(self, batch: ModuleBatch) -> tuple[Tensor, ...]:
        return self._crossing(batch, self.stage)

    def _crossing(self, batch: ModuleBatch, stage: int) -> tuple[Tensor, ...]:
        return self.forwards[self.model.training].cut.empty(stage, batch.input, self.model.device)

    def forward(
        self, received: tuple[Tensor, ...], batch: ModuleBatch, seed: int, step: int | None
    ) -> tuple[Tensor, ...]:
        forward, rest = self.forwards[self.model.training], self.units.get(REST)

        def enter(_: Any = None) -> None:
            self.model.enter(batch, step or 0, self._calls(forward))
            if rest is not None:
                rest.wait_gather()

        enter()
        if step is not None and not self._watched:
            self._watched = True
            with Watch(self._released, self.model.device):
                output = forward(received, batch.input)
        else:
            output = forward(received, batch.input)
        outputs = (self._loss(output, batch),) if self.last else output
        if not torch.is_grad_enabled():
            for unit in self.units.values():
                unit.release()
        for x in outputs:
            if x.requires_grad:  # blocks that the user recomputes in backward draw the same masks again
                x.register_hook(enter)
        return outputs

    def _calls(self, forward: Any) -> dict[str, int]:
        return {name: count - 1 for name, count in forward.calls.items()} if isinstance(forward, StageForward) else {}

    def _released(self, parameter: nn.Parameter) -> str:
        for unit in self.units.values():
            for entry in unit.entries if not unit.is_full else ():
                if entry.parameter is parameter:
                    return entry.placed.name
        return ""

    def _loss(self, output: Any, batch: ModuleBatch) -> Tensor:
        loss = self.model.loss(output, batch.target)
        if isinstance(loss, tuple) and len(loss) == 2:
            total, count = loss[0], torch.as_tensor(loss[1])
            share = float(batch.rows > 0)
        else:
            total, count, share = loss, torch.tensor(1.0), float(batch.rows)
        if not isinstance(total, Tensor) or total.numel() != 1:
            shape = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise InputError(f"gives {shape}, not the mean over rows", where="parallelize", key="loss",
                             fix="return a scalar tensor, or (sum, count)")  # fmt: skip
        self.model.count += count.to(self.model.count) * share
        return total.reshape(()) * share


class ParallelModule:
    """A user's module under a Layout, as this rank holds it: a `pipeline_parallel.Model`."""

    def __init__(
        self, mesh: Mesh, module: nn.Module, loss: Loss, now: Now, device: torch.device, *, strict: bool
    ) -> None:
        self.mesh, self.loss, self.now, self.device, self.strict = mesh, loss, now, device, strict
        self.layout = mesh.layout
        self.module: nn.Module | None = module
        """The whole module, where this rank holds it all."""
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        """What the last stage's losses count: rows, unless the loss says otherwise."""
        self.training = True
        self.dtype = torch.float32
        self.chunks: list[ModuleChunk] = []
        self.units: list[Unit] = []
        self.reducer: GradientReducer
        self.constants: dict[str, Tensor] = {}
        """Persistent buffers and frozen parameters, whole or this rank's slice as `placed` says."""
        self.placed: dict[str, Placed] = {}
        """Of everything that this rank holds, by name."""
        self.aliases: dict[str, str] = {}
        """Further names of tied parameters, and the name that stands for them here."""

    def enter(self, batch: ModuleBatch, step: int, calls: dict[str, int]) -> None:
        now = self.now
        now.step, now.first, now.rows, now.real = step, batch.first, batch.held, batch.rows > 0
        now.share, now.calls = 1.0, calls

    def updated(self) -> None:
        for unit in self.units:
            unit.updated()

    def train(self, mode: bool = True) -> None:
        self.training = mode
        for chunk in self.chunks:
            for module in chunk.modules.values():
                module.train(mode)


def parallelize_module(
    module: nn.Module,
    mesh: Mesh,
    *,
    loss: Loss,
    seed: int,
    tp: Mapping[str, str],
    stages: Sequence[str],
    device: torch.device,
    strict: bool = True,
) -> ParallelModule:
    """`module`, whole and equal on every rank, becomes this rank's part of it under `mesh.layout`. Raises InputError.

    `strict=False` leaves what would differ by layout as it is, to be found by comparison.
    """
    layout = mesh.layout
    _check(module, loss, tp, stages, layout.tp)
    module.to(device)
    model = ParallelModule(mesh, module, loss, Now(seed), device, strict=strict)
    key_layers(module, model.now, mesh.dp, micro_batches=layout.pp > 1 or layout.micro_batch > 0, strict=strict)
    tensors = [*module.named_parameters(), *_persistent_buffers(module)]
    shapes = {name: tuple(x.shape) for name, x in tensors}
    names = {id(p): name for name, p in tensors}
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    model.aliases = {name: names[id(x)] for name, x in every if names.get(id(x), name) != name}
    splits = _slice_linears(module, mesh, tp)
    numbers = [layout.stage_of(mesh.at.pp, index) for index in range(layout.chunks)]
    cuts = {mode: Cut(module.train(mode), stages) for mode in (False, True)} if layout.stage_count > 1 else {}
    users = _users(cuts.values(), module, stages)
    for stage in numbers:
        forwards: dict[bool, Any] = {mode: cut.stage(stage) for mode, cut in cuts.items()}
        if cuts:
            modules = forwards[False].modules | forwards[True].modules
        else:
            forwards, modules = dict.fromkeys((False, True), lambda _, input: module(input)), {"": module}
        model.chunks.append(ModuleChunk(model, stage, forwards, modules))
    for cut in cuts.values():  # before hooks are set, which a copy would carry
        cut.forget({id(mesh.tp): _SilentAxis(mesh.tp)} if mesh.tp else {})
    blocks = {chunk.stage: _blocks(chunk) for chunk in model.chunks}
    trained: dict[int, dict[str, list[tuple[Placed, nn.Parameter]]]] = {stage: {} for stage in numbers}
    unit_of = {stage: _units_of(module, blocks[stage]) for stage in numbers}
    for name, x in tensors:
        holders = users.get(name, {0})  # what no stage's trace uses belongs to the first
        here = [stage for stage in numbers if stage in holders]
        if not here:
            continue
        unit = unit_of[here[0]].get(id(x), REST)
        parameter = Parameter(name, shapes[name], unit, splits.get(name, "none"))
        placed = place_parameter(layout, parameter, 1, tp_rank=mesh.at.tp, counted=min(holders) in numbers)
        model.placed[name] = placed
        if isinstance(x, nn.Parameter) and x.requires_grad:
            trained[here[0]].setdefault(unit, []).append((placed, x))
        else:
            model.constants[name] = x
    model.dtype = next(p.dtype for p in module.parameters() if p.requires_grad)
    for chunk in model.chunks:
        _make_units(chunk, trained[chunk.stage])
        if layout.zero == 3:
            held = blocks[chunk.stage]
            gather_in_order([(held[name], unit, True) for name, unit in chunk.units.items() if name != REST])
        model.units += chunk.reduces
    model.reducer = GradientReducer(model.units, mesh)
    if cuts:
        model.module = None
    model.train()
    return model


def _users(cuts: Iterable[Cut], module: nn.Module, stages: Sequence[str]) -> dict[str, set[int]]:
    """Parameter or buffer -> the stages that use it; raises InputError for what is trained in two."""
    users: dict[str, set[int]] = {}
    for cut in cuts:
        for name, numbers in cut.users().items():
            users.setdefault(name, set()).update(numbers)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and len(users.get(name, ())) > 1:
            first, second, *_ = (stages[number] for number in sorted(users[name]))
            raise InputError(f"{name} is used in stages {first} and {second}, and weights tied across a cut are not trained as one",
                             where="parallelize", key="stages", fix="untie them, or cut elsewhere")  # fmt: skip
    return users


def _check(module: nn.Module, loss: Loss, tp: Mapping[str, str], stages: Sequence[str], degree: int) -> None:
    def refuse(problem: str, key: str, fix: str) -> None:
        raise InputError(problem, where="parallelize", key=key, fix=fix)

    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        refuse("has no shape before the first batch", lazy[0], "give the layer its sizes")
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trained:
        refuse("the module has nothing to train", "model", "leave requires_grad on for some parameters")
    for name, p in trained:
        if p.dtype != trained[0][1].dtype:
            refuse(f"is {p.dtype}, and {trained[0][0]} is {trained[0][1].dtype}".replace("torch.", ""), name,
                   "give all trained parameters one type")  # fmt: skip
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        refuse("it has parameters, which nothing would train", "loss",
               "hold them in the module, and let it return what the loss needs")  # fmt: skip
    names = dict(module.named_modules(remove_duplicate=False))
    for name in stages:
        if name not in names or not name:
            known = [each for each in names if each and each.count(".") == name.count(".")]
            refuse(f"the module has no part '{name}'", "stages", f"name parts of it: {', '.join(known[:8])}")
    check_names(module, tp, degree)


def _slice_linears(module: nn.Module, mesh: Mesh, tp: Mapping[str, str]) -> dict[str, Split]:
    """Turn the linears of `tp` parallel and slice their parameters; how each is split, by name."""
    if mesh.tp is None:
        return {}
    split_linears(module, tp, mesh.tp)
    splits: dict[str, Split] = {f"{layer}.weight": SPLITS[kind] for layer, kind in tp.items()}
    # A row's bias is added whole, after the sum.
    splits |= {f"{layer}.bias": "rows" for layer, kind in tp.items() if kind == "column"}
    for name, parameter in module.named_parameters():
        if name in splits:
            dim = 1 if splits[name] == "columns" else 0
            mine = part(parameter.shape[dim], mesh.tp.size, mesh.tp.index)
            parameter.data = parameter.data.narrow(dim, *mine).clone()
    return splits


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True).keys()
    return [(name, x) for name, x in module.named_buffers() if name in kept]


def _blocks(chunk: ModuleChunk) -> dict[str, nn.Module]:
    """The modules whose parameters are gathered around their call: those that stand in lists, and what a cut calls."""
    blocks: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        listed = isinstance(module, LISTS)
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if listed and not isinstance(child, LISTS):
                blocks[path] = child
            else:
                visit(path, child)

    for name, module in chunk.modules.items():
        before = len(blocks)
        visit(name, module)
        if name and len(blocks) == before:
            blocks[name] = module
    return blocks


def _units_of(module: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[int, str]:
    """Parameter (by id) -> the one block that it stands in; what stands in several, or elsewhere too, is in none."""
    units: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        inside = next((block for block in blocks if name.startswith(f"{block}.")), REST)
        if units.setdefault(id(parameter), inside) != inside:
            units[id(parameter)] = REST
    return units


def _make_units(chunk: ModuleChunk, trained: Mapping[str, list[tuple[Placed, nn.Parameter]]]) -> None:
    model = chunk.model
    dtypes = Dtypes(model.dtype, model.dtype, model.dtype)
    for name in sorted(trained, key=lambda unit: unit != REST):  # the rest is complete last in backward
        largest = (place_parameter(model.layout, p.parameter, 1, tp_rank=0).size for p, _ in trained[name])
        longest = sum(map(math.prod, largest))
        chunk.units[name] = Unit(f"{chunk.stage}/{name}", trained[name], longest, model.mesh, dtypes)
    chunk.reduces = list(chunk.units.values())


class _SilentAxis(Axis):
    """Stands for an axis where only shapes are asked."""

    def __init__(self, axis: Axis) -> None:
        self.name, self.ranks, self.size, self.index = axis.name, axis.ranks, axis.size, axis.index

    def all_reduce(self, *_args: Any, **_options: Any) -> Any:
        return None

    all_gather = reduce_scatter = all_reduce
