"""`fiveply bench serve`: puts load on a server of OpenAI's API and measures what its clients see.

Notable: requests stream over connections of their own, by asyncio and h11 alone. Prompts are random token ids, each its own, so
no cache of prompts helps. A server that does not take ids, or does not know `ignore_eos`, says so to the first request, which
is not measured, and is asked in the next simpler way. With a rate, requests arrive as a Poisson process whether or not the server
keeps up, and a request's time starts when it was due, so a stalled server does not hide its stall.

It knows nothing of the server but its answers: fiveply's, or anyone's.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fiveply.spec.errors import InputError, RunError

IDS = (3, 255)  # ids that every vocabulary holds: the least one is bytes and a few special tokens
WORDS = ["sea", "land", "wind", "ship", "sail", "rope", "mast", "deck", "wave", "tide", "port", "star", "night", "crew", "salt",
         "bell"]  # fmt: skip
LEAST_REQUESTS = 8
RATE_SECONDS = 30  # of arrivals at a rate, where no number of requests is asked for


class ServerError(Exception):
    """Why a request got no whole answer, in words that equal cases share."""

    def __init__(self, reason: str, status: int = 0) -> None:
        self.status = status
        super().__init__(reason)


@dataclass(frozen=True)
class Load:
    """What is asked of a server, and for how long it is waited for."""

    url: SplitResult
    model: str
    prompt_tokens: int = 128
    output_tokens: int = 128
    key: str = ""
    timeout: float = 300.0
    seed: int = 0


@dataclass
class Answer:
    """One request: seconds from when it was due to its first token and to its last; why it failed, if it did."""

    first: float = 0.0
    last: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    reason: str = ""

    @property
    def per_token(self) -> float:
        """Seconds between tokens; there are none with less than two."""
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(frozen=True)
class Quantiles:
    """None where nothing was measured."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        """In milliseconds."""
        return cls(*(1e3 * np.quantile(seconds, [0.5, 0.99])).tolist()) if seconds else cls(None, None)


@dataclass(frozen=True)
class Point:
    """What one concurrency, or one rate, gave. Tokens and times are of requests that were answered whole."""

    concurrency: int
    """Most requests in flight; 0 for no bound."""
    rate: float | None
    """Requests that arrive each second; None where each client asks again as soon as it is answered."""
    requests: int
    errors: int
    reasons: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    latency_ms: Quantiles

    @classmethod
    def of(cls, concurrency: int, rate: float | None, answers: Sequence[Answer], seconds: float) -> Point:
        whole = [answer for answer in answers if not answer.reason]
        tokens = sum(answer.tokens for answer in whole)
        return cls(
            concurrency=concurrency, rate=rate, requests=len(answers), errors=len(answers) - len(whole),
            reasons=dict(Counter(answer.reason for answer in answers if answer.reason)), seconds=seconds,
            prompt_tokens=sum(answer.prompt_tokens for answer in whole), output_tokens=tokens,
            output_tokens_per_second=tokens / seconds, requests_per_second=len(whole) / seconds,
            ttft_ms=Quantiles.of([answer.first for answer in whole]),
            tpot_ms=Quantiles.of([answer.per_token for answer in whole if answer.tokens > 1]),
            latency_ms=Quantiles.of([answer.last for answer in whole]),
        )  # fmt: skip

    @property
    def power(self) -> float:
        """Throughput over latency (Kleinrock 1979, "Power and deterministic rules of thumb for probabilistic problems in
        computer communications"): its maximum over loads is the knee, where more load buys more waiting than work."""
        return self.output_tokens_per_second / self.latency_ms.p50 if self.latency_ms.p50 else 0.0


def measure(
    url: str, model: str, *, concurrencies: str = "", rates: str = "", requests: int = 0, prompt_tokens: int = 128,
    output_tokens: int = 128, key: str = "", timeout: float = 300.0, seed: int = 0,
) -> list[Point]:  # fmt: skip
    """A point for each concurrency, or for each rate, one after the other.

    `concurrencies` and `rates`: numbers with commas between. `requests`: at each point; by default four for each client, or
    half a minute of arrivals. `timeout`: seconds until a request is given up.
    Raises InputError for what can't be asked, RunError where the server refuses every way of asking.
    """
    for flag, value in (("--prompt-tokens", prompt_tokens), ("--output-tokens", output_tokens), ("--timeout", timeout)):
        if value <= 0:
            raise InputError(f"{value} is not positive", where=flag, fix="give a positive number")
    if requests < 0:
        raise InputError(f"{requests} is negative", where="--requests", fix="give a number of requests")
    bounds = [int(one) for one in _numbers(concurrencies, "--concurrency", whole=True)]
    loads: list[tuple[int, float | None]] = [(bound, None) for bound in bounds]
    if rates:
        if len(bounds) > 1:
            raise InputError("several together with --rate", where="--concurrency", fix="give several of one of them")
        loads = [(bounds[0] if bounds else 0, rate) for rate in _numbers(rates, "--rate")]
    elif not loads:
        loads = [(1, None)]
    load = Load(_address(url), model, prompt_tokens, output_tokens, key, timeout, seed)
    return asyncio.run(_measure(load, loads, requests))


async def _measure(load: Load, loads: list[tuple[int, float | None]], requests: int) -> list[Point]:
    simpler = await _way(load)
    points: list[Point] = []
    for index, (bound, rate) in enumerate(loads):
        count = requests or max(LEAST_REQUESTS, 4 * bound if rate is None else round(RATE_SECONDS * rate))
        draw = random.Random(f"{load.seed} {index}")
        bodies = [_body(load, simpler, draw) for _ in range(count)]
        begun = time.perf_counter()
        answers = await _put(load, bodies, bound, rate, draw)
        points.append(Point.of(bound, rate, answers, time.perf_counter() - begun))
    return points


async def _put(load: Load, bodies: list[bytes], bound: int, rate: float | None, draw: random.Random) -> list[Answer]:
    """All requests: by `bound` clients in turn, or as they are due."""
    slots = asyncio.Semaphore(bound or len(bodies))

    async def one(body: bytes, due: float) -> Answer:
        async with slots:
            return await _ask(load, body, due if rate else time.perf_counter())

    due, tasks = time.perf_counter(), list[asyncio.Task[Answer]]()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"{rate:g} requests a second" if rate else f"{bound} in flight", total=len(bodies))
        for body in bodies:
            if rate:
                due += draw.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(body, due)))
            tasks[-1].add_done_callback(lambda _: progress.advance(bar))
        return await asyncio.gather(*tasks)


async def _ask(load: Load, body: bytes, due: float) -> Answer:
    """One request, from when it was due."""
    answer, ended, pieces = Answer(), False, 0
    try:
        async with asyncio.timeout(load.timeout), aclosing(_events(load, body)) as events:
            async for event in events:
                now = time.perf_counter() - due
                if event == "[DONE]":
                    ended = True
                    break
                told = _object(event)
                if told.get("error"):
                    raise ServerError(f"error in the stream: {_message(told)}")
                if told.get("choices"):
                    pieces += 1
                    answer.first = answer.first or now
                    answer.last = now
                if usage := told.get("usage"):
                    answer.prompt_tokens, answer.tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        if not (ended and pieces):
            raise ServerError("the stream ended too early" if pieces else "the stream held no token")
        answer.tokens = answer.tokens or pieces
    except TimeoutError:
        answer.reason = f"no whole answer within {load.timeout:g} s"
    except ServerError as error:
        answer.reason = str(error)
    except (OSError, h11.RemoteProtocolError) as error:
        answer.reason = f"connection: {error}"
    except (ValueError, KeyError, TypeError) as error:
        answer.reason = f"not an event of OpenAI's: {error}"
    return answer


async def _events(load: Load, body: bytes) -> AsyncGenerator[str]:
    """The data of a stream's server-sent events as they come. Raises ServerError unless the status is 200."""
    url = load.url
    secure = ssl.create_default_context() if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.hostname, url.port or (443 if secure else 80), ssl=secure)
    try:
        wire = h11.Connection(h11.CLIENT)
        headers = {"Host": url.netloc, "Content-Type": "application/json", "Accept": "text/event-stream",
                   "Content-Length": str(len(body)), "Connection": "close"}  # fmt: skip
        if load.key:
            headers["Authorization"] = f"Bearer {load.key}"
        request = h11.Request(method="POST", target=f"{url.path}/completions", headers=list(headers.items()))
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(wire.send(event) or b"")
        await writer.drain()
        status, rest = 0, b""
        while not isinstance(event := wire.next_event(), (h11.EndOfMessage, h11.ConnectionClosed)):
            if event is h11.NEED_DATA:
                wire.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                rest += event.data
                if status == 200:
                    *lines, rest = rest.split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:"):
                            yield line[5:].strip().decode()
        if status != 200:
            raise ServerError(f"HTTP {status}: {_refusal(rest)}", status)
    finally:
        writer.transport.abort()  # a server that does not read could keep an orderly end waiting


async def _way(load: Load) -> int:
    """How simply the server has to be asked (see _body): the first way that it does not refuse as a bad request."""
    draw, refusal = random.Random(f"{load.seed} warm-up"), ""
    for simpler in range(4):
        try:
            async with asyncio.timeout(load.timeout), aclosing(_events(load, _body(load, simpler, draw))) as events:
                async for _ in events:
                    pass
            return simpler
        except ServerError as error:
            if error.status in (401, 403, 404):
                raise RunError(f"{load.url.geturl()}: {error}") from None
            if error.status not in (400, 422):
                return simpler  # the measurement counts such errors, and those of the connection
            refusal = refusal or str(error)
        except ConnectionRefusedError:
            raise InputError("nobody answers", where=f"--url {load.url.geturl()}", fix="start the server") from None
        except (socket.gaierror, ssl.SSLError) as error:
            raise InputError(str(error), where=f"--url {load.url.geturl()}", fix="mend the address") from None
        except (h11.LocalProtocolError, UnicodeError) as error:
            raise InputError(str(error), where="--url or --api-key", fix="HTTP can't carry it: mend it") from None
        except (OSError, h11.RemoteProtocolError):
            return simpler
    raise RunError(f"{load.url.geturl()}: {refusal}")


def _body(load: Load, simpler: int, draw: random.Random) -> bytes:
    """A request of its own. `simpler`: 1 without `ignore_eos`, which is not OpenAI's; 2 with words in place of ids; 3 both."""
    ids = [draw.randrange(*IDS) for _ in range(load.prompt_tokens)]
    body: dict[str, Any] = {
        "model": load.model, "prompt": " ".join(WORDS[one % len(WORDS)] for one in ids) if simpler & 2 else ids,
        "max_tokens": load.output_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body if simpler & 1 else body | {"ignore_eos": True}).encode()


def _object(text: str) -> dict[str, Any]:
    told = json.loads(text)
    if not isinstance(told, dict):
        raise TypeError(f"{text[:60]!r}")
    return told


def _message(told: dict[str, Any]) -> str:
    error = told.get("error", told)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]


def _refusal(body: bytes) -> str:
    try:
        return _message(_object(body.decode()))
    except (ValueError, TypeError):
        return body.decode(errors="replace").strip()[:200]


def _address(url: str) -> SplitResult:
    """A server's address, with the API's version where it names none."""
    found = urlsplit(url.rstrip("/"))
    try:
        right = found.scheme in ("http", "https") and found.hostname and (found.port is None or found.port)
    except ValueError:
        right = False
    if not right:
        raise InputError(f"{url!r} is no address", where="--url", fix="write http://127.0.0.1:8000")
    return found if found.path else found._replace(path="/v1")


def _numbers(text: str, flag: str, whole: bool = False) -> list[float]:
    try:
        found = [int(one) if whole else float(one) for one in text.split(",")] if text else []
        if all(0 < one < 1e6 for one in found):
            return found
    except ValueError:
        pass
    raise InputError(f"{text!r} is not a list of positive numbers", where=flag, fix="write 1,4,16") from None


# --- what the verb prints ---


def knee(points: Sequence[Point]) -> Point:
    """The point with the most power."""
    return max(points, key=lambda point: point.power)


def as_json(points: Sequence[Point]) -> dict[str, Any]:
    """The figures of the only point, or of the knee; all points beside them."""
    return asdict(knee(points)) | {"points": [asdict(point) for point in points]}


def show(points: Sequence[Point], console: Console) -> None:
    """A row a point, the knee, and why requests failed."""
    table = Table("requests in flight", "requests a second", "asked", "errors", "tokens/s", "answers/s", box=None)
    for name in ("to first token, ms p50", "p99", "per token, ms p50", "p99"):
        table.add_column(name)
    for column in table.columns:
        column.justify = "right"
    best = knee(points)
    for point in points:
        times = (point.ttft_ms.p50, point.ttft_ms.p99, point.tpot_ms.p50, point.tpot_ms.p99)
        table.add_row(
            str(point.concurrency or "-"), "-" if point.rate is None else f"{point.rate:g}", str(point.requests),
            str(point.errors), f"{point.output_tokens_per_second:,.1f}", f"{point.requests_per_second:.2f}",
            *("-" if one is None else f"{one:,.1f}" for one in times),
        )  # fmt: skip
    console.print(table)
    if len(points) > 1 and best.power:
        load = f"{best.concurrency} in flight" if best.rate is None else f"{best.rate:g} requests a second"
        last = " (the last one asked for: it may lie beyond)" if best is points[-1] else ""
        console.print(f"knee: {load}{last}, where throughput over latency is largest")
    for point in points:
        for reason, count in point.reasons.items():
            console.print(f"{count} x {reason}", style="red", markup=False)
