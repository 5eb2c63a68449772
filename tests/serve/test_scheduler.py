"""Scheduler and blocks against ranks that keep tokens instead of keys and values: what is read back must be the sequence."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiveply.serve.kv_blocks import BlockPool, extend_digests
from fiveply.serve.lookup import Lookup
from fiveply.serve.messages import BLOCK, NEXT, Outcome, Sampling, Segment, StepBatch, StepResult
from fiveply.serve.scheduler import Request, Scheduler, blocks_for


def next_token(tokens: list[int]) -> int:
    """A model that depends on every token; few values, so that beginnings are shared."""
    return zlib.crc32(array("q", tokens).tobytes()) % 3


@dataclass
class Ranks:
    """What the ranks of a replica hold: the content of each block, and each request's table."""

    content: dict[int, list[int]] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    chosen: dict[int, int] = field(default_factory=dict)

    def run(self, batch: StepBatch) -> StepResult:
        for request in batch.released:
            del self.tables[request]
        return StepResult(batch.step, [outcome for s in batch.segments if (outcome := self._segment(s)) is not None])

    def _segment(self, segment: Segment) -> Outcome | None:
        assert (segment.begins is not None) == (segment.request not in self.tables)
        table = self.tables.setdefault(segment.request, [])
        table += segment.blocks
        for position, token in enumerate(segment.tokens, segment.start):
            block = self.content.setdefault(table[position // BLOCK], [])
            assert len(block) >= position % BLOCK
            del block[position % BLOCK :]
            block.append(self.chosen[segment.request] if token == NEXT else token)
        if not segment.last:
            return None
        read = [token for block in table for token in self.content.get(block, [])]
        outcome = Outcome(segment.request)
        for guessed in range(segment.guesses + 1 if segment.samples else 0):
            known = segment.start + len(segment.tokens) - segment.guesses + guessed
            outcome.tokens.append(next_token(read[:known]))
            if guessed < segment.guesses and read[known] != outcome.tokens[-1]:
                break
        self.chosen[segment.request] = (outcome.tokens or [0])[-1]
        return outcome


def conserved(scheduler: Scheduler) -> None:
    """Each block is blank, idle, or held as often as running requests have it in their tables."""
    pool, holders = scheduler.pool, [0] * scheduler.pool.total
    for request in scheduler.running.values():
        assert len(set(request.blocks)) == len(request.blocks)
        for block in request.blocks:
            holders[block] += 1
    assert holders == pool._holders
    assert sorted([*pool._blank, *pool._idle, *(b for b, n in enumerate(holders) if n)]) == list(range(pool.total))
    assert not any(request.blocks for request in scheduler.waiting)


class Clients:
    """Requests and what became of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.ranks = scheduler, Ranks()
        self.underway: deque[StepBatch] = deque()
        self.requests: list[Request] = []
        self.ended: set[int] = set()

    def add(self, prompt: list[int], max_tokens: int) -> None:
        request = Request(len(self.requests), list(prompt), max_tokens)
        self.requests.append(request)
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        if request.id not in self.ended:
            self.ended.add(request.id)
            self.scheduler.remove(request)

    def start(self) -> bool:
        scheduler = self.scheduler
        batch = scheduler.schedule()
        conserved(scheduler)
        if batch is None:
            return False
        assert sum(len(s.tokens) for s in batch.segments) <= scheduler.step_tokens
        assert len(batch.segments) <= -(-len(scheduler.running) // scheduler.stages) or scheduler.preemptions
        underway = {s.request for other in self.underway for s in other.segments}
        assert all(s.request not in underway or s.tokens == [NEXT] for s in batch.segments)
        self.underway.append(batch)
        return True

    def finish(self) -> None:
        for request, outcome in self.scheduler.update(self.ranks.run(self.underway.popleft())):
            assert request.id == outcome.request
            if len(request.tokens) - request.prompt >= request.max_tokens:
                self.ended.add(request.id)
                self.scheduler.remove(request)
        conserved(self.scheduler)

    def drain(self) -> None:
        """All that is admitted ends, in no more steps than one token at a time with every preemption would take."""
        for _ in range(20_000):
            while self.start():
                pass
            if not self.underway:
                break
            self.finish()
        assert self.scheduler.idle


PROMPTS = st.integers(1, 60).flatmap(
    lambda n: st.sampled_from([[0] * n, [i % 3 for i in range(n)], [1] * (n // 2 + 1)])
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROMPTS, st.integers(0, 70)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.just(("start",)),
        st.just(("finish",)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(
    actions=ACTIONS,
    blocks=st.integers(5, 12),
    stages=st.integers(1, 3),
    most_running=st.integers(1, 6),
    step_tokens=st.integers(1, 40),
    reuse=st.booleans(),
    guesses=st.integers(0, 5),
    ahead=st.booleans(),
)
def test_every_request_ends_with_its_own_tokens(
    actions: list[tuple], blocks: int, stages: int, most_running: int, step_tokens: int, reuse: bool,
    guesses: int, ahead: bool,
) -> None:  # fmt: skip
    guesses = 0 if ahead else guesses
    scheduler = Scheduler(
        blocks, stages=stages, most_running=most_running, step_tokens=step_tokens, reuse=reuse, guesses=guesses,
        ahead=ahead,
    )  # fmt: skip
    clients, cancelled = Clients(scheduler), set[int]()
    for action in actions:
        match action:
            case ("add", prompt, max_tokens) if Request(0, list(prompt), max_tokens).longest <= scheduler.capacity:
                clients.add(prompt, max_tokens)
            case ("cancel", index) if index < len(clients.requests):
                if index not in clients.ended:
                    cancelled.add(index)
                clients.cancel(clients.requests[index])
            case ("start",):
                clients.start()
            case ("finish",) if clients.underway:
                clients.finish()
    clients.drain()
    assert scheduler.pool.free == scheduler.pool.total
    for request in clients.requests:
        if request.id in cancelled:
            continue
        assert request.id in clients.ended
        wanted = request.tokens[: request.prompt]
        for _ in range(request.max_tokens):
            wanted.append(next_token(wanted))
        assert request.tokens == wanted


@pytest.mark.parametrize("ahead", [False, True])
def test_a_burst_fills_a_pipeline(ahead: bool) -> None:
    """Two stages, 16 requests at once: two steps of 8 in flight from the start, and so on while they last; ahead, one more."""
    scheduler = Scheduler(1000, stages=2, step_tokens=4096, ahead=ahead)
    clients = Clients(scheduler)
    for index in range(16):
        clients.add([index] * 20, 10)
    for _ in range(18):
        while clients.start():
            pass
        assert [len(batch.segments) for batch in clients.underway] == [8, 8] + [8] * ahead
        clients.finish()


def test_one_stage_has_the_next_step_on_its_way() -> None:
    """And no more steps than without; none is on its way beyond the last token."""
    counts = []
    for ahead in (False, True):
        scheduler = Scheduler(1000, ahead=ahead)
        clients = Clients(scheduler)
        for index in range(3):
            clients.add([index] * 20, 10)
        while clients.start():
            while clients.start():
                pass
            if 2 < scheduler._step < 10:
                assert [len(batch.segments) for batch in clients.underway] == [3] * (1 + ahead)
            clients.finish()
        while clients.underway:
            clients.finish()
        assert clients.ended == {0, 1, 2}
        counts.append(scheduler._step)
    assert counts == [10, 10]


def test_decoding_goes_on_beside_long_prompts() -> None:
    scheduler = Scheduler(1000, step_tokens=65)
    clients = Clients(scheduler)
    clients.add([1] * 5, 50)
    clients.start()
    clients.finish()
    clients.add([2] * 300, 5)
    for step in range(1, 5):
        clients.start()
        assert {s.request: len(s.tokens) for s in clients.underway[0].segments} == {0: 1, 1: 64}
        clients.finish()
        assert len(clients.requests[0].tokens) == 6 + step


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    scheduler = Scheduler(100)
    clients = Clients(scheduler)
    for tail in ([7], [8], []):
        clients.add([1] * 3 * BLOCK + tail, 2)
        clients.drain()
    # The last token is always computed, so that there is something to answer from.
    assert [request.reused for request in clients.requests] == [0, 3 * BLOCK, 2 * BLOCK]
    scored = Request(9, [1] * 3 * BLOCK, 1, scores=True)
    scheduler.add(scored)
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.segments[0].start == 0


def test_the_youngest_gives_way_and_comes_back() -> None:
    scheduler = Scheduler(6, step_tokens=512, reuse=False)
    clients = Clients(scheduler)
    clients.add([1] * BLOCK, 3 * BLOCK)
    clients.add([2] * BLOCK, 3 * BLOCK)
    clients.drain()
    assert scheduler.preemptions >= 1
    assert [len(request.tokens) for request in clients.requests] == [4 * BLOCK, 4 * BLOCK]


def test_a_request_without_a_block_does_not_hold_up_the_others() -> None:
    """Two stages, so one request a step: the younger has waited longer, and there is no block for it."""
    clients = Clients(Scheduler(5, stages=2, most_running=2, step_tokens=1, reuse=False))
    clients.add([0], 22)
    clients.add([0] * 42, 8)
    clients.drain()
    assert [len(request.tokens) for request in clients.requests] == [23, 50]


def test_guesses_are_what_followed_before() -> None:
    """A cycle is guessed, and as much is verified in a step; what is wrong is not kept."""
    lookup = Lookup()
    assert lookup.guess([7, 8, 9], 4) == []
    assert lookup.guess([7, 8, 9, 5, 7, 8], 4) == [9, 5, 7, 8]
    lookup.judge(4, 0)
    lookup.judge(4, 0)
    assert lookup.guess([7, 8, 9, 5, 7, 8, 6, 8, 9], 4) == [5, 7]
    slow, fast = (Scheduler(100, guesses=guesses) for guesses in (0, 5))
    for scheduler in (slow, fast):
        clients = Clients(scheduler)
        clients.add([0, 1, 2] * 20, 60)
        clients.drain()
    assert slow.guessed == 0
    assert 0 < fast.guessed_right < fast.guessed
    assert fast._step == slow._step - fast.guessed_right


def test_what_sampling_looks_back_on_is_told_again() -> None:
    scheduler = Scheduler(50)
    first = Request(0, [1] * 2 * BLOCK + [2], 1, Sampling(presence_penalty=1.0))
    scheduler.add(first)
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.segments[0].begins is not None
    assert batch.segments[0].begins.cached == []
    scheduler.add(Request(1, [1] * 2 * BLOCK + [3], 1, Sampling(presence_penalty=1.0)))
    scheduler.update(StepResult(batch.step, [Outcome(0, [5])]))
    batch = scheduler.schedule()
    assert batch is not None
    segment = next(s for s in batch.segments if s.request == 1)
    assert segment.begins is not None
    assert (segment.start, segment.begins.cached) == (2 * BLOCK, [1] * 2 * BLOCK)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=70), st.lists(st.integers(0, 2), max_size=70))
def test_digests_are_equal_where_all_before_is(a: list[int], b: list[int]) -> None:
    first: list[bytes] = []
    second: list[bytes] = []
    extend_digests(first, a[:20])
    extend_digests(first, a)
    extend_digests(second, b)
    assert len(first) == len(a) // BLOCK
    for index, (x, y) in enumerate(zip(first, second, strict=False), 1):
        assert (x == y) == (a[: index * BLOCK] == b[: index * BLOCK])


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_the_longest_unused_gives_way_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    for index, block in enumerate(blocks):
        pool.know(block, bytes([index]))
    pool.release(blocks[:1])
    pool.release(blocks[1:])
    assert pool.allocate(4) is None
    assert pool.allocate(1) == blocks[:1]
    assert pool.find([bytes([1]), bytes([2])]) == blocks[1:]
    assert pool.find([bytes([0])]) == []
    assert pool.allocate(1) == blocks[2:]  # of one sequence the last block first
