"""verify: two layouts train the same model on the same batches; their parameters, losses and gradients must agree.

The measure (DESIGN section 2) is max|a - b| / max(max|b|, 1e-3 x RMS of all gradients): the floor keeps tensors whose true
gradient is zero, such as a key bias, from being judged by their rounding. Initial parameters must be equal bit for bit.
The batches are random tokens in documents of unequal length, so ranks and micro-batches hold unequal numbers of targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fiveply.checkpoint.slices import assembled
from fiveply.corpus.batches import Batches, TokenFile
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.plan import layout_text
from fiveply.spec.run import Optimizer, RunSpec, Train
from fiveply.train.job import Job
from fiveply.world.launch import launch
from fiveply.world.mesh import Groups, Mesh, Transport

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
ROWS, SEQUENCE = 8, 17
"""At least so many rows a global batch; an odd length, so that tensor ranks cut tokens unevenly."""


@dataclass
class Trace:
    """What one layout computed, whole tensors by name: at the start, per step, and at the end."""

    initial: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of the mean loss, before clipping."""
    parameters: dict[str, Tensor] = field(default_factory=dict)


def verify(
    layout: str,
    against: str = "dp=1",
    *,
    model: str | ModelSpec = "tiny",
    steps: int = 2,
    dtype: str = "float64",
    seed: int = 0,
    sync_every: int = 0,
    transport: Transport = "auto",
) -> dict[str, Any]:
    """Train `model` under both layouts and compare; returns the keys of DESIGN section 8. Raises InputError."""
    if steps < 1:
        raise InputError(f"{steps} steps compare nothing", where="verify", key="steps", fix="give 1 or more")
    if sync_every > 1:
        raise InputError(
            f"sync_every={sync_every} is another algorithm: replicas drift apart between averages, so no layout equals one device",
            where="verify", key="sync_every", fix="verify sync_every=1 or 0",
        )  # fmt: skip
    spec = model if isinstance(model, ModelSpec) else ModelSpec.load(model)
    layouts = [Layout.parse(layout_text(layout), "--layout"), Layout.parse(layout_text(against), "--against")]
    if sync_every and any(one.zero for one in layouts):
        raise InputError("replicas that step alone hold all their state, so zero has nothing to share", where="verify",
                         key="sync_every", fix="set zero=0")  # fmt: skip
    rows = _rows(layouts)
    resolved = [
        resolve(one, spec, sequence=min(SEQUENCE, spec.positions), global_batch=rows, where=where)
        for one, where in zip(layouts, ("--layout", "--against"), strict=True)
    ]
    run = verification_run(rows, steps, seed, dtype, sync_every)
    # On CPUs everywhere: float64 is exact there, and ranks may outnumber devices.
    traces = [
        launch(record, one.world, run, spec, one, steps, dtype, transport, backend="gloo", shared_memory=transport != "gloo")
        for one in resolved
    ]  # fmt: skip
    return compare(*traces, dtype=dtype) | {"layout": str(resolved[0]), "against": str(resolved[1])}


def verification_run(rows: int, steps: int, seed: int, dtype: str = "float64", sync_every: int = 0) -> RunSpec:
    """A run in which clipping bites and the rate warms up, so both are compared too.

    AdamW with a tiny epsilon moves an element by a full learning rate even where its gradient is rounding noise (a key
    bias's is zero in truth). So epsilon is far above float64's noise; float32 gets one of the gradients' size. Replicas
    that step alone take plain gradient steps.
    """
    optimizer = Optimizer(clip=0.5, warmup=1, eps=1e-6 if dtype == "float64" else 1e-3)
    if sync_every:
        optimizer = Optimizer(name="sgd", lr=0.1, clip=0, warmup=0)
    train = Train(steps=max(steps, 4), global_batch=rows, sync_every=sync_every)
    return RunSpec(name="verify", seed=seed, train=train, optimizer=optimizer)


def verification_batches(spec: ModelSpec, run: RunSpec) -> Batches:
    """Random tokens in documents of 1 to 40 tokens, which attention and targets respect.

    Where replicas step alone they don't: the mean of their means is the global mean for equal numbers of targets only.
    """
    rows, seed = run.train.global_batch, run.seed
    random = np.random.Generator(np.random.Philox(key=seed % 2**64))
    tokens = random.integers(0, spec.vocabulary, 40 * rows * SEQUENCE)
    ends = np.cumsum(random.integers(1, 41, len(tokens)))
    documents = np.concatenate(([0], ends[ends < len(tokens)], [len(tokens)])).astype(np.int64)
    file = TokenFile("random tokens", tokens.astype(np.uint32), documents)
    return Batches(
        [file],
        sequence=min(SEQUENCE, spec.positions),
        global_batch=rows,
        seed=seed,
        respect_documents=not run.train.sync_every,
    )


def record(
    run: RunSpec, spec: ModelSpec, layout: Layout, steps: int, dtype: str, groups: Groups | Transport = "auto"
) -> Trace:
    """Train `steps` steps under a resolved layout whose ranks are this world's; whole on rank 0."""
    kind = getattr(torch, dtype)
    mesh = Mesh(layout, spec, groups if isinstance(groups, Groups) else Groups(groups))
    job = Job(run, spec, mesh, Dtypes(kind, kind, kind))
    batches = verification_batches(spec, run)
    trace = Trace(initial=whole_tensors(job, "values"))
    for step in range(steps):
        sums = job.gradients(batches, step)
        losses = [sums.mean_loss] if mesh.dp is None or not job.alone else mesh.dp.gather_objects(sums.mean_loss)
        trace.losses.append(sum(losses) / len(losses))
        if not job.alone:
            trace.gradients.append({name: x / sums.tokens for name, x in whole_tensors(job, "gradients").items()})
        job.update(sums, step)
    trace.parameters = whole_tensors(job, "values")
    return trace


def whole_tensors(job: Job, kind: Literal["values", "gradients"]) -> dict[str, Tensor]:
    """The whole model's by name, on rank 0 (others: none). Collective."""
    # As arrays: a tensor takes ten times as long to travel, and with all that it is a view of.
    own = [(placed, low, values.numpy()) for placed, low, values in job.optimizer.pieces(kind)]
    ranks = job.mesh.collect_objects(own)
    return assembled((placed, low, torch.from_numpy(flat)) for rank in ranks for placed, low, flat in rank)


def _rows(layouts: list[Layout]) -> int:
    """Rows of a global batch that every dp and micro-batch divides."""
    unit = math.lcm(*(layout.dp * max(1, layout.micro_batch) for layout in layouts))
    return unit * -(-ROWS // unit)


def compare(a: Trace, b: Trace, *, dtype: str) -> dict[str, Any]:
    """Differences of `a` from `b` by the measure, with the worst tensor of each kind, and whether all are within tolerance."""
    tolerance = TOLERANCE[dtype]
    floors = [floor(gradients) for gradients in b.gradients] or [0.0]
    initial = _worst(a.initial, b.initial, floors[0])
    losses = [abs(x - y) / max(abs(y), 1e-300) for x, y in zip(a.losses, b.losses, strict=True)]
    steps = [_worst(x, y, least) for x, y, least in zip(a.gradients, b.gradients, floors, strict=False)]
    gradients = max(steps, key=lambda worst: worst[0], default=(0.0, ""))
    parameters = _worst(a.parameters, b.parameters, floors[-1])
    loss = max(losses)
    same_start = all(name in a.initial and torch.equal(a.initial[name], b.initial[name]) for name in b.initial)
    judged = [loss, gradients[0], *([parameters[0]] if dtype == "float64" else [])]
    return {
        "pass": same_start and all(value <= tolerance for value in judged),
        "max_difference": {
            "initial_parameters": initial[0], "loss": loss, "gradients": gradients[0], "parameters": parameters[0],
        },
        "worst": {
            "initial_parameters": initial[1], "loss": f"step {losses.index(loss) + 1}", "gradients": gradients[1],
            "parameters": parameters[1],
        },
        "tolerance": tolerance,
        "dtype": dtype,
    }  # fmt: skip


def floor(tensors: dict[str, Tensor]) -> float:
    """1e-3 x RMS of all: no difference is measured against less."""
    squares = sum(float(x.double().square().sum()) for x in tensors.values())
    return 1e-3 * math.sqrt(squares / max(1, sum(x.numel() for x in tensors.values())))


def difference(a: Tensor | None, b: Tensor, least: float) -> float:
    """By the measure; infinite for a tensor that is missing, of another shape, or not a number."""
    if a is None or a.shape != b.shape:
        return math.inf
    if not b.numel():
        return 0.0
    scale = max(float(b.abs().max()), least)
    gap = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(gap) else 0.0 if gap == 0 else gap / scale if scale else math.inf


def _worst(a: dict[str, Tensor], b: dict[str, Tensor], least: float) -> tuple[float, str]:
    """The largest difference and its tensor."""
    worst = (-1.0, "")
    for name, y in b.items():
        found = difference(a.get(name), y, least)
        if found > worst[0]:
            worst = (found, name)
    return worst


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = [f"{result['layout']}  against  {result['against']}"]
    for key, value in result["max_difference"].items():
        limit = 0.0 if key == "initial_parameters" else result["tolerance"]
        judged = key != "parameters" or result["dtype"] == "float64"
        verdict = ("ok" if value <= limit else "DIFFERS") if judged else "not judged in float32"
        lines.append(
            f"  {key.replace('_', ' '):20} {value:9.2e}  (tolerance {limit:.0e}) {verdict:8} {result['worst'][key]}"
        )
    return "\n".join([*lines, "PASS" if result["pass"] else "FAIL"])
