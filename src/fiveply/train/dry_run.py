"""Dry run: chosen ranks of a world of any size, one after another in this process, on fake tensors and a fake process group.

The mesh is the true one and the step is `Job`'s own, action by action; only values are missing. So what it counts is what
the code does: every collective (axis, operation, bytes), the live bytes from moment to moment, every matrix product. It is
what `plan/workload.py`, `traffic.py` and `footprint.py` are held against. It allocates no tensor and reads no corpus.

What a step needs of values is handed in at four places: parameters (`Nothing`), rows of tokens (`Blank`), the sums that the
host reads (`_DryJob.numbers`), and whether a transfer is done (`_DryAxis`). Tensors are CPU ones, as the operations that
torch chooses for them: a build of torch without CUDA cannot index a fake CUDA tensor. A world of more ranks than this
machine has devices runs elsewhere, and takes no rule that is this processor's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fiveply import pipeline_schedule
from fiveply.corpus.batches import Rows
from fiveply.parallel.data_parallel import Dtypes
from fiveply.pipeline_schedule import Action, Kind
from fiveply.report.terminal import plain_table, schedule_picture
from fiveply.report.text import bytes_text, count_text
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import resolve
from fiveply.spec.plan import layout_text
from fiveply.spec.run import RunSpec
from fiveply.train import auto, metrics, setup
from fiveply.train.job import Job
from fiveply.train.ledger import Ledger
from fiveply.world import device
from fiveply.world.collectives import Axis
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call, Recorder, Span

STEP = 1
"""The second one: optimisers make their state in the first."""
_ACTIONS: frozenset[str] = frozenset(Kind)
_CATEGORIES = {"forward": "activations", "data": "buffers", "receive_forward": "buffers", "receive_backward": "buffers"}
"""Of what is made during a span; what other spans make is working memory."""


class Calls(msgspec.Struct, frozen=True):
    """`count` equal collectives or transfers; `bytes` of the larger of its tensors at this rank."""

    axis: str
    operation: str
    bytes: int
    count: int


class Moment(msgspec.Struct, frozen=True):
    """An action of the schedule, with the live bytes at its start and end."""

    action: Action
    before: int
    after: int


class DryRank(msgspec.Struct, frozen=True):
    """What one rank does in one step."""

    rank: int
    place: dict[str, int]
    peak_bytes: int
    peak: dict[str, int]
    """Live bytes by category at the peak: state; `activations`, made by forwards; `buffers`, made for data and receives;
    `gathered`, parameters of zero 3; `working`, all else."""
    when: str
    """What was done at the peak."""
    standing: dict[str, int]
    """Bytes of parameters, gradients and optimiser (`metrics.bytes_by_category`)."""
    calls: list[Calls]
    flops: dict[str, int]
    """Of matrix products, and of attention over the keys that a token may see."""
    products: list[tuple[int, int, int, int]]
    """(m, n, k, count) of every matrix product outside attention."""
    attention: list[tuple[str, tuple[int, ...], int]]
    """(`forward` or `backward`, (rows, queries, keys, heads, key-value heads, head size), count)."""
    moments: list[Moment]


class DryRun(msgspec.Struct, frozen=True):
    layout: str
    world: int
    precision: dict[str, str]
    schedule: dict[str, Any]
    ranks: list[DryRank]


def of_run(run: RunSpec, layout: str = "", ranks: str = "") -> DryRun:
    """Of a run's file, under its layout or another; `ranks` as `0,17,16383`, by default the first and the last. Raises
    InputError for what `train` would refuse before it starts, and for a rank outside the world."""
    spec, where = run.model_spec(), "--layout" if layout else "layout"
    text = layout_text(layout or run.layout)
    given = Layout.parse(setup.planned(run, spec, []) if text == auto.AUTO else text, where)
    resolved = resolve(given, spec, sequence=run.data.sequence, global_batch=run.train.global_batch, where=where)
    try:
        chosen = [int(part) for part in ranks.split(",")] if ranks else sorted({0, resolved.world - 1})
    except ValueError:
        raise InputError(f"'{ranks}' names no ranks", where="--ranks", fix="write numbers, as 0,17") from None
    for rank in chosen:
        if not 0 <= rank < resolved.world:
            fix = f"give numbers from 0 to {resolved.world - 1}"
            raise InputError(f"there is no rank {rank} among {resolved.world}", where="--ranks", fix=fix)
    dtypes = setup.dtypes(run.precision)
    micro_batches = run.train.global_batch // resolved.dp // resolved.micro_batch
    here = resolved.world <= device.find().count
    return DryRun(
        layout=str(resolved),
        world=resolved.world,
        precision=setup.describe(dtypes),
        schedule=metrics.schedule_facts(resolved, micro_batches),
        ranks=[dry_run(run, spec, resolved, dtypes, rank, here=here) for rank in chosen],
    )


def dry_run(run: RunSpec, spec: ModelSpec, layout: Layout, dtypes: Dtypes, rank: int, *, here: bool = True) -> DryRank:
    """One step of `rank` in a world of `layout` (resolved). `here`: on this machine; else attention's backward is torch's own, as on
    GPUs, whatever is quicker on this processor."""
    with fake_world(rank, layout.world):
        mesh = _DryMesh(layout, spec)
        now = _Now(mesh.recorder)
        ledger = Ledger(now.category, now.keep)
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            job = _DryJob(run, spec, mesh, dtypes, source=Nothing())
            job.optimizer.load(STEP, lambda _, segment: torch.empty_like(segment.value))
            for chunk in job.model.chunks:
                chunk.blocked_backward = chunk.blocked_backward and here
            _name(job, ledger)
            recording = mesh.recorder.start(job.device)
            recording.now = ledger.bytes  # the clock of this recording reads bytes
            ledger.begin()
            job.step(Blank(run), STEP)  # pyright: ignore[reportArgumentType]
            standing = metrics.bytes_by_category(job.model)
        calls = Counter((call.axis.name, call.operation, call.bytes) for call in recording.calls)
        spans = [
            (before, after) for span, before, after in recording.spans if span.call is None and span.kind in _ACTIONS
        ]
        return DryRank(
            rank=rank,
            place=msgspec.structs.asdict(mesh.at),
            peak_bytes=ledger.peak_total,
            peak={name: size for name, size in ledger.peak.items() if size},
            when=now.when,
            standing=standing,
            calls=[Calls(*key, count) for key, count in sorted(calls.items())],
            flops=ledger.flops,
            products=[(*shape, count) for shape, count in sorted(ledger.products.items())],
            attention=[(*key, count) for key, count in sorted(ledger.attention.items())],
            moments=[Moment(a, *span) for a, span in zip(job.executor.actions, spans, strict=True)],
        )


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """This process as `rank` of `size`: collectives return at once and move nothing."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Now:
    """What the rank is doing, in the ledger's terms."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.peak: Span | None = None

    def span(self) -> Span | None:
        """The innermost that is not a call."""
        span = self.recorder.current
        while span is not None and span.call is not None:
            span = span.outer
        return span

    def category(self) -> str:
        span = self.span()
        return _CATEGORIES.get(span.kind, "working") if span else "working"

    def keep(self) -> None:
        """The peak so far is now."""
        self.peak = self.span()

    @property
    def when(self) -> str:
        if self.peak is None or self.peak.kind not in _ACTIONS:
            return self.peak.kind if self.peak else "between actions"
        return str(Action(Kind(self.peak.kind), self.peak.chunk, self.peak.micro_batch))


def _name(job: Job, ledger: Ledger) -> None:
    """Tell the ledger what stands the whole step."""
    for unit in job.model.units:
        ledger.belongs(unit.master, "optimizer")
        for x in (unit.full, unit.values):
            ledger.belongs(x, "parameters")
        for x in (unit.grad, unit.full_grad):
            if x is not None:
                ledger.belongs(x, "gradients")
    for name, _, values in job.optimizer.state():
        if name != "master":
            ledger.belongs(values, "optimizer")
    ledger.resized([unit.full for unit in job.model.units if unit.zero == 3])


class _DryAxis(Axis):
    """Sends are done at once, where a fake group's work never says that it is: so what was sent is let go."""

    def send(self, x: Tensor, to: int) -> Call:
        return self._call("send", x, False, lambda: None, peer=self.ranks[to])


class _DryMesh(Mesh):
    kind = _DryAxis


class _DryJob(Job):
    def numbers(self, x: Tensor) -> list[float]:
        """Finite ones, and no gradient to clip."""
        return [0.0] * x.numel()


class Nothing:
    """Parameters without values."""

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return torch.empty(size)


class Blank:
    """Zeros in the shapes that `corpus.batches.Batches` would give."""

    def __init__(self, run: RunSpec) -> None:
        self.global_batch, self.sequence = run.train.global_batch, run.data.sequence
        self.documents = run.data.respect_documents

    def rows(self, start: int, count: int) -> Rows:
        tokens = np.zeros((count, self.sequence), np.int64)
        documents = np.zeros_like(tokens, np.int32) if self.documents else None
        return Rows(tokens, tokens.copy(), documents, start)

    def target_tokens(self, start: int, count: int) -> int:
        return count * self.sequence


def show(found: DryRun, console: Console | None = None) -> None:
    """Print it as tables."""
    console = console or Console()
    names = ", ".join(f"{key} {value}" for key, value in found.precision.items())
    console.print(f"{found.layout}: {found.world} ranks; {names}", soft_wrap=True)
    schedule_picture(pipeline_schedule.build(**found.schedule), console)
    for rank in found.ranks:
        place = ", ".join(f"{axis} {rank.place[axis]}" for axis in ("dp", "tp", "pp"))
        flops = ", ".join(f"{name} {count_text(value, 'kMGTPE')}FLOP" for name, value in rank.flops.items())
        console.print(f"\nrank {rank.rank} ({place}): {flops}")
        console.print(f"peak {bytes_text(rank.peak_bytes)} at {rank.when}", soft_wrap=True)
        console.print(_columns(("bytes at the peak", ""), [(n, bytes_text(v)) for n, v in sorted(rank.peak.items())]))
        calls = [(c.axis, c.operation, bytes_text(c.bytes), str(c.count)) for c in rank.calls]
        console.print(_columns(("axis", "operation", "bytes", "calls"), calls))


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = plain_table(*heads, left=(heads[0], "operation"))
    for row in rows:
        table.add_row(*row)
    return table
