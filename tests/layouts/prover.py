"""Many layouts proven equal to one process inside one launch: what the tests of this folder share.

A launch forks its ranks in a tenth of a second, and a layout of a small model then costs a few tenths, so cases that need
the same world run one after another on the same ranks and groups. One process's trace is computed once per model and run,
here in the parent, and reaches the ranks by the fork.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import msgspec
import torch
import torch.distributed as dist

from fiveply.equality import (
    SEQUENCE,
    Trace,
    compare,
    record,
    verification_batches,
    verification_run,
    whole_tensors,
)  # fmt: skip
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout, ScheduleName, divisors
from fiveply.spec.legality import resolve
from fiveply.spec.run import RunSpec
from fiveply.train.job import Job
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups, Mesh, Transport

STEPS = 2
SEED = 2
"""At which ranks and micro-batches hold unequal numbers of targets already in the first step."""


def model(family: str, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> ModelSpec:
    return ModelSpec(
        family, vocabulary, hidden, layers, heads, kv_heads, hidden // heads, ffn=131, positions=64, **more
    )


MODELS = {
    "llama": model("llama", 72, 7, 9, 3, 1003),  # tp divides neither the MLP nor the vocabulary; tp=9 replicates 3 heads
    "few-kv": model("llama", 72, 7, 12, 2, 1003, tied=True),  # tp=4 holds each key-value head twice
    "qwen3": model("qwen3", 48, 7, 4, 2, 509, qk_norm=True, tied=True),
    "gpt2": model(
        "gpt2", 72, 7, 12, 12, 509, norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True, gated_mlp=False,
        activation="gelu_tanh", rope=None, tied=True, dropout=0.1,
    ),
    "qwen2": model("qwen2", 72, 7, 12, 6, 509, qkv_bias=True, window=5, window_layers=(3, 4, 5, 6)),
    "mistral": model("mistral", 48, 7, 8, 4, 257, window=7, window_layers=tuple(range(7))),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A layout, as text, at a model and a run."""

    model: str
    layout: str
    rows: int = 12
    """Of a global batch, of an odd number of tokens each and unequal numbers of targets."""
    steps: int = STEPS
    dtype: str = "float64"
    sync_every: int = 0
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.model}:{self.layout}"

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.model]

    @property
    def run(self) -> RunSpec:
        run = verification_run(self.rows, self.steps, SEED, self.dtype, self.sync_every)
        return msgspec.structs.replace(run, train=msgspec.structs.replace(run.train, compile=self.compile))

    def resolved(self) -> Layout:
        return resolve(Layout.parse(self.layout), self.spec, sequence=SEQUENCE, global_batch=self.rows)

    def legal(self) -> bool:
        try:
            self.resolved()
        except InputError:
            return False
        return True

    def record(self, groups: Groups | None = None) -> Trace:
        return record(self.run, self.spec, self.resolved(), self.steps, self.dtype, groups)


@cache
def _one_process(case: Case) -> Trace:
    return launch(case.record, 1)


def one_process(case: Case) -> Trace:
    """What one process computes at the case's model and run, in one uncompiled piece; computed once."""
    return _one_process(replace(case, layout="dp=1", compile=False))


def on_ranks(
    cases: Sequence[Case], judge: Callable[[Case, Trace], Any], transport: Transport, timeout_seconds: float = 120.0
) -> list[Any]:
    """Record every case (all of one world size) in one launch over `transport`; `judge` sees each whole trace on rank 0.

    A rank that fails names the layout it was under, so that a hang or an error among hundreds is found.
    """
    (world,) = {case.resolved().world for case in cases}

    def ranks() -> list[Any]:
        groups, judged = Groups(transport), []
        for case in cases:
            try:
                trace = case.record(groups)
            except Exception as error:
                raise RuntimeError(f"under {case}: {error}") from error
            judged.append(judge(case, trace) if dist.get_rank() == 0 else None)
            if case.compile:  # else shapes of one layout make the next one's graphs dynamic
                torch.compiler.reset()
        assert world == 1 or groups.carriers == transport
        return judged

    return launch(ranks, world, timeout_seconds=timeout_seconds)


def prove(cases: Sequence[Case], transport: Transport) -> list[dict[str, Any]]:
    """Compare each case with one process; one result of `equality.compare` for each."""
    traces = {case: one_process(case) for case in cases}
    return on_ranks(cases, lambda case, trace: compare(trace, traces[case], dtype=case.dtype), transport)


def prove_each(cases: Iterable[Case], transport: Transport) -> dict[Case, dict[str, Any]]:
    """`prove` for cases of several world sizes: one launch for each size."""
    results: dict[Case, dict[str, Any]] = {}
    by_world = sorted(cases, key=lambda case: case.resolved().world)
    for _, group in itertools.groupby(by_world, key=lambda case: case.resolved().world):
        members = list(group)
        results |= zip(members, prove(members, transport), strict=True)
    return results


def assert_equal(case: Case, result: dict[str, Any]) -> None:
    assert result["pass"], f"{case} differs from one process: {result['max_difference']}, worst {result['worst']}"
    assert result["max_difference"]["initial_parameters"] == 0


def prove_near_float32(case: Case, transport: Transport) -> None:
    """bf16 has 8 bits: no equality to rounding, but the same gradients by direction, and in float32 where they add up."""
    exact = one_process(case)

    def ranks() -> tuple[float, float, float] | None:
        mesh = Mesh(case.resolved(), case.spec, Groups(transport))
        job = Job(case.run, case.spec, mesh, Dtypes(torch.bfloat16, torch.float32, torch.float32))
        batches, trace = verification_batches(case.spec, case.run), Trace()
        for step in range(2):
            sums = job.gradients(batches, step)
            assert {segment.grad.dtype for segment in job.optimizer.segments} == {torch.float32}
            assert {unit.full.dtype for unit in job.model.units} == {torch.bfloat16}
            trace.losses.append(sums.mean_loss)
            trace.gradients.append({name: x / sums.tokens for name, x in whole_tensors(job, "gradients").items()})
            job.update(sums, step)
        return _near(trace, exact) if mesh.rank == 0 else None

    loss, together, matrix = launch(ranks, case.resolved().world, timeout_seconds=300)
    assert loss < 2e-3
    assert together > 0.999
    assert matrix > 0.98


def _near(trace: Trace, exact: Trace) -> tuple[float, float, float]:
    """Worst relative error of a loss, cosine of all gradients together, and the least cosine of a matrix's."""
    loss = max(abs(x - y) / y for x, y in zip(trace.losses, exact.losses, strict=True))
    pairs = {
        name: (x.double().ravel(), exact.gradients[0][name].double().ravel()) for name, x in trace.gradients[0].items()
    }
    together = torch.cosine_similarity(*(torch.cat(side) for side in zip(*pairs.values(), strict=True)), dim=0)
    matrices = [
        torch.cosine_similarity(x, y, dim=0)
        for name, (x, y) in pairs.items()
        if x.count_nonzero() and "proj.weight" in name
    ]
    return loss, float(together), float(min(matrices))


def every_layout(world: int, spec: ModelSpec, rows: int = 12) -> Iterator[Layout]:
    """All legal layouts of `world` ranks over dp, zero, dp_shard, tp, sp, pp and schedule: what `resolve` does not refuse."""
    for dp, tp, pp in itertools.product(divisors(world), repeat=3):
        if dp * tp * pp != world:
            continue
        choices = itertools.product(range(4), divisors(dp), (0, 1), get_args(ScheduleName))
        for zero, dp_shard, sp, schedule in choices:
            if (zero == 0 and dp_shard != 1) or (tp == 1 and sp):
                continue  # two spellings of one layout
            layout = Layout(
                dp=dp, tp=tp, pp=pp, zero=zero, schedule=schedule,
                dp_shard=dp_shard if 1 <= dp_shard < dp and zero else 0, sp=0 if tp > 1 and not sp else -1,
            )  # fmt: skip
            try:
                resolve(layout, spec, sequence=SEQUENCE, global_batch=rows)
            except InputError:
                continue
            yield layout


def values(layout: Layout) -> list[tuple[str, Any]]:
    """The key values of a layout that a model must meet."""
    return [
        ("dp", layout.dp), ("tp", layout.tp), ("pp", layout.pp), ("zero", layout.zero if layout.dp > 1 else 0),
        ("hybrid", 1 < layout.shard_ranks < layout.dp), ("sp", layout.sequence_parallel),
        ("schedule", layout.schedule if layout.pp > 1 else f"{layout.chunks} chunks"),
        ("accumulates", layout.micro_batch > 0),
    ]  # fmt: skip


def pairs(layout: Layout) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(values(layout), 2))


def rotate(layouts: Sequence[Layout], seen: set[tuple[Any, ...]], rows: int = 12) -> list[Case]:
    """Give each layout a model: of those it is legal for, the one that meets most new pairs of key values there.

    `seen` collects (model, pair); every second layout without a pipeline accumulates over micro-batches.
    """
    cases: list[Case] = []
    names = list(MODELS)
    for index, layout in enumerate(layouts):
        if layout.pp == 1 and index % 2:
            layout = msgspec.structs.replace(layout, micro_batch=1 if layout.dp == 4 else 2 if layout.dp > 1 else 3)
        first = index % len(names)
        legal = [name for name in names[first:] + names[:first] if Case(name, str(layout), rows).legal()]
        name = max(legal, key=lambda model: len({(model, pair) for pair in pairs(layout)} - seen))
        seen.update((name, pair) for pair in pairs(layout))
        cases.append(Case(name, str(layout), rows))
    return cases
