"""This process as one rank: its place in a world that others started, requests to stop, its log, how it ended.

What it does not know: how ranks are started or watched (`fiveply.world.launch`), groups, devices.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import torch.distributed as dist

from fiveply.spec.errors import FiveplyError, InputError, RunError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# One Ctrl-C can arrive twice: from the terminal and from a wrapper (make, uv) that forwards it.
_ONE_PRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """Where this process stands in a world that torchrun or Slurm started."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


def place() -> Place | None:
    """What torchrun's or Slurm's environment says of this process; None where it is on its own. Raises InputError."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        ranks = number("WORLD_SIZE")
        return Place(number("RANK"), ranks, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", ranks))
    tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
    if "SLURM_PROCID" in os.environ and tasks > 1:
        here = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "")))
        return Place(number("SLURM_PROCID"), tasks, number("SLURM_LOCALID", 0), int(here[0]) if here else tasks)
    return None


def number(name: str, default: int | None = None) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name, "")
    if text.isdigit() or (not text and default is not None):
        return int(text or cast(int, default))
    raise InputError(f"{text!r} is not a whole number", where="environment", key=name)


def complete_address(rank: int, ranks: int) -> str:
    """Fill in what `env://` reads, and return the meeting point; torchrun has set it, from Slurm it is derived."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    # Two jobs, or two steps of one, can share a node: each has a port of its own.
    step = number("SLURM_JOB_ID", 0) * 7 + number("SLURM_STEP_ID", 0)
    os.environ.setdefault("MASTER_PORT", str(20000 + step % 10000))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed list: `gpu[003-010,12]-ib,other7` begins with gpu003-ib."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else "127.0.0.1"


class _Stop:
    """Requests to stop that this process has received."""

    first = 0.0  # when, by time.monotonic()
    again = False
    abrupt = False  # whether a second request raises KeyboardInterrupt

    def note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.first:
            self.first = now
        elif now - self.first > _ONE_PRESS_SECONDS:
            self.again = True
            if self.abrupt:
                raise KeyboardInterrupt


stop = _Stop()  # signals belong to the process, as its end does (`voice`): the two pieces of global state here


def stop_requested() -> bool:
    """Whether Ctrl-C or SIGTERM has asked this process to finish. Ranks may learn of it a step apart: agree first."""
    return bool(stop.first)


@contextmanager
def noting_stops(abrupt: bool) -> Iterator[None]:
    """Take SIGINT and SIGTERM as requests to stop (handlers belong to the main thread: on others, nothing changes)."""
    stop.first, stop.again, stop.abrupt = 0.0, False, abrupt
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop.note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def die_with(launcher: int) -> None:
    """End this process when its launcher does, even by SIGKILL: no rank outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:
            os._exit(1)
    elif parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _Tee:
    """A stream that also writes to a log, but for what redraws a line: a progress line belongs to the terminal."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def logging_to(path: Path | None, tee: bool) -> Iterator[TextIO | None]:
    """Add what this process prints to the log `path`; with `tee`, it goes where it went before as well."""
    if path is None:
        yield None
        return
    streams = sys.stdout, sys.stderr
    descriptors = {} if tee else {number: os.dup(number) for number in (1, 2)}
    with path.open("a", buffering=1, errors="replace") as log:
        for number in descriptors:
            os.dup2(log.fileno(), number)  # what compiled code prints too
        sys.stdout, sys.stderr = (cast(TextIO, _Tee(stream, log)) if tee else log for stream in streams)
        try:
            yield log
        finally:
            sys.stdout, sys.stderr = streams
            for number, kept in descriptors.items():
                os.dup2(kept, number)
                os.close(kept)


@dataclass(frozen=True)
class Failure:
    """What a rank tells its launcher when it fails."""

    rank: int
    at: float  # time.monotonic(): one clock for all processes of a machine
    cause: str  # one line that starts with the rank
    follows: bool = False  # only says that a peer was lost
    traceback: str = ""  # of a defect
    error: FiveplyError | None = None  # to be raised again as it is

    def told(self, log: Path | None) -> RunError:
        """The line for the user."""
        return RunError(f"{self.cause}; its log: {log}" if log else self.cause)


class _Voice:
    """How this process tells that it failed: set by what started it, used where the thread that computes can't."""

    tell: Callable[[Failure], None] | None = None


voice = _Voice()


def abandon(told: Failure) -> NoReturn:
    """End this process at once: another thread has found that the one that computes is stuck for good."""
    if voice.tell is not None:
        voice.tell(told)
    elif not told.follows:  # a script that torchrun or Slurm started
        print(told.traceback or told.cause, file=sys.__stderr__, flush=True)
    os._exit(1)


def failure(rank: int, error: BaseException) -> Failure:
    """`error`, raised now in `rank`, in a form that can travel to another process."""
    at, cause, follows = time.monotonic(), f"rank {rank}: {one_line(error)}", _follows(error)
    if not isinstance(error, FiveplyError):
        return Failure(rank, at, cause, follows, "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a subclass with a constructor of its own, say: keep the message
        error = (InputError if error.exit_code == 2 else RunError)(str(error))
    return Failure(rank, at, cause, follows, error=error)


def _follows(error: BaseException | None) -> bool:
    """Whether an error only tells that a peer was lost. Transports other than torch's raise ConnectionError for that."""
    lost = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)
    while error:
        if isinstance(error, (ConnectionError, dist.DistError)):
            return True
        if isinstance(error, RuntimeError) and lost.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def one_line(error: BaseException, limit: int = 400) -> str:
    """Type and message: torch appends a C++ stack to some."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def ending(code: int) -> str:
    """How a process ended, by its exit code, negative for a signal."""
    if code >= 0:
        return f"ended with exit code {code} without a word"
    names = {int(number): f" ({number.name})" for number in signal.Signals}
    return f"was killed by signal {-code}{names.get(-code, '')}"
