"""Tensor parallelism of a user's own module: the linears that he names are split, everything else is replicated.

A "column" linear holds part of its output columns, a "row" linear part of its input columns (Megatron-LM's terms; Shoeybi
et al. 2019). Between a column and the rows that follow, an activation stays split if nothing but elementwise operations
touches it, which torch.fx tells by the code of the modules around them; where it can't tell, the column gathers. Both
forms give the same values.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fiveply.parallel.module_layers import KeyedDropoutLayer
from fiveply.spec.errors import InputError
from fiveply.spec.placement import Split
from fiveply.world.collectives import Axis, copy_to, gather_columns, sum_from, take_columns

SPLITS: dict[str, Split] = {"column": "rows", "row": "columns"}
"""How the weight of each kind is sliced: a column of the product is a row of nn.Linear's weight."""

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""What only holds other modules."""
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Identity, KeyedDropoutLayer,
)  # fmt: skip
_NAMES = (
    "relu relu6 leaky_relu elu celu selu gelu silu mish tanh sigmoid softplus softsign hardtanh hardswish hardsigmoid "
    "logsigmoid add sub mul div true_divide neg abs square sqrt rsqrt exp log log1p sin cos erf pow clamp contiguous "
    "float double half bfloat16 clone detach relu_ mul_ add_"
)
ELEMENTWISE_METHODS = frozenset(_NAMES.split())
ELEMENTWISE_FUNCTIONS = frozenset(
    [getattr(owner, name) for owner in (torch, F) for name in _NAMES.split() if hasattr(owner, name)]
    + [operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.abs]
    + [operator.iadd, operator.isub, operator.imul, operator.itruediv]
)


class ColumnLinear(nn.Linear):
    """An nn.Linear of which this rank computes part of the output columns; `out_features` stays the whole number."""

    axis: Axis
    gathers: bool

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(copy_to(input, self.axis), self.weight, self.bias)
        return gather_columns(y, self.axis, self.out_features) if self.gathers else y


class RowLinear(nn.Linear):
    """An nn.Linear of which this rank multiplies part of the input columns; the products are summed."""

    axis: Axis
    takes: bool
    """The input is whole, and this rank takes its columns."""

    def forward(self, input: Tensor) -> Tensor:
        x = take_columns(input, self.axis) if self.takes else input
        y = sum_from(F.linear(x, self.weight), self.axis)
        return y if self.bias is None else y + self.bias


def check_names(module: nn.Module, tp: Mapping[str, str], degree: int) -> None:
    """Raise InputError for a name that is no linear of `module`, a kind that is none, or a size below `degree`."""

    def refuse(key: str, problem: str, fix: str) -> NoReturn:
        raise InputError(problem, where="parallelize: tp", key=key, fix=fix)

    modules = dict(module.named_modules(remove_duplicate=False))
    linears = [name for name, layer in modules.items() if isinstance(layer, nn.Linear)]
    known = ", ".join(linears[:8]) or "it has none"
    for name, kind in tp.items():
        layer = modules.get(name)
        if layer is None:
            refuse(name, "the module has no such part", f"name linears of it: {known}")
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            refuse(name, f"{type(layer).__name__} is no nn.Linear", f"name linears: {known}")
        if kind not in SPLITS:
            refuse(name, f"'{kind}' is unknown", 'give "column" or "row"')
        parent = modules[name.rpartition(".")[0]]
        if type(parent).__module__.startswith("torch.nn") and not isinstance(parent, LISTS):
            problem = f"{type(parent).__name__} uses its weight without calling it"
            refuse(name, problem, "write that block as a module of your own")
        width, side = (layer.out_features, "output") if kind == "column" else (layer.in_features, "input")
        if width < degree:
            refuse(name, f"tp={degree} exceeds its {width} {side} columns", "lower tp")
    holders: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = holders.setdefault(id(parameter), name)
        if other != name and {other.rpartition(".")[0], name.rpartition(".")[0]} & tp.keys():
            refuse(name.rpartition(".")[0], f"its weight is also {other}", "leave tied weights out of tp")


def split_linears(module: nn.Module, tp: Mapping[str, str], axis: Axis) -> None:
    """Turn the named linears (checked) into column- and row-parallel ones; parameters are not sliced here."""
    kept, dropouts = _kept_split(module, tp)
    for name, kind in tp.items():
        layer = cast(Any, module.get_submodule(name))
        if kind == "column":
            layer.__class__ = ColumnLinear
            layer.axis, layer.gathers = axis, name not in kept
        else:
            layer.__class__ = RowLinear
            layer.axis, layer.takes = axis, name not in kept
    for name, columns in dropouts.items():
        vars(module.get_submodule(name)).update(axis=axis, columns=columns)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, KeyedDropoutLayer) or super().is_leaf_module(m, module_qualified_name)


def _kept_split(module: nn.Module, tp: Mapping[str, str]) -> tuple[set[str], dict[str, int]]:
    """The columns whose output and the rows whose input stay split, and the dropouts between, with the whole width."""
    kept: set[str] = set()
    dropouts: dict[str, int] = {}
    for scope in sorted({_common(a, b) for a, ka in tp.items() for b, kb in tp.items() if (ka, kb) == ("column", "row")},
                        key=lambda name: -name.count(".") - bool(name)):  # fmt: skip
        # The innermost scope first: its forward says all about the linears in it that meet there.
        inner = module.get_submodule(scope)
        prefix = f"{scope}." if scope else ""
        try:
            graph = _Tracer().trace(inner)
        except Exception:  # whatever a user's forward does that a symbolic run can't follow
            continue
        names = {name.removeprefix(prefix): name for name in tp if name.startswith(prefix) and name not in kept}
        for columns, rows, passed in _regions(graph, inner, {short: tp[name] for short, name in names.items()}):
            kept |= {names[each] for each in columns | rows}
            dropouts |= {prefix + name: width for name, width in passed.items()}
    return kept, dropouts


def _common(a: str, b: str) -> str:
    """The innermost module that holds both."""
    pairs = zip(a.split(".")[:-1], b.split(".")[:-1], strict=False)
    return ".".join(name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _regions(
    graph: fx.Graph, module: nn.Module, tp: Mapping[str, str]
) -> list[tuple[set[str], set[str], dict[str, int]]]:
    """Groups of columns and rows of one width that elementwise operations alone connect: (columns, rows, dropouts)."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    region: dict[fx.Node, set[fx.Node]] = {}  # each split value's region, shared among its members
    found: list[tuple[set[str], set[str], dict[str, int]]] = []
    for name, kind in tp.items():
        for start in calls.get(name, []) if kind == "column" else []:
            if start in region:
                continue
            members, rows, sound = {start}, set[fx.Node](), True
            todo = [start]
            while todo and sound:
                node = todo.pop()
                for user in node.users:
                    if user.op == "call_module" and tp.get(str(user.target)) == "row":
                        rows.add(user)
                    elif user not in members and _elementwise(user, module):
                        members.add(user)
                        todo.append(user)
                    elif user not in members:
                        sound = False
                # What an elementwise operation combines with a split value must be split alike.
                for source in node.all_input_nodes if node.target not in tp else []:
                    if source not in members:
                        is_column = source.op == "call_module" and tp.get(str(source.target)) == "column"
                        if not is_column and not (source.op != "placeholder" and _elementwise(source, module)):
                            sound = False
                            break
                        members.add(source)
                        todo.append(source)
            region |= dict.fromkeys(members, members)
            columns = {str(n.target) for n in members if n.op == "call_module" and tp.get(str(n.target)) == "column"}
            names = {str(n.target) for n in rows}
            widths = {cast(nn.Linear, module.get_submodule(c)).out_features for c in columns}
            widths |= {cast(nn.Linear, module.get_submodule(r)).in_features for r in names}
            # A linear that is called elsewhere too can't be split here and whole there.
            whole = all(set(calls[c]) <= members for c in columns) and all(set(calls[r]) <= rows for r in names)
            # (A value is split only if every leaf of the region is a column.)
            if sound and rows and whole and len(widths) == 1:
                width = widths.pop()
                passed = {
                    str(n.target): width
                    for n in members
                    if n.op == "call_module" and isinstance(module.get_submodule(str(n.target)), KeyedDropoutLayer)
                }
                if all(set(calls[d]) <= members for d in passed):
                    found.append((columns, names, passed))
    return found


def _elementwise(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), ELEMENTWISE_MODULES)
    if node.op == "call_function":
        return node.target in ELEMENTWISE_FUNCTIONS
    return node.op == "call_method" and node.target in ELEMENTWISE_METHODS
