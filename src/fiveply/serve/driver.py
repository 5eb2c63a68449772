"""The driver: requests in, steps to the ranks, pieces of answers out. One asyncio loop, no threads, no tensors.

Notable:
- A step that returns is answered in one go: tokens to text, ends and stop strings, and the next step is on its way before
  anyone hears of the last one.
- Every rank is listened to. One that closes its connection or is silent for too long is lost, and with it the engine, at once;
  requests wait for the next engine and go on from the tokens they have. One that has met two losses fails: it may be the cause.
- Ranks come to the driver and show a secret, so ranks on other hosts could too.

It knows neither HTTP nor how ranks are started (`service.py` tells it that an engine is on its way or will not come).
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from fiveply.serve import messages
from fiveply.serve.generation import Generation
from fiveply.serve.messages import Sampling
from fiveply.serve.prometheus import Metrics
from fiveply.serve.router import route
from fiveply.serve.scheduler import Request, Scheduler
from fiveply.serve.text import Text
from fiveply.spec.errors import RunError
from fiveply.spec.layout import Layout

MEETINGS = 2  # engines that a request may lose before it fails
GREETING_SECONDS, GREETING_BYTES = 10.0, 1024  # of a connection, before it is known to be a rank's


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a driver; seconds and tokens."""

    most_running: int = 64
    """Requests of one replica that are decoded together."""
    most_waiting: int = 256
    """Requests beyond those of which more are refused."""
    step_tokens: int = 512
    """Most tokens in one step: a longer prompt is taken in chunks, so that answers beside it go on."""
    reuse: bool = True
    """Whether blocks of earlier prompts are found again."""
    guesses: int = 0
    """Tokens guessed ahead for each request, from what followed its latest tokens before (`serve/lookup.py`)."""
    silence_seconds: float = 60.0
    """Until a rank that says nothing is taken for lost; the longest step must be shorter."""
    start_seconds: float = 600.0
    """For ranks to load."""


class Overloaded(Exception):  # noqa: N818
    """No place in the queue; try again after `seconds`."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"too many requests are waiting; try again in {seconds} s")


class EngineLost(RunError):  # noqa: N818
    """The ranks failed while they worked on this request."""


@dataclass
class _Rank:
    writer: asyncio.StreamWriter
    pid: int
    heard: float
    blocks: int = -1


@dataclass
class Replica:
    """One copy of the model: its ranks and the requests that it works on."""

    ranks: list[int]
    scheduler: Scheduler | None = None
    generations: dict[int, Generation] = field(default_factory=dict)


class Driver:
    """All replicas of one model. `state` is what `/health` says."""

    def __init__(self, layout: Layout, text: Text, settings: Settings) -> None:
        self.layout, self.text, self.settings, self.metrics = layout, text, settings, Metrics()
        self.secret = secrets.token_hex(16)
        self.state: Literal["starting", "ready", "lost", "stopped"] = "starting"
        self.problem = ""
        """Why it is lost."""
        self.ready = asyncio.Event()
        self.engines = 0
        """How many have been ready so far."""
        places = [layout.coordinates(rank) for rank in range(layout.world)]
        self.replicas = [
            Replica([rank for rank, place in enumerate(places) if place.dp == dp]) for dp in range(layout.dp)
        ]
        self._replica_of = [place.dp for place in places]
        self._ranks: dict[int, _Rank] = {}
        self._homeless: list[Generation] = []
        """What waits for an engine."""
        self.stop_asked = asyncio.Event()
        """The user wants an end: a server finishes what it has begun."""
        self.abandoned: list[int] = []
        """Process ids of the ranks of a lost engine."""
        self._ids = itertools.count()
        self._began = time.monotonic()

    async def listen(self) -> tuple[asyncio.Server, str, int]:
        """Wait for ranks at an address of its own; the server to close in the end, and the address."""
        server = await asyncio.start_server(self._hear, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        return server, host, port

    # --- requests ---

    @property
    def generations(self) -> list[Generation]:
        return [*self._homeless, *(g for replica in self.replicas for g in replica.generations.values())]

    @property
    def capacity(self) -> int:
        """Tokens of the longest request; 0 before an engine is ready."""
        return min((replica.scheduler.capacity if replica.scheduler else 0 for replica in self.replicas), default=0)

    def submit(
        self, tokens: list[int], max_tokens: int, sampling: Sampling, *, ends: frozenset[int] = frozenset(),
        stops: Sequence[str] = (), scores: bool = False, embeds: bool = False,
    ) -> Generation:  # fmt: skip
        """Raises Overloaded, EngineLost where no engine will come, and ValueError for what the cache can't hold."""
        if self.state == "stopped":
            raise EngineLost(self.problem or "the engine has stopped")
        request = Request(next(self._ids), tokens, max_tokens, sampling, scores, embeds)
        if self.capacity and request.longest > self.capacity:
            raise ValueError(
                f"{request.prompt} tokens + max_tokens {max_tokens} exceed the cache's {self.capacity} tokens"
            )
        queued = sum(len(replica.scheduler.waiting) for replica in self.replicas if replica.scheduler) + len(
            self._homeless
        )
        if queued >= self.settings.most_waiting:
            raise Overloaded(self._patience())
        generation = Generation(request, self.text, ends, stops)
        self.metrics.requests.inc()
        self.metrics.prompt_tokens.inc(len(tokens))
        self._house(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Nobody wants the rest; harmless after its end."""
        if generation.finish:
            return
        if generation in self._homeless:
            self._homeless.remove(generation)
            return
        for replica in self.replicas:
            if replica.generations.pop(generation.request.id, None) is not None and replica.scheduler is not None:
                replica.scheduler.remove(generation.request)
                self.metrics.cancelled.inc()

    def _house(self, generation: Generation) -> None:
        """Give it to a replica, or keep it until there is one."""
        schedulers = [replica.scheduler for replica in self.replicas]
        if self.state != "ready" or None in schedulers:
            self._homeless.append(generation)
            return
        replica = self.replicas[route(generation.request, [s for s in schedulers if s is not None])]
        assert replica.scheduler is not None
        if generation.request.longest > replica.scheduler.capacity:
            generation.fail(RunError(f"the cache holds {replica.scheduler.capacity} tokens, too few for this request"))
            return
        replica.generations[generation.request.id] = generation
        replica.scheduler.add(generation.request)
        self._go_on(replica)

    def _patience(self) -> int:
        """Seconds until a place is likely to be free, from how long requests have taken of late."""
        return max(1, min(60, round(self.metrics.recent_seconds)))

    # --- steps ---

    def _go_on(self, replica: Replica) -> None:
        """Keep as many steps in flight as the scheduler lets."""
        assert replica.scheduler is not None
        while (batch := replica.scheduler.schedule()) is not None:
            message = messages.pack(batch)
            for rank in replica.ranks:
                self._ranks[rank].writer.write(message)

    def _result(self, replica: Replica, result: messages.StepResult) -> None:
        assert replica.scheduler is not None
        for request, outcome in replica.scheduler.update(result):
            generation = replica.generations[request.id]
            before = len(request.tokens) - len(outcome.tokens)
            ended = generation.take(outcome)
            self.metrics.generated_tokens.inc(len(request.tokens) - before)
            if ended:
                replica.scheduler.remove(request)
                del replica.generations[request.id]
                self.metrics.ended(generation.arrived, generation.first_token_at, len(request.tokens) - request.prompt)
                self.metrics.reused_tokens.inc(request.reused)
        self._go_on(replica)
        self.metrics.steps.inc()

    # --- ranks ---

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One rank's connection, from its greeting to its end."""
        decoder, rank = msgspec.msgpack.Decoder(messages.FromRank), -1
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                rank = self._greet(decoder.decode(await _body(reader, GREETING_BYTES)), writer)
            while True:
                message = decoder.decode(await _body(reader, messages.LARGEST))
                known = self._ranks.get(rank)
                if known is None or known.writer is not writer:
                    break  # a stranger, or a rank of an engine that is given up
                known.heard = time.monotonic()
                self._told(rank, message)
        except (
            asyncio.IncompleteReadError,
            ConnectionError,
            TimeoutError,
            msgspec.MsgspecError,
            asyncio.CancelledError,
        ):
            pass
        finally:
            writer.close()
            known = self._ranks.get(rank)
            if known is not None and known.writer is writer:
                self.lost(f"rank {rank} closed its connection")

    def _greet(self, message: messages.FromRank, writer: asyncio.StreamWriter) -> int:
        known = isinstance(message, messages.Hello) and hmac.compare_digest(message.secret, self.secret)
        if not known or not isinstance(message, messages.Hello) or message.rank in self._ranks:
            return -1
        self._ranks[message.rank] = _Rank(writer, message.pid, time.monotonic())
        return message.rank

    def _told(self, rank: int, message: messages.FromRank) -> None:
        match message:
            case messages.Ready():
                self._ranks[rank].blocks = message.blocks
                if len(self._ranks) == self.layout.world and all(other.blocks >= 0 for other in self._ranks.values()):
                    self._begin()
            case messages.StepResult():
                self._result(self.replicas[self._replica_of[rank]], message)
            case _:
                pass

    def _begin(self) -> None:
        """All ranks have loaded: caches are as large as the smallest rank's of each replica."""
        for replica in self.replicas:
            blocks = min(self._ranks[rank].blocks for rank in replica.ranks)
            settings = self.settings
            replica.scheduler = Scheduler(
                blocks, stages=self.layout.pp, most_running=settings.most_running,
                step_tokens=settings.step_tokens, reuse=settings.reuse, guesses=settings.guesses,
                ahead=not settings.guesses,
            )  # fmt: skip
            for rank in replica.ranks:
                self._ranks[rank].writer.write(messages.pack(messages.Begin(blocks)))
        self.state, self.problem = "ready", ""
        self.engines += 1
        self.ready.set()
        homeless, self._homeless = self._homeless, []
        for generation in homeless:
            self._house(generation)

    async def watch(self) -> None:
        """Notice silent ranks, and ranks that never come, for as long as it runs."""
        while True:
            await asyncio.sleep(min(1.0, self.settings.silence_seconds / 4))
            now = time.monotonic()
            silent = [r for r, rank in self._ranks.items() if now - rank.heard > self.settings.silence_seconds]
            if self.state == "ready" and silent:
                self.lost(f"rank {silent[0]} has been silent for {self.settings.silence_seconds:g} s")
            elif self.state == "starting" and now - self._began > self.settings.start_seconds:
                self.lost(f"the ranks were not ready within {self.settings.start_seconds:g} s")

    def lost(self, problem: str) -> None:
        """A rank is gone, so all are: their requests wait for other ones."""
        if self.state in ("lost", "stopped"):
            self.problem = problem if self.state == "lost" else self.problem  # a later word is more exact
            return
        self.state, self.problem = "lost", problem
        self.ready.clear()
        self.metrics.losses.inc()
        self.abandoned = self.pids
        for rank in self._ranks.values():
            rank.writer.close()
        self._ranks = {}
        survivors, self._homeless = self.generations, []
        for replica in self.replicas:
            for request_id in replica.scheduler.running if replica.scheduler else ():
                if request_id in replica.generations:
                    replica.generations[request_id].losses += 1
            replica.scheduler, replica.generations = None, {}
        for generation in sorted(survivors, key=lambda g: g.request.id):
            if generation.losses >= MEETINGS:
                generation.fail(EngineLost(f"{problem}, while this request was running for the second time"))
            else:
                generation.request.forget()
                self._homeless.append(generation)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that are connected, in order of ranks."""
        return [self._ranks[rank].pid for rank in sorted(self._ranks)]

    def starting(self) -> None:
        """New ranks are on their way."""
        self.state, self._began = "starting", time.monotonic()

    def stop(self, problem: str = "") -> None:
        """No engine will come any more: tell ranks to end, fail what is left."""
        if self.state != "stopped":
            if self.state in ("ready", "starting"):
                for rank in self._ranks.values():
                    with suppress(ConnectionError):
                        rank.writer.write(messages.pack(messages.Shutdown()))
            self.state, self.problem = "stopped", problem or self.problem
            self.stop_asked.set()
        for generation in self.generations:
            generation.fail(EngineLost(self.problem or "the server is shutting down"))
        self._homeless = []
        for replica in self.replicas:
            replica.generations = {}

    async def farewell(self) -> None:
        """Let what was written reach the ranks."""
        for rank in self._ranks.values():
            with suppress(ConnectionError):
                await asyncio.wait_for(rank.writer.drain(), 1.0)
            rank.writer.close()

    def cache_use(self) -> float:
        """Share of blocks that running requests hold."""
        pools = [replica.scheduler.pool for replica in self.replicas if replica.scheduler]
        total = sum(pool.total for pool in pools)
        return (total - sum(pool.free for pool in pools)) / total if total else 0.0


async def _body(reader: asyncio.StreamReader, largest: int) -> bytes:
    """The next message. Raises ConnectionError for one that is too long."""
    length = int.from_bytes(await reader.readexactly(4), "little")
    if length > largest:
        raise ConnectionError(f"a message of {length} bytes")
    return await reader.readexactly(length)
