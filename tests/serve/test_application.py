"""The server's application and its driver in this process: limits, keys, sites, lost ranks, and who waits for whom."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from fiveply import service
from fiveply.corpus.tokenizer import Tokenizer
from fiveply.serve import messages
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.generation import Generation, Piece
from fiveply.serve.http import LONG_BODY, Limits, Model, Server
from fiveply.serve.messages import Sampling


def against(
    folder: Path, settings: Settings, limits: Limits, keys: list[str],
    test: Callable[[httpx2.AsyncClient, Driver], Awaitable[None]], cache_tokens: int = 0, origins: Sequence[str] = (),
    local: bool = False,
) -> None:  # fmt: skip
    async def work(driver: Driver) -> None:
        await driver.ready.wait()
        app = Server(driver, Model("m", 258, 512), keys, limits, origins, local).app
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://test", timeout=60
        ) as client:
            await test(client, driver)

    service.run(service.Served.load(folder, "pp=2", "float32", cache_tokens), settings, work)


def test_keys(speaking: Path) -> None:
    async def test(client: httpx2.AsyncClient, driver: Driver) -> None:
        for path in ("/v1/models", "/metrics", "/v1/completions"):
            for headers in (
                {},
                {"Authorization": "Bearer "},
                {"Authorization": "Bearer one "},
                {"Authorization": "Bearer onetwo"},
            ):
                answer = await client.request("POST" if "comp" in path else "GET", path, headers=headers, content=b"{")
                assert answer.status_code == 401
        for key in ("one", "two"):
            assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/")).status_code == 200

    against(speaking, Settings(), Limits(), ["one", "two"], test)


def test_pages_of_other_sites_are_refused(speaking: Path) -> None:
    """What a browser would send from them without asking first: a body of plain text."""

    async def test(client: httpx2.AsyncClient, driver: Driver) -> None:
        async def status(origin: str | None) -> int:
            headers = {"Content-Type": "text/plain"} | ({"Origin": origin} if origin is not None else {})
            body = b'{"prompt": "a", "max_tokens": 1}'
            return (await client.post("/v1/completions", headers=headers, content=body)).status_code

        assert [await status(one) for one in (None, "http://test", "https://test", "https://a.example")] == [200] * 4
        others = [
            "http://b.example",
            "http://test:81",
            "http://test.a.example",
            "http://a.example",
            "null",
            "test",
            "http://[",
        ]
        assert [await status(one) for one in others] == [403] * 7
        assert driver.metrics.requests._value.get() == 4
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, allowed in (("https://a.example", "https://a.example"), ("http://b.example", None)):
            answer = await client.options("/v1/completions", headers=asks | {"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed

    against(speaking, Settings(), Limits(), [], test, origins=["https://a.example"])


@pytest.mark.parametrize("keys", [[], ["one"]])
def test_other_names_of_a_loopback_address_are_refused(speaking: Path, keys: list[str]) -> None:
    """Of a page whose own name was made to lead here: nothing is another site to it, and only a key that it lacks helps."""

    async def test(client: httpx2.AsyncClient, driver: Driver) -> None:
        async def statuses(*hosts: str) -> list[int]:
            headers = {"Authorization": "Bearer one"}
            return [(await client.get("/v1/models", headers=headers | {"Host": host})).status_code for host in hosts]

        own = ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.1.2.3", "[::1]", "[::1]:8000", "a.example")
        assert await statuses(*own) == [200] * 7
        others = [
            "b.example",
            "localhost.b.example:80",
            "127.0.0.1.b.example",
            "192.168.0.1",
            "0.0.0.0",
            "[",
            ":80",
            "a",
        ]
        assert await statuses(*others) == [200 if keys else 403] * 8
        same = await client.get("/v1/models", headers={"Host": "b.example", "Origin": "http://b.example"})
        assert same.status_code == (401 if keys else 403)

    against(speaking, Settings(), Limits(), keys, test, origins=["https://a.example"], local=True)


def test_too_much_is_refused_with_a_time_to_come_back(speaking: Path) -> None:
    async def test(client: httpx2.AsyncClient, driver: Driver) -> None:
        body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(12)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert [answer.status_code for answer in answers].count(200) == 12 - len(refused)
        assert len(refused) >= 5
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert (await client.post("/v1/completions", json=body)).status_code == 200

    against(speaking, Settings(most_running=2, most_waiting=3), Limits(), [], test)


def test_what_the_cache_can_not_hold_is_refused(speaking: Path) -> None:
    async def test(client: httpx2.AsyncClient, driver: Driver) -> None:
        answer = await client.post("/v1/completions", json={"prompt": "a" * 50, "max_tokens": 40})
        assert answer.status_code == 400
        assert "exceed the cache's 64 tokens" in answer.json()["error"]["message"]
        assert (await client.post("/v1/completions", json={"prompt": "a" * 30, "max_tokens": 30})).status_code == 200

    against(speaking, Settings(), Limits(), [], test, cache_tokens=64)


def test_a_stuck_rank_is_lost_ended_and_replaced(speaking: Path) -> None:
    async def work(driver: Driver) -> tuple[str, list[int], list[int]]:
        await driver.ready.wait()
        whole = [t async for piece in driver.submit([5, 6], 200, Sampling()).pieces() for t in piece.tokens]
        generation = driver.submit([5, 6], 200, Sampling())
        pieces = generation.pieces()
        tokens = [t for _ in range(3) for t in (await anext(pieces)).tokens]
        os.kill(driver.pids[0], signal.SIGSTOP)
        while driver.state == "ready":
            await asyncio.sleep(0.05)
        problem = driver.problem
        tokens += [t async for piece in pieces for t in piece.tokens]
        return problem, tokens, whole

    served = service.Served.load(speaking, "pp=2", "float32")
    problem, tokens, whole = service.run(served, Settings(silence_seconds=2.5), work, restarts=True)
    assert re.fullmatch(r"rank [01] has been silent for 2.5 s", problem)
    assert tokens == whole


def test_the_driver_stands_still_while_ranks_are_forked(speaking: Path) -> None:
    """Else an import in its thread and the fork wait for each other, now and then (`service._Loop.still`)."""
    turns, moved = [0], list[int]()

    def before_a_fork() -> None:
        if len(moved) < 4:
            begun = turns[0]
            time.sleep(0.05)
            moved.append(turns[0] - begun)

    async def work(driver: Driver) -> int:
        for _ in range(2):  # also while a lost engine's ranks are replaced, below
            while driver.state != "ready":
                turns[0] += 1
                await asyncio.sleep(0)
            if driver.engines == 1:
                os.kill(driver.pids[0], signal.SIGKILL)
                while driver.state == "ready":
                    await asyncio.sleep(0.01)
        return driver.engines

    os.register_at_fork(before=before_a_fork)
    assert service.run(service.Served.load(speaking, "pp=2", "float32"), Settings(), work, restarts=True) == 2
    assert moved == [0, 0, 0, 0]
    assert turns[0] > 100


def test_strangers_at_the_ranks_door_are_turned_away(speaking: Path) -> None:
    async def work(driver: Driver) -> list[bytes]:
        server, host, port = await driver.listen()  # another door of the same house
        await driver.ready.wait()
        answers = []
        for said in (
            b"GET / HTTP/1.1\r\n\r\n",
            messages.pack(messages.Hello(0, 1, "a guess")),
            messages.pack(messages.Hello(0, 1, driver.secret)),  # that rank is here already
            messages.pack(messages.Heartbeat(0)),
            b"\x05\0\0\0\xc1",
        ):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(said + messages.pack(messages.Ready(5)))
            answers.append(await asyncio.wait_for(reader.read(), 5))
            writer.close()
        server.close()
        assert driver.state == "ready"
        await _collect(driver.submit([5], 3, Sampling()))
        return answers

    async def _collect(generation: Generation) -> list[Piece]:
        return [piece async for piece in generation.pieces()]

    assert service.run(service.Served.load(speaking, "pp=2", "float32"), Settings(), work) == [b""] * 5


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings"])
def test_answers_go_on_while_a_long_text_is_encoded(speaking: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The tokenizer waits for the answer beside it: on the driver's loop they would wait for each other."""
    encode, begun, seen = Tokenizer.encode_aside, threading.Event(), threading.Event()
    waited: list[bool] = []

    def slow(self: Tokenizer, text: str) -> Any:
        begun.set()
        waited.append(seen.wait(20))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode_aside", slow)
    text = "a" * LONG_BODY
    body = {"completions": {"prompt": text}, "embeddings": {"input": text}}.get(
        path, {"messages": [{"role": "user", "content": text}]}
    )

    async def test(client: httpx2.AsyncClient, driver: Driver) -> None:
        pieces = driver.submit([5], 400, Sampling()).pieces()
        asking = asyncio.create_task(client.post(f"/v1/{path}", json=body))
        await asyncio.to_thread(begun.wait, 20)
        for _ in range(3):
            await anext(pieces)
        seen.set()
        answer = await asking
        assert (answer.status_code, waited) == (400, [True])
        assert "exceed the model's 512 positions" in answer.json()["error"]["message"]

    against(speaking, Settings(), Limits(), [], test)


def test_idle_connections_are_kept_but_not_beyond_the_end(speaking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as proxies keep theirs; the end waits for none."""
    servers: list[uvicorn.Server] = []

    class Watched(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Watched)

    async def work(driver: Driver) -> None:
        await driver.ready.wait()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            running = asyncio.create_task(Server(driver, Model("m", 258, 512)).run(listener, lambda: None))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"ready")
            (connection,) = servers[0].server_state.connections
            timer = connection.timeout_keep_alive_task  # type: ignore[union-attr]
            assert timer.when() - asyncio.get_running_loop().time() > 60
            driver.stop_asked.set()
            assert await asyncio.wait_for(reader.read(), 30) == b'"}'
            await asyncio.wait_for(running, 30)
            writer.close()

    service.run(service.Served.load(speaking, "pp=2", "float32"), Settings(), work)
