"""The next tokens of a step's rows: likeliest or drawn, with log-probabilities.

Notable: the random number of a draw depends on the request's seed and the token's position alone, and rows are dealt with
one by one wherever they interact with more than their own logits. So the same seed gives the same text whatever else is in
the batch and at every layout. Penalties and filters shape the choice; log-probabilities are the model's own.

It knows logits and settings, not requests, caches or ranks.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiveply.engine.inputs import sent
from fiveply.serve.messages import Sampling, Score


class Row(NamedTuple):
    """What one row's choice depends on beside its logits."""

    sampling: Sampling
    position: int
    """Of the token to be chosen."""
    tokens: Sequence[int] = ()
    """All before it, where sampling looks back."""
    prompt: int = 0
    """How many of them are the prompt's."""
    allowed_V: Tensor | None = None
    """Where False, a token may not be chosen."""

    @property
    def likeliest(self) -> bool:
        """Whether the token of the largest logit is all that is asked for."""
        asked = self.sampling
        shaped = asked.penalises or asked.logit_bias or self.allowed_V is not None
        return asked.temperature == 0 and asked.top_logprobs < 0 and not shaped


def choose(logits_RV: Tensor, rows: Sequence[Row]) -> list[tuple[int, Score | None]]:
    """A token for each row, -1 where its logits are not finite, and its score where asked for.

    logits_RV: float32 or float64.
    """
    shaped_RV = _shaped(logits_RV, rows)
    greatest_R, tokens_R = shaped_RV.max(-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn and len(drawn) == len(rows):
        tokens_R = _draw(shaped_RV, rows)
    elif drawn:
        index_D = sent(drawn, shaped_RV.device)
        tokens_R[index_D] = _draw(shaped_RV[index_D], [rows[index] for index in drawn])
    tokens: list[int] = where_finite(tokens_R, greatest_R).tolist()
    scored = [index for index, row in enumerate(rows) if row.sampling.top_logprobs >= 0 and tokens[index] >= 0]
    scores: dict[int, Score] = {}
    if scored:
        most = max(rows[index].sampling.top_logprobs for index in scored)
        found = score(logits_RV[sent(scored, logits_RV.device)], [tokens[index] for index in scored], most)
        for index, one in zip(scored, found, strict=True):
            scores[index] = Score(one.logprob, one.top[: rows[index].sampling.top_logprobs])
    return [(token, scores.get(index)) for index, token in enumerate(tokens)]


def where_finite(tokens_R: Tensor, logits_R: Tensor) -> Tensor:
    """Each token, or -1 where its logit is not finite."""
    return torch.where(logits_R.isfinite(), tokens_R, -1)


def score(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """Log-probabilities of `tokens` under the logits, and the `top` likeliest of each row."""
    index_R = sent(tokens, logits_RV.device)
    sums_R = logits_RV.logsumexp(-1)
    own_R1 = logits_RV.gather(1, index_R[:, None]) - sums_R[:, None]
    if top == 0:
        return [Score(logprob) for logprob in own_R1[:, 0].tolist()]
    values_RK, ids_RK = logits_RV.topk(min(top, logits_RV.shape[1]))
    told = torch.cat([x.double() for x in (own_R1, values_RK - sums_R[:, None], ids_RK)], 1).tolist()
    most = ids_RK.shape[1]
    return [Score(own, list(zip(map(int, rest[most:]), rest[:most], strict=True))) for own, *rest in told]


def uniform(seed: int, position: int) -> float:
    """In [0, 1): the first word of numpy's Philox (Salmon et al. 2011) keyed by the seed, at the position."""
    return (int(np.random.Philox(key=seed % 2**64, counter=position).random_raw()) >> 11) * 2.0**-53


def _shaped(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """With biases, penalties and what is allowed; the same tensor where no row has any."""
    changed = [
        i for i, row in enumerate(rows) if row.sampling.penalises or row.sampling.logit_bias or row.allowed_V is not None
    ]  # fmt: skip
    if not changed:
        return logits_RV
    logits_RV = logits_RV.clone()
    for index in changed:
        sampling, logits_V, tokens = rows[index].sampling, logits_RV[index], rows[index].tokens
        if sampling.repetition_penalty != 1 and tokens:
            ids = sent(sorted(set(tokens)), logits_V.device)
            seen = logits_V[ids]
            logits_V[ids] = torch.where(
                seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty
            )
        answer = Counter(tokens[rows[index].prompt :])
        if answer and (sampling.frequency_penalty or sampling.presence_penalty):
            ids = sent(list(answer), logits_V.device)
            counts = sent(list(answer.values()), logits_V.device, logits_V.dtype)
            logits_V[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if sampling.logit_bias:
            ids = sent(list(sampling.logit_bias), logits_V.device)
            logits_V[ids] += sent(list(sampling.logit_bias.values()), logits_V.device, logits_V.dtype)
        if (allowed_V := rows[index].allowed_V) is not None:
            logits_V.masked_fill_(~allowed_V, -torch.inf)
    return logits_RV


def _draw(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Of each row the first token, in order of ids, at which the cumulative distribution passes the row's random number."""
    settings = [(row.sampling.temperature, uniform(row.sampling.seed, row.position)) for row in rows]
    temperatures_R1, points_R1 = sent(settings, logits_RV.device, torch.float64).split(1, 1)
    weights_RV = ((logits_RV.double() - logits_RV.amax(-1, keepdim=True)) / temperatures_R1).exp_()
    for index, row in enumerate(rows):
        if row.sampling.top_k or row.sampling.top_p < 1 or row.sampling.min_p:
            weights_RV[index] = _filtered(weights_RV[index], row.sampling)
    cumulative_RV = weights_RV.cumsum(-1)
    found_R1 = torch.searchsorted(cumulative_RV, points_R1 * cumulative_RV[:, -1:], right=True)
    return found_R1[:, 0].clamp_(max=logits_RV.shape[1] - 1)


def _filtered(weights_V: Tensor, sampling: Sampling) -> Tensor:
    """Zero for tokens that top_k, top_p (Holtzman et al. 2020) or min_p (Nguyen et al. 2024) leave out, in this order."""
    if 0 < sampling.top_k < len(weights_V):
        values, ids = weights_V.topk(sampling.top_k)
        weights_V = torch.zeros_like(weights_V).scatter(0, ids, values)
    if sampling.top_p < 1:
        values, ids = weights_V.sort(descending=True, stable=True)
        sums = values.cumsum(0)
        weights_V = torch.zeros_like(weights_V).scatter(0, ids, values * (sums - values < sampling.top_p * sums[-1]))
    if sampling.min_p:
        weights_V = weights_V.masked_fill(weights_V < sampling.min_p * weights_V.max(), 0)
    return weights_V
