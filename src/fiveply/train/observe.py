"""What a run shows of its steps beside their metrics: one recorded on every rank, a profile, a snapshot of memory.

timeline/step-00000010.json   by itself, or --record STEP
profile/rank-00000.json       --profile 10:12, torch's profiler as a Chrome trace, and its top rows as text
memory/rank-00000.json        --memory-snapshot, after the recorded step; and wherever a rank runs out of memory
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fiveply import timeline
from fiveply.parallel.pipeline_parallel import Model
from fiveply.pipeline_schedule import Schedule
from fiveply.spec.errors import RunError
from fiveply.timeline import Event, Lane, RecordedStep
from fiveply.train import metrics
from fiveply.world.recorder import aligned, machine

TOP_ROWS = 20
LARGEST = 40
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class Observer:
    """One rank's, of a run in `directory`; `note` prints for the user on rank 0 (elsewhere to the rank's log).

    recorded: the step that is recorded. profiled: the first and the last under torch's profiler. snapshot_after: the step
    that a snapshot of memory follows. Steps count from 1; 0 is none.
    """

    def __init__(
        self,
        directory: Path,
        model: Model,
        note: Callable[[str], None],
        *,
        recorded: int = 0,
        profiled: tuple[int, int] = (0, 0),
        snapshot_after: int = 0,
    ) -> None:
        self.directory, self.model, self.note, self.recorded = directory, model, note, recorded
        self.mesh, self.recorder, self.device = model.mesh, model.mesh.recorder, model.device
        self.first_profiled, self.last_profiled = profiled
        self.snapshot_after = snapshot_after
        self._profiler: profile | None = None
        if snapshot_after and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    @contextmanager
    def step(self, number: int, schedule: Schedule) -> Iterator[None]:
        """Around the computation of step `number`, which runs `schedule`. Collective on the recorded one."""
        self.recorder.step = number
        if self.first_profiled <= number <= self.last_profiled and self._profiler is None:
            self._start_profile(number)
        clocks = self._start_recording() if number == self.recorded else []
        try:
            with self.recorder.span("step"):
                yield
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                raise self._out_of_memory(number, error) from error
            raise
        if clocks:
            self._write(number, schedule, clocks)
        if number == self.last_profiled:
            self._write_profile(number)
        if number == self.snapshot_after:
            self.note(f"memory after step {number}: {self._snapshot(f'after step {number}')}")

    def close(self) -> None:
        """The run ends here: a profile that was to go on is written as it is."""
        if self._profiler is not None:
            self._write_profile(self.recorder.step)

    # a recorded step

    def _start_recording(self) -> list[tuple[str, float]]:
        """Returns what `aligned` takes."""
        self.mesh.gather_objects(None)  # a barrier: the readings below are taken at the same time
        clocks = self.mesh.gather_objects((machine(), time.perf_counter()))
        self.recorder.start(self.device)
        return clocks

    def _write(self, number: int, schedule: Schedule, clocks: list[tuple[str, float]]) -> None:
        ranks = self.mesh.gather_objects((self.mesh.at, self.recorder.stop()))
        if self.mesh.rank:
            return
        shifts, layout = aligned(clocks), self.mesh.layout
        steps = [next(e for e in events if e.kind == "step") for _, events in ranks]
        zero = min(step.start + shift for step, shift in zip(steps, shifts, strict=True))
        lanes: list[Lane] = []
        moved: list[Event] = []
        for (at, events), step, shift in zip(ranks, steps, shifts, strict=True):
            by = shift - zero
            lanes.append(Lane(step.rank, at.tp, at.cp, at.dp, at.pp, step.start + by, step.end + by))
            moved += [msgspec.structs.replace(e, start=e.start + by, end=e.end + by) for e in events]
        recorded = RecordedStep(
            number, str(layout), schedule.name, schedule.pp, schedule.vp, schedule.micro_batches, lanes,
            timeline.matched(moved), self.device.type,
        )  # fmt: skip
        try:
            timeline.write(recorded, self.directory)
        except OSError as error:
            self.note(f"step {number} could not be recorded: {error}")

    # torch's profiler

    def _start_profile(self, number: int) -> None:
        self.first_profiled = number
        cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
        self._profiler.start()

    def _write_profile(self, last: int) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        path = self._file("profile")
        self._profiler.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=order, row_limit=TOP_ROWS, max_name_column_width=48)
        path.with_suffix(".txt").write_text(table)
        self.note(f"steps {self.first_profiled} to {last} profiled: {path.parent}\n{table}")
        self._profiler = None

    # memory

    def _out_of_memory(self, number: int, error: BaseException) -> RunError:
        what = " ".join(str(error).split())[:200]
        path = self._snapshot("out of memory", what)
        return RunError(
            f"rank {self.mesh.rank} is out of memory at step {number} ({what}); what it held: {path}; "
            "lower micro_batch or train.global_batch, or set recompute=full, zero=1 to 3, or a higher pp or tp"
        )

    def _snapshot(self, when: str, error: str = "") -> Path:
        """Bytes by category and the largest tensors as JSON; on a GPU torch's own snapshot beside it, for its viewer."""
        path = self._file("memory")
        named = {
            tensor.untyped_storage().data_ptr(): f"{unit.name} {kind}"
            for unit in self.model.units
            for kind, tensor in (("gradients", unit.grad), ("master copy", unit.master), ("gradients", unit.full_grad),
                                 ("owned parameters", unit.values), ("parameters", unit.full))
            if tensor is not None
        }  # fmt: skip
        tensors = _live_tensors()
        cuda = self.device.type == "cuda"
        held = {
            "rank": self.mesh.rank, "when": when, "error": error,
            "kind": "allocated on the GPU" if cuda else "resident in the process; its interpreter and libraries count too",
            "peak_bytes": metrics.peak_memory(self.device),
            "bytes": metrics.bytes_by_category(self.model),
            "tensors_seen": {"count": len(tensors), "bytes": sum(size for size, _ in tensors),
                             "note": "those that Python knows; what autograd alone keeps is not among them"},
            "largest": [
                {"bytes": size, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."),
                 "device": str(x.device), "name": named.get(x.untyped_storage().data_ptr(), "")} for size, x in tensors[:LARGEST]
            ],
        }  # fmt: skip
        path.write_bytes(msgspec.json.format(msgspec.json.encode(held), indent=1))
        if cuda:
            with suppress(RuntimeError):
                torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        return path

    def _file(self, folder: str) -> Path:
        path = self.directory / folder / f"rank-{self.mesh.rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def step_to_record(asked: int, done: int) -> int:
    """The step `asked` for, or where `done` steps are beyond it, as many after them; 0 for none."""
    return asked if asked > done or not asked else done + asked


def _live_tensors() -> list[tuple[int, Tensor]]:
    """(bytes of storage, tensor), largest first, one for each storage."""
    found: dict[int, tuple[int, Tensor]] = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, torch.nn.Parameter):
            storage = x.untyped_storage()
            known = found.get(storage.data_ptr())
            if storage.nbytes() and (known is None or x.numel() > known[1].numel()):
                found[storage.data_ptr()] = (storage.nbytes(), x)
    return sorted(found.values(), key=lambda item: -item[0])


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(part in str(error) for part in _NO_MEMORY)
