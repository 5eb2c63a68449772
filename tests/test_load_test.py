"""The load generator: against the real server, and against one that does everything wrong, with the counts right."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from random_models import add_tokenizer, save_random

from fiveply import load_test, service
from fiveply.cli import main
from fiveply.load_test import Answer, Point, Quantiles
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.http import Model, Server
from fiveply.spec.errors import InputError, RunError

KEYS = {"requests", "errors", "output_tokens_per_second", "ttft_ms", "tpot_ms"}

# --- a server that misbehaves ---------------------------------------------------------------------------------------


def head(status: int, kind: str = "text/event-stream", more: str = "") -> bytes:
    return f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n".encode()


def token(text: str = "a", **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], **more}).encode() + b"\r\n\r\n"


def counted(tokens: int) -> bytes:
    return token("", usage={"prompt_tokens": 5, "completion_tokens": tokens})


DONE = b"data: [DONE]\n\n"
PLAIN = [head(200), token(), 0.01, token(), counted(7), DONE]
Script = list[bytes | float | None]
"""What is sent, how long is waited, and None for a connection that is cut."""


class Actor:
    """A server on loopback whose n-th request is answered as `answer(n, body)` says."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Script]) -> None:
        self.answer, self.bodies, self.heads, self.in_flight, self.most = answer, [], [], 0, 0
        self.bodies: list[dict[str, Any]]
        self.heads: list[str]

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            top = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line.split(":")[1]) for line in top.splitlines() if line.lower().startswith("content-len")
            )
            self.heads.append(top)
            self.bodies.append(json.loads(await reader.readexactly(length)))
            for step in self.answer(len(self.bodies) - 1, self.bodies[-1]):
                if step is None:
                    writer.transport.abort()
                elif isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await asyncio.sleep(step)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client gave up, or the test has ended
        finally:
            self.in_flight -= 1
            writer.close()


@contextmanager
def acting(answer: Callable[[int, dict[str, Any]], Script]) -> Iterator[tuple[str, Actor]]:
    """The address of an actor, in a thread of its own."""
    actor, loop, ready = Actor(answer), asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def run() -> None:
        server = await asyncio.start_server(actor.meet, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: (loop.run_until_complete(run()), loop.run_until_complete(drain())))

    async def drain() -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    thread.start()
    assert ready.wait(5)
    try:
        yield f"http://127.0.0.1:{ports[0]}", actor
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        loop.close()


FAULTS: dict[str, tuple[Script, str]] = {
    "busy": ([head(503, "application/json"), b'{"error": {"message": "draining"}}'], "HTTP 503: draining"),
    "crash": ([head(500, "text/plain"), b"oops"], "HTTP 500: oops"),
    "late error": (
        [head(200), token(), b'data: {"error": {"message": "lost"}}\n\n', DONE],
        "error in the stream: lost",
    ),
    "drop": ([head(200, more="Content-Length: 999\r\n"), token(), None], "connection: "),
    "no answer": ([None], "connection: "),
    "unfinished": ([head(200), token()], "the stream ended too early"),
    "silent": ([head(200), DONE], "the stream held no token"),
    "garbage": ([head(200), b"data: {nope\n\n", DONE], "not an event of OpenAI's: "),
    "strange": ([head(200), b"data: [1]\n\n", DONE], "not an event of OpenAI's: "),
    "not HTTP": ([b"hello\r\n\r\n"], "connection: "),
    "slow": ([head(200), token(), 30.0, token(), DONE], "no whole answer within 1 s"),
}


def test_every_fault_is_counted_once_and_named() -> None:
    order = [*FAULTS, "", "busy", ""]

    def answer(number: int, body: dict[str, Any]) -> Script:
        return FAULTS[order[number - 1]][0] if number and order[number - 1] else PLAIN

    with acting(answer) as (url, actor):
        (point,) = load_test.measure(url, "m", concurrencies="1", requests=len(order), timeout=1.0)
    assert (point.requests, point.errors, sum(point.reasons.values())) == (14, 12, 12)
    assert len(actor.bodies) == 15  # the first is the warm-up
    assert point.output_tokens == 14  # by the server's own count, of the two whole answers alone
    assert point.prompt_tokens == 10
    assert point.reasons["HTTP 503: draining"] == 2
    for reason in point.reasons:
        assert any(reason.startswith(wanted) for _, wanted in FAULTS.values()), reason
    for name, (_, wanted) in FAULTS.items():
        assert any(reason.startswith(wanted) for reason in point.reasons), name


def test_so_many_are_in_flight_as_asked() -> None:
    with acting(lambda number, body: [head(200), token(), 0.2, counted(2), DONE]) as (url, actor):
        points = load_test.measure(url, "m", concurrencies="1,3", requests=6)
        assert actor.most == 3
    assert [(point.concurrency, point.requests, point.errors) for point in points] == [(1, 6, 0), (3, 6, 0)]
    assert all((point.tpot_ms.p50 or 0) >= 50 for point in points)  # of the 200 between the only two tokens


def test_arrivals_do_not_wait_for_answers() -> None:
    with acting(lambda number, body: [head(200), token(), 0.3, counted(2), DONE]) as (url, actor):
        (free,) = load_test.measure(url, "m", rates="100", requests=12)
        assert actor.most == 12
        assert (free.rate, free.concurrency, free.errors) == (100.0, 0, 0)
        actor.most = 0
        (bound,) = load_test.measure(url, "m", rates="100", concurrencies="4", requests=12)
        assert actor.most == 4
    assert (bound.ttft_ms.p99 or 0) > 500  # the time in line counts: two answers of 0.3 s were ahead


def test_what_is_sent() -> None:
    with acting(lambda number, body: PLAIN) as (url, actor):
        load_test.measure(url, "m", requests=3, prompt_tokens=9, output_tokens=4, key="secret")
    assert actor.bodies[0].keys() == {
        "model", "prompt", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos",
    }  # fmt: skip
    prompts = {tuple(body["prompt"]) for body in actor.bodies}
    assert len(prompts) == 4  # none is another's
    assert {len(prompt) for prompt in prompts} == {9}
    assert {(body["max_tokens"], body["model"]) for body in actor.bodies} == {(4, "m")}
    assert all("POST /v1/completions " in top and "Bearer secret" in top for top in actor.heads)


def test_a_server_is_asked_as_simply_as_it_needs() -> None:
    """One that knows neither `ignore_eos` nor token ids, and does not count tokens."""

    def answer(number: int, body: dict[str, Any]) -> Script:
        if "ignore_eos" in body or not isinstance(body["prompt"], str):
            return [head(400, "application/json"), b'{"error": {"message": "unknown"}}']
        return [head(200), token(), token(), token(), DONE]

    with acting(answer) as (url, actor):
        (point,) = load_test.measure(f"{url}/v1/", "m", requests=2, prompt_tokens=6)
    assert (point.errors, point.output_tokens) == (0, 6)
    assert len(actor.bodies[-1]["prompt"].split()) == 6


def test_a_server_that_refuses_all_ways_says_why() -> None:
    refuse = [head(400, "application/json"), b'{"error": {"message": "no model m"}}']
    with acting(lambda number, body: refuse) as (url, _), pytest.raises(RunError, match="no model m"):
        load_test.measure(url, "m")
    with (
        acting(lambda number, body: [head(401, "text/plain"), b"who are you"]) as (url, _),
        pytest.raises(RunError, match="HTTP 401: who are you"),
    ):
        load_test.measure(url, "m")


# --- figures --------------------------------------------------------------------------------------------------------


def test_quantiles_and_rates_of_known_answers() -> None:
    answers = [Answer(0.1 * n, 0.1 * n + 0.9, 3, 10) for n in range(1, 6)] + [Answer(reason="HTTP 500: x")]
    point = Point.of(2, None, answers, 2.0)
    assert point.ttft_ms.p50 == pytest.approx(300)
    assert point.ttft_ms.p99 == pytest.approx(496)
    assert point.tpot_ms == Quantiles(pytest.approx(100), pytest.approx(100))
    assert (point.output_tokens_per_second, point.requests_per_second, point.errors) == (25.0, 2.5, 1)
    assert Point.of(1, None, [Answer(0.1, 0.1, 3, 1)], 1.0).tpot_ms == Quantiles(None, None)


def test_the_knee_is_where_more_load_buys_waiting() -> None:
    """A server that works at most four at a time: from there on tokens a second stay and latency grows."""

    def point(clients: int) -> Point:
        seconds = max(1.0, clients / 4)
        return Point.of(clients, None, [Answer(0.1, seconds, 1, 10)] * clients, seconds)

    assert load_test.knee([point(clients) for clients in (1, 2, 4, 8, 16)]).concurrency == 4


# --- the real server, and the command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    save_random("llama", folder, vocab_size=258, num_hidden_layers=2)
    add_tokenizer(folder)
    return folder


def test_against_the_real_server(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(driver: Driver) -> Counter[str]:
        await driver.ready.wait()
        app = Server(driver, Model("tiny", 258, 512)).app
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.02)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        args = ["bench", "serve", "--url", url, "--model", "tiny", "--concurrency", "1,3", "--requests", "5"]
        await asyncio.to_thread(main, [*args, "--prompt-tokens", "20", "--output-tokens", "6", "--json"])
        server.should_exit = True
        await serving
        return Counter()

    service.run(service.Served.load(folder, "dp=1", "float32", cache_tokens=1024), Settings(), work)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert found["ttft_ms"].keys() == found["tpot_ms"].keys() == {"p50", "p99"}
    assert [point["concurrency"] for point in found["points"]] == [1, 3]
    for point in found["points"]:
        assert (point["requests"], point["errors"]) == (5, 0)
        assert (point["prompt_tokens"], point["output_tokens"]) == (100, 30)
        assert 0 < point["ttft_ms"]["p50"] <= point["ttft_ms"]["p99"] <= point["latency_ms"]["p99"]
        assert point["tpot_ms"]["p50"] > 0
    assert found["output_tokens_per_second"] in [point["output_tokens_per_second"] for point in found["points"]]


def test_a_table_and_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    with acting(lambda number, body: FAULTS["busy"][0] if number == 3 else PLAIN) as (url, _):
        main(["bench", "serve", "--url", url, "--model", "m", "--concurrency", "1,2", "--requests", "4"])
        out = capsys.readouterr().out
        assert "knee: " in out
        assert "1 x HTTP 503: draining" in out
    with acting(lambda number, body: FAULTS["busy"][0]) as (url, _), pytest.raises(SystemExit) as stop:
        main(["bench", "serve", "--url", url, "--model", "m", "--json"])
    assert stop.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["requests"], told["errors"], told["ttft_ms"]["p50"]) == (8, 8, None)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"url": "localhost:8000"}, "--url"),
        ({"url": "http://127.0.0.1:99999"}, "--url"),
        ({"concurrencies": "1,x"}, "--concurrency"),
        ({"concurrencies": "0"}, "--concurrency"),
        ({"concurrencies": "1.5"}, "--concurrency"),
        ({"rates": "-1"}, "--rate"),
        ({"rates": "1", "concurrencies": "1,2"}, "--concurrency"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"requests": -1}, "--requests"),
        ({"timeout": 0.0}, "--timeout"),
        ({"url": "http://127.0.0.1:9"}, "--url"),
    ],
)
def test_mistakes_name_their_flag(given: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError) as error:
        load_test.measure(**({"url": "http://127.0.0.1:9", "model": "m", "concurrencies": "1"} | given))
    assert error.value.where.startswith(flag)
    assert error.value.fix


@pytest.mark.parametrize(("path", "key"), [("", "a\nb"), ("", "ключ"), ("/a b", ""), ("/ä", "")])
def test_what_http_can_not_carry_is_named(path: str, key: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as nobody,
        pytest.raises(InputError, match="HTTP can't carry it"),
    ):
        load_test.measure(f"http://127.0.0.1:{nobody.getsockname()[1]}{path}", "m", key=key, timeout=20)
