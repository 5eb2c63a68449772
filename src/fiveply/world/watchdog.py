"""A run that stands still ends with one report: which rank holds up the others, where, and what each of them waits for.

Each rank has a thread that wakes once a second, says through the store how long its rank has stood where it stands, and
otherwise does nothing. When its own rank has stood still for the limit, it looks at all others.

The rule. The clock runs only while *no* rank of the world moves: one that was in another action or call a moment ago is
going on, and the others wait for it rightly. Once all have stood still for the limit, and a rank waits in a call:
- a rank whose thread has gone silent is stopped or dead, and the run ends;
- ranks that all wait (for a rank that has left, in calls that don't match, in a circle) can't go on, and the run ends;
- a rank that computes and answers may only be slow (an evaluation, a large file): it is named once, and the run goes on
  until 95% of the time-out of a single call has passed, since the call would end it a moment later without these words.
Time in which this process itself was stopped or starved does not count: all were, perhaps.

Where a rank stands is read from its `Board`, on this host from the rank's own memory, so it is exact for a stopped
process too; from other hosts it is what it last said, at most a second before it went silent.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import msgspec
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from fiveply.world import process as own
from fiveply.world.device import read
from fiveply.world.hang import Hello, Position, Verdict, judge
from fiveply.world.recorder import BOARD_BYTES, Field, Recorder, machine

LIMIT_SECONDS = 300.0
_STORE_SECONDS = 5.0  # for an answer of the store
_SHARE_OF_TIMEOUT = 0.95


class _Beat(msgspec.Struct, frozen=True):
    """What a rank says each time: `number` counts the times."""

    number: int
    still: float
    board: tuple[int, ...]
    left: bool = False


class Watchdog:
    """A context around what is watched, entered by all ranks of a world of two or more, and in one order if by several.

    `place` names this rank's coordinates; `limit` and `timeout` (of one call) in seconds; `note` prints for the user; the
    last report goes to `file`.
    """

    def __init__(
        self,
        recorder: Recorder,
        place: str,
        *,
        limit: float = LIMIT_SECONDS,
        timeout: float = 600.0,
        note: Callable[[str], None] = print,
        file: Path | None = None,
    ) -> None:
        self.recorder, self.limit, self.timeout, self.note, self.file = recorder, limit, timeout, note, file
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        store = _get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._store = dist.PrefixStore(f"watchdog {store.add(f'watchdogs of {self.rank}', 1)}", store)
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._period = max(min(1.0, limit / 4), self.ranks / 1000)  # at most a thousand messages a second for the store
        self._patience = max(4 * self._period, min(limit / 10, 30.0))
        """Seconds without a beat after which a rank is silent."""
        self._said, self._still = 0, 0.0
        self._beats: dict[int, tuple[int, float]] = {}  # rank -> number of its last beat, seconds since
        self._hellos: dict[int, Hello] = {}
        self._noted: set[tuple[int, ...]] = set()
        self._over = threading.Event()
        self._rounds = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._guard = threading.Thread(target=self._watch_the_store, name="watchdog's guard", daemon=True)
        self._memory, board = _shared_board()
        if board is not None:
            recorder.move_to(board)
        where = (machine(), os.getpid(), self._memory) if self._memory is not None else None
        self._hello = Hello(place, recorder.axes, recorder.stages, where)

    def __enter__(self) -> Watchdog:
        self.introduce()
        self._say()
        self._thread.start()
        self._guard.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(2 * _STORE_SECONDS)
        if not self._thread.is_alive():
            with suppress(RuntimeError):  # the store can be gone with the rank that held it
                self._say(left=error is None)
        if self._memory is not None:
            self.recorder.move_to(memoryview(bytearray(BOARD_BYTES)).cast("q"))
            os.close(self._memory)

    def introduce(self) -> None:
        """Say what this rank holds: again where that has grown."""
        self._store.set(f"hello {self.rank}", msgspec.json.encode(self._hello).decode())

    def _ticks(self) -> Iterator[float]:
        """Once a period, the seconds that passed; of time in which this process was stopped itself, a period."""
        before = time.monotonic()
        while not self._over.wait(self._period):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._period), now
            yield passed

    def _watch(self) -> None:
        moves = -1
        for passed in self._ticks():
            if self.recorder.board[0] != moves:
                moves, self._still = self.recorder.board[0], 0.0
                self._beats.clear()
            else:
                self._still += passed
            with suppress(RuntimeError):  # of which torch's store and network errors are kinds; the guard sees them
                self._say()
                if self._still >= self.limit - self._patience:  # by the limit it is known who answers
                    self._look(passed)
                self._rounds += 1

    def _watch_the_store(self) -> None:
        """The store can stand in a rank that is stopped, and asking it has no time-out that holds in every case."""
        seen, still = (-1, -1), 0.0
        for passed in self._ticks():
            stands = seen == (self._rounds, self.recorder.board[0]) and self.recorder.board[Field.OPERATION]
            still = still + passed if stands else 0.0
            seen = self._rounds, self.recorder.board[0]
            if still >= self.limit + _STORE_SECONDS:
                self._end(self._alone())

    def _say(self, *, left: bool = False) -> None:
        self._said += 1
        beat = _Beat(self._said, self._still, tuple(self.recorder.board), left)
        self._store.set(f"beat {self.rank}", msgspec.json.encode(beat).decode())

    def _look(self, passed: float) -> None:
        """Judge where all ranks stand, when none has moved for the limit and it is known which of them answer."""
        if self._store.check(["end"]):  # another rank has judged
            told = own.Failure(self.rank, time.monotonic(), "", follows=True, traceback=self._store.get("end").decode())
            own.abandon(told)
        positions = [self._position(rank, passed) for rank in range(self.ranks)]
        if any(p.answers and not p.left and p.still < self.limit for p in positions):
            return
        if not any(p.waits for p in positions):
            return
        answering = [p.rank for p in positions if p.answers and not p.left]
        if not answering or self.rank != answering[0]:
            return
        if any(2.5 * self._period < silent < self._patience for _, silent in self._beats.values()):
            return  # in a moment it will be known whether it still answers
        verdict = judge({p.rank: p for p in positions}, self.limit)
        last_words = self._still >= _SHARE_OF_TIMEOUT * self.timeout
        if verdict.certain or last_words:
            self._store.set("end", verdict.report)
            self._end(verdict)
        stand = tuple(p.board[0] for p in positions)
        if stand not in self._noted:
            self._noted.add(stand)
            self.note(f"{verdict.report}\n  it may only be slow: the run goes on, for {self.timeout:.0f} s at most")

    def _position(self, rank: int, passed: float) -> Position:
        if rank == self.rank:
            return Position(rank, self._hello, tuple(self.recorder.board), self._still)
        if not self._store.check([f"beat {rank}"]):
            return Position(rank, Hello("", [], {}), tuple(Recorder().board), self._still)
        beat = msgspec.json.decode(self._store.get(f"beat {rank}"), type=_Beat)
        if rank not in self._hellos:
            self._hellos[rank] = msgspec.json.decode(self._store.get(f"hello {rank}"), type=Hello)
        hello = self._hellos[rank]
        number, silent = self._beats.get(rank, (beat.number, 0.0))
        silent = silent + passed if number == beat.number else 0.0
        self._beats[rank] = beat.number, silent
        answers = silent < self._patience
        board, state = beat.board, ""
        if not answers and not beat.left:
            board, state = _board_of(hello) or board, _state_of(hello)
        return Position(rank, hello, board, beat.still, answers, beat.left, state)

    def _alone(self) -> Verdict:
        """The store does not answer, so nothing is known of the others; it stands in rank 0 where nothing else holds it."""
        mine = Position(self.rank, self._hello, tuple(self.recorder.board), self._still)
        where = f"waits {mine.call}, during {mine.doing}" if mine.waits else f"is in {mine.doing}"
        cause = "rank 0, or the agent that holds the world's store, does not answer: stopped, dead or out of reach"
        return Verdict((0,), True, cause, f"{cause}.\n  {mine.name} {where}, since {self.limit:.0f} s or more")

    def _end(self, verdict: Verdict) -> None:
        if self.file is not None:
            with suppress(OSError):
                self.file.write_text(f"{verdict.report}\n")
        blamed = verdict.blamed[0] if verdict.blamed else self.rank
        own.abandon(own.Failure(blamed, time.monotonic(), f"hang: {verdict.cause}", traceback=f"{verdict.report}\n"))


def _shared_board() -> tuple[int, memoryview[int]] | tuple[None, None]:
    """Memory without a name that other processes of this host can open by process and descriptor; Linux has it."""
    if sys.platform != "linux":
        return None, None
    descriptor = os.memfd_create("fiveply-board")
    os.ftruncate(descriptor, BOARD_BYTES)
    return descriptor, memoryview(mmap.mmap(descriptor, BOARD_BYTES)).cast("q")


def _board_of(hello: Hello) -> tuple[int, ...] | None:
    if hello.board is None or hello.board[0] != machine():
        return None
    with suppress(OSError):
        raw = Path(f"/proc/{hello.board[1]}/fd/{hello.board[2]}").read_bytes()
        if len(raw) == BOARD_BYTES:
            return tuple(memoryview(raw).cast("q"))
    return None


def _state_of(hello: Hello) -> str:
    """What Linux says of a process of this host."""
    if hello.board is None or hello.board[0] != machine():
        return ""
    states = {"": "its process is gone", "T": "its process is stopped", "t": "a debugger holds it", "Z": "its process is dead",
              "D": "it waits for a disk"}  # fmt: skip
    return states.get(read(f"/proc/{hello.board[1]}/stat").rpartition(")")[2].strip()[:1], "")
