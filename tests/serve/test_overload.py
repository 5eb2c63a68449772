"""Load far beyond capacity, with everything that clients do wrong: nothing crashes, leaks or is mixed up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest
import uvicorn
from random_models import add_tokenizer, save_random

from fiveply import service
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.http import Limits, Model, Server

CLIENTS = 32
"""Four times what runs and waits."""
EACH = 3
MODEL = Model("m", 258, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "hf"
    save_random("llama", folder, vocab_size=258, num_hidden_layers=2)
    add_tokenizer(folder)
    return folder


def body(index: int) -> dict[str, object]:
    """Prompts that share beginnings; each index has one right answer."""
    return {"prompt": "ahoy " * (index % 9) + str(index % 13), "max_tokens": 5 + index % 40, "temperature": 1.0,
            "seed": index, "ignore_eos": True}  # fmt: skip


async def client(
    http: httpx2.AsyncClient, address: tuple[str, int], number: int, answers: dict[int, str]
) -> Counter[str]:
    """One client: mostly right, often rude."""
    draw, seen = random.Random(number), Counter[str]()
    for turn in range(EACH):
        index = number * EACH + turn
        kind = draw.choices(
            ["whole", "stream", "leave", "slow", "garbage", "oversize", "hangup"], [6, 4, 3, 1, 1, 1, 1]
        )[0]
        if kind == "garbage":
            answer = await http.post("/v1/completions", content=b'{"prompt": "a", ' + draw.randbytes(20))
            assert answer.status_code == 400
        elif kind == "oversize":
            answer = await http.post("/v1/completions", content=b" " * 70_000)
            assert answer.status_code == 413
        elif kind == "hangup":  # half a request
            _, writer = await asyncio.open_connection(*address)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{")
            await writer.drain()
            writer.close()
        else:
            ask = whole if kind == "whole" else stream
            while (answer := await ask(http, index, kind, draw, answers)) == 429:
                seen["refused"] += 1
                await asyncio.sleep(0.5 * draw.random())
        seen[kind] += 1
    return seen


async def whole(
    http: httpx2.AsyncClient, index: int, kind: str, draw: random.Random, answers: dict[int, str]
) -> int:  # fmt: skip
    answer = await http.post("/v1/completions", json=body(index))
    if answer.status_code == 200:
        answers[index] = answer.json()["choices"][0]["text"]
    else:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    return answer.status_code


async def stream(
    http: httpx2.AsyncClient, index: int, kind: str, draw: random.Random, answers: dict[int, str]
) -> int:  # fmt: skip
    told, ended, left = "", False, draw.randrange(1, 6)
    async with http.stream("POST", "/v1/completions", json=body(index) | {"stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                told += json.loads(line[6:])["choices"][0]["text"]
            ended = ended or line == "data: [DONE]"
            left -= 1
            if kind == "leave" and not left:
                return 200
            if kind == "slow":
                await asyncio.sleep(0.05)
    assert ended
    answers[index] = told
    return 200


@pytest.mark.parametrize("layout", [pytest.param("dp=2,pp=2", marks=pytest.mark.slow), "pp=2"])
def test_load(folder: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(driver: Driver) -> None:
        await driver.ready.wait()
        schedulers = [replica.scheduler for replica in driver.replicas if replica.scheduler]
        server = uvicorn.Server(
            uvicorn.Config(
                Server(driver, MODEL, limits=Limits(body_bytes=60_000)).app, port=0, log_level="warning", lifespan="off"
            )
        )
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.02)
        address = server.servers[0].sockets[0].getsockname()[:2]
        answers: dict[int, str] = {}
        pool = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=f"http://{address[0]}:{address[1]}", timeout=120, limits=pool) as http:
            start = time.perf_counter()
            seen = await asyncio.gather(*(client(http, address, number, answers) for number in range(CLIENTS)))
            seconds = time.perf_counter() - start
            while driver.generations:  # of those that left
                await asyncio.sleep(0.02)
            assert [scheduler.pool.free for scheduler in schedulers] == [
                scheduler.pool.total for scheduler in schedulers
            ]
            assert all(scheduler.idle for scheduler in schedulers)
            # Alone, each index gets the same answer.
            for index in sorted(answers)[:: max(1, len(answers) // 25)]:
                alone = await http.post("/v1/completions", json=body(index))
                assert alone.json()["choices"][0]["text"] == answers[index]
            assert (await http.get("/health")).status_code == 200
        server.should_exit = True
        await serving
        total = sum(seen, Counter())
        assert sum(total.values()) - total["refused"] == CLIENTS * EACH
        assert len(answers) >= total["whole"] + total["stream"] + total["slow"]
        assert min(total[kind] for kind in ("leave", "slow", "garbage", "oversize", "hangup", "refused")) > 0
        preemptions = sum(scheduler.preemptions for scheduler in schedulers)
        with capsys.disabled():
            print(f"\n{layout}: {dict(total)} in {seconds:.1f} s, {preemptions} preemptions")

    served = service.Served.load(folder, layout, "float64", cache_tokens=160)
    service.run(served, Settings(most_running=4, most_waiting=4, step_tokens=24), work)
