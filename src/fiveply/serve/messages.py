"""All that passes between the driver and its ranks: values, framed as a length and msgpack. No pickle, no tensors.

Notable: a step is told as one number a request, how many tokens it brings, so prefill, prefill in chunks and decoding are one
thing. A request's settings and cached tokens are told once, with its first segment; after that a segment carries only what
is new. Every rank of a replica gets the same steps in the same order, so ranks agree on nothing among themselves.

This is the only file of `serve/` that `engine/` imports.
"""

from __future__ import annotations

from typing import Any

import msgspec

BLOCK = 16
"""Tokens in one block of the cache."""
NEXT = -1
"""In a segment's tokens: the one that the request's segment before will have chosen."""
GRAMMAR = "grammar: "
"""What the problem of a request begins with that its grammar has."""
LARGEST = 1 << 28
"""Bytes of a message; more is a broken peer."""


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How a token is chosen. Penalties as OpenAI's and (repetition) Keskar et al. 2019, then temperature, top_k, top_p, min_p."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # among so many likeliest tokens; 0: all
    top_p: float = 1.0  # then among the fewest likeliest ones whose probabilities reach this sum
    min_p: float = 0.0  # then among those at least this likely beside the likeliest
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and answer
    frequency_penalty: float = 0.0  # off a token's logit for each time it stands in the answer
    presence_penalty: float = 0.0  # off the logit of a token that stands in the answer
    seed: int = 0
    logit_bias: dict[int, float] = {}
    top_logprobs: int = -1  # likeliest tokens to report with the chosen one's; -1: report none
    grammar: str = ""  # what the answer has to be (`serve/grammar.py`); empty: anything

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.frequency_penalty or self.presence_penalty)

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on earlier tokens."""
        return self.penalises or bool(self.grammar)


class Beginning(msgspec.Struct, frozen=True, array_like=True):
    """What ranks are told of a request once: when it is admitted, and again when it resumes."""

    sampling: Sampling
    prompt: int
    """How many of its tokens are the prompt's."""
    cached: list[int] = []
    """Its tokens before the first segment (found in the cache), where sampling looks back."""
    scores: bool = False
    """Report the log-probability of each prompt token."""
    embeds: bool = False
    """Report the mean of the last hidden states."""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """The tokens that one request brings to a step."""

    request: int
    start: int
    """Position of the first token: so many are cached."""
    tokens: list[int]
    blocks: list[int]
    """Added to the request's table by this step."""
    last: bool
    """No token is left after this: answer."""
    samples: bool = True
    begins: Beginning | None = None
    following: int = -1
    """The prompt token after the last of `tokens`, to be scored."""
    guesses: int = 0
    """So many of the last tokens are guesses: to be kept as far as they are what would have been chosen."""


class StepBatch(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    step: int
    segments: list[Segment]
    released: list[int]
    """Requests to forget, before the segments."""


class Begin(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """The answer to Ready: allocate so many blocks, and be ready for steps."""

    blocks: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """End; no step is under way."""


FromDriver = Begin | StepBatch | Shutdown


class Score(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability under the model's own distribution, and the likeliest tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]] = []


class Outcome(msgspec.Struct, array_like=True):
    """What a step gave one request."""

    request: int
    tokens: list[int] = []
    """The next ones: the guesses that were right, and one more; none where none was asked for."""
    scores: list[Score] = []
    """Of these, where asked for."""
    scored_from: int = 0
    prompt_scores: list[Score] = []
    """Of the prompt tokens from position `scored_from` on."""
    embedding: list[float] = []
    problem: str = ""
    """Why there is none of that."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    rank: int
    pid: int
    secret: str


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The model is loaded; so many blocks would fit in this rank's memory."""

    blocks: int


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """From the first tensor rank of a replica's last stage."""

    step: int
    outcomes: list[Outcome]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """From every rank, every second, between steps: a rank that is stuck in one sends none."""

    step: int


FromRank = Hello | Ready | StepResult | Heartbeat

_encoder = msgspec.msgpack.Encoder()


def pack(message: Any) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body
