"""The record of a user's module in training: the same files as a decoder's run, so that the same report draws them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fiveply.parallel.parallelize_module import ParallelModule
from fiveply.pipeline_schedule import Schedule
from fiveply.spec.errors import InputError
from fiveply.spec.run import Data, Model, RunSpec, Train
from fiveply.train import metrics
from fiveply.train.observe import Observer, step_to_record


class ModuleRecord:
    """Writes `run.toml`, `facts.json`, `metrics.jsonl` and a recorded step of a run's directory, on rank 0; collective where
    it says so. `record`: which step, as `train.record` of a run's file."""

    def __init__(self, directory: Path, model: ParallelModule, name: str, seed: int, record: int) -> None:
        """Collective."""
        self.directory, self.model, self.name, self.seed, self.record = directory, model, name, seed, record
        self._observer: Observer | None = None
        self.first_rank = model.mesh.rank == 0
        self._file: metrics.MetricsFile | None = None
        self._last: dict[str, Any] = {}
        """The last row; what of it is not finite is written as null."""
        metrics.forget_peak_memory()
        self._ranks = model.mesh.gather_objects(metrics.rank_facts(model, metrics.bytes_by_category(model)))
        if self.first_rank:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"can't be written ({error.strerror})", where=str(directory), key="run", fix="give another"
                ) from None

    def observed(self, step: int, schedule: Schedule) -> AbstractContextManager[object]:
        """Around the computation of a step. Collective on the recorded one."""
        if self._observer is None:
            recorded = step_to_record(self.record, step - 1)
            self._observer = Observer(self.directory, self.model, note, recorded=recorded)
        return self._observer.step(step, schedule)

    def step(
        self,
        step: int,
        loss: float,
        norm: float,
        optimizer: torch.optim.Optimizer,
        rows: int,
        micro_batches: int,
        seconds: float,
    ) -> None:
        """A row of `metrics.jsonl`; the files begin with the first. Collective every tenth step."""
        memory = (
            self.model.mesh.gather_objects(metrics.peak_memory(self.model.device))
            if step == 1 or step % 10 == 0
            else None
        )
        if not self.first_rank:
            return
        if self._file is None:
            self._file = self._begin(step, rows, micro_batches)
        self._last = {
            "step": step, "loss": float(loss), "grad_norm": norm, "lr": float(optimizer.param_groups[0].get("lr", 0)),
            "tokens_per_second": None, "mfu": None, "seconds": seconds,
        } | ({"memory_bytes": memory} if memory else {})  # fmt: skip
        self._file.write(self._last)

    def held_out(self, loss: float) -> None:
        """The loss of an evaluation, beside the last step's row."""
        if self._file is not None:
            self._last |= {"held_out_loss": float(loss)}
            self._file.write(self._last)

    def _begin(self, step: int, rows: int, micro_batches: int) -> metrics.MetricsFile:
        layout = self.model.layout
        run = RunSpec(
            name=self.directory.name, folder=str(self.directory.parent), seed=self.seed, layout=str(layout),
            model=Model(preset=self.name), data=Data(corpus="own data set"), train=Train(global_batch=rows),
        )  # fmt: skip
        (self.directory / "run.toml").write_text(run.toml())
        kind = str(self.model.dtype).removeprefix("torch.")
        own = {
            "model": {"family": self.name, "parameters": sum(
                rank["parameters"] for rank in self._ranks if (rank["dp"], rank["tp"]) == (0, 0))},
            "machine": metrics.machine(),
            "precision": dict.fromkeys(("parameters", "reduce", "optimizer"), kind),
            "ranks": self._ranks, "own_module": True,
        }  # fmt: skip
        metrics.write_facts(self.directory / "facts.json", layout, step - 1, micro_batches, own)
        return metrics.MetricsFile(self.directory / "metrics.jsonl", step - 1)


def note(text: str) -> None:
    """Tell the user."""
    print(f"fiveply: {text}", file=sys.stderr)
