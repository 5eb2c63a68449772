"""A user's own nn.Module under a layout: join a world, parallelize, step.

    world = fiveply.join("dp=2,tp=2,pp=2", seed=0)
    job = world.parallelize(MyModel, loss=criterion, optimizer=make_adam, tp={"fc1": "column", "fc2": "row"}, stages=["fc1", "fc2"])
    for batch in world.loader(dataset, global_batch=64):
        loss = job.step(batch)

The same units, schedules and executor as for fiveply's decoder do the work; `parallel/parallelize_module.py` says how a
module is split. This file holds what the user touches.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from fiveply import pipeline_schedule
from fiveply.checkpoint import store
from fiveply.parallel.own_loop import OwnLoop, bind
from fiveply.parallel.parallelize_module import Loss, ModuleBatch, ParallelModule, parallelize_module
from fiveply.parallel.pipeline_parallel import Executor
from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import check_module
from fiveply.spec.plan import layout_text
from fiveply.train import module_plan
from fiveply.train.loader import Batch, Loader, Passes, split_global
from fiveply.train.module_optimizer import Factory, ModuleOptimizer
from fiveply.train.module_record import ModuleRecord, note
from fiveply.train.module_state import gathered, load, save
from fiveply.world import launch
from fiveply.world.mesh import Groups, Mesh
from fiveply.world.recorder import Recorder
from fiveply.world.watchdog import LIMIT_SECONDS, Watchdog

AUTO = "auto"
command_line: ContextVar[str] = ContextVar("command_line", default="")
"""The layout that `fiveply train script.py --layout ...` gave to this rank."""


class StepLoss(float):
    """The global mean loss of a step: a float; `.item()` works as on the tensor it replaces."""

    def item(self) -> float:
        return float(self)


def join(layout: str | Layout = AUTO, *, seed: int = 0, hang_timeout: float = LIMIT_SECONDS) -> World:
    """Join the ranks that torchrun, Slurm or `fiveply train script.py` started; a process on its own is one rank.

    A layout on the command line goes before `layout`, with a note. "auto" waits for the model, and then plans for it
    (`train/module_plan.py`): dp and zero, and pp where stages are named and a batch is given. Seeds torch by `seed`, so that
    what a script draws is equal on all ranks. hang_timeout: seconds that no rank goes on while some wait, until the run ends
    with a report of who waits for whom; 0 for never. Raises InputError where the layout takes another number of ranks than
    were started.
    """
    given = layout_text(str(layout)) or AUTO
    told = command_line.get() or given
    wanted = None if told == AUTO else Layout.parse(told, "--layout" if command_line.get() else "join")
    if not dist.is_initialized() and launch.joined():
        launch.meet()
    world = World(wanted, seed, hang_timeout=hang_timeout)
    if wanted is not None and wanted.world != world.size:
        started = "1 rank runs" if world.size == 1 else f"{world.size} ranks run"
        raise InputError(
            f"{told} takes {wanted.world} ranks, {started} here", where="join", key="layout",
            fix=f"start them with `fiveply train script.py --layout {told}`, or torchrun --nproc-per-node {wanted.world}",
        )  # fmt: skip
    if command_line.get() and given not in (AUTO, command_line.get()) and world.rank == 0:
        note(f"--layout {command_line.get()} goes before the script's {given}")
    torch.manual_seed(seed)
    return world


class World:
    """The ranks of a run. `layout` is None until `parallelize` where `join("auto")` leaves it open."""

    def __init__(
        self, layout: Layout | None, seed: int, groups: Groups | None = None, *, hang_timeout: float = 0.0
    ) -> None:
        self.layout, self.seed, self.hang_timeout = layout, seed, hang_timeout
        active = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if active else (0, 1)
        cuda = torch.cuda.is_available() and (not active or "nccl" in str(dist.get_backend_config()))
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.batch: Batch | None = None
        """What a loader handed out last."""
        self._groups = groups or Groups()
        self._recorder = Recorder(self.rank)
        self._watchdog: Watchdog | None = None
        self._passes = Passes()

    def parallelize(
        self,
        model: Callable[[], nn.Module],
        *,
        loss: Loss,
        optimizer: Factory,
        tp: Mapping[str, str] | None = None,
        stages: Sequence[str] = (),
        clip: float = 0.0,
        run: str | Path | None = None,
        record: int = 10,
        strict: bool = True,
        batch: Any = None,
    ) -> Job:
        """Build `model()` on every rank under the seed, and keep this rank's part of it. Collective; raises InputError.

        loss: (output, target) -> the mean over rows, or (sum, count). optimizer: named parameters -> torch optimiser, called
        once with this rank's tensors. tp: linears by name, "column" or "row". stages: modules at whose first call a pipeline
        stage begins. clip: largest global gradient norm, 0 for none. run: a directory for metrics, which `fiveply report`
        draws; record: the step that it draws as a timeline, 0 for none. strict=False leaves what would differ by layout as
        it is, for `fiveply.verify` to find. batch: a whole global batch (input, target), of which `join("auto")` reads the
        shapes; without one it plans by the parameters alone.
        """
        refuse_built(model, "parallelize", "model")
        for key, function in (("model", model), ("loss", loss), ("optimizer", optimizer)):
            if not callable(function):
                raise InputError(
                    f"{type(function).__name__} can't be called", where="parallelize", key=key, fix="give a function"
                )
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            module = model()
        if not isinstance(module, nn.Module):
            raise InputError(
                f"gives {type(module).__name__}", where="parallelize", key="model", fix="return an nn.Module"
            )
        self.layout = check_module(self.layout or self._auto(module, loss, stages, batch), len(stages))
        mesh = Mesh(self.layout, None, self._groups, self._recorder)
        if strict:
            _check_equal(module, mesh)
        name = type(module).__name__
        placed = parallelize_module(
            module, mesh, loss=loss, seed=self.seed, tp=tp or {}, stages=stages, device=self.device, strict=strict
        )
        stepper = ModuleOptimizer(placed, optimizer)
        kept = None if run is None else ModuleRecord(Path(run), placed, name, self.seed, record)
        job = Job(self, placed, stepper, clip, kept)
        self._watch(mesh, run)
        return job

    def loader(
        self,
        dataset: Any,
        *,
        global_batch: int,
        shuffle: bool = False,
        seed: int | None = None,
        start: int = 0,
        collate: Callable[[list[Any]], Any] = default_collate,
        workers: int = 0,
    ) -> Loader:
        """This rank's rows of each global batch of a map-style data set; each pass is an epoch, also where `loader` is
        called anew for it. With `shuffle` the order follows from seed and epoch alone. `start`: a job's cursor to go on
        from. `workers`: processes that load."""
        seed = self.seed if seed is None else seed
        return Loader(
            dataset, global_batch, replica=self.replica, shuffle=shuffle, seed=seed, start=start, collate=collate,
            workers=workers, entered=self._note, passes=self._passes.of(dataset, global_batch, shuffle, seed, start),
        )  # fmt: skip

    def replica(self) -> tuple[int, int]:
        """This rank's index among the replicas, and their number."""
        if self.layout is None:
            raise InputError('join("auto") chooses a layout for a model', where="loader", fix="call parallelize first")
        return self.layout.coordinates(self.rank).dp, self.layout.dp

    def _auto(self, module: nn.Module, loss: Loss, stages: Sequence[str], batch: Any) -> Layout:
        """The first rank's pick, on every rank: hosts may differ."""
        if self.size == 1:
            return Layout()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told[0], why = module_plan.choose(module, self.size, loss, stages, batch)
                note(why)
            except InputError as error:
                told[0] = error
        dist.broadcast_object_list(told)
        if isinstance(told[0], InputError):
            raise told[0]
        return told[0]

    def _note(self, batch: Batch) -> None:
        self.batch = batch

    def _watch(self, mesh: Mesh, run: str | Path | None) -> None:
        """From here to the process's end; a second module is in the same world."""
        if mesh.world is None or not self.hang_timeout:
            return
        if self._watchdog is not None:
            self._watchdog.introduce()
            return
        self._watchdog = Watchdog(
            mesh.recorder, mesh.place, limit=self.hang_timeout, timeout=self._groups.call_seconds, note=note,
            file=None if run is None else Path(run) / "hang.txt",
        )  # fmt: skip
        atexit.register(self._watchdog.__enter__().__exit__, None, None, None)


def refuse_built(model: object, where: str, key: str) -> None:
    """Raise InputError for a module in the place of what builds one."""
    if isinstance(model, nn.Module):
        raise InputError("a module that is built already can't be placed", where=where, key=key,
                         fix=f"give what builds it: {type(model).__name__}, or lambda: {type(model).__name__}(...)")  # fmt: skip


def _check_equal(module: nn.Module, mesh: Mesh) -> None:
    """Raise InputError where ranks built other values: by a generator that the seed does not reach."""
    if mesh.world is None:
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    digests = [_digest(x) for _, x in tensors]
    for other in mesh.world.gather_objects(digests):
        if other != digests:
            name = next((n for (n, _), a, b in zip(tensors, other, digests, strict=False) if a != b), "its parameters")
            raise InputError(f"{name} starts with other values on other ranks", where="parallelize", key="model",
                             fix="draw initial values from torch's own generator, or seed yours in the factory")  # fmt: skip


def _digest(*tensors: Tensor) -> int:
    """Of types, shapes and bits, in 63 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for x in tensors:
        digest.update(repr((x.dtype, tuple(x.shape))).encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()) >> 1


class Job:
    """One module in training on this rank."""

    def __init__(
        self, world: World, model: ParallelModule, optimizer: ModuleOptimizer, clip: float, record: ModuleRecord | None
    ) -> None:
        self.world, self.model, self._optimizer, self.clip, self._record = world, model, optimizer, clip, record
        self.mesh, self.layout = model.mesh, model.mesh.layout
        self.steps, self.cursor = 0, 0
        """Steps done, and the global sample index after them."""
        self.norm = 0.0
        """Of the last step's gradient, before clipping."""
        self._stop = False
        self._executor = functools.cache(
            lambda count: Executor(model, pipeline_schedule.of_layout(model.layout, count), seed=world.seed)
        )
        """By the number of micro-batches."""
        self._loop = None
        if self.layout.zero <= 1 and self.model.module is not None:
            self._loop = OwnLoop(self.model, self._optimizer.torch, self._share, lambda: self.steps, self._stepped)

    # one call a step

    def step(self, batch: Any) -> StepLoss:
        """Train on one global batch; returns its mean loss, on every rank. Collective. After Ctrl-C under `fiveply train`
        it raises KeyboardInterrupt, on every rank after the same step: a script may save then.

        `batch`: what `world.loader` gives, this rank's part; or a plain (input, target), which is the whole global batch,
        the same on every rank, and of which each takes its rows.
        """
        begun = time.perf_counter()
        mine = self._mine(batch)
        with self._observed(mine):
            loss = self.gradients(mine)
            if self.clip:
                self._optimizer.scale(min(1.0, self.clip / (self.norm + 1e-6)))
            self.update()
        if self._record is not None:
            self._record.step(self.steps, loss, self.norm, self._optimizer.torch, mine.total,
                              self._micro_batches(mine.total), time.perf_counter() - begun)  # fmt: skip
        if self._stop:
            self._stop = False
            raise KeyboardInterrupt
        return loss

    def gradients(self, batch: Any) -> StepLoss:
        """Forward and backward of one global batch, up to the gradient of its mean loss; `step` without the update."""
        mine = self._mine(batch)
        with _Paused(self._loop):
            self.model.train()
            for unit in self.model.units:
                bind(unit)
                unit.zero_grad()
            with self.mesh.recorder.span("data"):
                micro = mine.micro_batches(self._micro_batches(mine.total))
            total = self._executor(len(micro)).step(micro, self.steps)
            with self.mesh.recorder.span("sums"):
                loss, count, square = self._totals(total, self._optimizer.square_norm())
        self.norm = square**0.5 / max(count, 1e-300)
        self._optimizer.scale(1 / count if count else 0.0)
        self.cursor = mine.cursor or self.cursor + mine.total
        return StepLoss(loss / count if count else 0.0)

    def update(self) -> None:
        """The optimiser's step on the gradients that stand."""
        with _Paused(self._loop), self.mesh.recorder.span("optimizer"):
            self._optimizer.torch.step()
        self.steps += 1

    def evaluate(self, batches: Any, measure: Loss | None = None) -> StepLoss:
        """The mean loss over a batch, a loader, or batches of either kind, in evaluation mode, on every rank. Collective.

        `measure`: another function of (output, target) than the loss: a mean over rows, or (sum, count).
        """
        before, loss, count = self.model.training, 0.0, 0.0
        kept, self.model.loss = self.model.loss, measure or self.model.loss
        pair = isinstance(batches, (tuple, list)) and len(batches) == 2
        single = isinstance(batches, Batch) or (pair and not isinstance(batches[0], (tuple, list, Batch)))
        try:
            with _Paused(self._loop):
                self.model.train(False)
                for batch in [batches] if single else batches:
                    mine = self._mine(batch)
                    with self.mesh.recorder.span("evaluation"):
                        micro = mine.micro_batches(self._micro_batches(mine.total))
                        total = self._executor(len(micro)).evaluate(micro)
                        here = self._totals(total, total.new_zeros((), dtype=torch.float64))
                    loss, count = loss + here[0], count + here[1]
        finally:
            self.model.loss = kept
            self.model.train(before)
        mean = StepLoss(loss / count if count else 0.0)
        if self._record is not None and measure is None:
            self._record.held_out(mean)
        return mean

    def _observed(self, batch: Batch) -> AbstractContextManager[object]:
        """Around a step's computation."""
        number = self.mesh.recorder.step = self.steps + 1
        if self._record is None:
            return self.mesh.recorder.span("step")
        return self._record.observed(number, self._executor(self._micro_batches(batch.total)).schedule)

    def _mine(self, batch: Any) -> Batch:
        """This rank's rows of a batch, on its device."""
        with self.mesh.recorder.span("data"):
            if not isinstance(batch, Batch):
                self._check_same(batch)
                index, replicas = self.world.replica()
                batch = split_global(batch, replicas, index)
            return batch.to(self.world.device)

    def _check_same(self, pair: Any) -> None:
        """Ranks that give their own parts as a plain pair would each train on a part of a part."""
        if self.mesh.world is None:
            return
        here = torch.tensor(_digest(*(x for x in tree_leaves(pair) if isinstance(x, Tensor))), device=self.world.device)
        most, least = here.clone(), here.clone()
        self.mesh.world.all_reduce(most, dist.ReduceOp.MAX)
        self.mesh.world.all_reduce(least, dist.ReduceOp.MIN)
        if most != least:
            raise InputError("ranks were given different ones", where="step", key="batch",
                             fix="pass what world.loader gives as it is, or the whole global batch on every rank")  # fmt: skip

    def _micro_batches(self, total: int) -> int:
        return module_plan.micro_batches(self.layout, total)[0]

    def _totals(self, loss: Tensor, square: Tensor) -> tuple[float, float, float]:
        """Loss and what it counts, once for each row of the world, and the square norm of the gradient."""
        once = float(self.mesh.at.tp == 0)
        last = float(any(chunk.last for chunk in self.model.chunks))
        asked = torch.tensor(float(launch.stop_requested()), device=loss.device)
        totals = torch.stack((loss.double() * once, self.model.count * once * last, square, asked))
        if self.mesh.world is not None:
            self.mesh.world.all_reduce(totals)
        loss_sum, count, squares, stops = totals.tolist()
        self._stop = self._stop or stops > 0
        return loss_sum, count, squares

    # the user's own loop

    @property
    def module(self) -> nn.Module:
        """The module for the user's own loop, with `optimizer`; its gradients are the global mean loss's after backward."""
        if self.model.module is None or self._loop is None:
            raise InputError(f"under {self.layout} no rank can run the whole module by itself", where="job", key="module",
                             fix="call job.step, or leave pp out and set zero to 0 or 1")  # fmt: skip
        return self.model.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's own torch optimiser on this rank's tensors: for schedulers, and for the user's own loop."""
        return self._optimizer.torch

    def _share(self, rows: int) -> tuple[ModuleBatch, float]:
        index, replicas = self.world.replica()
        batch = self.world.batch
        if batch is not None and batch.held == rows:
            return ModuleBatch(None, None, rows, batch.rows, batch.first), batch.rows / batch.total
        return ModuleBatch(None, None, rows, rows, index * rows), 1 / replicas

    def _stepped(self) -> None:
        """A step of the user's own loop."""
        self.steps += 1
        if self.world.batch is not None:
            self.cursor = self.world.batch.cursor

    # state

    def state_dict(self) -> dict[str, Tensor]:
        """The whole module's parameters and buffers by name, on the CPU of every rank. Collective."""
        tensors = gathered(self.model, self._optimizer, "values")
        return tensors | {name: tensors[first] for name, first in self.model.aliases.items()}

    def gradient_dict(self) -> dict[str, Tensor]:
        """The whole gradient by name, after `gradients`, on the CPU of every rank. Collective."""
        return gathered(self.model, self._optimizer, "gradients")

    def save(self, folder: str | Path) -> Path:
        """Write `folder/step-XXXXXXXX`: parameters, buffers, optimiser state, cursor. Collective; raises RunError."""
        return save(Path(folder), self.model, self._optimizer, self.steps, self.cursor, self.world.seed)

    def load(self, folder: str | Path) -> int:
        """Go on from a checkpoint, or the newest of a folder of them, saved under any layout; returns the step. Collective;
        raises InputError for a checkpoint of another module."""
        self.steps, self.cursor = load(store.Checkpoint.open(folder), self.model, self._optimizer)
        return self.steps


class _Paused:
    """While the executor runs the module, the hooks of the user's own loop are silent."""

    def __init__(self, loop: OwnLoop | None) -> None:
        self.loop = loop

    def __enter__(self) -> None:
        if self.loop is not None:
            self.loop.paused = True

    def __exit__(self, *_: object) -> None:
        if self.loop is not None:
            self.loop.paused = False
