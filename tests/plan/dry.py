"""Drawn layouts, each with a dry run of one rank: what counting is held against, computed once for all tests."""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

import msgspec
import torch
from layouts.prover import MODELS, every_layout

from fiveply import pipeline_schedule
from fiveply.parallel.data_parallel import Dtypes
from fiveply.plan import footprint, traffic, workload
from fiveply.plan.parts import Case
from fiveply.plan.software import Software
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.run import Data, RunSpec, Train
from fiveply.train.dry_run import DryRank, dry_run

TYPES = {"float64": ("fp64", 8, 8, 8), "float32": ("fp32", 4, 4, 4), "bfloat16": ("bf16", 2, 4, 4)}
"""(precision in the planner's words; bytes of parameters that compute, of gradients, of what the optimiser updates)."""


@dataclass(frozen=True)
class Drawn:
    """A rank of a layout at a model and a batch, as text, so that a failure can be repeated."""

    model: str
    layout: str
    rank: int
    sequence: int = 25
    rows: int = 16
    dtype: str = "float64"
    here: bool = False
    """Whether the dry run takes this machine's own rules, or those of others."""

    def __str__(self) -> str:
        return f"{self.model}:{self.layout}:{self.dtype}@{self.rank}"

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.model] if self.model in MODELS else ModelSpec.load(self.model)

    @cached_property
    def resolved(self) -> Layout:
        return resolve(Layout.parse(self.layout), self.spec, sequence=self.sequence, global_batch=self.rows)

    @property
    def run(self) -> RunSpec:
        return RunSpec(name="drawn", data=Data(sequence=self.sequence), train=Train(global_batch=self.rows))

    @property
    def dtypes(self) -> Dtypes:
        exact = torch.float64 if self.dtype == "float64" else torch.float32
        return Dtypes(getattr(torch, self.dtype), exact, exact)

    @property
    def software(self) -> Software:
        return footprint.runtime(*TYPES[self.dtype][1:])

    @property
    def case(self) -> Case:
        return Case(self.spec, self.sequence, self.software, TYPES[self.dtype][0])

    @property
    def micro_batches(self) -> int:
        return self.rows // self.resolved.dp // self.resolved.micro_batch

    @property
    def dry(self) -> DryRank:
        return _dry(self)

    # what is predicted

    def works(self) -> list[workload.Work]:
        """Of all parts of the rank, for one micro-batch."""
        at, layout = self.resolved.coordinates(self.rank), self.resolved
        return [
            workload.work(self.case, layout, part, at.tp)
            for chunk in range(layout.chunks)
            for part in workload.parts(self.spec, layout.stages, layout.stage_of(at.pp, chunk))
        ]

    def calls(self) -> Counter[tuple[str, str, int]]:
        """In one step, by axis, operation and bytes."""
        at, layout, total = self.resolved.coordinates(self.rank), self.resolved, Counter[tuple[str, str, int]]()
        for chunk in range(layout.chunks):
            for part in workload.parts(self.spec, layout.stages, layout.stage_of(at.pp, chunk)):
                for one in traffic.part_traffic(self.case, layout, part):
                    total[one.axis, one.operation, one.bytes] += one.count * self.micro_batches
        for one in traffic.step_traffic(self.case, layout, at.pp, at.tp, at.shard):
            total[one.axis, one.operation, one.bytes] += one.count
        handed = traffic.handed_on(self.case, layout)
        schedule = pipeline_schedule.build(layout.schedule, layout.pp, self.micro_batches, layout.chunks)
        for action in schedule.ranks[at.pp]:
            if action.peer >= 0:
                total["pp", action.kind.partition("_")[0], handed] += 1
        return total

    def footprint(self) -> footprint.Footprint:
        at = self.resolved.coordinates(self.rank)
        return footprint.footprint(self.case, self.resolved, self.micro_batches, at.pp, at.tp)


@cache
def _dry(case: Drawn) -> DryRank:
    # What earlier tests left unclosed dies now: pytest keeps the frames in which its finalizer complains, and all their tensors.
    gc.collect()
    return dry_run(case.run, case.spec, case.resolved, case.dtypes, case.rank, here=case.here)


def draw(count: int, seed: int, world: int = 8) -> list[Drawn]:
    """Layouts of `world` ranks at models that they are legal for. 16-bit types are drawn where a CPU keeps what GPUs keep:
    it holds a window's mask, and a layer norm's numbers, in another type. float32 is not: which library computes its products
    depends on the processor, and with it the largest moments."""
    random_ = random.Random(seed)
    rows = 16
    choices = {name: list(every_layout(world, spec, rows)) for name, spec in MODELS.items()}
    names = [name for name in choices if choices[name]]
    cases: list[Drawn] = []
    for index in range(count):
        name = names[index % len(names)]
        recompute = random_.choice(("none", "none", "selective", "full"))
        micro_batch = random_.choice((0, 1))
        layout = msgspec.structs.replace(random_.choice(choices[name]), recompute=recompute, micro_batch=micro_batch)
        exact = name in ("gpt2", "qwen2", "mistral")
        dtype = "float64" if exact else random_.choice(("float64", "bfloat16"))
        sequence = random_.choice((16, 25))
        cases.append(Drawn(name, str(layout), random_.randrange(world), sequence, rows, dtype))
    return cases


UNEVEN = Drawn("few-kv", "dp=2,tp=2,pp=2,stages=7+0,micro_batch=2", 5)
"""The last stage holds norm and head alone."""
FEW = [*draw(9, seed=7), UNEVEN]
MANY = draw(96, seed=11)
