"""The sampler: distributions, filters, penalties, seeds, log-probabilities."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fiveply.engine.sampler import Row, choose, score
from fiveply.serve.messages import Sampling

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.9, -9.0, 0.0])


def draw(logits_V: torch.Tensor, sampling: Sampling, positions: int) -> list[int]:
    rows = [Row(sampling, position) for position in range(positions)]
    return [token for token, _ in choose(logits_V.expand(positions, -1), rows)]


def share(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    return np.bincount(draw(LOGITS, sampling, draws), minlength=len(LOGITS)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    wanted = (LOGITS.double() / temperature).softmax(-1).numpy()
    error = np.sqrt(wanted * (1 - wanted) / 4000)
    assert (np.abs(share(Sampling(temperature, seed=4)) - wanted) <= 4 * error + 1e-9).all()


def test_filters_keep_the_likeliest() -> None:
    def kept(**settings: Any) -> set[int]:
        return set(share(Sampling(**settings), 1500).nonzero()[0].tolist())

    assert kept(temperature=5.0, top_k=3) == {3, 4, 0}
    assert kept(temperature=5.0, top_k=100) == set(range(7))
    first = LOGITS.softmax(-1)[3].item()
    assert kept(temperature=1.0, top_p=first - 1e-3) == {3}
    assert kept(temperature=1.0, top_p=first + 1e-3) == {3, 4}
    assert kept(temperature=5.0, top_k=2, top_p=0.99) == {3, 4}
    assert kept(temperature=1e-300) == {3}
    # exp((0.5 - 3) / 2) = 0.29, exp((0 - 3) / 2) = 0.22
    assert kept(temperature=2.0, min_p=0.25) == {3, 4, 0, 2}


def test_seeds_and_positions_are_independent() -> None:
    flat = torch.zeros(1000)

    def draws(seed: int) -> list[int]:
        return draw(flat, Sampling(1.0, seed=seed), 200)

    assert draws(0) == draws(0)
    for a, b in itertools.combinations([draws(0), [*draws(0)[1:], 0], draws(1), draws(2**64 - 1), draws(2**40)], 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 5


def test_draws_are_pinned() -> None:
    """A seed's text must survive releases."""
    assert draw(torch.zeros(1000), Sampling(1.0, seed=7), 6) == [872, 82, 14, 442, 61, 454]


def test_a_rows_token_does_not_depend_on_other_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(6, 50, generator=generator)
    settings = [
        Sampling(), Sampling(0.7, seed=1), Sampling(1.2, top_k=5, seed=2), Sampling(0.9, top_p=0.8, min_p=0.05, seed=3),
        Sampling(repetition_penalty=1.5), Sampling(1.0, frequency_penalty=1.0, logit_bias={4: 2.0}, seed=9, top_logprobs=3),
    ]  # fmt: skip
    rows = [Row(one, 17, [4, 4, 9], 1) for one in settings]
    together = choose(logits_RV, rows)
    assert together == [choose(logits_RV[i : i + 1], rows[i : i + 1])[0] for i in range(6)]
    assert together[::-1] == choose(logits_RV.flip(0), rows[::-1])
    assert [found is not None for _, found in together] == [False] * 5 + [True]


def test_penalties_and_biases() -> None:
    def best(logits: list[float], tokens: list[int], prompt: int, **settings: Any) -> int:
        return choose(torch.tensor([logits]), [Row(Sampling(**settings), len(tokens), tokens, prompt)])[0][0]

    assert best([2.0, 1.9, 0.0], [0], 1) == 0
    assert best([2.0, 1.9, 0.0], [0], 1, repetition_penalty=1.1) == 1  # the prompt counts
    assert best([-2.0, -2.1, -9.0], [0], 1, repetition_penalty=1.1) == 1  # a negative logit sinks too
    assert best([2.0, 1.9, 0.0], [0], 1, presence_penalty=1.0) == 0  # the prompt does not count
    assert best([2.0, 1.9, 0.0], [2, 0], 1, presence_penalty=0.2) == 1
    assert best([2.0, 1.5, 0.0], [2, 0, 0], 1, presence_penalty=0.2) == 0
    assert best([2.0, 1.5, 0.0], [2, 0, 0], 1, frequency_penalty=0.3) == 1
    assert best([2.0, 1.9, 0.0], [], 0, logit_bias={2: 5.0, 0: -1.0}) == 2


def test_scores_are_the_models_own() -> None:
    """Whatever shaped the choice."""
    logits_RV = LOGITS[None]
    sampling = Sampling(4.0, top_k=2, logit_bias={6: 100.0}, seed=1, top_logprobs=2)
    ((token, found),) = choose(logits_RV, [Row(sampling, 3)])
    wanted = LOGITS.log_softmax(-1)
    assert token == 6
    assert found is not None
    assert found.logprob == pytest.approx(wanted[6].item())
    assert [id for id, _ in found.top] == [3, 4]
    assert [logprob for _, logprob in found.top] == pytest.approx([wanted[3].item(), wanted[4].item()])
    assert score(logits_RV, [0], 0)[0].top == []
    assert len(score(logits_RV, [0], 20)[0].top) == 7


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits_RV = torch.stack([LOGITS, LOGITS, LOGITS])
    logits_RV[1, 2] = torch.nan
    logits_RV[2, 2] = torch.inf
    rows = [Row(Sampling(temperature, top_logprobs=1), 0) for temperature in (0.0, 1.0, 0.0)]
    assert [token for token, _ in choose(logits_RV, rows)] == [3, -1, -1]
