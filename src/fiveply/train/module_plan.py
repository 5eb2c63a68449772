"""The layout that `join("auto")` takes for a user's own module: of all dp, zero and pp that the ranks and the named stages
allow, the one that the planner's prices favour among those that fit.

Parameters are counted exactly. Operations are found by running one micro-batch on fake tensors, where a batch says what
shape it has: products by their shapes, everything else by its bytes. Without a batch computation is unknown; but it is shared
equally whatever `zero` is, so data parallel layouts alone are compared, by their reductions and the update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from fiveply.parallel.trace import Cut
from fiveply.plan import cost, explain, footprint
from fiveply.plan.machine import Machine
from fiveply.plan.operations import Operation
from fiveply.plan.simulate import StageSeconds, ends
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, divisors
from fiveply.spec.placement import part
from fiveply.train import auto

SEEN, UNSEEN = 0.9, 0.5
"""Share of a device that state and kept activations may fill; that state may, where activations are unknown."""
_aten: Any = torch.ops.aten
_MATRICES = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)
Price = Callable[[Operation], float]


class Seen(NamedTuple):
    """One micro-batch of a stage: seconds of forward and backward, bytes that forward leaves for backward, bytes that come from
    the stage before, and elements of the parameters that it is the first to use."""

    forward: float = 0.0
    backward: float = 0.0
    kept: int = 0
    arriving: int = 0
    parameters: int = 0


def choose(
    module: nn.Module, ranks: int, loss: Callable[[Any, Any], Any], stages: Sequence[str], batch: Any
) -> tuple[Layout, str]:
    """The layout, and why in a line. Raises InputError for a GPU that the planner does not know, and where nothing fits."""
    devices = auto.cluster(ranks=ranks)
    one = _Pricing(module, explain.machine_of(devices, ranks))
    seen: dict[int, list[Seen]] = {}
    rows, unknown = _rows(batch), "no batch was given"
    if rows:
        try:
            for layout in _layouts(ranks, len(stages)):
                _, size = micro_batches(layout, rows)
                if size not in seen:
                    seen[size] = _seen(module, loss, stages, batch, size, one.price)
        except Exception as error:  # whatever a module does that needs values
            seen, unknown = {}, " ".join(str(error).split())[:120] or type(error).__name__
    found: list[tuple[float, float, Layout]] = []
    for layout in _layouts(ranks, len(stages) if seen and stages and _can_be_cut(module, stages) else 0):
        count, size = micro_batches(layout, rows)
        found.append((*one.of(layout, count, seen.get(size)), layout))
    room = one.machine.memory_bytes * (SEEN if seen else UNSEEN)
    fitting = [(seconds, layout) for seconds, held, layout in found if held <= room]
    if not fitting:
        least = min(held for _, held, _ in found)
        raise InputError(f"every layout takes more than a rank's {room / 1e9:.3g} GB, {least / 1e9:.3g} at the least",
                         where="join", key=auto.AUTO, fix="start more ranks, or name the layout")  # fmt: skip
    seconds, layout = min(fitting, key=lambda pair: pair[0])  # the first of equals: the lowest zero
    why = "a step expected" if seen else f"for reductions and update expected; its operations are not known ({unknown})"
    return layout, f"planned {layout}, of {len(fitting)} that fit {devices}: {1e3 * seconds:.3g} ms {why}"


def _layouts(ranks: int, stages: int) -> Iterator[Layout]:
    """Data parallel ones before pipelines, lower zero first."""
    for pp in divisors(ranks):
        if pp > 1 and (not stages or stages % pp):
            continue
        vp = stages // pp if pp > 1 else 1
        shape = {"schedule": "interleaved", "vp": vp} if vp > 1 else {}
        for zero in range(4 if ranks > pp else 1):
            yield Layout(dp=ranks // pp, pp=pp, zero=zero, **shape)  # type: ignore[arg-type]


def _can_be_cut(module: nn.Module, stages: Sequence[str]) -> bool:
    try:
        for mode in (False, True):
            Cut(module.train(mode), stages)
    except InputError:
        return False
    return True


def _rows(batch: Any) -> int:
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)


def micro_batches(layout: Layout, rows: int) -> tuple[int, int]:
    """How many of a global batch, and rows of one: as many on every rank, by the replica with most rows."""
    most = max(1, part(rows, layout.dp, 0)[1])
    count = 1 if layout.pp == 1 else min(2 * layout.pp, most)
    if layout.micro_batch:
        count = -(-most // layout.micro_batch)
    return count, -(-most // count)


class _Pricing:
    """Layouts of one module on one kind of machine."""

    def __init__(self, module: nn.Module, machine: Machine) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        dtype = trained[0].dtype if trained else torch.float32
        self.machine, self.software = machine, footprint.runtime(*[dtype.itemsize] * 3)
        self.elements = sum(p.numel() for p in trained)
        self._precision = auto.precision(dtype) if auto.precision(dtype) in machine.peak else "fp32"

    def price(self, operation: Operation) -> float:
        return cost.operation_seconds(operation, self.machine, self.software, self._precision)

    def of(self, layout: Layout, micro_batches: int, seen: list[Seen] | None) -> tuple[float, float]:
        """Seconds of a step, and bytes of the worst rank: state, and what micro-batches in flight keep."""
        stages = [Seen(parameters=self.elements)] if seen is None else seen
        if layout.pp == 1:
            stages = [Seen(*map(sum, zip(*stages, strict=True)))]
        held = [[stages[layout.stage_of(rank, chunk)] for chunk in range(layout.chunks)] for rank in range(layout.pp)]
        owned = [sum(stage.parameters for stage in own) for own in held]
        alive = min(micro_batches, layout.stage_count)
        memory = max(
            sum(footprint.state_of(elements, layout.dp, layout.zero, software=self.software))
            + alive * sum(stage.kept for stage in own)
            for elements, own in zip(owned, held, strict=True)
        )
        return self._step(layout, micro_batches, stages) + self._update(layout, micro_batches, max(owned)), memory

    def _step(self, layout: Layout, micro_batches: int, stages: Sequence[Seen]) -> float:
        sends = [cost.call_seconds("send", one.arriving, 2, self.machine, layout.dp) for one in stages[1:]]
        seconds = [
            StageSeconds(one.forward, one.backward, 0.0, send=send, send_back=back)
            for one, send, back in zip(stages, [*sends, 0.0], [0.0, *sends], strict=True)
        ]
        return ends(layout.schedule, layout.pp, layout.chunks, micro_batches, seconds).seconds(seconds)

    def _update(self, layout: Layout, micro_batches: int, elements: int) -> float:
        """Reducing gradients, gathering parameters, and the optimiser, of the rank with most parameters."""

        def call(operation: str) -> float:
            size = int(elements * self.software.parameter_bytes)
            return cost.call_seconds(operation, size, layout.dp, self.machine, 1)

        if layout.zero == 0:
            talking = call("all-reduce")
        else:
            each = micro_batches if layout.zero > 1 else 1
            talking = call("reduce-scatter") * each + call("all-gather") * (each if layout.zero == 3 else 1)
        owned = elements // (layout.dp if layout.zero else 1)
        return talking + cost.optimizer_seconds(owned, self.machine, self.software)


def _seen(
    module: nn.Module, loss: Callable[[Any, Any], Any], stages: Sequence[str], batch: Any, rows: int, price: Price
) -> list[Seen]:
    """Forward and backward of `rows` rows on fake tensors. Raises whatever a module does that needs values."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FakeCopyMode(fake), torch.random.fork_rng([]):
        model = copy.deepcopy(module).train()
        pair = tree_map_only(
            Tensor, lambda x: fake.from_tensor(x[:rows] if x.ndim else x, static_shapes=True), tuple(batch)
        )
        counter = _Counter(model, max(1, len(stages)), price)
        for number, name in enumerate(stages):
            model.get_submodule(name).register_forward_pre_hook(counter.entering(number))
        with counter, saved_tensors_hooks(counter.keep, lambda x: x):
            result = loss(model(pair[0]), pair[1])
            total = result[0] if isinstance(result, tuple) else result
            counter.backward = True
            total.sum().backward()
    whole = sum(counter.forward)
    shares = [seconds / whole if whole else 1 / len(counter.forward) for seconds in counter.forward]
    behind = [counter.behind * share for share in shares]
    return list(map(Seen, counter.forward, behind, counter.kept, counter.arriving, counter.parameters))


class _Counter(TorchDispatchMode):
    """Prices every operation by the stage that runs it. Backward knows no stages: it is shared out as forward is."""

    def __init__(self, model: nn.Module, stages: int, price: Price) -> None:
        super().__init__()
        self.stage, self.backward, self.behind = 0, False, 0.0
        self.forward = [0.0] * stages
        self.kept, self.arriving, self.parameters = [0] * stages, [0] * stages, [0] * stages
        self._price, self._begun = price, set[int]()
        self._unused = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}

    def entering(self, number: int) -> Callable[[nn.Module, Any], None]:
        def enter(_: nn.Module, args: Any) -> None:
            if number and number not in self._begun:
                self._begun.add(number)
                self.stage = number
                self.arriving[number] = sum(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))

        return enter

    def keep(self, x: Tensor) -> Tensor:
        """A tensor that backward needs; views of one, and parameters, are held anyway."""
        if (storage := x.untyped_storage()._cdata) not in self._known:
            self._known.add(storage)
            self.kept[self.stage] += x.nbytes
        return x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:
            self.parameters[self.stage] += self._unused.pop(id(x), 0)
        if not getattr(func, "is_view", False):
            seconds = self._price(_operation(func, args, kwargs, inputs, out))
            if self.backward:
                self.behind += seconds
            else:
                self.forward[self.stage] += seconds
        return out


def _operation(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], out: Any) -> Operation:
    """A matrix product by its shape; what else multiplies, as the cube of as many FLOPs; all others by what they move."""
    packet = func.overloadpacket
    if packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        if packet in _MATRICES:
            left, right = inputs[-2:]
            shape, count = (left.shape[-2], right.shape[-1], left.shape[-1]), left.shape[0] if left.ndim == 3 else 1
        else:
            shape, count = (max(1, round((flops / 2) ** (1 / 3))),) * 3, 1
        return Operation(str(packet), "product", "forward", "mlp", tuple(shape), flops // count, 0, count)
    moved = sum(x.nbytes for x in [*inputs, *tree_leaves(out)] if isinstance(x, Tensor))
    return Operation(str(packet), "memory", "forward", "residual", (), 0, moved)
