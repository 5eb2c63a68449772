"""Run a function on N ranks: start them on this machine, or join the ones that torchrun or Slurm started.

Notable:
- The first error is shown, not the last. A rank that dies leaves others stuck in collectives, or makes them fail with
  "connection closed" a moment later. Each rank reports its own error with its time; what only follows from a lost peer
  gives way; survivors are killed a second later.
- Ctrl-C and SIGTERM are requests: they set `stop_requested()` in every rank, and the launcher waits for the function
  to return. A second Ctrl-C ends everything at once.
- Ranks are forked where that is safe (Linux, no CUDA), so the function and its arguments need not be picklable, and
  eight ranks start in 0.2 s. torch's elastic agent as a library was tried first: it forks after starting threads of
  its own, named the wrong rank in 15 of 16 failures of four ranks (it takes whichever it polls first), and gave ranks
  that handle SIGTERM 30 s to die. It restarts and spans machines, though: `torchrun` is that agent, and is joined.

What this file does not know: layouts, meshes, models; it makes the default group alone.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fiveply.spec.errors import FiveplyError, InputError, RunError
from fiveply.world import process as own
from fiveply.world import shm
from fiveply.world.allocator import keep_freed_memory
from fiveply.world.device import find
from fiveply.world.process import stop_requested

__all__ = ["by_first", "joined", "launch", "meet", "stop_requested"]

_LOOPBACK = "127.0.0.1"
_LONG = timedelta(days=7)  # for work whose length nobody knows; a dead first process ends the wait at once
_GRACE_SECONDS = 1.0  # from the first sign of a failure until the rest are killed: time for the cause to be reported


@dataclass(frozen=True)
class _Job:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    ranks: int
    backend: str
    timeout: timedelta
    log_folder: Path | None

    def log(self, rank: int) -> Path | None:
        return self.log_folder / f"rank-{rank:05d}.log" if self.log_folder else None


def joined() -> bool:
    """Whether torchrun or Slurm has started this process as one rank of several."""
    return own.place() is not None


def meet(timeout_seconds: float = 600.0) -> None:
    """Join the ranks that torchrun or Slurm started, for the rest of this process: device, threads, default group."""
    place = own.place()
    assert place is not None
    atexit.register(_leave, patience_seconds=5.0)
    torch.set_num_threads(_threads(place))
    _meet(place, _default_backend(), timedelta(seconds=timeout_seconds))


def by_first(function: Callable[[], Any], timeout_seconds: float = 600.0) -> Any:
    """What `function()` gives or raises in the first process of a world that torchrun or Slurm started, in each of them.

    For what only one may do, as looking whether something exists that is then made: processes start at different times.
    `timeout_seconds`: as `launch`'s, which goes on in the world met here. On its own, a process is the first.
    """
    place = own.place()
    if place is None:
        return function()
    meet(timeout_seconds)
    store = _get_default_store()
    if place.rank == 0:
        try:
            told: tuple[Any, FiveplyError | None] = function(), None
        except FiveplyError as error:
            told = None, error
        store.set("first", pickle.dumps(told).hex())
    else:
        store.wait(["first"], _LONG)
        told = pickle.loads(bytes.fromhex(store.get("first").decode()))
    dist.barrier()  # the store can stand in the first process, which may end here
    value, error = told
    if error is not None:
        raise error
    return value


def launch(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    log_folder: Path | None = None,
    backend: str | None = None,
    timeout_seconds: float = 600.0,
    shared_memory: bool = True,
    apart: bool = False,
    others_still: AbstractContextManager[Any] | None = None,
) -> Any:
    """Run `function(*args)` on `ranks` ranks, each within a default process group; return rank 0's value.

    Under torchrun or Slurm this process is one of them, also after `by_first`, and gets its own value. Otherwise ranks are
    started here, one per GPU or sharing the CPU's cores; a single one is this process itself. In ranks that are started, the
    function runs on a thread other than the main one (which takes signals), and a value that can't be pickled comes back as
    None.

    `log_folder` gets what each rank prints as `rank-00003.log`; rank 0 prints to the terminal as well, the others
    only there. `timeout_seconds` bounds each collective and the start. `shared_memory`: whether CPU ranks may talk
    through it, for which its library is then made ready. `apart`: a single rank gets a process of its own too.
    `others_still` is entered while ranks are forked: a caller with threads of its own must let them do nothing meanwhile.

    Raises InputError if the world does not have `ranks` ranks; the FiveplyError that a rank raised first; RunError
    naming the rank that failed first otherwise (the traceback of a defect goes to standard error and the rank's log).
    """
    place = own.place()
    if place and place.ranks != ranks:
        fix = f"start {ranks} processes, or choose a layout of {place.ranks}"
        raise InputError(f"the layout takes {ranks} ranks, but {place.ranks} were started", where="launch", fix=fix)
    if ranks < 1:
        raise InputError(f"{ranks} ranks asked for", where="launch", fix="1 is the least")
    backend = backend or _default_backend()
    if "nccl" in backend and not place and ranks > torch.cuda.device_count():
        raise InputError(f"{ranks} ranks need as many GPUs; here: {torch.cuda.device_count()}", where="launch")
    if log_folder:
        try:
            log_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot hold logs: {error.strerror}", where=str(log_folder)) from error
    job = _Job(function, args, ranks, backend, timedelta(seconds=timeout_seconds), log_folder)
    if place or (ranks == 1 and not apart):
        return _run_here(job, place)
    if shared_memory and "nccl" not in backend:
        shm.build()  # before there are ranks that would each compile or load it
    return _start(job, others_still or nullcontext())


def _run_here(job: _Job, place: own.Place | None) -> Any:
    """This process is a rank: of a world that others started, or alone."""
    rank, threads = place.rank if place else 0, torch.get_num_threads()
    with own.noting_stops(abrupt=place is None), own.logging_to(job.log(rank), tee=rank == 0) as log:

        def tell(failure: own.Failure) -> None:
            if log:
                log.write(failure.traceback)
            if not failure.follows:
                line = failure.told(job.log(failure.rank))
                print(f"{failure.traceback}\nfiveply: {line}", file=sys.__stderr__, flush=True)

        own.voice.tell = tell
        try:
            torch.set_num_threads(_threads(place))
            if place:
                keep_freed_memory()
            if place and not dist.is_initialized():
                _meet(place, job.backend, job.timeout)
            elif not place:
                _take_device(job.backend, 0)
                dist.init_process_group(job.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=job.timeout)
            value = job.function(*job.args)
            _leave()
            return value
        except FiveplyError:
            raise
        except KeyboardInterrupt:
            raise _stopped_at_once() from None
        except Exception as error:
            failure = own.failure(rank, error)
            if log:
                log.write(failure.traceback)
            if failure.follows and place:
                raise RunError(f"{failure.cause}; another rank failed first") from error
            print(failure.traceback, file=sys.__stderr__, flush=True)
            raise failure.told(job.log(rank)) from error
        finally:
            _leave(patience_seconds=5.0)
            torch.set_num_threads(threads)


def _default_backend() -> str:
    return "cpu:gloo,cuda:nccl" if find().kind == "cuda" else "gloo"


def _threads(place: own.Place | None) -> int:
    """Of this process, alone or at `place`. Slurm can bind each task to cores of its own, so its count is the better one."""
    share = find().threads_for(place.local_ranks if place else 1)
    return own.number("SLURM_CPUS_PER_TASK", share) if place else share


def _meet(place: own.Place, backend: str, timeout: timedelta) -> None:
    """Take the device of `place` and join the default group."""
    _take_device(backend, place.local_rank)
    where = own.complete_address(place.rank, place.ranks)
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except RuntimeError as error:  # of which torch's errors of stores and networks are kinds
        raise RunError(
            f"rank {place.rank} could not meet the other ranks at {where} ({own.one_line(error, 160)}); "
            f"check that all {place.ranks} were started (srun, torchrun) and that MASTER_PORT is free"
        ) from error


def _take_device(backend: str, local_rank: int) -> None:
    if "nccl" not in backend:
        return
    count = torch.cuda.device_count()
    index = 0 if count == 1 and "SLURM_LOCALID" in os.environ else local_rank  # Slurm can show a task its GPU alone
    if index >= count:
        raise InputError(f"local rank {local_rank} has no GPU of its own; here: {count}", where="launch")
    torch.cuda.set_device(index)


def _leave(patience_seconds: float | None = None) -> None:
    """Destroy the group: a process that exits with a living one may abort. A broken one can wait for its peers."""
    if dist.is_initialized() and patience_seconds is None:
        dist.destroy_process_group()
    elif dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(patience_seconds)


def _start(job: _Job, others_still: AbstractContextManager[Any]) -> Any:
    # CUDA can't be used in a forked process once its parent has; elsewhere than on Linux system libraries can't either.
    forks = sys.platform == "linux" and "nccl" not in job.backend and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    listener = socket.create_server((_LOOPBACK, 0))  # ranks may connect before the store below begins to answer
    port = listener.getsockname()[1]
    ranks: list[BaseProcess] = []
    pipes: list[Connection] = []
    store = None
    with own.noting_stops(abrupt=False), listener:
        try:
            # Until a rank has its own handlers, signals wait: the mask is inherited, by fork and by spawn.
            signal.pthread_sigmask(signal.SIG_BLOCK, own.STOP_SIGNALS)
            with others_still, warnings.catch_warnings():
                # Python 3.12 warns of threads in the parent; `_rank_main` and `others_still` avoid what it warns of.
                warnings.simplefilter("ignore", DeprecationWarning)
                for rank in range(job.ranks):
                    receiver, sender = context.Pipe(duplex=False)
                    ranks.append(context.Process(target=_rank_main, args=(job, rank, port, sender, os.getpid())))
                    ranks[-1].start()
                    sender.close()
                    pipes.append(receiver)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, own.STOP_SIGNALS)
            # Threads of the store start after the forks; it outlives every rank, whichever dies.
            listening = listener.detach()
            store = dist.TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening)
            return _watch(job, ranks, dict(enumerate(pipes)))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, own.STOP_SIGNALS)
            _kill(ranks)
            del store  # and its threads, before the next fork


def _watch(job: _Job, ranks: list[BaseProcess], pipes: dict[int, Connection]) -> Any:
    """Wait for all ranks; return rank 0's value or raise the first error."""
    values: dict[int, bytes] = {}
    failures: dict[int, own.Failure] = {}
    deadline, asked = float("inf"), False
    while any(rank.is_alive() for rank in ranks) or len(values) + len(failures) < job.ranks:
        wait([*pipes.values(), *(rank.sentinel for rank in ranks if rank.is_alive())], timeout=0.1)
        ended = {index: code for index, rank in enumerate(ranks) if (code := rank.exitcode) is not None}
        for index, pipe in list(pipes.items()):
            with suppress(EOFError, OSError):  # killed while it told
                if not pipe.poll():
                    continue
                told = pipe.recv()
                (failures if isinstance(told, own.Failure) else values)[index] = told
            del pipes[index]
        for index in ended.keys() - values.keys() - failures.keys():
            failures[index] = own.Failure(index, time.monotonic(), f"rank {index} {own.ending(ended[index])}")
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        if own.stop.again:
            raise _stopped_at_once()
        if own.stop.first and not asked:  # a terminal's Ctrl-C has reached the ranks already; `kill` has not
            asked = True
            for rank in ranks:
                rank.terminate()
    if not failures:
        return pickle.loads(values[0])
    first = min(failures.values(), key=lambda failure: (failure.follows, failure.at))
    if first.error:
        raise first.error
    if first.traceback:
        print(first.traceback, file=sys.stderr, flush=True)
    raise first.told(job.log(first.rank))


def _kill(ranks: list[BaseProcess]) -> None:
    started = [rank for rank in ranks if rank.pid]
    for rank in started:
        rank.kill()
    for rank in started:
        rank.join()


def _rank_main(job: _Job, rank: int, port: int, report: Connection, launcher: int) -> None:
    """The main thread of a rank: takes signals, while another computes."""
    own.die_with(launcher)
    for number in own.STOP_SIGNALS:
        signal.signal(number, own.stop.note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, own.STOP_SIGNALS)
    failed = threading.Event()
    # A forked process's main thread remembers its parent's pool of OpenMP threads, which fork does not copy, and would
    # wait for it forever; a new thread makes a pool of its own. Signals are also taken while it is in a collective.
    worker = threading.Thread(target=_run_rank, args=(job, rank, port, report, failed), name=f"rank-{rank}")
    worker.start()
    worker.join()
    sys.exit(int(failed.is_set()))


def _run_rank(job: _Job, rank: int, port: int, report: Connection, failed: threading.Event) -> None:
    with own.logging_to(job.log(rank), tee=rank == 0) as log:

        def tell(failure: own.Failure) -> None:
            if log:
                log.write(failure.traceback or f"{failure.cause}\n")
            report.send(failure)

        own.voice.tell = tell
        try:
            keep_freed_memory()
            torch.set_num_threads(find().threads_for(job.ranks))
            # What libraries expect to find under any launcher. Gloo would look for this machine's name in the network.
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(WORLD_SIZE=str(job.ranks), LOCAL_WORLD_SIZE=str(job.ranks))
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
            _take_device(job.backend, rank)
            store = dist.TCPStore(_LOOPBACK, port, is_master=False, timeout=job.timeout)
            dist.init_process_group(job.backend, store=store, rank=rank, world_size=job.ranks, timeout=job.timeout)
            value = job.function(*job.args)
            _leave()
            report.send(_packed(value) if rank == 0 else b"")
        except BaseException as error:
            failed.set()
            tell(own.failure(rank, error))


def _packed(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception:
        return pickle.dumps(None)


def _stopped_at_once() -> RunError:
    return RunError("stopped at once by a second interrupt, without a checkpoint")
