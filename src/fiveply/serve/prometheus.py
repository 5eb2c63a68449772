"""What `/metrics` says: counters that the driver moves, and gauges read from it when asked (Prometheus' text format)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from fiveply.serve.driver import Driver

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one driver, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        where: Any = {"registry": self.registry}
        self.requests = Counter("fiveply_requests", "Requests accepted", **where)
        self.cancelled = Counter("fiveply_requests_cancelled", "Requests that nobody waited for to the end", **where)
        self.prompt_tokens = Counter("fiveply_prompt_tokens", "Tokens of prompts", **where)
        self.reused_tokens = Counter("fiveply_reused_tokens", "Tokens of prompts found in the cache", **where)
        self.generated_tokens = Counter("fiveply_generated_tokens", "Tokens of answers", **where)
        self.steps = Counter("fiveply_steps", "Steps of all replicas", **where)
        self.losses = Counter("fiveply_engine_losses", "Times that a rank was lost", **where)
        self.first_token = Histogram(
            "fiveply_first_token_seconds", "From a request to its first token", buckets=_SECONDS, **where
        )
        self.per_token = Histogram(
            "fiveply_token_seconds", "Between an answer's tokens, its mean", buckets=_SECONDS, **where
        )
        self._running = Gauge("fiveply_running", "Requests in the cache", **where)
        self._waiting = Gauge("fiveply_waiting", "Requests in the queue", **where)
        self._cache = Gauge("fiveply_cache_use", "Share of the cache's blocks that requests hold", **where)
        self._preemptions = Gauge("fiveply_preemptions", "Requests put back for want of blocks", **where)
        self._guessed = Gauge("fiveply_guessed_tokens", "Tokens guessed ahead", **where)
        self._right = Gauge("fiveply_guessed_right_tokens", "Tokens guessed ahead that were right", **where)
        self._up = Gauge("fiveply_up", "Whether all ranks answer", **where)
        self.recent_seconds = 1.0
        """How long a request has taken of late."""

    def ended(self, arrived: float, first_token_at: float, tokens: int) -> None:
        now = time.monotonic()
        self.recent_seconds += 0.1 * (now - arrived - self.recent_seconds)
        if first_token_at:
            self.first_token.observe(first_token_at - arrived)
        if tokens > 1:
            self.per_token.observe((now - first_token_at) / (tokens - 1))

    def page(self, driver: Driver) -> bytes:
        schedulers = [replica.scheduler for replica in driver.replicas if replica.scheduler]
        self._running.set(sum(len(scheduler.running) for scheduler in schedulers))
        self._waiting.set(len(driver.generations) - sum(len(scheduler.running) for scheduler in schedulers))
        self._cache.set(driver.cache_use())
        self._preemptions.set(sum(scheduler.preemptions for scheduler in schedulers))
        self._guessed.set(sum(scheduler.guessed for scheduler in schedulers))
        self._right.set(sum(scheduler.guessed_right for scheduler in schedulers))
        self._up.set(driver.state == "ready")
        return generate_latest(self.registry)
