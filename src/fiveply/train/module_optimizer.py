"""A user's own torch optimiser over this rank's segments: his factory is given local tensors by name.

Segments are flat ranges of slices, so the optimiser must be elementwise: a trial of it on the same numbers, whole and in
parts, tells. A tensor that the factory gets has as many dimensions as its parameter, since matrices are often told from
vectors by that.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fiveply.parallel.data_parallel import Segment
from fiveply.parallel.parallelize_module import ParallelModule
from fiveply.spec.errors import InputError
from fiveply.train.optimizer import Segments

Factory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class ModuleOptimizer(Segments):
    """The optimiser of a user's module on this rank; `torch` is the user's own, whose steps are completed by hooks."""

    def __init__(self, model: ParallelModule, factory: Factory) -> None:
        super().__init__(model)
        self.model = model
        self.values = [nn.Parameter(segment.value.view(_shape(segment))) for segment in self.segments]
        named = [(segment.placed.name, value) for segment, value in zip(self.segments, self.values, strict=True)]
        # torch refuses an optimiser of nothing, which a rank of a tiny module can have.
        named = named or [("nothing", nn.Parameter(torch.zeros(0, dtype=model.dtype, device=model.device)))]
        optimizer = factory(named)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise _refusal(
                f"gives {type(optimizer).__name__}", "return a torch.optim.Optimizer of the named parameters"
            )
        self.torch = optimizer
        check_elementwise(optimizer)
        optimizer.register_step_pre_hook(lambda *_: self._bind())
        optimizer.register_step_post_hook(lambda *_: model.updated())

    def _bind(self) -> None:
        for segment, value in zip(self.segments, self.values, strict=True):
            value.grad = segment.grad.view(value.shape)

    def scale(self, factor: float) -> None:
        """Multiply the gradients."""
        if self.segments:
            torch._foreach_mul_([segment.grad for segment in self.segments], factor)

    def state(self) -> Iterator[tuple[str, Segment, Tensor]]:
        """(key, segment, values) of the optimiser's state: flat where it has the segment's shape, else a single number."""
        for segment, value in zip(self.segments, self.values, strict=True):
            for key, held in self.torch.state.get(value, {}).items():
                if isinstance(held, Tensor) and held.shape == value.shape:
                    yield key, segment, held.detach().reshape(-1)
                elif held is not None:
                    yield key, segment, torch.as_tensor(held).detach()

    def numbers(self) -> list[str]:
        """Keys whose state is a plain number, no tensor."""
        return sorted(
            {key for state in self.torch.state.values() for key, x in state.items() if isinstance(x, (int, float))}
        )

    def load(self, values: Callable[[Segment], Tensor], state: Callable[[Segment], dict[str, Any]]) -> None:
        """Fill the segments, and the optimiser's state with what `state` gives for each: flat tensors or numbers."""
        for segment, value in zip(self.segments, self.values, strict=True):
            segment.value.copy_(values(segment))
            self.torch.state[value] = {
                key: held.view(value.shape) if isinstance(held, Tensor) and held.dim() == 1 else held
                for key, held in state(segment).items()
            }
        self.model.updated()


def _shape(segment: Segment) -> tuple[int, ...]:
    """The slice's own where the segment is all of it, else a flat range with as many dimensions."""
    size = segment.placed.size
    elements = segment.high - segment.low
    return size if elements == torch.Size(size).numel() else (*[1] * (len(size) - 1), elements)


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError if the optimiser updates an element by anything but its own value, gradient and state."""
    name = type(optimizer).__name__
    fix = "use an elementwise one, such as SGD, Adam, AdamW, RMSprop, Adagrad or Lion"
    for group in optimizer.param_groups:
        if not group["params"]:
            continue
        parameter = group["params"][0]
        try:
            whole, states = _trial(optimizer, group, parameter, [24])
            parts, _ = _trial(optimizer, group, parameter, [7, 17])
        except Exception as error:
            raise _refusal(f"{name} can't take a plain step ({' '.join(str(error).split())[:120]})", fix) from None
        if states:
            raise _refusal(f"{name} keeps '{states[0]}' in another shape than the parameter's, so it can't be cut", fix)
        eps = torch.finfo(parameter.dtype).eps
        tolerance = max(eps, 1e-3 * eps**0.25)
        if not torch.allclose(whole, parts, rtol=tolerance, atol=tolerance):
            raise _refusal(
                f"{name} updates a matrix as a whole, not by elements, so a part of it would be updated otherwise", fix
            )


def _trial(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], like: Tensor, lengths: list[int]
) -> tuple[Tensor, list[str]]:
    """24 numbers after two steps of a twin of the optimiser that holds them as matrices of these many elements; and the
    keys of state that has neither their shape nor is a single number."""
    numbers = torch.linspace(-1, 1, 24, dtype=like.dtype, device=like.device)
    shapes = [(4, 6)] if lengths == [24] else [(1, length) for length in lengths]
    params = [nn.Parameter(x.clone().view(shape)) for x, shape in zip(numbers.split(lengths), shapes, strict=True)]
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state=defaultdict(dict), _optimizer_step_pre_hooks=OrderedDict(),
                      _optimizer_step_post_hooks=OrderedDict())  # fmt: skip
    twin.param_groups = [group | {"params": params} | ({"lr": 0.1} if "lr" in group else {})]
    for step in (1, 2):
        grads = torch.cos(step + torch.arange(24, device=like.device)).to(like.dtype) * numbers.abs()
        for param, grad in zip(params, grads.split(lengths), strict=True):
            param.grad = grad.clone().view(param.shape)
        type(twin).step(twin)  # type: ignore[call-arg]
    odd = [
        key for param in params for key, x in twin.state[param].items()
        if isinstance(x, Tensor) and x.dim() and x.shape != param.shape
    ]  # fmt: skip
    return torch.cat([param.detach().reshape(-1) for param in params]), odd


def _refusal(problem: str, fix: str) -> InputError:
    return InputError(problem, where="parallelize", key="optimizer", fix=fix)
