"""One rank's work for a step: its stage of the decoder over the step's packed tokens, and on the last stage the answers.

Notable: all ranks of a replica get the same steps in the same order, so the shape of what arrives from the stage before is
known and nothing is agreed on. Hidden states go on to the same tensor rank of the next stage while this one turns to the next
step; chosen tokens go from the last stage to the first, where a step may begin with them before the driver has heard of them.
Logits are formed only for the tokens that are asked about. On a GPU, steps in which all decode are replayed where that has been
recorded (`graphs.py`), and the host waits for the device once a step: for the tokens.

It knows no sockets and no other requests than those that steps name.

Shape suffixes: T packed tokens, D hidden, R rows that are answered, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fiveply.engine import sampler
from fiveply.engine.constrain import Constraint, Grammars
from fiveply.engine.graphs import CudaGraphs, DecodeSteps, Record
from fiveply.engine.inputs import sent
from fiveply.engine.paged_attention import PagedAttention, Span
from fiveply.engine.stage import Stage
from fiveply.model.decoder import Decoder
from fiveply.serve.messages import GRAMMAR, NEXT, Beginning, Outcome, Score, Segment, StepBatch, StepResult
from fiveply.spec.placement import part
from fiveply.world.collectives import Axis, gather_columns
from fiveply.world.mesh import Mesh
from fiveply.world.recorder import Call

SCORED_TOGETHER = 128  # prompt tokens whose logits exist at once


@dataclass
class _Request:
    begins: Beginning
    table: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """All so far, where sampling looks back."""
    chosen: int = 0
    """The latest token that was."""
    coming: int = 0
    """Choices of the last stage that the first has yet to hear."""
    constraint: Constraint | None = None
    hidden_sum_D: Tensor | None = None
    """Over its tokens so far, where it is to be embedded."""


class Runner:
    """Steps through this rank's part of the model."""

    def __init__(
        self, decoder: Decoder, attention: PagedAttention, mesh: Mesh, grammars: Grammars, record: Record | None = None
    ) -> None:
        """`record`: how steps in which all decode are recorded; None: on GPUs as CUDA graphs, elsewhere not."""
        self._decoder, self._attention, self._mesh, self._grammars = decoder, attention, mesh, grammars
        self._stage = Stage(decoder, attention, mesh.tp)
        self._requests: dict[int, _Request] = {}
        self._sent: Call | None = None
        self._coming: deque[tuple[list[_Request], Tensor, Call]] = deque()
        parameter = next(decoder.parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        if record is None and self._device.type == "cuda":
            record = CudaGraphs()
        self._decode_steps = None if record is None else DecodeSteps(decoder, attention, record)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult | None:
        """The step's result on the first tensor rank of the last stage, None elsewhere."""
        for request in batch.released:
            del self._requests[request]
        requests = [self._request(segment) for segment in batch.segments]
        spans = [
            Span(segment.start, len(segment.tokens), request.table)
            for segment, request in zip(batch.segments, requests, strict=True)
        ]
        decode = self._decode_steps.begin(spans) if self._decode_steps is not None else None
        if decode is not None:
            hidden_TD = decode(self._input(batch.segments, requests, len(spans)))
        else:
            positions_T = self._attention.begin(spans)
            hidden_TD = self._stage(self._input(batch.segments, requests, len(positions_T)), positions_T)
        if self._decoder.model.norm is None:
            self._hand_on(hidden_TD)
            if self._decoder.first and (asked := _asked(batch.segments, requests)):
                self._expect(asked)
            return None
        outcomes = self._answer(batch.segments, requests, hidden_TD)
        if not self._decoder.first and (asked := _asked(batch.segments, requests)):
            self._tell(asked)
        return StepResult(batch.step, outcomes) if self._mesh.at.tp == 0 else None

    def _request(self, segment: Segment) -> _Request:
        if segment.begins is not None:
            request = self._requests[segment.request] = _Request(segment.begins, tokens=list(segment.begins.cached))
            if segment.begins.sampling.grammar and self._decoder.model.norm is not None:
                request.constraint = Constraint(self._grammars, segment.begins.sampling.grammar)
                request.constraint.hear(request.tokens[segment.begins.prompt :])
        request = self._requests[segment.request]
        request.table += segment.blocks
        if request.begins.sampling.looks_back:  # for these nothing is guessed
            request.tokens += segment.tokens
        if request.constraint is not None:
            request.constraint.hear(segment.tokens[max(0, request.begins.prompt - segment.start) :])
        return request

    def _input(self, segments: list[Segment], requests: list[_Request], tokens: int) -> Tensor:
        if self._decoder.first:
            while any(
                request.coming and NEXT in segment.tokens for segment, request in zip(segments, requests, strict=True)
            ):
                self._hear()
            given = [
                request.chosen if token == NEXT else token
                for segment, request in zip(segments, requests, strict=True)
                for token in segment.tokens
            ]
            return sent(given, self._device)
        axis = self._mesh.down
        assert axis is not None
        hidden_TD = torch.empty(tokens, self._decoder.spec.hidden, dtype=self._dtype, device=self._device)
        axis.receive(hidden_TD, axis.index - 1).wait()
        return hidden_TD

    def _hand_on(self, hidden_TD: Tensor) -> None:
        axis = self._mesh.down
        assert axis is not None
        self._send(hidden_TD.contiguous(), axis, axis.index + 1)

    def _tell(self, asked: list[_Request]) -> None:
        """The first stage, what was chosen."""
        assert self._mesh.up is not None
        self._send(sent([request.chosen for request in asked], self._device), self._mesh.up, 0)

    def _send(self, x: Tensor, axis: Axis, to: int) -> None:
        if self._sent is not None:
            self._sent.wait()
        self._sent = axis.send(x, to)

    def _expect(self, asked: list[_Request]) -> None:
        """What `_tell` will send. Of more steps than are in flight the oldest has returned: it is heard without waiting."""
        axis = self._mesh.up
        assert axis is not None
        if len(self._coming) > axis.size + 1:
            self._hear()
        tokens_R = torch.empty(len(asked), dtype=torch.long, device=self._device)
        self._coming.append((asked, tokens_R, axis.receive(tokens_R, axis.size - 1)))
        for request in asked:
            request.coming += 1

    def _hear(self) -> None:
        asked, tokens_R, call = self._coming.popleft()
        call.wait()
        for request, token in zip(asked, tokens_R.tolist(), strict=True):
            request.chosen = token
            request.coming -= 1

    def _answer(self, segments: list[Segment], requests: list[_Request], hidden_TD: Tensor) -> list[Outcome]:
        """On every tensor rank of the last stage: they share the vocabulary."""
        outcomes: dict[int, Outcome] = {}
        asked: list[int] = []  # the tokens after which one is wanted: each segment's last, and those before its guesses
        rows: list[sampler.Row] = []
        first = 0
        for segment, request in zip(segments, requests, strict=True):
            end, begins, outcome = first + len(segment.tokens), request.begins, Outcome(segment.request)
            if begins.scores and segment.start < begins.prompt:
                outcome.scored_from = segment.start + 1
                outcome.prompt_scores = self._scores(segment, begins, hidden_TD[first:end])
            if begins.embeds:
                outcome.embedding = self._pooled(segment, request, hidden_TD[first:end])
            if segment.last and segment.samples:
                allowed_V = None if request.constraint is None else request.constraint.allowed()
                for back in range(segment.guesses, -1, -1):
                    asked.append(end - 1 - back)
                    position = segment.start + len(segment.tokens) - back
                    rows.append(sampler.Row(begins.sampling, position, request.tokens, begins.prompt, allowed_V))
            if segment.last or outcome.prompt_scores:
                outcomes[segment.request] = outcome
            first = end
        if asked:
            hidden_RD = hidden_TD if len(asked) == len(hidden_TD) else hidden_TD[sent(asked, self._device)]
            chosen = iter(self._choose(hidden_RD, rows))
            for segment, request in zip(segments, requests, strict=True):
                if segment.last and segment.samples:
                    outcome = outcomes[segment.request]
                    _accept(segment, [next(chosen) for _ in range(segment.guesses + 1)], outcome)
                    request.chosen = outcome.tokens[-1] if outcome.tokens else 0
                    if request.constraint is not None and request.constraint.problem:
                        outcomes[segment.request] = Outcome(
                            segment.request, problem=GRAMMAR + request.constraint.problem
                        )
        return list(outcomes.values())

    def _choose(self, hidden_RD: Tensor, rows: list[sampler.Row]) -> list[tuple[int, Score | None]]:
        axis = self._mesh.tp
        if axis is None or not all(row.likeliest for row in rows):
            return sampler.choose(self._logits(hidden_RD), rows)
        # Each rank's likeliest says enough: whole rows of logits take longer to gather than to compute.
        greatest_R, tokens_R = self._decoder.logits(hidden_RD).max(-1)
        tokens_R += part(self._decoder.spec.vocabulary, axis.size, axis.index)[0]
        own_R2 = torch.stack((greatest_R.double(), tokens_R.double()), 1)
        all_2R2 = own_R2.new_empty(axis.size * len(rows), 2)
        axis.all_gather(all_2R2, own_R2)
        greatest_2R, tokens_2R = all_2R2.view(axis.size, -1, 2).unbind(-1)
        best_1R = greatest_2R.argmax(0, keepdim=True)
        greatest_R, tokens_R = (x_2R.gather(0, best_1R)[0] for x_2R in (greatest_2R, tokens_2R))
        return [(token, None) for token in sampler.where_finite(tokens_R.long(), greatest_R).tolist()]

    def _scores(self, segment: Segment, begins: Beginning, hidden_TD: Tensor) -> list[Score]:
        """Of the prompt tokens that follow this segment's tokens."""
        targets = [*segment.tokens[1:], *([segment.following] if segment.following >= 0 else [])]
        targets = targets[: begins.prompt - segment.start - 1]
        scores: list[Score] = []
        for start in range(0, len(targets), SCORED_TOGETHER):
            some = targets[start : start + SCORED_TOGETHER]
            logits_RV = self._logits(hidden_TD[start : start + len(some)])
            scores += sampler.score(logits_RV, some, max(0, begins.sampling.top_logprobs))
        return scores

    def _pooled(self, segment: Segment, request: _Request, hidden_TD: Tensor) -> list[float]:
        """The mean over all tokens, once the last is in."""
        added_D = hidden_TD.double().sum(0)
        request.hidden_sum_D = added_D if request.hidden_sum_D is None else request.hidden_sum_D + added_D
        return (request.hidden_sum_D / request.begins.prompt).tolist() if segment.last else []

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, V), whole on every tensor rank, in float32 or better."""
        logits_RV = self._decoder.logits(hidden_RD)
        if self._mesh.tp is not None:
            logits_RV = gather_columns(logits_RV, self._mesh.tp, self._decoder.spec.vocabulary)
        return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()


def _asked(segments: list[Segment], requests: list[_Request]) -> list[_Request]:
    """Who is given a token, in a step whose tokens may be taken up unseen: in one with guesses none is."""
    if any(segment.guesses for segment in segments):
        return []
    return [request for segment, request in zip(segments, requests, strict=True) if segment.last and segment.samples]


def _accept(segment: Segment, chosen: list[tuple[int, Score | None]], outcome: Outcome) -> None:
    """Tokens up to the first that a guess has missed."""
    guesses = segment.tokens[len(segment.tokens) - segment.guesses :]
    for index, (token, score) in enumerate(chosen):
        if token < 0:
            outcome.problem = (
                "the model's logits are not finite: its weights are broken, or too large for this precision"
            )
            return
        outcome.tokens.append(token)
        if score is not None:
            outcome.scores.append(score)
        if index < len(guesses) and token != guesses[index]:
            return
