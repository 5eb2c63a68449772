"""What a rank of a serving world does: load, say that it is ready, run the steps that the driver sends, in order.

Notable: the driver is reached by a connection of its own, apart from the tensors' collectives, and a rank without work sleeps
in it: nothing spins. Each second, between steps, a rank says that it is alive; one that is stuck in a step can't.

It knows where the driver is and how to make a Runner; which requests there are is the driver's affair.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fiveply.engine import weights
from fiveply.engine.constrain import Grammars
from fiveply.engine.paged_attention import PagedAttention
from fiveply.engine.runner import Runner
from fiveply.engine.wire import Wire
from fiveply.plan.inference import GPU_SHARE, HOST_SHARE
from fiveply.serve.messages import BLOCK, Begin, Heartbeat, Hello, Ready, Shutdown, StepBatch
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import RunError
from fiveply.spec.layout import Layout
from fiveply.world import device
from fiveply.world.mesh import Groups, Mesh, Transport

BEAT_SECONDS = 1.0
CONNECT_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """What every rank is started with."""

    model: Path
    layout: Layout
    """Resolved."""
    dtype: str
    host: str
    port: int
    secret: str
    cache_tokens: int = 0
    """Tokens that the cache holds, or 0: by the memory there is."""
    transport: Transport = "auto"
    ends: tuple[int, ...] = ()
    """Tokens that end an answer."""
    quantize: str = "none"


def work(job: Job) -> None:
    """Until the driver says Shutdown. Raises ConnectionError where it is gone."""
    rank = dist.get_rank()
    wire = Wire(job.host, job.port, CONNECT_SECONDS)
    try:
        wire.send(Hello(rank, os.getpid(), job.secret))
        source = weights.open_source(job.model, verify=False)
        found, dtype = device.find(), getattr(torch, job.dtype)
        place = torch.device(found.kind)
        mesh = Mesh(job.layout, source.spec, Groups(job.transport))
        decoder = weights.load(source, mesh, dtype, place, job.quantize)
        layers = [int(name) for name in decoder.model.layers]
        heads = source.spec.heads // job.layout.tp
        kv_heads = max(1, source.spec.kv_heads // job.layout.tp)
        wire.send(Ready(_blocks(job, source.spec, len(layers), kv_heads, dtype, found)))
        while (begin := wire.receive(BEAT_SECONDS)) is None:
            wire.send(Heartbeat(-1))
        if isinstance(begin, Shutdown):
            return
        assert isinstance(begin, Begin)
        attention = PagedAttention(layers, heads, kv_heads, source.spec.head_dim, begin.blocks, dtype, place)
        grammars = Grammars(source.path, source.spec.vocabulary, job.ends, place)
        _steps(wire, Runner(decoder, attention, mesh, grammars))
    finally:
        wire.close()


def _steps(wire: Wire, runner: Runner) -> None:
    step, beat = -1, time.monotonic()
    while True:
        message = wire.receive(max(0.0, beat + BEAT_SECONDS - time.monotonic()) or 0.001)
        if isinstance(message, Shutdown):
            return
        if isinstance(message, StepBatch):
            result, step = runner.run(message), message.step
            if result is not None:
                wire.send(result)
        if time.monotonic() >= beat + BEAT_SECONDS:
            wire.send(Heartbeat(step))
            beat = time.monotonic()


def _blocks(job: Job, spec: ModelSpec, layers: int, kv_heads: int, dtype: torch.dtype, found: device.Devices) -> int:
    """How many this rank could hold; a rank without layers holds any number."""
    if job.cache_tokens:
        return -(-job.cache_tokens // BLOCK)
    if found.kind == "cuda":
        memory = torch.cuda.mem_get_info()[0] * GPU_SHARE
    else:
        memory = found.memory_bytes * found.count * HOST_SHARE / job.layout.world
    size = PagedAttention.bytes_per_block(max(1, layers), kv_heads, spec.head_dim, dtype)
    if memory < size:
        raise RunError(f"no block of the cache ({size} bytes) fits in {int(memory)} bytes; use more ranks")
    return int(memory / size)
