"""The loop: steps, evaluation, checkpoints, metrics, a clean stop, and resuming under any layout.

`train` runs in the launcher and starts the ranks; `_Trainer` is what one rank does. What a step computes is `job.py`'s.
A run's directory:

    run.toml facts.json metrics.jsonl logs/rank-00000.log checkpoints/step-00000100/ timeline/step-00000010.json
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console

from fiveply.checkpoint import store
from fiveply.checkpoint.slices import Slice, read_flat, slices_of
from fiveply.corpus.prepare import Prepared
from fiveply.parallel.data_parallel import Segment
from fiveply.report.terminal import Progress, layout_table, schedule_picture
from fiveply.spec.errors import InputError
from fiveply.train import auto, metrics, setup
from fiveply.train.job import Job, Sums
from fiveply.train.observe import Observer, step_to_record
from fiveply.train.optimizer import learning_rate
from fiveply.train.setup import Ready
from fiveply.world import device
from fiveply.world.launch import launch, stop_requested
from fiveply.world.mesh import Groups, Mesh
from fiveply.world.process import place
from fiveply.world.watchdog import Watchdog

KEPT = ("cursor", "best", "since_best", "last_row")
"""What a checkpoint keeps of the loop's state as it is."""


def train(ready: Ready) -> dict[str, Any]:
    """Run it on `ready.layout.world` ranks; returns what `train --json` prints, on rank 0."""
    directory = ready.run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.toml").write_text(ready.run.toml())
    except OSError as error:
        raise InputError(
            f"can't be written ({error.strerror})", where=str(directory), fix="give another folder"
        ) from None
    compute = setup.dtypes(ready.run.precision).compute
    peak = metrics.peak_flops(compute, torch.device("cpu")) if device.find().kind == "cpu" else 0.0
    return launch(
        _rank, ready.layout.world, ready, peak, log_folder=directory / "logs", timeout_seconds=setup.call_seconds(ready.run),
        shared_memory=ready.transport != "gloo",
    )  # fmt: skip


def _rank(ready: Ready, peak: float) -> dict[str, Any]:
    here = place()
    if here is not None:
        if here.local_rank == 0:  # a host that does not share the first one's disk needs a corpus of its own
            setup.prepare_corpus(ready.run, ready.spec, ready.corpus, progress=False)
        dist.barrier()
    trainer = _Trainer(ready, peak)
    with trainer.progress, trainer.watched():
        return trainer.run()


class _Trainer:
    def __init__(self, ready: Ready, peak: float) -> None:
        run = ready.run
        self.ready, self.settings, self.directory = ready, run, run.directory
        self.layout = ready.layout
        cuda = device.find().kind == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        metrics.forget_peak_memory()
        self.mesh = Mesh(self.layout, ready.spec, Groups(ready.transport))
        self.first_rank = self.mesh.rank == 0
        self.prepared = Prepared.open(ready.corpus)
        self.batches = setup.batches(run, self.prepared.train)
        held_out = self.prepared.held_out
        self.held_out = setup.batches(run, held_out, shuffle=False) if held_out else None
        self.dtypes = setup.dtypes(run.precision)
        checkpoint = store.Checkpoint.open(ready.resume) if ready.resume else None
        source = checkpoint or (setup.open_source(run.model.init_from) if run.model.init_from else None)
        self.job = Job(run, ready.spec, self.mesh, self.dtypes, device=self.device, source=source)
        self.done, self.cursor = 0, 0
        self.best: dict[str, Any] = {}
        self.since_best = 0
        self.last_row: dict[str, Any] = {}
        if checkpoint is not None:
            self._restore(checkpoint)
        self.peak = peak or metrics.peak_flops(self.dtypes.compute, self.device) * self.layout.world
        self.flops_per_token = metrics.flops_per_token(ready.spec, run.data.sequence)
        self.progress = Progress(run.train.steps, enabled=self.first_rank, log_every=run.train.log_every)
        self.metrics = metrics.MetricsFile(self.directory / "metrics.jsonl", self.done) if self.first_rank else None
        self.steps_seconds, self.steps_tokens = 0.0, 0
        last, record = run.train.stop_at or run.train.steps, step_to_record(run.train.record, self.done)
        recorded = min(record, last)
        self.observer = Observer(
            self.directory, self.job.model, self._note, recorded=recorded, profiled=run.train.profiled,
            snapshot_after=(recorded or self.done + 1) if run.train.memory_snapshot else 0,
        )  # fmt: skip

    def watched(self) -> AbstractContextManager[object]:
        limit = self.settings.train.hang_timeout
        if self.mesh.world is None or not limit:
            return nullcontext()
        return Watchdog(
            self.mesh.recorder, self.mesh.place, limit=limit, timeout=setup.call_seconds(self.settings), note=self._note,
            file=self.directory / "hang.txt",
        )  # fmt: skip

    # the loop

    def run(self) -> dict[str, Any]:
        self._write_facts()
        if self.first_rank:
            self.progress.show(layout_table(msgspec.json.decode((self.directory / "facts.json").read_bytes())))
            schedule_picture(self.job.executor.schedule, Console(stderr=True))
        for note in self.ready.notes:
            self.progress.note(note)
        if self.mesh.groups.fell_back:
            self.progress.note(
                f"ranks talk through gloo, which is slower than shared memory: {self.mesh.groups.fell_back}"
            )
        ended = "steps"
        while self.done < self.settings.train.steps:
            stop = self._step() or self.done == self.settings.train.stop_at
            last = self.done == self.settings.train.steps
            if last or (not stop and due(self.settings.train.evaluate_every, self.done)):
                self._evaluate()
            self._publish()
            if last:
                break
            if stop or self._converged():
                ended = "stopped" if stop else "converged"
                break
            if due(self.settings.train.checkpoint_every, self.done):
                self._save()
        self.observer.close()
        self._save()
        self.progress.note(self._farewell(ended))
        return self._result(ended)

    def _step(self) -> bool:
        """One optimiser step and its row; returns whether a rank was asked to stop."""
        with self.observer.step(self.done + 1, self.job.executor.schedule):
            begun = time.perf_counter()
            sums = self.job.gradients(self.batches, self.done, self.cursor, flag=stop_requested())
            self.job.update(sums, self.done)
            seconds = time.perf_counter() - begun
        self.done += 1
        self.cursor += self.batches.global_batch
        self._record(sums, seconds)
        return sums.flagged

    def _record(self, sums: Sums, seconds: float) -> None:
        tokens = self.batches.global_batch * self.batches.sequence
        self.steps_seconds += seconds
        self.steps_tokens += tokens
        row: dict[str, Any] = {
            "step": self.done,
            "loss": sums.mean_loss,
            "grad_norm": sums.norm,
            "lr": learning_rate(self.settings.optimizer, self.done - 1, self.settings.train.steps),
            "tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * self.flops_per_token / self.peak,
            "seconds": seconds,
        }
        if self.done % self.settings.train.log_every == 0 or self.done in (1, self.settings.train.steps):
            row["memory_bytes"] = self.mesh.gather_objects(metrics.peak_memory(self.device))
        self.last_row = row

    def _note(self, text: str) -> None:
        """For the user on rank 0, for the rank's log elsewhere."""
        if self.first_rank:
            self.progress.note(text)
        else:
            print(text, file=sys.stderr)

    def _publish(self) -> None:
        if self.metrics is not None:
            self.metrics.write(self.last_row)
            self.progress.update(self.last_row)

    def _evaluate(self) -> None:
        """Held-out loss into the last row; when convergence is sought, the best is kept as a checkpoint."""
        if self.held_out is None:
            return
        with self.mesh.recorder.span("evaluation"):
            loss = self.job.evaluate(self.held_out, setup.evaluation_count(self.settings, self.held_out))
        bits = loss / math.log(2) / self.prepared.characters_per_token("held_out")
        self.last_row |= {"held_out_loss": loss, "bits_per_character": bits}
        if self.best and loss >= self.best["held_out_loss"]:
            self.since_best += 1
            return
        self.best, self.since_best = {"step": self.done, "held_out_loss": loss}, 0
        if self.settings.train.until == "converged":
            self._save()

    def _converged(self) -> bool:
        return self.settings.train.until == "converged" and self.since_best >= self.settings.train.patience

    # checkpoints

    def _save(self) -> None:
        folder = self.directory / "checkpoints"
        with self.mesh.recorder.span("checkpoint"):
            if self.job.alone:  # a checkpoint is one model: replicas agree before it is written
                self.job.average_parameters()
            state = {key: getattr(self, key) for key in KEPT} | {
                "step": self.done, "layout": str(self.layout), "seed": self.settings.seed,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            extra = {"config.json": msgspec.json.encode(self.ready.spec.config)}
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if (self.ready.corpus / name).is_file():
                    extra[name] = (self.ready.corpus / name).read_bytes()
            store.save(folder, self.done, self._slices(), state, extra)
        if self.first_rank:
            best = [folder / f"step-{self.best['step']:08d}"] if self.best else []
            store.prune(folder, self.settings.train.keep_checkpoints, protect=best)

    def _slices(self) -> Iterator[Slice]:
        for name, segment, values in self.job.optimizer.state():
            if self.mesh.speaks_for(segment.placed):
                yield from slices_of(segment.placed, segment.low, values.cpu(), _prefix(name), self.ready.spec)

    def _restore(self, checkpoint: store.Checkpoint) -> None:
        self.done = checkpoint.state["step"]
        for key in KEPT:
            setattr(self, key, checkpoint.state[key])

        def read(name: str, segment: Segment) -> torch.Tensor:
            read_slice = functools.partial(checkpoint.read, segment.placed.name, prefix=_prefix(name))
            return read_flat(read_slice, segment.placed, segment.low, segment.high)

        self.job.optimizer.load(self.done, read)

    # what others read

    def _write_facts(self) -> None:
        spec, layout, run, prepared = self.ready.spec, self.layout, self.settings, self.prepared
        sizes = {"sequence": run.data.sequence, "global_batch": run.train.global_batch}
        held = metrics.counted_bytes(spec, layout, self.mesh.rank, dtypes=self.dtypes, **sizes)
        ranks = self.mesh.gather_objects(metrics.rank_facts(self.job.model, held))
        if not self.first_rank:
            return
        shape = ("family", "layers", "hidden", "heads", "kv_heads", "vocabulary", "ffn")
        held_out = sum(len(file.tokens) for file in prepared.held_out)
        own = {
            "transport": self.mesh.groups.carriers,
            "model": {key: getattr(spec, key) for key in shape} | {"parameters": metrics.parameter_count(spec)},
            "corpus": {
                "sources": [source.path for source in setup.sources(run)],
                "train_tokens": sum(len(file.tokens) for file in prepared.train),
                "held_out_tokens": held_out,
                "characters_per_token": prepared.characters_per_token("held_out" if held_out else "train"),
                "vocabulary": prepared.vocabulary,
            },
            "machine": metrics.machine() | {"peak_flops": self.peak},
            "precision": setup.describe(self.dtypes),
            "tokens_per_step": run.train.global_batch * run.data.sequence,
            "flops_per_token": self.flops_per_token,
            "ranks": ranks,
            "predicted": auto.predicted(spec, layout, self.dtypes, **sizes),
        }
        micro_batches = self.job.executor.schedule.micro_batches
        metrics.write_facts(self.directory / "facts.json", layout, self.done, micro_batches, own)

    def _farewell(self, ended: str) -> str:
        row = self.last_row
        words = {"steps": "done", "converged": "converged", "stopped": "stopped as asked"}
        text = f"{words[ended]} at step {self.done}"
        if "loss" in row:
            text += f": loss {row['loss']:.4f}"
        if "held_out_loss" in row:
            text += f", held-out {row['held_out_loss']:.4f} nats per token = {row['bits_per_character']:.3f} bits per character"
        if ended == "converged":
            text += f"; the best checkpoint is step {self.best['step']}"
        return text + (f"; go on with --resume ({self.directory})" if ended == "stopped" else "")

    def _result(self, ended: str) -> dict[str, Any]:
        row = self.last_row
        return {
            "run": str(self.directory),
            "step": self.done,
            "loss": row.get("loss"),
            "held_out_loss": row.get("held_out_loss"),
            "bits_per_character": row.get("bits_per_character"),
            "tokens_per_second": self.steps_tokens / self.steps_seconds if self.steps_seconds else None,
            "layout": str(self.layout),
            "ended": ended,
            "best": self.best or None,
        }


def _prefix(state: str) -> str:
    """Of a kind of the optimiser's state in a checkpoint, where the values that it updates are the parameters."""
    return "" if state == "master" else f"optimizer.{state}."


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
