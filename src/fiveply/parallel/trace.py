"""Cut the forward of a user's module into stages, by torch.fx.

Only the code between the stages' modules is traced; a module that holds no stage is called as it is, so it may do what
it likes. Stage i begins where its named module is first called, the first one at the very beginning. A value that is used
several stages later travels through those between. The input needs no transfer: every rank of a replica reads its rows.

Notable: fx bakes `training` in, so a forward is traced once for each mode. What crosses a cut, and how large it is, is found
by running the whole trace on fake tensors, once for each shape of input; numbers that come out of shapes are kept from
that run, not sent.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map_only

from fiveply.spec.errors import InputError

_ROOT = "module"


class _Root(nn.Module):
    """Calls the user's module with the input alone, so its other parameters take their defaults."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Any) -> Any:
        return self.module(input)


class _Tracer(fx.Tracer):
    def __init__(self, stages: Sequence[str]) -> None:
        super().__init__()
        self.stages = [f"{_ROOT}.{name}" for name in stages]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(stage.startswith(f"{module_qualified_name}.") for stage in self.stages)


class Cut:
    """The forward of `module` in its present mode (training or not), cut at `stages`. Raises InputError with the reason."""

    def __init__(self, module: nn.Module, stages: Sequence[str]) -> None:
        self.names, root = list(stages), _Root(module)
        try:
            graph = _Tracer(stages).trace(root)
        except Exception as error:
            raise _refusal(f"the forward can't be traced ({' '.join(str(error).split())[:200]})",
                           "move what depends on values into one of the stages' modules, or leave pp out") from error  # fmt: skip
        self.input, *rest = [node for node in graph.nodes if node.op == "placeholder"]
        assert not rest
        self.output = next(node for node in graph.nodes if node.op == "output")
        self.nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self._root = root
        self.stage_of = self._stages()
        self._crossing: list[list[fx.Node]] = [self._used_after(stage) for stage in range(len(stages))]
        self._shapes: dict[Any, dict[fx.Node, Any]] = {}

    def _stages(self) -> dict[fx.Node, int]:
        first: dict[str, int] = {}
        for position, node in enumerate(self.nodes):
            if node.op == "call_module":
                first.setdefault(str(node.target), position)
        starts: list[int] = []
        for name in self.names:
            if f"{_ROOT}.{name}" not in first:
                raise _refusal(f"stage '{name}' is never called by itself", "name modules that forward calls")
            starts.append(first[f"{_ROOT}.{name}"])
        if sorted(set(starts)) != starts:
            called = sorted(self.names, key=lambda name: first[f"{_ROOT}.{name}"])
            raise _refusal(
                f"the stages are called in the order {', '.join(called)}", "list them in that order, each once"
            )
        stage_of: dict[fx.Node, int] = {}
        for position, node in enumerate(self.nodes):
            stage_of[node] = sum(start <= position for start in starts[1:])
            # A part of a value is taken where the value is made, so that tensors cross a cut and no nests of them.
            if _takes_part(node) and node.args[0] in stage_of:
                stage_of[node] = stage_of[node.args[0]]
        return stage_of

    def _used_after(self, stage: int) -> list[fx.Node]:
        """Values made up to `stage` that later stages use."""

        def late(user: fx.Node) -> bool:
            return self.stage_of.get(user, len(self.names) - 1) > stage

        return [node for node in self.nodes if self.stage_of[node] <= stage and any(map(late, node.users))]

    def users(self) -> dict[str, set[int]]:
        """Parameter or buffer -> the stages that use it."""
        module, users = self._root.module, dict[str, set[int]]()
        names = {id(x): name for name, x in [*module.named_parameters(), *module.named_buffers()]}
        for node, stage in self.stage_of.items():
            for x in self._tensors(node):
                users.setdefault(names.get(id(x), ""), set()).add(stage)
        return users

    def _tensors(self, node: fx.Node) -> list[Tensor]:
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            return [*module.parameters(), *module.buffers()]
        return [_attribute(self._root, str(node.target))] if node.op == "get_attr" else []

    def stage(self, stage: int) -> StageForward:
        return StageForward(self, stage, self._root)

    def forget(self, silent: dict[int, Any]) -> None:
        """Let go of the real module, once its stages are taken: shapes are asked of a fake copy of it. `silent`: for the id
        of each object that must not be copied (axes), what stands in for it."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with self._fake, FakeCopyMode(self._fake):
                self._root = copy.deepcopy(self._root, dict(silent))
        except Exception as error:
            raise _refusal(f"the module can't be copied ({' '.join(str(error).split())[:200]})",
                           "keep what copy.deepcopy refuses out of it, or leave pp out") from error  # fmt: skip

    def values(self, input: Any) -> dict[fx.Node, Any]:
        """What the nodes that cross a cut give for an input of this shape: tensors without data, numbers as they are."""
        leaves, tree = tree_flatten(input)
        key = tree, tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key not in self._shapes:
            crossing = {node for nodes in self._crossing for node in nodes}
            try:
                with self._fake, torch.no_grad():
                    env = {
                        self.input: tree_map_only(
                            Tensor, lambda x: self._fake.from_tensor(x, static_shapes=True), input
                        )
                    }
                    for node in self.nodes:
                        env[node] = _run(node, env, lambda target: _attribute(self._root, target))
            except InputError:
                raise
            except Exception as error:
                raise _refusal(f"the shapes of what crosses can't be told ({' '.join(str(error).split())[:200]})",
                               "shapes must not depend on values between stages") from error  # fmt: skip
            for node in crossing:
                nested = [x for x in tree_flatten(env[node])[0] if isinstance(x, Tensor)]
                if nested and not isinstance(env[node], Tensor):
                    raise _refusal(
                        f"'{node}' crosses a cut as a nest of tensors", "take it apart before the next stage"
                    )
            self._shapes[key] = {node: env[node] for node in crossing}
        return self._shapes[key]

    def crossing(self, stage: int, input: Any) -> list[fx.Node]:
        """The tensors that stage `stage` hands on, in order."""
        values = self.values(input)
        return [node for node in self._crossing[stage] if isinstance(values[node], Tensor)]

    def empty(self, stage: int, input: Any, device: torch.device) -> tuple[Tensor, ...]:
        values = self.values(input)
        return tuple(
            torch.empty(tuple(values[node].shape), dtype=values[node].dtype, device=device)
            for node in self.crossing(stage, input)
        )


class StageForward:
    """One stage's part of a cut forward; holds the modules and tensors of this stage alone."""

    def __init__(self, cut: Cut, stage: int, root: nn.Module) -> None:
        self.cut, self.stage = cut, stage
        self.nodes = [node for node in cut.nodes if cut.stage_of[node] == stage]
        self._held = {
            str(node.target): _attribute(root, str(node.target))
            for node in self.nodes
            if node.op in ("call_module", "get_attr")
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """By the user's names."""
        return {
            name.removeprefix(f"{_ROOT}."): held for name, held in self._held.items() if isinstance(held, nn.Module)
        }

    @property
    def calls(self) -> dict[str, int]:
        """How often earlier stages call the modules of this one: those without parameters may stand in several."""
        before = [str(n.target) for n in self.cut.nodes if n.op == "call_module" and self.cut.stage_of[n] < self.stage]
        return {name: before.count(f"{_ROOT}.{name}") for name in self.modules}

    def __call__(self, received: tuple[Tensor, ...], input: Any) -> Any:
        """The values handed on; on the last stage what forward returns."""
        cut, env = self.cut, dict[fx.Node, Any]({self.cut.input: input})
        if self.stage:
            env |= {node: x for node, x in cut.values(input).items() if not isinstance(x, Tensor)}
            # Not the received leaves themselves, on which autograd allows no operation in place.
            values = (x.clone() if x.requires_grad else x for x in received)
            env |= zip(cut.crossing(self.stage - 1, input), values, strict=True)
        for node in self.nodes:
            env[node] = _run(node, env, self._held.__getitem__)
        if self.stage == len(cut.names) - 1:
            return map_arg(cut.output.args[0], lambda node: env[node])
        return tuple(env[node] for node in cut.crossing(self.stage, input))


def _run(node: fx.Node, env: dict[fx.Node, Any], held: Any) -> Any:
    if node.op == "get_attr":
        return held(str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: env[each])
    if node.op == "call_module":
        return held(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _takes_part(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and len(node.all_input_nodes) == 1


def _refusal(problem: str, fix: str) -> InputError:
    return InputError(problem, where="parallelize", key="stages", fix=fix)
