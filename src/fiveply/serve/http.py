"""The server: OpenAI's paths over a driver, with limits, keys, and an end that lets answers finish.

Notable: whoever disconnects is no longer worked for, streaming or not. What is too much is refused at once and says when to
try again. `/health` and `/v1/models` fail as soon as a rank is lost.

It knows no ranks; what requests and answers look like is `protocol.py`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from fiveply.serve import protocol
from fiveply.serve.driver import Driver, EngineLost, Overloaded
from fiveply.serve.event_stream import EventStream, Gone, Value, together, unless_gone
from fiveply.serve.generation import Generation, GrammarFailed, Piece
from fiveply.serve.messages import Sampling, Score
from fiveply.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, RequestError, StreamOptions
from fiveply.serve.tools import CallReader
from fiveply.spec.errors import RunError

LONG_BODY = 32_768  # bytes that take a tokenizer longer than a step


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request, and of the end."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    answers: int = 128
    """Prompts x n."""
    write_seconds: float = 60.0
    """Until a client that does not read is given up."""
    idle_seconds: int = 75
    """Until a connection without a request is closed: longer than clients and proxies keep one for its next request (httpx 5 s,
    nginx and load balancers 60 s), or they send it just as the connection closes."""
    drain_seconds: float = 30.0
    """For answers to finish once an end is asked for."""


@dataclass(frozen=True)
class Model:
    """What requests are checked against."""

    name: str
    vocabulary: int
    positions: int


class Server:
    """An ASGI application over `driver`. `keys`: any of them admits to /v1 and /metrics; none: everyone. `origins`: other sites
    whose pages may ask, as https://a.example. `local`: only this machine is meant, and no name but its own and those sites'."""

    def __init__(
        self, driver: Driver, model: Model, keys: Sequence[str] = (), limits: Limits | None = None,
        origins: Sequence[str] = (), local: bool = False,
    ) -> None:  # fmt: skip
        self.driver, self.model, self.limits = driver, model, limits or Limits()
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._origins, self._local, self._started = origins, local and not keys, int(time.time())
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._guarded(self._metrics)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/embeddings", self._guarded(self._embeddings), methods=["POST"]),
            ]
        )
        if origins:
            self.app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    async def run(self, listener: socket.socket, ready: Callable[[], None]) -> None:
        """Until an end is asked for; `ready` is called when the first engine is."""
        config = uvicorn.Config(
            self.app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5,
            timeout_keep_alive=self.limits.idle_seconds,
        )  # fmt: skip
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        announcing = asyncio.create_task(self._announce(ready))
        try:
            await self.driver.stop_asked.wait()
            end = time.monotonic() + self.limits.drain_seconds
            while self.driver.generations and self.driver.state != "stopped" and time.monotonic() < end:
                await asyncio.sleep(0.05)
            self.driver.stop()
        finally:
            announcing.cancel()
            server.should_exit = True
            await serving
        if self.driver.problem:
            raise EngineLost(self.driver.problem)

    async def _announce(self, ready: Callable[[], None]) -> None:
        await self.driver.ready.wait()
        ready()

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Sites and keys before anything else; mistakes and refusals as answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_site(request)
                self._check_key(request)
                return await handler(request)
            except RequestError as error:
                return _json(error.body(), error.status)
            except Overloaded as error:
                refusal = RequestError(str(error), status=429, kind="rate_limit_error")
                return _json(refusal.body(), 429, {"Retry-After": str(error.seconds)})
            except RunError as error:
                status = 503 if isinstance(error, EngineLost) else 500
                return _json(RequestError(str(error), status=status, kind="server_error").body(), status)
            except (Gone, ClientDisconnect):
                return Response(status_code=499)  # nobody reads it

        return guarded

    def _check_site(self, request: Request) -> None:
        """Browsers send a page's site with what it asks of another one, and a loopback address is as near to them as any. A site
        whose own name leads here (DNS rebinding) is no other one to them: the name that was asked for tells it."""
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        own = (origin or "").partition("://")[2] == host
        if origin and not own and origin not in self._origins:
            reason = f"a page of {origin} may not ask here; --origins admits it"
        elif self._local and not (_is_loopback(host) or any(one.endswith(f"://{host}") for one in self._origins)):
            reason = f"'{host}' is not this machine's name alone, as localhost is; --origins http://{host} admits it"
        else:
            return
        raise RequestError(reason, status=403, kind="permission_error")

    def _check_key(self, request: Request) -> None:
        if not self._keys:
            return
        given = hashlib.sha256(request.headers.get("authorization", "").removeprefix("Bearer ").encode()).digest()
        # All of them, whichever fits: the time tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise RequestError("give an API key: Authorization: Bearer KEY", status=401, kind="authentication_error")

    # --- what is not an answer ---

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(resources.files("fiveply.serve").joinpath("chat.html").read_text(encoding="utf-8"))

    async def _health(self, request: Request) -> Response:
        driver = self.driver
        body: dict[str, Any] = {"status": "draining" if driver.stop_asked.is_set() else driver.state}
        if driver.problem:
            body["problem"] = driver.problem
        return _json(msgspec.json.encode(body), 200 if body["status"] == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.driver.metrics.page(self.driver), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        if self.driver.state != "ready":
            raise EngineLost(self.driver.problem or f"the engine is {self.driver.state}")
        entry = {"id": self.model.name, "object": "model", "created": self._started, "owned_by": "fiveply",
                 "max_model_len": self.model.positions, "chat": self.driver.text.chat is not None}  # fmt: skip
        return _json(msgspec.json.encode({"object": "list", "data": [entry]}))

    # --- answers ---

    async def _completions(self, request: Request) -> Response:
        asked: CompletionRequest
        asked, long = await self._read(request, CompletionRequest)
        text, count = self.driver.text, asked.n or 1
        prompts = await self._tokens(asked.prompt, "prompt", long)
        max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
        if max_tokens == 0 and not asked.echo:
            raise RequestError("0 tokens without echo ask for nothing", "max_tokens")
        sampling = await self._sampling(asked, -1 if asked.logprobs is None else asked.logprobs)
        scores = asked.echo and asked.logprobs is not None
        generations = self._submit(prompts, count, max_tokens, sampling, asked, scores=scores)
        given, offsets = protocol.separate(asked.prompt, "prompt"), [0] * len(generations)

        def echoed(index: int) -> str:
            one = given[index // count]
            return one if isinstance(one, str) else text.whole(one)

        def choice(index: int, pieces: Sequence[Piece], first: bool = True) -> dict[str, Any]:
            echo, logprobs = asked.echo and first, None
            if asked.logprobs is not None:
                tokens, found = _flat(pieces)
                if echo:
                    tokens = prompts[index // count] + tokens
                    found = [None, *generations[index].prompt_scores, *found]
                logprobs = protocol.completion_logprobs(text, tokens, found, offsets[index])
                offsets[index] += sum(map(len, logprobs["tokens"]))
            words = (echoed(index) if echo else "") + "".join(piece.text for piece in pieces)
            return {"index": index, "text": words, "logprobs": logprobs, "finish_reason": pieces[-1].finish or None}

        return await self._answer(request, asked, generations, "text_completion", "text_completion", choice)

    async def _chat(self, request: Request) -> Response:
        asked: ChatRequest
        asked, long = await self._read(request, ChatRequest)
        text = self.driver.text
        tools = asked.offered(text)
        prompt = await _beside(long, asked.prompt, text, tools, long)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError("needs logprobs", "top_logprobs")
        room = min(self.model.positions, self.driver.capacity or self.model.positions) - len(prompt)
        max_tokens = asked.max_completion_tokens or asked.max_tokens or max(1, room)
        sampling = await self._sampling(asked, (asked.top_logprobs or 0) if asked.logprobs else -1)
        generations = self._submit([prompt], asked.n or 1, max_tokens, sampling, asked)
        readers = [CallReader(bool(tools)) for _ in generations]

        def read(index: int, pieces: Sequence[Piece]) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
            """Content and calls of an answer, or of a part, and what both forms have in common."""
            finish, reader = pieces[-1].finish, readers[index]
            content, calls = reader.add("".join(piece.text for piece in pieces), last=bool(finish))
            tokens, scores = _flat(pieces)
            found = [score for score in scores if score]
            logprobs = protocol.chat_logprobs(text, tokens, found) if asked.logprobs else None
            reason = "tool_calls" if reader.calls and finish == "stop" else finish or None
            return content, calls, {"index": index, "logprobs": logprobs, "finish_reason": reason}

        def whole(index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
            content, calls, common = read(index, pieces)
            message = {"content": content or None, "tool_calls": calls} if calls else {"content": content}
            return common | {"message": {"role": "assistant"} | message}

        def part(index: int, pieces: Sequence[Piece], first: bool) -> dict[str, Any]:
            content, calls, common = read(index, pieces)
            delta: dict[str, Any] = {"content": content} | ({"role": "assistant"} if first else {})
            if calls:
                before = readers[index].calls - len(calls)
                delta["tool_calls"] = [{"index": before + n} | call for n, call in enumerate(calls)]
            return common | {"delta": delta}

        return await self._answer(request, asked, generations, "chat.completion", "chat.completion.chunk", whole, part)

    async def _embeddings(self, request: Request) -> Response:
        asked: EmbeddingRequest
        asked, long = await self._read(request, EmbeddingRequest)
        self._check_model(asked.model)
        prompts = await self._tokens(asked.input, "input", long)
        self._check_sizes(prompts, 0, len(prompts), "input")
        generations = [self.driver.submit(prompt, 0, Sampling(), embeds=True) for prompt in prompts]
        async with self._cancelling(generations):
            await unless_gone(request, asyncio.gather(*map(_collect, generations)))
        tokens = sum(map(len, prompts))
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": protocol.embedding(one.embedding, asked.encoding_format),
            }
            for index, one in enumerate(generations)
        ]
        total = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json(msgspec.json.encode({"object": "list", "data": data, "model": self.model.name, "usage": total}))

    async def _read(self, request: Request, kind: type[Any]) -> tuple[Any, bool]:
        """The body, within its limits, as a request, and whether it is a long one; refused once an end is asked for."""
        if self.driver.stop_asked.is_set():
            raise EngineLost("the server is shutting down")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.body_bytes:
                        raise RequestError(f"the body exceeds {self.limits.body_bytes} bytes", status=413)
        except TimeoutError:
            raise RequestError(f"the body did not arrive within {self.limits.body_seconds:g} s", status=408) from None
        return protocol.read(bytes(body), kind), len(body) > LONG_BODY

    async def _tokens(self, given: protocol.Prompts, param: str, long: bool) -> list[list[int]]:
        """Of the prompts."""
        self._check_answers(len(protocol.separate(given, param)), param)
        return await _beside(long, protocol.prompts_of, given, self.driver.text, self.model.vocabulary, param, long)

    async def _sampling(self, asked: CompletionRequest | ChatRequest, top_logprobs: int) -> Sampling:
        return await _beside(
            bool(asked.constraint), asked.sampling, top_logprobs, self.model.vocabulary, self.driver.text
        )

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.model.name):
            raise RequestError(f"the model '{name}' is not served here; '{self.model.name}' is", "model", 404)

    def _check_answers(self, answers: int, param: str) -> None:
        if answers > self.limits.answers:
            raise RequestError(f"{answers} answers in one request; at most {self.limits.answers}", param)

    def _check_sizes(self, prompts: list[list[int]], max_tokens: int, answers: int, param: str) -> None:
        self._check_answers(answers, param)
        longest = max(map(len, prompts))
        if longest + max_tokens > self.model.positions:
            raise RequestError(
                f"{longest} tokens + max_tokens {max_tokens} exceed the model's {self.model.positions} positions", param
            )

    def _submit(
        self, prompts: list[list[int]], count: int, max_tokens: int, sampling: Sampling,
        asked: CompletionRequest | ChatRequest, *, scores: bool = False,
    ) -> list[Generation]:  # fmt: skip
        """All of a request's answers, or none."""
        self._check_model(asked.model)
        self._check_sizes(
            prompts, max_tokens, count * len(prompts), "prompt" if scores or prompts[1:] else "max_tokens"
        )
        ends = frozenset[int]() if asked.ignore_eos else self.driver.text.ends
        generations: list[Generation] = []
        try:
            for prompt in prompts:
                for index in range(count):
                    own = protocol.alternative(sampling, index)
                    generations.append(
                        self.driver.submit(list(prompt), max_tokens, own, ends=ends, stops=asked.stops, scores=scores)
                    )
        except BaseException as error:
            for generation in generations:
                self.driver.cancel(generation)
            if isinstance(error, ValueError):
                raise RequestError(str(error), "max_tokens") from None
            raise
        return generations

    async def _answer(
        self, request: Request, asked: CompletionRequest | ChatRequest, generations: list[Generation], kind: str,
        chunk_kind: str, whole: Callable[..., dict[str, Any]], part: Callable[..., dict[str, Any]] | None = None,
    ) -> Response:  # fmt: skip
        """One body, or a stream of events."""

        def used() -> dict[str, Any]:
            distinct = generations[:: asked.n or 1]
            return protocol.usage(
                sum(one.request.prompt for one in distinct),
                sum(len(one.request.tokens) - one.request.prompt for one in generations),
                sum(one.request.reused for one in distinct),
            )

        if not asked.stream:
            async with self._cancelling(generations):
                try:
                    pieces = await unless_gone(request, asyncio.gather(*map(_collect, generations)))
                except GrammarFailed as error:
                    raise RequestError(str(error), asked.constraint) from None
            choices = [whole(index, one) for index, one in enumerate(pieces)]
            body = protocol.head(kind, self.model.name) | {"choices": choices, "usage": used()}
            return _json(msgspec.json.encode(body))

        async def events() -> AsyncGenerator[bytes]:
            top, seen = protocol.head(chunk_kind, self.model.name), set[int]()
            options = asked.stream_options or StreamOptions()
            counting, so_far = options.include_usage, options.continuous_usage_stats
            async with self._cancelling(generations):
                try:
                    async with aclosing(together(generations)) as pieces:
                        async for index, piece in pieces:
                            if piece.text or piece.finish or piece.scores or index not in seen:
                                choice = (part or whole)(index, [piece], index not in seen)
                                seen.add(index)
                                usage = {"usage": used() if so_far else None} if counting else {}
                                yield protocol.event(top | {"choices": [choice]} | usage)
                except GrammarFailed as error:
                    yield b"data: " + RequestError(str(error), asked.constraint).body() + b"\n\n"
                except RunError as error:
                    yield b"data: " + RequestError(str(error), kind="server_error").body() + b"\n\n"
                else:
                    if counting:
                        yield protocol.event(top | {"choices": [], "usage": used()})
            yield protocol.event("[DONE]")

        return EventStream(events(), self.limits.write_seconds)

    @asynccontextmanager
    async def _cancelling(self, generations: Sequence[Generation]) -> AsyncIterator[None]:
        """Whatever has not ended by then is not worked on any more."""
        try:
            yield
        finally:
            for generation in generations:
                self.driver.cancel(generation)


async def _beside(aside: bool, work: Callable[..., Value], *arguments: Any) -> Value:
    """What `work` gives; `aside`: it takes longer than a step, so it runs in a thread and nobody waits for it."""
    return await asyncio.to_thread(work, *arguments) if aside else work(*arguments)


async def _collect(generation: Generation) -> list[Piece]:
    return [piece async for piece in generation.pieces()]


def _flat(pieces: Sequence[Piece]) -> tuple[list[int], list[Score | None]]:
    return [token for piece in pieces for token in piece.tokens], [score for piece in pieces for score in piece.scores]


def _is_loopback(host: str) -> bool:
    """Of a Host header: a name and perhaps a port."""
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    return False


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")
