"""generate: continue text with a checkpoint or a Hugging Face directory, greedy or sampled, on one process.

Notable: prompts of different lengths are decoded together, and one number per sequence and step, how many tokens it brings,
covers prompts, long prompts in chunks, and decoding. Random numbers are keyed by (seed, position), so a completion does not
depend on what else is in the batch, but for rounding (a matrix product rounds otherwise at other numbers of rows).
It does not know ranks, pages or a server: those are serving's.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from fiveply.checkpoint import store
from fiveply.checkpoint.huggingface import HuggingFaceSource
from fiveply.corpus.tokenizer import Tokenizer
from fiveply.model.cached_attention import CachedAttention
from fiveply.model.decoder import Decoder
from fiveply.spec.errors import InputError, RunError
from fiveply.spec.layout import Layout
from fiveply.world import device

PROMPT_TOKENS = 2048  # most of prompts in one forward: bounds its memory, whatever their lengths
TOGETHER = 32  # most sequences decoded together; others wait for one to end
Source = store.Checkpoint | HuggingFaceSource
Specials = tuple[frozenset[int], list[int], list[int]]


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
            ("top_k", self.top_k >= 0, "give 0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "give more than 0 and at most 1"),
        ):
            if not right:
                raise InputError(f"{getattr(self, key)} is out of range", where="generate", key=key, fix=fix)


class Completion(msgspec.Struct, frozen=True):
    """What followed a prompt: the new `tokens`, the end token that stopped it included; their `text` without special tokens;
    their `logprobs` under the model's own distribution (temperature 1, all tokens)."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@dataclass
class _Sequence:
    index: int
    tokens: list[int]
    prompt: int  # how many of the tokens are the prompt's
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Generator:
    """A model in memory, and what its directory says of text."""

    decoder: Decoder
    tokenizer: Tokenizer | None
    ends: frozenset[int]  # tokens that stop a completion
    before_text: list[int]  # what the model was trained to see before every text (Llama's <s>); not added to token ids
    beginning: list[int]  # what an empty prompt becomes

    @classmethod
    def load(cls, path: str | Path, dtype: str = "auto", threads: int | None = None) -> Generator:
        """From a checkpoint, a run's directory (its newest intact checkpoint), or a Hugging Face directory.

        dtype: float32, bfloat16, float64, or auto: bfloat16 where this machine is fast at it. threads: torch's from now on,
        None leaves them. Without a tokenizer.json, prompts must be token ids. Raises InputError for any other directory,
        DamagedCheckpointError for a checkpoint that is given by its own name and not whole.
        """
        source, found = _open(Path(path)), device.find()
        if threads is not None:
            torch.set_num_threads(threads)
        file = source.path / "tokenizer.json"
        tokenizer = Tokenizer.load(file) if file.is_file() else None
        if tokenizer is not None and tokenizer.vocabulary > source.spec.vocabulary:
            raise InputError(f"{tokenizer.vocabulary} tokens, the model has {source.spec.vocabulary}", where=str(file),
                             fix="give the tokenizer that the model was trained with")  # fmt: skip
        dtype = {True: "bfloat16", False: "float32"}[found.fast_bf16] if dtype == "auto" else dtype
        decoder = _decoder(source, getattr(torch, dtype), torch.device(found.kind))
        return cls(decoder, tokenizer, *_special_tokens(source, tokenizer))

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str] | Sequence[list[int]], max_tokens: int, temperature: float = 0.0, top_k: int = 0,
        top_p: float = 1.0, seed: int = 0, on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Completions of the prompts (texts or token ids), in their order; `on_token(index of the prompt, token)` is called
        as tokens come. Raises InputError before anything runs, RunError where the model's logits are not finite."""
        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
        waiting = deque(self._sequence(index, prompt, max_tokens) for index, prompt in enumerate(prompts))
        running: list[_Sequence] = []
        done: dict[int, Completion] = {}
        parameter = next(self.decoder.parameters())
        attention = CachedAttention(self.decoder.spec, parameter.dtype, parameter.device)
        while waiting or running:
            while waiting and len(running) < TOGETHER:
                running.append(waiting.popleft())
                attention.add_row()
            for row in reversed(self._step(running, attention, sampling)):
                sequence = running[row]
                if on_token is not None:
                    on_token(sequence.index, sequence.tokens[-1])
                if completion := self._completion(sequence, max_tokens):
                    done[sequence.index] = completion
                    attention.remove_row(row)  # the last row takes its place, there and here
                    running[row] = running[-1]
                    running.pop()
        return [done[index] for index in sorted(done)]

    def _sequence(self, index: int, prompt: str | list[int], max_tokens: int) -> _Sequence:
        where, vocabulary, positions = f"prompt {index + 1}", self.decoder.spec.vocabulary, self.decoder.spec.positions
        if isinstance(prompt, list):
            tokens = prompt
        elif self.tokenizer is None and prompt:
            raise InputError("the model has no tokenizer.json to read text with", where=where, fix="give token ids")
        else:
            tokens = self.tokenizer.encode(prompt).tolist() if self.tokenizer else []
            tokens = tokens if tokens[:1] == self.before_text else self.before_text + tokens
        tokens = list(tokens or self.beginning)
        if not tokens:
            raise InputError("is empty, and the model names no token to begin with", where=where, fix="give a token")
        if outside := [token for token in tokens if not 0 <= token < vocabulary]:
            raise InputError(f"token {outside[0]} is none of the model's {vocabulary}", where=where,
                             fix="give ids of its own tokenizer")  # fmt: skip
        if len(tokens) + max_tokens > positions:
            raise InputError(f"{len(tokens)} tokens + max_tokens {max_tokens} exceed the model's {positions} positions",
                             where=where, fix="shorten the prompt, or lower max_tokens")  # fmt: skip
        return _Sequence(index, tokens, len(tokens))

    def _step(self, running: list[_Sequence], attention: CachedAttention, sampling: Sampling) -> list[int]:
        """One forward; returns the rows that got a token. While prompts are not cached they go first, else all decode."""
        cached = attention.lengths
        left = [len(sequence.tokens) - n for sequence, n in zip(running, cached, strict=True)]
        counts, budget = [1] * len(left), PROMPT_TOKENS
        if max(left) > 1:
            for row, uncached in enumerate(left):
                counts[row] = min(uncached, budget) if uncached > 1 else 0
                budget -= counts[row]
        packed = [s.tokens[n : n + new] for s, n, new in zip(running, cached, counts, strict=True)]
        positions_T = attention.begin(counts)
        tokens_T = torch.tensor([token for part in packed for token in part], device=positions_T.device)
        hidden_TD = self.decoder(tokens_T, positions_T, attention)
        rows = [row for row, uncached in enumerate(left) if counts[row] == uncached]
        last_R = torch.from_numpy(np.cumsum(counts)[rows] - 1).to(positions_T.device)
        logits_RV = self.decoder.logits(hidden_TD[last_R])
        logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
        sums_R, greedy = logits_RV.logsumexp(-1), logits_RV.argmax(-1).tolist()
        if not sums_R.isfinite().all():
            raise RunError("the model's logits are not finite: its weights are broken, or too large for this precision")
        for index, row in enumerate(rows):
            sequence = running[row]
            token = _draw(logits_RV[index], sampling, len(sequence.tokens)) if sampling.temperature else greedy[index]
            sequence.tokens.append(token)
            sequence.logprobs.append((logits_RV[index, token] - sums_R[index]).item())
        return rows

    def _completion(self, sequence: _Sequence, max_tokens: int) -> Completion | None:
        """None while the sequence goes on."""
        prompt, tokens = sequence.tokens[: sequence.prompt], sequence.tokens[sequence.prompt :]
        stopped = tokens[-1] in self.ends
        if not stopped and len(tokens) < max_tokens:
            return None
        text, shown = "", tokens[:-1] if stopped else tokens
        if self.tokenizer is not None:
            # What follows the prompt in the whole text, since some tokenizers drop a text's first space; a prompt that
            # ends inside a character reads otherwise with its rest.
            before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode(prompt + shown)
            text = whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(shown)
        return Completion(prompt, tokens, text, sequence.logprobs, "stop" if stopped else "length")


def run(
    model: str | Path, *, prompt: str | None = None, prompts: Path | None = None, max_tokens: int = 64,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, layout: str = "dp=1", dtype: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """The verb: `completions` and `tokens_per_second` (new tokens, loading not counted). `prompts`: see `_read`."""
    world = Layout.parse(layout, "--layout").world
    if world > 1:
        raise InputError(f"{world} ranks: generation runs on one process until serving is built", where="--layout",
                         fix="leave it out")  # fmt: skip
    if prompt is not None and prompts is not None:
        raise InputError("both --prompt and --prompts", where="generate", fix="give one of them")
    Sampling(max_tokens, temperature, top_k, top_p, seed)  # refused before the model is loaded
    texts = [prompt or ""] if prompts is None else _read(prompts)
    generator = Generator.load(model, dtype, device.find().threads_for(1))
    start = time.perf_counter()
    completions = generator.generate(texts, max_tokens, temperature, top_k, top_p, seed)
    speed = sum(len(completion.tokens) for completion in completions) / (time.perf_counter() - start)
    return {"completions": [msgspec.structs.asdict(one) for one in completions], "tokens_per_second": speed}


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


def _draw(logits_V: Tensor, sampling: Sampling, position: int) -> int:
    """The first token, in order of ids, at which the cumulative distribution passes the uniform number of (seed, position)."""
    weights_V = ((logits_V.double() - logits_V.max()) / sampling.temperature).exp()
    if 0 < sampling.top_k < len(weights_V):
        values, ids = weights_V.topk(sampling.top_k)
        weights_V = torch.zeros_like(weights_V).scatter(0, ids, values)
    if sampling.top_p < 1:
        values, ids = weights_V.sort(descending=True, stable=True)
        sums = values.cumsum(0)
        weights_V = torch.zeros_like(weights_V).scatter(0, ids, values * (sums - values < sampling.top_p * sums[-1]))
    cumulative_V = weights_V.cumsum(0).cpu().numpy()
    word = int(np.random.Philox(key=sampling.seed % 2**64, counter=position).random_raw())
    return int(np.searchsorted(cumulative_V, (word >> 11) * 2.0**-53 * cumulative_V[-1], side="right"))


def _open(path: Path) -> Source:
    """The weights that `path` means."""
    fix = "give a run's directory, a checkpoint, or a Hugging Face directory"
    if not path.is_dir():
        raise InputError("no such directory", where=str(path), fix=fix)
    if (path / store.INDEX).is_file():
        checkpoint = store.Checkpoint.open(path)
        checkpoint.verify()
        return checkpoint
    if (path / "config.json").is_file():
        return HuggingFaceSource(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, problems = store.open_newest_intact(folder)
    if checkpoint is None:
        problem = "; ".join(problems) or "holds no checkpoint, and is no Hugging Face directory"
        raise InputError(problem, where=str(folder), fix=fix)
    for problem in problems:
        print(f"fiveply: {problem}: an older checkpoint is used", file=sys.stderr)
    return checkpoint


def _decoder(source: Source, dtype: torch.dtype, place: torch.device) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(source.spec)
    for name, parameter in list(decoder.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        value = source.read(name, (0,) * parameter.ndim, tuple(parameter.shape), dtype).to(place)
        setattr(decoder.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return decoder


def _special_tokens(source: Source, tokenizer: Tokenizer | None) -> Specials:
    """The last three fields of Generator. A checkpoint's config.json may speak of another tokenizer than the run trained
    with, and its texts were trained with no token before them: there the tokenizer alone is asked."""
    own_end = [] if tokenizer is None else [tokenizer.end]
    if not isinstance(source, HuggingFaceSource):
        return frozenset(own_end), [], own_end
    config, file = source.spec.config, source.path / "generation_config.json"
    try:
        config = config | (msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.is_file() else {})
    except msgspec.MsgspecError as error:
        raise InputError(f"not a JSON object ({error})", where=str(file), fix="mend or delete it") from None
    eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
    ends = [*own_end, *(token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int))]
    # What the tokenizer's own template puts around a text.
    added = tokenizers.Tokenizer.from_file(str(source.path / "tokenizer.json")).encode("").ids if tokenizer else []
    return frozenset(ends), [t for t in added[:1] if t == bos], [bos] if isinstance(bos, int) else ends[:1]
