"""Which replica serves a request: the one that will have computed its prompt first, by what each has cached and has to do."""

from __future__ import annotations

from collections.abc import Sequence

from fiveply.serve.kv_blocks import extend_digests
from fiveply.serve.scheduler import Request, Scheduler

ANSWER_TOKENS = 64
"""What a running answer costs those beside it, in prompt tokens: a guess at what it has left to say."""


def route(request: Request, replicas: Sequence[Scheduler]) -> int:
    """The index of the cheapest replica, the first of equals."""
    if len(replicas) == 1:
        return 0
    extend_digests(request.digests, request.tokens)
    return min(range(len(replicas)), key=lambda index: _cost(request, replicas[index]))


def _cost(request: Request, replica: Scheduler) -> int:
    ahead = [*replica.waiting, *replica.running.values()]
    own = len(request.tokens) - replica.reusable(request.digests)
    return own + sum(other.left + ANSWER_TOKENS for other in ahead)
