"""Starts a driver and its ranks, keeps them running, and ends both: the way that serving and generating share.

Notable: this process's main thread starts the ranks and waits for them (it takes signals), a second thread is the driver's
loop. When a rank is lost the others are ended, and new ones are started while the driver keeps its clients; that is tried
again as long as an engine has been ready in between.

It knows neither HTTP nor prompts: `work` is what is to be done with the driver.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Generic, TypeVar

import tokenizers
import torch

from fiveply.checkpoint.huggingface import HuggingFaceSource
from fiveply.corpus.chat import ChatTemplate
from fiveply.corpus.tokenizer import Tokenizer, read_object
from fiveply.engine import kernels, worker
from fiveply.engine.weights import Source, open_source
from fiveply.plan import serving
from fiveply.plan.inference import Load
from fiveply.plan.serving import Bound
from fiveply.report import serving_text
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.http import Model, Server
from fiveply.serve.text import Text
from fiveply.spec.architecture import ModelSpec
from fiveply.spec.errors import FiveplyError, InputError, RunError
from fiveply.spec.layout import Layout
from fiveply.spec.legality import check_groups, resolve_for_inference
from fiveply.train import auto
from fiveply.world import device
from fiveply.world.launch import joined, launch, stop_requested
from fiveply.world.mesh import Transport

Result = TypeVar("Result")

COLLECTIVE_SECONDS = 120.0  # until ranks that wait for another give up
STUCK_SECONDS = 3.0  # after a loss, until ranks that have not ended by themselves are killed
PAUSE_SECONDS = 1.0  # before new ranks are started
LENGTH = 256  # tokens of a prompt and of an answer that `auto` plans for
TTFT_SECONDS, TPOT_SECONDS = 1.0, 0.1  # a reader's patience: what `auto` keeps to where it can


@dataclass(frozen=True)
class Served:
    """A model, how it is split, and what its directory says of text."""

    path: Path
    spec: ModelSpec
    text: Text
    layout: Layout
    dtype: str
    cache_tokens: int = 0
    transport: Transport = "auto"
    quantize: str = "none"

    @classmethod
    def load(
        cls, path: str | Path, layout: str = "dp=1", dtype: str = "auto", cache_tokens: int = 0,
        transport: Transport = "auto", quantize: str = "none",
    ) -> Served:  # fmt: skip
        """`layout`: "auto" plans for this machine's devices. Raises InputError for what can't be served, before anything is
        started."""
        asked = Layout() if layout == auto.AUTO else Layout.parse(layout, "--layout")
        source = open_source(Path(path))
        if dtype == "auto":
            dtype = "bfloat16" if device.find().fast_bf16 else "float32"
        if layout == auto.AUTO:
            asked = planned(source.spec, dtype)
        resolved = resolve_for_inference(asked, source.spec, "--layout")
        if quantize == "int4":
            check_groups(resolved, source.spec, "--quantize int4")
        return cls(source.path, source.spec, text_of(source), resolved, dtype, cache_tokens, transport, quantize)


def planned(spec: ModelSpec, dtype: str) -> Layout:
    """The layout that answers most here with prompts and answers of ordinary length; one line says why."""
    half, devices = spec.positions // 2, auto.cluster()
    load, bound = Load(min(LENGTH, half), min(LENGTH, half)), Bound(TTFT_SECONDS, TPOT_SECONDS)
    found = serving.answer(
        spec, devices, load, bound, precision=auto.precision(getattr(torch, dtype)), places=Settings().most_running,
        runnable=True,
    )  # fmt: skip
    ranked = found.ranked or found.least  # beyond the bound, the quickest
    lines = [serving_text.line(one) for one in ranked[:2]]
    print(f"fiveply: planned for {devices}: {'; next '.join(lines)}", file=sys.stderr, flush=True)
    return ranked[0].layout


def run(
    served: Served, settings: Settings, work: Callable[[Driver], Coroutine[Any, Any, Result]], *, apart: bool = False,
    restarts: bool = False,
) -> Result:  # fmt: skip
    """What `work` returns, done while the ranks run. `apart`: a single rank too gets a process of its own.

    `restarts`: start lost ranks again. Raises what `work` raises, or why there are no ranks.
    """
    if joined():
        raise InputError("torchrun or Slurm has started this process as one of several", where="launch",
                         fix="start it once, by itself: it starts its ranks")  # fmt: skip
    if device.find().kind == "cpu":
        kernels.prepare(getattr(torch, served.dtype), served.quantize)  # once, before there are ranks that need it
    loop = _Loop(served, settings, work)
    host, port, secret = loop.start()
    job = worker.Job(
        served.path, served.layout, served.dtype, host, port, secret, served.cache_tokens, served.transport,
        tuple(sorted(served.text.ends)), served.quantize,
    )  # fmt: skip
    problem: FiveplyError | None = None
    while problem is None and loop.working:
        engines = loop.driver.engines
        try:
            launch(worker.work, served.layout.world, job, timeout_seconds=COLLECTIVE_SECONDS, apart=apart,
                   others_still=loop.still())  # fmt: skip
            break  # the driver sent the ranks home
        except FiveplyError as error:
            if not loop.working or stop_requested():
                loop.tell(loop.driver.stop, str(error))  # no engine will come for what it still has
                break
            loop.tell(loop.driver.lost, str(error))
            if restarts and isinstance(error, RunError) and loop.driver.engines > engines:
                print(f"fiveply: {error}; starting again", file=sys.stderr, flush=True)
                time.sleep(PAUSE_SECONDS)
                loop.tell(loop.driver.starting)
            else:
                problem = error
    if problem is not None:
        loop.tell(loop.driver.stop, str(problem))
    try:
        return loop.result()
    except Exception as error:
        raise problem or error from None


def serve(
    served: Served, settings: Settings, *, name: str, host: str = "127.0.0.1", port: int = 8000,
    keys: Path | None = None, origins: Sequence[str] = (),
) -> None:  # fmt: skip
    """The verb: until Ctrl-C or SIGTERM. `keys`: a file with an API key on each line. `origins`: as `Server` has them. Raises as
    `run`."""
    for origin in origins:
        if not re.fullmatch(r"https?://[^/*]+", origin):
            raise InputError(f"'{origin}' is no site", where="--origins", fix="give it as https://a.example")
    try:
        admitted = (
            [line.strip() for line in keys.read_text(encoding="utf-8").splitlines() if line.strip()] if keys else []
        )
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read ({error})", where=str(keys), fix="give a file with a key on each line"
        ) from None
    if keys and not admitted:
        raise InputError("holds no key", where=str(keys), fix="write one on each line")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", "") or str(error)).partition(" (while")[0]
        raise InputError(
            f"no place to listen at ({why})", where=f"--host {host} --port {port}", fix="choose another"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    local = ip_address(listener.getsockname()[0]).is_loopback
    if not admitted and not local:
        print(f"fiveply: anyone who reaches {address} may use it; --api-keys FILE asks for a key", file=sys.stderr)
    model = Model(name, served.spec.vocabulary, served.spec.positions)

    async def work(driver: Driver) -> None:
        def ready() -> None:
            kept = served.dtype if served.quantize == "none" else f"{served.quantize} weights in {served.dtype}"
            holds = f"{served.layout}, {kept}, {driver.capacity:,} tokens of cache"
            print(f"fiveply: {model.name} is ready at {address} ({holds})", file=sys.stderr, flush=True)

        await Server(driver, model, admitted, origins=origins, local=local).run(listener, ready)

    # Long texts are encoded in threads; the package's own ones would be forked with the next ranks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with listener:
        run(served, settings, work, apart=True, restarts=True)


class _Loop(Generic[Result]):
    """The driver's thread."""

    def __init__(
        self, served: Served, settings: Settings, work: Callable[[Driver], Coroutine[Any, Any, Result]]
    ) -> None:
        self._work = work
        self._made: Future[tuple[str, int, str]] = Future()
        self._result: Future[Result] = Future()
        self._served, self._settings = served, settings
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="driver", daemon=True)

    def start(self) -> tuple[str, int, str]:
        """Address and secret for the ranks."""
        self._thread.start()
        return self._made.result()

    @property
    def working(self) -> bool:
        return not self._result.done()

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Call it in the driver's loop, if that still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    @contextmanager
    def still(self) -> Iterator[None]:
        """The driver does nothing meanwhile. A fork while it imports can wait forever: the fork holds the lock of logging and
        wants that of imports, a collection of garbage within the import wants the first; and copies hold what it held."""
        standing, go_on = threading.Event(), threading.Event()

        def stand() -> None:
            standing.set()
            go_on.wait()

        self.tell(stand)
        while self._thread.is_alive() and not standing.wait(0.1):
            pass
        try:
            yield
        finally:
            go_on.set()

    def result(self) -> Result:
        self._thread.join()
        return self._result.result()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.driver = Driver(self._served.layout, self._served.text, self._settings)
        try:
            server, host, port = await self.driver.listen()
        except OSError as error:
            self._made.set_exception(RunError(f"ranks have no address to come to ({error})"))
            return
        self._made.set_result((host, port, self.driver.secret))
        tasks = [asyncio.create_task(one) for one in (self.driver.watch(), self._attend())]
        try:
            value = await self._work(self.driver)
        except BaseException as error:
            self._result.set_exception(error)
        else:
            self._result.set_result(value)
        self.driver.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.driver.farewell()
        server.close()

    async def _attend(self) -> None:
        """What a signal asks for reaches the driver; ranks of a lost engine that are stuck are ended."""
        driver, lost_at = self.driver, 0.0
        while True:
            await asyncio.sleep(0.1)
            if stop_requested():
                driver.stop_asked.set()
            if driver.state != "lost":
                lost_at = 0.0
            elif not lost_at:
                lost_at = time.monotonic()
            elif time.monotonic() - lost_at > STUCK_SECONDS:
                for pid in set(driver.abandoned) - {os.getpid()}:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                driver.abandoned = []


def text_of(source: Source) -> Text:
    """What a directory says of text. A checkpoint's config.json may speak of another tokenizer than the run trained with,
    and its texts were trained with no token before them: there the tokenizer alone is asked."""
    file = source.path / "tokenizer.json"
    tokenizer = Tokenizer.load(file) if file.is_file() else None
    if tokenizer is not None and tokenizer.vocabulary > source.spec.vocabulary:
        raise InputError(f"{tokenizer.vocabulary} tokens, the model has {source.spec.vocabulary}", where=str(file),
                         fix="give the tokenizer that the model was trained with")  # fmt: skip
    own_end = [] if tokenizer is None else [tokenizer.end]
    chat = ChatTemplate.load(source.path)
    if not isinstance(source, HuggingFaceSource):
        return Text(tokenizer, frozenset(own_end), [], own_end, chat)
    config = source.spec.config | read_object(source.path / "generation_config.json")
    eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
    ends = [*own_end, *(token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int))]
    # What the tokenizer's own template puts around a text.
    added = tokenizers.Tokenizer.from_file(str(file)).encode("").ids if tokenizer else []
    before = [t for t in added[:1] if t == bos]
    return Text(tokenizer, frozenset(ends), before, [bos] if isinstance(bos, int) else ends[:1], chat)
