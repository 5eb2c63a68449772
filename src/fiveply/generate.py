"""generate: continue texts, greedy or sampled, at any layout: the server's driver and ranks, fed from files or a terminal.

Notable: all prompts are asked at once and share steps as requests of a server do. Random numbers are keyed by (seed, position),
so a completion does not depend on what else is in the batch or on the layout, but for rounding (a matrix product rounds
otherwise at other numbers of rows). With an output file, completions are written as they end, and a run that was cut off goes
on with the prompts that are missing.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.progress import Progress

from fiveply import service
from fiveply.serve import messages
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.generation import Generation
from fiveply.spec.errors import InputError, RunError

STEP_TOKENS = 2048  # nobody waits for the next token of an answer: prompts in large chunks
TOGETHER = 64
SILENCE_SECONDS = 600.0  # such a step of a large model may take minutes


class Sampling(msgspec.Struct, frozen=True):
    """How many tokens, and how they are chosen. Raises InputError for what is out of range."""

    max_tokens: int
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # sample among so many likeliest tokens; 0: all
    top_p: float = 1.0  # then among the fewest likeliest ones whose probabilities reach this sum
    seed: int = 0

    def __post_init__(self) -> None:
        for key, right, fix in (
            ("max_tokens", self.max_tokens >= 1, "give 1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "give 0 (greedy) or more"),
            ("top_k", 0 <= self.top_k < 2**63, "give 0 (all tokens) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "give more than 0 and at most 1"),
        ):
            if not right:
                raise InputError(f"{getattr(self, key)} is out of range", where="generate", key=key, fix=fix)

    def told(self) -> messages.Sampling:
        """As ranks know it; log-probabilities of the chosen tokens are always reported."""
        return messages.Sampling(
            self.temperature, self.top_k, self.top_p, seed=self.seed % 2**64, top_logprobs=0
        )  # fmt: skip


class Completion(msgspec.Struct, frozen=True):
    """What followed a prompt: the new `tokens`, the end token that stopped it included; their `text` without special tokens;
    their `logprobs` under the model's own distribution (temperature 1, all tokens)."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class _Line(msgspec.Struct):
    """Of an output file: which prompt, and what followed."""

    index: int
    completion: Completion


def run(
    model: str | Path, *, prompt: str | None = None, prompts: Path | None = None, max_tokens: int = 64,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, layout: str = "dp=1", dtype: str = "auto",
    quantize: str = "none", out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verb: `completions` and `tokens_per_second` (new tokens, loading not counted). `prompts`: see `_read`."""
    if prompt is not None and prompts is not None:
        raise InputError("both --prompt and --prompts", where="generate", fix="give one of them")
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)  # refused before the model is loaded
    texts = [prompt or ""] if prompts is None else _read(prompts)
    served = service.Served.load(model, layout, dtype, quantize=quantize)
    tokens = [_tokens(served, f"prompt {number}", one, max_tokens) for number, one in enumerate(texts, 1)]
    done = _resume(out, tokens) if out else {}
    missing = [index for index in range(len(tokens)) if index not in done]

    async def work(driver: Driver) -> float:
        await driver.ready.wait()
        start = time.perf_counter()
        hidden = len(missing) < 2 or not sys.stderr.isatty()
        with (
            Progress(disable=hidden, transient=True) as bar,
            out.open("a", encoding="utf-8", buffering=1) if out else nullcontext() as file,
        ):
            shown = bar.add_task("prompts", total=len(missing))

            async def one(index: int, generation: Generation) -> None:
                done[index] = await _completion(generation)
                bar.advance(shown)
                if file is not None:
                    file.write(msgspec.json.encode(_Line(index, done[index])).decode() + "\n")

            asked = [
                (index, driver.submit(list(tokens[index]), max_tokens, sampling.told(), ends=served.text.ends))
                for index in missing
            ]
            await asyncio.gather(*(one(*each) for each in asked))
        return time.perf_counter() - start

    seconds = service.run(served, _settings(len(missing)), _until_stopped(work)) if missing else 0.0
    new = sum(len(done[index].tokens) for index in missing)
    completions = [msgspec.structs.asdict(done[index]) for index in range(len(tokens))]
    return {"completions": completions, "tokens_per_second": new / seconds if seconds else 0.0}


def converse(
    model: str | Path, *, max_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    seed: int = 0, layout: str = "dp=1", dtype: str = "auto", quantize: str = "none",
) -> None:  # fmt: skip
    """A conversation in the terminal, streaming, until an empty line or the end of input. A model without a chat template
    goes on with the text so far."""
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    served = service.Served.load(model, layout, dtype, quantize=quantize)
    text, tokenizer = served.text, served.text.tokenizer
    if tokenizer is None:
        raise InputError(
            "has no tokenizer.json to hold a conversation with", where=str(served.path), fix="give --prompts"
        )

    async def work(driver: Driver) -> None:
        turns: list[dict[str, str]] = []
        while (said := await asyncio.to_thread(_line)).strip():
            turns.append({"role": "user", "content": said})
            if text.chat:  # a template has put in what goes before a text
                given: str | list[int] = tokenizer.encode(text.chat.render(turns)).tolist()
            else:
                given = "".join(turn["content"] for turn in turns)
            prompt = _tokens(served, "the conversation", given, max_tokens)
            generation = driver.submit(prompt, max_tokens, sampling.told(), ends=text.ends)
            answer = ""
            async for piece in generation.pieces():
                answer += piece.text
                print(piece.text, end="", flush=True)
            print()
            turns.append({"role": "assistant", "content": answer})

    service.run(served, _settings(1), _until_stopped(work))


def _until_stopped(
    work: Callable[[Driver], Coroutine[Any, Any, Any]],
) -> Callable[[Driver], Coroutine[Any, Any, Any]]:
    """The same, given up when Ctrl-C or SIGTERM asks for an end, or no engine comes."""

    async def stoppable(driver: Driver) -> Any:
        working, stopping = asyncio.create_task(work(driver)), asyncio.create_task(driver.stop_asked.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            raise RunError(driver.problem or "interrupted")
        return working.result()

    return stoppable


async def _completion(generation: Generation) -> Completion:
    pieces = [piece async for piece in generation.pieces()]
    request = generation.request
    return Completion(
        request.tokens[: request.prompt],
        request.tokens[request.prompt :],
        "".join(piece.text for piece in pieces),
        [score.logprob for piece in pieces for score in piece.scores],
        "stop" if pieces[-1].finish == "stop" else "length",
    )


def _settings(prompts: int) -> Settings:
    return Settings(
        most_running=TOGETHER, most_waiting=prompts + 1, step_tokens=STEP_TOKENS, silence_seconds=SILENCE_SECONDS
    )  # fmt: skip


def _tokens(served: service.Served, where: str, prompt: str | list[int], max_tokens: int) -> list[int]:
    """The prompt's token ids, checked."""
    spec = served.spec
    try:
        tokens = served.text.encode(prompt)
    except ValueError as error:
        raise InputError(str(error), where=where) from None
    if outside := [token for token in tokens if not 0 <= token < spec.vocabulary]:
        raise InputError(f"token {outside[0]} is none of the model's {spec.vocabulary}", where=where,
                         fix="give ids of its own tokenizer")  # fmt: skip
    if len(tokens) + max_tokens > spec.positions:
        raise InputError(f"{len(tokens)} tokens + max_tokens {max_tokens} exceed the model's {spec.positions} positions",
                         where=where, fix="shorten the prompt, or lower max_tokens")  # fmt: skip
    return tokens


def _read(file: Path) -> list[Any]:
    """Prompts from a JSON object a line: "prompt" (text or ids, as OpenAI's) or "tokens" (ids); other keys are the author's
    notes, unless they would change the answer. Raises InputError naming the line."""
    fix, prompts = 'write {"prompt": "text"} or {"tokens": [1, 2]}', list[Any]()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=str(file), fix="give a .jsonl file of prompts") from None
    for where, line in ((f"{file} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()):
        try:
            value = msgspec.json.decode(line, type=dict[str, Any])
            prompts.append(msgspec.convert(value.get("tokens", value.get("prompt")), str | list[int]))
        except msgspec.MsgspecError as error:
            raise InputError(f"not a prompt ({error})", where=where, fix=fix) from None
        for key in (*Sampling.__struct_fields__, "messages", "n", "stop", "echo", "logit_bias"):
            if key in value:
                raise InputError(
                    "is not read here", where=where, key=key, fix="leave it out; settings are flags, for all"
                )
    if not prompts:
        raise InputError("holds no prompt", where=str(file), fix=fix)
    return prompts


def _resume(out: Path, prompts: Sequence[list[int]]) -> dict[int, Completion]:
    """What an earlier run has written; a line that was cut off is dropped. Raises InputError for another run's file."""
    if not out.exists():
        return {}
    done: dict[int, Completion] = {}
    try:
        content = out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            read = msgspec.json.decode(line, type=_Line)
            if read.index >= len(prompts) or read.completion.prompt_tokens != prompts[read.index]:
                raise InputError(f"line {number} is of another prompt", where=str(out), fix="name a new file")
            done[read.index] = read.completion
        if whole != content:
            out.write_bytes(whole)
    except (OSError, msgspec.MsgspecError) as error:
        raise InputError(
            f"not completions that can be gone on with ({error})", where=str(out), fix="name a new file"
        ) from None
    return done


def _line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
