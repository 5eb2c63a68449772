"""verify for a user's own module: under a layout and on one process it must compute the same, in float64.

The measure and the report are `equality.py`'s. Beside them the outputs of all submodules in the first step are compared,
so that the first tensor that differs is named in the order of the forward pass: initial parameters, outputs, loss,
gradients, parameters and buffers after the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fiveply.equality import TOLERANCE, Trace, compare, difference, floor, table
from fiveply.own_module import World, refuse_built
from fiveply.parallel.parallelize_module import Loss, ParallelModule
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import check_module
from fiveply.spec.placement import part
from fiveply.spec.plan import layout_text
from fiveply.train.module_optimizer import Factory
from fiveply.world.launch import joined, launch


class Verdict(dict[str, Any]):
    """The keys of `fiveply verify --json`, and `first`: the first tensor that differs, or None. True if all is equal; its
    text is the report."""

    def __bool__(self) -> bool:
        return bool(self["pass"])

    def __str__(self) -> str:
        *lines, verdict = table(self).split("\n")
        return "\n".join([*lines, *([f"  first to differ: {self['first']}"] if self["first"] else []), verdict])


@dataclass(frozen=True)
class _Output:
    """What a submodule gave for some rows: on tensor rank `tp` of its world."""

    rows: tuple[int, int]
    """First, and how many of them, in the global batch."""
    held: int
    tp: int
    value: Tensor


@dataclass
class _Recorded(Trace):
    outputs: dict[str, list[_Output]] = field(default_factory=dict)
    """By the submodule's name, in the order of the forward pass; of the first step."""


def verify(
    factory: Callable[[], nn.Module],
    batch: tuple[Any, Any],
    loss: Loss,
    layout: str | Layout,
    *,
    optimizer: Factory | None = None,
    tp: Mapping[str, str] | None = None,
    stages: Sequence[str] = (),
    steps: int = 2,
    seed: int = 0,
    report: bool = True,
) -> Verdict:
    """Train `factory()` `steps` steps on the global batch (input, target) under `layout` and on one process, and compare.

    Starts the ranks itself, on CPUs: call it in a process of its own. optimizer: as for `parallelize`; SGD by default. tp,
    stages: likewise. Prints the report unless `report=False`. Raises InputError.
    """
    if dist.is_initialized() or joined():
        raise InputError("verify starts its own ranks, and this process is one already", where="verify",
                         fix="call it in a script of its own, started by python")  # fmt: skip
    if steps < 1:
        raise InputError(f"{steps} steps compare nothing", where="verify", key="steps", fix="give 1 or more")
    refuse_built(factory, "verify", "factory")
    text = layout_text(str(layout))
    wanted = check_module(Layout.parse(text, "verify"), len(stages), "verify")
    exact = tree_map_only(Tensor, lambda x: x.detach().double() if x.is_floating_point() else x.detach(), tuple(batch))
    arguments = (factory, exact, loss, optimizer or _sgd, dict(tp or {}), list(stages), steps, seed)
    one, many = (launch(_record, each.world, each, *arguments, backend="gloo") for each in (Layout(), wanted))
    result = compare(many, one, dtype="float64")
    first = _first(many, one)
    verdict = Verdict(result | {"layout": text, "against": "one process", "first": first})
    verdict["pass"] = result["pass"] and first is None
    if report:
        print(verdict)
    return verdict


def _sgd(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.1)


def _record(
    layout: Layout, factory: Callable[[], nn.Module], batch: Any, loss: Loss, optimizer: Factory, tp: dict[str, str],
    stages: list[str], steps: int, seed: int,
) -> _Recorded | None:  # fmt: skip
    """One rank's run; what all ranks recorded, on rank 0."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        world = World(layout, seed)
        world.device = torch.device("cpu")
        job = world.parallelize(
            lambda: factory().double(), loss=loss, optimizer=optimizer, tp=tp, stages=stages, strict=False
        )
        recorded = _Recorded(initial=job.state_dict())
        taken: list[tuple[str, _Output]] = []
        hooks = _listen(job.model, taken)
        for _ in range(steps):
            recorded.losses.append(float(job.gradients(batch)))
            while hooks:
                hooks.pop().remove()
            recorded.gradients.append(job.gradient_dict())
            job.update()
        recorded.parameters = job.state_dict()
        for name, output in (each for rank in job.mesh.gather_objects(taken) for each in rank):
            recorded.outputs.setdefault(name, []).append(output)
        return recorded if world.rank == 0 else None
    finally:
        torch.set_default_dtype(before)


def _listen(model: ParallelModule, taken: list[tuple[str, _Output]]) -> list[Any]:
    """Take the outputs of all submodules; returns the hooks."""
    calls: dict[tuple[str, int, int], int] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(_module: nn.Module, _args: Any, output: Any) -> None:
            now = model.now
            if not now.real:
                return
            key = (name, now.first, now.rows)
            calls[key] = calls.get(key, now.calls.get(name, -1)) + 1
            label = name or "the module"
            label += f" (call {calls[key] + 1})" if calls[key] else ""
            tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and not x.is_complex()]
            for index, x in enumerate(tensors):
                part_of = f"[{index}]" if len(tensors) > 1 else ""
                rows = (now.first, now.rows)
                taken.append((label + part_of, _Output(rows, now.rows, model.mesh.at.tp, x.detach().double().clone())))

        return listen

    hooks: list[Any] = []
    for chunk in model.chunks:
        for prefix, module in chunk.modules.items():
            for inner, each in module.named_modules():
                hooks.append(each.register_forward_hook(listener(".".join(filter(None, (prefix, inner))))))
    return hooks


def _first(many: _Recorded, one: _Recorded) -> str | None:
    """The first tensor beyond the tolerance, in forward order."""
    tolerance = TOLERANCE["float64"]
    for name, x in one.initial.items():
        if name not in many.initial or not torch.equal(many.initial[name], x):
            return f"{name}, as it starts"
    least = floor({name: outputs[0].value for name, outputs in one.outputs.items()})
    tp = 1 + max((output.tp for outputs in many.outputs.values() for output in outputs), default=0)
    for name, (whole, *_) in one.outputs.items():
        for output in many.outputs.get(name, ()):
            expected = _rows_of(whole.value, whole.held, output, tp)
            scale = max(least, float(whole.value.abs().max()) if whole.value.numel() else 0.0)
            if expected is not None and not difference(output.value, expected, scale) <= tolerance:
                return f"output of {name}, step 1"
    for step, (x, y) in enumerate(zip(many.losses, one.losses, strict=True)):
        where = f"step {step + 1}"
        if not abs(x - y) <= tolerance * max(abs(y), 1e-300):
            return f"loss, {where}"
        for name, grad in one.gradients[step].items():
            if not difference(many.gradients[step].get(name), grad, floor(one.gradients[step])) <= tolerance:
                return f"gradient of {name}, {where}"
    for name, x in one.parameters.items():
        if not difference(many.parameters.get(name), x, floor(one.gradients[-1])) <= tolerance:
            return f"{name}, after step {len(one.losses)}"
    return None


def _rows_of(whole: Tensor, held: int, output: _Output, tp: int) -> Tensor | None:
    """The part of a whole output that a rank's output should equal; None where rows don't stand first."""
    value = output.value
    if not whole.dim() or value.dim() != whole.dim() or whole.shape[0] % held or value.shape[0] % output.held:
        return None
    several = whole.shape[0] // held
    first, rows = output.rows
    expected = whole[first * several : (first + rows) * several]
    if expected.shape != value.shape and value.dim() > 1 and tp > 1:
        expected = expected.narrow(-1, *part(whole.shape[-1], tp, output.tp))
    return expected if expected.shape == value.shape else None
