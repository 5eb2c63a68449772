"""What one rank of several measures of its machine: products, attention, memory, collectives, and whole steps of training.

All ranks measure the same at the same time, so contention for cores, caches and memory is part of the figures, as it is in
training. It knows no model of cost; `probe.py` fits one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from fiveply.corpus.batches import Batches, TokenFile
from fiveply.model.attention import RowsAttention
from fiveply.parallel.data_parallel import Dtypes
from fiveply.parallel.parallelize import blocked_backward_on, products_on
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.run import RunSpec, Train
from fiveply.timeline import innermost
from fiveply.train.job import Job
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Groups, Mesh, Transport

PRODUCTS = tuple(
    (m, n, k)
    for m in (64, 256, 1024, 4096)
    for n, k in ((128, 128), (128, 512), (512, 128), (512, 512), (1536, 512), (512, 1536), (2048, 512))
)  # fmt: skip
ATTENTION = ((1, 128, 4, 64), (8, 128, 4, 64), (2, 512, 4, 64), (1, 1024, 8, 32), (8, 256, 8, 32))
"""Rows, sequence, heads, head size."""
CALLS = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23)
"""Bytes."""
TRAINED = ((256, 4, 1), (256, 4, 4), (256, 4, 16), (256, 1, 2), (512, 2, 2), (512, 2, 8), (128, 4, 2), (128, 4, 16))
"""Hidden size, layers and rows of the whole steps."""
WAITED = ((256, 4, 2), (256, 4, 8))
"""The same of those that are tensor parallel."""
SEQUENCE, STEPS = 128, 4


def model(hidden: int, layers: int) -> ModelSpec:
    """Of the whole steps."""
    heads = hidden // 64
    return ModelSpec(
        family="llama", vocabulary=1024, hidden=hidden, layers=layers, heads=heads, kv_heads=heads, head_dim=64,
        ffn=hidden * 11 // 4, positions=SEQUENCE,
    )  # fmt: skip


class Step(msgspec.Struct, frozen=True):
    """One step of one micro-batch a rank: seconds of forward, of backward without what it waits for, of the optimiser, and of
    all that is neither these nor collectives."""

    hidden: int
    layers: int
    rows: int
    forward: float
    backward: float
    optimizer: float
    rest: float


class Measured(msgspec.Struct, frozen=True):
    """Seconds, each a median of medians; of rank 0's view, or the mean over ranks where they may differ."""

    ranks: int
    threads: int
    products: dict[str, list[tuple[int, int, int, float]]]
    """By precision."""
    attention: list[tuple[int, int, int, int, float, float]]
    """Of float32, or of bfloat16 where that is fast: (rows, sequence, heads, size, forward, backward)."""
    bandwidth: float
    """Bytes/s that adding to a large array moves."""
    launch: float
    """Of a small elementwise operation."""
    calls: dict[str, list[tuple[int, float]]]
    """By operation, (bytes of the larger tensor, seconds)."""
    steps: list[Step]
    waits: list[tuple[int, int, int, float]] = []
    """Of steps that are tensor parallel over all ranks: hidden size, layers, rows, seconds in collectives."""


def measure(
    dtypes: Sequence[str], computed: str, transport: Transport, device: torch.device, budget: float, rounds: int
) -> Measured:
    """Collective; `budget` seconds for each single figure. `dtypes` of the products, `computed` of attention and steps. The
    median of `rounds`, since what else runs on a machine comes and goes."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    axis = (
        Axis("world", list(range(size)), Groups(transport).get(list(range(size)), name="probe"), rank)
        if size > 1
        else None
    )

    def timed(work: Callable[[], Any], repeats: int = 0) -> float:
        """The median over ranks' means of repeated calls, begun together: `repeats`, where all ranks must make as many."""
        work()
        if axis is not None:
            axis.all_reduce(torch.zeros(1, device=device))
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < (repeats or 3) or (
            not repeats and time.perf_counter() - begun < budget / rounds and len(times) < 400
        ):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        own = statistics.median(times)
        return own if axis is None else statistics.fmean(axis.gather_objects(own))

    return _middle([_measure(dtypes, computed, transport, device, axis, timed, budget / rounds) for _ in range(rounds)])


def _measure(
    dtypes: Sequence[str], computed: str, transport: Transport, device: torch.device, axis: Axis | None,
    timed: Callable[..., float], budget: float,
) -> Measured:  # fmt: skip
    size, kind = 1 if axis is None else axis.size, getattr(torch, computed)
    large = torch.ones(1 << 24, dtype=torch.float32, device=device)
    small = torch.ones(256, device=device)
    return Measured(
        ranks=size,
        threads=torch.get_num_threads(),
        products={name: _products(getattr(torch, name), device, timed) for name in dtypes},
        attention=[_attention(shape, kind, device, timed) for shape in ATTENTION],
        bandwidth=3 * large.nbytes / timed(lambda: torch.add(large, large, out=large)),
        launch=timed(lambda: small.add(1.0)),
        calls=_calls(axis, device, timed, budget) if axis is not None else {},
        steps=[_step(shape, Layout(dp=size), kind, transport, device)[0] for shape in TRAINED],
        waits=[(*shape, _step(shape, Layout(tp=size), kind, transport, device)[1]) for shape in WAITED
               if size > 1 and not model(*shape[:2]).heads % size],
    )  # fmt: skip


def _middle(rounds: Sequence[Measured]) -> Measured:
    """Of each number its median over the rounds, of sizes what they all are."""

    def middle(same: Sequence[Any]) -> Any:
        if isinstance(same[0], dict):
            return {key: middle([one[key] for one in same]) for key in same[0]}
        if isinstance(same[0], (list, tuple)):
            return [middle(each) for each in zip(*same, strict=True)]
        return same[0] if isinstance(same[0], int) else statistics.median(same)

    return msgspec.convert(middle([msgspec.to_builtins(one) for one in rounds]), Measured)


def _products(
    dtype: torch.dtype, device: torch.device, timed: Callable[..., float]
) -> list[tuple[int, int, int, float]]:
    """A layer's three: its output, and the gradients of its input and of its weight."""
    products = products_on(device, dtype)
    found: list[tuple[int, int, int, float]] = []
    for m, n, k in PRODUCTS:
        x, w, g = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (n, k), (m, n)))
        found.append((m, n, k, timed(lambda x=x, w=w: products.forward(x, w))))
        found.append((m, k, n, timed(lambda g=g, w=w: products.grad_input([g], [w]))))
        found.append((n, k, m, timed(lambda g=g, x=x: products.grad_weights([g], x))))
    return found


def _attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, timed: Callable[..., float]
) -> tuple[int, int, int, int, float, float]:
    rows, sequence, heads, size = shape
    q, k, v = (torch.randn(rows * sequence, heads, size, device=device).to(dtype).requires_grad_() for _ in range(3))
    attention = RowsAttention(rows, blocked_backward=blocked_backward_on(device, dtype))
    gradient = torch.ones(rows * sequence, heads, size, dtype=dtype, device=device)

    def forward() -> torch.Tensor:
        return attention(q, k, v, layer=0, window=0)

    both = timed(lambda: torch.autograd.grad(forward(), (q, k, v), gradient))
    with torch.no_grad():
        alone = timed(forward)
    return *shape, alone, max(both - alone, 0.1 * alone)


def _calls(
    axis: Axis, device: torch.device, timed: Callable[..., float], budget: float
) -> dict[str, list[tuple[int, float]]]:
    """Collectives in step, and transfers there and back, halved."""
    repeats = max(3, min(60, round(budget / 1e-3)))
    found: dict[str, list[tuple[int, float]]] = {}
    for size in CALLS:
        whole = torch.zeros(size // 4 // axis.size * axis.size, device=device)
        part = torch.zeros(len(whole) // axis.size, device=device)

        def swap(whole: torch.Tensor = whole) -> None:
            first, second = (axis.index ^ 1, axis.index & 1)
            if first >= axis.size:
                return
            if second == 0:
                axis.send(whole, first).wait()
                axis.receive(whole, first).wait()
            else:
                axis.receive(whole, first).wait()
                axis.send(whole, first).wait()

        works: dict[str, Callable[[], Any]] = {
            "all-reduce": lambda whole=whole: axis.all_reduce(whole),
            "all-gather": lambda whole=whole, part=part: axis.all_gather(whole, part),
            "reduce-scatter": lambda whole=whole, part=part: axis.reduce_scatter(part, whole),
            "send": swap,
        }
        for name, work in works.items():
            seconds = timed(work, repeats) / (2 if name == "send" else 1)
            found.setdefault(name, []).append((whole.nbytes, seconds))
    return found


def _step(
    shape: tuple[int, int, int], axes: Layout, dtype: torch.dtype, transport: Transport, device: torch.device
) -> tuple[Step, float]:
    """Medians of a few steps of `shape`, rows a replica, and of the seconds in collectives. Replicas step by themselves, all at
    once: what they exchange is measured apart."""
    hidden, layers, rows = shape
    spec, batch = model(hidden, layers), rows * axes.dp
    run = RunSpec(name="probe", train=Train(steps=STEPS + 2, global_batch=batch, sync_every=STEPS + 9))
    mesh = Mesh(resolve(axes, spec, sequence=SEQUENCE, global_batch=batch), spec, Groups(transport))
    job = Job(run, spec, mesh, Dtypes(dtype, torch.float32, torch.float32), device=device)
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary, 64 * SEQUENCE * batch).astype(np.uint32)
    file = TokenFile("random tokens", tokens, np.array([0, len(tokens)], np.int64))
    batches = Batches([file], sequence=SEQUENCE, global_batch=batch, seed=0)
    found: list[tuple[float, ...]] = []
    for step in range(STEPS + 2):
        mesh.recorder.start(device)
        begun = time.perf_counter()
        with mesh.recorder.span("step"):
            job.update(job.gradients(batches, step), step)
        whole = time.perf_counter() - begun
        events = sorted((e for e in mesh.recorder.stop() if e.lane == "compute"), key=lambda e: (e.start, -e.end))
        shares = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0, "talk": 0.0}
        for event, low, high in innermost(events):
            name = "talk" if event.kind in ("wait", "issue") else event.kind
            if name in shares:
                shares[name] += high - low
        found.append((*shares.values(), whole - sum(shares.values())))
    forward, backward, update, talk, rest = (statistics.median(column) for column in zip(*found[2:], strict=True))
    return Step(hidden, layers, rows, forward, backward, update, rest), talk
