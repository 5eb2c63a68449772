"""Which requests run in the next step, and how many tokens each brings: pure Python, for one replica.

Notable:
- One number a request and step, how many tokens it brings, is prefill, prefill in chunks and decoding at once.
- Cohorts keep a pipeline full: as many steps are in flight as there are stages, none with more than its share of the running requests,
  ceil(running / stages). One batch of all requests, as is usual, leaves all stages but one idle.
- One step more is on its way than stages could run (`ahead`), so that none waits for the driver: a request that is decoded takes
  the token that its step in flight will choose, NEXT, unseen. What it did beyond an end is dropped.
- Whoever has waited longest for a step goes first, so nobody starves.
- A request that needs a block when none is left takes those of the youngest. That one starts again later, from what the cache
  still knows of it, and says the same: random numbers depend on seed and position alone. The oldest always goes on, so all end.

It knows no tensors, text or sockets. When a request ends is the driver's decision.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from fiveply.serve.kv_blocks import BlockPool, extend_digests
from fiveply.serve.lookup import Lookup
from fiveply.serve.messages import BLOCK, NEXT, Beginning, Outcome, Sampling, Segment, StepBatch, StepResult


@dataclass(eq=False)
class Request:
    """A sequence on its way: its tokens so far, and how many of them are in the cache (those in flight included)."""

    id: int
    tokens: list[int]
    max_tokens: int
    """0: the prompt is only scored or embedded."""
    sampling: Sampling = field(default_factory=Sampling)
    scores: bool = False
    embeds: bool = False
    prompt: int = field(init=False)
    computed: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    """Tokens that the cache held when it was admitted."""
    blocks: list[int] = field(default_factory=list, init=False)
    digests: list[bytes] = field(default_factory=list, init=False)
    told: int = field(default=0, init=False)
    """Blocks that the ranks know of."""
    last_step: int = field(default=-1, init=False)
    in_flight: int = field(default=0, init=False)
    """Steps on their way that it has a part in."""
    known: int = field(default=0, init=False)
    """Full blocks that the pool has been told of."""
    lookup: Lookup = field(default_factory=Lookup, init=False)
    gone: bool = field(default=False, init=False)
    """Cancelled or finished while in flight."""

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens that the cache must hold for it in the end; the last one is never read."""
        return self.prompt + max(0, self.max_tokens - 1)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def goes_on(self) -> bool:
        """Whether a step that is on its way chooses a token, and another one is wanted that depends on no more than it."""
        more = len(self.tokens) + 1 - self.prompt < self.max_tokens
        return self.in_flight == 1 and self.left == 0 and more and not (self.gone or self.sampling.looks_back)

    def by_age(self) -> int:
        return self.id

    def forget(self) -> None:
        """Nothing of it is cached any more, and nothing is on its way."""
        self.computed, self.told, self.known, self.blocks, self.in_flight, self.last_step = 0, 0, 0, [], 0, -1


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Scheduler:
    """Requests of one replica; ids grow with arrival. `step_tokens`: most tokens in one step, which bounds its time."""

    def __init__(
        self, blocks: int, *, stages: int = 1, most_running: int = 64, step_tokens: int = 512, reuse: bool = True,
        guesses: int = 0, ahead: bool = False,
    ) -> None:  # fmt: skip
        assert not (ahead and guesses)
        self.pool = BlockPool(blocks, reuse=reuse)
        self.stages, self.most_running, self.guesses, self.ahead = stages, most_running, guesses, ahead
        self.step_tokens = max(step_tokens, most_running + 1)  # all may decode, and a prompt still goes on
        self.waiting: list[Request] = []  # oldest first
        self.running: dict[int, Request] = {}
        self.preemptions = self.guessed = self.guessed_right = 0
        self._in_flight: deque[StepBatch] = deque()
        self._released: list[int] = []
        self._step = 0

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def capacity(self) -> int:
        """Tokens of the longest request that can be served."""
        return self.pool.total * BLOCK

    def add(self, request: Request) -> None:
        """Its `longest` must be within `capacity`."""
        assert request.longest <= self.capacity
        bisect.insort(self.waiting, request, key=Request.by_age)

    def remove(self, request: Request) -> None:
        """It has ended, or nobody wants it any more; its blocks are free now, or when its step returns."""
        if request.id in self.running:
            request.gone = True
            if not request.in_flight:
                self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> StepBatch | None:
        """The next step, which must be sent; None where nothing can go on before another returns."""
        if len(self._in_flight) >= self.stages + self.ahead:
            return None
        self._admit()
        share = -(-len(self.running) // self.stages)
        ready = [r for r in self.running.values() if not r.in_flight or (self.ahead and r.goes_on)]
        ready.sort(key=lambda r: (r.last_step, r.id))
        decoding = {request.id for request in ready[:share] if request.left <= 1}  # each has its token kept for it
        room, segments, short = self.step_tokens, list[Segment](), False
        for request in ready:
            if len(segments) == share:
                break
            decoding.discard(request.id)
            count = min(max(1, request.left), room - len(decoding))
            # Not if an older one has just taken its blocks; and one that gets no block must not keep others from going on,
            # but for those in flight: they have to land for it to take theirs.
            if request.id not in self.running or count <= 0 or (short and request.in_flight):
                continue
            if not self._make_room(request, request.computed + count):
                short = True
                continue
            guesses = self._guess(request, room - count - len(decoding)) if count == request.left else []
            room -= count + len(guesses)
            segments.append(self._segment(request, count, guesses))
        if not segments:
            return None
        batch = StepBatch(self._step, segments, self._released)
        self._released = []
        self._step += 1
        self._in_flight.append(batch)
        return batch

    def update(self, result: StepResult) -> list[tuple[Request, Outcome]]:
        """The oldest step in flight has returned: what it gave to requests that are still wanted. Tokens are appended."""
        batch = self._in_flight.popleft()
        assert batch.step == result.step, f"step {result.step} returned before step {batch.step}"
        outcomes = {outcome.request: outcome for outcome in result.outcomes}
        given: list[tuple[Request, Outcome]] = []
        for segment in batch.segments:
            request = self.running[segment.request]
            request.in_flight -= 1
            if request.gone:
                if not request.in_flight:
                    self._leave(request)
            elif outcome := outcomes.get(request.id):
                if outcome.tokens:
                    right = len(outcome.tokens) - 1
                    request.tokens += outcome.tokens
                    request.computed += right
                    if segment.guesses:
                        request.lookup.judge(segment.guesses, right)
                        self.guessed, self.guessed_right = self.guessed + segment.guesses, self.guessed_right + right
                given.append((request, outcome))
        return given

    def reusable(self, digests: Iterable[bytes]) -> int:
        """Tokens of a prompt with these digests that the cache holds."""
        return len(self.pool.find(list(digests))) * BLOCK

    def _admit(self) -> None:
        """Oldest first, each with blocks for all tokens that it has: prompts are never stopped halfway for blocks."""
        while self.waiting and len(self.running) < self.most_running:
            request, found = self.waiting[0], list[int]()
            if self.pool.reuse:
                extend_digests(request.digests, request.tokens)
            if not (request.scores or request.embeds):  # these need every token's hidden state
                found = self.pool.find(request.digests[: (len(request.tokens) - 1) // BLOCK])
            needed = blocks_for(len(request.tokens)) - len(found)
            # A block for each running request to grow into, or it would soon be preempted again.
            if self.pool.free - self.pool.idle(found) - needed < len(self.running):
                return
            self.pool.hold(found)
            request.blocks = found + (self.pool.allocate(needed) or [])
            request.computed = request.reused = len(found) * BLOCK
            request.known = len(found)
            self.running[request.id] = self.waiting.pop(0)

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Blocks for `tokens` of the request, the youngest ones' if need be."""
        while len(request.blocks) < blocks_for(tokens):
            more = self.pool.allocate(blocks_for(tokens) - len(request.blocks))
            if more is not None:
                request.blocks += more
                continue
            if request.in_flight:
                return False  # it can wait
            younger = [r for r in self.running.values() if r.id > request.id and not r.in_flight]
            if not younger:
                return False
            self._preempt(max(younger, key=Request.by_age))
        return True

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self.preemptions += 1
        bisect.insort(self.waiting, request, key=Request.by_age)

    def _leave(self, request: Request) -> None:
        del self.running[request.id]
        self.pool.release(request.blocks)
        if request.told:
            self._released.append(request.id)
        request.forget()

    def _guess(self, request: Request, room: int) -> list[int]:
        """What may follow, if blocks are there for it and nothing but logits decides."""
        wanted = request.prompt + request.max_tokens - len(request.tokens)
        most = min(self.guesses, room, wanted - 1)
        if most < 1 or request.sampling.looks_back:
            return []
        guesses = request.lookup.guess(request.tokens, most)
        blocks = self.pool.allocate(max(0, blocks_for(len(request.tokens) + len(guesses)) - len(request.blocks)))
        request.blocks += blocks or []
        return guesses if blocks is not None else []

    def _segment(self, request: Request, count: int, guesses: list[int]) -> Segment:
        start = request.computed
        end = start + count
        begins = None
        if request.told == 0:
            cached = request.tokens[:start] if request.sampling.looks_back else []
            begins = Beginning(request.sampling, request.prompt, cached, request.scores, request.embeds)
        tokens = [NEXT] if request.in_flight else request.tokens[start:end] + guesses
        segment = Segment(
            request.id, start, tokens, request.blocks[request.told :], end >= len(request.tokens), request.max_tokens > 0, begins,
            request.tokens[end] if request.scores and end < request.prompt else -1, len(guesses),
        )  # fmt: skip
        request.computed, request.last_step, request.told = end, self._step, len(request.blocks)
        request.in_flight += 1
        if self.pool.reuse:
            # Known from now on: ranks work off steps in order, so this one writes the block before another reads it.
            extend_digests(request.digests, request.tokens)
            known = min(end, len(request.tokens)) // BLOCK
            for index in range(request.known, known):
                self.pool.know(request.blocks[index], request.digests[index])
            request.known = max(request.known, known)
        return segment
