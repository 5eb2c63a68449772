"""Dry run: chosen ranks of a world of any size, one after another in this process, on fake tensors and a fake process group.

The mesh is the true one and the step is `Job`'s own, action by action; only values are missing. So what it counts is what
the code does: every collective (axis, operation, bytes), the live bytes from moment to moment, every matrix product. It is
what `plan/workload.py`, `traffic.py` and `footprint.py` are held against. It allocates no tensor and reads no corpus.

Three places of a step need values, and each is handed in: parameters (`_Nothing`), rows of tokens (`_Blank`), and the sums
that the host reads (`_DryJob.numbers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fiveply.corpus.batches import Rows
from fiveply.parallel.data_parallel import Dtypes
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.run import RunSpec
from fiveply.train import metrics
from fiveply.train.job import Job
from fiveply.train.ledger import Ledger
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call

STEP = 1
"""The second one: optimisers make their state in the first."""
_CATEGORY = {"forward": "activations", "data": "buffers", "receive_forward": "buffers", "receive_backward": "buffers"}
"""Of what is made during a span; what other spans make is working memory."""


class Calls(msgspec.Struct, frozen=True):
    """`count` equal collectives or transfers; `bytes` of the larger of its tensors at this rank."""

    axis: str
    operation: str
    bytes: int
    count: int


class Moment(msgspec.Struct, frozen=True):
    """An action of the schedule, with the live bytes at its start and end."""

    kind: str
    chunk: int
    micro_batch: int
    before: int
    after: int


class DryRank(msgspec.Struct, frozen=True):
    """What one rank does in one step."""

    rank: int
    place: dict[str, int]
    peak_bytes: int
    peak: dict[str, int]
    """Live bytes by category at the peak."""
    when: str
    standing: dict[str, int]
    """Bytes of parameters, gradients and optimiser (`metrics.bytes_by_category`)."""
    calls: list[Calls]
    flops: dict[str, int]
    products: list[tuple[int, int, int, int]]
    """(m, n, k, count) of every matrix product outside attention."""
    attention: list[tuple[str, tuple[int, ...], int]]
    moments: list[Moment]


def dry_run(run: RunSpec, spec: ModelSpec, layout: Layout, dtypes: Dtypes, ranks: Sequence[int]) -> list[DryRank]:
    """One step of each of `ranks` in a world of `layout` (resolved). Raises InputError for a rank outside it."""
    for rank in ranks:
        if not 0 <= rank < layout.world:
            raise InputError(f"no rank {rank} among {layout.world}", where="--ranks", fix=f"0 to {layout.world - 1}")
    return [_one_rank(run, spec, layout, dtypes, rank) for rank in ranks]


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """This process as `rank` of `size`: collectives return at once and move nothing."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _one_rank(run: RunSpec, spec: ModelSpec, layout: Layout, dtypes: Dtypes, rank: int) -> DryRank:
    with fake_world(rank, layout.world):
        mesh = _DryMesh(layout, spec)
        recorder = mesh.recorder

        def category() -> str:
            span = recorder.current
            while span is not None and span.call is not None:
                span = span.outer
            return _CATEGORY.get(span.kind, "working") if span else "working"

        ledger = Ledger(category)
        when: list[str] = [""]

        def note() -> None:
            span = recorder.current
            while span is not None and span.call is not None:
                span = span.outer
            when[0] = _said(span.kind, span.chunk, span.micro_batch) if span else "between actions"

        ledger.on_peak = note
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            job = _DryJob(run, spec, mesh, dtypes, source=_Nothing())
            job.optimizer.load(STEP, lambda _, segment: torch.empty_like(segment.value))
            _classify(job, ledger)
            recorder.start(job.device)
            assert recorder.recording is not None
            recorder.recording.now = ledger.bytes  # spans are measured in bytes
            ledger.reset_peak()
            job.step(_Blank(run), STEP)  # pyright: ignore[reportArgumentType]
            recording = recorder.recording
            standing = metrics.bytes_by_category(job.model)
        calls = Counter((call.axis.name, call.operation, call.bytes) for call in recording.calls)
        moments = [
            Moment(span.kind, span.chunk, span.micro_batch, before, after)
            for span, before, after in recording.spans
            if span.call is None and span.kind not in ("data", "sums", "optimizer")
        ]
        return DryRank(
            rank=rank,
            place=msgspec.structs.asdict(mesh.at),
            peak_bytes=ledger.peak_total,
            peak={name: size for name, size in ledger.peak.items() if size},
            when=when[0],
            standing=standing,
            calls=[Calls(*key, count) for key, count in sorted(calls.items())],
            flops=ledger.flops,
            products=[(*shape, count) for shape, count in sorted(ledger.products.items())],
            attention=[(*key, count) for key, count in sorted(ledger.attention.items())],
            moments=moments,
        )


def _classify(job: Job, ledger: Ledger) -> None:
    for unit in job.model.units:
        ledger.belongs(unit.master, "optimizer")
        ledger.belongs(unit.full, "parameters")
        ledger.belongs(unit.values, "parameters")
        ledger.belongs(unit.grad, "gradients")
        if unit.full_grad is not None:
            ledger.belongs(unit.full_grad, "gradients")
    for name, _, values in job.optimizer.state():
        if name != "master":
            ledger.belongs(values, "optimizer")
    ledger.watch_gathered(list(job.model.units))


def _said(kind: str, chunk: int, micro_batch: int) -> str:
    numbers = [("chunk", chunk), ("micro-batch", micro_batch)]
    return " ".join([kind, *(f"{name} {number}" for name, number in numbers if number >= 0)])


class _DryAxis(Axis):
    """Sends are done at once, where a fake group's work never says that it is: so what was sent is let go."""

    def send(self, x: Tensor, to: int) -> Call:
        call = self._call("send", x, False, lambda: None, self.ranks[to])
        assert call is not None
        return call


class _DryMesh(Mesh):
    kind = _DryAxis


class _DryJob(Job):
    def numbers(self, x: Tensor) -> list[float]:
        """No values: the sums are finite, and there is no gradient to clip."""
        return [0.0] * x.numel()


class _Nothing:
    """Parameters without values."""

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return torch.empty(size)


class _Blank:
    """The global batch as zeros: the shapes that `corpus.batches.Batches` would give."""

    def __init__(self, run: RunSpec) -> None:
        self.global_batch, self.sequence = run.train.global_batch, run.data.sequence
        self.documents = run.data.respect_documents

    def rows(self, start: int, count: int) -> Rows:
        tokens = np.zeros((count, self.sequence), np.int64)
        documents = np.zeros_like(tokens, np.int32) if self.documents else None
        return Rows(tokens, tokens.copy(), documents, start)

    def target_tokens(self, start: int, count: int) -> int:
        return count * self.sequence
