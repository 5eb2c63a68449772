"""One training job on this rank: model, executor and optimiser under a Layout, stepped by a global cursor.

Gradients are accumulated as sums, reduced as sums, and divided once by the global number of target tokens, before clipping;
`corpus/batches.py` counts them, since every rank can see the whole global batch. The loop around it is `trainer.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fiveply import pipeline_schedule
from fiveply.corpus.batches import Batches, Rows
from fiveply.parallel.data_parallel import Dtypes
from fiveply.parallel.parallelize import MicroBatch, TensorSource, parallelize
from fiveply.parallel.pipeline_parallel import Executor
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import RunError
from fiveply.spec.run import RunSpec
from fiveply.train.optimizer import SegmentOptimizer, learning_rate
from fiveply.world.mesh import Mesh


@dataclass(frozen=True)
class Sums:
    """What one step's gradients sum to: loss over target tokens, square norm, and the number of target tokens."""

    loss: float
    square_norm: float
    tokens: int
    flagged: bool = False
    """Whether any rank raised its flag (a request to stop)."""

    @property
    def mean_loss(self) -> float:
        """Nats per target token."""
        return self.loss / max(1, self.tokens)

    @property
    def norm(self) -> float:
        """Global norm of the gradient of the mean loss."""
        return math.sqrt(self.square_norm) / max(1, self.tokens)


class Job:
    """Model and optimiser of one run on this rank. `run.layout` gives way to the mesh's resolved layout."""

    def __init__(
        self,
        run: RunSpec,
        spec: ModelSpec,
        mesh: Mesh,
        dtypes: Dtypes,
        *,
        device: torch.device | None = None,
        source: TensorSource | None = None,
    ) -> None:
        self.run, self.spec, self.mesh, self.layout = run, spec, mesh, mesh.layout
        self.device = device or torch.device("cpu")
        self.alone = run.train.sync_every > 0
        """Replicas step by their own gradients, and parameters are averaged now and then."""
        self.model = parallelize(
            spec, mesh, seed=run.seed, dtypes=dtypes, device=self.device, source=source,
            compile=run.train.compile, average_gradients=not self.alone,
        )  # fmt: skip
        self.optimizer = SegmentOptimizer(self.model, run.optimizer)
        self.replica_rows = run.train.global_batch // self.layout.dp
        schedule = pipeline_schedule.of_layout(self.layout, self.replica_rows // self.layout.micro_batch)
        self.executor = Executor(self.model, schedule, seed=run.seed)

    def step(self, batches: Batches, step: int, first: int | None = None) -> Sums:
        """One optimiser step on the global batch that begins at sample `first`; returns the world's sums."""
        sums = self.gradients(batches, step, first)
        self.update(sums, step)
        return sums

    def gradients(self, batches: Batches, step: int, first: int | None = None, *, flag: bool = False) -> Sums:
        """Forward and backward of one global batch, up to reduced (not yet divided) gradients.

        `step` keys dropout and the learning rate, `first` is the global sample index (default: as if every step before
        had taken one batch). The sums are equal on every rank, except where replicas step alone.
        """
        self.optimizer.zero_grad()
        first = step * batches.global_batch if first is None else first
        if self.spec.attention_dropout:
            torch.manual_seed(((self.run.seed << 32) + step) % 2**63)
        with self.mesh.recorder.span("data"):
            micro_batches = self._micro_batches(batches, first)
        local = self.executor.step(micro_batches, step)
        with self.mesh.recorder.span("sums"):
            return self._sums(batches, first, step, local, flag)

    def _sums(self, batches: Batches, first: int, step: int, local: Tensor, flag: bool) -> Sums:
        """Add up what the ranks hold of the step; `local`: this rank's loss."""
        mine = self._own(first)
        here = torch.stack((self._once(local).double(), self.optimizer.square_norm()))
        totals = torch.cat((here, here.new_tensor([float(flag)])))
        if self.mesh.world is not None:
            self.mesh.world.all_reduce(totals)
        count = batches.target_tokens(first, batches.global_batch)
        loss, square_norm, flags = self.numbers(totals)
        self._refuse_non_finite(loss, square_norm, here[0], step, mine)
        if self.alone:
            count = batches.target_tokens(mine, self.replica_rows)
            if self.mesh.model is not None:
                self.mesh.model.all_reduce(here)
            loss, square_norm = self.numbers(here)
        return Sums(loss, square_norm, count, flags > 0)

    def numbers(self, x: Tensor) -> list[float]:
        """Values on the host: a step waits for them nowhere else."""
        return x.tolist()

    def update(self, sums: Sums, step: int) -> None:
        """Divide, clip, and step the optimiser; average parameters where replicas step alone."""
        settings = self.run.optimizer
        clip = min(1.0, settings.clip / (sums.norm + 1e-6)) if settings.clip else 1.0
        with self.mesh.recorder.span("optimizer"):
            self.optimizer.step(clip / max(1, sums.tokens), learning_rate(settings, step, self.run.train.steps))
        if self.alone and (step + 1) % self.run.train.sync_every == 0:
            self.average_parameters()

    def average_parameters(self) -> None:
        """Local SGD (Stich 2019): every replica's parameters become their mean."""
        if self.mesh.dp is None:
            return
        for unit in self.model.units:
            self.mesh.dp.all_reduce(unit.master)
            unit.master /= self.layout.dp
        self.model.updated()

    def evaluate(self, batches: Batches, count: int) -> float:
        """Mean loss, in nats per token, over the first `count` global batches of `batches`."""
        self.model.train(False)
        loss, tokens = 0.0, 0
        for index in range(count):
            first = index * batches.global_batch
            total = self._once(self.executor.evaluate(self._micro_batches(batches, first))).double()
            if self.mesh.world is not None:
                self.mesh.world.all_reduce(total)
            loss += float(total)
            tokens += batches.target_tokens(first, batches.global_batch)
        self.model.train(True)
        return loss / max(1, tokens)

    def _once(self, loss: Tensor) -> Tensor:
        """Tensor ranks hold the same loss: one of them counts."""
        return loss if self.mesh.at.tp == 0 else torch.zeros_like(loss)

    def _own(self, first: int) -> int:
        """This replica's first row of the global batch that begins at sample `first`."""
        return first + self.mesh.at.dp * self.replica_rows

    def _micro_batches(self, batches: Batches, first: int) -> list[MicroBatch]:
        mine, size = self._own(first), self.layout.micro_batch
        starts = range(mine, mine + self.replica_rows, size)
        return [micro_batch(batches.rows(start, size), self.device) for start in starts]

    def _refuse_non_finite(self, loss: float, square_norm: float, here: Tensor, step: int, first_row: int) -> None:
        if math.isfinite(loss) and math.isfinite(square_norm):
            return
        found = self.mesh.gather_objects((self.mesh.rank, float(here), first_row))
        bad = [(rank, value, row) for rank, value, row in found if not math.isfinite(value)]
        if bad:
            rank, value, row = bad[0]
            raise RunError(
                f"step {step + 1}: the loss is {value} on rank {rank}, in the batch of rows {row} to {row + self.replica_rows - 1}; "
                "lower optimizer.lr, or look at those rows"
            )
        raise RunError(f"step {step + 1}: the gradient norm is {math.sqrt(square_norm) if square_norm >= 0 else square_norm} "
                       f"while the loss is {loss}; lower optimizer.lr, or use float32")  # fmt: skip


def micro_batch(rows: Rows, device: torch.device) -> MicroBatch:
    """Packed tensors of `rows`; documents are numbered apart between rows by the attention's own row dimension."""
    count, sequence = rows.tokens.shape
    return MicroBatch(
        tokens_T=torch.from_numpy(rows.tokens).reshape(-1).to(device),
        positions_T=torch.arange(sequence, device=device).repeat(count),
        targets_T=torch.from_numpy(rows.targets).reshape(-1).to(device),
        rows=count,
        documents_T=None if rows.documents is None else torch.from_numpy(rows.documents).reshape(-1).to(device),
        first_token=rows.first * sequence,
    )
