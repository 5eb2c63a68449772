"""bench serve: load on any server of OpenAI's API, and what its clients saw: throughput, time to the first token, time per token.

Notable: a client is a thread with a connection of its own that streams one answer after another, so at a concurrency of N there are
always N answers under way; with a rate, answers begin at random times of that mean (a Poisson process) whatever is under
way. Tokens are counted by the server's own usage where it tells it, else by pieces.

It knows HTTP and a clock, and nothing of this package's server.
"""

from __future__ import annotations

import http.client
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fiveply.spec.errors import InputError, RunError

WORDS = tuple(
    "sea land ship wind rope sail tide port mast star salt fish rock wave sand moon bell oar net gull".split()  # noqa: SIM905
)
KNEE = 0.9  # of the highest throughput


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a server. Raises InputError for what is out of range."""

    url: str
    """As http://127.0.0.1:8000, with or without /v1."""
    model: str
    concurrency: int = 1
    """Answers under way at once."""
    rate: float = 0.0
    """Answers begun a second, at random times; 0: as soon as one ends. `concurrency` then bounds those under way."""
    requests: int = 0
    """Answers in all; by default four for each that is under way, at least 16."""
    prompt_words: int = 128
    output_tokens: int = 128
    key: str = ""
    ignore_end: bool = False
    """Ask for answers of full length, which not every server understands (`ignore_eos`)."""
    timeout_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("concurrency", "prompt_words", "output_tokens"):
            if getattr(self, key) < 1:
                raise InputError(
                    f"{getattr(self, key)} is out of range", where="bench serve", key=key, fix="give 1 or more"
                )
        if not self.model:
            raise InputError(
                "is missing", where="bench serve", key="model", fix="give the server's name for it: see /v1/models"
            )
        if self.requests < 0 or self.rate < 0:
            raise InputError("is negative", where="bench serve", key="requests" if self.requests < 0 else "rate")
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise InputError(
                f"'{self.url}' is no address", where="bench serve", key="url", fix="as http://127.0.0.1:8000"
            )

    @property
    def count(self) -> int:
        return self.requests or max(16, 4 * self.concurrency)


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """In milliseconds; None of nothing."""
        ordered = sorted(1000 * one for one in seconds)
        if not ordered:
            return None
        return cls(*(ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99)))


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients saw at one concurrency or rate."""

    concurrency: int
    rate: float
    requests: int
    errors: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    ttft_ms: Percentiles | None
    """From when a request was due to its first piece: at a rate, waiting for a free client counts."""
    tpot_ms: Percentiles | None
    """Between an answer's tokens, its mean."""
    first_error: str = ""


@dataclass
class _Answer:
    begun: float
    first: float = 0.0
    last: float = 0.0
    prompt: int = 0
    tokens: int = 0
    error: str = ""


@dataclass
class _Run:
    load: Load
    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: list[_Answer] = field(default_factory=list)
    next_at: float = 0.0

    def take(self) -> tuple[int, float] | None:
        """The number of the next answer and when it is due, at that time."""
        with self.lock:
            if not self.left:
                return None
            self.left -= 1
            number, due = self.left, time.perf_counter()
            if self.load.rate:
                due = self.next_at
                self.next_at += random.Random(f"{self.load.seed} {number}").expovariate(self.load.rate)
        time.sleep(max(0.0, due - time.perf_counter()))
        return number, due


def measure(load: Load, told: Callable[[int], None] = lambda done: None) -> Level:
    """One level; `told(answers done)` from the clients' threads. Raises RunError where no answer came at all."""
    run = _Run(load, load.count)

    def client() -> None:
        connection = _connection(load)
        while (taken := run.take()) is not None:
            answer = _ask(load, connection, *taken)
            with run.lock:
                run.answers.append(answer)
            told(len(run.answers))
        connection.close()

    run.next_at = start = time.perf_counter()
    clients = [threading.Thread(target=client, daemon=True) for _ in range(min(load.concurrency, load.count))]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    seconds = time.perf_counter() - start
    good = [answer for answer in run.answers if not answer.error]
    bad = [answer.error for answer in run.answers if answer.error]
    if not good:
        raise RunError(f"{load.url}: no answer came: {bad[0]}")
    tokens = sum(answer.tokens for answer in good)
    return Level(
        concurrency=load.concurrency, rate=load.rate, requests=len(run.answers), errors=len(bad), seconds=seconds,
        prompt_tokens=sum(answer.prompt for answer in good), output_tokens=tokens, output_tokens_per_second=tokens / seconds,
        ttft_ms=Percentiles.of([answer.first - answer.begun for answer in good]),
        tpot_ms=Percentiles.of([(a.last - a.first) / (a.tokens - 1) for a in good if a.tokens > 1]),
        first_error=bad[0] if bad else "",
    )  # fmt: skip


def levels(*, concurrency: str, **settings: Any) -> list[Level]:
    """One level for each number of `concurrency`, joined by commas; other settings as Load's. Raises as Load and `measure`."""
    try:
        numbers = [int(number) for number in concurrency.split(",")]
    except ValueError:
        raise InputError(
            f"'{concurrency}' is no number", where="bench serve", key="concurrency", fix="as 8, or 1,4,16"
        ) from None
    loads = [Load(concurrency=number, **settings) for number in numbers]
    found: list[Level] = []
    with Progress(disable=not sys.stderr.isatty(), transient=True, console=Console(stderr=True)) as bar:
        for load in loads:
            task = bar.add_task(f"concurrency {load.concurrency}", total=load.count)
            found.append(measure(load, lambda done, task=task: bar.update(task, completed=done)))
    return found


def result(found: Sequence[Level]) -> dict[str, Any]:
    """The verb's JSON: the level at the knee, and all of them."""
    return msgspec.to_builtins(knee(found)) | {"levels": msgspec.to_builtins(list(found))}


def show(found: Sequence[Level], console: Console) -> None:
    table = Table(
        "concurrency", "answers", "errors", "tokens/s", "first token p50", "p99", "per token p50", "p99", box=None
    )
    for level in found:
        times = [
            f"{one:,.1f} ms" for two in (level.ttft_ms, level.tpot_ms) for one in ((two.p50, two.p99) if two else ())
        ]
        table.add_row(
            str(level.concurrency),
            str(level.requests),
            str(level.errors),
            f"{level.output_tokens_per_second:,.1f}",
            *times,
        )
    console.print(table)
    if len(found) > 1:
        console.print(f"knee at concurrency {knee(found).concurrency}: {KNEE:.0%} of the highest throughput")
    for level in found:
        if level.first_error:
            console.print(f"first error at concurrency {level.concurrency}: {level.first_error}")


def knee(levels: Sequence[Level]) -> Level:
    """The first level that reaches 90% of the highest throughput: beyond it clients wait longer for little more."""
    best = max(level.output_tokens_per_second for level in levels)
    return next(level for level in levels if level.output_tokens_per_second >= KNEE * best)


def _connection(load: Load) -> http.client.HTTPConnection:
    parts = urlsplit(load.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname is not None
    return kind(parts.hostname, parts.port, timeout=load.timeout_seconds)


def _ask(load: Load, connection: http.client.HTTPConnection, number: int, due: float) -> _Answer:
    """One streamed completion. Each prompt is another one, so that no cache knows it."""
    draw = random.Random(f"{load.seed} {number} prompt")
    body: dict[str, Any] = {
        "model": load.model, "prompt": " ".join(draw.choices(WORDS, k=load.prompt_words)), "max_tokens": load.output_tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if load.ignore_end:
        body["ignore_eos"] = True
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {load.key}"} if load.key else {})
    path = urlsplit(load.url).path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    answer = _Answer(due)
    try:
        connection.request("POST", path, msgspec.json.encode(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {response.read(400).decode(errors='replace')}"
            return answer
        _listen(response, answer)
    except (OSError, http.client.HTTPException, msgspec.DecodeError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error or not answer.first:
        answer.error = answer.error or "the answer was empty"
        connection.close()  # it reconnects by itself
    return answer


def _listen(response: http.client.HTTPResponse, answer: _Answer) -> None:
    pieces = 0
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        event = msgspec.json.decode(line[6:], type=dict[str, Any])
        if "error" in event:
            answer.error = str(event["error"])
            return
        if event.get("choices") and event["choices"][0].get("text"):
            answer.last = time.perf_counter()
            answer.first = answer.first or answer.last
            pieces += 1
        if usage := event.get("usage"):
            answer.prompt, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    answer.tokens = answer.tokens or pieces
