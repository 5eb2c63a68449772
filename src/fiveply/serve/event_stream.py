"""Answers to clients that may leave: server-sent events until they end, work given up when nobody waits, answers side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fiveply.serve.generation import Generation, Piece
from fiveply.spec.errors import RunError

Value = TypeVar("Value")


class Gone(Exception):  # noqa: N818
    """The client has disconnected."""


class EventStream(Response):
    """Server-sent events, until they end, or the client goes away or stops reading."""

    def __init__(self, events: AsyncGenerator[bytes], write_seconds: float) -> None:
        super().__init__(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events, self._write_seconds = events, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            written, _ = await asyncio.gather(writing, leaving, return_exceptions=True)
        if isinstance(written, Exception) and not isinstance(written, TimeoutError):
            raise written

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                async with asyncio.timeout(self._write_seconds):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: asyncio.Future[Value]) -> Value:
    """What `work` gives; raises Gone, and cancels it, when the client disconnects before."""
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        return work.result()
    finally:
        leaving.cancel()
        work.cancel()


async def together(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come."""
    if len(generations) == 1:
        async for piece in generations[0].pieces():
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def follow(index: int, generation: Generation) -> None:
        try:
            async for piece in generation.pieces():
                queue.put_nowait((index, piece))
            queue.put_nowait(None)
        except RunError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(follow(index, one)) for index, one in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            told = await queue.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                left -= 1
            else:
                yield told
    finally:
        for task in tasks:
            task.cancel()
