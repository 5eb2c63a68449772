"""Driver and ranks together: `transformers`' greedy tokens on one rank, and one rank's tokens at every layout, however the
scheduler cuts, shares and puts back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch
from random_models import greedy_by_transformers, ragged, same_where_clear, save_random

from fiveply import service
from fiveply.serve.driver import Driver, Settings
from fiveply.serve.generation import Generation
from fiveply.serve.messages import Sampling
from fiveply.spec.errors import InputError

FAMILIES = {"llama": "tp=3,pp=2", "qwen3": "tp=2,pp=2", "gpt2": "dp=2,tp=2", "mistral": "tp=4"}
"""And a layout for each: tp=4 holds each of Mistral's two key-value heads twice."""
SAMPLED = Sampling(0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.2,
                   presence_penalty=0.1, seed=7, logit_bias={5: 1.0}, top_logprobs=2)  # fmt: skip


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    return save_random(request.param, tmp_path_factory.mktemp(request.param) / "hf"), FAMILIES[request.param]


ALL = pytest.mark.parametrize("family", list(FAMILIES), indirect=True)
ONE = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "qwen3" else pytest.mark.slow) for name in FAMILIES], indirect=True
)  # fmt: skip


async def tokens_of(generation: Generation) -> list[int]:
    return [token async for piece in generation.pieces() for token in piece.tokens]


def asking(
    prompts: list[list[int]], count: int, sampling: Sampling
) -> Callable[[Driver], Coroutine[Any, Any, tuple[list[list[int]], int, int]]]:
    """All at once: their tokens, how often a request was put back, and how many tokens the cache had already."""

    async def work(driver: Driver) -> tuple[list[list[int]], int, int]:
        generations = [driver.submit(list(prompt), count, sampling) for prompt in prompts]
        told = await asyncio.gather(*map(tokens_of, generations))
        schedulers = [replica.scheduler for replica in driver.replicas if replica.scheduler]
        assert [scheduler.pool.free for scheduler in schedulers] == [scheduler.pool.total for scheduler in schedulers]
        reused = sum(generation.request.reused for generation in generations)
        return told, sum(scheduler.preemptions for scheduler in schedulers), reused

    return work


@ALL
def test_greedy_equals_transformers(family: tuple[Any, str]) -> None:
    model, _ = family
    prompts = ragged(model.config.vocab_size)
    served = service.Served.load(model.name_or_path, dtype="float32")
    told, _, _ = service.run(served, Settings(step_tokens=33, most_running=4), asking(prompts, 10, Sampling()))
    for prompt, tokens in zip(prompts, told, strict=True):
        assert same_where_clear(tokens, greedy_by_transformers(model, prompt, 10), prompt, model)


@ONE
def test_a_layout_gives_what_one_rank_gives(family: tuple[Any, str]) -> None:
    """In float64, where no rounding decides a token; sampled too, with everything that sampling knows."""
    model, layout = family
    # The last begins like the second, two blocks long; two are equal.
    prompts = ragged(model.config.vocab_size)
    prompts += [[*prompts[1][:33], 4, 9], prompts[3]]
    plain = service.Served.load(model.name_or_path, dtype="float64")
    split = service.Served.load(model.name_or_path, layout, "float64")
    cramped = service.Served.load(model.name_or_path, layout, "float64", cache_tokens=112)
    for sampling in (Sampling(), SAMPLED):
        work = asking(prompts, 36, sampling)
        wanted, preemptions, _ = service.run(plain, Settings(reuse=False, step_tokens=4096), work)
        assert preemptions == 0
        assert service.run(split, Settings(step_tokens=16, most_running=3), work)[0] == wanted
        told, preemptions, _ = service.run(cramped, Settings(step_tokens=21, most_running=8, reuse=False), work)
        assert told == wanted
        assert preemptions > 0


@ONE
def test_the_cache_is_found_again(family: tuple[Any, str]) -> None:
    model, layout = family
    prompts = ragged(model.config.vocab_size, [64] * 2)
    prompts = [prompts[0], prompts[0], prompts[0][:32] + prompts[1][32:]]

    async def one_by_one(driver: Driver) -> list[tuple[list[int], int]]:
        told = []
        for prompt in prompts:
            generation = driver.submit(list(prompt), 8, Sampling())
            told.append((await tokens_of(generation), generation.request.reused))
        return told

    split = service.Served.load(model.name_or_path, layout, "float64")
    told = service.run(split, Settings(), one_by_one)
    assert [reused for _, reused in told] == [0, 48, 32]
    fresh = service.run(split, Settings(reuse=False), one_by_one)
    assert [tokens for tokens, _ in told] == [tokens for tokens, _ in fresh]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_random("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.mark.parametrize(
    "layout",
    ["dp=2,pp=2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("pp=3", "dp=3", "tp=3,stages=7,zero=2"))],
)
def test_further_layouts(llama: Any, layout: str) -> None:
    prompts = ragged(llama.config.vocab_size)
    work = asking(prompts, 10, Sampling())
    wanted = service.run(service.Served.load(llama.name_or_path, dtype="float64"), Settings(), work)[0]
    served = service.Served.load(llama.name_or_path, layout, "float64")
    assert service.run(served, Settings(step_tokens=30), work)[0] == wanted


@pytest.mark.parametrize("layout", ["dp=1", "tp=3,pp=2"])
def test_guesses_change_nothing_but_the_number_of_steps(llama: Any, layout: str) -> None:
    prompts = [prompt * 3 for prompt in ragged(llama.config.vocab_size, [5, 20, 1])]

    def asked(guesses: int, sampling: Sampling) -> tuple[list[list[int]], int, int]:
        async def work(driver: Driver) -> tuple[list[list[int]], int, int]:
            generations = [driver.submit(list(prompt), 40, sampling) for prompt in prompts]
            told = await asyncio.gather(*map(tokens_of, generations))
            scheduler = driver.replicas[0].scheduler
            assert scheduler is not None
            assert scheduler.pool.free == scheduler.pool.total
            return told, scheduler.guessed, scheduler.guessed_right

        return service.run(service.Served.load(llama.name_or_path, layout, "float64"), Settings(guesses=guesses), work)

    for sampling in (Sampling(), Sampling(0.4, seed=3)):
        plain, guessed, _ = asked(0, sampling)
        assert guessed == 0
        told, guessed, right = asked(4, sampling)
        assert told == plain
        assert guessed > 0
        assert right > 0 or sampling.temperature


@pytest.mark.parametrize("layout", ["dp=1", "tp=3,pp=2"])
def test_prompts_are_scored_and_embedded(llama: Any, layout: str) -> None:
    """Log-probabilities of the prompt and means of the last hidden states, in chunks, beside those of `transformers`."""
    prompt = ragged(llama.config.vocab_size, [70])[0]

    async def work(driver: Driver) -> tuple[list[tuple[float, list[tuple[int, float]]]], list[float], list[int]]:
        scored = driver.submit(list(prompt), 3, Sampling(top_logprobs=2), scores=True)
        embedded = driver.submit(list(prompt), 0, Sampling(), embeds=True)
        tokens = await tokens_of(scored)
        assert await tokens_of(embedded) == []
        return [(s.logprob, s.top) for s in scored.prompt_scores], embedded.embedding, tokens

    served = service.Served.load(llama.name_or_path, layout, "float32")
    scores, embedding, tokens = service.run(served, Settings(step_tokens=17, most_running=2), work)
    with torch.no_grad():
        out = llama(torch.tensor([prompt]), output_hidden_states=True)
    wanted = out.logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(
        [logprob for logprob, _ in scores], wanted.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], atol=2e-5
    )
    assert [top[0][0] for _, top in scores] == wanted.argmax(-1).tolist()
    np.testing.assert_allclose(embedding, out.hidden_states[-1][0].mean(0), atol=1e-5)
    assert tokens[0] == int(out.logits[0, -1].argmax())


def test_layouts_are_refused_with_the_reason(llama: Any) -> None:
    for layout, line in (
        ("tp=2", "--layout: tp: tp=2 does not divide 9 heads"),
        ("pp=8", "--layout: pp: pp=8 x 1 chunks = 8 stages, the model has 7 layers"),
        ("cp=2", "--layout: cp: cp=2 cannot be run yet"),
        ("pp=2,schedule=interleaved", "--layout: schedule: schedule=interleaved puts 2 chunks on a rank"),
    ):
        with pytest.raises(InputError) as caught:
            service.Served.load(llama.name_or_path, layout)
        assert str(caught.value).startswith(line)
